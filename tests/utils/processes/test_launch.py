"""The launcher with real processes: statuses, signals, and restarts after failures and of machines that come."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import ROOT
from tests.kill import NETWORK, free_port
from tests.utils.data.helpers import write_folder
from tests.utils.processes.jobs import MODULE, QUIET, listens, started_by
from tests.utils.processes.lines import FILES, LINE
from utils.checkpoint.archive import read
from utils.data.image_folder import ImageNames
from utils.data.loader import epoch_order
from utils.processes.interrupt import SAVED
from utils.report.epoch_files import MetricsFile

LIMIT = 900  # seconds, also on a machine that has much other work
SLOW = f"{LINE} -b 8 --save_every 1 --delay 0.05"
CHECKPOINT = Path("weights/tiny/mine-checkpoint.pth.tar")
# Its process 1 ends twice: before it has done anything, and in training when there is a checkpoint.
ENDS = (
    NETWORK.replace('register_model("tiny", tiny)', "")
    + """
import os, pathlib, signal
def end_once(name):
    path = pathlib.Path(name)
    if os.environ.get("RANK") == "1" and not path.exists():
        path.touch()
        os.kill(os.getpid(), signal.SIGKILL)
end_once("died-early")
class Ends(nn.Identity):
    def forward(self, x):
        if self.training and pathlib.Path("weights/tiny/mine-checkpoint.pth.tar").exists():
            end_once("died-in-training")
        return x
register_model("tiny", lambda config: nn.Sequential(*tiny(config), Ends()))
"""
)


@pytest.fixture(autouse=True)
def loaded(interpreter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Launchers and the processes of a run begin with torch loaded."""
    monkeypatch.setenv("PYTHON_EXEC", interpreter)


@pytest.fixture
def children(interpreter: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """An interpreter for a launcher whose processes are its children, by which those of a restart know their job."""
    monkeypatch.delenv("PYTHON_EXEC")
    return interpreter


def launch(
    folder: Path, line: str, *options: str, processes: int = 2, python: str = ""
) -> subprocess.Popen[str]:
    """Processes by way of torchrun."""
    if not (folder / "network.py").exists():
        (folder / "network.py").write_text(NETWORK)
    return subprocess.Popen(
        [python or os.environ["PYTHON_EXEC"], *MODULE, *(options or ["--standalone"]),
         "--nproc_per_node", str(processes), str(ROOT / "main.py"), *line.split()],
        cwd=folder, env={**os.environ, **QUIET}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


def wait(process: subprocess.Popen[str], until: Callable[[], bool]) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + LIMIT
    while not until():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_mistake_is_one_line(tmp_path: Path) -> None:
    process = launch(tmp_path, f"{LINE} -v -1")
    assert process.communicate(timeout=LIMIT) == (
        "",
        "main.py: error: --val_batch_size -1: must be a number that is not negative\n",
    )
    assert process.returncode == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--nnodes 1:x", "options of torchrun: invalid literal"),
        ("--nproc_per_node 0", "options of torchrun: nproc_per_node is 0"),
        ("--bogus", "unrecognized arguments: --bogus"),
    ],
)
def test_a_mistake_in_the_options_of_torchrun_is_one_line(tmp_path: Path, options: str, message: str) -> None:
    done = subprocess.run(
        [os.environ["PYTHON_EXEC"], *MODULE, *options.split(), str(ROOT / "main.py")],
        cwd=tmp_path, env={**os.environ, **QUIET}, capture_output=True, text=True, check=False, timeout=LIMIT,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert done.stderr.startswith("launch") and f"error: {message}" in done.stderr
    assert not list(tmp_path.iterdir())


def elsewhere(port: int, seconds: int) -> list[str]:
    """Options of torchrun for the first of two machines, which waits for the second one."""
    return ["--nnodes", "2", "--node_rank", "0", "--master_addr", "127.0.0.1", "--master_port", str(port),
            "--rdzv_conf", f"timeout={seconds}"]  # fmt: skip


def test_a_machine_that_does_not_come_is_one_line(tmp_path: Path) -> None:
    process = launch(tmp_path, LINE, *elsewhere(free_port(), 1))
    said, errors = process.communicate(timeout=LIMIT)
    assert (process.returncode, said, errors.count("\n")) == (1, "", 1), errors
    assert errors.startswith("launch: failed: no connection between the machines: Timed out")


def test_a_machine_that_cannot_be_reached_is_one_line(tmp_path: Path) -> None:
    """C10d's messages, of some forty lines, are not turned off here."""
    loud = {**os.environ, "PYTHONPATH": str(ROOT)}
    loud.pop("TORCH_CPP_LOG_LEVEL", None)
    done = subprocess.run(
        [sys.executable, *MODULE, "--nnodes", "2", "--node_rank", "1", "--master_addr", "127.0.0.1",
         "--master_port", "1", "--rdzv_conf", "timeout=1", str(ROOT / "main.py")],
        cwd=tmp_path, env=loud, capture_output=True, text=True, check=False, timeout=LIMIT,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done.stderr
    assert done.stderr.startswith(
        "launch: failed: no connection between the machines: The client socket has timed out"
    )


def test_a_program_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [os.environ["PYTHON_EXEC"], *MODULE, "--no_python", str(tmp_path / "nothing")],
        cwd=tmp_path, env={**os.environ, **QUIET}, capture_output=True, text=True, check=False, timeout=LIMIT,
    )  # fmt: skip
    message = f"launch: failed: [Errno 2] No such file or directory: '{tmp_path / 'nothing'}'\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", message)


