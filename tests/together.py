"""Runs trainings of one or several real processes over gloo, one after another: the work of test_distributed.

Reads a list of runs as JSON from standard input: `world` (processes), `line` (options), and to end some of them
`signal`, `whom` (ranks) and `when` (a file that must be there first). Prints exit statuses and standard error of
each process as JSON. Processes are forked from this one, which has loaded everything.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # c10d may warn of a process that has left

from tests.kill import load_everything, said, start, status_of


def run(world: int, line: str, signal_name: str = "", whom: list[int] | None = None, when: str = "") -> Any:
    """Start the processes of a run, end some of them if asked to, and wait for all."""
    pids = start(Path.cwd(), line, world)
    deadline = time.monotonic() + 600
    while when and not Path(when).exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    for rank in whom or []:
        os.kill(pids[rank], signal.Signals[signal_name])
    statuses = [status_of(pid) for pid in pids]
    return {"status": statuses, "said": said(Path.cwd(), world)}


if __name__ == "__main__":
    load_everything()
    results = [
        run(each["world"], each["line"], each.get("signal", ""), each.get("whom"), each.get("when", ""))
        for each in json.load(sys.stdin)
    ]
    print(json.dumps(results))
