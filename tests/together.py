"""Runs trainings of one or several real processes over gloo, one after another: the work of test_distributed.

Reads a list of runs as JSON from standard input: `world` (processes), `line` (options, or a list with those of each
process), and to end some of them `signal`, `whom` (ranks) and `when` (a file that must be there first); with `alone`
the others are killed once these have ended. `unanswered` replaces `interrupt.UNANSWERED`. Prints exit statuses and
standard error of each process as JSON. Processes are forked from this one, which has loaded everything.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from signal import Signals
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # c10d may warn of a process that has left

from tests.kill import ended, load_everything, said, start, status_of, wait
from utils.processes import interrupt, launch


def run(
    world: int, line: str | list[str], signal: str = "", whom: Sequence[int] = (), when: str = "", *,
    alone: bool = False, unanswered: float = interrupt.UNANSWERED,
) -> Any:  # fmt: skip
    """Start the processes of a run, end some of them if asked to, and wait for all."""
    interrupt.UNANSWERED = unanswered
    pids = start(Path.cwd(), line, world)
    deadline = time.monotonic() + 600
    while when and not Path(when).exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    for rank in whom:
        os.kill(pids[rank], Signals[signal])
    if alone:
        wait(pids, lambda: all(ended(pids[rank]) for rank in whom))
        for pid in pids:
            os.kill(pid, Signals.SIGKILL)
    wait(pids, lambda: False)
    statuses = [status_of(pid) for pid in pids]
    return {"status": statuses, "said": said(Path.cwd(), world)}


if __name__ == "__main__":
    load_everything()
    launch.PATIENCE = 0  # no launcher ends these processes
    results = [run(**each) for each in json.load(sys.stdin)]
    print(json.dumps(results))
