"""What is known of a package without reading it."""

from __future__ import annotations

import platform
from pathlib import Path

from utils.checkpoint.exported import MANIFEST


def is_package(folder: Path) -> bool:
    """Whether a folder, and no link to one, has what a package has and nothing else."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    try:
        return {entry.name for entry in folder.iterdir()} == {MANIFEST, "Data"}
    except OSError:
        return False


def predicts() -> bool:
    """Whether Core ML runs here."""
    return platform.system() == "Darwin"
