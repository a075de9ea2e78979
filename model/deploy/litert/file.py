"""Files of LiteRT: tensors and operators as FlatBuffers, by the schema that `ai-edge-litert` brings."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from model.deploy.bits import bit_stream
from model.deploy.codes import Array
from model.deploy.packages import needed
from utils.checkpoint.exported import LITERT_MARK as MARK
from utils.errors import UserError

PACKAGE = "ai_edge_litert"
VERSION = 3  # of the schema
INPUT, OUTPUT = "input", "logits"
PACKED = {"int2": 2, "int4": 4, "int8": 8}  # bits of a code
SIGNATURE = "serving_default"
OPTIONS = {
    "ADD": "AddOptions", "AVERAGE_POOL_2D": "Pool2DOptions", "CAST": "CastOptions",
    "CONCATENATION": "ConcatenationOptions", "CONV_2D": "Conv2DOptions",
    "DEPTHWISE_CONV_2D": "DepthwiseConv2DOptions", "DEQUANTIZE": "DequantizeOptions", "DIV": "DivOptions",
    "FULLY_CONNECTED": "FullyConnectedOptions", "LEAKY_RELU": "LeakyReluOptions",
    "MAXIMUM": "MaximumMinimumOptions", "MAX_POOL_2D": "Pool2DOptions", "MEAN": "ReducerOptions",
    "MINIMUM": "MaximumMinimumOptions", "MUL": "MulOptions", "REDUCE_MAX": "ReducerOptions",
    "REDUCE_MIN": "ReducerOptions", "PAD": "PadOptions", "PADV2": "PadV2Options",
    "RESHAPE": "ReshapeOptions", "SOFTMAX": "SoftmaxOptions", "SPLIT_V": "SplitVOptions", "SUB": "SubOptions",
    "SUM": "ReducerOptions", "TRANSPOSE": "TransposeOptions",
}  # fmt: skip
"""The tables of options in the schema; other operators have none, or need none."""


def schema() -> Any:
    """LiteRT's schema, which has no types; raises UserError where it is not installed."""
    needed(PACKAGE)
    from ai_edge_litert import schema_py_generated

    return schema_py_generated


class FileBuilder:
    """A file under construction: one network, from `input` to `logits`.

    Args:
        named: the tensors whose names are written; those of others are for building alone, and would take up a third
            of the file of a small network.
    """

    def __init__(self, named: Collection[str]) -> None:
        self._named_tensors = {INPUT, OUTPUT, *named}
        self._schema = schema()
        self._buffers = [self._schema.BufferT()]  # the first stays empty
        self._tensors: list[Any] = []
        self._places: dict[str, int] = {}
        self._operators: list[Any] = []
        self._codes: list[tuple[int, int]] = []

    def tensor(self, name: str, shape: Sequence[int], kind: str = "float32") -> str:
        """A tensor that an operator makes, or the input; returns its name."""
        tensor = self._schema.TensorT()
        tensor.name, tensor.shape = name if name in self._named_tensors else "", np.array(shape, np.int32)
        tensor.type, tensor.buffer = getattr(self._schema.TensorType, kind.upper()), 0
        self._places[name] = len(self._tensors)
        self._tensors.append(tensor)
        return name

    def constant(
        self, name: str, value: Array, kind: str = "", scale: Array | None = None, axis: int = 0
    ) -> str:
        """A constant, by its name; the same name stands for the same value.

        Args:
            name: of the tensor.
            value: its entries; of the kinds int2 and int4 their codes.
            kind: int2 or int4, otherwise that of `value`.
            scale: float32 [channels] or [1], of codes.
            axis: of the channels.
        """
        if name in self._places:
            return name
        self.tensor(name, value.shape, kind or str(value.dtype))
        tensor, data = self._tensors[-1], packed(value, PACKED.get(kind, 8))
        tensor.buffer = self._buffer(data)
        if scale is not None:
            tensor.quantization = self._schema.QuantizationParametersT()
            tensor.quantization.scale = scale.astype(np.float32)
            tensor.quantization.zeroPoint = np.zeros(scale.size, np.int64)
            tensor.quantization.quantizedDimension = axis
        return name

    def _buffer(self, data: Array) -> int:
        self._buffers.append(self._schema.BufferT())
        self._buffers[-1].data = data
        return len(self._buffers) - 1

    def operator(
        self, name: str, inputs: Iterable[str], outputs: Iterable[str], version: int = 1, **options: Any
    ) -> None:
        """An operator of LiteRT; empty names of inputs stand for inputs that are left out."""
        assert not options or name in OPTIONS, name
        made = self._schema.OperatorT()
        code = (getattr(self._schema.BuiltinOperator, name), version)
        if code not in self._codes:
            self._codes.append(code)
        made.opcodeIndex = self._codes.index(code)
        made.inputs = np.array([self._places[one] if one else -1 for one in inputs], np.int32)
        made.outputs = np.array([self._places[one] for one in outputs], np.int32)
        if name in OPTIONS:
            made.builtinOptionsType = getattr(self._schema.BuiltinOptions, OPTIONS[name])
            made.builtinOptions = getattr(self._schema, f"{OPTIONS[name]}T")()
            for option, value in options.items():
                setattr(made.builtinOptions, option, value)
        self._operators.append(made)

    def finished(self, metadata: Mapping[str, str]) -> bytes:
        """The file, with texts that travel in it."""
        s = self._schema
        graph, model, signature = s.SubGraphT(), s.ModelT(), s.SignatureDefT()
        graph.name, graph.tensors, graph.operators = "main", self._tensors, self._operators
        ends = [self._places[name] for name in (INPUT, OUTPUT)]
        graph.inputs, graph.outputs = (np.array([end], np.int32) for end in ends)
        signature.signatureKey, signature.subgraphIndex = SIGNATURE, 0
        signature.inputs, signature.outputs = ([self._named(name)] for name in (INPUT, OUTPUT))
        model.version, model.description = VERSION, "lowbit"
        model.subgraphs, model.signatureDefs = [graph], [signature]
        model.operatorCodes, model.metadata = [], []
        for number, version in self._codes:
            code = s.OperatorCodeT()
            code.builtinCode, code.version = number, version
            code.deprecatedBuiltinCode = min(number, s.BuiltinOperator.PLACEHOLDER_FOR_GREATER_OP_CODES)
            model.operatorCodes.append(code)
        for name, text in metadata.items():
            entry = s.MetadataT()
            entry.name, entry.buffer = name, self._buffer(np.frombuffer(text.encode(), np.uint8))
            model.metadata.append(entry)
        model.buffers = self._buffers
        return written(model)

    def _named(self, name: str) -> Any:
        entry = self._schema.TensorMapT()
        entry.name, entry.tensorIndex = name, self._places[name]
        return entry


