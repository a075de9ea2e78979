"""A graph of XNNPACK as ExecuTorch's files hold it: values, and nodes that compute them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from model.deploy.codes import Array
from model.deploy.executorch.library import part
from model.deploy.litert.network import FIRST, LAST
from utils.errors import UserError

SERIALIZATION = "backends.xnnpack.serialization"
INPUT, OUTPUT = "input", "logits"
FROM_INPUT, FROM_OUTPUT = 1, 2  # flags of values that come from outside, and go there
NO_VALUE = 2**32 - 1
NO_OFFSET = 2**64 - 1
ALIGNMENT = 16  # of constants


class XnnpackGraph:
    """A graph under construction: one network, from `input` [1, channels, height, width] to `logits`.

    Inside, images have their channels last.

    Attributes:
        named: the data of constants by name. They are no part of the graph: a runtime that maps a file into memory
            gives the graph back once it has made its own, while it still reads constants of sums and products.
        ids: the numbers of the values by name.
        shapes: of all tensors and constants.
        values: the constants of floats, written or not.
    """

    def __init__(self) -> None:
        self.named: dict[str, bytes] = {}
        self.ids: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.values: dict[str, Array] = {}
        self._schema = part(f"{SERIALIZATION}.xnnpack_graph_schema")
        self._xvalues: list[Any] = []
        self._xnodes: list[Any] = []
        self._constants = [self._schema.ConstantDataOffset(0, 0)]

    def tensor(self, name: str, shape: Sequence[int], kind: str = "float32") -> str:
        """A tensor that a node makes, or the input; returns its name. Numbers of all kinds are floats here."""
        shape = self.shapes[name] = tuple(int(side) for side in shape)
        if name != INPUT:
            outside = (1, FROM_OUTPUT) if name == OUTPUT else (NO_VALUE, 0)
            self._value(name, "fp32", shape, outside=outside)
            return name
        first = tuple(shape[i] for i in FIRST) if len(shape) == 4 else shape
        self._value("image", "fp32", first, outside=(0, FROM_INPUT))
        self._value(name, "fp32", shape)
        perm = list(LAST) if len(shape) == 4 else list(range(len(shape)))
        self.node("StaticTranspose", ["image"], name, num_dims=len(shape), perm=perm)
        return name

    def constant(
        self, name: str, value: Array, kind: str = "", scale: Array | None = None, axis: int = 0
    ) -> str:
        """A constant of floats, by its name, which stands for one value. It is written when a node reads it."""
        self.values.setdefault(name, value)
        self.shapes.setdefault(name, tuple(value.shape))
        return name

    def codes(self, name: str, value: Array, scale: Array, axis: int) -> str:
        """The codes of a weight, int8, with a scale for each output channel, along an axis."""
        if name not in self.ids:
            scale = scale.astype(np.float32)
            place = self._data(f"{name}.scale", scale.tobytes())
            quantized = self._schema.PerChannelQuant([], axis, scale_buffer_idx=place, num_scales=scale.size)
            data = self._data(name, value.astype(np.int8).tobytes())
            self.shapes[name] = tuple(value.shape)
            self._value(name, "qcint8", value.shape, data=data, quantized=quantized)
        return name

    def dynamic(self, name: str, source: str, dimensions: int) -> str:
        """A tensor quantized by the lowest and the highest value over its last dimensions; returns its name."""
        if name not in self.ids:
            quantized = self._schema.PerTokenDynamicQuant(dimensions)
            self.shapes[name] = self.shapes[source]
            self._value(name, "qdint8", self.shapes[name], quantized=quantized)
            self.node("Convert", [source], name)
        return name

    def _value(
        self, name: str, kind: str, shape: Sequence[int], *, data: int = 0, quantized: Any = None,
        outside: tuple[int, int] = (NO_VALUE, 0),
    ) -> None:  # fmt: skip
        s = self._schema
        shape = [int(side) for side in shape] or [1]
        place = self.ids[name] = len(self._xvalues)
        value = s.XNNTensorValue(
            datatype=getattr(s.XNNDatatype, f"xnn_datatype_{kind}"), num_dims=len(shape), dims=shape,
            constant_buffer_idx=data, external_id=outside[0], flags=outside[1], id_out=place,
        )  # fmt: skip
        value = value if quantized is None else s.XNNQuantizedTensorValue(value, quantized)
        self._xvalues.append(s.XValue(value))

    def _data(self, name: str, data: bytes) -> int:
        """The place of a constant's bytes in the table of constants."""
        self.named[name] = data
        self._constants.append(self._schema.ConstantDataOffset(NO_OFFSET, len(data), name))
        return len(self._constants) - 1

    def id(self, name: str) -> int:
        """The number of a tensor; constants are written."""
        if name not in self.ids:
            value = self.values[name].astype(np.float32)
            if self.values[name].dtype.kind in "iu" and (value != self.values[name]).any():
                raise UserError(f"{name}: ExecuTorch files hold whole numbers below 2**24; export --to onnx")
            self._value(name, "fp32", value.shape, data=self._data(name, value.tobytes()))
        return self.ids[name]

    def node(
        self,
        operator: str,
        inputs: Sequence[str],
        output: str,
        *,
        ends: tuple[float, float] | None = None,
        flags: int = 0,
        **fields: Any,
    ) -> str:
        """A node of one or two tensors, within `ends`; returns the name of its output."""
        s, places = self._schema, [self.id(name) for name in inputs]
        names = ["input_id"] if len(places) == 1 else ["input1_id", "input2_id"]
        if operator in ("Conv2d", "DepthwiseConv2d", "FullyConnected"):
            names = ["input1_id", "filter_id", "bias_id"]
        fields |= dict(zip(names, places, strict=True))
        made = getattr(s, f"XNN{operator}")(**fields, output_id=self.id(output), flags=flags)
        limits = None if ends is None else s.OutputMinMax(*map(_number, ends))
        self._xnodes.append(s.XNode(made, 0, limits))
        return output

    def concatenate(self, inputs: Sequence[str], output: str, axis: int) -> None:
        """Two to five tensors beside each other."""
        places = [self.id(name) for name in inputs]
        fields = {f"input{i + 1}_id": places[i] if i < len(places) else NO_VALUE for i in range(5)}
        made = getattr(self._schema, f"XNNConcatenate{len(places)}")(
            axis=axis, output_id=self.id(output), flags=0, **fields
        )
        self._xnodes.append(self._schema.XNode(made, 0))

    def finished(self) -> dict[str, Any]:
        """The tables of the graph."""
        graph = self._schema.XNNGraph(
            version="0", xnodes=self._xnodes, xvalues=self._xvalues, num_externs=2, input_ids=[self.ids["image"]],
            output_ids=[self.ids[OUTPUT]], constant_data=self._constants,
        )  # fmt: skip
        return json.loads(json.dumps(graph, cls=part("exir._serialize._dataclass")._DataclassEncoder))


def _number(value: float) -> float | str:
    """A number as JSON has it."""
    return value if np.isfinite(value) else "inf" if value > 0 else "-inf"
