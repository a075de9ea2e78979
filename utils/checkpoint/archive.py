"""Checkpoint files: atomic writing, safe reading, and a digest of all bytes."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import pickle
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from utils.checkpoint.foreign import STAND_INS, NotPlainError, other_kind, plain
from utils.errors import UserError

# A checkpoint is a zip archive; its comment, the last thing in it, is a digest of all bytes before the comment. The
# comment's length precedes it and is 0 in an archive without one.
_COMMENT = re.compile(rb"sha256 ([0-9a-f]{64})")
_COMMENT_SIZE = 71
_NO_COMMENT = bytes(2)
_FOLDER = 0x10  # MS-DOS attribute of an archive's entry: torch reads nothing of a tensor with it

# Known errors of zipfile and torch.load on files with missing or changed bytes.
_DAMAGE = (
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OverflowError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)


def write_atomic(
    path: Path, data: bytes | memoryview, *, before: Callable[[], object] = lambda: None
) -> None:
    """Write `data` so that `path` holds either its old or its new content, whatever happens; see `atomic`."""
    with atomic(path, before=before) as file:
        file.write(data)


@contextlib.contextmanager
def atomic(path: Path, *, before: Callable[[], object] = lambda: None) -> Iterator[BinaryIO]:
    """Open a file to write, so that `path` holds either its old or its new content, whatever happens.

    A temporary file in the same folder is written, flushed to the disk and renamed over `path`;
    then the folder is flushed. Missing folders are made. `before` is called between flushing and renaming, when
    only the renaming is left. Raises UserError when the disk refuses.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            before()
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        advice = "choose another folder or free some space"
        raise UserError(f"{path}: cannot be written ({reason_of(error)}); {advice}") from error


def save(path: Path, payload: dict[str, Any]) -> None:
    """Write `payload` (tensors, numbers, text, lists, dicts) atomically, see `write_atomic`.

    Raises UserError when the disk refuses, and TypeError as `serialise`, before anything is written.
    """
    write_atomic(path, serialise(payload))


def serialise(payload: dict[str, Any]) -> memoryview:
    """The bytes of a checkpoint file; raises TypeError when `read` would refuse an object in it."""
    # Serialised in memory first: an object that cannot be pickled never reaches the disk, and every
    # error of the disk arrives as a plain OSError rather than from inside torch's archive writer.
    buffer = io.BytesIO()
    torch.save(payload, buffer)
    buffer.seek(0)
    refused = torch.serialization.get_unsafe_globals_in_checkpoint(buffer)
    if refused:
        raise TypeError(f"a checkpoint of {', '.join(refused)} would not load with weights_only")
    buffer.seek(-len(_NO_COMMENT), os.SEEK_END)
    if buffer.read() != _NO_COMMENT:
        raise AssertionError("torch.save has written a comment of its own")
    buffer.seek(-len(_NO_COMMENT), os.SEEK_END)
    buffer.write(struct.pack("<H", _COMMENT_SIZE))
    with buffer.getbuffer() as content:
        digest = hashlib.sha256(content).hexdigest()
    buffer.write(f"sha256 {digest}".encode("ascii"))
    return buffer.getbuffer()


def snapshot(value: Any) -> Any:
    """A copy of a payload, tensors on the CPU, that does not change when training goes on."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {name: snapshot(item) for name, item in value.items()}
    return [snapshot(item) for item in value] if isinstance(value, list | tuple) else value


class Writer:
    """Runs writing jobs one after another in a thread beside the training.

    At most one job waits or runs: `start` waits for the one before. A job's error is raised by the next `start` or
    `wait`.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "checkpoints")
        self._job: Future[None] | None = None

    def start(self, job: Callable[[], None]) -> None:
        """Run a job once the one before is done."""
        self.wait()
        self._job = self._thread.submit(job)

    def wait(self) -> None:
        """Return when the last job is done."""
        job, self._job = self._job, None
        if job is not None:
            job.result()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        """Finish the last job, whatever becomes of it, and end the thread."""
        self._thread.shutdown(wait=True)


def read(path: Path) -> dict[str, Any]:
    """Read a checkpoint, or a `.safetensors` file, onto the CPU without running any code from it.

    NumPy's numbers, texts and arrays become Python's numbers, texts and tensors, and `argparse.Namespace` a dict.
    Verifies the digest of the whole file that `serialise` has written or, in an archive of another program, the
    checksum of each entry.

    Raises UserError when the file is missing, damaged, holds anything but plain data, or holds no dict.
    """
    return load_archive(path, mapped=False)


def load_archive(path: Path, *, mapped: bool) -> dict[str, Any]:
    """Read a checkpoint; `mapped` leaves the tensors on the disk and verifies only the rest."""
    broken = f"{path}: damaged, cut short or not a PyTorch checkpoint; copy or download it again"
    try:
        other = other_kind(path)
        if other:
            raise UserError(f"{path}: is {other}")
        if path.suffix == ".safetensors":
            return _read_safetensors(path, broken)
        if zipfile.is_zipfile(path):  # torch.load looks at no checksum
            damaged = _damaged_part(path, mapped=mapped)
            if damaged:
                raise UserError(f"{broken} (wrong checksum of {damaged})")
        with warnings.catch_warnings():  # the answer to a bad file is one line
            warnings.simplefilter("ignore", UserWarning)
            with torch.serialization.safe_globals(STAND_INS):
                payload = plain(torch.load(path, map_location="cpu", weights_only=True, mmap=mapped))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({reason_of(error)}); check the path") from error
    except (NotPlainError, *_DAMAGE) as error:
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        held = refused[1] if isinstance(error, pickle.UnpicklingError) and refused else ""
        held = str(error) if isinstance(error, NotPlainError) else held
        if held:
            raise UserError(
                f"{path}: refused, because it holds {held} and not only tensors, numbers and text; "
                "if you trust its author, open it yourself and save its state_dict alone with torch.save"
            ) from error
        raise UserError(broken) from error
    if not isinstance(payload, dict):
        raise UserError(f"{path}: holds a {type(payload).__name__}, not a dict; save a state_dict in it")
    return payload


def _read_safetensors(path: Path, broken: str) -> dict[str, Any]:
    """The tensors of a `.safetensors` file; `broken` is the message for a damaged one."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise UserError(
            f"{path}: reading it needs the package safetensors ({error}): pip install safetensors"
        ) from error
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(broken) from error


def _damaged_part(path: Path, *, mapped: bool) -> str:
    """Name the damaged part of an archive, empty when it is whole; `mapped` checks only the pickle."""
    with zipfile.ZipFile(path) as archive:
        comment = archive.comment
        entries = archive.infolist()
        if not comment:
            with path.open("rb") as file:
                file.seek(-len(_NO_COMMENT), os.SEEK_END)
                if file.read() != _NO_COMMENT:
                    return "the file"  # cut off before its comment
            odd = [entry.filename for entry in entries if entry.is_dir() or entry.external_attr & _FOLDER]
            if odd:
                return f"the entry {odd[0]!r}"
        if mapped:
            for entry in entries:
                if entry.filename.endswith("/data.pkl"):
                    archive.read(entry)  # which verifies its checksum
            return ""
        if not comment:
            found = archive.testzip()
            return "" if found is None else repr(found)
    written = _COMMENT.fullmatch(comment)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        left = os.fstat(file.fileno()).st_size - len(comment)
        while chunk := file.read(min(left, 2**20)):
            digest.update(chunk)
            left -= len(chunk)
    return "" if written and digest.hexdigest().encode() == written[1] else "the file"


def reason_of(error: OSError) -> str:
    """The system's message for an error with a file."""
    return error.strerror or str(error)
