"""The operators of a network's graph in LiteRT."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from model.deploy.litert.network import LAST, LitertNetwork, arranged, window
from model.deploy.steps import Step

Translate = Callable[[LitertNetwork, Step], None]
LOWEST = float(np.finfo(np.float32).min)
KINDS = {1: "float32", 6: "int32", 7: "int32", 9: "bool"}  # of ONNX; int64 as int32


def activation(network: LitertNetwork, step: Step) -> None:
    """A quantizer: x / step, rounded with ties to even, within its levels, times the scale."""
    codes = step.activation
    assert codes is not None
    x, name = network.operand(step.inputs[0]), step.outputs[0]
    shape = network.physical(network.shape(name))
    scalar = partial(_scalar, network)
    if codes.integer and codes.step is not None:
        x = network.add("DIV", [x, scalar(codes.step)], f"{name}.steps", shape)
        x = network.add("ROUND", [x], f"{name}.rounded", shape)
        x = network.add("MAXIMUM", [x, scalar(codes.lowest)], f"{name}.raised", shape)
        x = network.add("MINIMUM", [x, scalar(codes.highest)], f"{name}.codes", shape)
    network.add("MUL", [x, scalar(codes.scale if codes.integer else 1)], name, shape)


def _scalar(network: LitertNetwork, value: float) -> str:
    return network.file.constant(f"scalar_{np.float32(value)!s}", np.array(value, np.float32))


def weight(network: LitertNetwork, step: Step) -> None:
    """A quantized weight is written with the layer that reads it."""


def convolution(network: LitertNetwork, step: Step) -> None:
    """CONV_2D or DEPTHWISE_CONV_2D, with a PAD in front where LiteRT's own padding is another."""
    x, channels, group = step.inputs[0], network.shape(step.inputs[0])[1], step.attributes.get("group", 1)
    shape = network.shape(step.inputs[1])
    if len(shape) != 4:
        raise network.refuse(step, "its images have other than two dimensions")
    depthwise = group > 1 and group == channels
    strides, dilations = (step.attributes.get(name, [1, 1]) for name in ("strides", "dilations"))
    kernel = [dilation * (side - 1) + 1 for side, dilation in zip(shape[2:], dilations, strict=True)]
    if step.attributes.get("auto_pad", b"NOTSET") not in (b"NOTSET", "NOTSET"):
        raise network.refuse(step, "its padding depends on its input")
    pads = step.attributes.get("pads", [0, 0, 0, 0])
    source, same = network.operand(x), True
    if pads != _same(network.shape(x)[2:], kernel, strides):
        source, same = _padded(network, source, network.shape(x), pads, step.outputs[0]), False
    codes = network.weight(step.inputs[1])
    if codes is not None:
        source, filters = network.filters(source, codes, grouped=group > 1, depthwise=depthwise)
    else:
        filters = _filters(network, step, depthwise=depthwise)
    options = window(strides, dilations, same=same)
    if depthwise:
        options["depthMultiplier"] = shape[0] // channels
    operator = "DEPTHWISE_CONV_2D" if depthwise else "CONV_2D"
    network.add(operator, [source, filters, bias(network, step, shape[0])], step.outputs[0], **options)


def _filters(network: LitertNetwork, step: Step, *, depthwise: bool = False) -> str:
    """A weight in full precision."""
    value = network.known(step.inputs[1])
    if value is None:
        raise network.refuse(step, "its weight is computed")
    return network.file.constant(step.inputs[1], arranged(value.astype(np.float32), depthwise))


def bias(network: LitertNetwork, step: Step, outputs: int) -> str:
    """The bias of a layer, zero where it has none."""
    if len(step.inputs) < 3 or not step.inputs[2]:
        return network.zeros(outputs)
    value = network.known(step.inputs[2])
    if value is None:
        raise network.refuse(step, "its bias is computed")
    whole = np.broadcast_to(value.astype(np.float32).reshape(-1), (outputs,))
    return network.file.constant(step.inputs[2], np.ascontiguousarray(whole))


