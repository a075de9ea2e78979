"""Helpers of several test files explain their failed assertions as tests do; a worker that ends early says where."""

import faulthandler
import os
import signal
import traceback
from collections.abc import Iterator

import pytest
from _pytest.faulthandler import fault_handler_stderr_fd_key

from tests.interpreter import interpreter as interpreter_in

# A shell starts its background jobs with SIGINT ignored, and nohup starts all with SIGHUP ignored. The processes that
# tests start would inherit that.
for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, usual)

# A test compiles a few small functions. Processes that do so in parallel each load torch first.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

pytest.register_assert_rewrite("tests.main", "tests.model", "tests.utils")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Let a worker of pytest-xdist print its stack before a signal or `os._exit` ends it; xdist names only the test."""
    if not hasattr(session.config, "workerinput"):
        return
    process, leave = os.getpid(), os._exit
    terminal = session.config.stash[
        fault_handler_stderr_fd_key
    ]  # the error output that pytest does not capture

    def told(status: int) -> None:
        if os.getpid() == process:  # no process that it forked
            os.write(terminal, "".join(traceback.format_stack()).encode())
        leave(status)

    os._exit = told  # type: ignore[assignment]
    for ending in (signal.SIGTERM, signal.SIGHUP, signal.SIGALRM, signal.SIGUSR1, signal.SIGUSR2):
        faulthandler.register(ending, file=terminal, chain=True)


@pytest.fixture(scope="session")
def interpreter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """In the place of `sys.executable`: begins with torch loaded, see tests/interpreter.py."""
    with interpreter_in(tmp_path_factory.mktemp("interpreter")) as path:
        yield path
