"""The numbers of the levels of a tensor, without its integer codes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from model.quantizers import adaptive
from model.quantizers.autocast import without_autocast
from model.quantizers.frame import Quantizer


def numbered(quantizer: Quantizer, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The numbers of the levels of `x`, and a function from numbers to levels, without the learned scale.

    Both are those of `quantizer.integers(x)`, which takes longer where levels are evenly spaced; numbers are float32
    or integers, the shape of x.
    """
    owners = [
        next(kind for kind in type(quantizer).__mro__ if name in vars(kind)) for name in ("encode", "on_grid")
    ]
    with torch.no_grad(), without_autocast(x):
        normed, taken = quantizer.normalised(x.float())
        placed = quantizer.on_grid(normed)
        if placed is None or owners[0] is not owners[1]:  # a method of one's own may encode in another way
            found = quantizer.integers(x)
            return found.numbers, lambda numbers: found.unscaled(numbers.long())
        scaled, clip, grid = placed

        def levels(numbers: Tensor) -> Tensor:
            value = grid.ratios(numbers.to(torch.float32, copy=True)).mul_(clip)
            if quantizer.config.adaptive_restore and taken is not None:
                value = adaptive.restored(value, taken)
            return value

        return grid.numbers_(scaled / clip), levels
