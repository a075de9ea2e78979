"""What reducing images once costs in accuracy: trainings on drawn photographs with and without `--max_side`.

Letters in fonts of matplotlib, in light colours, before a background of coarse and fine texture, so that resizing
matters. JPEG files have 90 to 230 pixels in the longer side and are reduced to 114, which is to the network's
64 pixels as 400 is to 224. Both trainings of a seed have the same start and the same batches.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import main
from utils.data.glyphs import HELD_OUT_FONTS, TRAIN_FONTS, font_files
from utils.data.shards.origin import open_origin
from utils.data.shards.write import Reduction, write_set
from utils.report.run_files import read
from utils.text import format_table

LETTERS = "AEHKMSTX"
SIDES = (90, 231)  # pixels of the longer side, from and to
MAX_SIDE, INPUT = 114, 64
IMAGES = {"train": 80, "val": 60}  # of each letter
EPOCHS = 8


def photograph(letter: str, font: Path, rng: np.random.Generator) -> Image.Image:
    """A letter before a texture."""
    longer = int(rng.integers(*SIDES))
    width, height = (longer, round(longer * rng.uniform(0.65, 1)))[:: rng.choice([-1, 1])]
    pixels = np.zeros((height, width, 3), np.float32)
    for cells in (3, 12, 48):
        noise = rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
        pixels += np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)) / 3
    pixels = 40 + 0.5 * pixels + rng.normal(0, 12, pixels.shape)
    texture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    size = min(width, height) * rng.uniform(0.6, 0.9)
    draw = ImageDraw.Draw(texture)
    place = (width * rng.uniform(0.4, 0.6), height * rng.uniform(0.4, 0.6))
    colour = tuple(int(value) for value in rng.integers(200, 256, 3))
    draw.text(place, letter, fill=colour, font=ImageFont.truetype(font, size), anchor="mm")
    return texture


def write_photographs(folder: Path) -> None:
    """Write `train` and `val`, which has fonts of its own too, with a folder for each letter."""
    files = font_files()
    for number, (part, count) in enumerate(IMAGES.items()):
        fonts = TRAIN_FONTS if part == "train" else TRAIN_FONTS + HELD_OUT_FONTS
        for label, letter in enumerate(LETTERS):
            rng = np.random.default_rng((number, label))
            (folder / part / letter).mkdir(parents=True)
            for i in range(count):
                image = photograph(letter, files[fonts[i % len(fonts)]], rng)
                image.save(folder / part / letter / f"{i}.jpg", quality=92)


def accuracy(folder: Path, shards: Path, seed: int) -> float:
    """Top-1 in percent after the last epoch of a training."""
    case = f"{shards.name}-{seed}"
    line = (
        f"--dataset shards --root {shards} --case {case} --seed {seed} --model resnet20 --width_alpha 0.25 -j 0 "
        f"--keyword origin,cbas --input_size {INPUT} -b 16 -v 160 --epochs {EPOCHS} --lr 0.05 "
        "--lr_policy sgdr --nesterov --weight_decay 5e-4 --wakeup_epoch 1"
    )
    with contextlib.chdir(folder):
        if main.main(line.split()):
            raise RuntimeError(f"the training {case} failed")
        (run,) = read([Path("exp") / case])
    return run.metrics[-1]["val_top1"]


def cost_in_accuracy(base: Path, seeds: Sequence[int]) -> str:
    """Train on whole and on reduced images for each seed; returns a table."""
    write_photographs(base / "photographs")
    reductions = {"whole": None, "reduced": Reduction(max_side=MAX_SIDE, quality=90)}
    for name, reduction in reductions.items():
        write_set(
            open_origin(base / "photographs"),
            base / name,
            per_shard=500,
            reduction=reduction,
            threads=1,
            force=False,
        )
    found: dict[str, list[float]] = {name: [] for name in reductions}
    for seed in seeds:
        for name, values in found.items():
            values.append(accuracy(base, base / name, seed))
    found["difference"] = [b - a for a, b in zip(found["whole"], found["reduced"], strict=True)]
    head = ("images", *(f"seed {seed}" for seed in seeds), "mean", "lowest", "highest")
    rows = [
        (name, *(f"{value:.2f}" for value in (*values, statistics.mean(values), min(values), max(values))))
        for name, values in found.items()
    ]
    return format_table(head, rows)
