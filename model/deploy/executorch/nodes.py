"""LiteRT's operators as nodes of XNNPACK, in numbers of float32: true is 1, false is 0."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise
from math import inf, prod
from typing import Any

import numpy as np

from model.deploy.executorch.graph import XnnpackGraph
from utils.errors import UserError

Nodes = Callable[[XnnpackGraph, Sequence[str], Sequence[str], dict[str, Any]], None]
"""Writes what an operator computes of its inputs, with its options."""

KEEP = 64  # the flag that keeps dimensions
ROUNDING = 1.5 * 2.0**23  # added to a number below 2**22, it leaves no place for a fraction: ties go to even
LARGE = 2.0**75  # twice times the smallest number above zero is above 1


def scalar(graph: XnnpackGraph, value: float) -> str:
    """A number."""
    return graph.constant(f"number {np.float32(value)!s}", np.array([value], np.float32))


def step(
    graph: XnnpackGraph, operator: str, inputs: Sequence[str], name: str, shape: Sequence[int], **fields: Any
) -> str:
    """A node with an output of its own; returns the output's name."""
    graph.tensor(name, shape)
    return graph.node(operator, inputs, name, **fields)


def plain(
    operator: str, graph: XnnpackGraph, inputs: Sequence[str], outputs: Sequence[str], options: dict[str, Any]
) -> None:
    """The node of the same meaning."""
    graph.node(operator, inputs, outputs[0])


def within(
    low: float, high: float, graph: XnnpackGraph, inputs: Sequence[str], outputs: Sequence[str], options: Any
) -> None:
    """A value within its ends."""
    graph.node("Clamp", inputs, outputs[0], ends=(low, high))


def rounded(graph: XnnpackGraph, x: str, output: str, ends: tuple[float, float] | None = None) -> None:
    """To a whole number, ties to even, within ends; numbers of 2**22 and more may go to others that are near."""
    large = scalar(graph, ROUNDING)
    raised = step(graph, "Add", [x, large], f"{output}.raised_to_round", graph.shapes[output])
    graph.node("Subtract", [raised, large], output, ends=ends)


def round_(graph: XnnpackGraph, inputs: Sequence[str], outputs: Sequence[str], options: Any) -> None:
    """See `rounded`."""
    rounded(graph, inputs[0], outputs[0])


def _side(graph: XnnpackGraph, x: str, output: str, ends: tuple[float, float]) -> str:
    """The sign of a number, within `ends`: numbers beside zero are multiplied until they are beyond 1."""
    shape, large = graph.shapes[output], scalar(graph, LARGE)
    x = step(graph, "Multiply", [x, large], f"{output}.times", shape)
    x = step(graph, "Multiply", [x, large], f"{output}.times_twice", shape)
    return graph.node("Clamp", [x], output, ends=ends)


def sign(graph: XnnpackGraph, inputs: Sequence[str], outputs: Sequence[str], options: Any) -> None:
    """-1, 0 or 1."""
    _side(graph, inputs[0], outputs[0], (-1, 1))


def above(
    swapped: bool,
    negated: bool,
    graph: XnnpackGraph,
    inputs: Sequence[str],
    outputs: Sequence[str],
    options: Any,
) -> None:
    """Whether the first (`swapped`: the second) number is larger, or the opposite; differences near zero are exact."""
    output = outputs[0]
    shape, (x, y) = graph.shapes[output], reversed(inputs) if swapped else inputs
    apart = step(graph, "Subtract", [x, y], f"{output}.apart", shape)
    if not negated:
        _side(graph, apart, output, (0, 1))
        return
    graph.tensor(f"{output}.opposite", shape)
    opposite = _side(graph, apart, f"{output}.opposite", (0, 1))
    graph.node("Subtract", [scalar(graph, 1), opposite], output)


def equal(graph: XnnpackGraph, inputs: Sequence[str], outputs: Sequence[str], options: Any) -> None:
    """Whether two numbers are equal."""
    output = outputs[0]
    shape = graph.shapes[output]
    apart = step(graph, "Subtract", inputs, f"{output}.apart", shape)
    apart = step(graph, "Abs", [apart], f"{output}.distance", shape)
    graph.tensor(f"{output}.opposite", shape)
    opposite = _side(graph, apart, f"{output}.opposite", (0, 1))
    graph.node("Subtract", [scalar(graph, 1), opposite], output)


def select(graph: XnnpackGraph, inputs: Sequence[str], outputs: Sequence[str], options: Any) -> None:
    """The second number where the first is true, otherwise the third: c x + (1 - c) y, of finite numbers."""
    (condition, x, y), output = inputs, outputs[0]
    if any(name in graph.values and not np.isfinite(graph.values[name]).all() for name in (x, y)):
        raise UserError("ExecuTorch files do not hold a choice of infinite numbers; export --to onnx")
    shape = graph.shapes[output]
    opposite = step(
        graph, "Subtract", [scalar(graph, 1), condition], f"{output}.opposite", graph.shapes[condition]
    )
    first = step(graph, "Multiply", [condition, x], f"{output}.first", shape)
    second = step(graph, "Multiply", [opposite, y], f"{output}.second", shape)
    graph.node("Add", [first, second], output)


