"""tools.py exports the network of a recorded checkpoint, verifies the file, and predicts with it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from pathlib import Path

import onnx
import pytest
from PIL import Image

import tools
from model.deploy import packages
from model.deploy.formats import ENDINGS
from model.deploy.packages import needed
from model.deploy.packed import read_checkpoint
from tests import ROOT
from tests.main.runs import LSQ, done_in
from utils.checkpoint import archive
from utils.checkpoint.exported import NETWORK
from utils.errors import UserError
from utils.report import verified

CHECKPOINT = ROOT / "tests" / "recorded" / "lsq.pth.tar"
# A network that is exported sooner than the recorded one.
SMALL = "--model nin --keyword digits,dorefa,lsq --bits 2 --width_alpha 0.125 --input_size 16 -b 64 -v 360 --epochs 1"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of it."""
    folder = done_in(tmp_path_factory.mktemp("small"), f"{SMALL} --case small")
    return folder / "weights" / "nin" / "small-checkpoint.pth.tar"


def words(*arguments: str | Path) -> int:
    return tools.main([str(argument) for argument in arguments])


def export(to: str, new: Path, *more: str, old: Path = CHECKPOINT) -> int:
    return words("--keyword", f"export_{to}", "--old", old, "--new", new, *more)


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
        "openvino, basic",
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


