"""The quantized convolutions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd

from model.layers.quantized import QuantLayer
from model.quantizers.frame import Quantizer
from model.quantizers.site import LayerSite

_CONVOLVE = {3: functional.conv1d, 4: functional.conv2d}  # dimensions of the weight -> its convolution


class QuantConvolution(QuantLayer, _ConvNd):
    """A convolution with quantizers on its input, weight and output; its classes are those of torch.

    By default the input is padded first and then quantized, so that padded positions take a real
    level; `padding_after_quant` quantizes first and pads with exact zeros. An empty input, which the head of a
    detector gets when nothing was found, passes without the quantizers of input and output; see `check_empty`.

    Example:
        >>> from model.quant import QuantConv1d, QuantConv2d, QuantConvolution
        >>> [issubclass(kind, QuantConvolution) for kind in (QuantConv1d, QuantConv2d)]
        [True, True]
    """

    def __init__(self, *args: Any, padding_after_quant: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.padding_after_quant = padding_after_quant
        self.quant_activation = self.quant_weight = self.quant_output = nn.Identity()

    def _site(self, tag: str, name: str) -> LayerSite:
        fan, ndim = self.weight[0].numel(), self.weight.ndim
        if tag == "fm":
            return LayerSite(name=name, channels=self.in_channels, channel_dim=1, ndim=ndim, fan=fan)
        dim = 0 if tag == "wt" else 1
        return LayerSite(name=name, channels=self.out_channels, channel_dim=dim, ndim=ndim, fan=fan)

    def _pads_first(self) -> bool:
        quantizer = self.quant_activation
        return isinstance(quantizer, Quantizer) and not (self.padding_after_quant or quantizer.zero_to_zero())

    def forward(self, input: Tensor) -> Tensor:
        """Input [N, in, ...], output [N, out, ...], or both without N, as the class of torch."""
        x = input  # the argument keeps the name that torch gives it: a network may pass it by name
        if (
            x.ndim == self.weight.ndim - 1
        ):  # one image; quantizers tell samples and channels apart by position
            return QuantConvolution.forward(self, x.unsqueeze(0)).squeeze(
                0
            )  # not a subclass's, which does more
        weight = self.quant_weight(self.full_weight())
        if x.numel() == 0:
            self.check_empty()
            return self._conv_forward(x, weight, self.bias)
        return self.quant_output(self.product_of(x, weight, self.bias))

    def multiply(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, quantize: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """See `QuantLayer`."""
        if not self._pads_first():
            return self._conv_forward(quantize(x), weight, bias)
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        x = functional.pad(x, self._reversed_padding_repeated_twice, mode=mode)
        convolve = _CONVOLVE[self.weight.ndim]
        return convolve(quantize(x), weight, bias, self.stride, 0, self.dilation, self.groups)


class QuantConv1d(QuantConvolution, nn.Conv1d):
    """`nn.Conv1d` with quantizers on its input, weight and output; see `QuantConvolution`.

    Example:
        >>> import torch
        >>> from model.quant import QuantConfig, QuantConv1d, QuantizerConfig
        >>> wt = QuantizerConfig(tag="wt", enable=True, method="lsq", levels=2)
        >>> layer = QuantConv1d(3, 8, 3, padding=1)
        >>> layer.build_quantizers(QuantConfig(wt=wt), "conv1")
        >>> layer(torch.rand(2, 3, 6)).shape
        torch.Size([2, 8, 6])
    """


class QuantConv2d(QuantConvolution, nn.Conv2d):
    """`nn.Conv2d` with quantizers on its input, weight and output; see `QuantConvolution`.

    Example:
        >>> import torch
        >>> from model.quant import QuantConfig, QuantConv2d, QuantizerConfig
        >>> wt = QuantizerConfig(tag="wt", enable=True, method="lsq", levels=2)
        >>> layer = QuantConv2d(3, 8, 3, padding=1)
        >>> layer.build_quantizers(QuantConfig(wt=wt), "conv1")
        >>> layer(torch.rand(2, 3, 6, 6)).shape
        torch.Size([2, 8, 6, 6])
        >>> layer.quant_weight(layer.weight).unique().tolist()
        [-1.0, 1.0]
    """
