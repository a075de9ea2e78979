"""The files of a case: where they are, which is the newest, which are kept, whatever ends a save."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import ROOT
from tests.utils.checkpoint.helpers import fill, message
from utils.checkpoint import archive
from utils.checkpoint.case_files import CheckpointFiles, find_pretrained
from utils.errors import UserError


@pytest.mark.parametrize("value", ["none", "None", " NONE ", "", "  "])
def test_no_pretrained_file(tmp_path: Path, value: str) -> None:
    """The word none, in any case."""
    assert find_pretrained(value, tmp_path, "resnet20") is None


def test_pretrained_is_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bare name: the model's folder, then here. A path: as it is."""
    weights, here = tmp_path / "weights", tmp_path / "here"
    inside = weights / "resnet20" / "a.pth"
    inside.parent.mkdir(parents=True)
    here.mkdir()
    monkeypatch.chdir(here)
    (here / "a.pth").touch()
    assert find_pretrained("a.pth", weights, "resnet20") == Path("a.pth")
    inside.touch()
    assert find_pretrained("a.pth", weights, "resnet20") == inside
    assert find_pretrained("./a.pth", weights, "resnet20") == Path("a.pth")
    assert find_pretrained(str(inside), Path("elsewhere"), "resnet18") == inside


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("case-model_bets.pth.tar", "close names there: case-model_best.pth.tar"),
        ("zzz", "in that folder: case-model_best.pth.tar, other.pth"),
        ("nowhere/zzz", "no such file in nowhere; in that folder: nothing"),
        ("n" * 300, "no such file"),
    ],
)
def test_a_missing_pretrained_file(tmp_path: Path, value: str, text: str) -> None:
    """An error with the names that are there."""
    folder = tmp_path / "resnet20"
    folder.mkdir()
    for name in ("case-model_best.pth.tar", "other.pth"):
        (folder / name).touch()
    with pytest.raises(UserError) as error:
        find_pretrained(value, tmp_path, "resnet20")
    assert text in message(error) and f"--pretrained {value}" in message(error)


def test_the_files_of_a_case() -> None:
    """Their names are public."""
    files = CheckpointFiles(Path("weights"), "resnet20", "lsq-2bit_a.1+")
    assert str(files.latest) == "weights/resnet20/lsq-2bit_a.1+-checkpoint.pth.tar"
    assert str(files.best) == "weights/resnet20/lsq-2bit_a.1+-model_best.pth.tar"
    assert str(files.epoch(12)) == "weights/resnet20/lsq-2bit_a.1+-epoch12-checkpoint.pth.tar"


@pytest.mark.parametrize("case", ["", ".a", "..", "a/b", "/a", "a b", "a\n", "ä", "a-epoch3", "a-backup1"])
def test_a_case_is_a_plain_name(case: str) -> None:
    """No separators, no hidden files, nothing that reads as another case's epoch file."""
    with pytest.raises(UserError, match="--case"):
        CheckpointFiles(Path("weights"), "resnet20", case)


def cut(path: Path) -> None:
    """Lose the last third of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])


def test_no_checkpoint_yet(tmp_path: Path) -> None:
    """Neither without a folder nor with other cases' files in it."""
    files = CheckpointFiles(tmp_path / "weights", "resnet20", "a")
    assert files.newest().path is None
    fill(CheckpointFiles(tmp_path / "weights", "resnet20", "a-b"), latest=5, e2=2)
    fill(CheckpointFiles(tmp_path / "weights", "resnet20", "ba"), latest=5)
    assert files.newest().path is None


@pytest.mark.parametrize(
    ("epochs", "newest"),
    [
        ({"latest": 3}, "latest"),
        ({"latest": 3, "e2": 2, "e3": 3}, "latest"),
        ({"latest": 3, "e2": 2, "e10": 10, "e9": 9}, "e10"),
        ({"e9": 9, "e10": 10}, "e10"),
        ({"e9": 10, "e10": 9}, "e9"),
    ],
)
def test_the_newest_is_the_one_with_the_highest_epoch_inside(
    tmp_path: Path, epochs: dict[str, int], newest: str
) -> None:
    """Not by name, not by time; the latest among equals."""
    files = CheckpointFiles(tmp_path, "resnet20", "a")
    fill(files, **epochs)
    assert files.newest().path == (files.latest if newest == "latest" else files.epoch(int(newest[1:])))


