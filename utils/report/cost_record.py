"""The cost of a network as a record: shapes, parameters, multiply-accumulates, bit operations, weight size."""

from __future__ import annotations

import math
from dataclasses import dataclass

from utils.config.layer_bits import FULL_BITS
from utils.config.layer_bits import TERNARY as TERNARY_WORD
from utils.text import format_table

TERNARY = 3  # levels


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """One convolution or linear layer for one image.

    Attributes:
        name: in the network.
        kind: its class and geometry.
        output: shape of its output without the batch.
        weights: number of weights.
        macs: multiply-accumulate operations.
        weight: how the weight is quantized, in words; empty in full precision.
        activation: the same of the input.
        result: how its output is quantized; empty in full precision.
        weight_bits: bits of a stored weight.
        activation_bits: bits of an input value.
        weight_levels: levels of the weight; None in full precision.
        activation_levels: the same of the input.
        inputs: number of input values of an image; 0 where it is not known.
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
    weight_levels: int | None = None
    activation_levels: int | None = None
    inputs: int = 0

    @property
    def bit_operations(self) -> int:
        """MACs times the bits of both factors."""
        return self.macs * self.weight_bits * self.activation_bits

    @property
    def weight_bytes(self) -> int:
        """Bytes of its weights at their bits."""
        return stored_bytes(self.weights, self.weight_bits)

    @property
    def input_bytes(self) -> int:
        """Bytes of its input at its bits, for one image."""
        return stored_bytes(self.inputs, self.activation_bits)


@dataclass(frozen=True, kw_only=True)
class MatmulCost:
    """One product of two quantized activations for one image.

    Attributes:
        kind: how its factors are quantized, in words.
        macs: multiply-accumulate operations.
        bits: of a value of either factor.
    """

    kind: str
    macs: int
    bits: int


@dataclass(frozen=True, kw_only=True)
class Cost:
    """A network's layers and totals.

    Attributes:
        layers: the convolutions and linear layers, in the order they run.
        parameters: number of all parameters.
        note: a line about the ranges of its quantizers before training; empty for none.
        matmuls: the products of attention whose factors are quantized; they are not among the layers, and in no total,
            since products in full precision are not counted either.
    """

    layers: tuple[LayerCost, ...]
    parameters: int
    note: str = ""
    matmuls: tuple[MatmulCost, ...] = ()

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
        return sum(layer.weight_bytes for layer in self.layers)

    @property
    def float_weight_bytes(self) -> int:
        """Bytes of the same weights in float32."""
        return sum(layer.weights * 4 for layer in self.layers)

    @property
    def bits(self) -> str:
        """The quantized layers' weight and activation bits, such as 2/2 or ternary/4; 32/32 in full precision."""
        low = [layer for layer in self.layers if layer.weight or layer.activation or layer.result]
        if not low:
            return f"{FULL_BITS}/{FULL_BITS}"
        weight = {(layer.weight_bits, layer.weight_levels == TERNARY) for layer in low}
        activation = {(layer.activation_bits, layer.activation_levels == TERNARY) for layer in low}
        words = [
            [
                TERNARY_WORD if ternary else str(bits)
                for bits, ternary in sorted(found, key=lambda one: (one[0], not one[1]))
            ]
            for found in (weight, activation)
        ]
        return "/".join(map("-".join, words))

    @property
    def is_mixed(self) -> bool:
        """Whether its quantized layers have different bits."""
        low = [layer for layer in self.layers if layer.weight or layer.activation]
        return len({(layer.weight_levels, layer.activation_levels) for layer in low}) > 1

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
        matmuls = [
            f"beside the total, {len(products)} products of attention with both factors quantized: {kind}; "
            f"{sum(each.macs for each in products):,} MACs, "
            f"{sum(each.macs * each.bits**2 for each in products):,} bit operations"
            for kind in dict.fromkeys(each.kind for each in self.matmuls)
            if (products := [each for each in self.matmuls if each.kind == kind])
        ]
        return "\n".join([format_table(head, rows), self.totals(), *matmuls, *[self.note] * bool(self.note)])

    def bits_table(self) -> str:
        """The bits of each layer with its size and its bit operations as text, a line each, and a line of totals."""
        head = ("layer", "weights", "MACs", "weight bits", "input bits", "KiB", "input KiB", "bit operations")
        rows = [
            (
                layer.name,
                f"{layer.weights:,}",
                f"{layer.macs:,}",
                TERNARY_WORD if layer.weight_levels == TERNARY else str(layer.weight_bits),
                TERNARY_WORD if layer.activation_levels == TERNARY else str(layer.activation_bits),
                f"{layer.weight_bytes / 1024:,.1f}",
                f"{layer.input_bytes / 1024:,.1f}",
                f"{layer.bit_operations:,}",
            )
            for layer in self.layers
        ]
        return f"{format_table(head, rows)}\n{self.totals()}"

    def totals(self) -> str:
        """One line of totals."""
        return (
            f"total: {self.parameters:,} parameters, {self.macs:,} MACs, {self.bit_operations:,} bit "
            f"operations, weights {self.weight_bytes / 1024:.1f} KiB "
            f"({self.float_weight_bytes / 1024:.1f} KiB in float32)"
        )


def stored_bits(levels: int) -> int:
    """Bits that hold a code of `levels` levels; ternary takes 2."""
    return math.ceil(math.log2(levels))


def stored_bytes(values: int, bits: int) -> int:
    """Bytes of values of so many bits, packed without gaps."""
    return -(-values * bits // 8)
