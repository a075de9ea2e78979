"""XNOR-Net (arXiv 1603.05279), with Bi-Real Net's gradient (arXiv 1808.00278); XNOR-Net++ adds `gamma`."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from model.quantizers.frame import Quantizer
from model.quantizers.gradient import apply
from model.quantizers.grid import inside, known
from model.quantizers.integers import QuantizedTensor
from model.quantizers.registry import register
from model.quantizers.sign import binary, mean_magnitude, sign


class ScaledSign(torch.autograd.Function):
    """sign(x) * scale with sign(0) = +1.

    The gradient of x is the incoming gradient times a mask and without the scale, as in the training of published
    binary networks. The mask `none` is 1; with a window w `STE` is 1 where |x| < w, else 0; `Triangle` is 2 - 2|x| / w
    where |x| < w, else 0 (arXiv 1808.00278, equation 8, for w = 1). The scale has no gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, mask: str, window: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.mask, ctx.window = mask, window
        signs = sign(x)
        return signs if known(scale, x) and scale.item() == 1 else signs.mul_(scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        if ctx.mask == "STE":
            grad = inside(grad, x, -ctx.window, ctx.window)
        elif ctx.mask == "Triangle":
            grad = x.abs().mul_(-2 / ctx.window).add_(2).clamp_min_(0) * grad
        return grad, None, None, None


class _Binary(Quantizer):
    level_limit: ClassVar[int | None] = 2

    def scale(self, x: Tensor) -> Tensor:
        """The factor on the signs, float32, broadcastable to x; no gradient."""
        raise NotImplementedError

    def quantize(self, x: Tensor) -> Tensor:
        """Float32 of any shape to +-scale."""
        config = self.config
        return apply(ScaledSign, x, self.scale(x.detach()), config.grad_type, config.grad_window)

    def encode(self, x: Tensor) -> QuantizedTensor:
        """Codes -1 and +1 and their scale."""
        return binary(x, self.scale(x))


@register("xnor", "fm", "ot")
class XNORActivation(_Binary):
    """sign(x), with `custom` times the mean |x| over channels or over positions.

    `custom`: "none"; "channel", a factor for each position (K of the paper, equation 11); "resolution", a factor for
    each channel.
    """

    def scale(self, x: Tensor) -> Tensor:
        """See the class."""
        dim = self.site.channel_dim % x.ndim
        positions = [d for d in range(1, x.ndim) if d != dim]
        if self.config.custom == "resolution" and positions:
            return mean_magnitude(x, positions)
        if self.config.custom != "none":  # a linear layer has no positions: one factor per sample
            return mean_magnitude(x, dim)
        return x.new_ones(1)

    def sign_threshold(self) -> Tensor | None:
        """See `Quantizer`; None where a mean is subtracted before."""
        return (
            self.iteration.new_zeros(1, dtype=torch.float32)
            if self.config.adaptive in ("none", "var")
            else None
        )

    def levels_per_sample(self) -> bool:
        """True too where each position or channel of a sample has its own factor."""
        return self.config.custom != "none" or super().levels_per_sample()

    def level_rows(self, output: Tensor) -> Tensor:
        """Rows of the values that share a factor."""
        dim = self.site.channel_dim % output.ndim
        if self.config.custom == "resolution" and output.ndim > 2:
            return output.movedim(dim, 1).flatten(0, 1).flatten(1)
        if self.config.custom != "none":
            return output.movedim(dim, -1).flatten(0, -2)
        return super().level_rows(output)


@register("xnor", "wt")
class XNORWeight(_Binary):
    """sign(w) * mean|w| over each group (the paper's alpha, equation 6)."""

    pure: ClassVar[bool] = True

    def scale(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.per_channel(mean_magnitude(self.grouped(x), 1).reshape(self.range_shape()))
