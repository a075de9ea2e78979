"""The quantizers' formulas once more, in NumPy and float64: what the tests compare the modules with.

Written from the papers' formulas, one pure function per method. Each takes the tensor `x`, the
arriving gradient `gy` (the shape of x) and the learned values as vectors [g], one entry per group,
and returns a `Result`. Nothing here is shared with the modules under test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Result:
    """What a quantizer should give.

    Attributes:
        y: output, the shape of x.
        gx: gradient to x.
        grads: gradient to each learned value, [g].
        distance: how far each element is from the nearest jump of the output or of a gradient, in
            units of the clip value (of the largest magnitude where there is none).
    """

    y: Array
    gx: Array
    grads: dict[str, Array] = field(default_factory=dict)
    distance: Array = field(default_factory=lambda: np.zeros(0))


@dataclass(frozen=True)
class Groups:
    """`count` groups of neighbouring channels, the channels being dimension `axis` of the tensor."""

    count: int = 1
    axis: int = 0

    def spread(self, value: Array, x: Array) -> Array:
        """A vector [g] as a tensor that broadcasts against x."""
        shape = [1] * x.ndim
        shape[self.axis] = x.shape[self.axis]
        return np.repeat(value, x.shape[self.axis] // self.count).reshape(shape)

    def rows(self, x: Array) -> Array:
        """The elements of each group: [g, elements]."""
        return np.moveaxis(x, self.axis, 0).reshape(self.count, -1)

    def sum(self, x: Array) -> Array:
        """The sum over each group: [g]."""
        return self.rows(x).sum(axis=1)


ONE = Groups()


def to_nearest(x: Array, thresholds: Array) -> Array:
    """Distance of each x to the nearest threshold; `thresholds` [..., T] broadcasts against x[..., None]."""
    return np.abs(x[..., None] - thresholds).min(axis=-1)


# Uniform methods ---------------------------------------------------------------------------------


def uniform_round(x: Array, clip: Array, levels: int, half_range: bool) -> Array:
    """The nearest of `levels` evenly spaced levels in [0, c] or [-c, c]; ties to the even level number."""
    n = levels - 1
    if half_range:
        return clip * np.round(n * np.clip(x / clip, 0, 1)) / n
    return clip * (2 * np.round(n * (np.clip(x / clip, -1, 1) + 1) / 2) / n - 1)


def uniform_levels(levels: int, half_range: bool) -> Array:
    """The levels for a clip value of 1."""
    return np.linspace(0.0 if half_range else -1.0, 1.0, levels)


def uniform_jumps(levels: int, half_range: bool) -> Array:
    """The places where the output or a gradient jumps, for a clip value of 1."""
    grid = uniform_levels(levels, half_range)
    return np.concatenate([(grid[1:] + grid[:-1]) / 2, grid[[0, -1]]])


def balance(inside: Bools) -> float:
    """`STE-scale`: sqrt(elements / elements inside), at least one counted."""
    return float(np.sqrt(inside.size / max(int(inside.sum()), 1)))


def dorefa_activation(
    x: Array, gy: Array, *, clip: float, levels: int, half_range: bool, ste_scale: bool = False
) -> Result:
    """Clamp to the range, round; straight-through inside the range."""
    low = 0.0 if half_range else -clip
    inside = (x >= low) & (x <= clip)
    gx = gy * inside * (balance(inside) if ste_scale else 1.0)
    distance = to_nearest(x / clip, uniform_jumps(levels, half_range))
    return Result(uniform_round(x, np.full(1, clip), levels, half_range), gx, {}, distance)


def tanh_normalised(w: Array) -> Array:
    """tanh(w) / max|tanh(w)|, what DoReFa-Net rounds."""
    t = np.tanh(w)
    return t / np.abs(t).max()


def tanh_normalised_gradient(w: Array, gy: Array) -> Array:
    """The exact gradient of `tanh_normalised`; the largest |w| must be unique."""
    t = np.tanh(w)
    largest = np.unravel_index(np.abs(t).argmax(), t.shape)
    m = abs(t[largest])
    gt = gy / m
    gt[largest] -= np.sign(t[largest]) * (gy * t).sum() / m**2
    return gt * (1 - t**2)


def dorefa_weight(w: Array, gy: Array, *, levels: int) -> Result:
    """2 * round(n * u) / n - 1 with u = tanh(w) / (2 max|tanh(w)|) + 1/2; straight-through rounding alone."""
    n = levels - 1
    t = tanh_normalised(w)
    y = 2 * np.round(n * (t / 2 + 0.5)) / n - 1
    grid = uniform_levels(levels, half_range=False)
    return Result(y, tanh_normalised_gradient(w, gy), {}, to_nearest(t, (grid[1:] + grid[:-1]) / 2))


def binary_weight(w: Array, gy: Array) -> Result:
    """DoReFa-Net's one-bit weight: sign(w) * mean|w| over the tensor, straight-through."""
    return Result(sign(w) * np.abs(w).mean(), gy.copy(), {}, np.abs(w) / np.abs(w).max())


