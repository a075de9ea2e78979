"""ONNX with QuantizeLinear and DequantizeLinear (QDQ): integer weights, packed at their true width.

Each form is one that onnxruntime and OpenVINO both compute with integers, and rightly: docs/deploy.md says why.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from model.deploy.bias import roundable_bias
from model.deploy.codes import ActivationCodes, Array, WeightCodes, digits_per_word
from model.deploy.graph import DeployGraph
from model.deploy.nodes import DOMAIN, node_key, tensor_attributes

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

OLDEST_OPSET = 13  # the first with scales for each channel
YOUNG_IR_VERSION = 8  # of later ones, up to 18
IR_VERSION = 7  # of opset 13; onnx's own default is younger than the engines
PRODUCTS = ("Conv", "Gemm", "MatMul")
MOST_LEVELS_BEHIND = 64  # levels behind a sum; a code of more levels changes little
MOST_CODE = 127  # of an int8, and of its negative
SATURATION = 2**15 - 1  # of 16-bit sums of two products


class Builder:
    """Nodes and constants of a graph under construction."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.constants: dict[str, Array] = {}

    def constant(self, name: str, value: Any, kind: Any = None) -> str:
        """A constant, by its name; the same name stands for the same value."""
        self.constants.setdefault(name, np.array(value, kind, order="C"))
        return name

    def add(self, operator: str, inputs: Iterable[str], output: str, **attributes: Any) -> str:
        """A node with one output; returns its name."""
        from onnx import helper

        self.nodes.append(helper.make_node(operator, list(inputs), [output], name=output, **attributes))
        return output


def qdq_model(graph: DeployGraph) -> ModelProto:
    """The network as an ONNX model of standard operators.

    Returns:
        A model of opset 13, or of the oldest one that has its operators. The codes of an activation are the uint8
        tensor `NAME.codes`, its values the tensor `NAME`, with the NAME of the quantizer.
    """
    model = copy.deepcopy(graph.model)
    weights = _roundable_biases(model, graph)
    most_codes = largest_codes(model, graph)
    beside_float = _beside_float(model, graph, most_codes)

    def activation(builder: Builder, node: NodeProto) -> str:
        integer = node.output[0] not in beside_float
        return _activation(builder, graph.activations[node_key(node)], node.input[0], integer)

    def weight(builder: Builder, node: NodeProto) -> str:
        return _weight(builder, weights[node_key(node)], most_codes.get(node.output[0]))

    return complete_model(model, expanded(model, activation, weight), graph.metadata)


Expand = Callable[[Builder, "NodeProto"], str]
"""Adds what stands for a node of the own domain to a builder; returns the name of its output."""


def expanded(model: ModelProto, activation: Expand, weight: Expand) -> Builder:
    """All nodes of a skeleton, those of the own domain replaced by what `activation` and `weight` add."""
    builder = Builder()
    renamed: dict[str, str] = {}
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = renamed.get(name, name)
        if node.domain != DOMAIN:
            builder.nodes.append(node)
        else:
            expand = activation if node.op_type == "Activation" else weight
            renamed[node.output[0]] = expand(builder, node)
    return builder


def _beside_float(model: ModelProto, graph: DeployGraph, most_codes: dict[str, int]) -> set[str]:
    """The tensors that are multiplied by weights that are no integers."""
    made = {node.output[0]: node for node in model.graph.node}
    found = set()
    for node in model.graph.node:
        if node.op_type not in PRODUCTS:
            continue
        weight = made.get(node.input[1])
        if (
            weight is None
            or weight.op_type != "Weight"
            or not integer_weight(graph.weights[node_key(weight)], most_codes.get(node.input[1]))
        ):
            found.update(node.input)
    return found


def integer_layers(graph: DeployGraph, *, strided_points: bool = True) -> int:
    """How many convolutions and linear layers have integers on both sides that engines may multiply.

    Without `strided_points` those with a 1x1 kernel and a stride are left out: OpenVINO 2026.4 runs them in float
    where they come from ONNX (findings/openvino-strided-shortcut.sh), and with integers from its own files.
    """
    made = {node.output[0]: node for node in graph.model.graph.node}
    most_codes = largest_codes(graph.model, graph)
    weights = [
        (made.get(node.input[1]), most_codes.get(node.input[1]))
        for node in graph.model.graph.node
        if node.op_type in PRODUCTS and (strided_points or not _strided_point(node, made, graph))
    ]
    return sum(
        node is not None and node.op_type == "Weight" and integer_weight(graph.weights[node_key(node)], most)
        for node, most in weights
    )


def _strided_point(node: NodeProto, made: dict[str, NodeProto], graph: DeployGraph) -> bool:
    weight = made.get(node.input[1])
    if node.op_type != "Conv" or weight is None or weight.op_type != "Weight":
        return False
    kernel = graph.weights[node_key(weight)].codes.shape[2:]
    return max(kernel) == 1 and max(tensor_attributes(node).get("strides", [1])) > 1


