"""The share of a tensor that lies outside the range of a quantizer's levels."""

from __future__ import annotations

import torch
from torch import Tensor

from model.quantizers.frame import Quantizer


def cut_off(quantizer: Quantizer, x: Tensor) -> Tensor | None:
    """The shares of `x` that lie below and above the range of the levels.

    The range reaches half a step beyond the outermost levels: farther out, the error is larger than that of rounding.
    Levels that start at zero cut off everything below it.

    Args:
        quantizer: in its present state.
        x: an input of it, any floating dtype, not empty.

    Returns:
        float64 [2]; None for a method whose levels do not depend on a range.
    """
    bounds = quantizer.bounds()
    if bounds is None:
        return None
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        lowest, highest = (quantizer.per_channel(bound) for bound in bounds)
        half = (highest - lowest) / (2 * (quantizer.levels - 1))
        normed = quantizer.normalise(x.float())
        outside = (normed < torch.where(lowest < 0, lowest - half, lowest), normed > highest + half)
        return torch.stack([part.count_nonzero() for part in outside]).double() / x.numel()
