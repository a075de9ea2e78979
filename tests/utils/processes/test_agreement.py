"""Processes of a run that differ say so at the start; a process that waits for others ends at the first signal."""

from __future__ import annotations

import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import HashStore, Store

from tests import ROOT
from tests.utils.data.helpers import write_folder
from tests.utils.processes.lines import FILES, LINE, NO_DROPOUT, together
from utils.errors import UserError
from utils.processes.agreement import code_digests, differing_values
from utils.processes.distributed import Place, compare_places

END = "start all of them with the same options, program and files"
FOLDER = f"{FILES.replace('--stable 5', '')} --dataset imagenet -b 4 -j 0 --case files"
FAKE = f"{LINE} -b 8 --epochs 1"
WEIGHTS = "weights/tiny/base-checkpoint.pth.tar"
TEACHER = "--distill_teacher tiny --distill_keyword cifar10 --distill_pretrained"
DIFFERENT = {
    "sizes": (["--fake_size 32", "--fake_size 64"], "data.fake_size (32 in process 0; 64 in process 1)"),
    "options": (
        ["", "--lr 0.2 --fm_bit 3", ""],
        "model.quant.fm.levels (4 in processes 0, 2; 8 in process 1), optim.lr (0.05 in processes 0, 2; 0.2 in ",
    ),
    "many": (["", "--seed 3 --lr 1 -b 2 --epochs 2 --dry_run"], " in process 1) and 3 more: start all"),
    "network": (["", "--keyword_file other.py"], "--keyword_file ("),
    "evaluated": (["-e --pretrained none", "-e --pretrained none --bn_batches 2"], "run.bn_batches (0 in process 0; 2"),
    "resumed": (
        ["--case base -r --epochs 2", "--case base -r --epochs 2 --momentum 0.5"],
        "optim.momentum (0.9 in process 0; 0.5 in process 1)",
    ),
    "class weights": (
        ["--class_weights one.csv", "--class_weights other.csv"],
        "differ in class weights (",
    ),
    "weights": (
        [f"--pretrained {WEIGHTS} {TEACHER} a", f"--pretrained a {TEACHER} b"],
        "in process 1), the teacher (",
    ),
}  # fmt: skip
FOLDERS = {
    "fewer": "images of train (36 in process 0; 33 in process 1), "
    "classes of train (ant: 12, bee: 12, cat: 12 in process 0; ant: 12, bee: 12, cat: 9 in process 1), files",
    "files": "differ in files of val (",
    "renamed": "classes of train (ant: 12, bee: 12, cat: 12 in process 0; ant: 12, bee: 12, dog: 12 in process 1)",
}


def write_folders(folder: Path) -> None:
    """Images, their copy, and copies that differ."""
    write_folder(folder / "images", 12, 2)
    for name in ("copy", *FOLDERS):
        shutil.copytree(folder / "images", folder / name)
    for number in range(3):
        (folder / "fewer" / "train" / "cat" / f"{number}.jpg").unlink()
    (folder / "files" / "val" / "ant" / "1.jpg").rename(folder / "files" / "val" / "ant" / "1b.jpg")
    for part in ("train", "val"):
        (folder / "renamed" / part / "cat").rename(folder / "renamed" / part / "dog")


# Process 1 sleeps when it builds the network, or in training.
SLEEPS = """
import os, pathlib, time, torch
def sleep(name):
    time.sleep(0.5)  # until the other one waits
    pathlib.Path(name).touch()
    time.sleep(1000)
class Sleeps(nn.Identity):
    def forward(self, x):
        if self.training and torch.is_grad_enabled() and os.environ["RANK"] == "1":
            sleep("training-SIGTERM")
        return x
def sleeps(config):
    if os.environ["RANK"] == "1":
        sleep(config.name)
    return tiny(config)
register_model("start-SIGTERM", sleeps)
register_model("start-SIGINT", sleeps)
register_model("training-SIGTERM", lambda config: nn.Sequential(*tiny(config), Sleeps()))
"""
WAITING: dict[str, dict[str, Any]] = {
    name: {"world": 2, "line": f"{FAKE.replace('tiny', name)} --case {name}", "signal": name.split("-")[1],
           "whom": [0], "when": name, "alone": True, "unanswered": 0.5}
    for name in ("start-SIGTERM", "start-SIGINT", "training-SIGTERM")
}  # fmt: skip


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, interpreter: str) -> dict[str, Any]:
    """Runs of processes that differ, and one whose processes may."""
    folder = tmp_path_factory.mktemp("different")
    (folder / "network.py").write_text(NO_DROPOUT + SLEEPS)
    (folder / "other.py").write_text(NO_DROPOUT + "# another comment\n")
    write_folders(folder)
    for name, weight in (("one", 1), ("same", 1), ("other", 2)):
        rows = [f"{number},{weight if number else 1}" for number in range(10)]
        (folder / f"{name}.csv").write_text("\n".join(["class,weight", *rows]))
    for name in "ab":
        (folder / name).write_text(f"{name}: nothing reads it")
    runs = {"base": {"world": 1, "line": f"{FAKE} --case base"}}
    runs |= {
        name: {"world": len(lines), "line": [f"{FAKE} --case x {line}" for line in lines]}
        for name, (lines, _) in DIFFERENT.items()
    }  # fmt: skip
    for name in ("copy", *FOLDERS):
        other = f"{FOLDER} --root {name} -j 1 --log_dir elsewhere --verbose -g 0"
        runs[name] = {"world": 2, "line": [FOLDER, other]}
    line = [f"{FAKE} --case y --class_weights {name}.csv" for name in ("one", "same")]
    runs["same weights"] = {"world": 2, "line": line}
    return together(interpreter, folder, runs | WAITING)


