"""tools.py writes a page over its own folder, and over nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest

from model.deploy.export import replace_with
from model.deploy.web import NETWORK, is_page, runtime
from tests.model.test_load import saved
from tests.utils.tools.commands import Call
from utils.errors import UserError
from utils.tools.options import Options


@pytest.mark.slow
def test_a_page_replaces_its_own_folder(call: Call, tmp_path: Path) -> None:
    """Of classes whose names are no UTF-8, too; one more file in the folder makes it the user's."""
    try:
        runtime.files()
    except UserError as error:
        pytest.skip(str(error))
    new = tmp_path / "page"
    classes = ["caf\udce9", *"123456789"]
    words = ("--keyword", "export_web", "--new", new, "--old")
    assert call(*words, saved(tmp_path / "x.pth"))[0] == 0 and is_page(new)
    other = saved(tmp_path / "y.pth", classes=classes)
    status, _, err = call(*words, other)
    assert status == 2 and "page exists; --force writes over it" in err
    assert call(*words, other, "--force")[0] == 0 and is_page(new)
    described = {item.key: item.value for item in onnx.load(new / NETWORK).metadata_props}
    assert json.loads(described["classes"]) == classes
    assert json.dumps(classes) in (new / "index.html").read_text("ascii")
    assert {path.name for path in tmp_path.iterdir()} == {"page", "x.pth", "y.pth"}

    (new / "notes.txt").write_text("mine")
    status, out, err = call(*words, other, "--force")
    assert (status, out, err.count("\n")) == (2, "", 1) and "page is a folder" in err
    assert (new / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("to", ["onnx", "openvino", "qonnx", "packed", "program", "web", "import"])
def test_a_folder_stays(to: str, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it is called, with --force and without, and before the checkpoint is read."""
    monkeypatch.chdir(tmp_path)
    new = Path({"onnx": "mine.onnx", "openvino": "mine.xml", "qonnx": "mine.onnx"}.get(to, "mine"))
    new.mkdir()
    link = Path(f"link{new.suffix}")
    link.symlink_to(new)
    (new / "notes.txt").write_text("mine")
    word = "import" if to == "import" else f"export_{to}"
    for more in ([], ["--force"]):
        for name in (new, link):
            status, out, err = call("--keyword", word, "--old", "gone.pth", "--new", name, *more)
            assert (status, out, err.count("\n")) == (2, "", 1)
            assert f"{name} is a folder, which --force does not replace" in err
    assert (new / "notes.txt").read_text() == "mine"


def test_a_page_does_not_replace_a_file(call: Call, tmp_path: Path) -> None:
    new = tmp_path / "page"
    new.write_text("mine")
    status, _, err = call("--keyword", "export_web", "--old", "gone.pth", "--new", new, "--force")
    assert status == 2 and "page is a file; name a folder" in err and new.read_text() == "mine"


def test_a_folder_in_the_way_of_the_second_file_stays(tmp_path: Path) -> None:
    (tmp_path / "x.bin").mkdir()

    def write(path: Path) -> None:
        path.write_text("network")
        path.with_suffix(".bin").write_text("weights")

    with pytest.raises(UserError, match=r"x\.bin is a folder"):
        replace_with(tmp_path / "x.xml", write, Options(force=True))
    assert [path.name for path in tmp_path.iterdir()] == ["x.bin"]
