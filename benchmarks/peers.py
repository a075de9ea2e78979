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
    """Torchao's range learning."""
    weight = layer.weight.detach()
    layer.quant_activation = TorchAORows(torch.linspace(0, BOUNDARY, 4), 1, bits, signed=False)
    layer.quant_weight = TorchAORows(weight, len(weight), bits, signed=True)
    return layer, layer.quant_activation


class TorchAORows(nn.Module):
    """A quantizer of torchao that learns its range; it has a scale for each row of what it is given.

    Args:
        example: gives the first scales.
        rows: into so many every tensor is divided: an input is one row, a weight has a row a channel.
        bits: of a level.
        signed: levels on both sides of zero; else from zero on.
    """

    def __init__(self, example: Tensor, rows: int, bits: int, *, signed: bool) -> None:
        from torchao.quantization import PerAxis, qat  # pyright: ignore[reportMissingImports]

        super().__init__()
        # Symmetric: its zero point is 0. A learned one does not stay whole, and 2^bits + 1 values appear.
        config = qat.IntxFakeQuantizeConfig(
            getattr(torch, f"{'int' if signed else 'uint'}{bits}"), PerAxis(0), is_symmetric=True, is_dynamic=False,
            range_learning=True,
        )  # fmt: skip
        self.quantizer: Any = qat.IntxFakeQuantizer(config)
        self.rows = rows
        qat.initialize_fake_quantizers(self, (example,))

    def forward(self, x: Tensor) -> Tensor:
        """Quantize a tensor of any shape."""
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
