"""An interpreter that begins with torch loaded: loading it is what takes the time of a short process.

`interpreter` gives what stands in the place of `sys.executable` for `[-u] [-W error]` with `FILE.py`, `-m MODULE` or
`-c CODE`: a small process that hands arguments, environment, folder and open files to a server, which has loaded the
libraries, but nothing of this project, and forks. It passes on what signals it gets, ends as the forked process does,
and that one ends with it. Everything else is done by Python itself. Where a test asks what a process has imported,
whose child it is, which processes it has started or what signals it handles, or sets what a library reads from the
environment when it is loaded, the process is one of `sys.executable`.

    python tests/interpreter.py SOCKET    # the server; ends with its input
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

LOADED = (
    "torch", "torch._dynamo", "torch._inductor.compile_fx", "torch.distributed.run",
    "torch.distributed.elastic.multiprocessing.errors", "torchvision", "torchvision.transforms.v2", "timm", "tqdm",
    "yaml", "PIL.Image", "sklearn.datasets", "matplotlib.figure", "matplotlib.backends.backend_agg",
    "matplotlib.ticker", "jinja2", "safetensors.torch",
)  # fmt: skip
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
# Written in few modules: it is started for each process.
CLIENT = f"""#!{sys.executable} -IS
import os, sys
words = sys.argv[1:]
words = words[words[:1] == ["-u"]:]  # of torchrun
words = words[2 * (words[:2] == ["-W", "error"]):]
if not words or not (words[0].endswith(".py") or (words[0] in ("-c", "-m") and len(words) > 1)):
    os.execv({sys.executable!r}, [{sys.executable!r}, *sys.argv[1:]])
import _socket as socket, array, json, signal
server = socket.socket(socket.AF_UNIX)
server.connect(@ADDRESS@)
request = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
server.sendmsg([len(request).to_bytes(8, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))])
while request:
    request = request[server.send(request):]
for number in {[int(number) for number in PASSED_ON]}:
    if signal.getsignal(number) is not signal.SIG_IGN:
        signal.signal(number, lambda number, _: server.send(bytes([number])))
status = int.from_bytes(server.recv(2), "big", signed=True)
if status < 0:
    signal.signal(-status, signal.SIG_DFL) if -status != signal.SIGKILL else None
    os.kill(os.getpid(), -status)
os._exit(status)
"""


def _become(arguments: list[str], folder: str, environment: dict[str, str], files: list[int]) -> None:
    """Run a program as the interpreter does."""
    for own, given in enumerate(files):
        os.dup2(given, own)
        os.close(given)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    sys.stdin, sys.stdout, sys.stderr = (
        os.fdopen(number, mode, buffering, closefd=False)
        for number, mode, buffering in ((0, "r", -1), (1, "w", 1 if os.isatty(1) else -1), (2, "w", 1))
    )
    sys.dont_write_bytecode = bool(environment.get("PYTHONDONTWRITEBYTECODE"))
    paths = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    import torch

    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS") or os.cpu_count() or 1))
    if arguments[0] == "-u":
        sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
        del arguments[0]
    if arguments[0] == "-W":
        warnings.simplefilter("error")
        del arguments[:2]
    if arguments[0] == "-m":
        sys.path[:0] = [folder, *paths]
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif arguments[0] == "-c":
        sys.path[:0] = [folder, *paths]
        sys.argv = ["-c", *arguments[2:]]
        exec(arguments[1], {"__name__": "__main__", "__builtins__": __builtins__})
    else:
        sys.path[:0] = [str(Path(arguments[0]).resolve().parent), *paths]
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


def _status(program: Callable[[], None]) -> int:
    """The exit status of a program, after it has said why."""
    try:
        program()
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return -signal.SIGINT
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _end(status: int) -> None:
    """End this process as the interpreter does, but leave taking down what was loaded to the system."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


def _answer(connection: socket.socket) -> None:
    """Run one program in a process of its own until it ends or the client has."""
    length, files, _, _ = socket.recv_fds(connection, 8, 3)
    if not length:
        os._exit(0)
    request = b""
    while (left := int.from_bytes(length) - len(request)) > 0:
        request += connection.recv(left)  # numbers of signals may follow
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    process = os.fork()
    if process == 0:
        connection.close()
        os.setpgid(0, 0)
        _end(_status(lambda: _become(*json.loads(request), files)))
    for file in (0, 1, 2, *files):
        os.close(file)
    end = os.pidfd_open(process)
    with selectors.DefaultSelector() as waiting:
        waiting.register(connection, selectors.EVENT_READ)
        waiting.register(end, selectors.EVENT_READ)
        while True:
            ready = {key.fileobj for key, _ in waiting.select()}
            if end in ready:
                break
            numbers = b""
            with contextlib.suppress(ConnectionError):
                numbers = connection.recv(64)
            for number in numbers or [signal.SIGKILL]:
                os.kill(process, number)
            if not numbers:
                break
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    with contextlib.suppress(OSError):
        connection.send(status.to_bytes(2, "big", signed=True))
    os._exit(0)


def _reap(*_: object) -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _serve(address: str) -> None:
    """Take requests until there is no more input."""
    for name in LOADED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a collection in a forked process would copy all pages
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, _reap)
    with socket.socket(socket.AF_UNIX) as server, selectors.DefaultSelector() as waiting:
        server.bind(address)
        server.listen(100)
        print("ready", flush=True)
        waiting.register(server, selectors.EVENT_READ)
        waiting.register(0, selectors.EVENT_READ)
        while True:
            if 0 in {key.fileobj for key, _ in waiting.select()}:
                os._exit(0)
            connection, _ = server.accept()
            if os.fork() == 0:
                waiting.close()
                server.close()
                _answer(connection)
            connection.close()


@contextlib.contextmanager
def interpreter(folder: Path) -> Iterator[str]:
    """The path of the interpreter; a folder that is there is for its files."""
    address, path = folder / "socket", folder / "python"
    path.write_text(CLIENT.replace("@ADDRESS@", repr(str(address))), encoding="utf-8")
    path.chmod(0o755)
    # Threads, and processes that compile, would not be forked.
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    with subprocess.Popen(
        [sys.executable, __file__, str(address)],
        env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
    ) as server:  # fmt: skip
        assert server.stdout is not None
        assert server.stdout.readline() == b"ready\n"
        yield str(path)


if __name__ == "__main__":
    sys.path.pop(0)
    _serve(sys.argv[1])
