"""Quantized forms of the layers that timm has of its own; imported once timm is."""

from __future__ import annotations

from collections.abc import Callable

import torch
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.linear import Linear
from timm.layers.padding import pad_same
from timm.layers.std_conv import ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import Tensor, nn
from torch.nn import functional

from model.layers.convolution import QuantConv2d
from model.layers.quantized import QuantLinear


class _PadsSame(QuantConv2d):
    """Pads to ceil(size / stride) positions, unless `same_pad` says that the padding is a constant."""

    same_pad: bool = True

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not self.same_pad:
            return super()._conv_forward(input, weight, bias)
        return functional.conv2d(
            self._padded(input), weight, bias, self.stride, 0, self.dilation, self.groups
        )

    def multiply(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, quantize: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """See `QuantLayer`."""
        if not (self.same_pad and self._pads_first()):
            return super().multiply(x, weight, bias, quantize)
        return functional.conv2d(
            quantize(self._padded(x)), weight, bias, self.stride, 0, self.dilation, self.groups
        )

    def _padded(self, x: Tensor) -> Tensor:
        return pad_same(x, list(self.kernel_size), list(self.stride), list(self.dilation))


class _Standardised(QuantConv2d):
    """Multiplies by (w - mean) / sqrt(variance + eps) of each output channel, quantized (arXiv 1903.10520).

    With a `gain` it is also multiplied by gain * scale (arXiv 2101.08692).
    """

    eps: float
    gain: nn.Parameter
    scale: float

    def computes_weight(self) -> bool:
        """See `QuantLayer`."""
        return not self.weight_is_whole

    def full_weight(self) -> Tensor:
        """See `QuantLayer`."""
        if self.weight_is_whole:
            return self.weight
        weight = self.weight.float()
        variance, mean = torch.var_mean(weight, (1, 2, 3), correction=0, keepdim=True)
        weight = (weight - mean) * torch.rsqrt(variance + self.eps)
        if isinstance(self, ScaledStdConv2d | ScaledStdConv2dSame):
            weight = weight * (self.gain.float() * self.scale)
        return weight.to(self.weight.dtype)


class QuantConv2dSame(_PadsSame, Conv2dSame):
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


class QuantTimmLinear(QuantLinear, Linear):
    """`QuantLinear` in the place of timm's `Linear`, which computes the same as torch's."""


class QuantStdConv2d(_Standardised, StdConv2d):
    """The standardised convolution of BiT, quantized."""


class QuantStdConv2dSame(_Standardised, _PadsSame, StdConv2dSame):
    """The same with TensorFlow's padding, of hybrid vision transformers."""


class QuantScaledStdConv2d(_Standardised, ScaledStdConv2d):
    """The scaled standardised convolution of networks without norms, quantized.

    Example:
        >>> import torch
        >>> from timm.layers import ScaledStdConv2d
        >>> from model.convert import quantize
        >>> from model.quant import QuantConfig, QuantizerConfig
        >>> network = torch.nn.Sequential(ScaledStdConv2d(3, 8, 3))
        >>> wt = QuantizerConfig(tag="wt", enable=True, method="lsq", levels=4)
        >>> quantize(network, QuantConfig(wt=wt, first_last=True)).replaced
        ('0',)
        >>> network[0].full_weight().mean((1, 2, 3)).abs().max().item() < 1e-6
        True
    """


class QuantScaledStdConv2dSame(_Standardised, _PadsSame, ScaledStdConv2dSame):
    """The same with TensorFlow's padding."""


FORMS = {
    Conv2dSame: QuantConv2dSame,
    Linear: QuantTimmLinear,
    StdConv2d: QuantStdConv2d,
    StdConv2dSame: QuantStdConv2dSame,
    ScaledStdConv2d: QuantScaledStdConv2d,
    ScaledStdConv2dSame: QuantScaledStdConv2dSame,
}