def _same(sides: Sequence[int], kernel: Sequence[int], strides: Sequence[int]) -> list[int]:
    """What LiteRT's padding SAME adds: top, left, bottom, right."""
    total = [
        max((-(-side // stride) - 1) * stride + reach - side, 0)
        for side, reach, stride in zip(sides, kernel, strides, strict=True)
    ]
    first = [one // 2 for one in total]
    return [*first, *(one - half for one, half in zip(total, first, strict=True))]


def _padded(
    network: LitertNetwork,
    x: str,
    shape: Sequence[int],
    pads: Sequence[int],
    output: str,
    value: float = 0.0,
) -> str:
    """`x` (of a shape with channels first) with rows and columns around it: top, left, bottom, right."""
    if not any(pads):
        return x
    top, left, bottom, right = (int(pad) for pad in pads)
    around = network.file.constant(
        f"pads_{top}_{left}_{bottom}_{right}",
        np.array([[0, 0], [top, bottom], [left, right], [0, 0]], np.int32),
    )
    size = (shape[0], shape[2] + top + bottom, shape[3] + left + right, shape[1])
    name = f"{output}.padded"
    if value:
        return network.add("PADV2", [x, around, _scalar(network, value)], name, size)
    return network.add("PAD", [x, around], name, size)


def pad(network: LitertNetwork, step: Step) -> None:
    """Constant rows and columns around images."""
    source, amount, filling, axes = (*step.inputs, "", "")[:4]
    shape, pads = network.shape(source), network.known(amount)
    given = network.known(filling) if filling else np.zeros(1)
    plain = step.attributes.get("mode", b"constant") in (b"constant", "constant") and not axes
    if not plain or pads is None or given is None or len(pads) != 2 * len(shape) or pads.min() < 0:
        raise network.refuse(step, "it does more than to put constants around images")
    both = np.array(pads, np.int32).reshape(2, -1).T
    both = both[list(LAST)] if len(shape) == 4 else both
    around = network.file.constant(f"{step.outputs[0]}.pads", both)
    value, x = float(given.item()), network.operand(source)
    if value:
        network.add("PADV2", [x, around, _scalar(network, value)], step.outputs[0])
    else:
        network.add("PAD", [x, around], step.outputs[0])


def pool(operator: str, network: LitertNetwork, step: Step) -> None:
    """The largest or the mean value of places."""
    (x, name), found = (step.inputs[0], step.outputs[0]), step.attributes
    shape, outputs = network.shape(x), network.shape(name)
    kernel, strides = found["kernel_shape"], found.get("strides", [1, 1])
    pads = list(found.get("pads", [0, 0, 0, 0]))
    if any(one != 1 for one in found.get("dilations", [])) or len(shape) != 4:
        raise network.refuse(step, "its places are not beside each other")
    for i in (0, 1):  # with ceil_mode the last places reach beyond the images
        reach = (outputs[2 + i] - 1) * strides[i] + kernel[i] - shape[2 + i] - pads[i]
        pads[2 + i] = max(pads[2 + i], reach)
    mean = operator == "AVERAGE_POOL_2D"
    if mean and any(pads) and (pads != list(found.get("pads", [0, 0, 0, 0]))):
        raise network.refuse(step, "its last places reach beyond the images")
    counted = mean and bool(found.get("count_include_pad", 0))
    source, same = network.operand(x), pads == _same(shape[2:], kernel, strides) and not counted
    if not same and mean and any(pads) and not counted:
        raise network.refuse(step, "its means leave out a padding that LiteRT does not have")
    if not same:
        source = _padded(network, source, shape, pads, name, 0.0 if mean else LOWEST)
    network.add(
        operator, [source], name, padding=0 if same else 1, strideH=strides[0], strideW=strides[1],
        filterHeight=kernel[0], filterWidth=kernel[1],
    )  # fmt: skip


def linear(network: LitertNetwork, step: Step) -> None:
    """FULLY_CONNECTED."""
    form = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0} | dict(step.attributes)
    if form != {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 1}:
        raise network.refuse(step, "it is no linear layer")
    x, codes = network.operand(step.inputs[0]), network.weight(step.inputs[1])
    if codes is not None:
        x, filters = network.filters(x, codes)
    else:
        filters = _filters(network, step)
    shift = bias(network, step, network.shape(step.inputs[1])[0])
    network.add("FULLY_CONNECTED", [x, filters, shift], step.outputs[0])


def elementwise(operator: str, network: LitertNetwork, step: Step, *, kind: str = "") -> None:
    """An operator of two tensors, which are broadcast; of their kind, or of another."""
    rank = len(network.shape(step.outputs[0]))
    if len(step.inputs) != (3 if operator == "SELECT_V2" else 2):
        raise network.refuse(step, f"it has {len(step.inputs)} tensors")
    for name in step.inputs:
        value = network.known(name)
        if value is None and len(network.shape(name)) not in (0, rank):
            raise network.refuse(step, "its tensors have different numbers of dimensions")
    inputs = [network.operand(name, rank) for name in step.inputs]
    network.add(operator, inputs, step.outputs[0], kind=kind or network.kind(step.inputs))


def unary(operator: str, network: LitertNetwork, step: Step) -> None:
    """An operator of one tensor."""
    network.add(operator, [network.operand(step.inputs[0])], step.outputs[0])


def clip(network: LitertNetwork, step: Step) -> None:
    """MAXIMUM and MINIMUM, or RELU6."""
    names = (*step.inputs[1:], "", "")[:2]
    ends = [network.known(name) if name else None for name in names]
    if any(name and end is None for name, end in zip(names, ends, strict=True)):
        raise network.refuse(step, "its ends are computed")
    if not any(names):
        same(network, step)
        return
    low, high = (None if end is None else float(end.reshape(-1)[0]) for end in ends)
    x, name = network.operand(step.inputs[0]), step.outputs[0]
    if (low, high) == (0.0, 6.0):
        network.add("RELU6", [x], name)
        return
    if low is not None:
        x = network.add(
            "MAXIMUM", [x, _scalar(network, low)], name if high is None else f"{name}.raised",
            network.physical(network.shape(name)),
        )  # fmt: skip
    if high is not None:
        network.add("MINIMUM", [x, _scalar(network, high)], name)


def hard_sigmoid(network: LitertNetwork, step: Step) -> None:
    """The input times alpha plus beta, within 0 and 1."""
    alpha, beta = step.attributes.get("alpha", 0.2), step.attributes.get("beta", 0.5)
    x, name = network.operand(step.inputs[0]), step.outputs[0]
    shape = network.physical(network.shape(name))
    x = network.add("MUL", [x, _scalar(network, alpha)], f"{name}.scaled", shape)
    x = network.add("ADD", [x, _scalar(network, beta)], f"{name}.shifted", shape)
    x = network.add("MAXIMUM", [x, _scalar(network, 0)], f"{name}.raised", shape)
    network.add("MINIMUM", [x, _scalar(network, 1)], name, shape)


def prelu(network: LitertNetwork, step: Step) -> None:
    """A slope for each channel below zero."""
    slope = network.known(step.inputs[1])
    shape = network.shape(step.outputs[0])
    if slope is None:
        raise network.refuse(step, "its slopes are computed")
    x = network.operand(step.inputs[0])
    slope = np.asarray(slope, np.float32)
    if len(shape) == 4:
        full = slope.reshape((1,) * (4 - slope.ndim) + slope.shape)
        if full.shape not in ((1, 1, 1, 1), (1, shape[1], 1, 1)):
            raise network.refuse(step, "its slopes differ within a channel")
        slope = np.broadcast_to(full, (1, shape[1], 1, 1)).reshape(1, 1, -1)
    network.add("PRELU", [x, network.file.constant(f"{step.outputs[0]}.slope", slope)], step.outputs[0])


def leaky_relu(network: LitertNetwork, step: Step) -> None:
    """One slope below zero."""
    alpha = step.attributes.get("alpha", 0.01)
    network.add("LEAKY_RELU", [network.operand(step.inputs[0])], step.outputs[0], alpha=alpha)


def reduce(operator: str, network: LitertNetwork, step: Step) -> None:
    """The mean, the sum or the largest of some dimensions."""
    source, along = (*step.inputs, "")[:2]
    rank = len(network.shape(source))
    axes = network.known(along) if along else np.arange(rank)
    if axes is not None and axes.size == 0:  # which means all
        axes = np.arange(rank)
        if step.attributes.get("noop_with_empty_axes"):
            raise network.refuse(step, "it does nothing")
    keep = bool(step.attributes.get("keepdims", 1))
    if axes is None:
        raise network.refuse(step, "its dimensions are computed")
    places = sorted(network.axis(int(axis), rank) for axis in axes.reshape(-1))
    rest = [axis for axis in range(rank) if network.axis(axis, rank) not in places]
    if not keep and (sorted(rest, key=lambda axis: network.axis(axis, rank)) != rest or len(rest) == 4):
        raise network.refuse(step, "what is left would be in another order")
    along = network.numbers(f"axes_{'_'.join(map(str, places))}", places)
    network.add(operator, [network.operand(source), along], step.outputs[0], keepDims=keep)


def reshape(network: LitertNetwork, step: Step) -> None:
    """RESHAPE, in the order of channels first."""
    name = step.outputs[0]
    before, after = network.shape(step.inputs[0]), network.shape(name)
    x = network.operand(step.inputs[0])
    if len(before) == 4 and _moves(before):
        x = _transposed(network, x, (0, 3, 1, 2), f"{name}.channels_first", before)
    moved = len(after) == 4 and _moves(after)
    shape = [-1 if i == 0 and before[:1] == after[:1] else side for i, side in enumerate(after)]
    target = shape if len(after) != 4 or moved else [shape[i] for i in LAST]
    wanted = network.numbers(f"{name}.shape", target)
    made = f"{name}.reshaped" if moved else name
    network.add("RESHAPE", [x, wanted], made, after if moved else network.physical(after))
    if moved:
        _transposed(network, made, LAST, name, network.physical(after))


def _moves(shape: Sequence[int]) -> bool:
    """Whether the entries of images [N, channels, height, width] have another order with channels last."""
    return shape[1] > 1 and shape[2] * shape[3] > 1


def _transposed(
    network: LitertNetwork, x: str, order: Sequence[int], output: str, shape: Sequence[int]
) -> str:
    along = network.numbers(f"order_{'_'.join(map(str, order))}", order)
    return network.add("TRANSPOSE", [x, along], output, shape)


def transpose(network: LitertNetwork, step: Step) -> None:
    """Another order of dimensions."""
    shape = network.shape(step.inputs[0])
    order = step.attributes.get("perm", list(range(len(shape)))[::-1])
    if len(shape) == 4:
        order = [network.axis(order[axis], 4) for axis in LAST]
    output = network.physical(network.shape(step.outputs[0]))
    _transposed(network, network.operand(step.inputs[0]), order, step.outputs[0], output)


def concatenate(network: LitertNetwork, step: Step) -> None:
    """CONCATENATION."""
    rank = len(network.shape(step.outputs[0]))
    inputs = [network.operand(name, rank) for name in step.inputs]
    network.add("CONCATENATION", inputs, step.outputs[0], axis=network.axis(step.attributes["axis"], rank))


def split(network: LitertNetwork, step: Step) -> None:
    """SPLIT_V."""
    x, axis = step.inputs[0], step.attributes.get("axis", 0)
    rank = len(network.shape(x))
    sizes = [network.shape(name)[axis] for name in step.outputs]
    inputs = [
        network.operand(x), network.numbers(f"sizes_{'_'.join(map(str, sizes))}", sizes),
        network.file.constant(f"axis_{network.axis(axis, rank)}", np.array(network.axis(axis, rank), np.int32)),
    ]  # fmt: skip
    for name in step.outputs:
        network.file.tensor(name, network.physical(network.shape(name)))
    network.file.operator("SPLIT_V", inputs, step.outputs, numSplits=len(sizes))


def is_infinite(network: LitertNetwork, step: Step) -> None:
    """Whether the size is above all finite numbers."""
    if not all(step.attributes.get(f"detect_{sign}", 1) for sign in ("negative", "positive")):
        raise network.refuse(step, "it looks at one sign alone")
    x, name = network.operand(step.inputs[0]), step.outputs[0]
    size = network.add("ABS", [x], f"{name}.size", network.physical(network.shape(name)))
    network.add("GREATER", [size, _scalar(network, -LOWEST)], name, kind="bool")


def where(network: LitertNetwork, step: Step) -> None:
    """SELECT_V2."""
    elementwise("SELECT_V2", network, step, kind=network.kind(step.inputs[1:]))


def cast(network: LitertNetwork, step: Step) -> None:
    """CAST."""
    kind = KINDS.get(step.attributes["to"])
    if kind is None:
        raise network.refuse(step, "it makes numbers of another kind")
    network.add("CAST", [network.operand(step.inputs[0])], step.outputs[0], kind=kind)


def softmax(network: LitertNetwork, step: Step) -> None:
    """Along the last dimension."""
    rank = len(network.shape(step.outputs[0]))
    if network.axis(step.attributes.get("axis", -1), rank) != rank - 1:
        raise network.refuse(step, "it goes along another dimension than the last")
    network.add("SOFTMAX", [network.operand(step.inputs[0])], step.outputs[0], beta=1.0)


def same(network: LitertNetwork, step: Step) -> None:
    """Another name: times one."""
    x = network.operand(step.inputs[0])
    network.add("MUL", [x, _scalar(network, 1)], step.outputs[0])


OPERATORS: dict[str, Translate] = {
    "Abs": partial(unary, "ABS"),
    "Activation": activation,
    "Add": partial(elementwise, "ADD"),
    "And": partial(elementwise, "LOGICAL_AND", kind="bool"),
    "AveragePool": partial(pool, "AVERAGE_POOL_2D"),
    "Cast": cast,
    "Clip": clip,
    "Concat": concatenate,
    "Conv": convolution,
    "Div": partial(elementwise, "DIV"),
    "Equal": partial(elementwise, "EQUAL", kind="bool"),
    "Exp": partial(unary, "EXP"),
    "Flatten": reshape,
    "Floor": partial(unary, "FLOOR"),
    "Gemm": linear,
    "Greater": partial(elementwise, "GREATER", kind="bool"),
    "GreaterOrEqual": partial(elementwise, "GREATER_EQUAL", kind="bool"),
    "HardSigmoid": hard_sigmoid,
    "HardSwish": partial(unary, "HARD_SWISH"),
    "Identity": same,
    "IsInf": is_infinite,
    "LeakyRelu": leaky_relu,
    "Less": partial(elementwise, "LESS", kind="bool"),
    "LessOrEqual": partial(elementwise, "LESS_EQUAL", kind="bool"),
    "Max": partial(elementwise, "MAXIMUM"),
    "MaxPool": partial(pool, "MAX_POOL_2D"),
    "Min": partial(elementwise, "MINIMUM"),
    "Mul": partial(elementwise, "MUL"),
    "Neg": partial(unary, "NEG"),
    "PRelu": prelu,
    "Pad": pad,
    "ReduceMax": partial(reduce, "REDUCE_MAX"),
    "ReduceMean": partial(reduce, "MEAN"),
    "ReduceMin": partial(reduce, "REDUCE_MIN"),
    "ReduceSum": partial(reduce, "SUM"),
    "Relu": partial(unary, "RELU"),
    "Reshape": reshape,
    "Round": partial(unary, "ROUND"),
    "Sigmoid": partial(unary, "LOGISTIC"),
    "Sign": partial(unary, "SIGN"),
    "Softmax": softmax,
    "Split": split,
    "Sqrt": partial(unary, "SQRT"),
    "Squeeze": reshape,
    "Sub": partial(elementwise, "SUB"),
    "Tanh": partial(unary, "TANH"),
    "Transpose": transpose,
    "Unsqueeze": reshape,
    "Weight": weight,
    "Where": where,
}
"""Operator of the graph -> what writes it; see `model.deploy.steps`."""

FLOATS = frozenset({
    "Abs", "AveragePool", "Clip", "Concat", "Exp", "Flatten", "Floor", "Identity", "LeakyRelu", "MaxPool", "Neg",
    "PRelu", "Pad", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum", "Relu", "Reshape", "Round", "Sigmoid", "Sign",
    "Softmax", "Split", "Sqrt", "Squeeze", "Tanh", "Transpose", "Unsqueeze",
})  # fmt: skip
"""Operators that are written for numbers of float32 alone."""
