"""Files of other programs: the plain data in them, and what a file is that is no checkpoint. No code in them runs."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils.checkpoint.exported import what_instead


class NotPlainError(ValueError):
    """A file holds an object that is not plain data; the text names it."""


class _Kind:
    """Replaces `numpy.dtype` in a file: the type of numbers or of a text, and nothing else.

    NumPy's own trusts the file and can be made to read memory that it must not.
    """

    def __init__(self, name: str, *_: object) -> None:
        self.text = re.fullmatch(r"U\d+", name) is not None
        if not self.text and name not in (
            "f2",
            "f4",
            "f8",
            *(f"{sign}{n}" for sign in "iu" for n in "1248"),
            "b1",
        ):
            raise NotPlainError(f"a NumPy value of type {name}")
        self.dtype = np.dtype("u4" if self.text else name)  # of a text: its code points

    def __setstate__(self, state: tuple[object, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(">" if state[1] == ">" else "<")


def _number(kind: _Kind, data: bytes) -> float | int | bool | str:
    """Replaces `numpy.core.multiarray.scalar` in a file."""
    if kind.text:
        return data.decode("utf-32-be" if kind.dtype.byteorder == ">" else "utf-32-le").rstrip("\0")
    return np.frombuffer(data, kind.dtype, 1)[0].item()


class _Array:
    """Replaces `numpy.ndarray` in a file; `plain` makes a tensor of it."""

    value: torch.Tensor

    def __setstate__(self, state: tuple[int, tuple[int, ...], _Kind, bool, bytes]) -> None:
        _, shape, kind, fortran, data = state
        if kind.text:
            raise NotPlainError("a NumPy array of text")
        numbers = np.frombuffer(data, kind.dtype).reshape(shape, order="F" if fortran else "C")
        self.value = torch.from_numpy(numbers.astype(kind.dtype.newbyteorder("="), order="C"))


def _array(*_: object) -> _Array:
    """Replaces `numpy.core.multiarray._reconstruct` in a file."""
    return _Array()


def _no_bytes() -> bytes:
    """Replaces `bytes` in a file, where Python 2's format writes an empty one as a call."""
    return b""


class _Namespace:
    """Replaces `argparse.Namespace` in a file: the options of the program that wrote it."""


STAND_INS = [
    (_Kind, "numpy.dtype"),
    (_Array, "numpy.ndarray"),
    *((_number, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),  # of NumPy 1 and 2
    *((_array, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    (_no_bytes, "builtins.bytes"),
    (_Namespace, "argparse.Namespace"),
]
"""What `torch.load` takes for names in a file, with `weights_only`; `plain` makes data of it."""


def plain(value: Any, seen: dict[int, tuple[Any, Any]] | None = None) -> Any:
    """Contents that were read with `STAND_INS`: NumPy's arrays as tensors, options of programs as dicts.

    `seen` has what is done, by identity, and keeps it alive: parts of a file may refer to each other.
    """
    seen = {} if seen is None else seen
    if id(value) in seen:
        return seen[id(value)][1]
    if isinstance(value, _Array):
        return value.value
    if isinstance(value, _Namespace):
        seen[id(value)] = value, vars(value)
        return plain(vars(value), seen)
    if isinstance(
        value, dict
    ):  # in place: it keeps its type, and the attributes that torch gives a state dict
        seen[id(value)] = value, value
        for name, item in value.items():
            value[name] = plain(item, seen)
    elif isinstance(value, list):
        seen[id(value)] = value, value
        for i, item in enumerate(value):
            value[i] = plain(item, seen)
    elif type(value) is tuple:
        seen[id(value)] = value, tuple(plain(item, seen) for item in value)
        return seen[id(value)][1]
    return value


_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # begins a file of torch.save before zip archives
_SAVE = "if you trust its author, open it yourself and save its state_dict with torch.save"
_ARRAYS = "no PyTorch checkpoint; save a dict of names and tensors with torch.save"
_STARTS = {
    b"\x89HDF": "an HDF5 file, which Keras and others write, no PyTorch checkpoint; name one of PyTorch",
    b"\x1f\x8b": "compressed with gzip; unpack it with gunzip",
    b"version https://git-lfs": "a pointer of Git LFS, no PyTorch checkpoint; fetch the file with git lfs pull",
    b"\x93NUMPY": f"a NumPy array, {_ARRAYS}",
}


def other_kind(path: Path) -> str:
    """What a file is that is certainly no checkpoint, and what to do, as the end of a line; empty for all others."""
    if exported := what_instead(path):
        return exported
    with path.open("rb") as file:
        head = file.read(512)
    for start, what in _STARTS.items():
        if head.startswith(start):
            return what
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "a web page, no PyTorch checkpoint; download the file that the page is about"
    if head[257:262] == b"ustar":
        return "a tar archive; unpack it with tar -xf and name the file inside"
    if re.match(rb"\x80[\2-\5]", head) and not head.startswith(_LEGACY[: len(head)]):
        return f"a pickle of another program, not a PyTorch checkpoint; {_SAVE}"
    if not zipfile.is_zipfile(path):
        return ""
    with zipfile.ZipFile(path) as archive:
        names = [] if archive.comment else archive.namelist()  # our own files have a comment
    endings = {name.rpartition("/")[2] for name in names}
    if "constants.pkl" in endings:
        return f"a TorchScript file, which holds code; {_SAVE}"
    if endings & {"archive_format", "serialized_exported_program.json"}:
        return f"a program of torch.export, no checkpoint; {_SAVE}"
    if names and all(name.endswith(".npy") for name in names):
        return f"an archive of NumPy arrays, {_ARRAYS}"
    if names and "data.pkl" not in endings:
        return f"a zip archive with {names[0]!r:.80} in it; unpack it"
    return ""
