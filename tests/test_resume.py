"""Runs that are ended, by signals, kills and full disks, and go on as if nothing had happened."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from utils.state import first_batch, sums_until

ROOT = Path(__file__).resolve().parent.parent


def test_twenty_ends_at_random_moments() -> None:
    """The longer version, by hand: python tests/kill.py 200."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "kill.py"), "20"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("20 ends (")


def test_lost_progress_is_seen(tmp_path: Path) -> None:
    """The test above would notice a run that finds none of its checkpoints, and trains the same weights anew."""
    program = (
        "import pathlib, sys\n"
        "from tests import kill\n"
        "from utils.checkpoint import CheckpointFiles, Found\n"
        "CheckpointFiles.newest = lambda self: Found(None, {})\n"
        "kill.VARIANTS = kill.VARIANTS[:1]\n"
        "kill.load_everything()\n"
        "kill.run(pathlib.Path(sys.argv[1]), 20, 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert re.match(r"run\d+ was at \(\d, \d+\) and goes on from \(-1, 0\): ", done.stderr), done.stderr


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


def test_images_that_are_seen_again_count_once() -> None:
    assert sums_until((6.0, 3.0, 3.0, 24.0), 24, 24) == (6.0, 3.0, 3.0, 24.0)
    assert sums_until((6.0, 3.0, 3.0, 24.0), 24, 16) == (4.0, 2.0, 2.0, 16.0)
    assert sums_until((6.0, 3.0, 3.0, 24.0), 24, 0) == (0.0, 0.0, 0.0, 0.0)
    assert sums_until((0.0, 0.0, 0.0, 0.0), 0, 0) == (0.0, 0.0, 0.0, 0.0)
