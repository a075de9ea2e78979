"""DoReFa-Net (arXiv 1606.06160)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from model.quantizers.frame import Quantizer
from model.quantizers.gradient import apply
from model.quantizers.grid import ClipSTE, Grid, encode_on_grid
from model.quantizers.integers import QuantizedTensor
from model.quantizers.registry import register
from model.quantizers.sign import binary, mean_magnitude, sign
from model.quantizers.site import LayerSite
from utils.config.schema import QuantizerConfig
from utils.errors import UserError

SMALLEST = torch.finfo(torch.float32).tiny
# A smaller max|tanh(w)| is no divisor: the gradient, at most the sum of the incoming gradient over it, would overflow.
SMALLEST_MAXIMUM = 1e-30


@register("dorefa", "fm", "ot")
class DoReFaActivation(Quantizer):
    """round(clamp(x, 0, c) * n / c) * c / n with a fixed c = `boundary` and n = levels - 1.

    Full range (`half_range` off): levels evenly spaced in [-c, c].
    Gradient: straight-through inside the clamp, zero outside (paper, equation 5 and section 2.3).
    """

    clip: Tensor

    def __init__(self, config: QuantizerConfig, site: LayerSite) -> None:
        super().__init__(config, site)
        self.register_buffer(
            "clip", torch.full(self.range_shape(), config.boundary), persistent=self.calibrates
        )

    def learned(self) -> set[str]:
        """See `Quantizer`; with a warm-up, the clip value that it found too."""
        return super().learned() | ({"clip"} if self.calibrates else set())

    def zero_to_zero(self) -> bool:
        """See `Quantizer`; `STE-scale` counts elements."""
        config = self.config
        return config.half_range and config.adaptive == "none" and config.grad_type != "STE-scale"

    def grid(self) -> Grid:
        """The levels."""
        return Grid.of(self.levels, self.config.half_range)

    def half_range_changes(self) -> bool:
        """See `Quantizer`."""
        return True

    def search_grid(self) -> Grid:
        """See `Quantizer`."""
        return self.grid()

    def positive_clip(self) -> Tensor:
        """The clip value, float32 > 0, broadcastable to the tensor."""
        return self.per_channel(self.clip.float().clamp_min(SMALLEST))

    def quantize(self, x: Tensor) -> Tensor:
        """Float32 of any shape to the nearest level."""
        return apply(ClipSTE, *self.on_grid(x), self.config.grad_type == "STE-scale")

    def on_grid(self, x: Tensor) -> tuple[Tensor, Tensor, Grid]:
        """See `Quantizer`."""
        return x, self.positive_clip(), self.grid()

    def encode(self, x: Tensor) -> QuantizedTensor:
        """Codes and scale of `x`."""
        return encode_on_grid(*self.on_grid(x))

    def set_range(self, value: Tensor) -> None:
        """Set the clip value."""
        self.clip.copy_(value)

    def bounds(self) -> tuple[Tensor, Tensor]:
        """The ends of the grid."""
        clip, grid = self.clip, self.grid()
        return clip * (grid.bottom / grid.top), clip

    def current_range(self) -> Tensor:
        """The clip value."""
        return self.clip


@register("dorefa", "wt")
class DoReFaWeight(Quantizer):
    """t = tanh(w), u = t / (2 max|t|) + 1/2, q = 2 * round(n * u) / n - 1, n = levels - 1.

    The maximum is over the whole tensor (paper, equation 9); a maximum below 1e-30 counts as 1. Gradient:
    straight-through for the rounding alone, exact for tanh and the maximum. With `binary_scale` (keyword `wt_bin`)
    there are two levels, sign(w) * mean|w| over the tensor, with a straight-through gradient (equation 7).
    """

    pure: ClassVar[bool] = True

    def quantize(self, x: Tensor) -> Tensor:
        """Float32 of any shape to levels in [-1, 1], or to +-mean|x|."""
        if self.config.binary_scale:
            return apply(SignTimesMean, x)
        return apply(
            TanhRound, x, Grid.of(self.levels, half_range=False)
        )  # nothing lies outside for `STE-scale`

    def check_levels(self, levels: int) -> None:
        """Binary weights have two."""
        super().check_levels(levels)
        if self.config.binary_scale and levels != 2:
            raise UserError(f"{self.site.name}: the keyword wt_bin has 2 levels, not {levels}")

    def on_grid(self, x: Tensor) -> tuple[Tensor, Tensor, Grid] | None:
        """See `Quantizer`; None for binary weights."""
        if self.config.binary_scale:
            return None
        return self._squashed(x), x.new_ones(1), Grid.of(self.levels, half_range=False)

    def encode(self, x: Tensor) -> QuantizedTensor:
        """Codes and scale of `x`; an even count of levels has odd codes."""
        placed = self.on_grid(x)
        return binary(x, mean_magnitude(x.detach())) if placed is None else encode_on_grid(*placed)

    def normalise(self, x: Tensor) -> Tensor:
        """See `Quantizer`; then map to [-1, 1], where the levels are, unless the weights are binary."""
        normed = super().normalise(x)
        return normed if self.config.binary_scale else self._squashed(normed)

    @staticmethod
    def _squashed(x: Tensor) -> Tensor:
        squashed = torch.tanh(x)
        return squashed / divisor(largest_magnitude(squashed))


def largest_magnitude(x: Tensor) -> Tensor:
    """max|x|, float32 []; one pass."""
    low, high = x.aminmax()
    return torch.maximum(-low, high)


def divisor(largest: Tensor) -> Tensor:
    """The maximum, or 1 where it is too small."""
    return torch.where(largest < SMALLEST_MAXIMUM, 1.0, largest)


class TanhRound(torch.autograd.Function):
    """q = the level nearest to u = t / max|t|, t = tanh(x), of a full range with c = 1.

    Straight-through rounding gives, for the gradient g of q and m = max|t|,
    dL/dt = g / m + (dL/dm) * sign(t) / n where |t| = m, with n such elements, and dL/dm = -sum(g * t / m^2);
    dL/dx = dL/dt * (1 - t^2). A maximum that is too small is 1, without gradient. In the order in which autograd would
    compute it, but only x and m are saved, and t is computed again.

    Args:
        x: float32, any shape.
        grid: the levels.

    Returns:
        float32, the shape of x.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: Grid) -> Tensor:
        squashed = torch.tanh(x)
        largest = largest_magnitude(squashed)
        ctx.save_for_backward(x, largest)
        return grid.ratios(grid.numbers_(squashed.div_(divisor(largest))))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x, largest = ctx.saved_tensors
        squashed, over = torch.tanh(x), divisor(largest)
        part = squashed / over
        grad_largest = -(grad * part.div_(over)).sum()
        grad_largest = torch.where(largest < SMALLEST_MAXIMUM, 0.0, grad_largest)
        torch.eq(torch.abs(squashed, out=part), largest, out=part)  # 1 at the maximum, else 0
        share = grad_largest / part.sum()
        grad_squashed = (grad / over).add_(part.copysign_(squashed).mul_(share))
        return torch.ops.aten.tanh_backward(grad_squashed, squashed), None


class SignTimesMean(torch.autograd.Function):
    """sign(x) * mean|x| with sign(0) = +1; the gradient passes unchanged."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return sign(x).mul_(mean_magnitude(x))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad
