"""FATNN: fast and accurate ternary neural networks (arXiv 2008.05101), learned thresholds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from model.quantizers.frame import Quantizer
from model.quantizers.gradient import apply
from model.quantizers.grid import FLOOR, PositiveClip, between, next_up
from model.quantizers.integers import QuantizedTensor
from model.quantizers.registry import register
from model.quantizers.sign import mean_magnitude
from model.quantizers.site import LayerSite
from model.quantizers.snapshot import snapshot
from utils.config.schema import QuantizerConfig
from utils.errors import UserError


class RoundedRamps(torch.autograd.Function):
    """The sum over i of round(clamp((x - shift_i) * slope_i, low_i, low_i + 1)).

    Straight-through rounding gives, inside the clamp of ramp i, d/dx = slope_i,
    d/dslope_i = x - shift_i and d/dshift_i = -slope_i; outside all are 0.

    Args:
        x: float32, any shape.
        slopes: float32 [ramps, ...], each broadcastable to x.
        shifts: float32 [ramps, ...], likewise.
        lows: -1 or 0 for each ramp.
        open_below: the gradients are 0 at the lower end of a ramp, too.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        slopes: Tensor,
        shifts: Tensor,
        lows: tuple[int, ...],
        open_below: bool = False,
    ) -> Tensor:
        ctx.save_for_backward(x, slopes, shifts)
        ctx.lows, ctx.open_below = lows, open_below
        result = torch.zeros_like(x)
        for slope, shift, low in zip(slopes, shifts, lows, strict=True):
            result.add_((x - shift).mul_(slope).clamp_(low, low + 1).round_())
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, slopes, shifts = ctx.saved_tensors
        grad_x = torch.zeros_like(x)
        grad_slopes, grad_shifts = [], []
        for slope, shift, low in zip(slopes, shifts, ctx.lows, strict=True):
            distance = x - shift
            first = next_up(low) if ctx.open_below else low
            arriving = between(grad, distance * slope, first, next_up(low + 1))
            grad_x.addcmul_(arriving, slope)
            grad_shifts.append(-slope * arriving.sum_to_size(shift.shape))
            grad_slopes.append(distance.mul_(arriving).sum_to_size(slope.shape))
        return grad_x, torch.stack(grad_slopes), torch.stack(grad_shifts), None, None


