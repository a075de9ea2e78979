"""What an engine must know of the quantizers of a trained network: integer codes, scales, tables of levels."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TypeGuard

import numpy as np
import torch
from torch import Tensor

from model.quantizers.frame import Quantizer
from model.quantizers.grid import Grid
from model.quantizers.integers import QuantizedTensor
from utils.errors import UserError

Array = np.ndarray
MOST_COMPARISONS = 31  # of a value with thresholds
NEAR = 0.49  # of a step: what rounds to zero, whatever the rounding errors
NUDGE = 2.0**-20  # of the clip value: less than rounding errors of the sums in front
SMALLEST_SCALE = 2.0**-100  # stands for a scale of zero, by which engines divide


@dataclass(frozen=True, kw_only=True)
class ActivationCodes:
    """The quantizer of a layer's input or output, whose levels are the integers `lowest` .. `highest` times `scale`.

    Where `integer` is False the levels are computed in float in front of the node, which then changes nothing. Where
    there is an offset, the node gets x - shift and gives the levels without it: `model.deploy.offsets` moves both into
    what is beside the node.

    Attributes:
        name: the quantizer's name in the network.
        levels: their number.
        lowest: the lowest code.
        highest: the highest code.
        step: the code of x is round((x - shift) / step), ties to even, within the lowest and the highest. None: what
            the node gets is the code.
        scale: the value of a code over the code, where there is no offset.
        offset: added to all levels; the code 0 is the one nearest to zero.
        nudge: of `shift`, which keeps zero off the middle between two levels.
        reason: why the levels are computed in float; empty where they are integers.
    """

    name: str
    levels: int
    lowest: int = 0
    highest: int = 0
    step: float | None = None
    scale: float = 1.0
    offset: float = 0.0
    nudge: float = 0.0
    reason: str = ""

    @property
    def integer(self) -> bool:
        """Whether the levels are integer codes times one scale, in 8 bits."""
        return not self.reason

    @property
    def gap(self) -> int:
        """The distance of neighbouring codes where that is the same for all."""
        return (self.highest - self.lowest) // (self.levels - 1)

    @property
    def shift(self) -> float:
        """What the offset is of the input."""
        return 0.0 if self.step is None else self.offset * self.step / self.scale + self.nudge

    @property
    def zero_to_zero(self) -> bool:
        """Whether zero becomes the code 0, with a margin for rounding errors, so that padding may come behind it."""
        if self.step is None:
            return False
        return abs(min(max(-self.shift / self.step, self.lowest), self.highest)) < NEAR

    @property
    def zero_point(self) -> int:
        """The code of zero as an unsigned integer; even, since OpenVINO rounds ties to the wrong side of an odd one."""
        if self.highest - self.lowest == 255:
            return -self.lowest
        return 0 if self.lowest >= 0 else max(2, 1 << (-self.lowest - 1).bit_length())

    @property
    def signs(self) -> bool:
        """Whether the values are -scale and +scale."""
        return self.integer and (self.levels, self.lowest, self.highest) == (2, -1, 1)


@dataclass(frozen=True, kw_only=True)
class WeightCodes:
    """A quantized weight: `codes * scale`, or the entry of a table of levels; `+ offset` where there is one.

    Attributes:
        name: the quantizer's name in the network.
        levels: their number.
        codes: int32, the shape of the weight; into a row of the table where there is one.
        scale: float32, broadcastable to the weight: one for the tensor, or one for each output channel.
        table: float32 [rows, levels]; None where levels are evenly spaced.
        rows: int64, broadcastable to the weight: the row of the table.
        offset: float32, broadcastable to the weight.
    """

    name: str
    levels: int
    codes: Array
    scale: Array
    table: Array | None = None
    rows: Array | None = None
    offset: Array | None = None

    def values(self) -> Array:
        """The float32 weight."""
        if self.table is not None:
            rows = np.zeros_like(self.codes) if self.rows is None else self.rows
            value = self.table[rows, self.codes]
        else:
            value = self.codes.astype(np.float32) * self.scale
        return value if self.offset is None else value + self.offset

    @property
    def scaled(self) -> bool:
        """Whether the weight is an integer times a scale, so that a norm's factor can go into the scale."""
        return self.table is None and self.offset is None

    @property
    def lowest(self) -> int:
        """The lowest code."""
        return int(self.codes.min())

    @property
    def gap(self) -> int:
        """The greatest common distance of the codes; 2 where all are odd."""
        return max(1, int(np.gcd.reduce((self.codes - self.codes.min()).ravel())))

    @property
    def digits(self) -> Array:
        """The codes as numbers 0 .. `base` - 1, int32: code = lowest + gap * digit."""
        return (self.codes - self.lowest) // self.gap

    @property
    def base(self) -> int:
        """The number of digits that there are; at least 2."""
        return max(2, int(self.digits.max()) + 1)

    def times(self, factor: Array) -> WeightCodes:
        """The weight times a factor for each output channel, float32 [out]; a negative one changes the codes' signs."""
        shape = (-1,) + (1,) * (self.codes.ndim - 1)
        factor = factor.astype(np.float32).reshape(shape)
        signs = np.where(factor < 0, -1, 1).astype(np.int32)
        return replace(self, codes=self.codes * signs, scale=positive(self.scale * np.abs(factor)))


