"""Quantized forms of the layers that timm has of its own; imported once timm is."""

from __future__ import annotations

from collections.abc import Callable

from timm.layers.conv2d_same import Conv2dSame
from timm.layers.linear import Linear
from timm.layers.padding import pad_same
from torch import Tensor
from torch.nn import functional

from model.layers.quantized import QuantConv2d, QuantLinear


class QuantConv2dSame(QuantConv2d, Conv2dSame):
    """`QuantConv2d` that pads to ceil(size / stride) positions, one more behind than before, as TensorFlow does.

    The padding depends on the size of the input. It is quantized too, unless it comes after, as in `QuantConv2d`.

    Example:
        >>> import torch
        >>> from timm.layers import Conv2dSame
        >>> from model.convert import quantize
        >>> from model.quant import QuantConfig, QuantizerConfig
        >>> network = torch.nn.Sequential(Conv2dSame(3, 8, 3, stride=2))
        >>> wt = QuantizerConfig(tag="wt", enable=True, method="lsq", levels=4)
        >>> quantize(network, QuantConfig(wt=wt, first_last=True)).replaced, network(torch.rand(1, 3, 7, 8)).shape
        (('0',), torch.Size([1, 8, 4, 4]))
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return functional.conv2d(
            self._padded(input), weight, bias, self.stride, 0, self.dilation, self.groups
        )

    def multiply(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, quantize: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """See `QuantLayer`."""
        if not self._pads_first():
            return self._conv_forward(quantize(x), weight, bias)
        return functional.conv2d(
            quantize(self._padded(x)), weight, bias, self.stride, 0, self.dilation, self.groups
        )

    def _padded(self, x: Tensor) -> Tensor:
        return pad_same(x, list(self.kernel_size), list(self.stride), list(self.dilation))


class QuantTimmLinear(QuantLinear, Linear):
    """`QuantLinear` in the place of timm's `Linear`, which computes the same as torch's."""


FORMS = {Conv2dSame: QuantConv2dSame, Linear: QuantTimmLinear}
