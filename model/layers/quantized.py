"""The quantized convolution and linear layer, and finding them in a network."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.quantizers.frame import Quantizer
from model.quantizers.registry import build_quantizer
from model.quantizers.site import LayerSite
from utils.config.schema import QuantConfig, QuantizerConfig
from utils.errors import UserError


class QuantLayer(nn.Module):
    """What quantized layers share: three quantizers, absent (identity) until `build_quantizers`."""

    weight: nn.Parameter
    quant_activation: nn.Module
    quant_weight: nn.Module
    quant_output: nn.Module
    signed_input: bool = False  # it goes below zero: its levels are symmetric whatever the options say

    def build_quantizers(self, config: QuantConfig, name: str) -> None:
        """Create the quantizers of this layer, called `name` in messages."""
        for tag, part in (("fm", "activation"), ("wt", "weight"), ("ot", "output")):
            settings: QuantizerConfig = getattr(config, tag)
            if tag == "fm" and self.signed_input:
                settings = dataclasses.replace(settings, half_range=False)
            try:
                setattr(self, f"quant_{part}", build_quantizer(settings, self._site(tag, name)))
            except UserError as error:
                if settings is getattr(config, tag):
                    raise
                raise UserError(
                    f"{name} has symmetric levels, since its input goes below zero: {error}"
                ) from error

    def _site(self, tag: str, name: str) -> LayerSite:
        raise NotImplementedError

    def quantizers(self) -> Iterator[tuple[str, Quantizer]]:
        """The layer's quantizers that are not the identity, with their attribute names."""
        for part in ("quant_activation", "quant_weight", "quant_output"):
            quantizer = getattr(self, part)
            if isinstance(quantizer, Quantizer):
                yield part, quantizer

    def check_empty(self) -> None:
        """Whether this layer may pass an empty input on without its quantizers.

        Raises:
            ValueError: in training, where other processes would wait for this one's statistics for ever.
        """
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if not self.training or not distributed or torch.distributed.get_world_size() == 1:
            return
        for part, quantizer in self.quantizers():
            if part != "quant_weight" and quantizer.gathers():
                raise ValueError(
                    f"{quantizer.site.name}: an empty input on this process, while others wait for the statistics that "
                    f"its {part} ({quantizer.config.method}) gathers; give each process something in every step"
                )


class QuantConv2d(QuantLayer, nn.Conv2d):
    """`nn.Conv2d` with quantizers on its input, weight and output.

    By default the input is padded first and then quantized, so that padded positions take a real
    level; `padding_after_quant` quantizes first and pads with exact zeros. Of an empty input, such as a
    detector's head gets when nothing was found, only the weight is quantized; see `check_empty`.
    """

    def __init__(self, *args: Any, padding_after_quant: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.padding_after_quant = padding_after_quant
        self.quant_activation = self.quant_weight = self.quant_output = nn.Identity()

    def _site(self, tag: str, name: str) -> LayerSite:
        fan = self.weight[0].numel()
        if tag == "fm":
            return LayerSite(name=name, channels=self.in_channels, channel_dim=1, ndim=4, fan=fan)
        dim = 0 if tag == "wt" else 1
        return LayerSite(name=name, channels=self.out_channels, channel_dim=dim, ndim=4, fan=fan)

    def _pads_first(self) -> bool:
        quantizer = self.quant_activation
        return isinstance(quantizer, Quantizer) and not (self.padding_after_quant or quantizer.zero_to_zero())

    def forward(self, input: Tensor) -> Tensor:
        """Input [N, in, H, W], output [N, out, H', W'], or both without N, as `nn.Conv2d`."""
        x = input  # the name is nn.Conv2d's: a network may call it by that
        if x.ndim == 3:  # one image; quantizers tell samples and channels apart by position
            return QuantConv2d.forward(self, x.unsqueeze(0)).squeeze(0)  # not a subclass's, which does more
        weight = self.quant_weight(self.weight)
        if x.numel() == 0:
            self.check_empty()
            return self._conv_forward(x, weight, self.bias)
        if self._pads_first():
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x = functional.pad(x, self._reversed_padding_repeated_twice, mode=mode)
            x = self.quant_activation(x)
            x = functional.conv2d(x, weight, self.bias, self.stride, 0, self.dilation, self.groups)
        else:
            x = self._conv_forward(self.quant_activation(x), weight, self.bias)
        return self.quant_output(x)


class QuantLinear(QuantLayer, nn.Linear):
    """`nn.Linear` with quantizers on its input, weight and output; of an empty input, on its weight only."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.quant_activation = self.quant_weight = self.quant_output = nn.Identity()

    def _site(self, tag: str, name: str) -> LayerSite:
        fan = self.in_features
        if tag == "fm":
            return LayerSite(name=name, channels=self.in_features, channel_dim=-1, ndim=2, fan=fan)
        dim = 0 if tag == "wt" else -1
        return LayerSite(name=name, channels=self.out_features, channel_dim=dim, ndim=2, fan=fan)

    def forward(self, input: Tensor) -> Tensor:
        """Input [..., in], output [..., out], as `nn.Linear`."""
        x = input
        if x.ndim == 1:
            return QuantLinear.forward(self, x.unsqueeze(0)).squeeze(0)
        weight = self.quant_weight(self.weight)
        if x.numel() == 0:
            self.check_empty()
            return functional.linear(x, weight, self.bias)
        return self.quant_output(functional.linear(self.quant_activation(x), weight, self.bias))


Module = TypeVar("Module", bound=nn.Module)


def keep_full_precision(layer: Module, reason: str) -> Module:
    """Note on a convolution or linear layer that it computes in full precision on purpose; returns the layer.

    The audit of a quantized network fails where such a layer bears no note.

    Args:
        layer: any layer.
        reason: the rest of a sentence about it: "is the last layer".
    """
    vars(layer)["full_precision_reason"] = reason
    return layer


def full_precision_reason(layer: nn.Module) -> str:
    """What `keep_full_precision` noted on a layer; empty where nothing is noted."""
    return vars(layer).get("full_precision_reason", "")


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, QuantLayer]]:
    """Every quantized layer of a network with its name."""
    for name, module in model.named_modules():
        if isinstance(module, QuantLayer) and any(True for _ in module.quantizers()):
            yield name, module


def quantized_weights(model: nn.Module) -> Iterator[tuple[str, QuantLayer, Quantizer]]:
    """Every layer whose weight is quantized now, which a policy may have turned off, with its name and quantizer."""
    for name, layer in quantized_layers(model):
        if isinstance(layer.quant_weight, Quantizer) and layer.quant_weight.enabled:
            yield name, layer, layer.quant_weight


def quantizers(model: nn.Module) -> Iterator[tuple[str, Quantizer]]:
    """Every quantizer of a network that is not the identity, with its name."""
    for name, module in model.named_modules():
        if isinstance(module, Quantizer):
            yield name, module