@pytest.mark.slow
def test_files_for_torch_and_pages_are_verified(
    tmp_path: Path, small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A packed network to the last bit, a program with its codes, a page by the ONNX file in it."""
    files = {"packed": tmp_path / "any.name", "program": tmp_path / "other.name", "c": tmp_path / "x.h",
             "mnn": tmp_path / "x.mnn", "onnx": tmp_path / "x.onnx"}  # fmt: skip
    for to, path in files.items():
        assert export(to, path, old=small) == 0
    page = tmp_path / "page"
    page.mkdir()
    files["onnx"].rename(page / NETWORK)
    report = tmp_path / "report.json"
    given = (files["packed"], files["program"], files["c"], files["mnn"], page)
    assert words("--keyword", "verify", "--old", small, *given, "--output", report, "--threads", "2") == 0
    printed = capsys.readouterr().out
    assert "page/network.onnx: the ONNX file of a page, run here and not in a browser" in printed
    assert "2 threads" in printed
    packed, program, header, mnn, plain, *others = json.loads(report.read_text())["comparisons"]
    for item in (packed, program):
        assert (item["engine"], item["logits"], item["same"], item["integer"]) == ("torch", 0.0, 1.0, 0)
        assert len(item["codes"]) == 7 and set(item["codes"].values()) == {0.0}
        assert item["layers"] == 9 and item["bytes"] > 0 and item["milliseconds"] > 0
    assert (header["engine"], header["same"], header["integer"], header["layers"]) == ("cc", 1.0, 7, 9)
    assert len(header["codes"]) == 7 and max(header["codes"].values()) < 1e-4  # sums in another order
    for item in (mnn, plain):
        assert (item["same"], item["integer"], item["layers"]) == (1.0, 0, 9)
        assert len(item["codes"]) == 7 and max(item["codes"].values()) < 1e-3
    assert [item["engine"] for item in (mnn, plain)] == ["mnn, default", "mnn, basic"]
    assert {(item["engine"], item["file"]) for item in others} == {
        (f"{name}, {how}", str(page / NETWORK))
        for name in ("onnxruntime", "openvino")
        for how in ("default", "basic")
    }

    # Another network's packed file: weights with one changed number.
    payload = read_checkpoint(files["packed"])
    name, weight = next((name, one) for name, one in payload["state_dict"].items() if name.endswith("bias"))
    payload["state_dict"][name] = weight + 1e-3
    archive.save(tmp_path / "x.pth.tar", payload)
    assert words("--keyword", "export_packed", "--old", tmp_path / "x.pth.tar", "--new", tmp_path / "x") == 0
    assert words("--keyword", "verify", "--old", small, tmp_path / "x") == 1
    assert "its logits are not those of the checkpoint to the last bit" in capsys.readouterr().out


@pytest.mark.slow
def test_sums_of_eight_bits_are_judged_by_their_own_codes(tmp_path: Path) -> None:
    """Other codes than torch's are what the option does; the engine's integers must give those of the file.

    The recorded network was trained for one epoch, so that its accuracy suffers, which is a fault.
    """
    path, report = tmp_path / "x.onnx", tmp_path / "report.json"
    assert export("onnx", path, "--int8_sums") == 0
    assert words("--keyword", "verify", "--old", CHECKPOINT, path, "--output", report) == 1
    found = {item["engine"]: item for item in json.loads(report.read_text())["comparisons"]}
    default = found["onnxruntime, default"]
    assert default["integer"] == 20 and max(default["codes"].values()) > 0.01
    assert len(default["optimiser"]) == 20 and max(default["optimiser"].values()) < 0.01
    assert found["onnxruntime, basic"]["optimiser"] == {}
    for engine in ("onnxruntime, default", "onnxruntime, basic"):
        (fault,) = found[engine]["faults"]
        assert fault.startswith("top-1 is ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--to", "onnx", "--new", "x.bin"), "end the name of this format's files in .onnx"),
        (("--to", "c", "--new", "x.c"), "end the name of this format's files in .h"),
        (("--to", "openvino", "--new", "x.onnx"), "end the name of this format's files in .xml"),
        (("--to", "qonnx", "--new", "x.onnx", "--uint8_input"), "--uint8_input means nothing to qonnx"),
        (
            ("--to", "mnn", "--new", "x.mnn", "--int8_weights"),
            "means nothing to mnn; leave it out or write --to litert",
        ),
        (("--to", "litert", "--new", "x.lite"), "end the name of this format's files in .tflite"),
        (("--to", "mnn", "--new", "x.tflite"), "end the name of this format's files in .mnn"),
        (("--to", "executorch", "--new", "x.pt"), "end the name of this format's files in .pte"),
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
    ("to", "more", "missing"),
    [
        ("openvino", (), "onnx onnxscript openvino"),
        ("onnx", ("--int8_sums",), "onnx onnxscript onnxruntime"),
        ("litert", (), "onnx onnxscript ai_edge_litert==2.3.0"),
        ("mnn", (), "onnx onnxscript MNN==3.6.1 flatbuffers"),
        ("executorch", (), "onnx onnxscript executorch==1.5.1"),
        ("packed", (), "safetensors"),
    ],
)
def test_a_missing_package_is_named_with_its_command(
    to: str,
    more: tuple[str, ...],
    missing: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert export(to, tmp_path / f"x{ENDINGS.get(to, '')}", *more) == 2
    assert f"pip install {missing}\n" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "tested"),
    [("ai_edge_litert", "2.3.0"), ("executorch", "1.5.1"), ("MNN", "3.6.1"), ("qonnx", "1.0.0")],
)
def test_another_version_is_a_warning(
    name: str, tested: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip(name)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.0")
    packages._warn_of_version.cache_clear()
    needed(name)
    packages._warn_of_version.cache_clear()
    assert f"warning: {name} 1.0 is installed, and {tested} was tested" in capsys.readouterr().err


def test_a_package_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "halfinstalled.py").write_text("import halfinstalled_core")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"No module named 'halfinstalled_core'.*--force-reinstall halfinsta"):
        needed("halfinstalled")


def test_files_that_verify_cannot_take(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(b"no protobuf")
    foreign = tmp_path / "foreign.onnx"
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    other = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "g", [value], [other])
    onnx.save(onnx.helper.make_model(graph), foreign)
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(b"")
    for path, message in (
        (damaged, "not a valid ONNX file"),
        (foreign, "not a file that this tool exports"),
        *(
            (tmp_path / f"none.{ending}", "no such file")
            for ending in ("onnx", "xml", "pt2", "pte", "safetensors", "tflite", "mnn")
        ),
        (photo, "no exported file"),
    ):
        assert words("--keyword", "verify", "--old", CHECKPOINT, path) == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_the_bytes_are_those_of_all_files(
    tmp_path: Path, small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """OpenVINO's weights lie beside its .xml."""
    assert export("openvino", tmp_path / "x.xml", old=small) == 0
    written = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert f"{written:,} bytes" in capsys.readouterr().out and len(list(tmp_path.iterdir())) == 2


@pytest.mark.slow
def test_a_verification_is_kept_in_the_folder_of_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the checkpoint is one of that run; a copy elsewhere may be of another one."""
    done_in(tmp_path, f"{LSQ} --case two --epochs 1")
    monkeypatch.chdir(tmp_path)
    own, copy = Path("weights/resnet20/two-checkpoint.pth.tar"), Path("copy.pth.tar")
    copy.write_bytes(own.read_bytes())
    assert words("--keyword", "export_packed", "--old", own, "--new", "x.safetensors") == 0
    assert words("--keyword", "verify", "--old", copy, "x.safetensors") == 0
    assert not Path("exp/two/verified.json").exists()
    assert words("--keyword", "verify", "--old", own, "x.safetensors") == 0
    printed = capsys.readouterr().out
    assert "written: exp/two/verified.json, for tools.py --keyword report exp/two" in printed
    found = verified.read(Path("exp/two"))
    assert found is not None and found.as_text() in printed
    assert words("--keyword", "report", "exp/two") == 0
    assert "x.safetensors" in Path("exp/two/report.html").read_text()
