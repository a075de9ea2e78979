"""Processes that read images for another one: they ignore its signals and end with it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from multiprocessing.util import Finalize

from utils.errors import UserError
from utils.processes.interrupt import SIGNALS


def check_workers(count: int) -> None:
    """Raise `UserError` for too many processes: more than 64 and more than 4 per core."""
    cores = os.cpu_count() or 1
    most = max(64, 4 * cores)
    if count > most:
        raise UserError(
            f"--workers {count}: at most {most} on a machine of {cores} cores; write about {cores}"
        )


def prepare(owner: object, preload: str) -> tuple[ForkServerContext, Callable[[int], None]]:
    """The context from which a `DataLoader` starts workers, and the function that each worker runs first.

    Args:
        owner: workers end when this object is garbage-collected, or with this process.
        preload: the module that the workers need; imported once, in the process that they are forked from.
    """
    # Forking this process may deadlock, because it has several threads. The server has one thread.
    context = multiprocessing.get_context("forkserver")
    _start_server(context, preload)
    theirs, mine = context.Pipe(duplex=False)
    Finalize(owner, mine.close, exitpriority=0)  # at exit too, before workers are waited for
    return context, partial(_begin, theirs)


@contextlib.contextmanager
def pool(count: int, preload: str) -> Iterator[ProcessPoolExecutor]:
    """A pool of processes; when an exception leaves the context, they end at once.

    Args:
        count: number of processes.
        preload: the module that they need.
    """
    context = multiprocessing.get_context("forkserver")
    _start_server(context, preload)
    theirs, mine = context.Pipe(duplex=False)
    executor = ProcessPoolExecutor(count, mp_context=context, initializer=_begin, initargs=(theirs, 0))
    try:
        yield executor
        executor.shutdown()
    finally:
        mine.close()  # which ends them
        executor.shutdown(cancel_futures=True)
        theirs.close()


def _begin(training: Connection, _: int) -> None:
    """Ignore signals, since the training ends its workers once it has saved; end when the training does."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)

    def end_with_training() -> None:
        with contextlib.suppress(EOFError):
            training.recv()  # nothing is sent; this ends when the other end closes
        os._exit(0)

    threading.Thread(target=end_with_training, daemon=True).start()


def _start_server(context: ForkServerContext, preload: str) -> None:
    """Start the process that workers are forked from; it ignores the signals as they do."""
    context.set_forkserver_preload([preload])
    # The server inherits the mask; signals that come meanwhile wait.
    former = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    # Python 3.11 does not give it `sys.path`: in another folder than the program's it would preload nothing.
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    try:
        forkserver.ensure_running()
    finally:
        if path is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = path
        signal.pthread_sigmask(signal.SIG_SETMASK, former)
