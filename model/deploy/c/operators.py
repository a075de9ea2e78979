"""The operators of a network as C: one loop each, for one image."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from model.deploy.codes import Array
from model.deploy.steps import Step
from utils.errors import UserError

UNARY = {  # of a value x
    "Relu": "x > 0 ? x : 0",
    "Sigmoid": "1 / (1 + expf(-x))",
    "HardSwish": "x * fminf(fmaxf(x / 6 + 0.5f, 0), 1)",
    "Tanh": "tanhf(x)",
    "Erf": "erff(x)",
    "Exp": "expf(x)",
    "Sqrt": "sqrtf(x)",
    "Abs": "fabsf(x)",
    "Neg": "-x",
    "Reciprocal": "1 / x",
    "Round": "nearbyintf(x)",  # half to even
    "Floor": "floorf(x)",
    "Sign": "(float)((x > 0) - (x < 0))",
    "Not": "x == 0",
    "IsInf": "isinf(x) != 0",
    "IsNaN": "isnan(x) != 0",
    "Identity": "x",
    "Expand": "x",  # to more dimensions
}
BINARY = {  # of values x and y
    "Add": "x + y",
    "Sub": "x - y",
    "Mul": "x * y",
    "Div": "x / y",
    "Pow": "powf(x, y)",
    "Max": "fmaxf(x, y)",
    "Min": "fminf(x, y)",
    "PRelu": "x < 0 ? x * y : x",
    "Greater": "x > y",
    "GreaterOrEqual": "x >= y",
    "Less": "x < y",
    "LessOrEqual": "x <= y",
    "Equal": "x == y",
    "And": "x != 0 && y != 0",
    "Or": "x != 0 || y != 0",
}
ALIASES = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")  # the same values in another shape
_CASTS = {1: "x", 11: "x", 6: "truncf(x)", 7: "truncf(x)", 9: "x != 0"}  # by ONNX's numbers of types


@dataclass(frozen=True)
class Tensor:
    """A tensor of C: float values of one image, or a constant.

    Attributes:
        place: the C expression of its first element.
        shape: with one image as the batch.
    """

    place: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """The number of its elements."""
        return prod(self.shape)


def number(value: float) -> str:
    """A float32 as an exact constant of C.

    Example:
        >>> from model.deploy.c.operators import number
        >>> number(0.75), number(-3.0), number(0.1)
        ('0.75f', '-3.0f', '0.1f')
    """
    single = np.float32(value)
    if not np.isfinite(single):
        return "NAN" if np.isnan(single) else "INFINITY" if single > 0 else "-INFINITY"
    return f"{single!s}f"  # the shortest text that reads as this float32


def looped(shape: Sequence[int], body: str, indent: str = "    ") -> list[str]:
    """Loops over i0, i1 and so on around a line, those over one element left out."""
    lines = []
    for axis, size in enumerate(shape):
        if size != 1:
            lines.append(f"{indent}for (int i{axis} = 0; i{axis} < {size}; ++i{axis})")
            indent += "    "
    return [*lines, f"{indent}{body}"]


def index(own: Sequence[int], shape: Sequence[int]) -> str:
    """Where the element at i0, i1, ... of `shape` is in a tensor that broadcasts to it, of the shape `own`.

    Example:
        >>> from model.deploy.c.operators import index
        >>> index((1, 3, 1, 5), (1, 3, 4, 5)), index((1,), (2, 2)), index((2, 2), (2, 2))
        ('i1 * 5 + i3', '0', 'i0 * 2 + i1')
    """
    parts, stride = [], 1
    for back, size in enumerate(reversed(own), 1):
        if size != 1:
            name = f"i{len(shape) - back}"
            parts.append(name if stride == 1 else f"{name} * {stride}")
        stride *= size
    return " + ".join(reversed(parts)) or "0"


def elementwise(
    step: Step, inputs: Sequence[Tensor], output: Tensor, constants: Sequence[Array | None]
) -> list[str]:
    """An operator that computes each element by itself, with broadcasting."""
    names = ("x", "y", "z")
    expression = _expression(step, constants)
    if all(each.size in (1, output.size) for each in inputs):  # one loop is enough
        shape, places = (output.size,), ["i0" if each.size > 1 else "0" for each in inputs]
    else:
        shape, places = output.shape, [index(each.shape, output.shape) for each in inputs]
    used = [
        (name, each, at)
        for name, each, at in zip(names, inputs, places, strict=False)
        if _reads(expression, name)
    ]
    given = " ".join(f"const float {name} = {each.place}[{at}];" for name, each, at in used)
    target = index(shape, shape)
    return looped(shape, f"{{ {given} {output.place}[{target}] = {expression}; }}")


def _reads(expression: str, name: str) -> bool:
    return re.search(rf"\b{name}\b", expression) is not None


def _expression(step: Step, constants: Sequence[Array | None]) -> str:
    attributes = step.attributes
    if step.operator == "Where":
        return "x != 0 ? y : z"
    if step.operator == "Clip":
        need_constants(step, constants)
        ends = [
            None if value is None else float(value.reshape(-1)[0]) for value in (*constants[1:3], None, None)
        ][:2]
        low = "x" if ends[0] is None else f"fmaxf(x, {number(ends[0])})"
        return low if ends[1] is None else f"fminf({low}, {number(ends[1])})"
    if step.operator == "HardSigmoid":
        alpha, beta = attributes.get("alpha", 0.2), attributes.get("beta", 0.5)
        return f"fminf(fmaxf({number(alpha)} * x + {number(beta)}, 0), 1)"
    if step.operator == "LeakyRelu":
        return f"x < 0 ? {number(attributes.get('alpha', 0.01))} * x : x"
    if step.operator == "Cast":
        if attributes["to"] not in _CASTS:
            raise refused(step, "a cast to a narrow type")
        return _CASTS[attributes["to"]]
    return UNARY.get(step.operator) or BINARY[step.operator]


def pooled(step: Step, x: Tensor, output: Tensor) -> list[str]:
    """Max and average pooling."""
    _, channels, height, width = x.shape
    kernel, strides, pads = (_pair(step, name) for name in ("kernel_shape", "strides", "pads"))
    dilations = _pair(step, "dilations")
    largest = step.operator == "MaxPool"
    counted = bool(step.attributes.get("count_include_pad", 0))
    combine = "sum = fmaxf(sum, v)" if largest else "sum += v"
    divisor = "" if largest else " / count"
    ends = tuple(step.attributes.get("pads", (0, 0, 0, 0)))[2:]
    places = f"y < {height + ends[0]} && x < {width + ends[1]}"  # with ceil_mode windows may go on behind the padding
    return [
        f"    for (int c = 0; c < {channels}; ++c)",
        f"        for (int i = 0; i < {output.shape[2]}; ++i)",
        f"            for (int j = 0; j < {output.shape[3]}; ++j) {{",
        f"                float sum = {'-INFINITY' if largest else '0'}; int count = 0;",
        f"                for (int k = 0; k < {kernel[0]}; ++k)",
        f"                    for (int l = 0; l < {kernel[1]}; ++l) {{",
        f"                        const int y = i * {strides[0]} + k * {dilations[0]} - {pads[0]};",
        f"                        const int x = j * {strides[1]} + l * {dilations[1]} - {pads[1]};",
        f"                        count += {f'({places})' if counted else '0'};",
        f"                        if (y < 0 || y >= {height} || x < 0 || x >= {width}) continue;",
        f"                        const float v = {x.place}[(c * {height} + y) * {width} + x];",
        f"                        {combine}{'' if counted else ', ++count'};",
        "                    }",
        f"                {output.place}[(c * {output.shape[2]} + i) * {output.shape[3]} + j] = sum{divisor};",
        "                (void)count;",
        "            }",
    ]


def _pair(step: Step, name: str) -> tuple[int, int]:
    default = (0, 0, 0, 0) if name == "pads" else (1, 1)
    found = tuple(step.attributes.get(name, default))
    return found[0], found[1]


def reduced(x: Tensor, output: Tensor, axes: Sequence[int], kind: str) -> list[str]:
    """The mean, the sum or an end over axes, which are kept with one element or left out."""
    kept = [1 if axis in axes else size for axis, size in enumerate(x.shape)]
    count = x.size // output.size
    first, ends = {"Max": ("-INFINITY", "fmaxf"), "Min": ("INFINITY", "fminf")}.get(kind, ("0", ""))
    target, value = f"{output.place}[{index(kept, x.shape)}]", f"{x.place}[{index(x.shape, x.shape)}]"
    lines = [f"    for (int i = 0; i < {output.size}; ++i) {output.place}[i] = {first};"]
    lines += looped(x.shape, f"{target} = {ends}({target}, {value});" if ends else f"{target} += {value};")
    if kind == "Mean":
        lines.append(f"    for (int i = 0; i < {output.size}; ++i) {output.place}[i] /= {count};")
    return lines


def _place(places: Sequence[str], shape: Sequence[int]) -> str:
    """Where the element at these places, expressions of C, is in a tensor."""
    strides = [prod(shape[axis + 1 :]) for axis in range(len(shape))]
    return " + ".join(f"({place}) * {stride}" for place, stride in zip(places, strides, strict=True))


def _zeros(shape: Sequence[int]) -> str:
    """The numbers that `looped` leaves out."""
    return " ".join(f"const int i{axis} = 0;" for axis, size in enumerate(shape) if size == 1)


def copied(x: Tensor, output: Tensor, at: Callable[[int], str]) -> list[str]:
    """All elements of `x` to places of the output, each axis to that of `at`."""
    place = _place([at(axis) for axis in range(len(output.shape))], output.shape)
    body = f"{{ {_zeros(x.shape)} {output.place}[{place}] = {x.place}[{index(x.shape, x.shape)}]; }}"
    return looped(x.shape, body)


def padded(x: Tensor, output: Tensor, before: Sequence[int], value: float) -> list[str]:
    """`x` within a border of `value`; a negative border is cut off."""
    places = [f"(i{axis} - {start})" if start else f"i{axis}" for axis, start in enumerate(before)]
    inside = " && ".join(
        f"{place} >= 0 && {place} < {size}" for place, size in zip(places, x.shape, strict=True)
    )
    chosen = f"{inside} ? {x.place}[{_place(places, x.shape)}] : {number(value)}"
    return looped(
        output.shape,
        f"{{ {_zeros(output.shape)} {output.place}[{index(output.shape, output.shape)}] = {chosen}; }}",
    )


def transposed(x: Tensor, output: Tensor, order: Sequence[int]) -> list[str]:
    """`x` with its axes in another order."""
    return copied(x, output, lambda axis: f"i{order[axis]}")


def sliced(x: Tensor, output: Tensor, starts: dict[int, tuple[int, int]]) -> list[str]:
    """A part of `x`: of each axis every step-th element from a start on; axis -> start, step."""
    parts = [(axis, *starts.get(axis, (0, 1))) for axis in range(len(x.shape))]
    place = _place([f"i{axis} * {step} + {start}" for axis, start, step in parts], x.shape)
    target = index(output.shape, output.shape)
    return looped(
        output.shape, f"{{ {_zeros(output.shape)} {output.place}[{target}] = {x.place}[{place}]; }}"
    )


def part_of(step: Step, x: Tensor, values: Sequence[Array | None]) -> dict[int, tuple[int, int]]:
    """Where a Slice begins, and its steps: axis -> start, step; `values` are its constant inputs."""
    starts, axes, steps = (
        values[1],
        values[3] if len(values) > 3 else None,
        values[4] if len(values) > 4 else None,
    )
    need_constants(step, values)
    assert starts is not None
    chosen = range(len(starts)) if axes is None else axes.tolist()
    found: dict[int, tuple[int, int]] = {}
    for place, axis in enumerate(chosen):
        size, step_size = x.shape[axis], 1 if steps is None else int(steps[place])
        first = slice(int(starts[place]), None, step_size).indices(size)[0]
        found[axis % len(x.shape)] = (first, step_size)
    return found


def axes_of(step: Step, constants: Sequence[Any], rank: int) -> tuple[int, ...]:
    """The axes that an operator reduces."""
    need_constants(step, constants)
    given = constants[1] if len(constants) > 1 and constants[1] is not None else step.attributes.get("axes")
    if given is None or len(given) == 0:
        return () if step.attributes.get("noop_with_empty_axes") else tuple(range(rank))
    return tuple(int(axis) % rank for axis in given)


def need_constants(step: Step, values: Sequence[Array | None]) -> None:
    """Refuse an operator that gets more than its first input from others, and not as constants."""
    if any(name and value is None for name, value in zip(step.inputs[1:], values[1:], strict=True)):
        raise refused(step, f"a {step.operator} whose other inputs are computed")


def refused(step: Step, what: str) -> UserError:
    """The error of a network that cannot be written."""
    return step.refused(f"{what} is not written as C")
