"""Norms, activations and the convolution of the flexible networks."""

from __future__ import annotations

from torch import nn

from model.quant import QuantConv2d
from utils.config import ModelConfig


def norm(channels: int, config: ModelConfig) -> nn.Module:
    """The network's normalisation of `channels` channels."""
    del config
    return nn.BatchNorm2d(channels)


def activation(config: ModelConfig) -> nn.Module:
    """The network's activation."""
    del config
    return nn.ReLU(inplace=False)


def conv(
    channels_in: int, channels_out: int, kernel: int, stride: int, config: ModelConfig, *, full_precision: bool = False
) -> nn.Conv2d:
    """A convolution without bias, "same" padding; quantized unless `full_precision` is asked for.

    Its quantizers are built once its name is known (`model.build`).
    """
    size = {"stride": stride, "padding": kernel // 2, "bias": False}
    if full_precision or not config.quant.enabled:
        return nn.Conv2d(channels_in, channels_out, kernel, **size)
    after = config.quant.padding_after_quant
    return QuantConv2d(channels_in, channels_out, kernel, **size, padding_after_quant=after)
