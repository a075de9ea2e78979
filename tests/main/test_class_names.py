"""Names of classes: a checkpoint has them, and what goes on with it compares them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tools
from model.load import load
from tests.main.runs import call, checkpoint, done_in
from utils.checkpoint.archive import read as read_checkpoint
from utils.checkpoint.archive import save as save_checkpoint
from utils.checkpoint.recorded import resolve
from utils.config.command_line import parse

LINE = (
    "--dataset imagenet --root photos --num_classes 3 --keyword cbas,origin,small_stem --model resnet20 "
    "--width_alpha 0.125 --input_size 16 -b 6 -v 6 -j 0"
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images of the classes a, b and c, and a run of one epoch, case `old`."""
    folder = tmp_path_factory.mktemp("classes")
    draw = np.random.default_rng(0)
    for part in ("train", "val"):
        for name in "abc":
            (folder / "photos" / part / name).mkdir(parents=True)
            for i in range(2):
                pixels = draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / "photos" / part / name / f"{i}.png")
    return done_in(folder, f"{LINE} --case old --epochs 1")


@pytest.fixture
def renamed(trained: Path, tmp_path: Path) -> str:
    """The checkpoint's path, in a folder whose class `a` is called `z` now, which makes it the last one."""
    (tmp_path / "weights").symlink_to(trained / "weights")
    for part in ("train", "val"):
        (tmp_path / "photos" / part).mkdir(parents=True)
        for old, new in (("a", "z"), ("b", "b"), ("c", "c")):
            (tmp_path / "photos" / part / new).symlink_to(trained / "photos" / part / old)
    return "weights/resnet20/old-checkpoint.pth.tar"


@pytest.mark.parametrize(
    "how",
    [
        "-e --pretrained {}",
        "--pretrained {} --case new",
        "-r --case old --epochs 2",
        "-e -r --case old",
        "--distill_teacher resnet20 --distill_pretrained {} --case new",
    ],
)
def test_renamed_classes_are_an_error(
    trained: Path, renamed: str, tmp_path: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert checkpoint(trained, "old")["classes"] == ["a", "b", "c"]
    assert call(f"{LINE} {how.format(renamed)} --epochs 2") == 2
    error = capsys.readouterr().err
    assert "was trained with other classes: class 0 was 'a' and is 'b' now, class 1 was 'b' and" in error
    assert error.count("\n") == 1 and not (tmp_path / "exp").exists()


def test_where_names_do_not_count(renamed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A last layer that begins anew, weights without names, a file of an earlier version."""
    assert call(f"{LINE} --pretrained {renamed} --unresume_scope fc --case new --dry_run") == 0
    assert tools.main(["--keyword", "save", "--old", renamed, "--new", "bare.pth"]) == 0
    assert call(f"{LINE} -e --pretrained bare.pth") == 0
    payload = read_checkpoint(Path(renamed))
    del payload["classes"]
    save_checkpoint(tmp_path / "older.pth", payload)
    capsys.readouterr()
    assert call(f"{LINE} -e --pretrained older.pth") == 0
    assert "warning: older.pth does not hold the names of its classes" in capsys.readouterr().out
    assert call(f"{LINE} --dataset fake -e --pretrained {renamed}") == 0
    assert "does not hold" not in capsys.readouterr().out


def folders_of(trained: Path, to: Path, names: dict[str, str], parts: Sequence[str] = ("val",)) -> None:
    """A folder `photos` in `to` with these classes of the trained one, under other names."""
    (to / "weights").symlink_to(trained / "weights")
    for part in parts:
        (to / "photos" / part).mkdir(parents=True)
        for old, new in names.items():
            (to / "photos" / part / new).symlink_to(trained / "photos" / part / old)


@pytest.mark.parametrize("options", [LINE, ""])
@pytest.mark.parametrize("names", ["b", "ac", "abc"])
def test_a_part_of_the_classes_is_evaluated(
    trained: Path, tmp_path: Path, names: str, options: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """A folder with `val/` alone and some classes: their images count as the classes that they were trained as."""
    folders_of(trained, tmp_path, dict(zip(names, names, strict=True)))
    monkeypatch.chdir(tmp_path)
    file = "weights/resnet20/old-checkpoint.pth.tar"
    assert call(f"{options} -e -j 0 --root photos --pretrained {file}") == 0
    shown = float(capsys.readouterr().out.rpartition("top-1 ")[2].partition(",")[0])
    network, transform, classes = load(file)
    images = [path for name in names for path in sorted(Path("photos/val", name).iterdir())]
    with torch.no_grad():
        found = network(torch.stack([transform(path) for path in images])).argmax(1)
    right = [classes[i] == path.parent.name for i, path in zip(found.tolist(), images, strict=True)]
    assert shown == pytest.approx(100 * sum(right) / len(right), abs=0.01)


@pytest.mark.parametrize("how", ["-r --case old", "--resume_file {}"])
def test_a_resumed_evaluation_takes_a_part_of_the_classes(
    trained: Path,
    tmp_path: Path,
    how: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As `--pretrained` does; the first class is missing, so that the others keep their numbers."""
    folders_of(trained, tmp_path, {"b": "b", "c": "c"})
    monkeypatch.chdir(tmp_path)
    file = "weights/resnet20/old-checkpoint.pth.tar"
    shown = []
    for line in (f"--pretrained {file}", how.format(file)):
        assert call(f"{LINE} -e {line}") == 0
        shown.append(capsys.readouterr().out.rpartition("top-1 ")[2].splitlines()[0])
    assert shown[0] == shown[1]


def test_a_run_without_names_takes_none_of_another_checkpoint(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "weights" / "resnet20"
    folder.mkdir(parents=True)
    payload = checkpoint(trained, "old")
    del payload["classes"]
    save_checkpoint(folder / "own-checkpoint.pth.tar", payload)
    other = trained / "weights" / "resnet20" / "old-checkpoint.pth.tar"
    line = f"{LINE} -e -r --weights_dir {tmp_path / 'weights'} --pretrained {other} --case"
    assert resolve(parse(f"{line} own".split())).data.classes == ()
    assert resolve(parse(f"{line} none".split())).data.classes == ("a", "b", "c")


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (
            {"a": "a", "b": "dog"},
            "photos/val has classes that the checkpoint was not trained with: dog; its classes",
        ),
        ({"a": "b", "b": "c", "c": "d"}, "was trained with other classes: class 0 was 'a' and is 'b' now"),
        (
            {"a": "a", "b": "b", "c": "c", "../val/a": "d"},
            "that the checkpoint was not trained with: d; its classes are a",
        ),
    ],
)
def test_unknown_classes_are_an_error(
    trained: Path, tmp_path: Path, names: dict[str, str], text: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folders_of(trained, tmp_path, names)
    monkeypatch.chdir(tmp_path)
    assert call("-e -j 0 --root photos --pretrained weights/resnet20/old-checkpoint.pth.tar") == 2
    error = capsys.readouterr().err
    assert text in error and error.count("\n") == 1
