"""tools.py exports the network of a recorded checkpoint, verifies the file, and predicts with it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import onnx
import pytest
from PIL import Image

import tools
from tests import ROOT

CHECKPOINT = ROOT / "tests" / "recorded" / "lsq.pth.tar"


def words(*arguments: str | Path) -> int:
    return tools.main([str(argument) for argument in arguments])


def export(to: str, new: Path, *more: str) -> int:
    return words("--keyword", f"export_{to}", "--old", CHECKPOINT, "--new", new, *more)


@pytest.mark.slow
def test_an_onnx_file_is_verified_and_predicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, report = tmp_path / "digits.onnx", tmp_path / "report.json"
    assert export("onnx", path, "--uint8-input") == 0
    model = onnx.load(path)
    assert ([item.version for item in model.opset_import], model.ir_version) == ([13], 7)
    assert path.stat().st_size < 70_000  # 5.8 million bytes in the checkpoint
    described = {item.key: json.loads(item.value) for item in model.metadata_props}
    assert described["classes"] == [str(digit) for digit in range(10)]
    assert (described["images"]["height"], described["images"]["channels"]) == (32, 3)

    assert words("--keyword", "verify", "--old", CHECKPOINT, path, "--output", report) == 0
    assert "onnxruntime, default" in capsys.readouterr().out
    found = json.loads(report.read_text())["comparisons"]
    assert [item["engine"] for item in found] == [
        "onnxruntime, default",
        "onnxruntime, basic",
        "openvino, default",
    ]
    for item in found:
        assert item["images"] == 360 and item["same"] > 0.995 and len(item["codes"]) == 20

    image = tmp_path / "image.png"
    Image.new("RGB", (8, 8), "white").save(image)
    predicted = []
    for network in (CHECKPOINT, path):
        output = tmp_path / "predicted.jsonl"
        assert words("--keyword", "predict", image, "--old", network, "--output", output, "--force") == 0
        predicted.append(json.loads(output.read_text()))
    first, second = predicted
    assert first["classes"] == second["classes"]
    assert first["probabilities"] == pytest.approx(second["probabilities"], rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--to", "onnx", "--new", "x.bin"), "end the name of this format's files in .onnx"),
        (("--to", "openvino", "--new", "x.onnx"), "end the name of this format's files in .xml"),
        (("--to", "qonnx", "--new", "x.onnx", "--uint8_input"), "--uint8_input means nothing to qonnx"),
        (("--to", "onyx", "--new", "x.onnx"), "did you mean onnx"),
        (("--to", "onnx", "--new", "x.onnx", "--root", "x"), "--root x has no effect without --int8_sums"),
        (("--to", "packed", "--new", "x", "--root", "x"), "--root x has no effect without --int8_sums"),
        (
            ("--to", "onnx", "--new", "x.onnx", "--root", "x", "--int8_sums"),
            "--root x has no effect with the data set digits, which needs no files",
        ),
    ],
)
def test_mistakes_in_exports(
    arguments: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert words("--keyword", "export", "--old", CHECKPOINT, *arguments) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("to", "more", "packages"),
    [
        ("openvino", (), "onnx onnxscript openvino"),
        ("onnx", ("--int8_sums",), "onnx onnxscript onnxruntime"),
        ("packed", (), "safetensors"),
    ],
)
def test_a_missing_package_is_named_with_its_command(
    to: str,
    more: tuple[str, ...],
    packages: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert export(to, tmp_path / "x.xml" if to == "openvino" else tmp_path / f"x.{to}", *more) == 2
    assert f"pip install {packages}\n" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_files_that_verify_cannot_take(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(b"no protobuf")
    foreign = tmp_path / "foreign.onnx"
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    other = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "g", [value], [other])
    onnx.save(onnx.helper.make_model(graph), foreign)
    for path, message in (
        (damaged, "not a valid ONNX file"),
        (foreign, "not a file that this tool exports"),
        (tmp_path / "none.onnx", "no such file"),
        (tmp_path / "photo.jpg", "no exported file"),
    ):
        assert words("--keyword", "verify", "--old", CHECKPOINT, path) == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_the_bytes_are_those_of_all_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """OpenVINO's weights lie beside its .xml."""
    assert export("openvino", tmp_path / "x.xml") == 0
    written = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert f"{written:,} bytes" in capsys.readouterr().out and len(list(tmp_path.iterdir())) == 2
