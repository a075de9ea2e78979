"""torchrun that ends with the training's own exit status: `python -m utils.launch [torchrun's options] SCRIPT ...`.

torchrun itself ends with status 1 and a traceback of its own whatever happened. Here the status is that of the
process that failed first, and only what no process can say of itself is said: that one was killed, and by what.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
from pathlib import Path

STATUS_FOLDER = "LAUNCH_STATUS_FOLDER"  # where each process leaves its exit status, see `leave_status`


def leave_status(status: int) -> None:
    """Tell the launcher how this process ends, which it cannot see once it was asked to end itself."""
    folder = os.environ.get(STATUS_FOLDER)
    if folder is not None and os.path.isdir(folder):
        Path(folder, os.environ.get("RANK", "0")).write_text(str(status), encoding="ascii")


def _left_statuses(folder: str) -> set[int]:
    return {int(path.read_text(encoding="ascii")) for path in Path(folder).iterdir()}


def main(arguments: list[str]) -> int:
    """Run torchrun with these arguments; returns the exit status."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.disable(logging.CRITICAL)  # what torchrun says of this is said here, in one line
    # Several processes that use all cores each are slower than one; torchrun would say so in a long warning.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        os.environ[STATUS_FOLDER] = folder
        try:
            run.run(run.parse_args(arguments))
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            if failure.exitcode >= 0:
                return failure.exitcode
            name = signal.Signals(-failure.exitcode).name
            print(f"launch: failed: process {rank} of the run was ended by {name}", file=sys.stderr)
            return 128 - failure.exitcode
        except SignalException as error:  # it was passed on to the processes, which have ended by now
            number = signal.Signals(error.sigval)
            statuses = _left_statuses(folder)
            return statuses.pop() if len(statuses) == 1 else 128 + number
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
