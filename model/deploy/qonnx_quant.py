"""QONNX, for FPGA tools: `Quant` and `BipolarQuant` between float operators."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import numpy as np

from model.deploy.codes import ActivationCodes, WeightCodes
from model.deploy.graph import DeployGraph
from model.deploy.nodes import node_key
from model.deploy.onnx_qdq import Builder, complete_model, expanded

if TYPE_CHECKING:
    from onnx import ModelProto

QONNX = "qonnx.custom_op.general"


def qonnx_model(graph: DeployGraph) -> ModelProto:
    """The network in QONNX; the output of each quantizer of an activation has the quantizer's name.

    Zero points are 0, since qonnx infers no datatype with others: an even number of levels on both sides of zero has
    odd codes, and takes a bit more. A batch is one image, since qonnx takes fixed shapes alone.
    """
    model = copy.deepcopy(graph.model)
    builder = expanded(
        model,
        lambda builder, node: _activation(builder, graph.activations[node_key(node)], node.input[0]),
        lambda builder, node: _weight(builder, graph.weights[node_key(node)]),
    )
    made = complete_model(model, builder, graph.metadata)
    for value in (*made.graph.input, *made.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    return made


def quant_bits(lowest: int, highest: int) -> tuple[int, bool, bool]:
    """The bits of a `Quant` that holds the codes, whether it is signed, and whether it is narrow.

    Example:
        >>> from model.deploy.qonnx_quant import quant_bits
        >>> [quant_bits(*ends) for ends in ((0, 3), (0, 2), (-1, 1), (-2, 1), (-3, 3))]
        [(2, False, False), (2, False, False), (2, True, True), (2, True, False), (3, True, True)]
    """
    if lowest >= 0:
        return max(1, highest.bit_length()), False, False
    bits = max(highest.bit_length(), (-lowest - 1).bit_length()) + 1
    return max(2, bits), True, lowest > -(2 ** (max(2, bits) - 1))


def _activation(builder: Builder, codes: ActivationCodes, x: str) -> str:
    name, scale = codes.name, builder.constant(f"{codes.name}.scale", codes.scale, np.float32)
    if not codes.integer:
        return builder.add("Identity", [x], name)
    if codes.signs:
        return builder.add("BipolarQuant", [x, scale], name, domain=QONNX)
    bits, signed, narrow = quant_bits(codes.lowest, codes.highest)
    if codes.step is None or codes.step != codes.scale:
        ratio = codes.scale if codes.step is None else codes.scale / codes.step
        ratio_name = builder.constant(f"{name}.ratio", ratio, np.float32)
        x = builder.add("Mul", [x, ratio_name], f"{name}.scaled")
    top = 2 ** (bits - signed) - 1
    bottom = -(2 ** (bits - 1)) + narrow if signed else 0
    if (bottom, top) != (codes.lowest, codes.highest):
        ends = [
            builder.constant(f"{name}.{part}", code * codes.scale, np.float32)
            for part, code in (("low", codes.lowest), ("high", codes.highest))
        ]
        x = builder.add("Clip", [x, *ends], f"{name}.clipped")
    return _quant(builder, x, scale, (bits, signed, narrow), name)


def _weight(builder: Builder, weight: WeightCodes) -> str:
    values = builder.constant(f"{weight.name}.values", weight.values(), np.float32)
    if not weight.scaled:
        return builder.add("Identity", [values], weight.name)
    scale = builder.constant(f"{weight.name}.scale", weight.scale, np.float32)
    if (weight.base, weight.gap, weight.lowest) == (2, 2, -1):
        return builder.add("BipolarQuant", [values, scale], weight.name, domain=QONNX)
    return _quant(builder, values, scale, quant_bits(weight.lowest, int(weight.codes.max())), weight.name)


def _quant(builder: Builder, x: str, scale: str, form: tuple[int, bool, bool], output: str) -> str:
    bits, signed, narrow = form
    zero = builder.constant("zero", 0, np.float32)
    width = builder.constant(f"bits_{bits}", bits, np.float32)
    return builder.add(
        "Quant",
        [x, scale, zero, width],
        output,
        domain=QONNX,
        signed=int(signed),
        narrow=int(narrow),
        rounding_mode="ROUND",
    )
