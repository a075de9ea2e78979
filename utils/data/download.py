"""Downloads by libraries."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

PATIENCE = 30.0  # seconds that a server may be silent


@contextlib.contextmanager
def patient() -> Iterator[None]:
    """Wait for a silent server no longer than `PATIENCE`; torchvision and torch.hub have no option for it."""
    former = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)
    try:
        yield
    finally:
        socket.setdefaulttimeout(former)
