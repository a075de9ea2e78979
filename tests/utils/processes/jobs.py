"""Real processes: which there are, whose they are, whether they have ended."""

from __future__ import annotations

import socket
import time
from pathlib import Path

from tests import ROOT

LIMIT = 900  # seconds, also on a machine that has much other work
# c10d, of several processes, may warn of one that has left before another.
QUIET = {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONPATH": str(ROOT)}
MODULE = ("-m", "utils.processes.launch")


def processes() -> dict[int, int]:
    """All processes that have not ended, and the parent of each."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                state, parent = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[:2]
            except OSError:  # it has ended meanwhile
                continue
            if state not in "ZX":
                found[int(entry.name)] = int(parent)
    return found


def started_by(pid: int) -> set[int]:
    """A process and all that it has started, directly or not."""
    found, all_of_them = {pid}, processes()
    while more := {one for one, parent in all_of_them.items() if parent in found} - found:
        found |= more
    return found


def listens(port: int) -> bool:
    """Whether a process of this machine takes connections there."""
    with socket.socket() as trial:
        return trial.connect_ex(("127.0.0.1", port)) == 0


def job_is_gone(pids: set[int]) -> None:
    """Wait until none of these processes is left."""
    deadline = time.monotonic() + LIMIT
    while left := pids & processes().keys():
        assert time.monotonic() < deadline, left
        time.sleep(0.02)
