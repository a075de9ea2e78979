"""Runs that are ended, by signals, kills and full disks, and go on as if nothing had happened."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import ROOT, kill
from utils.checkpoint import archive


def test_twenty_ends_at_random_moments() -> None:
    """The longer version, by hand: python tests/kill.py 200."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "kill.py"), "20"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("20 ends (")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of its own, of 400 KiB."""
    folder = tmp_path / "weights"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "none", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode != 0:
        pytest.skip(f"needs the right to mount a disk: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_full(small_disk: Path, interpreter: str) -> None:
    """Saves that fail leave every checkpoint; with room again the run goes on, with the bits of one that had it."""
    folder = small_disk.parent
    (folder / "network.py").write_text(kill.NETWORK)

    def run(options: str) -> subprocess.CompletedProcess[str]:
        line = f"{kill.COMMON} --lr_policy fix --keep 3 {options}".replace("--delay 0.01", "")
        return subprocess.run(
            [interpreter, str(ROOT / "main.py"), *line.split()],
            cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
        )  # fmt: skip

    assert run("--case full --epochs 4 --weights_dir elsewhere").returncode == 0
    assert run("--case run --epochs 3").returncode == 0
    paths = sorted(small_disk.glob("tiny/run-*"))
    assert len(paths) == 4
    before = {path: (path.stat().st_ino, path.read_bytes()) for path in paths}
    with (small_disk / "fill").open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(bytes(4096))
    for _ in range(2):
        done = run("--case run --epochs 4 -r")
        assert done.returncode in (1, 2) and "No space left on device" in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1
        assert {path: (path.stat().st_ino, path.read_bytes()) for path in paths} == before
        assert not list(small_disk.glob("tiny/.*"))
    (small_disk / "fill").unlink()
    done = run("--case run --epochs 4 -r")
    assert done.returncode == 0 and "3 epochs are done" in done.stdout
    one, other = (
        archive.read(folder / where / "tiny" / f"{case}-checkpoint.pth.tar")
        for where, case in (("elsewhere", "full"), ("weights", "run"))
    )
    assert all(value.equal(other["state_dict"][name]) for name, value in one["state_dict"].items())


def test_lost_progress_is_seen(tmp_path: Path) -> None:
    """The test above would notice a run that finds none of its checkpoints, and trains the same weights anew."""
    program = (
        "import pathlib, sys\n"
        "from tests import kill\n"
        "from utils.checkpoint.case_files import CheckpointFiles, Found\n"
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
