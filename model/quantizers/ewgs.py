"""EWGS: element-wise gradient scaling (arXiv 2104.00903), on the learned clip value of LSQ."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from model.quantizers.gradient import apply
from model.quantizers.grid import ClipSTE, Grid, slope_parts
from model.quantizers.lsq import LSQ
from model.quantizers.registry import register


class ClipEWGS(ClipSTE):
    """q = l * c, where l is the level nearest to r = x / c, with gradients that depend on the distance r - l.

    With x_n and x_q for r and l in units in which the range is 1 wide, a gradient g that passes the rounding becomes
    g * (1 + delta * sign(g) * (x_n - x_q)) (paper, equation 4). Hence, with g that arrives at q,
    dL/dx = g * (1 + delta * sign(g) * (x_n - x_q)) inside the range, 0 outside;
    dL/dc = g * l - dL/dx * r inside, g * l outside, since c is used on both sides of the rounding.

    Args:
        x: float32, any shape.
        clip: float32, positive, broadcastable to x.
        grid: the levels.
        delta: 0 or more; 0 is `ClipSTE`.
        keep: as of `ClipSTE`.

    Returns:
        float32, the shape of x.

    Example:
        >>> import torch
        >>> from model.quant import Grid
        >>> from model.quantizers.ewgs import ClipEWGS
        >>> x = torch.tensor([-0.5, 0.4, 0.6, 5.0], requires_grad=True)
        >>> clip = torch.tensor([1.5], requires_grad=True)
        >>> ClipEWGS.apply(x, clip, Grid.of(4, half_range=True), 3.0).sum().backward()
        >>> x.grad  # 0.1 / 1.5 below and above the level 0.5
        tensor([0.0000, 0.8000, 1.2000, 0.0000])
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, x: Tensor, clip: Tensor, grid: Grid, delta: float, keep: bool = False
    ) -> Tensor:
        ctx.delta = delta
        return ClipSTE.forward(ctx, x, clip, grid, False, keep)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grid: Grid = ctx.grid
        clip, passed, level, ratio = slope_parts(ctx, grad)
        # g * (1 + delta * sign(g) * d) = g + |g| * delta * d, where the range is 1 wide.
        passed = passed.addcmul(passed.abs(), ratio - level, value=ctx.delta * grid.qp / grid.steps)
        grad_clip = None
        if ctx.needs_input_grad[1]:
            grad_clip = level.mul_(grad).addcmul_(passed, ratio, value=-1).sum_to_size(clip.shape)
        return passed, grad_clip, None, None, None


@register("ewgs", "fm", "wt", "ot")
class EWGS(LSQ):
    """LSQ's levels and learned clip value, with gradients scaled element by element.

    A step against the gradient moves a value towards a threshold. The gradient grows where the value lies beyond its
    level, seen from that threshold, and shrinks where it lies between the two, by `grad_delta` times the distance.

    State:
        clip_val: float32, `range_shape`; starts at `boundary`.
    """

    pure: ClassVar[bool] = True

    def quantize(self, x: Tensor) -> Tensor:
        """Float32 of any shape to the nearest level."""
        return apply(ClipEWGS, *self.on_grid(x), self.config.grad_delta, self.keeps_output)
