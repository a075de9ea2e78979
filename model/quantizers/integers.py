"""A quantized tensor as integers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.quantizers import adaptive


@dataclass(frozen=True, kw_only=True)
class QuantizedTensor:
    """A quantized tensor as integers.

    For engines: `(codes - zero_point) * scale`, or the codebook's entries where levels are not evenly
    spaced. This agrees with what training sees to rounding, 2^-22 = 2.4e-7 of the largest level in magnitude,
    which is more of a level that is next to zero. To the last bit it is `codebook[rows, numbers] * factor`, which
    `dequantize` computes; normalisation that was undone and the learned scale come on top:
    `value * deviation + mean`, then `value * gamma`. All but the integers are float32 and broadcast to the tensor.

    Attributes:
        codes: int32, the shape of the tensor.
        scale: distance of two codes that differ by 1; None where levels are not evenly spaced.
        numbers: int64, the shape of the tensor: the level of each element, from 0, the lowest.
        codebook: [rows, levels], the levels over `factor`; one row, or one per group.
        factor: of the whole tensor, a group or a position.
        zero_point: the code of zero.
        rows: int64, broadcastable to the tensor: the row of the codebook of an element; None: the first.
        deviation: what the normalisation divided by; None where it was not undone.
        mean: what the normalisation subtracted.
        gamma: the learned scale.
    """

    codes: Tensor
    scale: Tensor | None
    numbers: Tensor
    codebook: Tensor
    factor: Tensor
    zero_point: int = 0
    rows: Tensor | None = None
    deviation: Tensor | None = None
    mean: Tensor | None = None
    gamma: Tensor | None = None

    def dequantize(self) -> Tensor:
        """The float32 tensor that the integers stand for, exactly the fake-quantized one."""
        value = self.unscaled(self.numbers)
        return value if self.gamma is None else value * self.gamma

    def unscaled(self, numbers: Tensor) -> Tensor:
        """The values of the levels of these numbers, int64 [shape of the tensor], before the learned scale."""
        rows = torch.zeros_like(numbers) if self.rows is None else self.rows.expand(numbers.shape)
        value = self.codebook[rows, numbers] * self.factor
        if self.deviation is not None and self.mean is not None:
            value = adaptive.restored(value, adaptive.Moments(self.mean, self.deviation))
        return value
