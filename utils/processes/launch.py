"""torchrun that ends with the training's own exit status.

Use: `python -m utils.processes.launch [torchrun's options] SCRIPT ...`.

torchrun itself ends with status 1 and a traceback of its own, whatever happened. This launcher ends with the status of
the process that failed first. It reports only errors that no process can report: that one was killed, and by what.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from utils.processes.interrupt import REPEATS_PASSED_ON, SAVED, SIGNALS, Requests, Stop, heeded

STATUS_FOLDER = "LAUNCH_STATUS_FOLDER"  # where each process leaves its exit status, see `leave_status`
AT_ONCE = "at-once"  # a file there: the launcher got a second request to end
PATIENCE = 30  # seconds, also on a busy machine
DEAF = 3.0  # seconds after a signal; if no handler ran until then, torchrun waits for other machines


def leave_status(status: int) -> int:
    """Tell the launcher how this process ends; returns the exit status to use.

    The launcher cannot see the status of a process that it has asked to end. A run that was asked to end and saved
    uses 0, because torchrun restarts processes that end with any other status (--max_restarts).
    """
    folder = os.environ.get(STATUS_FOLDER)
    if folder is None or not os.path.isdir(folder):
        return status
    Path(folder, os.environ.get("LOCAL_RANK", "0")).write_text(str(status), encoding="ascii")
    return 0 if status == SAVED else status


def wait_to_be_ended() -> None:
    """Give the launcher time to end this process for another one's failure, before it reports its own error."""
    # The default action would end without cleaning up, of which Python would warn.
    for number in SIGNALS:
        signal.signal(number, lambda *_: sys.exit(1))
    time.sleep(PATIENCE)


def stop(say: Callable[[str], object], *, others: bool = False) -> Stop:
    """Make the `Stop` of this process; `say` is called with a line when it is asked to end.

    With `others` it may have to wait for other processes of its run.

    A launcher passes on its signals, so that under one the signals soon after the first are repeats. Without a launcher
    the next signal is a second request; under this launcher it is one that comes after the file `AT_ONCE`.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return Stop(say, others=others)
    folder = os.environ.get(STATUS_FOLDER)
    at_once = None if folder is None else Path(folder, AT_ONCE).exists
    return Stop(say, repeats=REPEATS_PASSED_ON, at_once=at_once, others=others)


def _left_status(folder: str, otherwise: int) -> int:
    """The status of the run: a failed process's, if there is one, rather than that of processes asked to end."""
    statuses = {int(path.read_text(encoding="ascii")) for path in Path(folder).glob("[0-9]*")} - {0}
    return min(statuses - {SAVED}, default=SAVED if statuses else otherwise)


def _end_if_deaf(answered: threading.Event, folder: str) -> None:
    """Let a signal end this process when Python's handler, which sets `answered`, does not run in time.

    While torchrun waits for other machines in C++, for minutes, no Python handler is called. It has no child then; with
    a child it is only slow. The number of a signal is in the pipe at once.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)

    def watch() -> None:
        while number := os.read(reading, 1)[0]:
            if number in SIGNALS and not answered.wait(DEAF) and not _has_child():
                shutil.rmtree(folder, ignore_errors=True)
                os._exit(128 + number)

    threading.Thread(target=watch, name="signals", daemon=True).start()


def _has_child() -> bool:
    """Whether this process has a child, ended or not."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def main(arguments: list[str]) -> int:
    """Run torchrun with these arguments; returns the exit status."""
    with _silenced():
        from torch.distributed import DistError, run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError

    requests, answered = Requests(), threading.Event()
    asked = False

    def pass_on(number: int, _: FrameType | None) -> None:
        nonlocal asked
        answered.set()
        if not requests.new():
            return
        if asked:
            with contextlib.suppress(OSError):  # a full disk
                Path(os.environ[STATUS_FOLDER], AT_ONCE).touch()
            for each in SIGNALS:
                signal.signal(each, signal.SIG_IGN)
        asked = True
        # torchrun passes it on and waits, the second time too.
        raise SignalException("asked to end", signal.Signals(number))

    logging.disable(logging.CRITICAL)  # errors are printed below, in one line each
    # Several processes that each use all cores are slower than one; torchrun would set it with a long warning.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # A reused store holds the addresses of earlier processes, for which a machine that joins would wait in vain; this
    # makes a new one each time.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    parser = run.get_args_parser()
    parser.print_usage = lambda file=None: None  # a mistake is one line
    options = parser.parse_args(arguments)
    theirs = options.signals_to_handle.split(",")
    options.signals_to_handle = ",".join(name for name in theirs if name not in [s.name for s in SIGNALS])
    with tempfile.TemporaryDirectory() as folder:
        os.environ[STATUS_FOLDER] = folder
        for number in heeded():
            signal.signal(number, pass_on)
        _end_if_deaf(answered, folder)
        try:
            if run.determine_local_world_size(options.nproc_per_node) < 1:
                raise ValueError(f"nproc_per_node is {options.nproc_per_node}")
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
        except (AssertionError, ValueError) as error:
            print(f"launch: error: options of torchrun: {_first_line(error)}", file=sys.stderr)
            return 2
        except (RendezvousError, DistError) as error:
            print(
                f"launch: failed: no connection between the machines: {_first_line(error)}", file=sys.stderr
            )
            return 1
        except OSError as error:  # no such program, a full disk
            print(f"launch: failed: {error}", file=sys.stderr)
            return 1
        return _left_status(folder, 0)


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """Load torch's C++ part without its long messages about lost connections, in this process alone.

    The processes of the run keep them: they may be the only sign there that a process waits for a connection.
    """
    name = "TORCH_CPP_LOG_LEVEL"
    if name in os.environ:
        yield
        return
    os.environ[name] = "FATAL"
    yield
    del os.environ[name]


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