def largest_codes(model: ModelProto, graph: DeployGraph) -> dict[str, int]:
    """The largest uint8 code that meets each weight, by the weight's tensor; those without are multiplied in float."""
    made = {node.output[0]: node for node in model.graph.node}
    found: dict[str, int] = {}
    for node in model.graph.node:
        if node.op_type not in PRODUCTS:
            continue
        source = made.get(node.input[0])
        if source is not None and source.op_type == "Activation":
            codes = graph.activations[node_key(source)]
            if codes.integer:
                found[node.input[1]] = codes.highest + codes.zero_point
    return found


def _roundable_biases(model: ModelProto, graph: DeployGraph) -> dict[str, WeightCodes]:
    """Change the biases that an engine rounds, those between integer weights and a quantizer; returns the weights."""
    from onnx import numpy_helper

    most_codes, weights = largest_codes(model, graph), dict(graph.weights)
    made = {node.output[0]: node for node in model.graph.node}
    readers: dict[str, list[NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        source = made.get(node.input[1]) if node.op_type == "Conv" and len(node.input) == 3 else None
        if source is None or source.op_type != "Weight" or len(readers[node.input[2]]) != 1:
            continue
        weight, most_code = graph.weights[node_key(source)], most_codes.get(node.input[1])
        behind = readers.get(node.output[0], [])
        if len(behind) == 1 and behind[0].op_type == "Relu":
            behind = readers.get(behind[0].output[0], [])
        if len(behind) != 1 or behind[0].op_type != "Activation":
            continue
        if most_code is None or not integer_weight(weight, most_code):
            continue
        codes = graph.activations[node_key(behind[0])]
        if not codes.integer or codes.step is None or codes.levels > MOST_LEVELS_BEHIND:
            continue
        given = graph.activations[node_key(made[node.input[0]])]
        largest = max(abs(given.lowest), abs(given.highest))
        most = np.abs(weight.codes).reshape(len(weight.codes), -1).sum(axis=1) * largest
        quantum = np.broadcast_to(weight.scale.reshape(-1) * given.scale, most.shape)
        bias = numpy_helper.to_array(constants[node.input[2]])
        rounded, stretch = roundable_bias(bias, quantum, most, _code_factor(weight, most_code), codes)
        weights[node_key(source)] = weight.times(stretch)
        constants[node.input[2]].CopyFrom(numpy_helper.from_array(rounded, node.input[2]))
    return weights


def _code_factor(weight: WeightCodes, largest_code: int) -> int:
    """The factor on stored codes: engines round the bias to multiples of the product of both scales."""
    most = min(MOST_CODE, SATURATION // max(1, 2 * largest_code))
    return 1 << max(1, most // max(1, int(np.abs(weight.codes).max()))).bit_length() - 1


def _activation(builder: Builder, codes: ActivationCodes, x: str, integer: bool) -> str:
    """QuantizeLinear, Clip and DequantizeLinear in uint8.

    In front of weights that are no integers the codes are decoded by arithmetic instead: onnxruntime would quantize the
    weight of a convolution between a DequantizeLinear and a QuantizeLinear to 8 bits, unasked.
    """
    name = codes.name
    if not codes.integer:
        return builder.add("Identity", [x], name)
    zero = builder.constant(f"zero_point_{codes.zero_point}", codes.zero_point, np.uint8)
    step = builder.constant(f"{name}.step", 1.0 if codes.step is None else codes.step, np.float32)
    scale = builder.constant(f"{name}.scale", codes.scale, np.float32)
    low, high = codes.lowest + codes.zero_point, codes.highest + codes.zero_point
    clipped = (low, high) != (0, 255)
    result = builder.add("QuantizeLinear", [x, step, zero], f"{name}.rounded" if clipped else f"{name}.codes")
    if clipped:
        ends = [builder.constant(f"uint8_{end}", end, np.uint8) for end in (low, high)]
        result = builder.add("Clip", [result, *ends], f"{name}.codes")
    if integer:
        return builder.add("DequantizeLinear", [result, scale, zero], name)
    result = builder.add("Cast", [result], f"{name}.float", to=1)
    if codes.zero_point:
        shift = builder.constant(f"float_{codes.zero_point}", codes.zero_point, np.float32)
        result = builder.add("Sub", [result, shift], f"{name}.shifted")
    return builder.add("Mul", [result, scale], name)


def integer_weight(weight: WeightCodes, largest_code: int | None) -> bool:
    """Whether a weight is multiplied as int8 by activations of at most the uint8 code `largest_code`.

    CPUs without VNNI sum two products of a uint8 and an int8 in 16 bits. Weights whose sums could overflow there are
    multiplied in float, and so are weights of activations that are no integers.
    """
    most = int(np.abs(weight.codes).max())
    fits = largest_code is not None and most <= MOST_CODE and 2 * largest_code * most <= SATURATION
    return weight.scaled and fits


def _weight(builder: Builder, weight: WeightCodes, largest_code: int | None) -> str:
    """Unpack the digits by arithmetic that engines compute once, when they load the file."""
    name = weight.name
    if weight.table is not None:
        return _looked_up(builder, weight)
    if largest_code is None or not integer_weight(weight, largest_code):
        codes = _unpacked(builder, weight, 1)
        value = builder.add("Cast", [codes], f"{name}.float", to=1)
        ends = {"scale": weight.scale} | ({} if weight.offset is None else {"offset": weight.offset})
        for (part, constant), operator in zip(ends.items(), ("Mul", "Add"), strict=False):
            last = part == list(ends)[-1]
            constant = builder.constant(f"{name}.{part}", constant, np.float32)
            value = builder.add(operator, [value, constant], name if last else f"{name}.{part}d")
        return value
    factor = _code_factor(weight, largest_code)
    codes = builder.add("Cast", [_unpacked(builder, weight, factor)], f"{name}.codes", to=3)
    scale = (weight.scale / np.float32(factor)).astype(np.float32)
    if scale.size == 1:
        return builder.add(
            "DequantizeLinear", [codes, builder.constant(f"{name}.scale", scale.reshape(()))], name
        )
    constant = builder.constant(f"{name}.scale", scale.reshape(-1))
    return builder.add("DequantizeLinear", [codes, constant], name, axis=0)


def _unpacked(builder: Builder, weight: WeightCodes, factor: int) -> str:
    """The int32 codes times `factor`."""
    value = _digits(builder, weight)
    if weight.gap * factor != 1:
        gap = builder.constant(f"int32_{weight.gap * factor}", weight.gap * factor, np.int32)
        value = builder.add("Mul", [value, gap], f"{weight.name}.spread")
    if weight.lowest:
        lowest = builder.constant(f"int32_{-weight.lowest * factor}", -weight.lowest * factor, np.int32)
        value = builder.add("Sub", [value, lowest], f"{weight.name}.shifted")
    return value


def _digits(builder: Builder, weight: WeightCodes) -> str:
    """The digits 0 .. base - 1, int32 [the shape of the weight], from words that hold several each."""
    name, base = weight.name, weight.base
    count, size = digits_per_word(base)
    words = packed_words(weight.digits, base)
    value = builder.constant(f"{name}.packed", words.reshape(-1, 1))
    if size == 1:
        value = builder.add("Cast", [value], f"{name}.words", to=6)
    if count > 1:
        powers = builder.constant(f"powers_{base}", base ** np.arange(count).reshape(1, -1), np.int32)
        modulus = builder.constant(f"int32_{base}", base, np.int32)
        value = builder.add("Div", [value, powers], f"{name}.quotients")
        value = builder.add("Mod", [value, modulus], f"{name}.digits")
    total = weight.digits.size
    if words.size * count != total:
        flat = builder.constant("flat", [-1], np.int64)
        value = builder.add("Reshape", [value, flat], f"{name}.flat")
        zero, end = (
            builder.constant("int64_0", [0], np.int64),
            builder.constant(f"int64_{total}", [total], np.int64),
        )
        value = builder.add("Slice", [value, zero, end], f"{name}.used")
    shape = builder.constant(f"shape_{'_'.join(map(str, weight.codes.shape))}", weight.codes.shape, np.int64)
    return builder.add("Reshape", [value, shape], f"{name}.shaped")


def packed_words(digits: Array, base: int) -> Array:
    """Digits 0 .. base - 1 in their order as words, uint8 or int32; a word's first digit is its lowest.

    Example:
        >>> import numpy as np
        >>> from model.deploy.onnx_qdq import packed_words
        >>> packed_words(np.array([1, 0, 2, 2, 1, 1]), 3)  # 1 + 2 * 9 + 2 * 27 + 1 * 81, and 1
        array([154,   1], dtype=uint8)
    """
    count, size = digits_per_word(base)
    digits = digits.reshape(-1).astype(np.int64)
    digits = np.concatenate([digits, np.zeros(-digits.size % count, np.int64)]).reshape(-1, count)
    return (digits * base ** np.arange(count)).sum(axis=1).astype(np.uint8 if size == 1 else np.int32)


def _looked_up(builder: Builder, weight: WeightCodes) -> str:
    """The entries of the table of levels."""
    table, rows = used_levels(weight)
    index = _digits(builder, weight)
    if rows is not None:
        starts = builder.constant(f"{weight.name}.rows", rows * weight.base, np.int32)
        index = builder.add("Add", [index, starts], f"{weight.name}.index")
    entries = builder.constant(f"{weight.name}.table", table.reshape(-1), np.float32)
    return builder.add("Gather", [entries, index], weight.name)


def used_levels(weight: WeightCodes) -> tuple[Array, Array | None]:
    """The levels of the digits, float32 [rows, base], and the row of each weight; None where there is one row."""
    codes = weight.lowest + weight.gap * np.arange(weight.base)
    if weight.table is not None:
        table, rows = weight.table[:, np.minimum(codes, weight.table.shape[1] - 1)], weight.rows
    else:
        offset = np.zeros(1, np.float32) if weight.offset is None else weight.offset
        scale, offset = np.broadcast_arrays(weight.scale.reshape(-1, 1), offset.reshape(-1, 1))
        table = codes.astype(np.float32) * scale + offset
        rows = np.arange(len(table)).reshape((-1,) + (1,) * (weight.codes.ndim - 1))
    return table.astype(np.float32), rows if len(table) > 1 else None


def complete_model(model: ModelProto, builder: Builder, metadata: dict[str, str]) -> ModelProto:
    """The model with the builder's nodes and constants, of the oldest opset that has its operators."""
    from onnx import helper, numpy_helper

    graph = model.graph
    nodes = _needed_nodes(builder.nodes, [output.name for output in graph.output])
    read = {name for node in nodes for name in node.input}
    constants = [tensor for tensor in graph.initializer if tensor.name in read]
    constants += [
        numpy_helper.from_array(value, name) for name, value in builder.constants.items() if name in read
    ]
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(nodes)
    graph.initializer.extend(constants)
    del model.metadata_props[:], model.functions[:]
    helper.set_model_props(model, metadata)
    for item in (*graph.node, *graph.input, *graph.output, graph):
        del item.metadata_props[:]
    model.producer_name, model.producer_version, model.doc_string = "lowbit", "", ""
    return in_oldest_opset(model)


def _needed_nodes(nodes: list[NodeProto], outputs: list[str]) -> list[NodeProto]:
    """The nodes that an output depends on, in their order."""
    wanted, kept = set(outputs), []
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            kept.append(node)
            wanted.update(node.input)
    return kept[::-1]


def in_oldest_opset(model: ModelProto) -> ModelProto:
    """The model marked as of the oldest opset from 13 on that defines its operators as the present one does."""
    from onnx import checker, helper

    present = next(item.version for item in model.opset_import if item.domain == "")
    domains = sorted({node.domain for node in model.graph.node if node.domain})
    old = copy.deepcopy(model)
    for node in old.graph.node:
        _old_form(old, node)
    read = {name for node in old.graph.node for name in node.input}
    kept = [tensor for tensor in old.graph.initializer if tensor.name in read]
    del old.graph.initializer[:]
    old.graph.initializer.extend(kept)
    for opset in range(OLDEST_OPSET, present + 1):
        found = old if opset < present else model
        del found.opset_import[:]
        found.opset_import.extend(
            helper.make_opsetid(domain, 1 if domain else opset) for domain in ("", *domains)
        )
        found.ir_version = IR_VERSION if opset == OLDEST_OPSET else YOUNG_IR_VERSION
        try:
            checker.check_model(found, full_check=True)
        except (checker.ValidationError, RuntimeError):
            if opset == present:
                raise
            continue
        return found
    raise AssertionError("unreachable")


def _old_form(model: ModelProto, node: NodeProto) -> None:
    """Write a node as opset 13 does, where that differs only in writing."""
    from onnx import helper, numpy_helper

    attributes = tensor_attributes(node)
    if node.op_type in ("ReduceMean", "ReduceMax", "ReduceMin") and len(node.input) == 2:
        axes = next((t for t in model.graph.initializer if t.name == node.input[1]), None)
        if axes is not None and not attributes.get("noop_with_empty_axes"):
            del node.input[1:]
            node.attribute.append(helper.make_attribute("axes", numpy_helper.to_array(axes).tolist()))
            _drop(node, "noop_with_empty_axes")
    if node.op_type == "Reshape" and attributes.get("allowzero"):
        shape = next((t for t in model.graph.initializer if t.name == node.input[1]), None)
        if shape is not None and (numpy_helper.to_array(shape) != 0).all():
            _drop(node, "allowzero")
    if node.op_type == "Reshape" and attributes.get("allowzero") == 0:
        _drop(node, "allowzero")
    if node.op_type == "Shape" and attributes.get("start", 0) == 0 and "end" not in attributes:
        _drop(node, "start")
    if node.op_type == "BatchNormalization" and not attributes.get("training_mode"):
        _drop(node, "training_mode")


def _drop(node: NodeProto, name: str) -> None:
    for attribute in [item for item in node.attribute if item.name == name]:
        node.attribute.remove(attribute)
