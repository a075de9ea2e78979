"""Normalising before quantizing (`--xx_adaptive`), in float32 and finite wherever the input is."""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = torch.finfo(torch.float32).max


def moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and the unbiased standard deviation of each row; no sum overflows.

    Args:
        rows: float32 [r, n], n > 0. One element is its own mean, with a deviation of 0.

    Returns:
        Two of float32 [r], at most `LARGEST`.
    """
    # Rows of huge values in another unit, a power of two, so that everything else keeps its last bit.
    unit = torch.where(rows.abs().amax(dim=1) > 2.0**40, 2.0**-80, 1.0)
    rows = rows * unit.unsqueeze(1)
    spread = rows.std(dim=1) if rows.shape[1] > 1 else torch.zeros_like(rows[:, 0])
    return (rows.mean(dim=1) / unit).clamp(-LARGEST, LARGEST), (spread / unit).clamp_max(LARGEST)


def normalised(x: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """(x - mean) / deviation; all float32, at most `LARGEST`. Halves, since the difference may overflow."""
    return (torch.sub(0.5 * x, mean, alpha=0.5) / (0.5 * deviation)).clamp(-LARGEST, LARGEST)


def restored(x: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """Undo `normalised`: x * deviation + mean; all float32, at most `LARGEST`."""
    return (x * deviation + mean).clamp(-LARGEST, LARGEST)
