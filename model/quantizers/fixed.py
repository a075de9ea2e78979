"""The quantizer of a weight that is known by its levels alone, as packed files hold it."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from model.quantizers.frame import Quantizer
from model.quantizers.integers import QuantizedTensor


class FixedWeight(Quantizer):
    """Returns the weight as it is: it has the quantized values already, which no training may change.

    Args:
        of: the quantizer that they come from.
        stored: the weight as integers.
    """

    def __init__(self, of: Quantizer, stored: QuantizedTensor) -> None:
        config = dataclasses.replace(
            of.config, gamma=False, adaptive="none", adaptive_restore=False, stable=0, stable_epoch=0
        )
        super().__init__(config, of.site)
        self.set_levels(of.levels)
        self.stored = stored

    def forward(self, x: Tensor) -> Tensor:
        """The weight."""
        return x

    def quantize(self, x: Tensor) -> Tensor:
        """The weight."""
        return x

    def integers(self, x: Tensor) -> QuantizedTensor:
        """The stored integers."""
        return self.stored
