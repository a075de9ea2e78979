"""Offsets of activations, moved into the biases beside them, so that engines multiply integers alone.

With values s q + b for integer codes q a layer computes sum(w (s q + b)) = s sum(w q) + b sum(w): the offset is part
of the layer's bias. The sum runs over all weights, at the border too, if padded places have values like all others. So
they have: zeros in front of the quantizer become the code 0, and convolutions pad with that.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from model.deploy.codes import ActivationCodes, Array, WeightCodes
from model.deploy.nodes import initializers, node_key, tensor_attributes

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

OFFSETS = "offsets"  # the name in the metadata


def offset_metadata(activations: dict[str, ActivationCodes]) -> dict[str, str]:
    """What a file says of offsets: a JSON text of name -> what is to be added to the tensor of that name."""
    found = {name: float(np.float32(codes.offset)) for name, codes in activations.items() if codes.offset}
    return {OFFSETS: json.dumps(found)} if found else {}


def place_offsets(
    model: ModelProto, activations: dict[str, ActivationCodes], weights: dict[str, WeightCodes]
) -> None:
    """Change a graph so that its nodes `Activation` give codes times scales.

    Args:
        model: the graph, with nodes `Activation` and `Weight`, whose activations have their true values.
        activations: by the attribute `key`; codes that cannot occur are taken away.
        weights: by the attribute `key`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from model.convert import quantize
        >>> from model.deploy.graph import deploy_graph
        >>> from model.deploy.nodes import initializers
        >>> from model.quant import QuantConfig, QuantizerConfig
        >>> network = nn.Sequential(nn.Linear(2, 1))
        >>> parts = {tag: QuantizerConfig(tag=tag, enable=True, method="lsqplus", levels=4) for tag in ("fm", "wt")}
        >>> _ = quantize(network, QuantConfig(**parts, first_last=True))
        >>> with torch.no_grad():  # weights of +1 and levels of -0.25, 0.75, 1.75 and 2.75
        ...     _ = network[0].weight.fill_(1), network[0].bias.fill_(0)
        ...     quantizer = network[0].quant_activation
        ...     _ = quantizer.offset.fill_(-0.25), quantizer.clip_val.fill_(3)
        >>> graph = deploy_graph(network, (2,))
        >>> graph.activations["0.quant_activation"].offset
        -0.25
        >>> initializers(graph.model)["logits.offset_bias"]
        array([-0.5], dtype=float32)
    """
    for node in [node for node in model.graph.node if node.op_type == "Activation"]:
        codes = activations[node_key(node)]
        moved = codes.zero_to_zero and _pad_behind(model, node, codes, weights)
        source = _maker(model, node.input[0])
        behind_relu = source is not None and source.op_type == "Relu"
        if codes.offset and codes.highest > 0 and behind_relu and codes.zero_to_zero:
            # None of the codes below that of zero occurs; onnxruntime needs zero as the lowest one behind a ReLU.
            codes = activations[node_key(node)] = replace(codes, lowest=max(codes.lowest, 0))
        if codes.offset:
            _shift_input(model, node, codes, weights)
            _add_behind(model, node, codes, weights, padded_by_zero=not moved)


def _maker(model: ModelProto, name: str) -> NodeProto | None:
    return next((node for node in model.graph.node if name in node.output), None)


def _readers(model: ModelProto, name: str) -> list[NodeProto]:
    """The nodes that read a tensor, each as often as it does."""
    return [node for node in model.graph.node for read in node.input if read == name]


def _alone(model: ModelProto, node: NodeProto) -> bool:
    """Whether one node reads what a node makes."""
    return len(_readers(model, node.output[0])) == 1


def _unpadded(convolution: NodeProto) -> bool:
    found = tensor_attributes(convolution)
    return not any(found.get("pads", ())) and found.get("auto_pad", b"NOTSET") == b"NOTSET"


def _pad_behind(
    model: ModelProto, node: NodeProto, codes: ActivationCodes, weights: dict[str, WeightCodes]
) -> bool:
    """Let the convolutions behind a quantizer pad, instead of a node in front of it; returns whether they do.

    They pad with the code 0, whose value is the offset where that becomes part of their bias, and otherwise zero.
    """
    from onnx import helper

    pad, readers = _maker(model, node.input[0]), _readers(model, node.output[0])
    around = None if pad is None or not _alone(model, pad) else _zeros_around(model, pad)
    if (
        pad is None
        or around is None
        or not readers
        or not all(
            reader.op_type == "Conv"
            and reader.input[0] == node.output[0]
            and _unpadded(reader)
            and (not codes.offset or _foldable(model, reader, node.output[0], weights) is not None)
            for reader in readers
        )
    ):
        return False
    for reader in readers:
        for old in [item for item in reader.attribute if item.name == "pads"]:
            reader.attribute.remove(old)
        reader.attribute.append(helper.make_attribute("pads", around))
    for stale in [value for value in model.graph.value_info if value.name in (*pad.output, *node.output)]:
        model.graph.value_info.remove(stale)  # it tells the size with padding
    node.input[0] = pad.input[0]
    model.graph.node.remove(pad)
    return True


def _zeros_around(model: ModelProto, pad: NodeProto) -> list[int] | None:
    """The zeros that a node adds around height and width, as a convolution takes them; None: it does anything else."""
    if pad.op_type != "Pad":
        return None
    constants, (_, pads_name, value_name, axes) = initializers(model), [*pad.input, "", ""][:4]
    value = constants.get(value_name, None if value_name else np.zeros(1))
    pads = constants.get(pads_name)
    if tensor_attributes(pad).get("mode", b"constant") != b"constant" or axes or value is None or value.any():
        return None
    if pads is None or len(pads) != 8 or pads.min() < 0 or pads[[0, 1, 4, 5]].any():
        return None
    around = pads[[2, 3, 6, 7]].tolist()
    # Else `verify` could not tell which values are those of the padding.
    return around if around[:2] == around[2:] else None


def _shift_input(
    model: ModelProto, node: NodeProto, codes: ActivationCodes, weights: dict[str, WeightCodes]
) -> None:
    """Subtract the shift from what a quantizer gets: in the bias in front, else by a node.

    Behind a ReLU, too: values below zero have the code 0, whether they are set to zero before or after the shift.
    """
    source = _maker(model, node.input[0])
    if source is not None and source.op_type == "Relu" and _alone(model, source):
        source = _maker(model, source.input[0]) if codes.zero_to_zero else None
    if source is not None and _alone(model, source):
        count = _outputs(model, source, weights)
        if count:
            _add_to_bias(model, source, np.full(count, -codes.shift))
            return
    constant = _new_constant(model, f"{codes.name}.shift", np.array(codes.shift))
    shifted = f"{codes.name}.shifted_input"
    _insert(model, _place(model, node), "Sub", [node.input[0], constant], shifted)
    node.input[0] = shifted


def _add_behind(
    model: ModelProto,
    node: NodeProto,
    codes: ActivationCodes,
    weights: dict[str, WeightCodes],
    *,
    padded_by_zero: bool,
) -> None:
    """Add the offset to what a quantizer gives: in the biases behind it, else by a node.

    With `padded_by_zero` places that a convolution pads have the value zero, not that of the code 0.
    """
    name, others = node.output[0], []
    for reader in _readers(model, name):
        weight = _foldable(model, reader, name, weights)
        if weight is not None and (_unpadded(reader) or not padded_by_zero):
            _add_to_bias(model, reader, codes.offset * _values(weight).reshape(len(weight.codes), -1).sum(1))
        elif weight is None or not _add_by_place(model, reader, weight, codes.offset):
            others.append(reader)
    if not others:
        return
    constant = _new_constant(model, f"{codes.name}.offset", np.array(codes.offset))
    whole = f"{codes.name}.with_offset"
    for reader in others:
        for i, read in enumerate(reader.input):
            reader.input[i] = whole if read == name else read
    _insert(model, _place(model, others[0]), "Add", [name, constant], whole)


def _foldable(
    model: ModelProto, node: NodeProto, name: str, weights: dict[str, WeightCodes]
) -> WeightCodes | None:
    """The weight of a layer that multiplies `name` by integers and has a constant bias; None for another node."""
    weight = _weight(model, node, weights) if _bias(model, node) is not None else None
    plain = node.input[0] == name and name not in node.input[1:]
    return weight if plain and weight is not None and weight.scaled else None


def _values(weight: WeightCodes) -> Array:
    return weight.values().astype(np.float64)


def _add_by_place(model: ModelProto, node: NodeProto, weight: WeightCodes, offset: float) -> bool:
    """Add to what a convolution gives the offset times the weights that meet the image, unless its size is unknown.

    Places away from the border are alike, so that few rows and columns of sums stand for all. Returns whether it could.
    """
    from onnx import numpy_helper

    sizes, found = _size(model, node.input[0]), tensor_attributes(node)
    if sizes is None or found.get("auto_pad", b"NOTSET") != b"NOTSET":
        return False
    kernel, pads = weight.codes.shape[2:], found["pads"]
    strides, dilations = found.get("strides", [1, 1]), found.get("dilations", [1, 1])
    met, kinds = [], []
    for axis, size in enumerate(sizes):
        reach = (kernel[axis] - 1) * dilations[axis]
        count = (size + pads[axis] + pads[axis + 2] - reach - 1) // strides[axis] + 1
        place = (
            np.arange(count)[:, None] * strides[axis] - pads[axis] + np.arange(kernel[axis]) * dilations[axis]
        )
        several, kind = np.unique((place >= 0) & (place < size), axis=0, return_inverse=True)
        met.append(several.astype(np.float64))
        kinds.append(kind.reshape(-1).astype(np.int64))
    table = offset * np.einsum("rk,okl,cl->orc", met[0], _values(weight).sum(axis=1), met[1])[None]
    output = node.output[0]
    part = _new_constant(model, f"{output}.sums_of_weights", table)
    node.output[0] = f"{output}.without_offset"
    place = _place(model, node) + 1
    for axis, (side, kind) in enumerate(zip(("rows", "columns"), kinds, strict=True), start=2):
        index = f"{output}.{side}"
        model.graph.initializer.append(numpy_helper.from_array(kind, index))
        part = _insert(model, place, "Gather", [part, index], f"{output}.by_{side}", axis=axis)
        place += 1
    _insert(model, place, "Add", [node.output[0], part], output)
    return True


def _size(model: ModelProto, name: str) -> list[int] | None:
    """Height and width of a tensor; None where they are not known."""
    found = next((value for value in model.graph.value_info if value.name == name), None)
    sides = [] if found is None else [side.dim_value for side in found.type.tensor_type.shape.dim]
    return sides[2:] if len(sides) == 4 and all(sides[2:]) else None


def _weight(model: ModelProto, node: NodeProto, weights: dict[str, WeightCodes]) -> WeightCodes | None:
    """The quantized weight of a layer."""
    source = _maker(model, node.input[1])
    return weights[node_key(source)] if source is not None and source.op_type == "Weight" else None


def _outputs(model: ModelProto, node: NodeProto, weights: dict[str, WeightCodes]) -> int:
    """The output channels of a layer whose bias is a constant; 0 where it is none, or another node."""
    if _bias(model, node) is None:
        return 0
    quantized, full = _weight(model, node, weights), initializers(model).get(node.input[1])
    return len(quantized.codes) if quantized is not None else 0 if full is None else len(full)


def _bias(model: ModelProto, node: NodeProto) -> Array | None:
    """The bias of a layer, zero where it has none; None where it is computed, or for another node."""
    if node.op_type not in ("Conv", "Gemm"):
        return None
    form = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0} | tensor_attributes(node)
    if node.op_type == "Gemm" and form != {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 1}:
        return None
    name = node.input[2] if len(node.input) > 2 else ""
    return initializers(model).get(name) if name else np.zeros(1)


def _add_to_bias(model: ModelProto, node: NodeProto, value: Array) -> None:
    """Add float64 [out] to the bias of a layer, which is a constant."""
    bias = _bias(model, node)
    assert bias is not None
    del node.input[2:]
    node.input.append(_new_constant(model, f"{node.output[0]}.offset_bias", bias + value))


def _new_constant(model: ModelProto, name: str, value: Array) -> str:
    """A float32 constant, in the place of one of the same name; returns its name."""
    from onnx import numpy_helper

    for old in [tensor for tensor in model.graph.initializer if tensor.name == name]:
        model.graph.initializer.remove(old)
    model.graph.initializer.append(numpy_helper.from_array(value.astype(np.float32), name))
    return name


def _place(model: ModelProto, node: NodeProto) -> int:
    return list(model.graph.node).index(node)


def _insert(
    model: ModelProto, place: int, operator: str, inputs: list[str], output: str, **attributes: Any
) -> str:
    """A new node at a place of the order; returns its output."""
    from onnx import helper

    model.graph.node.insert(place, helper.make_node(operator, inputs, [output], name=output, **attributes))
    return output
