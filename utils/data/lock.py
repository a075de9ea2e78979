"""A lock between the processes of a machine, for work on a data set that one of them does for all."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def exclusive(folder: Path, name: str | None = ".lock") -> Iterator[bool]:
    """Hold the lock that is a file of this name in a folder; where the file system has no locks, hold nothing.

    A process that waited for it has to look whether the work is done. Without a name the folder itself is locked, and
    nobody waits: False where another process has it.
    """
    handle, mine = None, True
    # NFS locks only files that are open for writing; a folder that cannot be written can be locked itself.
    named = [] if name is None else [(folder / name, os.O_RDWR | os.O_CREAT)]
    for path, flags in (*named, (folder, os.O_RDONLY)):
        if handle is None:
            with contextlib.suppress(OSError):
                handle = os.open(path, flags, 0o666)
    try:
        if handle is not None:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | (fcntl.LOCK_NB if name is None else 0))
            except BlockingIOError:
                mine = False
            except OSError:
                pass
        yield mine
    finally:
        if handle is not None:
            os.close(handle)
