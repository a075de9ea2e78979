"""ExecuTorch's modules."""

from __future__ import annotations

import importlib
from typing import Any

from model.deploy.packages import needed
from model.deploy.quiet import quiet

PACKAGE = "executorch"


def part(name: str) -> Any:
    """A module of ExecuTorch, by its name within the package; its types are not checked.

    Raises:
        UserError: ExecuTorch is not installed.
    """
    needed(PACKAGE)
    with quiet(2):  # it warns that its interface may change
        return importlib.import_module(f"{PACKAGE}.{name}")
