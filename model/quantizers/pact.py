"""PACT: parameterized clipping activation (arXiv 1805.06085)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model.quantizers.dorefa import DoReFaWeight
from model.quantizers.gradient import apply
from model.quantizers.grid import ClipSTE, balance_factor, between, next_up
from model.quantizers.learned_range import LearnedRange
from model.quantizers.registry import register


class ClippedRound(ClipSTE):
    """q = l * c, where l is the level nearest to x / c in units of c, with PACT's gradient to the clip value c.

    dq/dx = 1 for low <= x < c, else 0; dq/dc = 1 where x >= c, else 0 (paper, equation 3).
    """

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, clip = ctx.saved_tensors
        x, low, high = ctx.grid.bounded(x, clip)
        grad_x = between(grad, x, low, high)
        if ctx.balance:
            grad_x = grad_x * balance_factor(between(torch.ones_like(grad), x, low, high))
        above = torch.ops.aten.threshold_backward(grad, x, -next_up(-high))
        return grad_x, above.sum_to_size(clip.shape), None, None, None


@register("pact", "fm", "ot")
class PACT(LearnedRange):
    """round(clamp(x, 0, c) * n / c) * c / n with a learned c = |clip_val|, n = levels - 1.

    `--re_init` takes the clip value of LSQ's initial step; the paper starts from a large constant and
    decays it.

    State:
        clip_val: float32, `range_shape`; starts at `boundary`.
    """

    def quantize(self, x: Tensor) -> Tensor:
        """Float32 of any shape to the nearest level."""
        return apply(ClippedRound, *self.on_grid(x), self.config.grad_type == "STE-scale")


register("pact", "wt")(DoReFaWeight)  # the paper quantizes weights as DoReFa-Net does
