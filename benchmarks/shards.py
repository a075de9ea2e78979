"""Measures how fast shards are read, beside the same images as files and beside WebDataset's own loader.

    python benchmarks/shards.py                  # on generated photographs of 500x375 pixels
    python benchmarks/shards.py --root FOLDER    # on a folder of yours with train/ and val/
    python benchmarks/shards.py --accuracy       # what --max_side costs in accuracy, see reduced_images.py; minutes

Every round measures each way once, one after the other, so that other load on the machine affects all of them alike; a
ratio is of two figures of the same round, and the median over the rounds is printed with the quartiles. WebDataset's
loader decodes, crops and resizes with the same functions, and its batches are normalised as ours. Then follow how much
the network's input changes where images were reduced once, and the time until the first batch of a set of a million
samples is there.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from data import epoch, options
from reduced_images import cost_in_accuracy
from torch import Tensor

from utils.config.schema import DataConfig
from utils.data import sources
from utils.data.crop import crop_and_flip, put, resize
from utils.data.fake import write_folder
from utils.data.folder_sets import IMAGENET_MEAN, IMAGENET_STD
from utils.data.image_file import decode
from utils.data.loaders import CPU
from utils.data.shards.images import open_shards
from utils.data.shards.index import MANIFEST, Manifest, index_name
from utils.data.shards.origin import open_origin
from utils.data.shards.write import Reduction, write_set
from utils.text import format_table

SIZE = (224, 224)
MILLION = 1_000_000


def fitted(data: bytes, number: int) -> Tensor:
    """Decode an image and crop it at random, uint8 [224, 224, 3]."""
    image = decode(data)
    (top, left, height, width), flip = crop_and_flip(image.height, image.width, SIZE, 0, 0, number)
    crop = image.crop((left, top, left + width, top + height))
    to = torch.empty((*SIZE, 3), dtype=torch.uint8)
    put(resize(torch.from_numpy(np.array(crop)), *SIZE), to, flip=flip)
    return to


def fit_sample(sample: dict[str, Any]) -> tuple[Tensor, int]:
    """An image and its class, of a sample as WebDataset reads it."""
    return fitted(sample["jpg"], len(sample["jpg"])), int(sample["cls"])


def webdataset_epoch(folder: Path, workers: int, batch_size: int) -> Callable[[], None]:
    """A function that reads an epoch with the webdataset library, as its documentation shows."""
    import webdataset

    wds: Any = webdataset  # it makes its names while it is imported

    urls = [str(folder / shard.file) for shard in open_shards(folder, ["train"])["train"].shards]
    dataset = (
        wds.WebDataset(urls, shardshuffle=len(urls), nodesplitter=None, empty_check=False)
        .shuffle(1000)
        .map(fit_sample)
        .batched(batch_size, partial=False)
    )
    loader = wds.WebLoader(dataset, batch_size=None, num_workers=workers, persistent_workers=workers > 0)

    mean, std = (torch.tensor(values).mul(255).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))

    def run() -> None:
        for images, _ in loader:
            images.permute(0, 3, 1, 2).float().sub_(mean).div_(std)

    return run


def decode_all(paths: Sequence[str]) -> None:
    """The limit: files are read, decoded, cropped and resized, and nothing else."""
    for number, path in enumerate(paths):
        fitted(Path(path).read_bytes(), number)


def quotient(slower: Sequence[float], faster: Sequence[float]) -> str:
    """The median over the rounds of how many times as fast, and the quartiles."""
    found = [a / b for a, b in zip(slower, faster, strict=True)]
    low, middle, high = statistics.quantiles(found, n=4) if len(found) > 1 else found * 3
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def speeds(
    config: DataConfig, folders: dict[str, Path], rounds: int, clock: Callable[[], float]
) -> tuple[dict[str, list[float]], int]:
    """Seconds of an epoch by each way and round, and the images of an epoch."""
    ways: dict[str, Callable[[], object]] = {}
    for name, (dataset, root) in {
        "imagenet": ("imagenet", folders["files"]),
        "shards": ("shards", folders["shards"]),
        "shards, reduced": ("shards", folders["reduced"]),
    }.items():
        ways[name] = partial(epoch, sources.open_data(replace(config, dataset=dataset, root=root)).train, CPU)
    for name, root in (("webdataset", folders["shards"]), ("webdataset, reduced", folders["reduced"])):
        ways[name] = webdataset_epoch(root, config.workers, config.batch_size)
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            started = clock()
            way()
            if turn:  # the first starts processes
                taken[name].append(clock() - started)
    images = len(open_shards(folders["shards"], ["train"])["train"])
    return taken, images // config.batch_size * config.batch_size


def million(folder: Path, config: DataConfig, samples: Path) -> tuple[float, float]:
    """Seconds until a set of a million samples has its first batch, and bytes of its index for each sample.

    The set is the same tar file many times under other names.
    """
    (images,) = open_shards(samples, ["train"]).values()
    one, entries = images.shards[0], images._entries[images._entries["shard"] == 0]
    times = -(-MILLION // len(entries))
    shards = []
    for number in range(times):
        name = f"train-{number:06}.tar"
        os.link(samples / one.file, folder / name)
        shards.append(replace(one, file=name))
    everything = np.tile(entries, times)
    everything["shard"] = np.repeat(np.arange(times), len(entries))
    np.save(folder / index_name("train"), everything)
    manifest = Manifest(classes=images.classes, parts={"train": tuple(shards)})
    (folder / MANIFEST).write_text(json.dumps({"version": 1, **asdict(manifest)}))
    started = time.perf_counter()
    loader = sources.open_data(replace(config, dataset="shards", root=folder, val_batch_size=0)).train
    next(iter(loader))
    taken = time.perf_counter() - started
    return taken, (everything.nbytes + loader.target.nbytes) / len(everything)


def change(config: DataConfig, folders: dict[str, Path]) -> float:
    """Mean absolute difference of validation images, cropped to the network's input, in grey levels of 255."""
    images = []
    for name in ("shards", "reduced"):
        loader = sources.open_data(
            replace(config, dataset="shards", root=folders[name], std=(1 / 255,) * 3)
        ).val
        assert loader is not None
        images.append(torch.cat([batch for batch, _ in loader]))
    return float((images[0] - images[1]).abs().mean())


def size_row(name: str, folder: Path, part: str = "train") -> tuple[str, ...]:
    """Images, tar files and MiB of a set."""
    images = open_shards(folder, [part])[part]
    size = sum(shard.bytes for shard in images.shards)
    return name, f"{len(images):,}", str(len(images.shards)), f"{size / 2**20:.1f}"


def main() -> int:
    """Measure and print the tables."""
    parser = options(__doc__)
    parser.add_argument("--max_side", type=int, default=400, help="pixels, of the reduced set [400]")
    parser.add_argument("--accuracy", action="store_true", help="train with and without, and nothing else")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of the trainings [1 2 3]")
    given = parser.parse_args()
    if given.accuracy:
        with tempfile.TemporaryDirectory() as made:
            print(cost_in_accuracy(Path(made), given.seeds))
        return 0
    with tempfile.TemporaryDirectory() as made:
        base = Path(made)
        files = given.root or base / "files"
        if given.root is None:
            list(write_folder(files, given.images, 10, 500, 375))
        folders = {"files": files, "shards": base / "shards", "reduced": base / "reduced"}
        rows = []
        for name, reduction in (
            ("shards", None),
            ("reduced", Reduction(max_side=given.max_side, quality=90)),
        ):
            started = time.perf_counter()
            manifest = write_set(
                open_origin(files), folders[name], per_shard=128, reduction=reduction, threads=2, force=False
            )
            rows.append((*size_row(name, folders[name]), f"{time.perf_counter() - started:.1f}"))
        print(format_table(("set", "images", "tar files", "MiB", "seconds to write"), rows), end="\n\n")
        config = DataConfig(
            dataset="imagenet", root=files, num_classes=len(manifest.classes), input_size=SIZE,
            batch_size=given.batch_size,
        )  # fmt: skip
        rows = []
        for workers in (*given.workers, 0):
            clock = time.perf_counter if workers else time.process_time
            taken, count = speeds(replace(config, workers=workers), folders, given.rounds, clock)
            paths = [open_origin(files)["train"].name(i) for i in range(count)]
            limit = []
            if not workers:
                for _ in range(given.rounds):
                    started = clock()
                    decode_all(paths)
                    limit.append(clock() - started)
            for name, seconds in taken.items():
                pair = "webdataset" + ", reduced" * name.endswith("reduced")
                rows.append((
                    name, str(workers) if workers else "processor time of one process",
                    f"{count / statistics.median(seconds):.0f}", quotient(taken["imagenet"], seconds),
                    "" if name in (pair, "imagenet") else quotient(taken[pair], seconds),
                    quotient(limit, seconds) if limit and "reduced" not in name else "",
                ))  # fmt: skip
        heads = (
            "way", "workers", "images/s", "times imagenet's speed", "times webdataset's", "of decoding and resizing",
        )  # fmt: skip
        print(format_table(heads, rows), end="\n\n")
        print(
            f"reduced to {given.max_side}: inputs change by {change(config, folders):.2f} of 255 in the mean"
        )
        (base / "million").mkdir()
        taken_, size = million(
            base / "million", replace(config, workers=max(given.workers)), folders["shards"]
        )
        print(f"a million samples: first batch after {taken_:.1f} s, {size:.0f} bytes of index a sample")
    return 0


if __name__ == "__main__":
    sys.exit(main())