def pact(
    x: Array, gy: Array, *, clip_val: Array, levels: int, half_range: bool,
    groups: Groups = ONE, factor: float = 1.0, ste_scale: bool = False,
) -> Result:  # fmt: skip
    """DoReFa-Net's activation with c = |clip_val|, whose gradient is that of the elements at or above c."""
    c = groups.spread(np.abs(clip_val), x)
    low = np.zeros_like(c) if half_range else -c
    inside = (x >= low) & (x < c)
    gx = gy * inside * (balance(inside) if ste_scale else 1.0)
    grad = groups.sum(gy * (x >= c)) * sign(clip_val) * factor
    distance = to_nearest(x / c, uniform_jumps(levels, half_range))
    return Result(uniform_round(x, c, levels, half_range), gx, {"clip_val": grad}, distance)


def lsq(
    x: Array, gy: Array, *, clip_val: Array, levels: int, half_range: bool,
    groups: Groups = ONE, factor: float = 1.0,
) -> Result:  # fmt: skip
    """Learned clip value c = |clip_val| over evenly spaced levels, straight-through rounding.

    y = c * g(x / c): dy/dx = 1 inside, dy/dc = g(x / c) - x / c inside, the end level outside.
    """
    c = groups.spread(np.abs(clip_val), x)
    low = 0.0 if half_range else -1.0
    ratio = x / c
    inside = (ratio >= low) & (ratio <= 1)
    y = uniform_round(x, c, levels, half_range)
    slope = np.where(inside, y / c - ratio, np.where(ratio > 1, 1.0, low))
    grad = groups.sum(gy * slope) * sign(clip_val) * factor
    return Result(y, gy * inside, {"clip_val": grad}, to_nearest(ratio, uniform_jumps(levels, half_range)))


