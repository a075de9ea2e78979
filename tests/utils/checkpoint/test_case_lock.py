"""Two runs of a case do not touch each other's files."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests import ROOT
from tests.main.runs import LSQ, call
from utils.checkpoint.case_lock import locked
from utils.errors import UserError
from utils.processes.identity import identity_of

LIMIT = 300  # seconds, also on a machine that has much other work


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def owner(**changed: Any) -> str:
    """This process as the owner in a lock's file, or one that differs from it."""
    boot, started = identity_of(os.getpid())
    known = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "boot": boot,
        "started": started,
        "since": "noon",
    }
    return json.dumps(known | changed)


def test_a_second_run_is_told_who_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line, status 2, and not a byte of the first run's files is another one; reading goes on."""
    line = f"{LSQ} --case mine --epochs 50 --delay 0.2 --save_every 1"
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "main.py"), *line.split()], stdout=subprocess.DEVNULL
    )
    latest = Path("weights/resnet20/mine-checkpoint.pth.tar")
    deadline = time.monotonic() + LIMIT
    while not latest.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    assert call(f"{LSQ} --case mine --epochs 2") == 2
    error = capsys.readouterr().err
    host = socket.gethostname()
    assert error.startswith(
        f"main.py: error: --case mine is being trained by process {process.pid} on {host}, since "
    )
    assert error.endswith(": wait for it, or choose another --case\n") and error.count("\n") == 1
    assert call(f"{LSQ} --case mine --epochs 2 --model resnet32") == 2  # the same log
    assert "is being trained by" in capsys.readouterr().err
    assert [path.name for path in Path("exp").iterdir() if path.is_dir()] == ["mine"]
    assert call(f"{LSQ} -e --case other --pretrained {latest}") == 0
    process.send_signal(signal.SIGKILL)
    process.wait()
    capsys.readouterr()
    assert call(f"{LSQ} --case mine --epochs 1 -r") == 0  # the dead owner's case is taken over
    assert not list(tmp_path.rglob(".*.lock"))


def test_the_lock_is_the_systems(tmp_path: Path) -> None:
    """Whoever an old file names, a lock that nobody holds is free; a held one is not, whoever the file names."""
    path = tmp_path / "x" / ".a.lock"
    path.parent.mkdir()
    path.write_text(owner())
    with locked(path, "a", "weights_dir"):
        assert json.loads(path.read_text())["pid"] == os.getpid()
        with pytest.raises(UserError, match=f"--case a is being trained by process {os.getpid()} on"):
            locked(path, "a", "weights_dir").__enter__()
        path.write_text("no owner")
        with pytest.raises(UserError, match="--case a is being trained by another process"):
            locked(path, "a", "weights_dir").__enter__()
    assert not path.exists()


@pytest.mark.parametrize(
    ("content", "free"),
    [
        ({}, False),
        ({"started": "1"}, True),  # the number was given to another process
        ({"boot": "before"}, True),
        ({"pid": 2**22 + 1}, True),
        ({"host": "elsewhere"}, False),
        ("", True),
        ("damaged", True),
    ],
)
def test_without_locks_of_the_system_the_file_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | dict[str, Any], free: bool
) -> None:
    def refused(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refused)
    path = tmp_path / ".a.lock"
    text = content if isinstance(content, str) else owner(**content)
    path.write_text(text)
    if free:
        with locked(path, "a", "weights_dir"):
            assert json.loads(path.read_text())["pid"] == os.getpid()
        return
    with pytest.raises(UserError, match=r"--case a is being trained by .*: wait for it") as caught:
        locked(path, "a", "weights_dir").__enter__()
    assert ("remove " in str(caught.value)) == ("elsewhere" in text)
    assert path.read_text() == text


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        UserError, match=r"--log_dir: .*file cannot be written \(.*\); choose another --log_dir"
    ):
        locked(tmp_path / "file" / ".a.lock", "a", "log_dir").__enter__()