def test_a_signal_ends_a_launcher_that_waits_for_another_machine(tmp_path: Path) -> None:
    port = free_port()
    process = launch(tmp_path, LINE, *elsewhere(port, 120))
    wait(process, lambda: listens(port))
    process.terminate()
    assert process.communicate(timeout=LIMIT) == ("", "")
    assert process.returncode == 128 + signal.SIGTERM


def test_a_mistake_that_is_found_later_is_one_line_too(tmp_path: Path) -> None:
    process = launch(tmp_path, f"{LINE} --pretrained nothing.pth.tar")
    said, errors = process.communicate(timeout=LIMIT)
    assert (process.returncode, said) == (2, "")
    assert (
        errors.startswith("main.py: error: --pretrained nothing.pth.tar: no such file")
        and errors.count("\n") == 1
    )


def test_a_file_that_one_process_cannot_read_is_all_that_is_said(tmp_path: Path) -> None:
    """The status is its own, not that of the first process, which loses it."""
    write_folder(tmp_path / "images", train=8, val=1)
    in_the_second_half = int(epoch_order(24, 0, 0)[3])  # of the first batch
    bad = ImageNames(tmp_path / "images" / "train").path(in_the_second_half)
    Path(bad).write_text("no image")
    line = f"{FILES} --dataset imagenet -b 2 -j 1".replace("--root images", f"--root {tmp_path / 'images'}")
    process = launch(tmp_path, line)
    _, errors = process.communicate(timeout=LIMIT)
    assert errors.startswith(f"main.py: error: cannot read the image {bad} (no image)"), errors
    assert (process.returncode, errors.count("\n")) == (2, 1), errors


LOSES = """
import os, signal, sys, threading, main
from utils.errors import LostError
from utils.processes import launch
from utils.processes.interrupt import Stop
def run(config):
    with Stop():
        if sys.argv[1] == "signal":
            os.kill(os.getpid(), signal.SIGTERM)
        raise LostError("lost the others")
later = sys.argv[1] == "later"
if later:
    wait = launch.wait_to_be_ended
    def wait_to_be_ended():
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
        wait()
    launch.wait_to_be_ended = wait_to_be_ended
main.run, launch.PATIENCE = run, 600 if later else 0
sys.exit(main.main([]))
"""
ALONE = "main.py: failed: lost the others\n"


