"""Memory that is freed stays with the process, which takes it again without waiting for the system."""

from __future__ import annotations

import ctypes

# Of malloc.h: from how many free bytes on the end of the heap goes back, and from how many bytes on a block is no
# part of the heap.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_MOST = 2**31 - 1
_OLD_MOST = 32 * 2**20  # of blocks in the heap, in older versions


def keep_freed_memory() -> None:
    """Let the GNU C library keep what is freed; with another one this does nothing.

    By default it gives megabytes back as soon as they are free. Each step then takes the memory of its activations
    from the system again, page by page, which can be a third of the time of an evaluation. The process keeps as much
    memory as it has once needed.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    # Setting one ends the library's own adapting of both, so that the first must have been accepted.
    if mallopt(_MMAP_THRESHOLD, _MOST) or mallopt(_MMAP_THRESHOLD, _OLD_MOST):
        mallopt(_TRIM_THRESHOLD, _MOST)
