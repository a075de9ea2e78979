"""torchrun that ends with the training's own exit status.

Use: `python -m utils.processes.launch [torchrun's options] SCRIPT ...`.

torchrun itself ends with status 1 and a traceback of its own whatever happened. Here the status is that of the
process that failed first, and only what no process can say of itself is said: that one was killed, and by what.
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

from utils.processes.interrupt import REPEATS_PASSED_ON, SAVED, SIGNALS, Requests, Stop

STATUS_FOLDER = "LAUNCH_STATUS_FOLDER"  # where each process leaves its exit status, see `leave_status`
AT_ONCE = "at-once"  # a file there: the launcher was asked a second time
PATIENCE = 5  # seconds
DEAF = 3.0  # seconds without an answer to a signal, after which torchrun is known to wait for other machines


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


def wait_to_be_ended() -> None:
    """Give the launcher time to end this process, because of another one, before it says what is wrong here."""
    # Not the end without cleaning up, of which Python would warn.
    for number in SIGNALS:
        signal.signal(number, lambda *_: sys.exit(1))
    time.sleep(PATIENCE)


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


def _end_if_deaf(answered: threading.Event, folder: str) -> None:
    """Let a signal end this process, in which `answered` is set by Python's handler, when that does not come.

    Where torchrun waits for other machines in C++, for minutes, no handler of Python's is called; it has no process of
    the run then, and with one it is only slow. The number of a signal is in the pipe at once.
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
    """Whether this process has one, ended or not."""
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
        # torchrun passes it on, and waits; the second time too.
        raise SignalException("asked to end", signal.Signals(number))

    logging.disable(logging.CRITICAL)  # what torchrun says of this is said here, in one line
    # Several processes that use all cores each are slower than one; torchrun would say so in a long warning.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # A store that is used again holds the addresses of the processes before, and a machine that joins waits for it
    # in vain; this is a new one each time.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    parser = run.get_args_parser()
    parser.print_usage = lambda file=None: None  # a mistake is one line
    options = parser.parse_args(arguments)
    theirs = options.signals_to_handle.split(",")
    options.signals_to_handle = ",".join(name for name in theirs if name not in [s.name for s in SIGNALS])
    with tempfile.TemporaryDirectory() as folder:
        os.environ[STATUS_FOLDER] = folder
        for number in SIGNALS:
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
    """Where torch's C++ part is loaded for this process alone, without its long messages of lost connections.

    Not for the processes of the run, where they may be the only sign of what is waited for.
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