def test_damaged_checkpoints_are_passed_over(tmp_path: Path) -> None:
    """Cut short, a changed weight, no epoch: each is named and the one before is taken."""
    files = CheckpointFiles(tmp_path, "resnet20", "a")
    fill(files, latest=9, e9=9, e8=8, e7=7, e6=6)
    cut(files.latest)
    content = files.epoch(9).read_bytes()
    weights = np.ones(50, dtype=np.float32).tobytes()
    assert weights in content
    files.epoch(9).write_bytes(content.replace(weights, bytes(200)))
    archive.save(files.epoch(8), {"state_dict": {}})
    found = files.newest()
    assert found.path == files.epoch(7) and found.payload["epoch"] == 7
    assert len(found.passed_over) == 3
    for path in (files.latest, files.epoch(9), files.epoch(8)):
        assert sum(text.startswith(f"passed over {path}: ") for text in found.passed_over) == 1
    cut(files.epoch(7))
    cut(files.epoch(6))
    assert files.newest().path is None


def test_the_position_within_an_epoch_counts(tmp_path: Path) -> None:
    files = CheckpointFiles(tmp_path, "resnet20", "a")
    archive.save(files.latest, {"epoch": 3, "position": 16})
    archive.save(files.backup(1), {"epoch": 3, "position": 64})
    archive.save(files.best, {"epoch": 3})
    assert files.newest().path == files.backup(1)
    cut(files.backup(1))
    assert files.newest().path == files.latest
    cut(files.latest)
    assert files.newest().path == files.best


def payload_of(epoch: int) -> memoryview:
    return archive.serialise({"epoch": epoch, "w": torch.ones(1000)})


