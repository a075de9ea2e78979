"""LSQ+: a learned clip value and a learned offset of activations (arXiv 2004.09576)."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from model.quantizers import adaptive
from model.quantizers.gradient import apply
from model.quantizers.grid import FLOOR, Grid, ScaleGradient, between, encode_on_grid, next_up
from model.quantizers.integers import QuantizedTensor
from model.quantizers.learned_range import LearnedRange
from model.quantizers.lsq import LSQ
from model.quantizers.registry import register
from model.quantizers.site import LayerSite
from utils.config.schema import QuantizerConfig

FRACTIONS = 10  # of the lowest and of the highest value, of which all pairs are tried
ROUNDS = 20  # of codes and least squares behind the best pair
ELEMENTS = 2**17  # of a tensor that are read for that, about
LARGEST = torch.finfo(torch.float32).max


class ClipOffset(torch.autograd.Function):
    """q = l * c + b, where l is the level nearest to r = (x - b) / c in units of c.

    Straight-through rounding gives dq/dx = 1 inside the range, 0 outside; dq/dc = l - r inside, l outside; dq/db = 0
    inside, 1 outside (paper, equations 4 and 5, with c = n * s for the step s).

    Args:
        x: float32, any shape.
        clip: c, float32, positive, broadcastable to x.
        offset: b, float32, broadcastable to x.
        grid: the levels in units of c.

    Returns:
        float32, the shape of x.

    Example:
        >>> import torch
        >>> from model.quant import Grid
        >>> from model.quantizers.lsqplus import ClipOffset
        >>> x, offset = torch.tensor([-9.0, -0.4, 0.4, 9.0]), torch.tensor([-0.5], requires_grad=True)
        >>> q = ClipOffset.apply(x, torch.tensor([1.5]), offset, Grid.of(4, half_range=True))
        >>> q.detach()
        tensor([-0.5000, -0.5000,  0.5000,  1.0000])
        >>> q.sum().backward()
        >>> offset.grad  # 1 from each of the two outside
        tensor([2.])
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, clip: Tensor, offset: Tensor, grid: Grid) -> Tensor:
        ctx.save_for_backward(x, clip, offset)
        ctx.grid = grid
        return grid.nearest(x - offset, clip) + offset

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, clip, offset = ctx.saved_tensors
        grid: Grid = ctx.grid
        ratio = (x - offset) / clip
        passed = between(grad, ratio, 0.0, next_up(1.0))
        level = grid.ratios(grid.numbers(ratio))
        grad_clip = level.mul_(grad).addcmul_(passed, ratio.clamp(0, 1), value=-1).sum_to_size(clip.shape)
        return passed, grad_clip, (grad - passed).sum_to_size(offset.shape), None