@pytest.mark.parametrize(
    ("before", "launcher", "said"),
    [
        ("signal", {"TORCHELASTIC_RUN_ID": "1"}, ""),  # what ended first has said why
        ("later", {"TORCHELASTIC_RUN_ID": "1"}, ""),
        ("nothing", {"TORCHELASTIC_RUN_ID": "1"}, ALONE),  # the launcher never came
        ("signal", {}, ALONE),  # nobody else says anything
    ],
)
def test_a_process_that_lost_the_others(before: str, launcher: dict[str, str], said: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC")}
    done = subprocess.run(
        [os.environ["PYTHON_EXEC"], "-c", LOSES, before], cwd=ROOT, env={**environment, **launcher},
        capture_output=True, text=True, check=False, timeout=LIMIT,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (1, "", said)


def test_a_process_that_is_killed_is_named(tmp_path: Path) -> None:
    (tmp_path / "died-early").touch()
    (tmp_path / "network.py").write_text(ENDS)
    process = launch(tmp_path, f"{SLOW} --case mine")
    _, errors = process.communicate(timeout=LIMIT)
    assert process.returncode == 128 + signal.SIGKILL
    assert errors.splitlines()[-1] == "launch: failed: process 1 of the run was ended by SIGKILL"
    assert "Traceback" not in errors


@pytest.mark.parametrize("whom", ["launcher", "process"])
def test_a_run_that_is_asked_to_end_is_not_restarted(tmp_path: Path, whom: str) -> None:
    process = launch(
        tmp_path,
        f"{SLOW} --delay 2 --case mine",
        "--standalone",
        "--max_restarts",
        "3",
        python=sys.executable,
    )
    wait(process, (tmp_path / CHECKPOINT).exists)
    pid = process.pid if whom == "launcher" else max(started_by(process.pid))
    os.kill(pid, signal.SIGTERM)
    said, errors = process.communicate(timeout=LIMIT)
    assert (process.returncode, errors) == (SAVED, "")
    assert said.count("asked to end by") == 1 and "resumed" not in said
    assert read(tmp_path / CHECKPOINT)["epoch"] < 3


def test_a_restart_goes_on_from_what_this_job_has_written(tmp_path: Path, children: str) -> None:
    """Not from what an earlier job left, though that is further: the first end is before anything is written."""
    (tmp_path / "network.py").write_text(NETWORK)
    line = f"{LINE} -b 16 --case mine --epochs 4"
    subprocess.run([children, str(ROOT / "main.py"), *line.split()], cwd=tmp_path, check=True)
    (tmp_path / "network.py").write_text(ENDS)
    process = launch(tmp_path, f"{SLOW} --case mine", "--standalone", "--max_restarts", "2", python=children)
    said, errors = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, errors
    assert said.count("the earlier run of the case mine is kept as mine.1") == 1
    assert said.count("epoch 3/3") == 1 and "/4" not in said
    assert (tmp_path / "died-in-training").exists()
    assert "resumed weights/tiny/mine-" in said
    rows = MetricsFile.read(tmp_path / "exp" / "mine" / "metrics.csv")
    assert [row["epoch"] for row in rows] == [1, 2, 3]


# Slow while it trains alone, so that the second machine joins before the end, however long that takes to start.
WAITS = (
    NETWORK.replace('register_model("tiny", tiny)', "")
    + """
import os, pathlib, time
class Waits(nn.Identity):
    def forward(self, x):
        if self.training and os.environ["WORLD_SIZE"] == "1":
            time.sleep(0.5)
        return x
register_model("tiny", lambda config: nn.Sequential(*tiny(config), Waits()))
"""
)


def test_a_machine_that_joins_goes_on_with_the_run(tmp_path: Path, children: str) -> None:
    """Each launcher stands for a machine."""
    (tmp_path / "network.py").write_text(WAITS)
    options = ["--nnodes", "1:2", "--rdzv_backend", "c10d", "--rdzv_id", "job",
               "--rdzv_endpoint", f"127.0.0.1:{free_port()}", "--rdzv_conf", "last_call_timeout=1"]  # fmt: skip
    line = f"{LINE} -b 8 --save_every 1 --epochs 30 --case mine"
    first = launch(tmp_path, line, *options, processes=1, python=children)
    wait(first, (tmp_path / CHECKPOINT).exists)
    second = launch(tmp_path, line, *options, processes=1, python=children)
    said, errors = first.communicate(timeout=LIMIT)
    others, their_errors = second.communicate(timeout=LIMIT)
    assert (first.returncode, second.returncode) == (0, 0), errors + their_errors
    said += others  # either may be the first process now
    assert "2 processes" in said and "resumed weights/tiny/mine-checkpoint.pth.tar" in said
    assert "is kept as" not in said
