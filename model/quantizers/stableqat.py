"""StableQAT's rotated damped Fourier surrogate (arXiv 2601.19320), on the learned clip value of LSQ."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from torch import Tensor

from model.quantizers.gradient import apply
from model.quantizers.grid import ClipSTE, Grid, slope_parts
from model.quantizers.lsq import LSQ
from model.quantizers.registry import register

AMPLITUDE = 0.21  # A; from 1 / (sqrt(2) pi) = 0.225 on the slope is not finite everywhere
DAMPING = math.sqrt(2) * math.pi * AMPLITUDE


class ClipRDFS(ClipSTE):
    """q = l * c, where l is the level nearest to r = x / c, with the slope of a smooth staircase as gradient to x.

    Turned by 45 degrees, rounding is a triangle wave around zero. Its first harmonic, with the amplitude A, turned
    back is a smooth staircase. With d, the distance of x from its level in steps, its slope is
    s(d) = (1 - a cos(pi d)) / (1 + a cos(pi d)), a = sqrt(2) pi A (paper, section 3.1, of first order):
    (1 - a) / (1 + a) at a level, 1 at a threshold. Hence
    dL/dx = g * s(d) inside the range, 0 outside; dL/dc is that of `ClipSTE`.

    Args:
        x: float32, any shape.
        clip: float32, positive, broadcastable to x.
        grid: the levels.
        keep: as of `ClipSTE`.

    Returns:
        float32, the shape of x.

    Example:
        >>> import torch
        >>> from model.quant import Grid
        >>> from model.quantizers.stableqat import ClipRDFS
        >>> x = torch.tensor([-0.5, 0.5, 0.6, 0.75, 5.0], requires_grad=True)
        >>> ClipRDFS.apply(x, torch.tensor([1.5]), Grid.of(4, half_range=True)).sum().backward()
        >>> x.grad  # at the level 0.5, 0.2 steps above it, and at a threshold
        tensor([0.0000, 0.0347, 0.1397, 1.0000, 0.0000])
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, x: Tensor, clip: Tensor, grid: Grid, keep: bool = False
    ) -> Tensor:
        return ClipSTE.forward(ctx, x, clip, grid, False, keep)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grid: Grid = ctx.grid
        clip, passed, level, ratio = slope_parts(ctx, grad)
        grad_clip = None
        if ctx.needs_input_grad[1]:
            grad_clip = (grad * level).addcmul_(passed, ratio, value=-1).sum_to_size(clip.shape)
        wave = (ratio - level).mul_(math.pi * grid.qp).cos_().mul_(DAMPING)
        return passed * (1 - wave) / (1 + wave), grad_clip, None, None


@register("stableqat", "fm", "wt", "ot")
class StableQAT(LSQ):
    """LSQ's levels and learned clip value, with gradients that are small at a level and whole at a threshold.

    State:
        clip_val: float32, `range_shape`; starts at `boundary`.
    """

    pure: ClassVar[bool] = True

    def quantize(self, x: Tensor) -> Tensor:
        """Float32 of any shape to the nearest level."""
        return apply(ClipRDFS, *self.on_grid(x), self.keeps_output)