def cast(graph: XnnpackGraph, inputs: Sequence[str], outputs: Sequence[str], options: Any) -> None:
    """Numbers of another kind, which are whole already."""
    graph.node("Copy", inputs, outputs[0])


def leaky(
    graph: XnnpackGraph, inputs: Sequence[str], outputs: Sequence[str], options: dict[str, Any]
) -> None:
    """A slope below zero, as a constant: numbers of nodes have six digits in what is read from a file."""
    prelu(graph, [inputs[0], scalar(graph, options["alpha"])], outputs, options)


def pool(
    operator: str, graph: XnnpackGraph, inputs: Sequence[str], outputs: Sequence[str], options: dict[str, Any]
) -> None:
    """The largest or the mean value of places, without those of a padding."""
    kernel = [options["filterHeight"], options["filterWidth"]]
    strides = [options["strideH"], options["strideW"]]
    pads = [0] * 4
    if options["padding"] == 0:
        sides = zip(graph.shapes[inputs[0]][1:3], kernel, strides, strict=True)
        total = [max((-(-side // stride) - 1) * stride + reach - side, 0) for side, reach, stride in sides]
        pads = [total[0] // 2, total[1] // 2, total[0] - total[0] // 2, total[1] - total[1] // 2]
    if kernel == [1, 1]:  # which XNNPACK does not pool
        raise UserError("ExecuTorch files do not hold a pool of single places; export --to onnx")
    graph.node(operator, inputs, outputs[0], flags=KEEP, **window(kernel, strides, pads))


def reshape(graph: XnnpackGraph, inputs: Sequence[str], outputs: Sequence[str], options: Any) -> None:
    """The entries in another shape."""
    shape = list(graph.shapes[outputs[0]])
    graph.node("StaticReshape", inputs[:1], outputs[0], num_dims=len(shape), new_shape=shape)


def transpose(graph: XnnpackGraph, inputs: Sequence[str], outputs: Sequence[str], options: Any) -> None:
    """Another order of dimensions."""
    perm = [int(axis) for axis in graph.values[inputs[1]]]
    graph.node("StaticTranspose", inputs[:1], outputs[0], num_dims=len(perm), perm=perm)


def pad(graph: XnnpackGraph, inputs: Sequence[str], outputs: Sequence[str], options: Any) -> None:
    """A constant around a tensor, zero or the third input."""
    before, after = ([int(count) for count in one] for one in graph.values[inputs[1]].T)
    value = float(graph.values[inputs[2]].item()) if len(inputs) > 2 else 0.0
    graph.node(
        "StaticConstantPad",
        inputs[:1],
        outputs[0],
        pre_paddings=before,
        post_paddings=after,
        padding_value=value,
    )


def concatenate(
    graph: XnnpackGraph, inputs: Sequence[str], outputs: Sequence[str], options: dict[str, Any]
) -> None:
    """Tensors beside each other, at most five at once."""
    axis, output, names = options["axis"], outputs[0], list(inputs)
    while len(names) > 5:
        shape = list(graph.shapes[names[0]])
        shape[axis] = sum(graph.shapes[name][axis] for name in names[:5])
        made = graph.tensor(f"{output}.{len(names)}", shape)
        graph.concatenate(names[:5], made, axis)
        names = [made, *names[5:]]
    if len(names) == 1:
        graph.node("Copy", names, output)
        return
    graph.concatenate(names, output, axis)


def split(graph: XnnpackGraph, inputs: Sequence[str], outputs: Sequence[str], options: Any) -> None:
    """Parts of a tensor."""
    x, sizes, axis = inputs[0], graph.values[inputs[1]], int(graph.values[inputs[2]])
    ends = [0, *np.cumsum(sizes).tolist()]
    for (start, end), output in zip(pairwise(ends), outputs, strict=True):
        shape = list(graph.shapes[x])
        offsets, shape[axis] = [0] * len(shape), end - start
        offsets[axis] = start
        graph.node("StaticSlice", [x], output, num_dims=len(shape), offsets=offsets, sizes=shape)


def softmax(graph: XnnpackGraph, inputs: Sequence[str], outputs: Sequence[str], options: Any) -> None:
    """Along the last dimension."""
    graph.node("Softmax", inputs, outputs[0])


def prelu(graph: XnnpackGraph, inputs: Sequence[str], outputs: Sequence[str], options: Any) -> None:
    """A slope for each channel below zero."""
    (x, slope), output = inputs, outputs[0]
    shape = graph.shapes[output]
    low = step(graph, "Clamp", [x], f"{output}.below", shape, ends=(-inf, 0))
    low = step(graph, "Multiply", [low, slope], f"{output}.sloping", shape)
    high = step(graph, "Clamp", [x], f"{output}.above", shape, ends=(0, inf))
    graph.node("Add", [low, high], output)


def reduce(
    kind: str, graph: XnnpackGraph, inputs: Sequence[str], outputs: Sequence[str], options: Any
) -> None:
    """The mean, the sum, the largest or the smallest value over neighbouring dimensions, by a pool over a row."""
    x, output = inputs[0], outputs[0]
    shape = graph.shapes[x]
    axes = [axis for axis in sorted(graph.values[inputs[1]].tolist()) if shape[axis] > 1]
    if axes and any(shape[axis] > 1 for axis in range(axes[0], axes[-1]) if axis not in axes):
        raise UserError(
            f"ExecuTorch files hold means, sums and largest values of neighbouring dimensions, channels last, not of "
            f"dimensions {', '.join(map(str, axes))} of {'x'.join(map(str, shape))}; export --to onnx"
        )
    if axes:
        first, last = axes[0], axes[-1] + 1
        before, count, after = (prod(part) for part in (shape[:first], shape[first:last], shape[last:]))
        x = _reshaped(graph, x, f"{output}.row", (1, before, count, after))
        if kind == "smallest":
            x = step(graph, "Negate", [x], f"{output}.opposite", graph.shapes[x])
        x = step(
            graph, "AvgPooling2d" if kind in ("mean", "sum") else "MaxPooling2d", [x], f"{output}.pooled",
            (1, before, 1, after), flags=KEEP, **window((1, count), (1, count)),
        )  # fmt: skip
        if kind == "smallest":
            x = step(graph, "Negate", [x], f"{output}.least", graph.shapes[x])
        if kind == "sum":
            x = step(graph, "Multiply", [x, scalar(graph, count)], f"{output}.sum", graph.shapes[x])
    final = list(graph.shapes[output])
    graph.node("StaticReshape", [x], output, num_dims=len(final), new_shape=final)


def _reshaped(graph: XnnpackGraph, x: str, name: str, shape: Sequence[int]) -> str:
    """The entries in another shape."""
    return step(graph, "StaticReshape", [x], name, shape, num_dims=len(shape), new_shape=list(shape))


def window(
    kernel: Sequence[int], strides: Sequence[int], pads: Sequence[int] = (0, 0, 0, 0)
) -> dict[str, Any]:
    """The fields of a pool, whose padding is at the top, left, bottom and right."""
    names = (
        "pooling_height", "pooling_width", "stride_height", "stride_width", "padding_top", "padding_left",
        "padding_bottom", "padding_right", "dilation_height", "dilation_width",
    )  # fmt: skip
    return dict(zip(names, map(int, (*kernel, *strides, *pads, 1, 1)), strict=True))


NODES: dict[str, Nodes] = {
    "ABS": partial(plain, "Abs"),
    "ADD": partial(plain, "Add"),
    "AVERAGE_POOL_2D": partial(pool, "AvgPooling2d"),
    "CAST": cast,
    "CONCATENATION": concatenate,
    "DIV": partial(plain, "Div"),
    "EQUAL": equal,
    "EXP": partial(plain, "Exp"),
    "FLOOR": partial(plain, "Floor"),
    "GREATER": partial(above, False, False),
    "GREATER_EQUAL": partial(above, True, True),
    "HARD_SWISH": partial(plain, "Hardswish"),
    "LEAKY_RELU": leaky,
    "LESS": partial(above, True, False),
    "LESS_EQUAL": partial(above, False, True),
    "LOGICAL_AND": partial(plain, "Multiply"),
    "LOGISTIC": partial(plain, "Sigmoid"),
    "MAXIMUM": partial(plain, "Maximum"),
    "MAX_POOL_2D": partial(pool, "MaxPooling2d"),
    "MEAN": partial(reduce, "mean"),
    "MINIMUM": partial(plain, "Minimum"),
    "MUL": partial(plain, "Multiply"),
    "NEG": partial(plain, "Negate"),
    "PAD": pad,
    "PADV2": pad,
    "PRELU": prelu,
    "REDUCE_MAX": partial(reduce, "largest"),
    "REDUCE_MIN": partial(reduce, "smallest"),
    "RELU": partial(within, 0, inf),
    "RELU6": partial(within, 0, 6),
    "RESHAPE": reshape,
    "ROUND": round_,
    "SELECT_V2": select,
    "SIGN": sign,
    "SOFTMAX": softmax,
    "SPLIT_V": split,
    "SQRT": partial(plain, "SquareRoot"),
    "SUB": partial(plain, "Subtract"),
    "SUM": partial(reduce, "sum"),
    "TANH": partial(plain, "Tanh"),
    "TRANSPOSE": transpose,
}
"""Operator of LiteRT -> what writes its nodes."""


class GraphBuilder(XnnpackGraph):
    """A graph that takes LiteRT's operators; see `model.deploy.litert.network.Builder`."""

    def operator(
        self, name: str, inputs: Iterable[str], outputs: Iterable[str], version: int = 1, **options: Any
    ) -> None:
        """Write the nodes of an operator."""
        NODES[name](self, list(inputs), list(outputs), options)
