"""Runs that are ended, by signals, kills and full disks, and go on as if nothing had happened."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.kill import NETWORK, VARIANTS
from utils.interrupt import SAVED, Stop
from utils.state import first_batch

ROOT = Path(__file__).resolve().parent.parent


def test_twenty_ends_at_random_moments() -> None:
    """The longer version, by hand: python tests/kill.py 200."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "kill.py"), "20"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("20 ends (")


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    """The first one is answered after the step, which here takes long; what was saved before stays."""
    (tmp_path / "network.py").write_text(NETWORK)
    line = f"{VARIANTS[0]} --case long --delay 60".replace("--delay 0.01", "")
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "main.py"), *line.split()],
        cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    while not (tmp_path / "exp" / "long" / "config.yaml").exists():  # training begins
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == -signal.SIGTERM
    process.stdout.close()


def test_stop_restores_what_signals_did() -> None:
    former = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with Stop() as stop:
        assert stop.asked == ""
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked == "SIGTERM"
        assert signal.getsignal(signal.SIGINT) == signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == former


def test_the_status_is_none_of_the_others() -> None:
    assert SAVED not in (0, 1, 2, 130, 128 + signal.SIGTERM)


@pytest.mark.parametrize(
    ("position", "images", "passes", "batches", "expected"),
    [
        (0, 8, 1, 10, 0),
        (24, 8, 1, 10, 3),
        (80, 8, 1, 10, 10),
        (24, 8, 3, 10, 3),
        (24, 16, 1, 5, 1),  # half a batch is seen twice
        (32, 8, 3, 10, 3),  # a group of passes begins anew
        (80, 16, 1, 5, 5),
        (80, 8, 3, 10, 10),  # the shorter group at the end was whole
        (16, 8, 1, 2, 2),
    ],
)
def test_first_batch(position: int, images: int, passes: int, batches: int, expected: int) -> None:
    assert first_batch(position, images, passes, batches) == expected
