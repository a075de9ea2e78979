"""Evenly spaced levels up to a clip value: the grid, and rounding to it with straight-through gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from model.quantizers.integers import QuantizedTensor


@dataclass(frozen=True)
class Grid:
    """Evenly spaced levels up to a clip value c, as integer codes with the scale c / top.

    Half range: codes 0 .. n for levels in [0, c], n = levels - 1. Full range: levels in [-c, c]; with an
    even count they lie mid-rise and their codes are the odd integers -n .. n, with an odd count the
    integers -n / 2 .. n / 2. Mid-tread: the codes -levels / 2 .. levels / 2 - 1 of two's complement, with a level
    at zero and one more level below it than above.

    Attributes:
        steps: n, distances between the lowest and the highest level.
        bottom: lowest code.
        top: highest code.
        half_range: levels in [0, c].
        midtread: a full range with a level at zero and an even count.

    Example:
        >>> import torch
        >>> from model.quant import Grid
        >>> for grid in (Grid.of(4, True), Grid.of(4, False), Grid.of(4, False, midtread=True)):
        ...     print(range(grid.bottom, grid.top + 1, grid.gap), grid.ratios(torch.arange(4.0)))
        range(0, 4) tensor([0.0000, 0.3333, 0.6667, 1.0000])
        range(-3, 4, 2) tensor([-1.0000, -0.3333,  0.3333,  1.0000])
        range(-2, 2) tensor([-2., -1.,  0.,  1.])
        >>> Grid.of(4, True).numbers(torch.tensor([-1.0, 0.4, 2.0]))
        tensor([0., 1., 3.])
    """

    steps: int
    bottom: int
    top: int
    half_range: bool
    midtread: bool

    @classmethod
    def of(cls, levels: int, half_range: bool, *, midtread: bool = False) -> Grid:
        """The grid of `levels` levels in [0, c] (half range) or [-c, c] (full range)."""
        steps = levels - 1
        if half_range:
            return cls(steps, 0, steps, True, False)
        if midtread:
            return cls(steps, -(levels // 2), steps - levels // 2, False, True)
        top = steps if steps % 2 else steps // 2
        return cls(steps, -top, top, False, False)

    @property
    def gap(self) -> int:
        """Distance between neighbouring codes."""
        return (self.top - self.bottom) // self.steps

    @property
    def qp(self) -> float:
        """The highest level in steps, Qp of the LSQ paper; a half-integer on a mid-rise grid."""
        return self.top / self.gap

    def numbers(self, ratio: Tensor) -> Tensor:
        """The levels nearest to `ratio` = x / c, counted from the lowest, as float32 of any shape.

        Ties go to the even number, on a mid-tread grid to the even code. The arithmetic here and in `ratios` follows
        the formulas of the papers step by step. Values on a threshold, such as those near zero on a mid-rise grid,
        therefore go to the same side as in published code.
        """
        if self.midtread:
            return (ratio * self.top).clamp_(self.bottom, self.top).round_().sub_(self.bottom)
        return self._rounded_(ratio.clamp(0 if self.half_range else -1, 1))

    def numbers_(self, ratio: Tensor) -> Tensor:
        """`numbers`, computed in place. Factors of two are taken together, which changes no bit."""
        if self.midtread:
            return times_(ratio, self.top).clamp_(self.bottom, self.top).round_().sub_(self.bottom)
        return self._rounded_(ratio.clamp_(0 if self.half_range else -1, 1))

    def _rounded_(self, clamped: Tensor) -> Tensor:
        if self.half_range:
            return times_(clamped, self.steps).round_()
        return times_(clamped.add_(1), self.steps / 2).round_()

    def ratios(self, numbers: Tensor) -> Tensor:
        """The levels by their numbers, divided by c, float32; computed in place."""
        if self.half_range:
            return over_(numbers, self.steps)
        if self.midtread:
            return over_(numbers.add_(self.bottom), self.top)
        return over_(numbers, self.steps / 2).sub_(1)

    def nearest(self, x: Tensor, clip: Tensor) -> Tensor:
        """The levels nearest to `x`, as a new tensor; float32, the shape of x, to which the clip value broadcasts."""
        if known(clip, x) and clip.item() == 1:  # by which nothing needs to be divided or multiplied
            return self.ratios(self.numbers(x))
        return self.ratios(self.numbers_(x / clip)).mul_(clip)

    def bounded(self, x: Tensor, clip: Tensor) -> tuple[Tensor, float, float]:
        """A tensor to compare with the ends of the range, and these: x / c, or x where c is known to Python."""
        if self.midtread or not known(clip, x):
            low = self.bottom / self.top
            return x / clip, (low * SPLIT) - (low * SPLIT - low), 1.0
        top = clip.item()
        return x, 0.0 if self.half_range else -top, top


def times_(x: Tensor, factor: float) -> Tensor:
    """`x` times a number, in place; a pass over memory less where it is 1."""
    return x if factor == 1 else x.mul_(factor)


def over_(x: Tensor, divisor: float) -> Tensor:
    """`x` over a number, in place; see `times_`."""
    return x if divisor == 1 else x.div_(divisor)


def known(value: Tensor, x: Tensor) -> bool:
    """Whether `value`, to compare `x` with, is one number that Python can read without waiting for it.

    It is on a CPU. Torch's fake tensors have no values, and a compiled graph computes with tensors.
    """
    plain = type(x) in (Tensor, nn.Parameter) and x.device.type == "cpu" and value.numel() == 1
    return plain and not torch.compiler.is_compiling()


class ClipSTE(torch.autograd.Function):
    """q = l * c, where l is the level nearest to r = x / c in units of c, with a gradient to the clip value c.

    Straight-through rounding gives
    dq/dx = 1 inside the range, 0 outside; dq/dc = l - r inside, l outside
    (Esser et al., "Learned Step Size Quantization", arXiv 1902.08153, equations 1 to 3, times Qp).

    Args:
        x: float32, any shape.
        clip: float32, positive, broadcastable to x.
        grid: the levels.
        balance: multiply the gradient of x by sqrt(elements / elements inside) (`STE-scale`).
        keep: keep the result for the gradient to c instead of computing it again; then nothing may change it in place.

    Returns:
        float32, the shape of x.

    Example:
        >>> import torch
        >>> from model.quant import ClipSTE, Grid
        >>> x = torch.tensor([-0.5, 0.4, 5.0], requires_grad=True)
        >>> clip = torch.tensor([1.5], requires_grad=True)
        >>> q = ClipSTE.apply(x, clip, Grid.of(4, half_range=True))
        >>> q.detach()
        tensor([0.0000, 0.5000, 1.5000])
        >>> q.sum().backward()
        >>> x.grad, clip.grad  # to the clip value: 0 below the range, 1/3 - 0.4/1.5 inside, 1 above
        (tensor([0., 1., 0.]), tensor([1.0667]))
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, clip: Tensor, grid: Grid, balance: bool = False, keep: bool = False
    ) -> Tensor:
        result = grid.nearest(x, clip)
        ctx.save_for_backward(x, clip, *([result] if keep else []))
        ctx.grid, ctx.balance = grid, balance
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, clip, *kept = ctx.saved_tensors
        grid: Grid = ctx.grid
        measured, low, high = grid.bounded(x, clip)
        passed = between(grad, measured, low, next_up(high))
        grad_clip = None
        if ctx.needs_input_grad[1]:
            result = kept[0] if kept else grid.nearest(x, clip)
            # The sum of grad * (q - x) inside and of grad * q outside, over c.
            if measured is x:
                grad_clip = (grad * result).addcmul_(passed, x, value=-1).sum_to_size(clip.shape) / clip
            if grad_clip is None or not grad_clip.isfinite():  # 0 * inf
                ratio = (x / clip).clamp(grid.bottom / grid.top, 1)
                grad_clip = (result / clip).mul_(grad).addcmul_(passed, ratio, value=-1)
                grad_clip = grad_clip.sum_to_size(clip.shape)
        if ctx.balance:
            passed = passed * balance_factor(between(torch.ones_like(grad), measured, low, next_up(high)))
        return passed, grad_clip, None, None, None


