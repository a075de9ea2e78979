"""The text of a mistake, and checkpoints of a case."""

from __future__ import annotations

import pytest
import torch

from utils.checkpoint import archive
from utils.checkpoint.case_files import CheckpointFiles
from utils.errors import UserError


def message(error: pytest.ExceptionInfo[UserError]) -> str:
    """The text of a user's mistake, which is one line."""
    text = str(error.value)
    assert text and "\n" not in text
    return text


def fill(files: CheckpointFiles, **epochs: int) -> None:
    """Write checkpoints: `latest=3` or `e2=2`, the value is the epoch inside."""
    for name, epoch in epochs.items():
        path = files.latest if name == "latest" else files.epoch(int(name[1:]))
        archive.save(path, {"epoch": epoch, "state_dict": {"w": torch.ones(50)}})
