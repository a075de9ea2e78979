"""One run at a time for a case: a second one would rename the first one's files and mix its metrics.

The package `filelock` does not say who holds a lock, and gives up where `flock` answers ENOLCK, as some network file
systems do.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.processes.identity import identity_of


@contextlib.contextmanager
def locked(path: Path, case: str, option: str) -> Iterator[None]:
    """Hold the lock of a case, which ends with the process, however that ends.

    The lock is the operating system's (`flock`); the file says who holds it. On a file system without locks the file
    alone counts: an owner that is dead, or of an earlier boot, is passed over.

    Args:
        path: the file; its folder is made when missing, and the file is removed in the end.
        case: for messages.
        option: the one that names the folder, for messages.

    Raises:
        UserError: another process holds it, or the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = _opened(path, case)
    except OSError as error:
        raise UserError(
            f"--{option}: {path.parent} cannot be written ({error.strerror}); choose another --{option}"
        ) from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(handle)


def _opened(path: Path, case: str) -> int:
    """Open and lock the file, and write into it who this is; returns its descriptor."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _take(handle, path, case)
        except BaseException:
            os.close(handle)
            raise
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(handle).st_ino == os.stat(path).st_ino:
                break
        os.close(handle)  # its owner removed the file in the meantime
    with contextlib.suppress(OSError):  # a full disk; the lock holds all the same
        os.ftruncate(handle, 0)
        os.write(handle, json.dumps(_owner()).encode())
    return handle


def _take(handle: int, path: Path, case: str) -> None:
    """Lock the open file, or say who has it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    except BlockingIOError:
        alive = True
    except OSError:  # a file system without locks
        alive = False
    owner = _read(handle)
    if not alive and not _may_live(owner):
        return
    who = f"process {owner['pid']} on {owner['host']}, since {owner['since']}" if owner else "another process"
    elsewhere = "" if alive or owner.get("host") == socket.gethostname() else f"; if it is not, remove {path}"
    raise UserError(
        f"--case {case} is being trained by {who}{elsewhere}: wait for it, or choose another --case"
    )


def _owner() -> dict[str, Any]:
    """This process, for others to read."""
    try:
        boot, started = identity_of(os.getpid())
    except OSError:
        boot = started = ""
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "boot": boot,
        "started": started,
        "since": since,
    }


def _read(handle: int) -> dict[str, Any]:
    """The owner in the file; empty when there is none."""
    try:
        owner = json.loads(os.pread(handle, 4096, 0))
    except (OSError, ValueError):
        return {}
    return (
        owner
        if isinstance(owner, dict) and owner.keys() >= {"host", "pid", "boot", "started", "since"}
        else {}
    )


def _may_live(owner: dict[str, Any]) -> bool:
    """Whether the owner in a file is running, as far as this machine can tell."""
    if not owner:
        return False
    if owner["host"] != socket.gethostname():
        return True
    try:
        return identity_of(owner["pid"]) == (owner["boot"], owner["started"])
    except OSError:
        return False
