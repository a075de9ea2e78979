"""Normalising before quantizing (`--xx_adaptive`), in float32 and finite wherever the input is."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

LARGEST = torch.finfo(torch.float32).max
HUGE, UNIT = 2.0**40, 2.0**-80  # values above the one are computed with in the other


def moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and the unbiased standard deviation of each row; no sum overflows.

    Args:
        rows: float32 [r, n], n > 0. One element is its own mean, with a deviation of 0.

    Returns:
        Two of float32 [r], at most `LARGEST`.
    """
    # Rows of huge values in another unit, a power of two, so that everything else keeps its last bit.
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
    """What normalising takes out of a tensor, float32, broadcastable to it, without a gradient.

    Attributes:
        mean: subtracted.
        deviation: divided by.
        unit: of gradients between `normalised` and `restored`, which multiplies by the deviation what the other
            divides by it later; a power of two that keeps the product a float32. None: 1.
    """

    mean: Tensor
    deviation: Tensor
    unit: Tensor | None = None


def gradient_unit(deviation: Tensor) -> Tensor:
    """The unit of gradients for such a deviation, a float32 scalar: 1 unless that is huge; see `Taken`."""
    return torch.where(deviation.abs().amax() > HUGE, UNIT, 1.0)


def normalised(x: Tensor, taken: Moments) -> Tensor:
    """(x - mean) / deviation; all float32, at most `LARGEST`. Halves, since the difference may overflow."""
    if taken.unit is not None:
        x = GradientTimes.apply(x, 1 / taken.unit)
    halved = torch.sub(0.5 * x, taken.mean, alpha=0.5)
    return (halved / (0.5 * taken.deviation)).clamp(-LARGEST, LARGEST)


def restored(x: Tensor, taken: Moments) -> Tensor:
    """Undo `normalised`: x * deviation + mean; all float32, at most `LARGEST`."""
    x = (x * taken.deviation + taken.mean).clamp(-LARGEST, LARGEST)
    return x if taken.unit is None else GradientTimes.apply(x, taken.unit)
