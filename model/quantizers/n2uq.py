"""N2UQ: learned thresholds and evenly spaced levels of activations, weights of high entropy (arXiv 2111.14826)."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from model.quantizers.fatnn import RoundedRamps
from model.quantizers.frame import Quantizer
from model.quantizers.gradient import apply
from model.quantizers.grid import FLOOR, Grid, PositiveClip, ScaleGradient, encode_numbers, encode_on_grid
from model.quantizers.integers import QuantizedTensor
from model.quantizers.learned_range import LearnedRange
from model.quantizers.registry import register
from model.quantizers.sign import mean_magnitude
from model.quantizers.site import LayerSite
from utils.config.schema import QuantizerConfig
from utils.errors import UserError

NARROWEST = 1e-3  # ramp, in units of the clip value: the gradient of one is inverse to its width


@register("n2uq", "fm", "ot")
class N2UQActivation(LearnedRange):
    """c * k / n for the number k of thresholds that x / c reaches, n = levels - 1; c * (2k / n - 1) with a full range.

    Threshold i is the middle of a ramp of width a_i = |width_i|; the first ramp begins at `start`, each other one where
    the ramp before it ends. Gradients are those of the ramps themselves, from 0 to 1 over their widths (generalised
    straight-through estimator, paper, section 3.2), times the factor of `grad_scale`. At the start the ramps have equal
    widths and cover the range, so that levels and gradients are LSQ's.

    State:
        clip_val: float32, `range_shape`; c, starts at `boundary`.
        start: float32, `range_shape`, in units of c.
        width0, width1, ...: float32, `range_shape`, in units of c.
    """

    start: nn.Parameter
    level_limit: ClassVar[int | None] = 16  # each threshold is a pass over the tensor

    def __init__(self, config: QuantizerConfig, site: LayerSite) -> None:
        super().__init__(config, site)
        for name, value in self._even_ramps(self.clip_val.detach()).items():
            self.register_parameter(name, nn.Parameter(value))

    def _even_ramps(self, like: Tensor) -> dict[str, Tensor]:
        """Start and widths of ramps that cover [0, 1] or [-1, 1], in the shape of `like`."""
        low, extent = (0.0, 1.0) if self.config.half_range else (-1.0, 2.0)
        return {"start": torch.full_like(like, low)} | self._even_widths(torch.full_like(like, extent))

    def _even_widths(self, total: Tensor) -> dict[str, Tensor]:
        return {f"width{i}": total / (self.levels - 1) for i in range(self.levels - 1)}

    def check_levels(self, levels: int) -> None:
        """Refuse another number of levels than there are thresholds for."""
        super().check_levels(levels)
        if levels != self.levels:
            raise UserError(
                f"{self.site.name}: n2uq has {self.levels - 1} thresholds and cannot change from {self.levels} to "
                f"{levels} levels"
            )

    def zero_to_zero(self) -> bool:
        """See `Quantizer`; padded positions stay 0, as in the paper's code, also if a threshold learns to be below."""
        return self.config.half_range and self.config.adaptive == "none"

    def half_range_changes(self) -> bool:
        """See `Quantizer`: the thresholds belong to one range."""
        return False

    def search_grid(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """See `Quantizer`: no search with evenly spaced thresholds."""

    def on_grid(self, x: Tensor) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """See `Quantizer`: the levels are evenly spaced, not the thresholds."""

    def _widths(self) -> list[Tensor]:
        return [getattr(self, f"width{i}") for i in range(self.levels - 1)]

    def _positive_widths(self) -> list[Tensor]:
        return [apply(PositiveClip, width, NARROWEST) for width in self._widths()]

    def _ramps(self, x: Tensor) -> tuple[Tensor, Tensor, tuple[int, ...], bool]:
        """The arguments of `RoundedRamps` beside the first: slopes and beginnings [n, ...], and lower ends."""
        factor = 1.0 if self.config.grad_scale == "none" else self.gradient_factor(x, self.grid().qp)
        learned = self._positive_widths()
        # A copy, since a warm-up may change the parameter before the backward pass.
        start, *widths = (
            self.per_channel(apply(ScaleGradient, value, factor))
            for value in (self.start.float().clone(), *learned)
        )
        slopes, begins = [], []
        for width in widths:
            slopes.append(1 / width)
            begins.append(start)
            start = start + width
        # Open below: of the many zeros behind a ReLU none moves a first ramp that begins at zero.
        return torch.stack(slopes), torch.stack(begins), (0,) * len(widths), True

    def _numbers(self, x: Tensor, clip: Tensor) -> Tensor:
        """How many thresholds each value reaches."""
        return apply(RoundedRamps, x / clip, *self._ramps(x))

    def quantize(self, x: Tensor) -> Tensor:
        """Float32 of any shape to the level of the highest threshold that is reached."""
        clip = self.clip(x)
        return self.grid().ratios(self._numbers(x, clip)) * clip

    def encode(self, x: Tensor) -> QuantizedTensor:
        """Codes of the evenly spaced levels and their scale."""
        clip = self.clip(x)
        return encode_numbers(self._numbers(x, clip), clip, self.grid())

    def range_error(self, x: Tensor) -> Tensor | None:
        """See `Quantizer`; None for normalised values."""
        return None if self.config.adaptive != "none" else (self.quantize(x) - x).square().sum()

    def set_range(self, value: Tensor) -> None:
        """Take [0, value] or [-value, value] as the range, over which the thresholds are spread evenly."""
        super().set_range(value)
        for name, even in self._even_ramps(value).items():
            self.get_parameter(name).copy_(even)

    def bounds(self) -> tuple[Tensor, Tensor]:
        """Where the first ramp begins and where the last one ends."""
        clip, start = apply(PositiveClip, self.clip_val).detach(), self.start.detach()
        total = torch.stack(self._positive_widths()).sum(0).detach()
        return start * clip, (start + total) * clip

    def of_another_method(self, held: Collection[str]) -> bool:
        """See `Quantizer`: a clip value alone is that of LSQ or PACT, whose thresholds are evenly spaced."""
        return "clip_val" in held and "start" not in held

    def adapted(self, entries: dict[str, Tensor]) -> dict[str, Tensor]:
        """Keep the largest value that is not clipped; the thresholds are spread evenly up to it.

        That of FATNN, whose levels have another scale, is not taken.
        """
        entries, own = super().adapted(entries), self.state_dict()
        widths = [value for name, value in entries.items() if name.startswith("width")]
        if widths:
            even = self._even_widths(torch.stack(widths).abs().sum(0))
        else:
            even = self._even_ramps(own["start"])
            if "offset" in entries:  # LSQ+: the clip value is the width of the range
                low = entries["offset"]
                even["clip_val"] = torch.maximum(low.abs(), (low + entries["clip_val"].abs()).abs())
            elif "alpha0" in entries:
                even["clip_val"] = own["clip_val"]
        return {name: value for name, value in entries.items() if name in own} | even


class RoundAll(torch.autograd.Function):
    """The nearest level, up to a clip value; the gradient is 1 everywhere, also outside the range.

    Args:
        x: float32, any shape.
        clip: float32, positive, broadcastable to x; it has no gradient.
        grid: the levels.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, clip: Tensor, grid: Grid) -> Tensor:
        return grid.nearest(x, clip)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None, None


@register("n2uq", "wt")
class N2UQWeight(Quantizer):
    """The nearest of evenly spaced levels in [-c, c], c = 2 (levels - 1) / levels * mean|w| over each group.

    With this c, weights that are spread evenly over an interval take all levels equally often, which is the largest
    entropy (paper, section 3.3). With two levels these are XNOR-Net's weights, but for the sign of 0. Straight-through
    with a gradient of 1 everywhere; c is a constant for it.
    """

    pure: ClassVar[bool] = True

    def on_grid(self, x: Tensor) -> tuple[Tensor, Tensor, Grid]:
        """See `Quantizer`."""
        grid = Grid.of(self.levels, False)
        mean = mean_magnitude(self.grouped(x.detach()), 1).reshape(self.range_shape())
        clip = (mean * (2 * grid.steps / self.levels)).clamp(FLOOR, torch.finfo(torch.float32).max)
        return x, self.per_channel(clip), grid

    def quantize(self, x: Tensor) -> Tensor:
        """Float32 of any shape to the nearest level."""
        return apply(RoundAll, *self.on_grid(x))

    def encode(self, x: Tensor) -> QuantizedTensor:
        """Codes and scale of `x`; an even number of levels has odd codes."""
        return encode_on_grid(*self.on_grid(x))
