"""tools.py --keyword predict: classes of images by a checkpoint's network."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tools
from model.load import load
from model.networks import build
from tests.model.test_load import changed, saved
from tests.utils.tools.commands import Call
from utils.config.recorded import from_dict
from utils.data.transform import ImageTransform


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder with images in folders, hidden ones, others, and one that cannot be read."""
    draw = np.random.default_rng(0)
    folder = tmp_path / "photos"
    for i, name in enumerate(("a.png", "b/c.JPG", "b/d/e.tiff", "z.webp", ".hidden/x.png")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8)).save(folder / name)
    (folder / "b" / "notes.txt").write_text("no image")
    return folder


READABLE = ["a.png", "b/c.JPG", "b/d/e.tiff", "z.webp"]


def test_tables_and_files(call: Call, images: Path, tmp_path: Path) -> None:
    """The probabilities are the softmax of `load`'s logits, whatever the batches."""
    path = saved(tmp_path / "x.pth", classes=[f"class {i}" for i in range(10)])
    network, transform, classes = load(path)
    with torch.no_grad():
        shares = network(torch.stack([transform(images / name) for name in READABLE])).softmax(1)
    words = ("--keyword", "predict", "--old", path, images)
    status, out, err = call(*words, "--topk", "2", "-b", "3", "--output", tmp_path / "x.csv")
    assert (status, out, err) == (0, f"{tmp_path / 'x.csv'}: 4 images\n", "")
    rows = list(csv.DictReader((tmp_path / "x.csv").read_text().splitlines()))
    assert [row["image"] for row in rows[::2]] == [str(images / name) for name in READABLE]
    assert [row["rank"] for row in rows] == ["1", "2"] * 4
    best = shares.topk(2, dim=1)
    for row, share, number in zip(rows, best.values.flatten(), best.indices.flatten(), strict=True):
        assert row["class"] == classes[number] and float(row["probability"]) == pytest.approx(
            float(share), abs=1e-6
        )

    assert call(*words, "--topk", "99", "--output", tmp_path / "x.jsonl")[0] == 0
    found = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    assert [sum(row["probabilities"]) for row in found] == pytest.approx([1] * 4)
    assert all(sorted(row["classes"]) == sorted(classes) for row in found)
    status, out, _ = call("--keyword", "predict", "--old", path, images / "a.png", "--topk", "1")
    head, _, line = out.splitlines()
    assert (status, head.split()) == (0, ["image", "class", "1", "%"])
    assert line.split() == [
        str(images / "a.png"),
        *found[0]["classes"][0].split(),
        f"{100 * float(shares[0].max()):.2f}",
    ]


def test_grey_networks_take_colours(call: Call, images: Path, tmp_path: Path) -> None:
    transform = ImageTransform(size=(32, 64), mean=(0.5,), std=(0.5,), resize_ratio=1.0)
    config = changed(channels=1, width_alpha=0.125, input_size=[32, 64])
    state = build.build_network(from_dict(config, "x").model).state_dict()
    path = saved(
        tmp_path / "x.pth", config=config, state_dict=state, images=transform.to_dict(), classes=None
    )
    status, out, _ = call("--keyword", "predict", "--old", path, images, "--topk", "1")
    assert status == 0 and len(out.splitlines()) == 6


def test_unreadable_images_are_listed(call: Call, images: Path, tmp_path: Path) -> None:
    """The others are predicted, and the status is 1; without any other it is a mistake."""
    path = saved(tmp_path / "x.pth")
    (images / "b" / "bad.png").write_bytes(b"no image")
    status, out, err = call("--keyword", "predict", "--old", path, images)
    assert (status, err.count("\n"), len(out.splitlines())) == (1, 1, 6)
    assert err == f"tools.py: cannot read the image {images}/b/bad.png (no image)\n"
    status, out, err = call("--keyword", "predict", "--old", path, images / "b" / "bad.png")
    assert (status, out, err.count("\n")) == (2, "", 1)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["gone"], "gone: no such file or folder; name images"),
        (["empty"], "empty has no image in it"),
        ([], "the word predict needs images"),
        (["a.png", "--output", "x.txt"], "--output x.txt: end the file's name in .csv or .jsonl"),
        (["a.png", "--output", "gone/x.csv"], "--output gone/x.csv: name a file in a folder that exists"),
        (["a.png", "--output", "there.csv"], "there.csv exists; --force writes over it"),
        (["a.png", "--topk", "0"], "--topk"),
        (["a.png", "--root", "x"], "--root means nothing to the word predict"),
        (["a.png", "--keyword_file", "gone.py"], "--keyword_file gone.py: no such file"),
    ],
)
def test_mistakes(
    call: Call,
    tmp_path: Path,
    arguments: list[str],
    text: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    saved(Path("x.pth"))
    Path("empty").mkdir()
    Path("there.csv").write_text("kept")
    Image.new("RGB", (8, 8)).save("a.png")
    status, out, err = call("--keyword", "predict", "--old", "x.pth", *arguments)
    assert (status, out, err.count("\n")) == (2, "", 1) and text in err, err
    assert Path("there.csv").read_text() == "kept"
    assert (
        tools.main(["--keyword", "predict", "--old", "x.pth", "a.png", "--output", "there.csv", "--force"])
        == 0
    )
