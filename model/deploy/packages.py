"""Packages that exports need, each with the command that installs it."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import logging
import sys

from model.deploy.quiet import quiet
from utils.errors import UserError

TESTED = {
    "ai_edge_litert": "2.3.0",
    "coremltools": "9.0",
    "executorch": "1.5.1",
    "MNN": "3.6.1",
    "qonnx": "1.0.0",
}
"""Packages whose files may differ with their version, and the version that was tested."""

TALKATIVE = ("MNN",)
"""Packages that write on standard output when they are imported."""

NOISY = ("coremltools",)
"""Packages that log warnings about other packages when they are imported."""


def needed(*packages: str) -> None:
    """Check that packages are installed, before any work.

    Raises:
        UserError: one is not, or not wholly; the line names the command that installs it.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"{' and '.join(missing)} not installed: pip install {' '.join(map(_pinned, missing))}"
        )
    for name in packages:
        if name in NOISY:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            # coremltools imports executorch where that is installed, which warns.
            with quiet(1, 2) if name in TALKATIVE else quiet(2):
                importlib.import_module(name)
        except ImportError as error:
            raise UserError(
                f"{name} is installed but cannot be imported ({error}): pip install --force-reinstall {_pinned(name)}"
            ) from None
        _warn_of_version(name)


def _pinned(name: str) -> str:
    """What pip is to install."""
    return f"{name}=={TESTED[name]}" if name in TESTED else name


@functools.cache
def _warn_of_version(name: str) -> None:
    """Say once that a package has another version than the tested one."""
    tested = TESTED.get(name)
    if tested is not None and (found := importlib.metadata.version(name)) != tested:
        print(
            f"warning: {name} {found} is installed, and {tested} was tested: look at its files with tools.py --keyword "
            "verify",
            file=sys.stderr,
        )
