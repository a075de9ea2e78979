"""The operators of a network's graph in the words of MNN's schema."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from model.deploy.mnn.network import IMAGES, MnnNetwork
from model.deploy.steps import Step

Translate = Callable[[MnnNetwork, Step], None]
LARGEST = float(np.finfo(np.float32).max)
TO_WHOLE = 1.5 * 2.0**23  # float32 numbers from 2^23 on are whole
SMALL = 2.0**22
BELOW_TWO = 2 - 2.0**-23  # the float32 in front of 2
FLOAT, TRUTH, WHOLE = 1, 9, (6, 7)  # ONNX's numbers of kinds


def activation(network: MnnNetwork, step: Step) -> None:
    """A quantizer: x / step within its levels, rounded with ties to even, times the scale.

    The ends are whole, so that they may be taken first.
    """
    codes = step.activation
    assert codes is not None
    (x,), packed = network.together(step.inputs[:1], step.outputs[0])
    name = step.outputs[0]
    add = partial(_binary, network, packed=packed)
    if codes.integer and codes.step is not None:
        x = add("REALDIV", x, network.scalar(codes.step), f"{name}.steps")
        x = _within(network, x, f"{name}.within", codes.lowest, codes.highest, packed=packed)
        x = _rounded(network, x, f"{name}.codes", packed=packed)
    add("MUL", x, network.scalar(codes.scale if codes.integer else 1), name)


def _rounded(network: MnnNetwork, x: str, output: str, *, packed: bool) -> str:
    """Small numbers, rounded with ties to even.

    MNN's own ROUND takes ties away from zero, and is slow. Adding 1.5 * 2^23 and taking it off again rounds as float32
    does; with numbers of 16 bits the sum is infinite, and nothing is answered.
    """
    large = network.scalar(TO_WHOLE)
    x = _binary(network, "ADD", x, large, f"{output}.large", packed=packed)
    return _binary(network, "SUB", x, large, output, packed=packed)


def _binary(
    network: MnnNetwork,
    operator: str,
    x: str,
    y: str,
    output: str,
    *,
    packed: bool = False,
    whole: bool = False,
) -> str:
    value = {"opType": operator, "T": "DT_FLOAT"}
    return network.add("BinaryOp", [x, y], output, "BinaryOp", value, packed=packed, whole=whole)


def _unary(network: MnnNetwork, operator: str, x: str, output: str, *, packed: bool = False) -> str:
    value = {"opType": operator, "T": "DT_FLOAT"}
    return network.add("UnaryOp", [x], output, "UnaryOp", value, packed=packed)


def _within(
    network: MnnNetwork, x: str, output: str, low: float, high: float, *, packed: bool = False
) -> str:
    value = {"minValue": float(low), "maxValue": float(high)}
    return network.add("ReLU6", [x], output, "Relu6", value, packed=packed)


def weight(network: MnnNetwork, step: Step) -> None:
    """A quantized weight is written with the layer that reads it."""


def convolution(network: MnnNetwork, step: Step) -> None:
    """Convolution, or ConvolutionDepthwise where each channel has one of its own."""
    shape, found = network.shape(step.inputs[1]), step.attributes
    if len(shape) != IMAGES:
        raise network.refuse(step, "its images have other than two dimensions")
    if found.get("auto_pad", b"NOTSET") not in (b"NOTSET", "NOTSET"):
        raise network.refuse(step, "its padding depends on its input")
    group, channels = found.get("group", 1), network.shape(step.inputs[0])[1]
    strides, dilations = (found.get(name, [1, 1]) for name in ("strides", "dilations"))
    common = {
        "kernelY": shape[2], "kernelX": shape[3], "strideY": strides[0], "strideX": strides[1],
        "dilateY": dilations[0], "dilateX": dilations[1], "group": group, "outputCount": shape[0],
        "inputCount": channels, "padMode": "CAFFE", **_pads(found.get("pads", [0, 0, 0, 0])),
    }  # fmt: skip
    operator = "ConvolutionDepthwise" if group == channels == shape[0] and group > 1 else "Convolution"
    _layer(network, step, operator, network.packed(step.inputs[0]), step.outputs[0], common)


def _pads(pads: Sequence[int]) -> dict[str, Any]:
    """Padding: top, left, bottom, right."""
    return {"padY": int(pads[0]), "padX": int(pads[1]), "pads": [int(pad) for pad in pads]}


def _layer(
    network: MnnNetwork, step: Step, operator: str, x: str, output: str, common: dict[str, Any]
) -> None:
    """A layer with its weight and bias."""
    _, filters, given = (*step.inputs, "")[:3]
    codes, outputs = network.weight(filters), int(common["outputCount"])
    if codes is None and network.known(filters) is None:
        raise network.refuse(step, "its weight is computed")
    bias = network.known(given) if given else np.zeros(outputs)
    if bias is None:
        raise network.refuse(step, "its bias is computed")
    bias = np.broadcast_to(bias.reshape(-1), (outputs,))
    value = {"common": common, "bias": network.floats(bias), **network.filters(filters)}
    name = "" if codes is None else codes.name
    network.add(operator, [x], output, "Convolution2D", value, packed=True, name=name)


def linear(network: MnnNetwork, step: Step) -> None:
    """A convolution of images of one place."""
    form = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0} | dict(step.attributes)
    if form != {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 1}:
        raise network.refuse(step, "it is no linear layer")
    name, (outputs, inputs) = step.outputs[0], network.shape(step.inputs[1])
    place = network.add_reshape(network.flat(step.inputs[0]), f"{name}.image", (-1, inputs, 1, 1))
    common = {"outputCount": outputs, "inputCount": inputs, "padMode": "CAFFE"}
    _layer(network, step, "Convolution", network.packed(place), f"{name}.places", common)
    network.add_reshape(network.flat(f"{name}.places"), name, (-1, outputs))


def pool(operator: str, network: MnnNetwork, step: Step) -> None:
    """The largest or the mean value of places."""
    found, x = step.attributes, step.inputs[0]
    kernel, strides = found["kernel_shape"], found.get("strides", [1, 1])
    pads = found.get("pads", [0, 0, 0, 0])
    if any(one != 1 for one in found.get("dilations", [])) or len(network.shape(x)) != IMAGES:
        raise network.refuse(step, "its places are not beside each other")
    if found.get("auto_pad", b"NOTSET") not in (b"NOTSET", "NOTSET"):
        raise network.refuse(step, "its padding depends on its input")
    up = bool(found.get("ceil_mode", 0))
    if up and operator == "AVEPOOL":
        raise network.refuse(step, "its last places may reach beyond the images")
    counted = "INCLUDE_PADDING" if found.get("count_include_pad", 0) else "EXCLUDE_PADDING"
    value = {
        "kernelY": kernel[0], "kernelX": kernel[1], "strideY": strides[0], "strideX": strides[1], "type": operator,
        "padType": "CAFFE", "dataType": "DT_FLOAT", "ceilModel": up, "countType": counted, **_pads(pads),
    }  # fmt: skip
    network.add("Pooling", [network.packed(x)], step.outputs[0], "Pool", value, packed=True)


def elementwise(operator: str, network: MnnNetwork, step: Step, *, whole: bool = False) -> None:
    """An operator of two tensors, which are broadcast; `whole`: its results are truth values."""
    if len(step.inputs) != 2:
        raise network.refuse(step, f"it has {len(step.inputs)} tensors")
    kinds = {network.is_whole(name) for name in step.inputs}
    if len(kinds) == 2 or (operator == "REALDIV" and True in kinds):
        raise network.refuse(
            step, "its numbers are of two kinds" if len(kinds) == 2 else "its numbers are whole"
        )
    # Truth values are for Select, which takes none that are packed.
    (x, y), packed = network.together(step.inputs, step.outputs[0], packs=not whole)
    _binary(network, operator, x, y, step.outputs[0], packed=packed, whole=whole or True in kinds)


def unary(operator: str, network: MnnNetwork, step: Step) -> None:
    """An operator of one tensor."""
    (x,), packed = network.together(step.inputs[:1], step.outputs[0])
    _unary(network, operator, x, step.outputs[0], packed=packed)


def relu(network: MnnNetwork, step: Step) -> None:
    """No number below zero; or a slope there."""
    if step.operator == "Relu" and network.without_negative(step.inputs[0], step.outputs[0]):
        return
    (x,), packed = network.together(step.inputs[:1], step.outputs[0])
    slope = step.attributes.get("alpha", 0.01) if step.operator == "LeakyRelu" else 0.0
    network.add(
        "ReLU", [x], step.outputs[0], "Relu", {"slope": network.floats(np.array(slope))[0]}, packed=packed
    )


def clip(network: MnnNetwork, step: Step) -> None:
    """ReLU6 with ends of its own."""
    ends = [-LARGEST, LARGEST]
    for i, name in enumerate(step.inputs[1:3]):
        value = network.known(name) if name else None
        if name and value is None:
            raise network.refuse(step, "its ends are computed")
        if value is not None:
            ends[i] = float(np.clip(np.float32(value.reshape(-1)[0]), -LARGEST, LARGEST))
    (x,), packed = network.together(step.inputs[:1], step.outputs[0])
    network.limit(_within(network, x, step.outputs[0], *ends, packed=packed), max(map(abs, ends)))


def rounding(network: MnnNetwork, step: Step) -> None:
    """Ties to even, of numbers of any size: for x / 2 = m + d, m whole, 2 m + 1 only where 2 d is above a half.

    MNN's own ROUND takes ties away from zero. Twice d, times the float32 in front of 1, is below a half for ties.
    """
    name = step.outputs[0]
    (x,), packed = network.together(step.inputs[:1], name)
    if network.is_small(step.inputs[0], SMALL):
        _rounded(network, x, name, packed=packed)
        return
    add = partial(_binary, network, packed=packed)
    half = add("MUL", x, network.scalar(0.5), f"{name}.half")
    whole = _unary(network, "ROUND", half, f"{name}.whole", packed=packed)
    rest = add("SUB", half, whole, f"{name}.rest")
    rest = add("MUL", rest, network.scalar(BELOW_TWO), f"{name}.nearly")
    rest = _unary(network, "ROUND", rest, f"{name}.odd", packed=packed)
    add("ADD", add("ADD", whole, whole, f"{name}.even"), rest, name)


def hard_sigmoid(network: MnnNetwork, step: Step) -> None:
    """The input times alpha plus beta, within 0 and 1."""
    name = step.outputs[0]
    (x,), packed = network.together(step.inputs[:1], name)
    add = partial(_binary, network, packed=packed)
    x = add("MUL", x, network.scalar(step.attributes.get("alpha", 0.2)), f"{name}.scaled")
    x = add("ADD", x, network.scalar(step.attributes.get("beta", 0.5)), f"{name}.shifted")
    _within(network, x, name, 0, 1, packed=packed)


def hard_swish(network: MnnNetwork, step: Step) -> None:
    """The input times its hard sigmoid, x / 6 + 1 / 2."""
    name = step.outputs[0]
    (x,), packed = network.together(step.inputs[:1], name)
    add = partial(_binary, network, packed=packed)
    gate = add("MUL", x, network.scalar(1 / 6), f"{name}.scaled")
    gate = add("ADD", gate, network.scalar(0.5), f"{name}.shifted")
    add("MUL", x, _within(network, gate, f"{name}.gate", 0, 1, packed=packed), name)


def prelu(network: MnnNetwork, step: Step) -> None:
    """A slope for each channel below zero."""
    slope, shape = network.known(step.inputs[1]), network.shape(step.outputs[0])
    if slope is None:
        raise network.refuse(step, "its slopes are computed")
    full = slope.reshape((1,) * (len(shape) - slope.ndim) + slope.shape)
    if len(shape) != IMAGES or full.shape not in ((1, 1, 1, 1), (1, shape[1], 1, 1)):
        raise network.refuse(step, "its slopes are not those of an image's channels")
    slopes = network.floats(np.broadcast_to(full.reshape(-1), (shape[1],)))
    value = {"slopeCount": len(slopes), "slope": slopes}
    network.add("PReLU", [network.packed(step.inputs[0])], step.outputs[0], "PRelu", value, packed=True)


def reduce(operator: str, network: MnnNetwork, step: Step) -> None:
    """The mean, the sum or the largest of some dimensions."""
    source, along = (*step.inputs, "")[:2]
    rank = len(network.shape(source))
    axes = network.known(along) if along else np.arange(rank)
    if axes is None:
        raise network.refuse(step, "its dimensions are computed")
    if axes.size == 0:  # which means all
        axes = np.arange(rank)
        if step.attributes.get("noop_with_empty_axes"):
            raise network.refuse(step, "it does nothing")
    places = network.whole_numbers(sorted(int(axis) % rank for axis in axes.reshape(-1)))
    value = {"operation": operator, "keepDims": bool(step.attributes.get("keepdims", 1)), "dType": "DT_FLOAT"}
    network.add("Reduction", [network.flat(source), places], step.outputs[0], "ReductionParam", value)


def reshape(network: MnnNetwork, step: Step) -> None:
    """Another shape, of the same order."""
    before, after = network.shape(step.inputs[0]), network.shape(step.outputs[0])
    shape = [-1 if i == 0 and before[:1] == after[:1] else side for i, side in enumerate(after)]
    network.add_reshape(network.flat(step.inputs[0]), step.outputs[0], shape)


def transpose(network: MnnNetwork, step: Step) -> None:
    """Another order of dimensions."""
    order = step.attributes.get("perm", list(range(len(network.shape(step.inputs[0]))))[::-1])
    value = {"dims": [int(axis) for axis in order]}
    network.add("Permute", [network.flat(step.inputs[0])], step.outputs[0], "Permute", value)


def concatenate(network: MnnNetwork, step: Step) -> None:
    """Tensors behind each other."""
    rank = len(network.shape(step.outputs[0]))
    inputs = [network.flat(name, rank) for name in step.inputs]
    value = {"axis": int(step.attributes["axis"]) % rank}
    network.add(
        "Concat", inputs, step.outputs[0], "Axis", value, whole=all(map(network.is_whole, step.inputs))
    )


def split(network: MnnNetwork, step: Step) -> None:
    """Parts of a dimension."""
    rank = len(network.shape(step.inputs[0]))
    axis = step.attributes.get("axis", 0) % rank
    sizes = network.whole_numbers([network.shape(name)[axis] for name in step.outputs])
    value = {"axis": axis, "sourceType": "TORCH"}
    network.add("Slice", [network.flat(step.inputs[0]), sizes], step.outputs, "Slice", value)


def pad(network: MnnNetwork, step: Step) -> None:
    """A constant around images."""
    source, amount, filling, axes = (*step.inputs, "", "")[:4]
    pads, given = network.known(amount), network.known(filling) if filling else np.zeros(1)
    plain = step.attributes.get("mode", b"constant") in (b"constant", "constant") and not axes
    rank = len(network.shape(source))
    if not plain or pads is None or given is None or len(pads) != 2 * rank or pads.min() < 0:
        raise network.refuse(step, "it does more than to put constants around images")
    inputs = [
        network.flat(source), network.whole_numbers(pads.reshape(2, -1).T.reshape(-1).tolist()),
        network.scalar(float(given.reshape(-1)[0])),
    ]  # fmt: skip
    network.add("Padding", inputs, step.outputs[0], "PadParam", {"mode": "CONSTANT"})


def softmax(network: MnnNetwork, step: Step) -> None:
    """Along one dimension."""
    axis = step.attributes.get("axis", -1) % len(network.shape(step.outputs[0]))
    network.add("Softmax", [network.flat(step.inputs[0])], step.outputs[0], "Axis", {"axis": axis})


def is_infinite(network: MnnNetwork, step: Step) -> None:
    """Whether the size is above all finite numbers."""
    if not all(step.attributes.get(f"detect_{sign}", 1) for sign in ("negative", "positive")):
        raise network.refuse(step, "it looks at one sign alone")
    name = step.outputs[0]
    (x,), _ = network.together(step.inputs[:1], name, packs=False)
    size = _unary(network, "ABS", x, f"{name}.size")
    _binary(network, "GREATER", size, network.scalar(LARGEST), name, whole=True)


def where(network: MnnNetwork, step: Step) -> None:
    """One of two tensors, by truth values of the whole shape.

    MNN's Select spreads some tensors wrongly: those that are neither single numbers nor of the whole shape are added to
    zeros first. Its output has the order of the tensor for true, whatever that of the truth values, so that all are
    in the order of their dimensions.
    """
    name, shape = step.outputs[0], network.shape(step.outputs[0])
    condition, *values = step.inputs
    kinds = {network.is_whole(given) for given in values}
    if len(kinds) == 2:
        raise network.refuse(step, "its numbers are of two kinds")
    spread = any(network.shape(given) not in ((), shape) and not network.is_single(given) for given in values)
    if network.shape(condition) != shape or (spread and True in kinds):
        raise network.refuse(step, "its condition, or a whole number, is spread over other dimensions")
    inputs, _ = network.together(step.inputs, name, packs=False)
    if spread:
        kind = {"srcT": "DT_INT32", "dstT": "DT_FLOAT"}
        zeros = network.add("Cast", inputs[:1], f"{name}.float", "CastParam", kind)
        zeros = _binary(network, "MUL", zeros, network.scalar(0), f"{name}.zeros")
        parts = enumerate(inputs[1:])
        inputs[1:] = [_binary(network, "ADD", zeros, given, f"{name}.{i}") for i, given in parts]
    network.add("Select", inputs, name, whole=True in kinds)


def cast(network: MnnNetwork, step: Step) -> None:
    """Another kind of numbers."""
    to, source = step.attributes["to"], network.is_whole(step.inputs[0])
    if to not in (FLOAT, *WHOLE) and not (to == TRUTH and source):
        raise network.refuse(step, "it makes numbers of another kind")
    if to == FLOAT and not source and network.rename(step.inputs[0], step.outputs[0]):
        return
    (x,), packed = network.together(step.inputs[:1], step.outputs[0])
    kinds = {"srcT": "DT_INT32" if source else "DT_FLOAT", "dstT": "DT_FLOAT" if to == FLOAT else "DT_INT32"}
    network.add("Cast", [x], step.outputs[0], "CastParam", kinds, packed=packed, whole=to != FLOAT)


def same(network: MnnNetwork, step: Step) -> None:
    """Another name: times one."""
    (x,), packed = network.together(step.inputs[:1], step.outputs[0])
    _binary(network, "MUL", x, network.scalar(1), step.outputs[0], packed=packed)


BINARY = {"Add": "ADD", "Div": "REALDIV", "Max": "MAXIMUM", "Min": "MINIMUM", "Mul": "MUL", "Sub": "SUB"}
TRUTHS = {
    "And": "MUL", "Equal": "EQUAL", "Greater": "GREATER", "GreaterOrEqual": "GREATER_EQUAL", "Less": "LESS",
    "LessOrEqual": "LESS_EQUAL", "Or": "LOGICALOR",
}  # fmt: skip
UNARY = {
    "Abs": "ABS", "Ceil": "CEIL", "Exp": "EXP", "Floor": "FLOOR", "Neg": "NEG", "Sigmoid": "SIGMOID", "Sign": "SIGN",
    "Sqrt": "SQRT", "Tanh": "TANH",
}  # fmt: skip
REDUCTIONS = {"ReduceMax": "MAXIMUM", "ReduceMean": "MEAN", "ReduceMin": "MINIMUM", "ReduceSum": "SUM"}

OPERATORS: dict[str, Translate] = {
    **{name: partial(elementwise, word) for name, word in BINARY.items()},
    **{name: partial(elementwise, word, whole=True) for name, word in TRUTHS.items()},
    **{name: partial(unary, word) for name, word in UNARY.items()},
    **{name: partial(reduce, word) for name, word in REDUCTIONS.items()},
    **dict.fromkeys(("Flatten", "Reshape", "Squeeze", "Unsqueeze"), reshape),
    "Activation": activation, "AveragePool": partial(pool, "AVEPOOL"), "Cast": cast, "Clip": clip,
    "Concat": concatenate, "Conv": convolution, "Gemm": linear, "HardSigmoid": hard_sigmoid,
    "HardSwish": hard_swish, "Identity": same, "IsInf": is_infinite, "LeakyRelu": relu,
    "MaxPool": partial(pool, "MAXPOOL"), "PRelu": prelu, "Pad": pad, "Relu": relu, "Round": rounding,
    "Softmax": softmax, "Split": split, "Transpose": transpose, "Weight": weight, "Where": where,
}  # fmt: skip
"""Operator of the graph -> what writes it; see `model.deploy.steps`."""

ANY_KIND = frozenset({*BINARY, *TRUTHS, "Activation", "Cast", "Concat", "Weight", "Where"})
"""Operators that are written for numbers of other kinds than float32, too."""
