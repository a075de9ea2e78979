"""Normalisation before quantizing (`--xx_adaptive`), in float32; finite inputs give finite results."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

LARGEST = torch.finfo(torch.float32).max
MIN_DIVISOR = 1e-5  # stands for a statistic that is nearer to zero
HUGE, UNIT = 2.0**40, 2.0**-80  # values above the first are multiplied by the second before they are summed


def moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and the unbiased standard deviation of each row; no sum overflows.

    Args:
        rows: float32 [r, n], n > 0. One element is its own mean, with a deviation of 0.

    Returns:
        Two of float32 [r], at most `LARGEST`.
    """
    # Rows of huge values are scaled by a power of two, which is exact; all other rows are not changed.
    unit = torch.where(rows.abs().amax(dim=1) > HUGE, UNIT, 1.0)
    rows = rows * unit.unsqueeze(1)
    spread = rows.std(dim=1) if rows.shape[1] > 1 else torch.zeros_like(rows[:, 0])
    return (rows.mean(dim=1) / unit).clamp(-LARGEST, LARGEST), (spread / unit).clamp_max(LARGEST)


class GradientTimes(torch.autograd.Function):
    """The identity on a float32 tensor, whose gradient is multiplied by `factor`, float32 and broadcastable."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (factor,) = ctx.saved_tensors
        return grad * factor, None


class Moments(NamedTuple):
    """The moments that normalise a tensor: float32, broadcastable to it, without gradient.

    Attributes:
        mean: the subtrahend.
        deviation: the divisor.
        unit: a power of two that scales gradients between `restored` and `normalised`. The backward pass of `restored`
            multiplies by the deviation and that of `normalised` divides by it; the unit keeps the product within
            float32. None: 1.
    """

    mean: Tensor
    deviation: Tensor
    unit: Tensor | None = None


def gradient_unit(deviation: Tensor) -> Tensor:
    """The unit of gradients for a deviation, a float32 scalar: 1 unless the deviation is huge; see `Moments`."""
    return torch.where(deviation.abs().amax() > HUGE, UNIT, 1.0)


def normalised(x: Tensor, taken: Moments) -> Tensor:
    """(x - mean) / deviation; float32, at most `LARGEST`. Both are halved first, since x - mean may overflow."""
    if taken.unit is not None:
        x = GradientTimes.apply(x, 1 / taken.unit)
    halved = torch.sub(0.5 * x, taken.mean, alpha=0.5)
    return (halved / (0.5 * taken.deviation)).clamp(-LARGEST, LARGEST)


def restored(x: Tensor, taken: Moments) -> Tensor:
    """Undo `normalised`: x * deviation + mean; float32, at most `LARGEST`."""
    x = (x * taken.deviation + taken.mean).clamp(-LARGEST, LARGEST)
    return x if taken.unit is None else GradientTimes.apply(x, taken.unit)
