"""What tools.py is called with: a process of its own, a state dict, mapping files."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from tests import ROOT

STATE = {
    "conv1.weight": torch.arange(8.0).reshape(2, 4),
    "conv1.clip_val": torch.tensor([1.5]),
    "bn1.num_batches_tracked": torch.tensor(1234567890),
    "fc.bias": torch.tensor([0.1, -2.0], dtype=torch.float64),
}


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """`python tools.py ...` in a process of its own."""
    command = [sys.executable, "tools.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


Call = Callable[..., tuple[int, str, str]]


def lists(folder: Path, mf: str, mt: str) -> tuple[Path, Path]:
    """Two mapping files."""
    (folder / "mf").write_text(mf)
    (folder / "mt").write_text(mt)
    return folder / "mf", folder / "mt"
