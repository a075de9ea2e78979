"""A lock between the processes of a machine, for work on a data set that one of them does for all."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def exclusive(folder: Path, name: str = ".lock") -> Iterator[None]:
    """Hold the lock that is a file of this name in a folder; where the file system has no locks, hold nothing.

    A process that waited for it has to look whether the work is done.
    """
    handle = None
    # NFS locks only files that are open for writing; a folder that cannot be written can be locked itself.
    for path, flags in ((folder / name, os.O_RDWR | os.O_CREAT), (folder, os.O_RDONLY)):
        if handle is None:
            with contextlib.suppress(OSError):
                handle = os.open(path, flags, 0o666)
    try:
        if handle is not None:
            with contextlib.suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        if handle is not None:
            os.close(handle)
