"""tools.py --keyword predict: classes of images by a checkpoint's network."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
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


@pytest.mark.slow
def test_every_exported_file_predicts(call: Call, images: Path, tmp_path: Path) -> None:
    """As the checkpoint does, through the words export and predict; names of classes may be any bytes."""
    old = saved(tmp_path / "x.pth", classes=["caf\udce9", *"123456789"])
    files = {
        "onnx": tmp_path / "x.onnx",
        "openvino": tmp_path / "x.xml",
        "packed": tmp_path / "x.safetensors",
        "program": tmp_path / "x.pt2",
        "c": tmp_path / "x.h",
    }
    for to, new in files.items():
        assert call("--keyword", f"export_{to}", "--old", old, "--new", new)[0] == 0
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "network.onnx").write_bytes(files["onnx"].read_bytes())
    rows = {}
    for network in (old, *files.values(), tmp_path / "page"):
        output = tmp_path / "rows.jsonl"
        status, _, err = call(
            "--keyword", "predict", images, "--old", network, "--output", output, "--force", "--topk", "10"
        )
        assert status == 0, err
        rows[network.name] = [json.loads(line) for line in output.read_text().splitlines()]
        for one, expected in zip(rows[network.name], rows["x.pth"], strict=True):
            found = dict(zip(one["classes"], one["probabilities"], strict=True))
            wanted = dict(zip(expected["classes"], expected["probabilities"], strict=True))
            assert found == pytest.approx(wanted, rel=1e-3), network.name
        if network != old:
            status, _, err = call("--keyword", "predict", images, "--old", network, "--ema_weights")
            assert (status, err.count("\n")) == (2, 1) and "has one set of weights" in err


def linear(path: Path, **texts: object) -> Path:
    """An ONNX file of 3 x 4 x 4 pixels and 3 classes, with texts in its metadata."""
    weight = numpy_helper.from_array(np.ones((48, 3), np.float32), "w")
    nodes = [
        onnx.helper.make_node("Flatten", ["input"], ["flat"]),
        onnx.helper.make_node("MatMul", ["flat", "w"], ["logits"]),
    ]
    shapes = {"input": ["n", 3, 4, 4], "logits": ["n", 3]}
    values = [onnx.helper.make_tensor_value_info(name, 1, shape) for name, shape in shapes.items()]
    graph = onnx.helper.make_graph(nodes, "g", values[:1], values[1:], [weight])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=7)
    onnx.helper.set_model_props(model, {name: json.dumps(text) for name, text in texts.items()})
    onnx.save(model, path)
    return path


COLOURS = ImageTransform(size=4, mean=(0.5,) * 3, std=(0.5,) * 3).to_dict()
GREY = ImageTransform(size=4, mean=(0.5,), std=(0.5,)).to_dict()


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"classes": ["a", "b"], "images": COLOURS}, "(4, 3) for 4 images, and its file names 2 classes"),
        ({"classes": [*"abcdefgh"], "images": COLOURS}, "(4, 3) for 4 images, and its file names 8 classes"),
        ({"classes": [*"abc"], "images": GREY}, "onnxruntime does not take images of 1 x 4 x 4"),
        ({"classes": "abc", "images": COLOURS}, "does not say what its classes and images are"),
        ({"classes": 3, "images": COLOURS}, "does not say what its classes and images are"),
        ({"classes": [1, 2, 3], "images": COLOURS}, "does not say what its classes and images are"),
        ({"classes": [*"abc"]}, "does not say what its classes and images are"),
        ({"classes": [*"abc"], "images": [COLOURS]}, "its images are described as"),
    ],
)
def test_files_that_do_not_fit(
    call: Call, images: Path, tmp_path: Path, texts: dict[str, object], message: str
) -> None:
    path = linear(tmp_path / "x.onnx", **texts)
    status, out, err = call("--keyword", "predict", images, "--old", path, "--topk", "7")
    assert (status, out) == (2, "") and err.splitlines()[-1].startswith("tools.py: error: ")
    assert message in err.splitlines()[-1], err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.pt2", b"no zip", "damaged, cut short or no program of torch.export"),
        ("x.safetensors", b"no header", "damaged, cut short or no packed network"),
        ("x.h", b"#define X", "x.h: not a header that export --to c has written"),
        ("gone.pt2", None, "gone.pt2: cannot be read (No such file or directory)"),
        ("gone.safetensors", None, "gone.safetensors: cannot be read (No such file or directory"),
        ("photos", None, "photos is a folder without network.onnx"),
    ],
)
def test_damaged_and_foreign_files(
    call: Call, images: Path, name: str, content: bytes | None, message: str
) -> None:
    path = images.parent / name
    if content is not None:
        path.write_bytes(content)
    status, out, err = call("--keyword", "predict", images, "--old", path)
    assert (status, out, err.count("\n")) == (2, "", 1) and message in err
