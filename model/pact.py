"""PACT: parameterized clipping activation (arXiv 1805.06085)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from model.dorefa import DoReFaWeight
from model.quant import Integers, Quantizer, TensorSite, register
from model.uniform import Grid, PositiveClip, ScaleGradient, balance_factor, initial_clip, integers
from utils.config import QuantizerConfig


class ClippedRound(torch.autograd.Function):
    """q = l * c, l the level over c that is nearest to x / c, with PACT's gradient of the clip value c.

    dq/dx = 1 for low <= x < c, else 0; dq/dc = 1 where x >= c, else 0 (paper, equation 3).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, clip: Tensor, grid: Grid, balance: bool = False) -> Tensor:
        ratio = x / clip
        ctx.save_for_backward(ratio, clip)
        ctx.grid, ctx.balance = grid, balance
        return grid.ratios(grid.numbers(ratio)).mul_(clip)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ratio, clip = ctx.saved_tensors
        above = ratio >= 1
        inside = ctx.grid.inside(ratio) & ~above
        grad_x = torch.where(inside, grad, 0.0)
        if ctx.balance:
            grad_x = grad_x * balance_factor(inside)
        return grad_x, torch.where(above, grad, 0.0).sum_to_size(clip.shape), None, None


@register("pact", "fm", "ot")
class PACT(Quantizer):
    """round(clamp(x, 0, c) * n / c) * c / n with a learned c = |clip_val|, n = levels - 1.

    State:
        clip_val: float32, `range_shape`; starts at `boundary`.
    """

    def __init__(self, config: QuantizerConfig, site: TensorSite) -> None:
        super().__init__(config, site)
        self.clip_val = nn.Parameter(torch.full(self.range_shape(), config.boundary))
        self.zero_to_zero = (
            config.half_range
            and config.adaptive == "none"
            and config.grad_type != "STE-scale"
            and config.grad_scale not in ("element-scale", "scale-element", "paper")
        )

    def grid(self) -> Grid:
        """The levels."""
        return Grid.of(self.levels, self.config.half_range)

    def clip(self, x: Tensor) -> Tensor:
        """The clip value, float32 > 0, broadcastable to x."""
        clip = self.per_channel(PositiveClip.apply(self.clip_val))
        if self.config.grad_scale == "none":
            return clip
        return ScaleGradient.apply(clip, self.gradient_factor(x, self.grid().qp))

    def quantize(self, x: Tensor) -> Tensor:
        """Float32 of any shape to the nearest level."""
        return ClippedRound.apply(x, self.clip(x), self.grid(), self.config.grad_type == "STE-scale")

    def encode(self, x: Tensor) -> Integers:
        """Codes and scale of `x`."""
        return integers(x, self.clip(x), self.grid())

    def set_range(self, value: Tensor) -> None:
        """Take `value` as the clip value."""
        self.clip_val.copy_(value)

    def bounds(self) -> tuple[Tensor, Tensor]:
        """The ends of the grid."""
        clip, grid = self.clip_val.detach().abs(), self.grid()
        return clip * (grid.bottom / grid.top), clip

    def current_range(self) -> Tensor:
        """The clip value."""
        return self.clip_val.detach()

    def initialise_from(self, x: Tensor) -> None:
        """The clip value of LSQ's initial step; the paper starts from a large constant and decays it."""
        with torch.no_grad():
            rows = self.grouped(self.normalise(x.float()))
            self.set_range(initial_clip(rows, self.grid()).reshape(self.range_shape()))


register("pact", "wt")(DoReFaWeight)  # the paper quantizes weights as DoReFa-Net does
