"""Engines that write on the standard streams by themselves."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet(*streams: int) -> Iterator[None]:
    """Without what an engine writes on these file descriptors, 1 or 2 or both, and without its warnings."""
    with warnings.catch_warnings(), open(os.devnull, "w") as nowhere:
        warnings.simplefilter("ignore")
        _flush()
        kept = {stream: os.dup(stream) for stream in streams}
        try:
            for stream in streams:
                os.dup2(nowhere.fileno(), stream)
            yield
        finally:
            _flush()
            for stream, copy in kept.items():
                os.dup2(copy, stream)
                os.close(copy)


def _flush() -> None:
    """Write what Python and the C library still hold back to where the streams lead now."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    if os.name == "posix":
        ctypes.CDLL(None).fflush(None)
