"""What a Core ML package on disk holds: operators, constants, weights. Core ML itself is not needed."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from model.deploy.bits import from_bit_stream
from model.deploy.codes import ActivationCodes, Array
from model.deploy.coreml.operators import SCALED
from model.deploy.coreml.package import NAMES, Palette
from model.deploy.packages import needed
from utils.errors import UserError

if TYPE_CHECKING:
    from model.deploy.graph import DeployGraph

DATA = Path("Data/com.apple.CoreML")  # below the package
MARK = 0xDEADBEEF  # in front of each entry of the file of weights
ENTRY = "<IIQQQ"  # mark, type, bytes, their place, and bits without meaning at the end
DAMAGED = (LookupError, ValueError, TypeError, AttributeError, OverflowError, OSError, struct.error)
TUPLES = {"floats": np.float32, "ints": np.int32, "bools": np.bool_, "longInts": np.int64}


@dataclass(frozen=True)
class Operator:
    """An operator: its word, the names of its inputs, and the constants among its inputs and attributes."""

    word: str
    inputs: dict[str, tuple[str, ...]]
    constants: dict[str, Any]


class Package:
    """The operators of a package by the name of their first output.

    Args:
        path: the folder.

    Attributes:
        metadata: the texts that travel in the file.
        names: the tensors of quantizers, by the quantizers' names.

    Raises:
        UserError: it is damaged, not of this project, or coremltools is not installed.
    """

    def __init__(self, path: Path) -> None:
        needed("coremltools")
        import coremltools

        tools: Any = coremltools
        self.path = path
        try:
            self.spec: Any = tools.utils.load_spec(str(path))
            self.metadata = dict(self.spec.description.metadata.userDefined)
            (self.block,) = self.spec.mlProgram.functions["main"].block_specializations.values()
            self.names: dict[str, str] = json.loads(self.metadata[NAMES])
            self._proto = {op.outputs[0].name: op for op in self.block.operations}
        except Exception as error:  # protobuf's reader and that of packages have exceptions of their own
            raise UserError(f"{path}: not a Core ML package that this tool exports, or damaged") from error

    def count(self, words: tuple[str, ...]) -> int:
        """How many operators have one of these words."""
        return sum(op.type in words for op in self.block.operations)

    def activation_tensors(self) -> dict[str, str]:
        """The tensors of quantizers of activations, by the quantizers' names."""
        return {name: tensor for name, tensor in self.names.items() if not name.endswith("weight")}

    def operator(self, name: str) -> Operator:
        """What makes a tensor; raises KeyError."""
        found = self._proto[name]
        inputs = {key: tuple(item.name for item in value.arguments) for key, value in found.inputs.items()}
        values = {
            key: value.arguments[0].value for key, value in found.inputs.items() if inputs[key] == ("",)
        }
        values |= dict(found.attributes.items())
        return Operator(found.type, inputs, {key: self._value(value) for key, value in values.items()})

    def constant(self, operator: Operator, name: str) -> Array:
        """An input of an operator that is a constant; raises KeyError."""
        if name in operator.constants:
            return operator.constants[name]
        return self.operator(operator.inputs[name][0]).constants["val"]

    def weight(self, name: str) -> Palette:
        """The weight of a quantizer; raises KeyError."""
        tensor = self.names[name]
        found = self.operator(tensor)
        factor = None
        if f"{tensor}{SCALED}" in self._proto:
            factor = self.constant(self.operator(f"{tensor}{SCALED}"), "y").reshape(-1)
        if found.word == "const":
            value = found.constants["val"]
            table, indices = np.unique(value, return_inverse=True)
            return Palette(indices=indices.reshape(value.shape), table=table.reshape(1, -1))
        table, indices = (self.constant(found, part) for part in ("lut", "indices"))
        if "shape" in found.constants:  # the form of iOS 16
            shape, bits = self.constant(found, "shape").astype(int), int(np.log2(len(table)))
            indices = from_bit_stream(indices, bits, int(shape.prod())).reshape(shape)
        entries = len(table) if table.ndim == 1 else table.shape[-2]
        return Palette(indices=indices.astype(np.int64), table=table.reshape(-1, entries), factor=factor)

    def activation(self, name: str) -> tuple[float, ...]:
        """Step, lowest and highest code, and scale of a quantizer in that form; raises KeyError."""
        scaled = self.operator(self.names[name])
        clipped = self.operator(scaled.inputs["x"][0])
        rounded = self.operator(clipped.inputs["x"][0])
        divided = self.operator(rounded.inputs["x"][0])
        words = [operator.word for operator in (scaled, clipped, rounded, divided)]
        if words != ["mul", "clip", "round", "real_div"]:
            raise KeyError(name)
        parts = ((divided, "y"), (clipped, "alpha"), (clipped, "beta"), (scaled, "y"))
        return tuple(float(self.constant(*part)) for part in parts)

    def _value(self, value: Any) -> Any:
        """A constant, from the protobuf message or from the file of weights."""
        shape = tuple(dim.constant.size for dim in value.type.tensorType.dimensions)
        kind = type(value.type.tensorType).DESCRIPTOR.file.enum_types_by_name["DataType"]
        word = kind.values_by_number[value.type.tensorType.dataType].name
        if value.WhichOneof("value") == "blobFileValue":
            name = value.blobFileValue.fileName.removeprefix("@model_path/")
            return self._stored(self.path / DATA / name, value.blobFileValue.offset, word, shape)
        tensor = value.immediateValue.tensor
        found = tensor.WhichOneof("value")
        if found == "strings":
            return tensor.strings.values[0]
        if found == "bytes":
            return _numbers(tensor.bytes.values, word, shape)
        return np.array(getattr(tensor, found).values, TUPLES[found]).reshape(shape)

    def _stored(self, file: Path, offset: int, word: str, shape: tuple[int, ...]) -> Array:
        with file.open("rb") as stream:
            stream.seek(offset)
            mark, _, size, place, _ = struct.unpack(ENTRY, stream.read(struct.calcsize(ENTRY)))
            if mark != MARK or place + size > file.stat().st_size:
                raise ValueError("no entry of a file of weights")
            stream.seek(place)
            content = stream.read(size)
        return _numbers(content, word, shape)


