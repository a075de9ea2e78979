"""Layers as a network's configuration asks for them: convolutions, linear layers, activations."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import nn

from model.layers.convolution import QuantConv2d
from model.layers.norms import norm
from model.layers.quantized import QuantLinear, keep_full_precision
from model.layers.rprelu import RPReLU
from utils.config.schema import ModelConfig
from utils.errors import UserError
from utils.text import closest

ACTIVATIONS: dict[str, Callable[[int], nn.Module]] = {  # from the number of channels
    "relu": lambda _: nn.ReLU(),
    "none": lambda _: nn.Identity(),
    "prelu": lambda _: nn.PReLU(),
    "relu6": lambda _: nn.ReLU6(),
    "leaky": lambda _: nn.LeakyReLU(),
    "rprelu": RPReLU,
}


def activation(channels: int, config: ModelConfig) -> nn.Module:
    """The activation of the network, for an input of so many channels.

    Raises:
        UserError: `config.activation` is no name in `ACTIVATIONS`.
    """
    if str(config.activation) not in ACTIVATIONS:
        hint = closest(config.activation, ACTIVATIONS) or f"; use one of {', '.join(ACTIVATIONS)}"
        raise UserError(f"ModelConfig: activation {config.activation!r} is not known{hint}")
    return ACTIVATIONS[config.activation](channels)


def width(channels: int, config: ModelConfig) -> int:
    """`channels` times the network's `width_alpha`, rounded.

    Raises:
        UserError: when nothing is left.
    """
    scaled = round(channels * config.width_alpha)
    if scaled < 1:
        raise UserError(
            f"--width_alpha {config.width_alpha} leaves no channel of {channels}; use a larger one"
        )
    return scaled


def conv(
    channels_in: int, channels_out: int, kernel: int, stride: int, config: ModelConfig, *, groups: int = 1,
    full_precision: bool = False, signed: bool = False,
) -> nn.Conv2d:  # fmt: skip
    """A convolution without bias and with "same" padding; quantized unless `full_precision` is set.

    Its quantizers are built once its name is known (`model.networks.build`). It is depth-wise with as many `groups` as
    input channels. `signed` says that its input goes below zero; its activations then get symmetric levels.

    Example:
        >>> from model.layers.factory import conv, linear
        >>> from model.quant import QuantConfig, QuantizerConfig
        >>> from utils.config.schema import ModelConfig
        >>> wt = QuantizerConfig(tag="wt", enable=True, method="lsq", levels=4)
        >>> config = ModelConfig(quant=QuantConfig(wt=wt))
        >>> type(conv(8, 16, 3, 1, config)).__name__, type(conv(8, 16, 3, 1, ModelConfig())).__name__
        ('QuantConv2d', 'Conv2d')
    """
    size: dict[str, Any] = {"stride": stride, "padding": kernel // 2, "bias": False, "groups": groups}
    depthwise = 1 < groups == channels_in
    if full_precision or not config.quant.enabled or (depthwise and not config.quant.depthwise):
        made = nn.Conv2d(channels_in, channels_out, kernel, **size)
        return keep_full_precision(made, "is kept so by its network" if full_precision else "is depth-wise")
    after = config.quant.padding_after_quant
    made = QuantConv2d(channels_in, channels_out, kernel, **size, padding_after_quant=after)
    made.signed_input = signed
    return made


def unit(
    channels_in: int, channels_out: int, kernel: int, stride: int, config: ModelConfig, *, groups: int = 1,
    full_precision: bool = False, signed: bool = False, activated: bool = True,
) -> nn.Sequential:  # fmt: skip
    """A convolution `conv` (see there), a norm `bn` and, where `activated`, an activation `relu`."""
    parts: dict[str, nn.Module] = {
        "conv": conv(
            channels_in,
            channels_out,
            kernel,
            stride,
            config,
            groups=groups,
            full_precision=full_precision,
            signed=signed,
        ),
        "bn": norm(channels_out, config),
    }
    if activated:
        parts["relu"] = activation(channels_out, config)
    return nn.Sequential(OrderedDict(parts))


def linear(features_in: int, features_out: int, config: ModelConfig) -> nn.Linear:
    """The last layer, in full precision unless the first and last layers are quantized too.

    Example:
        >>> from model.layers.factory import conv, linear
        >>> from model.quant import QuantConfig, QuantizerConfig
        >>> from utils.config.schema import ModelConfig
        >>> wt = QuantizerConfig(tag="wt", enable=True, method="lsq", levels=4)
        >>> config = ModelConfig(quant=QuantConfig(wt=wt))
        >>> type(linear(8, 10, config)).__name__
        'Linear'
    """
    quantized = config.quant.first_last and config.quant.enabled
    if quantized:
        return QuantLinear(features_in, features_out)
    return keep_full_precision(nn.Linear(features_in, features_out), "is the last layer")