def positive(scale: Array) -> Array:
    """A scale that an engine may divide by, float32."""
    return np.maximum(scale, SMALLEST_SCALE).astype(np.float32)


def weight_codes(name: str, quantizer: Quantizer, weight: Tensor) -> WeightCodes:
    """The integers of a weight (float32, any shape), as the quantizer's evaluation gives them.

    Raises:
        UserError: the method has no integers.
    """
    found = integers(name, quantizer, weight)
    codes = (array(found.codes) - found.zero_point).astype(np.int32)
    offset = None if found.offset is None else array(found.offset)
    if found.scale is None:
        table = _table(found)
        rows = np.arange(len(table)).reshape((-1,) + (1,) * (codes.ndim - 1)) if len(table) > 1 else None
        numbers = array(found.numbers).astype(np.int32)
        one = np.ones(1, np.float32)
        return WeightCodes(
            name=name, levels=quantizer.levels, codes=numbers, scale=one, table=table, rows=rows
        )
    scale = array(found.scale)
    if found.deviation is not None and found.mean is not None:
        deviation, mean = array(found.deviation), array(found.mean)
        scale, offset = scale * deviation, mean if offset is None else offset * deviation + mean
    if found.gamma is not None:
        gamma = array(found.gamma)
        scale, offset = scale * gamma, None if offset is None else offset * gamma
    scale = scale.astype(np.float32)
    signs = np.where(scale < 0, -1, 1).astype(np.int32)
    return WeightCodes(
        name=name, levels=quantizer.levels, codes=codes * signs, scale=positive(np.abs(scale)), offset=offset
    )


def _table(found: QuantizedTensor) -> Array:
    """The levels of a weight, float32: a row for each output channel, or one row where all are alike."""
    levels = []
    for number in range(found.codebook.shape[1]):
        value = found.unscaled(torch.full_like(found.numbers, number))
        value = value if found.gamma is None else value * found.gamma
        levels.append(array(value.flatten(1)[:, 0]))
    table = np.stack(levels, axis=1)
    return table[:1] if (table == table[:1]).all() else table


def integers(name: str, quantizer: Quantizer, x: Tensor) -> QuantizedTensor:
    """`Quantizer.integers`, or a `UserError` that names the layer where the method has none, or wrong ones."""
    try:
        found = quantizer.integers(x)
    except NotImplementedError:
        raise UserError(
            f"{name}: the method {quantizer.config.method} has no integer codes, so that it cannot be exported; give "
            "its class an encode"
        ) from None
    with torch.no_grad():
        if not torch.equal(found.dequantize(), quantizer(x)):
            raise UserError(
                f"{name}: the integers of {quantizer.config.method} are not the values that it trains; mend its "
                "encode, or export --to program"
            )
    return found


def array(value: Tensor) -> Array:
    """A tensor as NumPy array."""
    return value.detach().cpu().numpy()