@register("lsqplus", "fm", "ot")
class LSQPlusActivation(LearnedRange):
    """c * round(n * clamp((x - b) / c, 0, 1)) / n + b with learned c = |clip_val| and b = offset, n = levels - 1.

    The range is [b, b + c]: it starts as [0, boundary] with a half range, as [-boundary, boundary] with a full one.

    State:
        clip_val: float32, `range_shape`; the width of the range.
        offset: float32, `range_shape`; its lowest level.
    """

    def __init__(self, config: QuantizerConfig, site: LayerSite) -> None:
        super().__init__(config, site)
        self.offset = nn.Parameter(torch.zeros(self.range_shape()))
        with torch.no_grad():
            self.set_range(torch.full(self.range_shape(), config.boundary))

    def zero_to_zero(self) -> bool:
        """See `Quantizer`: zero is a level by chance only."""
        return False

    def half_range_changes(self) -> bool:
        """See `Quantizer`: it says where the range starts, no more."""
        return False

    def grid(self) -> Grid:
        """The levels above the offset."""
        return Grid.of(self.levels, True)

    def search_grid(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """See `Quantizer`: no search for a clip value alone."""

    def shift(self, x: Tensor) -> Tensor:
        """The offset, broadcastable to x; its gradient has the factor that a step of the levels would have."""
        # A copy, since a warm-up may change the parameter before the backward pass.
        offset = self.per_channel(self.offset.float().clone())
        if self.config.grad_scale == "none":
            return offset
        qp = self.grid().qp
        return apply(
            ScaleGradient,
            offset,
            self.gradient_factor(x, qp) / (qp**2 if self.config.grad_scale == "paper" else 1),
        )

    def quantize(self, x: Tensor) -> Tensor:
        """Float32 of any shape to the nearest level."""
        return apply(ClipOffset, x, self.clip(x), self.shift(x), self.grid())

    def encode(self, x: Tensor) -> QuantizedTensor:
        """Codes 0 .. n, their scale c / n and the offset."""
        offset = self.shift(x).detach()
        return dataclasses.replace(encode_on_grid(x - offset, self.clip(x), self.grid()), offset=offset)

    def range_error(self, x: Tensor) -> Tensor | None:
        """See `Quantizer`; None for normalised values."""
        return None if self.config.adaptive != "none" else (self.quantize(x) - x).square().sum()

    def set_range(self, value: Tensor) -> None:
        """Take [0, value] or [-value, value] as the range."""
        half = self.config.half_range
        self.clip_val.copy_(value if half else value.clamp_max(LARGEST / 2) * 2)
        self.offset.copy_(torch.zeros_like(value) if half else -value.clamp_max(LARGEST / 2))

    def rescale(self, levels: int) -> tuple[nn.Parameter, ...]:
        """Keep the step and, of the range, zero or the end that is nearest to it, around which the range changes."""
        ratio = (levels - 1) / (self.levels - 1)
        self.levels = levels
        with torch.no_grad():
            low, high = self.bounds()
            fixed = torch.zeros_like(low).clamp(low, high)
            self.offset.copy_(fixed + (low - fixed) * ratio)
            self.clip_val.mul_(ratio)
        return (self.clip_val, self.offset)

    def of_another_method(self, held: Collection[str]) -> bool:
        """See `Quantizer`: a clip value without an offset is that of LSQ or PACT."""
        return "clip_val" in held and "offset" not in held

    def adapted(self, entries: dict[str, Tensor]) -> dict[str, Tensor]:
        """Also take the range of a method without an offset, [0, c] or [-c, c]."""
        entries = super().adapted(entries)
        if not self.of_another_method(entries):
            return entries
        clip = entries["clip_val"].abs()
        if self.config.half_range:
            return entries | {"offset": torch.zeros_like(clip)}
        return entries | {"clip_val": 2 * clip, "offset": -clip}

    def bounds(self) -> tuple[Tensor, Tensor]:
        """The lowest and the highest level."""
        offset = self.offset.detach()
        return offset, offset + self.clip_val.detach().abs()

    def current_range(self) -> Tensor:
        """The width of the range in units of `set_range`."""
        return self.clip_val.detach() / (1 if self.config.half_range else 2)

    def initialise_from(self, x: Tensor) -> None:
        """Set clip value and offset to those of the least squared error; a group of zeros keeps its own."""
        with torch.no_grad():
            rows = self.grouped(self.normalise(x.float()))
            low, width, found = (value.reshape(self.range_shape()) for value in self._fitted(rows))
            self.clip_val.copy_(torch.where(found, width, self.clip_val))
            self.offset.copy_(torch.where(found, low, self.offset))

    def _fitted(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Offset, width, and whether there are any, of the least sum of (q(x) - x)^2 for each row [g, n].

        The range of equal values goes from zero to them. Else, of all pairs of ten fractions of the lowest and of the
        highest value the best is taken. Then codes and the least-squares line of the values over their codes take
        turns, in which the error never grows.
        """
        rows = rows[:, :: rows.numel() // ELEMENTS | 1].double()
        top = self.over_ranks(rows.amax(dim=1, keepdim=True), torch.distributed.ReduceOp.MAX)
        bottom = -self.over_ranks((-rows).amax(dim=1, keepdim=True), torch.distributed.ReduceOp.MAX)
        n = self.levels - 1

        def codes(low: Tensor, width: Tensor) -> Tensor:
            return ((rows - low) / width * n).clamp_(0, n).round_()

        low, width = bottom, (top - bottom).clamp_min(FLOOR)
        least = torch.full_like(low, torch.inf)
        for i in range(FRACTIONS * FRACTIONS):
            one = bottom * (1 - i % FRACTIONS / FRACTIONS)
            wide = (top * (1 - i // FRACTIONS / FRACTIONS) - one).clamp_min(FLOOR)
            error = (codes(one, wide) * (wide / n) + one).sub_(rows).square_().sum(dim=1, keepdim=True)
            error = self.over_ranks(error, torch.distributed.ReduceOp.SUM)
            low, width = torch.where(error < least, one, low), torch.where(error < least, wide, width)
            least = torch.minimum(error, least)
        for _ in range(ROUNDS):
            code = codes(low, width)
            sums = torch.stack([torch.ones_like(rows), code, code * code, rows, code * rows]).sum(dim=2)
            count, first, second, values, mixed = self.over_ranks(
                sums, torch.distributed.ReduceOp.SUM
            ).unsqueeze(2)
            spread = count * second - first * first
            step = (count * mixed - first * values) / spread.clamp_min(1)
            fits = (spread > 0.5) & (step > 0)
            width = torch.where(fits, (step * n).clamp_min(FLOOR), width)
            low = torch.where(fits, (values - step * first) / count, low)
        constant = top == bottom
        low, width = torch.where(constant, top.clamp_max(0), low), torch.where(constant, top.abs(), width)
        low, width = low.clamp(-LARGEST / 2, LARGEST / 2), width.clamp_max(LARGEST)
        return low.float(), width.float(), ~constant | (top != 0)


@register("lsqplus", "wt")
class LSQPlusWeight(LSQ):
    """LSQ's weights, whose clip value starts from their mean and deviation.

    State:
        clip_val: float32, `range_shape`; starts at `boundary`.
    """

    pure: ClassVar[bool] = True

    def initialise_from(self, x: Tensor) -> None:
        """Take the step max(|mean - 3 deviation|, |mean + 3 deviation|) * 2 / levels; half of it for a half range."""
        with torch.no_grad():
            mean, deviation = adaptive.moments(self.grouped(self.normalise(x.float())))
            reach = mean.double().abs() + 3 * deviation.double()
            steps = self.levels if self.config.half_range else self.levels / 2
            found = (reach * (self.grid().qp / steps)).clamp_max(LARGEST).float().reshape(self.range_shape())
            self.set_range(torch.where(found > 0, found, self.clip_val))