def lsq_midtread(
    x: Array, gy: Array, *, clip_val: Array, levels: int, groups: Groups = ONE, factor: float = 1.0
) -> Result:
    """The paper's grid: integers -L/2 .. L/2 - 1 (odd L: -(L-1)/2 .. (L-1)/2) times the step c / highest.

    The gradient of the step s is round(x/s) - x/s inside and the end integer outside (equation 3);
    ds/dc = 1 / highest.
    """
    lowest, highest = -(levels // 2), (levels - 1) // 2
    step = groups.spread(np.abs(clip_val) / highest, x)
    ratio = x / step
    inside = (ratio >= lowest) & (ratio <= highest)
    code = np.clip(np.round(ratio), lowest, highest)
    slope = np.where(inside, code - ratio, code)
    grad = groups.sum(gy * slope) / highest * sign(clip_val) * factor
    jumps = np.concatenate([np.arange(lowest, highest) + 0.5, [lowest, highest]])
    return Result(code * step, gy * inside, {"clip_val": grad}, to_nearest(ratio, jumps) / highest)


def lsqplus(
    x: Array,
    gy: Array,
    *,
    clip_val: Array,
    offset: Array,
    levels: int,
    groups: Groups = ONE,
    factor: float = 1.0,
) -> Result:
    """Integers 0 .. n times the step s = |clip_val| / n, above the offset b (paper, equations 3 to 5).

    The gradient of s is k - (x - b) / s inside for the integer k, 0 below, n above; that of b is 0 inside, 1 outside.
    """
    n = levels - 1
    step, b = groups.spread(np.abs(clip_val) / n, x), groups.spread(offset, x)
    position = (x - b) / step
    inside = (position >= 0) & (position <= n)
    code = np.round(np.clip(position, 0, n))
    slope = np.where(inside, code - position, code)
    grads = {
        "clip_val": groups.sum(gy * slope) / n * sign(clip_val) * factor,
        "offset": groups.sum(gy * ~inside) * factor,
    }
    jumps = np.concatenate([np.arange(n) + 0.5, [0, n]])
    return Result(code * step + b, gy * inside, grads, to_nearest(position, jumps) / n)


def ewgs(
    x: Array, gy: Array, *, clip_val: Array, levels: int, half_range: bool, delta: float,
    groups: Groups = ONE, factor: float = 1.0,
) -> Result:  # fmt: skip
    """The levels of `lsq`; a gradient g through the rounding becomes g * (1 + delta * sign(g) * (x_n - x_q)).

    With x_n = clamp((x - low) / width, 0, 1), x_q = round(n x_n) / n and y = low + width * x_q, where low and width are
    multiples of c (paper, equations 1, 2 and 4), the chain rule gives the gradients to x and c.
    """
    c = groups.spread(np.abs(clip_val), x)
    low, width = (0.0, 1.0) if half_range else (-1.0, 2.0)
    n = levels - 1
    position = (x / c - low) / width
    x_n = np.clip(position, 0, 1)
    x_q = np.round(n * x_n) / n
    inside = (position >= 0) & (position <= 1)
    g_q = gy * width * c
    g_n = g_q * (1 + delta * np.sign(g_q) * (x_n - x_q)) * inside
    direct, through = gy * (low + width * x_q), g_n * -(x / c) / (width * c)
    grad = groups.sum(direct + through) * sign(clip_val) * factor
    distance = to_nearest(x / c, uniform_jumps(levels, half_range))
    return Result(c * (low + width * x_q), g_n / (width * c), {"clip_val": grad}, distance)


def stableqat(
    x: Array, gy: Array, *, clip_val: Array, levels: int, half_range: bool, groups: Groups = ONE,
    factor: float = 1.0,
) -> Result:  # fmt: skip
    """`lsq` whose gradient to x is multiplied by the slope of a smooth staircase.

    The staircase y(u) is where v = (y - u) / sqrt(2) is -A sin(sqrt(2) pi w), w = (u + y) / sqrt(2). Its slope is
    (1 + v') / (1 - v') with v' = dv/dw = -A sqrt(2) pi cos(pi (u + y)), taken at the staircase of rounding: u is x in
    steps and y its level, both from a level (paper, equations of sections 3.1 and 3.2 with A = 0.21).
    """
    found = lsq(x, gy, clip_val=clip_val, levels=levels, half_range=half_range, groups=groups, factor=factor)
    step = groups.spread(np.abs(clip_val), x) * (1 if half_range else 2) / (levels - 1)
    turned = np.cos(
        np.pi * (x - found.y) / step
    )  # cos(pi (u + y)) = cos(pi (u - y)), since 2 pi y is whole turns
    change = -0.21 * np.sqrt(2) * np.pi * turned
    return replace(found, gx=found.gx * (1 + change) / (1 - change))


# Binary methods ----------------------------------------------------------------------------------


def sign(x: Array) -> Array:
    """+1 at and above zero, -1 below."""
    return np.where(x < 0, -1.0, 1.0)


@dataclass(frozen=True)
class Mask:
    """`none`: ones; up to the width w `STE`: one, `Triangle`: 2 - 2|x| / w (Bi-Real Net's with w = 1)."""

    kind: str = "none"
    width: float = 1.0

    def __call__(self, x: Array) -> Array:
        """The factor on the gradient of each x."""
        inside = (np.abs(x) < self.width).astype(np.float64)
        falling = (2 - 2 * np.abs(x) / self.width) * inside
        return {"none": np.ones_like(x), "STE": inside, "Triangle": falling}[self.kind]

    def distance(self, x: Array) -> Array:
        """How far each x is from where the sign or the mask jumps."""
        return to_nearest(x, np.array([-self.width, 0.0, self.width]))


def xnor_activation(x: Array, gy: Array, *, mask: Mask, custom: str = "none") -> Result:
    """sign(x), times the mean |x| over channels (`channel`) or over positions (`resolution`).

    The gradient is the mask alone: neither through the mean nor multiplied by it.
    """
    axes = {"none": None, "channel": (1,), "resolution": (2, 3)}[custom]
    scale = np.ones(1) if axes is None else np.abs(x).mean(axis=axes, keepdims=True)
    return Result(sign(x) * scale, gy * mask(x), {}, mask.distance(x))


def rsign(x: Array, gy: Array, *, threshold: Array, mask: Mask, groups: Groups = ONE) -> Result:
    """sign(x - threshold) (ReActNet); the thresholds' gradients are minus the sums of x's."""
    shifted = x - groups.spread(threshold, x)
    gx = gy * mask(shifted)
    return Result(sign(shifted), gx, {"threshold": -groups.sum(gx)}, mask.distance(shifted))


def xnor_weight(w: Array, gy: Array, *, mask: Mask, groups: Groups = ONE) -> Result:
    """sign(w) times the mean |w| of its group; the gradient is the mask alone."""
    scale = groups.spread(np.abs(groups.rows(w)).mean(axis=1), w)
    return Result(sign(w) * scale, gy * mask(w), {}, mask.distance(w))


# The frame ---------------------------------------------------------------------------------------


def gradient_factor(kind: str, scale: float, *, fan: int, elements: float) -> float:
    """`xx_grad_scale`: the factor on the gradient of the learned clip value."""
    return {
        "none": 1.0,
        "fan-scale": np.sqrt(fan) * scale,
        "scale-fan": scale / np.sqrt(fan),
        "element-scale": np.sqrt(elements) * scale,
        "scale-element": scale / np.sqrt(elements),
    }[kind]


def statistics(
    x: Array, kind: str, *, weight: bool, groups: Groups = ONE, epsilon: float = 0.0
) -> tuple[Array, Array]:
    """What is subtracted and what is divided by, per weight group or per sample.

    Both `mean` and `var`: the mean and the unbiased deviation; one of them alone is a divisor.
    `epsilon` is added to the divisor.
    """
    rows = groups.rows(x) if weight else x.reshape(len(x), -1)
    mean, deviation = rows.mean(axis=1), rows.std(axis=1, ddof=1)
    nothing = np.zeros_like(mean)
    offset, divisor = {
        "mean": (nothing, mean),
        "var": (nothing, deviation),
        "mean-var": (mean, deviation),
        "var-mean": (mean, deviation),
    }[kind]
    over = groups if weight else Groups(len(x), 0)
    return over.spread(offset, x), over.spread(divisor + epsilon, x)


def adaptive(
    method: Callable[[Array, Array], Result],
    x: Array, gy: Array, kind: str, *,
    weight: bool, restore: bool, groups: Groups = ONE, epsilon: float = 0.0,
) -> Result:  # fmt: skip
    """`method` on the normalised tensor; the statistics carry no gradient."""
    mean, deviation = statistics(x, kind, weight=weight, groups=groups, epsilon=epsilon)
    inner = method((x - mean) / deviation, gy * deviation if restore else gy)
    y = inner.y * deviation + mean if restore else inner.y
    return replace(inner, y=y, gx=inner.gx / deviation)


def scaled(
    method: Callable[[Array, Array], Result], x: Array, gy: Array, *, gamma: Array, groups: Groups = ONE
) -> Result:
    """`method`, then times a learned `gamma` per group."""
    factor = groups.spread(gamma, x)
    inner = method(x, gy * factor)
    return replace(inner, y=inner.y * factor, grads=inner.grads | {"gamma": groups.sum(gy * inner.y)})
