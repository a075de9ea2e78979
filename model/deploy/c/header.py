"""A network as a C header: weights as packed codes, and plain loops that compute one image with them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import numpy as np

from model.deploy.bits import bit_stream
from model.deploy.c import operators as op
from model.deploy.c.operators import Tensor, number
from model.deploy.codes import ActivationCodes, Array, WeightCodes
from model.deploy.graph import INPUT, OUTPUT, DeployGraph
from model.deploy.onnx_qdq import used_levels
from model.deploy.steps import Step, Steps, steps_of
from utils.checkpoint.exported import C_MARK
from utils.errors import UserError

PRODUCTS = ("Conv", "Gemm", "MatMul")
REDUCED = ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin")
MOVED = ("Pad", "Concat", "Transpose", "Slice")
TAKEN = (*PRODUCTS, *MOVED, *op.UNARY, *op.BINARY, *op.ALIASES, "Where", "Clip", "HardSigmoid", "LeakyRelu", "Cast",
         "MaxPool", "AveragePool", "GlobalAveragePool", *REDUCED)  # fmt: skip
MOST_CODE = 2**15 - 1  # of an int16
MOST_SUM = 2**31 - 1  # of an int32
INTERFACE = Path(__file__).with_name("interface.h")  # what does not depend on the network


class Memory:
    """Places of tensors in one array, which are used again once nothing reads them."""

    def __init__(self) -> None:
        self.size = 0
        self._taken: list[tuple[int, int]] = []  # where each begins and ends

    def take(self, count: int) -> int:
        """A place for `count` elements."""
        start = 0
        for begin, end in sorted(self._taken):
            if begin - start >= count:
                break
            start = max(start, end)
        self._taken.append((start, start + count))
        self.size = max(self.size, start + count)
        return start

    def give(self, start: int) -> None:
        """Nothing reads the elements there any more."""
        self._taken = [place for place in self._taken if place[0] != start]


@dataclass(frozen=True)
class _Codes:
    """Codes of an activation: where they are, and their quantizer."""

    place: str
    codes: ActivationCodes


class _Writer:
    """The body of the function, and the constants that it reads."""

    def __init__(self, network: Steps) -> None:
        self.network = network
        self.body: list[str] = []
        self.data: list[str] = []
        self.watched: dict[str, tuple[int, ...]] = {}
        self.row = 1  # weights of an output channel, at most
        self.integer = self.layers = 0  # products of codes, and all
        self.values, self.codes = Memory(), Memory()
        self._tensors = {INPUT: Tensor("input", network.shapes[INPUT])}
        self._quantized: dict[str, _Codes] = {}
        weights = {step.outputs[0]: step.weight for step in network.steps}
        self._weights = {name: weight for name, weight in weights.items() if weight is not None}
        self._held: dict[str, tuple[Memory, int]] = {}  # buffers that tensors own
        self._owner: dict[str, str] = {}  # tensor -> the one whose buffer it is in
        self._last: dict[str, int] = {}
        aliases: dict[str, str] = {}
        for i, step in enumerate(network.steps):
            if step.operator in op.ALIASES:
                aliases[step.outputs[0]] = aliases.get(step.inputs[0], step.inputs[0])
            for name in step.inputs:
                self._last[aliases.get(name, name)] = i
        self._readers: dict[str, list[Step]] = {}
        for step in network.steps:
            for name in step.inputs:
                self._readers.setdefault(name, []).append(step)

    def write(self) -> None:
        """Write all steps."""
        for i, step in enumerate(self.network.steps):
            if step.activation is not None:
                self._activation(step, step.activation)
            elif step.weight is None:  # a weight is written with the layer that reads it
                self._step(step)
            for name in [name for name in self._held if self._last.get(name, i) <= i]:
                memory, start = self._held.pop(name)
                memory.give(start)

    def _shape(self, name: str) -> tuple[int, ...]:
        shape = self.network.shapes.get(name, (0,))
        if 0 in shape:
            raise UserError(f"{name}: a tensor of unknown or no size is not written as C; export --to onnx")
        return shape

    def _buffer(self, name: str) -> Tensor:
        """A place for a result."""
        shape = self._shape(name)
        if name == OUTPUT:
            self._tensors[name] = Tensor("logits", shape)
        else:
            start = self.values.take(prod(shape))
            self._held[name] = self.values, start
            self._tensors[name] = Tensor(f"(values + {start})" if start else "values", shape)
        return self._tensors[name]

    def _tensor(self, name: str) -> Tensor:
        """A tensor of float values, which may be a constant."""
        if name not in self._tensors:
            value = self._values(name)
            self._tensors[name] = Tensor(self.constant(value), value.shape)
        return self._tensors[name]

    def _values(self, name: str) -> Array:
        """A constant, or a weight that something else than a product reads."""
        return self._weights[name].values() if name in self._weights else self.network.constants[name]

    def constant(self, value: Array, kind: str = "float") -> str:
        """A constant array, by its name."""
        name = f"lowbit_k{len(self.data)}"
        flat = value.reshape(-1)
        texts = [number(each) for each in flat] if kind == "float" else [str(int(each)) for each in flat]
        lines = [", ".join(texts[i : i + 16]) for i in range(0, len(texts), 16)]
        body = ",\n".join(lines)
        self.data.append(f"static const {kind} {name}[{len(texts)}] = {{\n{body}}};")
        return name

    def _activation(self, step: Step, codes: ActivationCodes) -> None:
        """Codes for products, and float levels where something else reads them."""
        name, x = step.outputs[0], self._tensor(step.inputs[0])
        shape = self._shape(name)
        count = prod(shape)
        self.watched[codes.name] = shape
        if not codes.integer:
            self.body.append(f"    LOWBIT_WATCH({x.place}, {count}, 1.0f)  {comment(codes.name)}")
            self._alias(name, step.inputs[0])
            return
        start = self.codes.take(count)
        place = f"(codes + {start})" if start else "codes"
        ends = f"{codes.lowest}, {codes.highest}"
        step_size = number(1.0 if codes.step is None else codes.step)
        self.body += [
            f"    for (int i = 0; i < {count}; ++i)  {comment(codes.name)}",
            f"        {place}[i] = lowbit_quantize({x.place}[i], {step_size}, {ends});",
            f"    LOWBIT_WATCH({place}, {count}, {number(codes.scale)})",
        ]
        self._quantized[name] = _Codes(place, codes)
        self._held[f"{name} as codes"] = self.codes, start
        self._last[f"{name} as codes"] = self._last.get(name, 0)
        if all(self._by_codes(reader, name) for reader in self._readers.get(name, [])):
            return
        y = self._buffer(name)
        scale = number(codes.scale)
        self.body.append(f"    for (int i = 0; i < {count}; ++i) {y.place}[i] = (float){place}[i] * {scale};")

    def _by_codes(self, reader: Step, name: str) -> bool:
        """Whether an operator multiplies the codes of `name` by those of a weight."""
        if reader.operator not in PRODUCTS or reader.inputs[0] != name:
            return False
        weight = self._weights.get(reader.inputs[1])
        by_output = reader.operator == "Conv" or reader.attributes.get("transB")
        if weight is None or not weight.scaled or not by_output or not _by_output(weight.scale, weight):
            return False
        codes, sizes = self._quantized[name].codes, np.abs(weight.codes.astype(np.int64))
        largest = int(sizes.reshape(len(sizes), -1).sum(1).max()) * max(abs(codes.lowest), abs(codes.highest))
        return int(sizes.max()) <= MOST_CODE and largest <= MOST_SUM

    def _alias(self, name: str, source: str) -> None:
        """`name` is in the buffer of `source`, which is held as long."""
        owner = self._owner.get(source, source)
        self._owner[name] = owner
        self._tensors[name] = replace(self._tensor(source), shape=self._shape(name))
        self._last[owner] = max(self._last.get(owner, 0), self._last.get(name, 0))

    def _step(self, step: Step) -> None:
        """One operator."""
        name = step.outputs[0]
        if len([each for each in step.outputs if each]) > 1:
            raise op.refused(step, f"{step.operator} with several results")
        if step.operator in op.ALIASES and name != OUTPUT:
            self._alias(name, step.inputs[0])
            return
        self.body.append(f"    {comment(step.layer or step.operator)}")
        if step.operator in PRODUCTS:
            self._product(step)
            return
        given = [each for each in step.inputs if each]
        values = [self.network.constants.get(each) for each in step.inputs]
        if step.operator in op.BINARY and len(given) != 2:
            raise op.refused(step, f"{step.operator} of {len(given)} tensors")
        if step.operator in ("MaxPool", "AveragePool") and len(self._shape(given[0])) != 4:
            raise op.refused(step, "a pool of other data than images")
        count = 3 if step.operator == "Where" else 2 if step.operator in op.BINARY else 1
        inputs = [self._tensor(each) for each in (given if step.operator == "Concat" else given[:count])]
        y = self._buffer(name)
        x = inputs[0]
        if step.operator in op.ALIASES:
            self.body.append(f"    for (int i = 0; i < {y.size}; ++i) {y.place}[i] = {x.place}[i];")
        elif step.operator in ("MaxPool", "AveragePool"):
            self.body += op.pooled(step, x, y)
        elif step.operator == "GlobalAveragePool":
            self.body += op.reduced(x, y, range(2, len(x.shape)), "Mean")
        elif step.operator in REDUCED:
            axes = op.axes_of(step, values, len(x.shape))
            self.body += op.reduced(x, y, axes, step.operator.removeprefix("Reduce"))
        elif step.operator == "Pad":
            self.body += self._pad(step, x, y, values)
        elif step.operator == "Concat":
            axis, start = step.attributes["axis"] % len(y.shape), 0
            for each in inputs:
                self.body += op.copied(each, y, lambda k, s=start: f"i{k} + {s}" if k == axis else f"i{k}")
                start += each.shape[axis]
        elif step.operator == "Transpose":
            self.body += op.transposed(x, y, step.attributes["perm"])
        elif step.operator == "Slice":
            self.body += op.sliced(x, y, op.part_of(step, x, values))
        else:
            self.body += op.elementwise(step, inputs, y, values)

    def _pad(self, step: Step, x: Tensor, y: Tensor, values: list[Array | None]) -> list[str]:
        if step.attributes.get("mode", b"constant") != b"constant" or values[1] is None:
            raise op.refused(step, "padding with other values than a constant")
        before = values[1].tolist()[: len(x.shape)]
        value = values[2] if len(values) > 2 else None
        op.need_constants(step, values)
        if len(values) > 3 and values[3] is not None:
            axes = [int(axis) % len(x.shape) for axis in values[3]]
            before = [before[axes.index(axis)] if axis in axes else 0 for axis in range(len(x.shape))]
        return op.padded(x, y, before, 0.0 if value is None else float(value.reshape(-1)[0]))

    def _product(self, step: Step) -> None:
        """A convolution or a linear layer."""
        attributes, name = step.attributes, step.outputs[0]
        weight = self._weights.get(step.inputs[1])
        known = weight is not None or step.inputs[1] in self.network.constants
        if not known or step.inputs[0] not in self.network.shapes:
            raise op.refused(step, f"a {step.operator} whose second factor is no weight")
        shape = self._shape(step.inputs[0])
        flipped = step.operator == "MatMul" or (step.operator == "Gemm" and not attributes.get("transB"))
        values = self._values(step.inputs[1]) if weight is None or flipped else None
        values = values.T if values is not None and flipped else values
        whole = values if weight is None or values is not None else weight.codes
        assert whole is not None
        size = tuple(int(each) for each in whole.shape)
        output = self._shape(name)
        if step.operator == "Conv":
            strides, dilations = attributes.get("strides", [1, 1]), attributes.get("dilations", [1, 1])
            pads = attributes.get("pads", [0, 0, 0, 0])
            geometry: tuple[int, ...] = (
                *shape[1:],
                *output[1:],
                *size[2:],
                *strides,
                *pads[:2],
                *dilations,
                attributes.get("group", 1),
            )
            if len(geometry) != 15 or attributes.get("auto_pad", b"NOTSET") != b"NOTSET":
                raise op.refused(step, "a convolution of other data than images")
        else:
            if prod(shape[:-1]) != 1 or attributes.get("transA") or len(size) != 2:
                raise op.refused(step, "a linear layer of several positions")
            if (attributes.get("alpha", 1), attributes.get("beta", 1)) != (1, 1):
                raise op.refused(step, "a factor of a Gemm")
            geometry = (shape[-1], 1, 1, size[0], 1, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1)
        bias = next((self._tensor(each).place for each in step.inputs[2:] if each), "NULL")
        self.row = max(self.row, prod(size[1:]))
        shown = ", ".join(map(str, geometry))
        written = f"&(lowbit_weight){{{self._weight(weight, values)}}}, {bias}, (lowbit_shape){{{shown}}}"
        found = self._quantized.get(step.inputs[0])
        self.layers += 1
        if found is not None and self._by_codes(step, step.inputs[0]):
            self.integer += 1
            y = self._buffer(name)
            scale = number(found.codes.scale)
            self.body.append(f"    lowbit_codes({found.place}, {scale}, {written}, row.codes, {y.place});")
        else:
            x = self._tensor(step.inputs[0])
            y = self._buffer(name)
            self.body.append(f"    lowbit_values({x.place}, {written}, row.values, {y.place});")

    def _weight(self, weight: WeightCodes | None, values: Array | None) -> str:
        """The fields of a `lowbit_weight`."""
        if weight is None or values is not None:
            assert values is not None
            return f".values = {self.constant(values)}"
        table, rows = used_levels(weight) if weight.table is not None else (None, None)
        parts = [weight.scale, weight.offset] if table is None else [rows]
        if any(part is not None and not _by_output(part, weight) for part in parts):
            return f".values = {self.constant(weight.values())}"
        bits = max(1, int(weight.base - 1).bit_length())
        fields = [f".digits = {self.constant(bit_stream(weight.digits, bits), 'uint8_t')}", f".bits = {bits}"]
        if table is not None:
            ordered = table if rows is None or rows.size == 1 else table[rows.reshape(-1)]
            fields += [f".table = {self.constant(ordered)}", f".base = {weight.base}"]
            return ", ".join([*fields, f".per_output = {int(len(ordered) > 1)}"])
        sizes = [part.size for part in parts if part is not None]
        count = max(sizes)
        for word, part in (("scale", weight.scale), ("offset", weight.offset)):
            if part is not None:
                fields.append(f".{word} = {self.constant(np.broadcast_to(part.reshape(-1), (count,)))}")
        return ", ".join(
            [*fields, f".low = {weight.lowest}", f".gap = {weight.gap}", f".per_output = {int(count > 1)}"]
        )


def _by_output(value: Array, weight: WeightCodes) -> bool:
    """Whether a value is one for the whole weight, or one for each output channel."""
    return value.size == 1 or value.shape == (len(weight.codes), *[1] * (weight.codes.ndim - 1))


def comment(text: str) -> str:
    """A comment of C; what would end it, or is no plain text, is left out.

    Example:
        >>> from model.deploy.c.header import comment
        >>> comment("layer1.*/0")
        '/* layer1.0 */'
    """
    return f"/* {''.join(c for c in text if c.isascii() and (c.isalnum() or c in '._-+ '))} */"


def c_header(graph: DeployGraph) -> str:
    """The text of the header, whose `lowbit_run(input, logits)` computes one image, float32 [channels, height, width].

    Raises:
        UserError: an operator of the network has no form in C.
    """
    network = steps_of(graph, TAKEN, "C")
    whole = network.shapes[OUTPUT]
    if len(whole) != 2 or whole[0] != 1 or not network.steps or OUTPUT not in network.steps[-1].outputs:
        shown = "x".join(map(str, whole))
        raise UserError(
            f"logits of the shape {shown} are not written as C: flatten them, or export --to onnx"
        )
    writer = _Writer(network)
    writer.write()
    _, channels, height, width = network.shapes[INPUT]
    described: Mapping[str, object] = {
        "quantizers": writer.watched,
        "shape": [channels, height, width],
        "classes": network.shapes[OUTPUT][-1],
        "integer": writer.integer,
        "layers": writer.layers,
        "texts": dict(network.metadata),
    }
    parts = [
        C_MARK + json.dumps(described),  # what a program must know
        "// A low-bit network: lowbit_run(input, logits) computes the logits of one normalised image.",
        "#ifndef LOWBIT_NETWORK_H",
        "#define LOWBIT_NETWORK_H",
        "",
        f"#define LOWBIT_CHANNELS {channels}",
        f"#define LOWBIT_HEIGHT {height}",
        f"#define LOWBIT_WIDTH {width}",
        f"#define LOWBIT_CLASSES {network.shapes[OUTPUT][-1]}",
        f"#define LOWBIT_WATCHED {sum(map(prod, writer.watched.values()))}  // values that LOWBIT_WATCH sees",
        "",
        INTERFACE.read_text("utf-8"),
        *writer.data,
        "",
        "static void lowbit_run(const float *input, float *logits) {",
        f"    static float values[{max(1, writer.values.size)}];",
        f"    static int16_t codes[{max(1, writer.codes.size)}];",
        f"    static union {{ float values[{writer.row}]; int16_t codes[{writer.row}]; }} row;",
        "    (void)values, (void)codes, (void)row, (void)lowbit_codes, (void)lowbit_values, (void)lowbit_quantize;",
        *writer.body,
        "}",
        "",
        "#endif",
    ]
    return "\n".join(parts) + "\n"