@pytest.fixture(params=[True, False], ids=["links", "no links"])
def links(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that knows links, and one that knows none."""
    if not request.param:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("no links here")))


def kept_epochs(files: CheckpointFiles, keep: int) -> list[int]:
    """The epochs in the latest checkpoint and those before it."""
    kept = [files.latest, *(files.backup(number) for number in range(1, keep))]
    return [archive.read(path)["epoch"] for path in kept if path.exists()]


@pytest.mark.parametrize("keep", [1, 2, 4])
def test_retention(tmp_path: Path, links: None, keep: int) -> None:
    """The latest and those before it, in order, and no more; also where the disk knows no links."""
    files = CheckpointFiles(tmp_path, "resnet20", "a")
    for epoch in range(1, 7):
        files.write_latest(payload_of(epoch), keep)
    assert kept_epochs(files, keep) == [6, 5, 4, 3][:keep]
    assert len(files.existing()) == keep
    files.write_latest(payload_of(7), 1)
    assert files.existing() == [files.latest]


def whole(files: CheckpointFiles) -> set[int]:
    """The epochs in all files of the case that are whole."""
    return {archive.read(path)["epoch"] for path in files.existing()}


STEPS = ("open", "fsync", "replace", "link", "unlink")  # of `os`


def save_ended_at(files: CheckpointFiles, epoch: int, step: int) -> bool:
    """Save in a process that ends itself in place of its nth step on the disk; whether it was ended."""
    pid = os.fork()
    if pid == 0:
        steps = iter(range(step))

        def ending(real: Any) -> Any:
            def stand_in(*arguments: Any, **options: Any) -> Any:
                if next(steps, None) is None:
                    os._exit(9)
                return real(*arguments, **options)

            return stand_in

        for name in STEPS:
            setattr(os, name, ending(getattr(os, name)))
        status = 1
        try:
            files.write_latest(payload_of(epoch), 3)
            status = 0
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, 9)
    return status == 9


def test_a_save_that_is_ended_at_any_step_loses_nothing(tmp_path: Path, links: None) -> None:
    """There are as many whole checkpoints as before, the newest among them; so there are after each next one."""
    files = CheckpointFiles(tmp_path, "resnet20", "a")
    for epoch in (1, 2, 3):
        files.write_latest(payload_of(epoch), 3)
    epoch, newest, ended = 4, 3, 0
    for step in range(100):  # every end begins with what the one before has left
        came_through = not save_ended_at(files, epoch, step)
        found = whole(files)
        assert len(found) >= 3 and max(found) in (newest, epoch), f"step {step}"
        assert {newest, newest - 1} <= found or max(found) == epoch
        newest, epoch, ended = max(found), max(found) + 1, ended + (not came_through)
        if came_through:
            break
    assert ended >= 5
    assert kept_epochs(files, 3)[0] == newest and len(files.existing()) == 3
    for step in range(100):  # every end in files that are in order
        for further in (1, 2, 3):
            files.write_latest(payload_of(newest + further), 3)
        newest += 3
        if not save_ended_at(files, newest + 1, step):
            break
        assert len(whole(files)) >= 3 and newest in whole(files)
        files.remove_leftovers()
        files.write_latest(payload_of(newest + 1), 3)
        assert kept_epochs(files, 3) in ([newest + 1, newest, newest - 1], [newest + 1, newest + 1, newest])
        assert len(files.existing()) == 3
        newest += 1


def test_saves_that_fail_leave_all_checkpoints(tmp_path: Path, interpreter: str) -> None:
    """A full disk, again and again: neither the latest one nor those before it are another file then."""
    files = CheckpointFiles(tmp_path, "resnet20", "a")
    for epoch in (1, 2, 3):
        files.write_latest(payload_of(epoch), 3)
    before = {path: (path.stat().st_ino, path.read_bytes()) for path in files.existing()}
    program = (
        "import resource, sys, pathlib, torch\n"
        "from utils.checkpoint import archive\n"
        "from utils.checkpoint.case_files import CheckpointFiles\n"
        "from utils.errors import UserError\n"
        "files = CheckpointFiles(pathlib.Path(sys.argv[1]), 'resnet20', 'a')\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
        "for _ in range(3):\n"
        "    try:\n"
        "        files.write_latest(archive.serialise({'w': torch.zeros(10000)}), 3)\n"
        "    except UserError as error:\n"
        "        print(error)\n"
    )
    done = subprocess.run(
        [interpreter, "-c", program, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.count("cannot be written (File too large)") == 3
    assert {path: (path.stat().st_ino, path.read_bytes()) for path in files.existing()} == before
    assert len(os.listdir(files.folder)) == 3


def test_a_damaged_latest_checkpoint_is_replaced(tmp_path: Path) -> None:
    """By the one that the run goes on from, so that no save keeps the damaged one; a whole one stays."""
    files = CheckpointFiles(tmp_path, "resnet20", "a")
    for epoch in (1, 2, 3):
        files.write_latest(payload_of(epoch), 3)
    archive.save(files.epoch(4), {"epoch": 4})
    files.promote(files.epoch(4))  # the latest one is whole
    assert kept_epochs(files, 3) == [3, 2, 1]
    cut(files.latest)
    files.promote(files.backup(1))
    files.write_latest(payload_of(5), 3)
    assert kept_epochs(files, 3) == [5, 2, 1]
    cut(files.latest)
    files.promote(files.epoch(4))
    assert kept_epochs(files, 3) == [4, 2, 1] and files.epoch(4).exists()


def test_leftovers_are_removed(tmp_path: Path) -> None:
    """Temporary files of this case, and no other file."""
    files = CheckpointFiles(tmp_path, "resnet20", "a")
    archive.save(files.latest, {"epoch": 1})
    others = [
        files.folder / name
        for name in (".b-checkpoint.pth.tar.7.tmp", "a.tmp", ".a-b-checkpoint.pth.tar.7.tmp")
    ]
    mine = [
        files.folder / f".a-{name}.pth.tar.17.tmp"
        for name in ("checkpoint", "model_best", "backup1-checkpoint")
    ]
    for path in (*others, *mine):
        path.touch()
    files.remove_leftovers()
    assert set(files.folder.iterdir()) == {files.latest, *others}


def test_a_model_cannot_leave_the_folder(tmp_path: Path) -> None:
    for name in ("../x", "a/../../x", "/x", ""):
        with pytest.raises(UserError, match="--model"):
            CheckpointFiles(tmp_path, name, "a")
    assert CheckpointFiles(tmp_path, "timm:hf-hub:a/b", "a").folder == tmp_path / "timm:hf-hub:a" / "b"