class _FATNN(Quantizer):
    """Learned slopes a_i = |alpha_i|; the result is an integer, times a running scale with `closed_form`.

    State:
        alpha0, alpha1, ...: float32, `range_shape`; the slopes.
        output_scale: float32, `range_shape`; the running scale (only with `closed_form`). Published
            checkpoints call it `basis` and hold one for activations only.
    """

    output_scale: Tensor
    level_limit: ClassVar[int | None] = 4
    published: ClassVar[Mapping[str, str]] = {"basis": "output_scale"}
    obsolete: ClassVar[frozenset[str]] = frozenset({"auxil"})

    def __init__(self, config: QuantizerConfig, site: LayerSite) -> None:
        super().__init__(config, site)
        for i in range(self.ramps):
            self.register_parameter(
                f"alpha{i}", nn.Parameter(torch.full(self.range_shape(), self.initial_slope))
            )
        if config.closed_form:
            self.register_buffer("output_scale", torch.ones(self.range_shape()))

    def check_levels(self, levels: int) -> None:
        """Refuse more levels than there are slopes for; fewer levels do not use the last slopes."""
        super().check_levels(levels)
        slopes = sum(name.startswith("alpha") for name, _ in self.named_parameters())
        if levels - 1 > slopes or (levels != self.levels and not self.config.half_range):
            raise UserError(
                f"{self.site.name}: FATNN has {slopes} slopes and cannot change from {self.levels} to {levels} levels"
            )

    def learned(self) -> set[str]:
        """See `Quantizer`; with `closed_form` the scale of activations too, which published weights do not have."""
        scaled = self.config.closed_form and self.config.tag != "wt"
        return super().learned() | ({"output_scale"} if scaled else set())

    def adapted(self, entries: dict[str, Tensor]) -> dict[str, Tensor]:
        """Without the slopes that fewer levels do not have."""
        return super().adapted({name: value for name, value in entries.items() if name in self.state_dict()})

    @property
    def ramps(self) -> int:
        """Number of slopes."""
        return self.levels - 1

    @property
    def initial_slope(self) -> float:
        """The slopes' first value."""
        raise NotImplementedError

    def thresholds(self) -> tuple[Tensor, Tensor, tuple[int, ...]]:
        """Slopes and shifts [ramps, ...] broadcastable to the tensor, and the lows of the ramps."""
        slopes = torch.stack([apply(PositiveClip, getattr(self, f"alpha{i}")) for i in range(self.ramps)])
        if self.config.half_range:
            widths = 1 / slopes
            shifts, lows = widths.cumsum(dim=0) - widths, (0,) * self.ramps
        else:
            shifts, lows = torch.zeros_like(slopes), (-1, 0)
        if self.groups in (1, self.site.channels):
            return slopes, shifts, lows
        spread = [self.per_channel(value) for value in (*slopes, *shifts)]
        return torch.stack(spread[: self.ramps]), torch.stack(spread[self.ramps :]), lows

    def quantize(self, x: Tensor) -> Tensor:
        """Float32 of any shape to integers, or with `closed_form` to their multiples."""
        codes = apply(RoundedRamps, x, *self.thresholds())
        if not self.config.closed_form:
            return codes
        if self.training:
            self._update_scale(x.detach(), codes.detach())
        return codes * self.per_channel(snapshot(self.output_scale).float())

    def gathers(self) -> bool:
        """True for the running scale and the range of a warm-up, which are those of all ranks."""
        return (self.config.closed_form and self.enabled) or self.calibrating

    def _update_scale(self, x: Tensor, codes: Tensor) -> None:
        """Running mean of the scale s that minimises |x - s * codes|^2, per group."""
        rows, coded = self.grouped(x), self.grouped(codes)
        energy = (coded * coded).sum(dim=1, dtype=torch.float64)
        # A quarter of the product: the largest code, 3, times 3e38 would overflow float32.
        product = (rows * (coded / 4)).sum(dim=1, dtype=torch.float64) * 4
        energy = self.over_ranks(energy, torch.distributed.ReduceOp.SUM)
        product = self.over_ranks(product, torch.distributed.ReduceOp.SUM)
        best = (product / energy.clamp_min(1.0)).float().reshape(self.range_shape())
        found = ((energy > 0).reshape(self.range_shape())) & best.isfinite()
        self.output_scale.copy_(torch.where(found, 0.9 * self.output_scale + 0.1 * best, self.output_scale))

    def encode(self, x: Tensor) -> QuantizedTensor:
        """Integer codes; the scale is 1 without `closed_form`."""
        lowest = 0 if self.config.half_range else -1
        codes = apply(RoundedRamps, x, *self.thresholds()).long()
        scale = self.per_channel(self.output_scale.float()) if self.config.closed_form else x.new_ones(1)
        codebook = torch.arange(lowest, lowest + self.levels, device=x.device, dtype=torch.float32).unsqueeze(
            0
        )
        return QuantizedTensor(
            codes=codes.to(torch.int32), scale=scale, numbers=codes - lowest, codebook=codebook, factor=scale
        )

    def set_range(self, value: Tensor) -> None:
        """Spread the ramps evenly over [0, value], or each over [0, value] in full range."""
        widths = value.clamp_min(FLOOR) / (self.ramps if self.config.half_range else 1)
        for i in range(self.ramps):
            getattr(self, f"alpha{i}").copy_(1 / widths)

    def bounds(self) -> tuple[Tensor, Tensor]:
        """The ends of the first and of the last ramp."""
        widths = [1 / getattr(self, f"alpha{i}").detach().abs().clamp_min(FLOOR) for i in range(self.ramps)]
        if self.config.half_range:
            return torch.zeros_like(widths[0]), torch.stack(widths).sum(dim=0)
        return -widths[0], widths[1]

    def current_range(self) -> Tensor:
        """The end of the last ramp."""
        slopes, shifts, _ = self.thresholds()
        return (
            (shifts[-1] + 1 / slopes[-1])
            .detach()
            .reshape(-1)[:: self._channels_per_group()]
            .reshape(self.range_shape())
        )

    def _channels_per_group(self) -> int:
        return 1 if self.groups in (1, self.site.channels) else self.site.channels // self.groups

    def initialise_from(self, x: Tensor) -> None:
        """Ramps over twice the mean |x| per level."""
        with torch.no_grad():
            rows = self.grouped(self.normalise(x.float()))
            mean = self.mean_over_ranks(mean_magnitude(rows, 1)).reshape(self.range_shape())
            width = 2 * mean * (self.ramps if self.config.half_range else 1) ** 0.5
            self.set_range(torch.where(mean > 0, width, self.current_range()))


@register("fatnn", "fm", "ot")
class FATNNActivation(_FATNN):
    """Half range: sum over i of round(clamp((x - sum_{j<i} 1/a_j) * a_i, 0, 1)), values 0 .. levels - 1.

    Full range is ternary: round(clamp(x * a_0, -1, 0)) + round(clamp(x * a_1, 0, 1)).

    State:
        clip_val: float32, `range_shape`; the boundary that the slopes started from (buffer, kept for
            published checkpoints, which hold it).
    """

    def __init__(self, config: QuantizerConfig, site: LayerSite) -> None:
        _check_ternary(config)
        super().__init__(config, site)
        self.register_buffer("clip_val", torch.full(self.range_shape(), config.boundary))

    def zero_to_zero(self) -> bool:
        """See `Quantizer`."""
        return self.config.adaptive == "none"

    @property
    def initial_slope(self) -> float:
        """`scale` / `boundary`."""
        return self.config.scale / self.config.boundary


@register("fatnn", "wt")
class FATNNWeight(_FATNN):
    """Ternary: round(clamp(w * a_0, -1, 0)) + round(clamp(w * a_1, 0, 1))."""

    pure: ClassVar[bool] = True

    def __init__(self, config: QuantizerConfig, site: LayerSite) -> None:
        _check_ternary(config)
        super().__init__(config, site)

    @property
    def initial_slope(self) -> float:
        """`scale`."""
        return self.config.scale


def _check_ternary(config: QuantizerConfig) -> None:
    if config.tag == "wt" and config.half_range:
        raise UserError("--wt_half_range: FATNN's weights are ternary, -1, 0 and 1; leave it out")
    if not config.half_range and config.levels != 3:
        others = {  # `fm` may be symmetric without the option, where its input goes below zero
            "fm": " or, where it is written, leave --fm_half_range out",
            "ot": " or --ot_half_range for levels from zero",
        }
        raise UserError(
            f"--{config.tag}_level {config.levels}: FATNN's values below and above zero are ternary; "
            f"give --{config.tag}_level 3{others.get(config.tag, '')}"
        )
