"""What runs code where a file is unpickled; no checkpoint may hold it."""

from __future__ import annotations

import os
from typing import Any


class Malicious:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        """Keep the shell command."""
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        """What pickle stores."""
        return (os.system, (self.command,))