def written(model: Any) -> bytes:
    """A model of the schema as the bytes of a file."""
    import flatbuffers

    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), MARK)
    return bytes(builder.Output())


def packed(value: Array, bits: int) -> Array:
    """The entries of a tensor as bytes, uint8; codes of 2 and 4 bits with the first one lowest.

    Example:
        >>> import numpy as np
        >>> from model.deploy.litert.file import packed
        >>> packed(np.array([1, -2, 0, -1, 1]), 2)  # 1 + 2 * 4 + 0 * 16 + 3 * 64, and 1
        array([201,   1], dtype=uint8)
    """
    if bits == 8:
        return np.frombuffer(np.ascontiguousarray(value).tobytes(), np.uint8)
    return bit_stream(value & (2**bits - 1), bits)


def read_litert(path: Path) -> Any:
    """The model of a file, of the schema.

    Raises:
        UserError: it is missing or damaged, or not of this project's form: one input with images, one output `logits`.
    """
    s = schema()
    if not path.is_file():
        raise UserError(f"{path}: no such file or folder")
    data = path.read_bytes()
    if data[4:8] != MARK:
        raise UserError(f"{path}: not a valid file of LiteRT: it lacks the mark {MARK.decode()}")
    try:
        model = s.ModelT.InitFromObj(s.Model.GetRootAs(data, 0))
        graph = model.subgraphs[0]
        names = [text(graph.tensors[i].name) for i in (*graph.inputs, *graph.outputs)]
    except Exception as error:  # whatever reading bytes at wrong places raises
        raise UserError(f"{path}: not a valid file of LiteRT: {error or type(error).__name__}") from error
    if names != [INPUT, OUTPUT]:
        raise UserError(
            f"{path}: not a file that this tool exports: its inputs and outputs are {', '.join(names)}, not input and "
            "logits"
        )
    return model


def read_texts(path: Path) -> dict[str, str]:
    """The texts that travel in a file."""
    model = read_litert(path)
    try:
        return {
            text(entry.name): bytes(bytearray(model.buffers[entry.buffer].data)).decode()
            for entry in model.metadata or ()
        }
    except (ValueError, IndexError, TypeError) as error:
        raise UserError(f"{path}: not a valid file of LiteRT: its texts are damaged ({error})") from error


def text(value: bytes | str | None) -> str:
    """A text of the schema."""
    return value.decode() if isinstance(value, bytes) else value or ""
