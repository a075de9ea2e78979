"""torchrun that ends with the training's own exit status: `python launch.py [torchrun's options] SCRIPT ...`.

torchrun itself ends with status 1 and a traceback of its own whatever happened. Here the status is that of the
process that failed first, and only what no process can say of itself is said: that one was killed, and by what.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from utils.interrupt import REPEATS_PASSED_ON, SAVED, SIGNALS, Requests, Stop

STATUS_FOLDER = "LAUNCH_STATUS_FOLDER"  # where each process leaves its exit status, see `leave_status`
AT_ONCE = "at-once"  # a file there: the launcher was asked a second time


def leave_status(status: int) -> int:
    """Tell the launcher how this process ends; returns the exit status to take.

    The launcher cannot see the status of a process that it has asked to end. And torchrun starts a process again
    that ends with another one than 0 (--max_restarts), which a run that was asked to end is not meant to be.
    """
    folder = os.environ.get(STATUS_FOLDER)
    if folder is None or not os.path.isdir(folder):
        return status
    Path(folder, os.environ.get("LOCAL_RANK", "0")).write_text(str(status), encoding="ascii")
    return 0 if status == SAVED else status


def stop(say: Callable[[str], object]) -> Stop:
    """What tells this process that it was asked to end; `say` takes a line then.

    A launcher passes on what it gets, so that signals which come to a process soon after the first say nothing. By
    itself a process takes the next one for a second request; under this launcher the one that follows its file.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return Stop(say)
    folder = os.environ.get(STATUS_FOLDER)
    at_once = None if folder is None else Path(folder, AT_ONCE).exists
    return Stop(say, repeats=REPEATS_PASSED_ON, at_once=at_once)


def _left_status(folder: str, otherwise: int) -> int:
    """The status of the processes: that of one that failed before that of those that were asked to end."""
    statuses = {int(path.read_text(encoding="ascii")) for path in Path(folder).glob("[0-9]*")} - {0}
    return min(statuses - {SAVED}, default=SAVED if statuses else otherwise)


def main(arguments: list[str]) -> int:
    """Run torchrun with these arguments; returns the exit status."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    requests = Requests()
    asked = False

    def pass_on(number: int, _: FrameType | None) -> None:
        nonlocal asked
        if not requests.new():
            return
        if asked:
            with contextlib.suppress(OSError):  # a full disk
                Path(os.environ[STATUS_FOLDER], AT_ONCE).touch()
            for each in SIGNALS:
                signal.signal(each, signal.SIG_IGN)
        asked = True
        # torchrun passes it on, and waits; the second time too.
        raise SignalException("asked to end", signal.Signals(number))

    logging.disable(logging.CRITICAL)  # what torchrun says of this is said here, in one line
    # Several processes that use all cores each are slower than one; torchrun would say so in a long warning.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # A store that is used again holds the addresses of the processes before, and a machine that joins waits for it
    # in vain; this is a new one each time.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    options = run.parse_args(arguments)
    theirs = options.signals_to_handle.split(",")
    options.signals_to_handle = ",".join(name for name in theirs if name not in [s.name for s in SIGNALS])
    with tempfile.TemporaryDirectory() as folder:
        os.environ[STATUS_FOLDER] = folder
        for number in SIGNALS:
            signal.signal(number, pass_on)
        try:
            run.run(options)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            if failure.exitcode >= 0:
                return failure.exitcode
            name = signal.Signals(-failure.exitcode).name
            print(f"launch: failed: process {rank} of the run was ended by {name}", file=sys.stderr)
            return 128 - failure.exitcode
        except SignalException as error:  # it was passed on to the processes, which have ended by now
            return _left_status(folder, 128 + signal.Signals(error.sigval))
        return _left_status(folder, 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