def _numbers(content: bytes, word: str, shape: tuple[int, ...]) -> Array:
    """Numbers of a type of Core ML, in the order of C."""
    kinds = {"FLOAT32": np.float32, "FLOAT16": np.float16, "UINT8": np.uint8, "INT8": np.int8}
    kinds |= {
        f"{sign}INT{bits}": f"<{letter}{bits // 8}"
        for sign, letter in (("", "i"), ("U", "u"))
        for bits in (16, 32)
    }
    if word in kinds:
        return np.frombuffer(content, kinds[word]).reshape(shape)
    found = np.frombuffer(content, np.uint8)
    return from_bit_stream(found, int(word.removeprefix("UINT")), int(np.prod(shape))).reshape(shape)


@dataclass(frozen=True)
class Agreement:
    """A package beside its checkpoint.

    Attributes:
        weights: how many quantized weights it holds.
        codes: how many elements these have.
        activations: how many quantizers of activations were compared: those that divide, round and clip.
        faults: what is not the checkpoint's.
    """

    weights: int
    codes: int
    activations: int
    faults: tuple[str, ...]


def agreement(path: Path, graph: DeployGraph) -> Agreement:
    """Compare the weights of a package bit by bit, and the constants of its quantizers, with those of a graph.

    Raises:
        UserError: the package is damaged.
    """
    package, faults = Package(path), []
    for name, weight in graph.weights.items():
        try:
            found = package.weight(name)
        except DAMAGED:
            faults.append(f"it has no {name}, a quantized weight of the checkpoint, or a damaged one")
            continue
        if found.indices.shape != weight.codes.shape:
            faults.append(
                f"{name} has the shape {found.indices.shape}, and {weight.codes.shape} in the checkpoint"
            )
            continue
        other = (found.values().view(np.int32) != weight.values().astype(np.float32).view(np.int32)).mean()
        if other:
            faults.append(f"{100 * other:.1f} % of the values of {name} are others")
    compared = 0
    for name, codes in graph.activations.items():
        if not codes.integer or codes.signs or codes.step is None:
            continue
        compared += 1
        try:
            same = package.activation(name) == _constants(codes)
        except DAMAGED:
            same = False
        if not same:
            faults.append(f"{name} is not the quantizer of the checkpoint")
    return Agreement(
        weights=len(graph.weights), codes=sum(weight.codes.size for weight in graph.weights.values()),
        activations=compared, faults=tuple(faults),
    )  # fmt: skip


def _constants(codes: ActivationCodes) -> tuple[float, ...]:
    assert codes.step is not None
    return (
        float(np.float32(codes.step)),
        float(codes.lowest),
        float(codes.highest),
        float(np.float32(codes.scale)),
    )


def other_operators(package: Package, wanted: Package) -> tuple[str, ...]:
    """The tensors that two packages make by other operators, from other tensors or with other constants.

    Raises:
        UserError: the first package is damaged.
    """
    names = [[op.outputs[0].name for op in each.block.operations] for each in (package, wanted)]
    if names[0] != names[1]:
        return tuple(sorted(set(names[0]).symmetric_difference(names[1]))) or ("the order of operators",)
    found = []
    for name in names[1]:
        try:
            one, other = package.operator(name), wanted.operator(name)
            same = (one.word, one.inputs, one.constants.keys()) == (
                other.word,
                other.inputs,
                other.constants.keys(),
            )
            same = same and all(_equal(value, other.constants[key]) for key, value in one.constants.items())
        except DAMAGED:
            same = False
        if not same:
            found.append(name)
    return tuple(found)


def _equal(one: Any, other: Any) -> bool:
    """Whether constants are the same, to the bit."""
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())
    return bool(one == other)
