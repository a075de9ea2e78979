"""A quantized tensor as integers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.quantizers import adaptive


@dataclass(frozen=True, kw_only=True)
class QuantizedTensor:
    """A quantized tensor as integers.

    Engines compute `(codes - zero_point) * scale + offset`, or take the entries of the codebook where levels are not
    evenly spaced. The result agrees with the fake-quantized tensor of training up to rounding: an error of 2^-22 =
    2.4e-7 of the largest level in magnitude, which is a larger part of a level near zero. `dequantize` agrees to the
    last bit. It computes `value = codebook[rows, numbers] * factor + offset`, then `value * deviation + mean` where the
    normalisation is undone, then `value * gamma` where there is a learned scale. All tensors but the integers are
    float32 and broadcast to the shape of the tensor.

    Attributes:
        codes: int32, the shape of the tensor.
        scale: the value of a code over the code; None where levels are no multiples of one value.
        numbers: int64, the shape of the tensor: the level of each element, from 0, the lowest.
        codebook: [rows, levels], the levels over `factor`; one row, or one per group.
        factor: on the levels; one for the tensor, or one for each group or position.
        zero_point: the code of zero, or of the offset where there is one.
        offset: on all levels, where zero need not be among them; None: 0.
        rows: int64, broadcastable to the tensor: the row of the codebook of an element; None: the first.
        deviation: the divisor of the normalisation; None where the normalisation is not undone.
        mean: the mean that the normalisation subtracted.
        gamma: the learned scale.

    Example:
        >>> import torch
        >>> from model.quant import Grid, encode_on_grid
        >>> found = encode_on_grid(torch.tensor([0.0, 0.4, 9.0]), torch.tensor([1.5]), Grid.of(4, half_range=True))
        >>> found.codes, found.scale
        (tensor([0, 1, 3], dtype=torch.int32), tensor([0.5000]))
        >>> found.dequantize()
        tensor([0.0000, 0.5000, 1.5000])
    """

    codes: Tensor
    scale: Tensor | None
    numbers: Tensor
    codebook: Tensor
    factor: Tensor
    zero_point: int = 0
    offset: Tensor | None = None
    rows: Tensor | None = None
    deviation: Tensor | None = None
    mean: Tensor | None = None
    gamma: Tensor | None = None

    @property
    def whole(self) -> list[int]:
        """The integers code - zero_point of all levels, ascending; for levels with a scale alone."""
        assert self.scale is not None
        factor, scale = float(self.factor.reshape(-1)[0]), float(self.scale.reshape(-1)[0])
        return [round(level * factor / scale) for level in self.codebook[0].tolist()]

    @property
    def ends(self) -> tuple[int, int]:
        """The integers code - zero_point of the lowest and the highest level; for levels with a scale alone."""
        whole = self.whole
        return whole[0], whole[-1]

    @property
    def code_of_zero(self) -> int:
        """The code whose value is nearest to zero; for levels with one scale alone, and at most one offset."""
        if self.offset is None:
            return self.zero_point
        assert self.scale is not None
        nearest = -float(self.offset.detach()) / float(self.scale.detach())
        return self.zero_point + round(min(max(nearest, self.ends[0]), self.ends[1]))

    def dequantize(self) -> Tensor:
        """The float32 tensor that the integers represent, equal to the fake-quantized one to the last bit."""
        value = self.unscaled(self.numbers)
        return value if self.gamma is None else value * self.gamma

    def unscaled(self, numbers: Tensor) -> Tensor:
        """The values of levels by their numbers, int64 [shape of the tensor], without the learned scale."""
        rows = torch.zeros_like(numbers) if self.rows is None else self.rows.expand(numbers.shape)
        value = self.codebook[rows, numbers] * self.factor
        value = value if self.offset is None else value + self.offset
        if self.deviation is not None and self.mean is not None:
            value = adaptive.restored(value, adaptive.Moments(self.mean, self.deviation))
        return value
