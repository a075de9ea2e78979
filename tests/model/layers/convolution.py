"""A quantized convolution and images for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.layers.convolution import QuantConv2d
from tests.model.quantizers.cases import generator
from utils.config.schema import QuantConfig


def conv(
    config: QuantConfig, channels: tuple[int, int] = (4, 6), kernel: Any = 3, **options: Any
) -> QuantConv2d:
    torch.manual_seed(0)
    layer = QuantConv2d(*channels, kernel, **options)
    layer.build_quantizers(config, "conv1")
    with torch.no_grad():
        for _, quantizer in layer.quantizers():
            for parameter in quantizer.parameters():
                parameter.uniform_(0.4, 1.2)
    return layer


def image(*shape: int) -> Tensor:
    return torch.from_numpy(generator("image", shape).standard_normal(shape).astype(np.float32))
