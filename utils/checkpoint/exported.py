"""What an exported file is, by its content. Without torch."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

from utils.errors import UserError

NETWORK = "network.onnx"  # in the folder of a page
MANIFEST = "Manifest.json"  # in the folder of a Core ML package
KEY = "lowbit"  # of a packed file's metadata
C_MARK = "// lowbit: "  # begins a C header
TEXTS: tuple[str, ...] = ("classes.json", "images.json")  # beside a program
_LONGEST_HEADER = 10**8  # bytes, of a safetensors file

LITERT_MARK = b"TFL3"  # of a file of LiteRT, behind its first four bytes
EXECUTORCH_MARK = b"ET12"  # of a file of ExecuTorch, likewise

_MARKS = {LITERT_MARK: "litert", EXECUTORCH_MARK: "executorch"}

_NAME = "name the checkpoint that it was exported from"
_INSTEAD = {
    "c": f"a C header, no PyTorch checkpoint; {_NAME}",
    "coreml": f"a package of Core ML, no PyTorch checkpoint; {_NAME}",
    "executorch": f"a file of ExecuTorch, no PyTorch checkpoint; {_NAME}",
    "litert": f"a file of LiteRT, no PyTorch checkpoint; {_NAME}",
    "mnn": f"a file of MNN, no PyTorch checkpoint; {_NAME}",
    "onnx": f"an ONNX file, no PyTorch checkpoint; {_NAME}",
    "openvino": f"a file of OpenVINO, no PyTorch checkpoint; {_NAME}",
    "packed": "a packed network, no checkpoint: tools.py --keyword import makes one of it, to evaluate and to export; "
    f"to train, {_NAME}",
    "program": f"a program that export has written, no checkpoint; {_NAME}",
    "web": f"a folder with a page, no checkpoint; {_NAME}",
}


def exported_kind(path: Path) -> str:
    """The format, a word of `--to`, in which a file or a folder was exported; empty for all others.

    Content decides; MNN, ONNX and OpenVINO, whose files do not begin with a mark, are known by their endings.
    """
    try:
        if path.is_dir():
            return "web" if (path / NETWORK).is_file() else "coreml" if (path / MANIFEST).is_file() else ""
        if not path.is_file():
            return ""
        if path.suffix == ".onnx":
            return "onnx"
        if path.suffix == ".xml" or (path.suffix == ".bin" and path.with_suffix(".xml").is_file()):
            return "openvino"
        if path.suffix == ".mnn":
            return "mnn"
        if path.suffix == ".h":
            return "c" if _begins_with(path, C_MARK.encode()) else ""
        with path.open("rb") as file:
            mark = file.read(8)[4:]
        if mark in _MARKS:
            return _MARKS[mark]
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                names = {name.rpartition("/extra/")[2] for name in archive.namelist()}
            return "program" if names.issuperset(TEXTS) else ""
        return "packed" if _is_packed(path) else ""
    except (OSError, zipfile.BadZipFile):  # whoever reads it says why
        return ""


_ENDINGS = {
    ".h": "c",
    ".mlpackage": "coreml",
    ".mnn": "mnn",
    ".pte": "executorch",
    ".onnx": "onnx",
    ".xml": "openvino",
    ".safetensors": "packed",
    ".pt2": "program",
    ".tflite": "litert",
}


def kind_of(path: Path) -> str:
    """As `exported_kind`; what is damaged or missing is known by its ending, and all other folders count as pages."""
    found = exported_kind(path)
    if path.is_dir():
        return found or ("coreml" if path.suffix == ".mlpackage" else "web")
    return found or _ENDINGS.get(path.suffix, "")


def check_exported(path: Path) -> str:
    """`kind_of` a file that is there.

    Raises:
        UserError: it is not, or no export has written it.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    kind = kind_of(path)
    if not kind or (kind == "web" and not exported_kind(path)):
        raise UserError(
            f"{path}: no exported file; name one that export has written: .onnx, .xml of OpenVINO, .safetensors, .pt2, "
            ".tflite, .pte, .mnn, .mlpackage, .h or the folder of a page"
        )
    return kind


def check_checkpoint(path: Path) -> None:
    """Refuse what is no checkpoint at first sight, before torch is imported to read it.

    Raises:
        UserError: it cannot be opened, or an export has written it.
    """
    if other := what_instead(path):
        raise UserError(f"{path}: is {other}")
    try:
        path.open("rb").close()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from error


def _begins_with(path: Path, mark: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(mark)) == mark


def _is_packed(path: Path) -> bool:
    """Whether a file has the header of safetensors, with the entry of packed networks."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(_LONGEST_HEADER, path.stat().st_size):
            return False
        header = file.read(length)
    try:
        entries = json.loads(header)["__metadata__"]
        return isinstance(entries, dict) and KEY in entries
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


def what_instead(path: Path) -> str:
    """What an exported file is, and what to give in place of it, as the end of a line; empty for all others."""
    return _INSTEAD.get(exported_kind(path), "")
