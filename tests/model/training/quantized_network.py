"""A small network with quantized weights."""

from __future__ import annotations

import torch
from torch import nn

from model.layers.convolution import QuantConv2d
from utils.config.resolve import read


def network() -> nn.Sequential:
    """Two convolutions with 2-bit LSQ weights."""
    torch.manual_seed(0)
    config = read(["--keyword", "digits,cbsa,dorefa,lsq", "--wt_enable", "--wt_bit", "2"]).model.quant
    layers = [QuantConv2d(3, 4, 3), QuantConv2d(4, 6, 3)]
    for number, layer in enumerate(layers):
        layer.build_quantizers(config, str(number))
        layer.quant_weight.initialise_from(layer.weight)
    return nn.Sequential(*layers)
