"""OpenVINO's IR: weights at their true width, binary convolutions where they are exact."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from model.deploy.codes import ActivationCodes, Array, WeightCodes
from model.deploy.graph import DeployGraph
from model.deploy.nodes import DOMAIN, node_key
from model.deploy.onnx_qdq import integer_weight, largest_codes, used_levels
from model.deploy.packages import needed

if TYPE_CHECKING:
    from openvino import Model

BINARY_CHANNELS = 8  # a divisor of the input channels that BinaryConvolution needs, or else it is wrong
CONVOLUTION_ATTRIBUTES = ("strides", "pads_begin", "pads_end", "dilations")


def openvino_model(graph: DeployGraph) -> Model:
    """The network as a model of OpenVINO, whose quantized tensors have the names of their quantizers.

    Batches have any size, but in networks with binary convolutions 1: BinaryConvolution takes fixed shapes alone.

    Raises:
        UserError: OpenVINO is not installed.
    """
    needed("openvino")
    import openvino
    from openvino.frontend.onnx import ConversionExtension

    skeleton = copy.deepcopy(graph.model)
    renamed = {node.output[0]: node_key(node) for node in skeleton.graph.node if node.domain == DOMAIN}
    for node in skeleton.graph.node:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                names[i] = renamed.get(name, name)
    most_codes = largest_codes(skeleton, graph)

    def activation(context: Any) -> list[Any]:
        codes = graph.activations[context.get_attribute("key")]
        return [_activation(codes, context.get_input(0)).output(0)]

    def weight(context: Any) -> list[Any]:
        codes = graph.weights[context.get_attribute("key")]
        return [_weight(codes, integer_weight(codes, most_codes.get(codes.name))).output(0)]

    core = openvino.Core()
    core.add_extension(ConversionExtension("Activation", DOMAIN, activation))
    core.add_extension(ConversionExtension("Weight", DOMAIN, weight))
    model = core.read_model(skeleton.SerializeToString())
    if _binary_convolutions(model, graph):
        shape = model.input().get_partial_shape()
        shape[0] = 1
        model.reshape(shape)
    for name, value in graph.metadata.items():
        model.set_rt_info(value, ["lowbit", name])
    return model


def write_openvino(graph: DeployGraph, path: Path) -> None:
    """Write the model to `path`, which ends in .xml, and its weights to the .bin beside it."""
    model = openvino_model(graph)
    import openvino

    openvino.save_model(model, path, compress_to_fp16=False)


def _activation(codes: ActivationCodes, x: Any) -> Any:
    """Clamp and a FakeQuantize of 256 levels, the only number that is exact and computed in 8 bits."""
    from openvino import opset13

    if not codes.integer:
        return opset13.multiply(x, np.float32(1))  # folded, and keeps the tensor's name
    step = 1.0 if codes.step is None else codes.step
    clamped = opset13.clamp(x, codes.lowest * step, codes.highest * step)
    ends = np.array([-codes.zero_point, 255 - codes.zero_point], np.float32)
    inside, outside = ends * np.float32(step), ends * np.float32(codes.scale)
    return opset13.fake_quantize(clamped, inside[0], inside[1], outside[0], outside[1], 256)


def _weight(weight: WeightCodes, integer: bool) -> Any:
    """The digits in as few bits as they need, and the arithmetic that makes weights of them."""
    from openvino import Type, opset13

    bits = next(bits for bits in (1, 2, 3, 4, 6, 8, 16) if 2**bits >= weight.base)
    if weight.scaled and integer and bits == 8:  # in 8 bits digits would stay float, codes do not
        codes = opset13.constant(weight.codes.astype(np.int8), dtype=Type.i8)
        return opset13.multiply(opset13.convert(codes, "f32"), weight.scale)
    digits = opset13.constant(
        weight.digits.astype(np.uint16 if bits == 16 else np.uint8), dtype=getattr(Type, f"u{bits}")
    )
    if weight.scaled and integer:
        value = opset13.convert(digits, "i32")
        if weight.gap != 1:
            value = opset13.multiply(value, np.int32(weight.gap))
        if weight.lowest:
            value = opset13.add(value, np.int32(weight.lowest))
        value = opset13.convert(opset13.convert(value, "i8"), "f32")
        return opset13.multiply(value, weight.scale)
    # Looked up, not multiplied, where the product would be computed with integers that overflow.
    table, rows = used_levels(weight)
    index = opset13.convert(digits, "i32")
    if rows is not None:
        index = opset13.add(index, (rows * weight.base).astype(np.int32))
    return opset13.gather(table.reshape(-1), index, np.int32(0))


def _binary_convolutions(model: Model, graph: DeployGraph) -> int:
    """Replace the convolutions of signs by signs that BinaryConvolution computes rightly; returns how many."""
    from openvino import Type, opset13

    replaced = 0
    for node in model.get_ordered_ops():
        if node.get_type_name() != "Convolution":
            continue
        sources = [_name(node.input_value(i)) for i in (0, 1)]
        activation, weight = graph.activations.get(sources[0]), graph.weights.get(sources[1])
        if activation is None or weight is None or not fits_binary(activation, weight):
            continue
        zero, one, scale = np.float32(0), np.float32(1), np.float32(activation.scale)
        clamp = node.input_value(0).get_node().input_value(0).get_node()
        node.input_value(0).get_tensor().set_names(set())
        signs = opset13.multiply(clamp.input_value(0), scale)
        signs.output(0).get_tensor().set_names({activation.name})
        # Its ends of the input are equal: only then are bits written, which else a slow copy makes.
        bits = opset13.fake_quantize(signs, zero, zero, zero, one, 2)
        attributes = {name: node.get_attributes()[name] for name in CONVOLUTION_ATTRIBUTES}
        packed = opset13.constant(low_bit_first(weight.digits), dtype=Type.u1)
        sums = opset13.binary_convolution(
            bits,
            packed,
            attributes["strides"],
            attributes["pads_begin"],
            attributes["pads_end"],
            attributes["dilations"],
            "xnor-popcount",
            0.0,
        )
        factor = (weight.scale.reshape(-1) * scale).reshape(1, -1, 1, 1)
        node.output(0).replace(opset13.multiply(sums, factor).output(0))
        replaced += 1
    return replaced


def fits_binary(activation: ActivationCodes, weight: WeightCodes) -> bool:
    """Whether BinaryConvolution computes a layer exactly: signs by signs of images, with channels in whole bytes."""
    signs = weight.scaled and (weight.base, weight.gap, weight.lowest) == (2, 2, -1)
    images = weight.codes.ndim == 4 and weight.codes.shape[1] % BINARY_CHANNELS == 0
    return activation.signs and signs and images


def low_bit_first(digits: Array) -> Array:
    """Bits in another order: OpenVINO packs high bits first, and its BinaryConvolution reads low bits first."""
    return digits.astype(np.uint8).reshape(-1, 8)[:, ::-1].reshape(digits.shape)


def _name(output: Any) -> str:
    """The name of a quantized tensor."""
    return next((name for name in output.get_names() if name.endswith(("activation", "weight"))), "")
