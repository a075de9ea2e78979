"""The evenly spaced grid that DoReFa-Net, PACT and LSQ share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.quant import Integers


@dataclass(frozen=True)
class Grid:
    """The levels `step * (low + k)`, k = 0, 1, ..., high - low.

    Attributes:
        low: lowest level in steps; a half-integer when zero lies midway between two levels
            (mid-rise with an even count of levels).
        high: highest level in steps; `step = clip / high`.
    """

    low: float
    high: float

    @classmethod
    def of(cls, levels: int, half_range: bool, *, midtread: bool = False) -> Grid:
        """The grid of `levels` levels in [0, c] (half range) or [-c, c] (full range).

        A mid-tread grid has a level at zero and, for an even count, one more level below zero than
        above, as two's complement has.
        """
        steps = levels - 1
        if half_range:
            return cls(0.0, float(steps))
        if midtread:
            return cls(float(-(levels // 2)), float(steps // 2))
        return cls(-steps / 2, steps / 2)

    def round(self, position: Tensor) -> Tensor:
        """Nearest level of positions (in steps, any shape).

        Ties go to the even k, counted from the lowest level as in the papers' formulas.
        """
        level = position.clamp(self.low, self.high)
        if self.low == int(self.low) and int(self.low) % 2 == 0:
            return level.round_()
        return level.sub_(self.low).round_().add_(self.low)

    @property
    def code_factor(self) -> int:
        """Codes per step: 2 where levels are half-integers of the step, so that codes are odd integers."""
        return 1 if self.low == int(self.low) else 2

    def index(self, codes: Tensor) -> Tensor:
        """Codes of `integers` counted from the lowest level, int64."""
        return torch.div(codes.long() - round(self.low * self.code_factor), self.code_factor, rounding_mode="floor")


class LearnedStep(torch.autograd.Function):
    """q = s * round(clamp(x / s, low, high)) with a gradient to the step s.

    Straight-through rounding gives, with r = x / s and l the level in steps,
    dq/dx = 1 inside [low, high], 0 outside; dq/ds = l - r inside, low or high outside
    (Esser et al., "Learned Step Size Quantization", arXiv 1902.08153, equations 1 to 3).

    Args:
        x: float32, any shape.
        step: float32, positive, broadcastable to x.
        grid: the levels.
        balance: multiply the gradient of x by sqrt(elements / elements inside) (`STE-scale`).

    Returns:
        float32, the shape of x.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, grid: Grid, balance: bool = False) -> Tensor:
        position = x / step
        ctx.save_for_backward(position, step)
        ctx.grid, ctx.balance = grid, balance
        return grid.round(position).mul_(step)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        position, step = ctx.saved_tensors
        inside = position.clamp(ctx.grid.low, ctx.grid.high) == position
        grad_x = grad_step = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.where(inside, grad, 0.0)
            if ctx.balance:
                grad_x = grad_x * balance_factor(inside)
        if ctx.needs_input_grad[1]:
            level = ctx.grid.round(position)  # cheaper to compute again than to keep
            slope = level.sub_(torch.where(inside, position, 0.0))
            grad_step = slope.mul_(grad).sum_to_size(step.shape)
        return grad_x, grad_step, None, None


def initial_clip(rows: Tensor, grid: Grid) -> Tensor:
    """The clip value of LSQ's initial step 2 * mean|x| / sqrt(Qp) (arXiv 1902.08153, section 2.1).

    Args:
        rows: float32 [g, elements].
        grid: the levels; Qp is the highest one in steps.

    Returns:
        float32 [g].
    """
    return 2 * rows.abs().mean(dim=1) * grid.high / max(grid.high, 1.0) ** 0.5


def balance_factor(inside: Tensor) -> Tensor:
    """sqrt(elements / elements inside), the factor of `STE-scale`; at least one element counts."""
    return (inside.numel() / inside.sum().clamp_min(1)).sqrt()


def integers(x: Tensor, step: Tensor, grid: Grid) -> Integers:
    """The codes of `round(clamp(x / step))` and their scale; mid-rise levels give odd codes.

    Args:
        x: float32, any shape.
        step: float32, broadcastable to x.
        grid: the levels.
    """
    level = grid.round(x / step)
    # Doubling is exact in floating point, so (2 * level) * (step / 2) equals level * step.
    factor = grid.code_factor
    return Integers(codes=(level * factor).to(torch.int32), scale=(step / factor).detach())


class ScaleGradient(torch.autograd.Function):
    """The identity whose gradient is multiplied by a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


class PositiveClip(torch.autograd.Function):
    """max(|c|, floor) whose gradient is sign(c) everywhere, with sign(0) = +1.

    The floor keeps x / c finite; passing the gradient below the floor lets a clip value that has
    reached zero, or crossed it, grow again.
    """

    FLOOR = 1e-6

    @staticmethod
    def forward(ctx: Any, clip: Tensor) -> Tensor:
        ctx.save_for_backward(clip)
        return clip.abs().clamp_min(PositiveClip.FLOOR)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (clip,) = ctx.saved_tensors
        return torch.where(clip < 0, -grad, grad)
