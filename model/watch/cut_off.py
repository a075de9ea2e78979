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
        outside = (normed < torch.where(lowest == 0, lowest, lowest - half), normed > highest + half)
        return torch.stack([part.count_nonzero() for part in outside]).double() / x.numel()


def starts_at_zero(quantizer: Quantizer) -> bool:
    """Whether no level is below zero, so that everything there is cut off."""
    bounds = quantizer.bounds()
    return bounds is not None and bool((bounds[0] >= 0).all())


def holds_images(x: Tensor, images: Tensor) -> bool:
    """Whether a batch `x` has the values of a batch of images, in whatever order; the first image tells."""
    if not x.numel() or x.numel() != images.numel() or x.shape[0] != images.shape[0]:
        return False
    return torch.equal(*(each[0].flatten().float().sort().values for each in (x, images)))
