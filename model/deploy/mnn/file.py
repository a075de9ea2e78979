"""Reading MNN's files, which are FlatBuffers of a schema that MNN does not bring for Python."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from model.deploy.codes import Array
from model.deploy.graph import INPUT, OUTPUT
from model.deploy.mnn.codes import decoded
from model.deploy.packages import needed
from utils.checkpoint.exported import KEY
from utils.errors import UserError

BUSINESS, OPERATORS, OUTPUTS, NAMES = 0, 3, 4, 7  # fields of a file
KIND, VALUE, NAME = 1, 2, 3  # of an operator
WEIGHT, BIAS, CODES = 1, 2, 3  # of a convolution
BYTES, SCALES, LONG = 0, 1, 11  # of its codes
FLOATS = 7  # of a constant
CONSTANT, CONVOLUTION = 7, 9  # kinds of values
KINDS = {"float32": np.dtype("<f4"), "int8": np.dtype("i1"), "int32": np.dtype("<i4")}


class Table:
    """A table of a FlatBuffers file, whose fields are known by their places."""

    def __init__(self, data: bytes, position: int) -> None:
        from flatbuffers.table import Table as Fields

        self._data = data
        self._fields: Any = Fields(data, position)

    def _place(self, field: int) -> int:
        """Where a field lies; 0 where it is left out."""
        offset = self._fields.Offset(4 + 2 * field)
        return offset + self._fields.Pos if offset else 0

    def number(self, field: int) -> int:
        """A byte; 0 where it is left out."""
        place = self._place(field)
        return self._data[place] if place else 0

    def text(self, field: int) -> str:
        """A text; empty where it is left out."""
        place = self._place(field)
        return self._fields.String(place).decode() if place else ""

    def table(self, field: int) -> Table | None:
        """A table in the table."""
        place = self._place(field)
        return Table(self._data, self._fields.Indirect(place)) if place else None

    def array(self, field: int, kind: str) -> Array:
        """Numbers, of 4 bytes or of one."""
        place = self._place(field)
        if not place:
            return np.zeros(0, KINDS[kind])
        start, size = self._vector(field)
        return np.frombuffer(self._data, KINDS[kind], size, start)

    def _vector(self, field: int) -> tuple[int, int]:
        offset = self._fields.Offset(4 + 2 * field)
        return (self._fields.Vector(offset), self._fields.VectorLen(offset)) if offset else (0, 0)

    def tables(self, field: int) -> Iterator[Table]:
        """Tables in a row."""
        start, size = self._vector(field)
        for i in range(size):
            yield Table(self._data, self._fields.Indirect(start + 4 * i))

    def texts(self, field: int) -> list[str]:
        """Texts in a row."""
        start, size = self._vector(field)
        return [self._fields.String(start + 4 * i).decode() for i in range(size)]


@dataclass(frozen=True, kw_only=True)
class Stored:
    """The weight of a layer.

    Attributes:
        codes: int32 [out, others]; None where it is float32.
        values: float32: the scale of each output channel, or all weights.
    """

    codes: Array | None
    values: Array


def _stored(operator: Table) -> Stored:
    value = operator.table(VALUE)
    assert value is not None
    packed = value.table(CODES)
    if packed is None:
        return Stored(codes=None, values=value.array(WEIGHT, "float32"))
    codes = decoded(packed.array(BYTES, "int8").view(np.uint8), bool(packed.number(LONG)))
    return Stored(codes=codes, values=packed.array(SCALES, "float32"))


@dataclass(frozen=True, kw_only=True)
class MnnFile:
    """What is read of a file.

    Attributes:
        operators: in their order.
        tensors: the names of all tensors.
        texts: what travels in the file.
    """

    operators: tuple[Table, ...]
    tensors: tuple[str, ...]
    texts: dict[str, str]

    def weight(self, name: str) -> Stored:
        """The weight of a layer whose operator has a name.

        Raises:
            UserError: there is no such operator.
        """
        for operator in self.operators:
            if operator.number(KIND) == CONVOLUTION and operator.text(NAME) == name:
                return _stored(operator)
        raise UserError(f"{name}: the file of MNN has no such weight")

    def numbers(self) -> list[bytes]:
        """The bytes of all constants, weights in full precision and biases, in the order of the operators."""
        found = []
        for operator in self.operators:
            value = operator.table(VALUE)
            fields = {CONSTANT: (FLOATS,), CONVOLUTION: (WEIGHT, BIAS)}.get(operator.number(KIND), ())
            found += [value.array(field, "float32").tobytes() for field in fields if value is not None]
        return found

    @property
    def layers(self) -> int:
        """How many convolutions and linear layers there are."""
        return sum(operator.number(KIND) == CONVOLUTION for operator in self.operators)


def read_mnn(path: Path) -> MnnFile:
    """What a file says of itself.

    Raises:
        UserError: it is missing or damaged, or not of this project's form: one input with images, one output `logits`.
    """
    needed("flatbuffers")
    from flatbuffers import encode, packer

    if not path.is_file():
        raise UserError(f"{path}: no such file or folder")
    data = path.read_bytes()
    try:
        root = Table(data, encode.Get(packer.uoffset, data, 0))
        found = MnnFile(
            operators=tuple(root.tables(OPERATORS)), tensors=tuple(root.texts(NAMES)),
            texts=_texts(root.text(BUSINESS)),
        )  # fmt: skip
        names = [*found.tensors[:1], *root.texts(OUTPUTS)[:1]]
    except Exception as error:  # whatever reading bytes at wrong places raises
        raise UserError(
            f"{path}: not a valid file of MNN, or cut short or damaged; export it anew"
        ) from error
    if names != [INPUT, OUTPUT]:
        raise UserError(f"{path}: not a file that this tool exports: it does not compute logits of an input")
    return found


def _texts(business: str) -> dict[str, str]:
    """The texts in a file's business code; none where another program has written it."""
    try:
        found = json.loads(business)[KEY]
        return {str(name): str(text) for name, text in found.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}


def business_code(texts: dict[str, str]) -> str:
    """The business code of a file with texts."""
    return json.dumps({KEY: texts}, separators=(",", ":"))