def slope_parts(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What gradients with another slope within a level than `ClipSTE`'s are made of, from what that has saved.

    Returns:
        The clip value c; the gradient inside the range, 0 outside; the levels, and x within the range, both over c.
    """
    x, clip, *kept = ctx.saved_tensors
    grid: Grid = ctx.grid
    measured, low, high = grid.bounded(x, clip)
    passed = between(grad, measured, low, next_up(high))
    level = (kept[0] if kept else grid.nearest(x, clip)) / clip
    return clip, passed, level, (x / clip).clamp_(grid.bottom / grid.top, 1)


# v * SPLIT - (v * SPLIT - v) is v rounded to float32, in arithmetic that a compiler can trace.
SPLIT = 2.0**29 + 1


def next_up(value: float) -> float:
    """A number that rounds to the float32 behind `value`, a float32 that is neither huge nor subnormal."""
    if value == 0:
        return 2.0**-149
    return value * (1 + 1.01 * 2.0**-24 if value > 0 else 1 - 0.6 * 2.0**-23)


def between(grad: Tensor, x: Tensor, low: float, high: float) -> Tensor:
    """`grad` where low <= x < high, 0 elsewhere, float32: one pass, of a fraction of the time of `where` on a CPU."""
    return inside(grad, x, -next_up(-low), high)


def inside(grad: Tensor, x: Tensor, low: float, high: float) -> Tensor:
    """`grad` where low < x < high or x is NaN, 0 elsewhere, float32 of any shape."""
    if torch.compiler.is_compiling():  # of that operator the compiler expects another layout than it returns
        return torch.where((x <= low) | (x >= high), 0.0, grad)
    return torch.ops.aten.hardtanh_backward(grad, x, low, high)


def initial_clip(mean: Tensor, grid: Grid) -> Tensor:
    """The clip value of LSQ's initial step 2 * mean|x| / sqrt(Qp) (arXiv 1902.08153, section 2.1).

    Args:
        mean: mean|x| of each group, float32.
        grid: the levels; Qp is the highest one in steps.

    Returns:
        float32, the shape of `mean`, finite.
    """
    factor = 2 * grid.qp / max(grid.qp, 1.0) ** 0.5
    return (mean * factor).clamp_max(torch.finfo(torch.float32).max)


def balance_factor(inside: Tensor) -> Tensor:
    """sqrt(elements / elements inside), the factor of `STE-scale`, from ones inside; at least one element counts."""
    return (inside.numel() / inside.sum(dtype=torch.float64).clamp_min(1).float()).sqrt()


def encode_on_grid(x: Tensor, clip: Tensor, grid: Grid) -> QuantizedTensor:
    """The integer codes of `x` on a grid, and their scale.

    Args:
        x: float32, any shape.
        clip: the clip value, float32, positive, broadcastable to x.
        grid: the levels.

    Returns:
        Codes int32 of the shape of x; dequantized they equal `ClipSTE.apply(x, clip, grid)`.

    Example:
        >>> import torch
        >>> from model.quant import ClipSTE, Grid, encode_on_grid
        >>> x, clip, grid = torch.tensor([-0.9, 0.1, 2.0]), torch.tensor([0.6]), Grid.of(4, half_range=False)
        >>> found = encode_on_grid(x, clip, grid)
        >>> found.codes, found.scale  # two bits in [-0.6, 0.6]
        (tensor([-3,  1,  3], dtype=torch.int32), tensor([0.2000]))
        >>> torch.equal(found.dequantize(), ClipSTE.apply(x, clip, grid))
        True
    """
    return encode_numbers(grid.numbers(x / clip), clip, grid)


def encode_numbers(numbers: Tensor, clip: Tensor, grid: Grid) -> QuantizedTensor:
    """The integer codes of levels by their numbers, and their scale.

    Args:
        numbers: counted from the lowest level, float32 or integers of any shape.
        clip: see `encode_on_grid`.
        grid: the levels.

    Example:
        >>> import torch
        >>> from model.quantizers.grid import Grid, encode_numbers
        >>> encode_numbers(torch.tensor([0.0, 3.0]), torch.tensor([0.6]), Grid.of(4, half_range=False)).codes
        tensor([-3,  3], dtype=torch.int32)
    """
    numbers = numbers.long()
    return QuantizedTensor(
        codes=(numbers * grid.gap + grid.bottom).to(torch.int32),
        scale=(clip / grid.top).detach(),
        numbers=numbers,
        codebook=grid.ratios(torch.arange(grid.steps + 1.0, device=numbers.device)).unsqueeze(0),
        factor=clip.detach(),
    )


class ScaleGradient(torch.autograd.Function):
    """The identity whose gradient is multiplied by a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


FLOOR = 1e-6  # smallest clip value; not an attribute of the Function, which Dynamo cannot trace


class PositiveClip(torch.autograd.Function):
    """max(|c|, floor) whose gradient is sign(c) everywhere, with sign(0) = +1.

    The floor keeps x / c finite; passing the gradient below the floor lets a clip value that has
    reached zero, or crossed it, grow again.
    """

    @staticmethod
    def forward(ctx: Any, clip: Tensor, floor: float = FLOOR) -> Tensor:
        if ctx.needs_input_grad[0]:  # not the parameter, which a warm-up may change before the backward pass
            ctx.save_for_backward(clip < 0)
        return clip.float().abs().clamp_min(floor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (negative,) = ctx.saved_tensors
        return torch.where(negative, -grad, grad), None
