"""Residual sums in 8 bits, with which onnxruntime computes all convolutions with integers from end to end."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from model.deploy.codes import ActivationCodes, Array
from model.deploy.graph import INPUT, DeployGraph
from model.deploy.nodes import DOMAIN
from model.deploy.onnx_qdq import qdq_model
from utils.errors import UserError

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

METADATA = {"residual": "8 bits"}


def with_integer_sums(graph: DeployGraph, images: Array) -> DeployGraph:
    """The graph with 8-bit quantizers on the addends and the results of residual sums.

    The codes of later layers change a little by it, which a float sum does not do.

    Args:
        graph: of a network with residual connections.
        images: a batch, float32 [N, channels, height, width], normalised; the ranges are the lowest and the highest
            values that it gives.

    Raises:
        UserError: the network has no sums of quantized convolutions.
    """
    from onnx import helper

    names = _sums(graph.model)
    if not names:
        raise UserError(
            "this network has no sums of quantized convolutions; leave the option for 8-bit sums out"
        )
    ranges = _ranges(graph, names, images)
    model, activations = copy.deepcopy(graph.model), dict(graph.activations)
    nodes: list[NodeProto] = []
    renamed: dict[str, str] = {}
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = renamed.get(name, name)
        nodes.append(node)
        for name in set(node.output) & set(names):
            key = f"{name}.sum"
            activations[key] = eight_bits(key, *ranges[name])
            renamed[name] = key
            nodes.append(helper.make_node("Activation", [name], [key], domain=DOMAIN, key=key))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return replace(graph, model=model, activations=activations, metadata=graph.metadata | METADATA)


def eight_bits(name: str, low: float, high: float) -> ActivationCodes:
    """256 levels over a range, with zero among them and an even zero point.

    Example:
        >>> from model.deploy.sums import eight_bits
        >>> codes = eight_bits("x", -1.0, 3.0)
        >>> codes.lowest, codes.highest, round(codes.scale, 4)
        (-64, 191, 0.0157)
    """
    low, high = min(low, 0.0), max(high, 0.0)
    step = max((high - low) / 255, 1e-12)
    zero_point = 2 * round(-low / step / 2)
    step = max(high / (255 - zero_point) if zero_point < 255 else 0.0, -low / max(zero_point, 1), 1e-12)
    scale = float(np.float32(step))
    return ActivationCodes(
        name=name, levels=256, lowest=-zero_point, highest=255 - zero_point, step=scale, scale=scale
    )


def _sums(model: ModelProto) -> list[str]:
    """The tensors that shall have 8 bits: addends and results of sums in which quantized convolutions take part."""
    made = {name: node for node in model.graph.node for name in node.output}
    readers: dict[str, list[NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    varying = {INPUT}  # what depends on the image
    for node in model.graph.node:
        if varying.intersection(node.input):
            varying.update(node.output)

    def quantized(name: str) -> bool:
        node = made.get(name)
        if node is None:
            return False
        if node.op_type == "Relu" or (node.op_type == "Add" and node.input[1] not in varying):
            return quantized(node.input[0])
        weight = made.get(node.input[1]) if node.op_type == "Conv" else None
        return name in found or (weight is not None and weight.op_type == "Weight")

    found: list[str] = []
    for node in model.graph.node:
        if node.op_type != "Add" or not all(name in made and name in varying for name in node.input):
            continue
        if not any(quantized(name) for name in node.input):
            continue
        result = node.output[0]
        following = readers.get(result, [])
        if len(following) == 1 and following[0].op_type == "Relu":
            result = following[0].output[0]
        found += [name for name in (*node.input, result) if name not in found]
    return found


def _ranges(graph: DeployGraph, names: list[str], images: Array) -> dict[str, tuple[float, float]]:
    """The lowest and the highest value of tensors."""
    import onnxruntime
    from onnx import TensorProto, helper

    model = qdq_model(graph)
    for name in names:
        model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    values = session.run(names, {INPUT: images})
    return {
        name: (float(np.min(value)), float(np.max(value)))
        for name, value in zip(names, map(np.asarray, values), strict=True)
    }
