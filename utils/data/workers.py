"""Processes that read images for another one: deaf to its signals, and gone when it is."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
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
    """Raise `UserError` for a number of processes that is beyond reason: more than 64 and 4 for each core."""
    cores = os.cpu_count() or 1
    most = max(64, 4 * cores)
    if count > most:
        raise UserError(
            f"--workers {count}: at most {most} on a machine of {cores} cores; write about {cores}"
        )


def prepare(owner: object, preload: str) -> tuple[ForkServerContext, Callable[[int], None]]:
    """The context that a `DataLoader` starts workers from, and what each of them runs first.

    Args:
        owner: workers end when it is collected, or with this process.
        preload: the module that the workers need; imported once, in the process that they are forked from.
    """
    # Forking this process, which has threads, may deadlock. The server has one.
    context = multiprocessing.get_context("forkserver")
    _start_server(context, preload)
    theirs, mine = context.Pipe(duplex=False)
    Finalize(owner, mine.close, exitpriority=0)  # at exit too, before workers are waited for
    return context, partial(_begin, theirs)


@contextlib.contextmanager
def pool(count: int, preload: str) -> Iterator[ProcessPoolExecutor]:
    """Processes for functions that are mapped; left by an exception they end at once, whatever they are at.

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
    """Let signals be the training's business, which ends its workers when it has saved; end with it at the latest."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)

    def end_with_training() -> None:
        with contextlib.suppress(EOFError):
            training.recv()  # nothing ever comes, the other end is closed
        os._exit(0)

    threading.Thread(target=end_with_training, daemon=True).start()


def _start_server(context: ForkServerContext, preload: str) -> None:
    """Start the process that workers are forked from, as deaf to the signals as they are."""
    context.set_forkserver_preload([preload])
    former = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # inherited; what comes meanwhile is not lost
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)
