"""Quantizers of other libraries in our networks: learned scales, weights per channel, inputs per tensor.

A peer takes a convolution with our quantizers and a number of bits. It returns the convolution with its own, and the
function that quantizes the input.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

Made = tuple[nn.Module, Callable[[Tensor], Any]]
BOUNDARY = 1.0  # of inputs, as by default in ours


class _Learnable(nn.Module):
    """Torch's own kernel for a learned step per tensor or per output channel, which is not public."""

    def __init__(self, scale: Tensor, low: int, high: int) -> None:
        super().__init__()
        self.scale, self.ends = nn.Parameter(scale), (low, high)
        self.zero = nn.Parameter(torch.zeros_like(scale))

    def forward(self, x: Tensor) -> Tensor:
        """Quantize."""
        if len(self.scale) == 1:
            return torch.ops.aten._fake_quantize_learnable_per_tensor_affine(
                x, self.scale, self.zero, *self.ends, 1.0
            )
        return torch.ops.aten._fake_quantize_learnable_per_channel_affine(
            x, self.scale, self.zero, 0, *self.ends, 1.0
        )


def learnable(layer: Any, bits: int) -> Made:
    """Torch's own."""
    top = 2**bits - 1
    layer.quant_activation = _Learnable(torch.tensor([BOUNDARY / top]), 0, top)
    half = 2 ** (bits - 1)
    largest = layer.weight.detach().abs().amax((1, 2, 3))
    layer.quant_weight = _Learnable(largest / max(half - 1, 1), -half, half - 1)
    return layer, layer.quant_activation


def brevitas(layer: Any, bits: int) -> Made:
    """Brevitas. Its signed levels are symmetric: at 2 bits weights are ternary."""
    from brevitas.nn import QuantConv2d, QuantIdentity  # pyright: ignore[reportMissingImports]
    from brevitas.quant import (  # pyright: ignore[reportMissingImports]
        Int8WeightPerChannelFloat,
        Uint8ActPerTensorFloatMaxInit,
    )

    made = QuantConv2d(
        layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding,
        groups=layer.groups, bias=layer.bias is not None,
        weight_quant=Int8WeightPerChannelFloat, weight_bit_width=bits,
        weight_scaling_impl_type="parameter_from_stats",
        input_quant=Uint8ActPerTensorFloatMaxInit, input_bit_width=bits, input_max_val=BOUNDARY,
    )  # fmt: skip
    return made, QuantIdentity(act_quant=Uint8ActPerTensorFloatMaxInit, bit_width=bits, max_val=BOUNDARY)


def torchao(layer: Any, bits: int) -> Made:
    """Torchao. Its learned scales are those of rows, so that an input is one row and a weight has a row a channel."""
    from torchao.quantization import PerAxis, qat  # pyright: ignore[reportMissingImports]

    def quantizer(rows: int, dtype: torch.dtype, symmetric: bool, example: Tensor) -> nn.Module:
        config = qat.IntxFakeQuantizeConfig(
            dtype, PerAxis(0), is_symmetric=symmetric, is_dynamic=False, range_learning=True,
            zero_point_precision=torch.float32,
        )  # fmt: skip
        made = _Rows(qat.IntxFakeQuantizer(config), rows)
        qat.initialize_fake_quantizers(made, (example,))
        return made

    images, weight = torch.linspace(0, BOUNDARY, 4), layer.weight.detach()
    layer.quant_activation = quantizer(1, getattr(torch, f"uint{bits}"), False, images)
    layer.quant_weight = quantizer(len(weight), getattr(torch, f"int{bits}"), True, weight)
    return layer, layer.quant_activation


class _Rows(nn.Module):
    def __init__(self, quantizer: nn.Module, rows: int) -> None:
        super().__init__()
        self.quantizer, self.rows = quantizer, rows

    def forward(self, x: Tensor) -> Tensor:
        return self.quantizer(x.reshape(self.rows, -1)).reshape(x.shape)


PEERS: dict[str, Callable[[Any, int], Made]] = {
    "torch, learnable": learnable,
    "Brevitas": brevitas,
    "torchao": torchao,
}


def installed() -> dict[str, str]:
    """The peers that can be measured, with their versions; torch's own always can."""
    packages = {name: "torch" if make is learnable else make.__name__ for name, make in PEERS.items()}
    return {name: version(package) for name, package in packages.items() if find_spec(package) is not None}


def swapped(model: nn.Module, peer: str, bits: int) -> Callable[[Tensor], Any]:
    """Change every quantized convolution of `model` to a peer's; returns what quantizes the first one's input."""
    from model.quant import quantized_layers

    found = [(name, *PEERS[peer](layer, bits)) for name, layer in list(quantized_layers(model))]
    for name, layer, _ in found:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer)
    return found[0][2]
