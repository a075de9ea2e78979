"""What a network costs: shapes, parameters, multiply-accumulates, bit operations and weight size."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from model.observe import observing
from model.quant import Quantizer, QuantLayer, quantizers
from utils.config import QuantizerConfig

FULL_BITS = 32  # of a value in full precision


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """One convolution or linear layer for one image.

    Attributes:
        name: in the network.
        kind: its class and geometry.
        output: shape of its output without the batch.
        weights: number of weights.
        macs: multiply-accumulate operations.
        weight: how the weight is quantized, for people; empty in full precision.
        activation: the same of the input.
        result: how its output is quantized; empty in full precision.
        weight_bits: bits of a stored weight.
        activation_bits: bits of an input value.
    """

    name: str
    kind: str
    output: tuple[int, ...]
    weights: int
    macs: int
    weight: str
    activation: str
    weight_bits: int
    activation_bits: int
    result: str = ""

    @property
    def bit_operations(self) -> int:
        """MACs times the bits of both factors."""
        return self.macs * self.weight_bits * self.activation_bits


@dataclass(frozen=True, kw_only=True)
class Cost:
    """A network's layers and totals.

    Attributes:
        layers: the convolutions and linear layers, in the order they run.
        parameters: number of all parameters.
    """

    layers: tuple[LayerCost, ...]
    parameters: int

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one image."""
        return sum(layer.macs for layer in self.layers)

    @property
    def bit_operations(self) -> int:
        """Bit operations of one image."""
        return sum(layer.bit_operations for layer in self.layers)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the convolutions' and linear layers' weights at their bits."""
        return sum(math.ceil(layer.weights * layer.weight_bits / 8) for layer in self.layers)

    @property
    def float_weight_bytes(self) -> int:
        """Bytes of the same weights in float32."""
        return sum(layer.weights * 4 for layer in self.layers)

    @property
    def bits(self) -> str:
        """The quantized layers' weight and activation bits, such as 2/2; 32/32 in full precision."""
        low = [layer for layer in self.layers if layer.weight or layer.activation or layer.result]
        if not low:
            return f"{FULL_BITS}/{FULL_BITS}"
        weight = sorted({layer.weight_bits for layer in low})
        activation = sorted({layer.activation_bits for layer in low})
        return "/".join("-".join(map(str, bits)) for bits in (weight, activation))

    def table(self) -> str:
        """The layers as text, a line each, and a line of totals."""
        head = ("layer", "kind", "output", "weights", "MACs", "weight", "input")
        rows = [
            (
                layer.name,
                layer.kind,
                "x".join(map(str, layer.output)),
                f"{layer.weights:,}",
                f"{layer.macs:,}",
                layer.weight or "full precision",
                layer.activation or "full precision",
            )
            for layer in self.layers
        ]
        if any(layer.result for layer in self.layers):
            head += ("result",)
            rows = [(*row, layer.result or "-") for row, layer in zip(rows, self.layers, strict=True)]
        return f"{format_table(head, rows)}\n{self.totals()}"

    def totals(self) -> str:
        """One line of totals."""
        return (
            f"total: {self.parameters:,} parameters, {self.macs:,} MACs, {self.bit_operations:,} bit "
            f"operations, weights {self.weight_bytes / 1024:.1f} KiB "
            f"({self.float_weight_bytes / 1024:.1f} KiB in float32)"
        )


def format_table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Columns aligned, numbers to the right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    right = [bool(rows) and all(row[i][:1].isdigit() for row in rows) for i in range(len(head))]
    lines = [
        "  ".join(
            cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in [head, *rows]
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def stored_bits(levels: int) -> int:
    """Bits that hold a code of `levels` levels; ternary takes 2."""
    return math.ceil(math.log2(levels))


def describe(quantizer: nn.Module | None) -> tuple[str, int]:
    """A quantizer for people, and its bits; ("", 32) for the identity or none."""
    if not isinstance(quantizer, Quantizer):
        return "", FULL_BITS
    bits = stored_bits(quantizer.levels)
    return f"{quantizer.config.method} {bits} bit, {quantizer.levels} levels, {quantizer.groups} gr.", bits


def cost(model: nn.Module, input_size: int) -> Cost:
    """Run one black image of `input_size` pixels through `model` and count; its mode is restored.

    Of the quantizers with equal options only the first one works, to see that it can; the others, which would
    take most of the time, let their input pass.
    """
    layers: list[LayerCost] = []

    def count(name: str, module: nn.Module, _: object, output: Tensor) -> None:
        if not isinstance(module, nn.Conv2d | nn.Linear):
            return
        quantized = isinstance(module, QuantLayer)
        weight, weight_bits = describe(module.quant_weight if quantized else None)
        activation, bits = describe(module.quant_activation if quantized else None)
        result, _ = describe(module.quant_output if quantized else None)
        layers.append(
            LayerCost(
                name=name,
                kind=_kind(module),
                output=tuple(output.shape[1:]),
                weights=module.weight.numel(),
                # Every output value takes one product per weight of its output channel.
                macs=output[0].numel() * module.weight[0].numel(),
                weight=weight,
                activation=activation,
                weight_bits=weight_bits,
                activation_bits=bits,
                result=result,
            )
        )

    parameter = next(model.parameters())
    with one_of_a_kind(model), observing(model) as hooks:
        hooks += [
            module.register_forward_hook(partial(count, name))
            for name, module in model.named_modules()
            if isinstance(module, nn.Conv2d | nn.Linear)
        ]
        model(torch.zeros(1, 3, input_size, input_size, device=parameter.device, dtype=parameter.dtype))
    return Cost(layers=tuple(layers), parameters=sum(p.numel() for p in model.parameters()))


@contextmanager
def one_of_a_kind(model: nn.Module) -> Iterator[None]:
    """Turn off the quantizers whose options another one has already, and all threads but one, for a while.

    One image is little to share: on a busy machine threads wait for each other many times as long.
    """
    threads = torch.get_num_threads()
    kinds: list[QuantizerConfig] = []
    repeated: list[Quantizer] = []
    for _, quantizer in quantizers(model):
        if quantizer.config not in kinds:
            kinds.append(quantizer.config)
        elif quantizer.enabled:
            repeated.append(quantizer)
    try:
        torch.set_num_threads(1)
        for quantizer in repeated:
            quantizer.enabled = False
        yield
    finally:
        torch.set_num_threads(threads)
        for quantizer in repeated:
            quantizer.enabled = True


def _kind(module: nn.Conv2d | nn.Linear) -> str:
    if isinstance(module, nn.Linear):
        return f"linear {module.in_features}-{module.out_features}"
    kernel = "x".join(map(str, module.kernel_size))
    stride = f"/{module.stride[0]}" if module.stride[0] != 1 else ""
    groups = f" g{module.groups}" if module.groups != 1 else ""
    return f"conv {kernel}{stride} {module.in_channels}-{module.out_channels}{groups}"
