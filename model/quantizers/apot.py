"""APoT: levels that are sums of powers of two (arXiv 1909.13144), up to a learned clip value."""

from __future__ import annotations

import dataclasses
import itertools
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.quantizers.gradient import apply
from model.quantizers.grid import ClipSTE, Grid
from model.quantizers.integers import QuantizedTensor
from model.quantizers.learned_range import LearnedRange
from model.quantizers.registry import register
from model.quantizers.site import LayerSite
from utils.config.methods import unfit_levels
from utils.config.schema import QuantizerConfig
from utils.errors import UserError


def sums_of_powers(bits: int) -> tuple[int, ...]:
    """The 2^bits sums, in units of the smallest power: one of four from each of bits // 2 terms, zero among the four.

    The powers of n terms take turns: term i has 2^-i, 2^-(i + n) and 2^-(i + 2n) (paper, equation 5 with k = 2). An odd
    bit is a term of its own, with zero and one power, which comes in front of the terms' last ones.

    Example:
        >>> from model.quantizers.apot import sums_of_powers
        >>> sums_of_powers(2), sums_of_powers(3)
        ((0, 1, 2, 4), (0, 1, 2, 3, 4, 6, 8, 10))
        >>> sums_of_powers(4)
        (0, 1, 2, 3, 4, 6, 8, 9, 12, 16, 18, 24, 32, 33, 36, 48)
    """
    n, odd = bits // 2, bits % 2
    exponents = [[i, i + n, i + 2 * n + odd] for i in range(n)] + [[2 * n]] * odd
    lowest = max(max(term) for term in exponents)
    terms = [[0, *(2 ** (lowest - exponent) for exponent in term)] for term in exponents]
    return tuple(sorted(map(sum, itertools.product(*terms))))


MOST_BITS = 6
SUMS = tuple(sums_of_powers(bits) for bits in range(1, MOST_BITS + 1))


class PowerSums(Grid):
    """The sums of powers of two as codes from `bottom` to `top`, with the interface of evenly spaced levels.

    A value takes the nearest level, the upper one in a tie.

    Example:
        >>> import torch
        >>> from model.quantizers.apot import PowerSums
        >>> grid = PowerSums.up_to(8, half_range=False)  # 3 bits: a sign and 2 bits
        >>> grid.values, grid.codes(torch.tensor([-9.0, 0.3, 0.8]))
        ((-4, -2, -1, 0, 1, 2, 4), tensor([-4.,  1.,  4.]))
    """

    @classmethod
    def up_to(cls, levels: int, half_range: bool) -> PowerSums:
        """The levels in [0, c], 2^bits of them; or in [-c, c], where a bit is the sign and zero has one level."""
        bits = (levels - 1).bit_length()
        values = SUMS[(bits if half_range else bits - 1) - 1]
        steps = (len(values) - 1) * (1 if half_range else 2)
        return cls(steps, 0 if half_range else -values[-1], values[-1], half_range, False)

    @property
    def values(self) -> tuple[int, ...]:
        """The codes of all levels, ascending."""
        if self.half_range:
            return SUMS[self.steps.bit_length() - 1]
        above = SUMS[(self.steps // 2).bit_length() - 1]
        return (*(-value for value in above[:0:-1]), *above)

    @property
    def gap(self) -> int:
        """Distance between neighbouring codes; 0 where it is not the same for all."""
        return 1 if len(self.values) == self.top - self.bottom + 1 else 0

    @property
    def qp(self) -> float:
        """The number of levels above zero."""
        return float(self.steps if self.half_range else self.steps // 2)

    def _reached(self, ratio: Tensor, counts: tuple[int, ...], start: int) -> Tensor:
        """`start`, and for each threshold that a value of `ratio` reaches its count; float32. NaN stays NaN."""
        result = ratio.clamp(0, 0).add_(start)
        reached = torch.empty_like(ratio)  # 0 and 1: a tenth of the time of truth values on a CPU
        for below, above, count in zip(self.values, self.values[1:], counts, strict=False):
            torch.ge(ratio, (below + above) / (2 * self.top), out=reached)
            result.add_(reached, alpha=count)
        return result

    def numbers(self, ratio: Tensor) -> Tensor:
        """See `Grid`."""
        return self._reached(ratio, (1,) * self.steps, 0)

    def numbers_(self, ratio: Tensor) -> Tensor:
        """See `Grid`; the result is a new tensor."""
        return self.numbers(ratio)

    def codes(self, ratio: Tensor) -> Tensor:
        """The codes of the levels nearest to `ratio` = x / c, as float32 of any shape.

        Without a table, which would be copied to the device in each pass.
        """
        gaps = tuple(above - below for below, above in itertools.pairwise(self.values))
        return self._reached(ratio, gaps, self.bottom)

    def ratios(self, numbers: Tensor) -> Tensor:
        """See `Grid`; the result is a new tensor."""
        return torch.tensor(self.values, device=numbers.device)[numbers.long()].float().div_(self.top)

    def nearest(self, x: Tensor, clip: Tensor) -> Tensor:
        """See `Grid`."""
        return self.codes(x / clip).div_(self.top).mul_(clip)


@register("apot", "fm", "wt", "ot")
class APoT(LearnedRange):
    """The nearest sum of powers of two up to a learned clip value c = |clip_val|.

    Gradient: straight-through to x inside the range; to c, q / c - x / c inside and the end level outside (paper,
    equation 7), times the factor of `grad_scale`.

    State:
        clip_val: float32, `range_shape`; starts at `boundary`.
    """

    pure: ClassVar[bool] = True
    level_limit: ClassVar[int | None] = 2**MOST_BITS

    def __init__(self, config: QuantizerConfig, site: LayerSite) -> None:
        super().__init__(config, site)
        self.check_levels(config.levels)

    def check_levels(self, levels: int) -> None:
        """Refuse a number of levels that is none of sums."""
        super().check_levels(levels)
        if fault := unfit_levels(dataclasses.replace(self.config, levels=levels)):
            raise UserError(f"{self.site.name}: {fault}")

    def half_range_changes(self) -> bool:
        """See `Quantizer`: numbers of levels fit one range alone."""
        return False

    def grid(self) -> Grid:
        """The levels."""
        return PowerSums.up_to(self.levels, self.config.half_range)

    def encode(self, x: Tensor) -> QuantizedTensor:
        """The sums as codes, and their scale; a number that no level has, the second zero, stands for the top."""
        x, clip, grid = self.on_grid(x)
        assert isinstance(grid, PowerSums)
        ratio, clip = x / clip, clip.detach()
        missing = self.levels - len(grid.values)
        numbers = torch.arange(grid.steps + 1.0, device=x.device)
        return QuantizedTensor(
            codes=grid.codes(ratio).to(torch.int32),
            scale=clip / grid.top,
            numbers=grid.numbers(ratio).long(),
            codebook=functional.pad(grid.ratios(numbers)[None], (0, missing), value=1.0),
            factor=clip,
        )

    def rescale(self, levels: int) -> tuple[nn.Parameter, ...]:
        """See `Quantizer`: levels of another number have other distances, so that the range stays."""
        return ()

    def quantize(self, x: Tensor) -> Tensor:
        """Float32 of any shape to the nearest level."""
        return apply(ClipSTE, *self.on_grid(x), False, self.keeps_output)
