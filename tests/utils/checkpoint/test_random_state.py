"""Random states come back from a checkpoint."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from utils.checkpoint import archive, random_state
from utils.errors import UserError


def draws() -> list[float]:
    """Numbers of every generator, with one of a pair of normals left over in two of them."""
    return [
        random.random(),
        random.gauss(0, 1),
        float(np.random.rand()),
        float(np.random.randn()),
        float(torch.rand(1)),
        float(torch.randn(1)),
    ]


def test_random_state_survives_a_checkpoint(tmp_path: Path) -> None:
    """What is drawn after restoring from a file is what was drawn after saving it."""
    draws()
    archive.save(tmp_path / "a.pth.tar", {"random": random_state.random_state()})
    expected = [draws() for _ in range(3)]
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    assert draws() != expected[0]
    random_state.set_random_state(archive.read(tmp_path / "a.pth.tar")["random"])
    assert [draws() for _ in range(3)] == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_random_state_of_cuda(tmp_path: Path) -> None:
    """The device's generator, too."""
    archive.save(tmp_path / "a.pth.tar", {"random": random_state.random_state()})
    expected = torch.rand(5, device="cuda")
    random_state.set_random_state(archive.read(tmp_path / "a.pth.tar")["random"])
    assert torch.equal(torch.rand(5, device="cuda"), expected)


@pytest.mark.parametrize(
    "change", [{"python": None}, {"numpy": {}}, {"torch": torch.zeros(3, dtype=torch.uint8)}]
)
def test_a_foreign_random_state(change: dict[str, Any]) -> None:
    """One line, no traceback."""
    before = random_state.random_state()
    with pytest.raises(UserError, match="random state was not written by this program"):
        random_state.set_random_state({**before, **change})
    with pytest.raises(UserError):
        random_state.set_random_state({})
    random_state.set_random_state(before)
