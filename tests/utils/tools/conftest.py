"""tools.py in the process of the tests, and a checkpoint for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import tools
from tests.utils.tools.commands import STATE
from utils.checkpoint import archive


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`python tools.py ...` without the process: exit status, standard output, standard error."""

    def run_inside(*arguments: str | Path) -> tuple[int, str, str]:
        status = tools.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run_inside


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A checkpoint of a run."""
    path = tmp_path / "old.pth.tar"
    optimizer = {"state": {0: torch.ones(2)}, "param_groups": []}
    archive.save(path, {"epoch": 12, "best_acc": 91.25, "state_dict": STATE, "optimizer": optimizer})
    return path
