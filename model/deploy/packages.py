"""Packages that exports need, each with the command that installs it."""

from __future__ import annotations

import importlib
import importlib.util

from utils.errors import UserError


def needed(*packages: str) -> None:
    """Check that packages are installed, before any work.

    Raises:
        UserError: one is not, or not wholly; the line names the command that installs it.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{' and '.join(missing)} not installed: pip install {' '.join(missing)}")
    for name in packages:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(
                f"{name} is installed but cannot be imported ({error}): pip install --force-reinstall {name}"
            ) from None