def activation_codes(name: str, quantizer: Quantizer, x: Tensor) -> ActivationCodes:
    """How an engine computes the levels of an activation, found from an input (float32) of the quantizer.

    Raises:
        UserError: the method has no integers, or too many uneven levels.
    """
    levels = quantizer.levels
    found = integers(name, quantizer, x)
    if found.scale is None:
        if levels - 1 > MOST_COMPARISONS or quantizer.levels_per_sample():
            why = (
                "each image has its own"
                if quantizer.levels_per_sample()
                else f"takes {levels - 1} comparisons a value, more than {MOST_COMPARISONS}"
            )
            raise UserError(
                f"{name}: {quantizer.config.method} with {levels} uneven levels cannot be exported: it {why}; train "
                "with fewer bits, or another method"
            )
        return ActivationCodes(name=name, levels=levels, reason="its levels are uneven")
    if quantizer.levels_per_sample() or found.deviation is not None:
        return ActivationCodes(name=name, levels=levels, reason="each image has its own scale")
    scale = (found.scale if found.gamma is None else found.scale * found.gamma).detach()
    if scale.numel() > 1:
        return ActivationCodes(name=name, levels=levels, reason="its channels have scales of their own")
    if float(scale) <= 0:
        return ActivationCodes(name=name, levels=levels, reason="its scale is not positive")
    if found.offset is not None:
        return _with_offset(name, quantizer, quantizer.normalise(x), found)
    grid = quantizer.search_grid()
    if grid is not None:
        lowest, highest, even = grid.bottom, grid.top, is_even(grid) and grid.gap == 1
    else:
        book = array(found.codebook)[0]
        ratio = float(found.factor.reshape(-1)[0]) / float(found.scale.reshape(-1)[0])
        ends = np.round(book[[0, -1]] * ratio).astype(int)
        lowest, highest, even = int(ends[0]), int(ends[1]), False
    made = ActivationCodes(
        name=name, levels=levels, lowest=lowest, highest=highest, scale=float(scale),
        step=float(found.scale) if even else None,
    )  # fmt: skip
    if highest + made.zero_point > 255:
        return ActivationCodes(name=name, levels=levels, reason="its codes need more than 8 bits")
    if is_even(grid):
        _check_step(made, quantizer, quantizer.normalise(x), float(found.scale))
    return made


def is_even(grid: Grid | None) -> TypeGuard[Grid]:
    """Whether neighbouring levels are equally far apart, and values go to the nearest one, ties to the even one."""
    return type(grid) is Grid


def _with_offset(name: str, quantizer: Quantizer, x: Tensor, found: QuantizedTensor) -> ActivationCodes:
    """Codes that count from the one of zero, and what is left of the offset; `x`: normalised."""
    assert found.scale is not None and found.offset is not None
    gamma = 1.0 if found.gamma is None else float(found.gamma.detach())
    step, whole, zero = float(found.scale.detach()), found.whole, found.code_of_zero - found.zero_point
    if whole != list(range(whole[0], whole[-1] + 1)):
        return ActivationCodes(name=name, levels=quantizer.levels, reason="its levels are uneven")
    if len(whole) == 256 and (zero - whole[0]) % 2:  # which is the zero point, see there
        zero += 1 if zero < whole[-1] else -1
    made = ActivationCodes(
        name=name, levels=quantizer.levels, lowest=whole[0] - zero, highest=whole[-1] - zero, step=step,
        scale=step * gamma, offset=(float(found.offset.detach()) + zero * step) * gamma,
    )  # fmt: skip
    if made.highest + made.zero_point > 255:
        return ActivationCodes(name=name, levels=quantizer.levels, reason="its codes need more than 8 bits")
    made = replace(made, nudge=_nudge(made, quantizer, x))
    _check_step(made, quantizer, x, step)
    return made


def _nudge(codes: ActivationCodes, quantizer: Quantizer, x: Tensor) -> float:
    """What moves zero off the middle between two levels, to the side that training rounds it to; mostly 0.

    Zeros are frequent, and each order of the same arithmetic has another rounding error.
    """
    assert codes.step is not None
    value = quantized(quantizer, torch.zeros_like(x[:1])).reshape(-1)[0]
    above = round((float(value) - codes.offset) / codes.scale) + codes.shift / codes.step
    if abs(abs(above) - 0.5) > 1e-4:
        return 0.0
    return -math.copysign(NUDGE * codes.levels * codes.step, above)


