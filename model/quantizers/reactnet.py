"""ReActNet (arXiv 2003.03488): signs around a learned threshold per channel; weights are those of XNOR-Net."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from model.quantizers.frame import Quantizer
from model.quantizers.gradient import apply
from model.quantizers.integers import QuantizedTensor
from model.quantizers.registry import register
from model.quantizers.sign import binary
from model.quantizers.site import LayerSite
from model.quantizers.xnor import ScaledSign, XNORWeight
from utils.config.schema import QuantizerConfig


@register("reactnet", "fm", "ot")
class RSign(Quantizer):
    """sign(x - threshold) with sign(0) = +1 and a learned threshold for each channel (equation 1).

    The gradient of x is that of XNOR-Net's sign, by the mask of `grad_type` up to the distance `grad_window` from the
    threshold; the paper takes `Triangle` up to 1. That of the threshold is the sum of the gradients of the elements
    that share it, times -1.

    State:
        threshold: float32, `range_shape`; starts at 0, or with `--re_init` at the mean of each group, of which padded
            zeros are a part.
    """

    level_limit: ClassVar[int | None] = 2
    pure: ClassVar[bool] = True
    per_channel_inputs: ClassVar[bool] = True

    def __init__(self, config: QuantizerConfig, site: LayerSite) -> None:
        super().__init__(config, site)
        self.threshold = nn.Parameter(torch.zeros(self.range_shape()))

    def sign_threshold(self) -> Tensor | None:
        """See `Quantizer`."""
        return self.per_channel(self.threshold.detach())

    def quantize(self, x: Tensor) -> Tensor:
        """Float32 of any shape to -1 and +1."""
        shifted = x - self.per_channel(self.threshold)
        return apply(ScaledSign, shifted, x.new_ones(1), self.config.grad_type, self.config.grad_window)

    def encode(self, x: Tensor) -> QuantizedTensor:
        """Codes -1 and +1."""
        return binary(x - self.per_channel(self.threshold), x.new_ones(1))

    def initialise_from(self, x: Tensor) -> None:
        """Set the thresholds to the mean of each group, so that both signs occur."""
        with torch.no_grad():
            mean = self.mean_over_ranks(self.grouped(self.normalise(x.float())).mean(1))
            self.threshold.copy_(mean.reshape(self.range_shape()))


register("reactnet", "wt")(
    XNORWeight
)  # the paper's equation 2: signs times the mean magnitude of each output channel