@pytest.mark.parametrize("name", [*DIFFERENT, *FOLDERS])
def test_processes_that_differ(done: dict[str, Any], name: str) -> None:
    """All end with the same line before anything is written."""
    statuses, texts = done[name]["status"], done[name]["said"]
    message = FOLDERS[name] if name in FOLDERS else DIFFERENT[name][1]
    assert set(statuses) == {2}, texts
    assert len(set(texts)) == 1 and texts[0].count("\n") == 1
    assert texts[0].startswith("main.py: error: the processes differ in ") and texts[0].endswith(f"{END}\n")
    assert message in texts[0]
    assert not (done["folder"] / "exp" / "x").exists() and not (done["folder"] / "exp" / "files.1").exists()


def test_processes_may_have_their_files_elsewhere(done: dict[str, Any]) -> None:
    assert done["copy"]["status"] == [0, 0], done["copy"]["said"]
    assert not (done["folder"] / "elsewhere").exists()
    assert done["same weights"]["status"] == [0, 0], done["same weights"]["said"]


@pytest.mark.parametrize("name", WAITING)
def test_a_first_signal_ends_a_process_that_waits(done: dict[str, Any], name: str) -> None:
    """The other one sleeps, which is no waiting: it goes on."""
    number = signal.Signals[WAITING[name]["signal"]]
    first, second = done[name]["status"]
    assert first in (-number, 128 + number) and second == -signal.SIGKILL
    text = f"{number.name}: the other processes do not come, ends now, unsaved\n"
    assert done[name]["said"][0].endswith(text) == name.startswith("training")
    assert (done["folder"] / "exp" / name).exists() == name.startswith("training")


# Parts -------------------------------------------------------------------------------------------


def error_of(store: Store, place: Place) -> str:
    with pytest.raises(UserError) as caught:
        compare_places(store, place)
    return str(caught.value)


def test_processes_that_count_differently() -> None:
    """They would wait for a third one."""
    store = HashStore()
    places = [Place(rank=0, world_size=2), Place(rank=1, world_size=3)]
    with ThreadPoolExecutor() as threads:
        texts = set(threads.map(lambda place: error_of(store, place), places))
    assert texts == {
        "the processes differ in --world_size (2 in process 0; 3 in process 1): start all of them with the number of "
        "all"
    }


def test_a_rank_that_is_there_twice() -> None:
    store, here = HashStore(), Place(rank=1, world_size=3)
    store.set_timeout(timedelta(seconds=0.1))
    with pytest.raises(RuntimeError):  # the others have not come
        compare_places(store, here)
    assert error_of(store, here).startswith("another process of this run has --rank 1 too")


def test_another_program(tmp_path: Path) -> None:
    """A file of it is another one, or missing."""
    for name in ("main.py", "utils/step/a.py", "model/b.py", "tests/c.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    before = code_digests(tmp_path)
    assert list(before) == ["main.py", "utils/step/a.py", "model/b.py"]
    (tmp_path / "utils/step/a.py").write_text("another")
    (tmp_path / "model/b.py").unlink()
    now = code_digests(tmp_path)
    assert now.keys() == {"main.py", "utils/step/a.py"}
    assert [name for name in now if now[name] != before[name]] == ["utils/step/a.py"]
    assert {"main.py", "utils/processes/agreement.py", "model/quant.py"} <= code_digests(ROOT).keys()


def test_of_long_values_the_difference_is_shown() -> None:
    one, other = (", ".join(f"class{i}: {5 + (i == 700) * more}" for i in range(1000)) for more in (0, 1))
    text = differing_values([one, other])
    assert "class700: 5, " in text and "class700: 6, " in text and "class800" not in text and len(text) < 200
    assert differing_values(["a", "", "a"]) == "a in processes 0, 2; empty in process 1"