def _check_step(codes: ActivationCodes, quantizer: Quantizer, like: Tensor, step: float) -> None:
    """Refuse a quantizer that does not give the code nearest to (x - shift) / step."""
    wrong = _off_step(codes, quantizer, like, step)
    if wrong is not None:
        value, wanted, got = wrong
        raise UserError(
            f"{codes.name}: {quantizer.config.method} cannot be exported: it makes {wanted:g} of {value:g}, and its "
            f"search_grid and its integers {got:g}; mend these, or export --to program"
        )


def _off_step(
    codes: ActivationCodes, quantizer: Quantizer, like: Tensor, step: float
) -> tuple[float, float, float] | None:
    """A value that is not quantized to the code nearest to (x - shift) / step, what is made of it, and what that gives.

    None: there is none. Compared are the middle half of each level, and values beyond the outer ones.
    """
    numbers = torch.arange(-3, codes.levels + 3).reshape(-1, 1) + torch.tensor([-0.25, 0, 0.25])
    numbers = torch.cat([numbers.flatten(), torch.tensor([-1e4, 1e4])])
    x = (codes.lowest + codes.gap * numbers) * step + codes.shift
    x = x.reshape(-1, *[1] * (like.ndim - 1)).expand(-1, *one_place(quantizer, like))
    wanted = quantized(quantizer, x)
    number = ((x - codes.shift) / step - codes.lowest) / codes.gap
    found = codes.lowest + codes.gap * number.round().clamp(0, codes.levels - 1)
    found = found * codes.scale + codes.offset
    wrong = ((found - wanted).abs() > 1e-4 * abs(codes.scale) * max(1, codes.levels)).nonzero()
    if not len(wrong):
        return None
    at = tuple(wrong[0].tolist())
    return float(x[at]), float(wanted[at]), float(found[at])


def one_place(quantizer: Quantizer, like: Tensor) -> list[int]:
    """The shape of one image of one place, with all channels, also where they are alike."""
    dim = quantizer.site.channel_dim % like.ndim
    return [like.shape[i] if i == dim else 1 for i in range(1, like.ndim)]


def quantized(quantizer: Quantizer, x: Tensor) -> Tensor:
    """What the quantizer makes of an input that is normalised already."""
    with torch.no_grad():
        value = quantizer.quantize(x)
        return value * quantizer.per_channel(quantizer.gamma.float()) if quantizer.config.gamma else value


def sum_range(weight: WeightCodes, codes: ActivationCodes) -> tuple[Array, Array]:
    """The lowest and the highest sum of products of each output channel, int64 [out]; padded places are 0.

    Example:
        >>> import numpy as np
        >>> from model.deploy.codes import ActivationCodes, WeightCodes, sum_range
        >>> weight = WeightCodes(name="w", levels=4, codes=np.array([[3, -1], [1, 1]]), scale=np.ones(1))
        >>> sum_range(weight, ActivationCodes(name="a", levels=4, highest=3, step=1.0))
        (array([-3,  0]), array([9, 6]))
    """
    flat = weight.codes.reshape(len(weight.codes), -1).astype(np.int64)
    ends = np.stack([flat * min(codes.lowest, 0), flat * max(codes.highest, 0)])
    return ends.min(axis=0).sum(axis=1), ends.max(axis=0).sum(axis=1)


def digits_per_word(base: int) -> tuple[int, int]:
    """How many digits of a base share a word, and the word's bytes: 1 or 4, whichever holds more a byte.

    Example:
        >>> from model.deploy.codes import digits_per_word
        >>> [digits_per_word(base) for base in (2, 3, 4, 8, 16, 256, 257)]
        [(8, 1), (5, 1), (4, 1), (10, 4), (2, 1), (1, 1), (3, 4)]
    """
    byte = int(math.log(256) / math.log(base) + 1e-9)
    word = int(math.log(2**31) / math.log(base) + 1e-9)
    return (byte, 1) if byte * 4 >= word else (word, 4)
