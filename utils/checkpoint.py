"""Checkpoints: atomic writing, safe reading, strict loading with a report, exact random state."""

from __future__ import annotations

import difflib
import hashlib
import io
import itertools
import os
import pickle
import random
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from utils.errors import UserError, printable

# Tables that published LQ-Nets files store beside the basis; they are recomputed from it here.
OBSOLETE = frozenset({"auxil", "codec_vector", "codec_index", "thrs_multiplier"})

# Batch norms of the default momentum count batches and use the count for nothing; files of PyTorch before 0.4.1 have
# none.
COUNTERS = frozenset({"num_batches_tracked"})


class _Kind:
    """Stands for `numpy.dtype` in a file: the type of a number, and nothing else.

    NumPy's own believes what a file says of it, and can be made to read where it must not.
    """

    def __init__(self, name: str, *_: object) -> None:
        if name not in ("f2", "f4", "f8", "i4", "i8", "b1"):
            raise ValueError(name)
        self.dtype = np.dtype(name)

    def __setstate__(self, state: tuple[object, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(">" if state[1] == ">" else "<")


def _number(kind: _Kind, data: bytes) -> np.generic:
    """Stands for `numpy.core.multiarray.scalar` in a file."""
    return np.frombuffer(data, kind.dtype, 1)[0]


# What a number of NumPy is pickled as, under the names of its versions 1 and 2: published files note accuracies so.
_PLAIN = [
    (_Kind, "numpy.dtype"),
    *((_number, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]

SHOWN = 5  # names listed in a message before "..."

# A checkpoint is a zip archive; its comment, the last thing in it, is a digest of all bytes before the comment. The
# comment's length precedes it and is 0 in an archive without one.
_COMMENT = re.compile(rb"sha256 ([0-9a-f]{64})")
_COMMENT_SIZE = 71
_NO_COMMENT = bytes(2)
_FOLDER = 0x10  # MS-DOS attribute of an archive's entry: torch reads nothing of a tensor that has it

# What zipfile and torch.load are known to raise on files with missing or changed bytes.
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


# ---------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------


def write_atomic(
    path: Path, data: bytes | memoryview, *, before: Callable[[], object] = lambda: None
) -> None:
    """Write `data` so that `path` holds either its old or its new content, whatever happens.

    A temporary file in the same folder is written, flushed to the disk and renamed over `path`;
    then the folder is flushed. Missing folders are made. `before` is called between flushing and renaming, when
    nothing is missing but names. Raises UserError when the disk refuses.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(data)
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
        raise UserError(f"{path}: cannot be written ({_reason(error)}); {advice}") from error


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
    """Runs the jobs that write, one after another, in a thread beside the training.

    At most one job waits or runs: giving the next one waits for it. An error of a job is raised then, or by
    `wait`.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "checkpoints")
        self._job: Future[None] | None = None

    def start(self, job: Callable[[], None]) -> None:
        """Run a job when the former one is done."""
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
    """Read a checkpoint onto the CPU without running any code from it.

    The digest of the whole file is verified that `serialise` has written; of an archive without one, as other
    programs write it, the checksum of each entry.

    Raises UserError when the file is missing, damaged, holds anything but plain data, or holds no dict.
    """
    return _load(path, mapped=False)


def _load(path: Path, *, mapped: bool) -> dict[str, Any]:
    """Read a checkpoint; `mapped` leaves the tensors on the disk and verifies only what is beside them."""
    broken = f"{path}: damaged, cut short or not a PyTorch checkpoint; copy or download it again"
    try:
        if zipfile.is_zipfile(path):  # torch.load looks at no checksum
            damaged = _damaged_part(path, mapped=mapped)
            if damaged:
                raise UserError(f"{broken} (wrong checksum of {damaged})")
        with warnings.catch_warnings():  # the answer to a bad file is one line
            warnings.simplefilter("ignore", UserWarning)
            with torch.serialization.safe_globals(_PLAIN):
                payload = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({_reason(error)}); check the path") from error
    except _DAMAGE as error:
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and refused:
            raise UserError(
                f"{path}: refused, because it holds {refused[1]} and not only tensors, numbers and text; "
                "if you trust its author, open it yourself and save its state_dict alone with torch.save"
            ) from error
        raise UserError(broken) from error
    if not isinstance(payload, dict):
        raise UserError(f"{path}: holds a {type(payload).__name__}, not a dict; save a state_dict in it")
    return payload


def _damaged_part(path: Path, *, mapped: bool) -> str:
    """What of an archive is not as it was written, empty when all is; `mapped` looks at nothing but the pickle."""
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


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


# ---------------------------------------------------------------------------------------------
# Weights
# ---------------------------------------------------------------------------------------------


def wrapper_of(payload: Mapping[str, Any]) -> str | None:
    """The key under which a checkpoint keeps its weights: `state_dict`, `model`, or None when bare."""
    for key in ("state_dict", "model"):
        if isinstance(payload.get(key), Mapping):
            return key
    return None


def state_dict_of(payload: Mapping[str, Any], *, source: str = "the checkpoint") -> dict[str, Tensor]:
    """The weights of a checkpoint: a bare state dict, or the one under `state_dict` or `model`.

    A leading `module.`, left by a parallel wrapper, is taken off every name. `source` names the checkpoint
    in messages. Raises UserError when there are no weights, when an entry is not a dense real tensor, or
    when two names become one.
    """
    key = wrapper_of(payload)
    entries: Mapping[str, Any] = payload if key is None else payload[key]
    if not entries:
        raise UserError(f"{source} holds no weights")
    state: dict[str, Tensor] = {}
    for name, value in entries.items():
        if not isinstance(name, str) or not _is_dense(value):
            if key is None:
                keys = _some(str(key) for key in entries)
                raise UserError(
                    f"{source} has no state_dict and no model, and is none itself; its keys: {keys}"
                )
            raise UserError(f"{source}: the entry {name!r} under {key} is not a dense real tensor")
        short = name.removeprefix("module.")
        if short in state:
            raise UserError(f"{source} has both {short!r} and 'module.{short}'; keep one of them")
        # Published files hold counters that are parameters.
        state[short] = value.detach() if value.requires_grad else value
    return state


def _is_dense(value: object) -> bool:
    return (
        isinstance(value, Tensor)
        and value.layout is torch.strided
        and not (value.is_quantized or value.is_meta or value.is_complex())
    )


Mismatch = tuple[str, tuple[int, ...], tuple[int, ...]]  # name, shape in the file, shape in the model


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What became of every name of a file and of a model."""

    loaded: tuple[str, ...]
    missing: tuple[str, ...] = ()  # in the model only
    unused: tuple[str, ...] = ()  # in the file only
    mismatched: tuple[Mismatch, ...] = ()
    skipped: tuple[str, ...] = ()  # on either side, because the user asked for it
    obsolete: tuple[str, ...] = ()  # tables of published files that are not needed

    def summary(self) -> str:
        """One line: how many names of each kind, and the first few of those that were not loaded."""
        kinds = {
            "missing": self.missing,
            "unused": self.unused,
            "of another shape": _both_shapes(self.mismatched),
            "skipped": self.skipped,
            "obsolete": self.obsolete,
        }
        parts = [f"{len(names)} {kind} ({_some(names)})" for kind, names in kinds.items() if names]
        return ", ".join([f"{len(self.loaded)} loaded", *parts])


def load_weights(
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    allow_missing: Callable[[str], bool],
    scope: tuple[str, ...] = (),
    source: str,
) -> LoadReport:
    """Copy `state` into `model` by name and value, all of it or nothing.

    Every name must be on both sides with the same shape. Exceptions: names that contain an entry of
    `scope` are skipped; names of the model for which `allow_missing(name)`, and batch norms' counters, may be
    absent from the file; one-element tensors match in any rank; the obsolete tables of published files are passed
    over. Data types and whether an entry is a parameter or a buffer do not matter. `source` names the file in
    messages.

    Raises UserError, before anything is copied, when the names or shapes do not fit, when an entry of `scope`
    matches no name, or when nothing at all would be loaded.
    """
    own: dict[str, Tensor] = model.state_dict()
    everything = dict.fromkeys((*own, *state))
    for word in scope:
        if not any(word in name for name in everything):
            close = _closest(word, {part for name in everything for part in name.split(".")})
            raise UserError(f"--unresume_scope {word!r}: no name in {source} or the network has it{close}")

    skipped = {name: None for name in everything if any(word in name for word in scope)}
    theirs = {name: value for name, value in state.items() if name not in skipped}
    ours = {name: value for name, value in own.items() if name not in skipped}
    extra = tuple(name for name in theirs if name not in ours)
    common = tuple(name for name in ours if name in theirs)
    mismatched = tuple(
        (name, tuple(theirs[name].shape), tuple(ours[name].shape))
        for name in common
        if theirs[name].shape != ours[name].shape and not theirs[name].numel() == ours[name].numel() == 1
    )
    wrong_shape = {name for name, _, _ in mismatched}
    report = LoadReport(
        loaded=tuple(name for name in common if name not in wrong_shape),
        missing=tuple(name for name in ours if name not in theirs),
        unused=tuple(name for name in extra if name.rpartition(".")[2] not in OBSOLETE),
        mismatched=mismatched,
        skipped=tuple(skipped),
        obsolete=tuple(name for name in extra if name.rpartition(".")[2] in OBSOLETE),
    )

    absent = tuple(
        name for name in report.missing if name.rpartition(".")[2] not in COUNTERS and not allow_missing(name)
    )
    if absent or report.unused or mismatched:
        problems = [f"{len(absent)} missing ({_some(_with_shape(absent, own))})"] if absent else []
        if report.unused:
            problems.append(f"{len(report.unused)} unused ({_some(_with_shape(report.unused, state))})")
        if mismatched:
            problems.append(f"{len(mismatched)} of another shape ({_some(_both_shapes(mismatched))})")
        raise UserError(
            f"{source} does not fit the network: {'; '.join(problems)}; a checkpoint of another network? "
            "check --model, --width_alpha, --keyword; "
            "--unresume_scope NAME skips parameters whose name contains NAME"
        )
    if not report.loaded:
        raise UserError(f"nothing of {source} would be loaded: {report.summary()}")

    with torch.no_grad():
        for name in report.loaded:
            own[name].copy_(state[name].reshape(own[name].shape))
    return report


def _some(names: Iterable[str]) -> str:
    names = list(map(printable, names))
    return ", ".join([*names[:SHOWN], *(["..."] if len(names) > SHOWN else [])])


def _with_shape(names: Iterable[str], tensors: Mapping[str, Tensor]) -> list[str]:
    return [f"{name} {list(tensors[name].shape)}" for name in names]


def _both_shapes(mismatched: Iterable[Mismatch]) -> list[str]:
    return [f"{name}: {list(a)} in the file, {list(b)} in the network" for name, a, b in mismatched]


def _closest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, sorted(known), n=3, cutoff=0.5)
    return f"; did you mean {', '.join(close)}?" if close else ""


# ---------------------------------------------------------------------------------------------
# Paths of a run
# ---------------------------------------------------------------------------------------------


def find_pretrained(value: str, weights_dir: Path, model: str, *, option: str = "pretrained") -> Path | None:
    """The file that `--pretrained VALUE`, or another `option`, means; None for the word `none` or nothing.

    A bare name is looked up in `weights_dir/model/`, then in the current folder; a value with a
    separator is a path. Raises UserError, with close names, when there is no such file.
    """
    value = value.strip()
    if value.lower() in ("", "none"):
        return None
    path = Path(value)
    bare = path.name == value
    folder = weights_dir / model if bare else path.parent
    for candidate in (folder / value, path) if bare else (path,):
        if os.path.isfile(candidate):
            return candidate
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        names = []
    close = difflib.get_close_matches(path.name, names, n=SHOWN, cutoff=0.5)
    there = f"close names there: {_some(close)}" if close else f"in that folder: {_some(names) or 'nothing'}"
    looked = f"{folder} or the current folder" if bare else str(folder)
    without = "; write 'none' to start without" if option == "pretrained" else ""
    raise UserError(f"--{option} {value}: no such file in {looked}; {there}{without}")


@dataclass(frozen=True)
class CheckpointFiles:
    """The checkpoint files of one case, all in `weights_dir/model/`. Raises UserError for a bad case name."""

    weights_dir: Path
    model: str
    case: str

    def __post_init__(self) -> None:
        """Check that the case is a plain file name that cannot be taken for another case's files."""
        if not re.fullmatch(r"[A-Za-z0-9_+-][A-Za-z0-9._+,=@%:~-]*", self.case):
            raise UserError(
                f"--case {self.case!r}: use letters, digits and . _ + - , = @ % : ~ only, no dot in front"
            )
        if re.search(r"-(epoch|backup)\d+$", self.case):
            raise UserError(
                f"--case {self.case!r}: the endings -epochN and -backupN mark files of other moments; drop it"
            )
        parts = Path(self.model).parts
        if not parts or ".." in parts or Path(self.model).is_absolute():
            raise UserError(f"--model {self.model!r}: no name of a network leaves {self.weights_dir}")

    @property
    def folder(self) -> Path:
        """Where the files are."""
        return self.weights_dir / self.model

    @property
    def latest(self) -> Path:
        """The checkpoint that every save replaces."""
        return self.folder / f"{self.case}-checkpoint.pth.tar"

    def backup(self, number: int) -> Path:
        """The latest checkpoint of `number` saves ago, from 1."""
        return self.folder / f"{self.case}-backup{number}-checkpoint.pth.tar"

    @property
    def best(self) -> Path:
        """The checkpoint of the best validation so far."""
        return self.folder / f"{self.case}-model_best.pth.tar"

    def epoch(self, number: int) -> Path:
        """The checkpoint that is kept for epoch `number`."""
        return self.folder / f"{self.case}-epoch{number}-checkpoint.pth.tar"

    def existing(self) -> list[Path]:
        """Every checkpoint file of the case that is there, by name."""
        if not self.folder.is_dir():
            return []
        ours = re.compile(re.escape(self.case) + r"-(model_best|((epoch|backup)\d+-)?checkpoint)\.pth\.tar")
        return sorted(path for path in self.folder.iterdir() if ours.fullmatch(path.name))

    def write_latest(self, data: bytes | memoryview, keep: int) -> None:
        """Write the latest checkpoint; it and `keep` - 1 before it stay, under `backup`'s names.

        The former ones are renamed when the new one is on the disk, and what is too much is removed in the end:
        at every moment there are as many whole ones as before, whatever fails. Raises UserError when the disk
        refuses.
        """
        write_atomic(self.latest, data, before=self._shift_backups if keep > 1 else lambda: None)
        for number in self._backups():
            if number >= keep:
                self.backup(number).unlink(missing_ok=True)

    def _backups(self) -> list[int]:
        """The numbers of the backups that are there, in order."""
        ours = re.compile(re.escape(self.case) + r"-backup([1-9]\d*)-checkpoint\.pth\.tar")
        found = map(ours.fullmatch, os.listdir(self.folder) if self.folder.is_dir() else [])
        return sorted(int(match[1]) for match in found if match)

    def _shift_backups(self) -> None:
        """Let the first backup be the latest checkpoint, and the others take the next number, up to a free one."""
        first = self.backup(1)
        if not self.latest.exists():
            return
        # A save that was cut short came so far. Some disks say that all files are the same, but know no links.
        if first.exists() and first.samefile(self.latest) and self.latest.stat().st_nlink > 1:
            return
        taken = self._backups()
        free = next(number for number in itertools.count(1) if number not in taken)
        for number in range(free, 1, -1):
            os.replace(self.backup(number - 1), self.backup(number))
        try:
            os.link(self.latest, first)
        except OSError:  # the disk knows no links
            os.replace(self.latest, first)

    def promote(self, path: Path) -> None:
        """Make a whole checkpoint the latest one if that is damaged or gone.

        Otherwise the next save would keep the damaged file as the backup and give up a whole one.
        """
        try:
            read(self.latest)
        except UserError:
            if path in map(self.backup, self._backups()):
                os.replace(path, self.latest)
            else:
                write_atomic(self.latest, path.read_bytes())

    def remove_leftovers(self) -> None:
        """Remove what a run that was killed while it wrote has left of the file."""
        ours = re.compile(
            r"\."
            + re.escape(self.case)
            + r"-(model_best|((epoch|backup)\d+-)?checkpoint)\.pth\.tar\.\d+\.tmp"
        )
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                if ours.fullmatch(path.name):
                    path.unlink(missing_ok=True)

    def find(self, newest: bool, file: Path | None, launchers: Sequence[str] = ()) -> Found:
        """The checkpoint to continue from: the newest of the case, else `file`, else none.

        Args:
            newest: look for the newest one, whoever wrote it.
            file: what to take else.
            launchers: take the newest one also when one of these started the run that wrote it, since then this
                is a restart of that run.
        """
        found = self.newest() if newest or launchers else Found(None, {})
        wrote = found.payload.get("launchers")
        if not newest and not (isinstance(wrote, list) and any(one in wrote for one in launchers)):
            found = Found(None, {})
        if found.path is None and file is not None:
            return Found(file, read(file), found.passed_over)
        return found

    def newest(self) -> Found:
        """The whole checkpoint that is furthest inside; the latest of equals. Damaged files are passed over."""
        found: list[tuple[int, int, bool, Path]] = []
        passed: list[str] = []
        for path in self.existing():
            try:
                payload = _load(path, mapped=True)
            except UserError as error:
                passed.append(f"passed over {error}")
                continue
            epoch, position = payload.get("epoch"), payload.get("position", 0)
            if isinstance(epoch, int) and isinstance(position, int):
                found.append((epoch, position, path == self.latest, path))
            else:
                passed.append(f"passed over {path}: no checkpoint of a run, it has no epoch")
        for _, _, _, path in sorted(found, reverse=True):
            try:
                return Found(path, read(path), tuple(passed))
            except UserError as error:
                passed.append(f"passed over {error}")
        return Found(None, {}, tuple(passed))


@dataclass(frozen=True)
class Found:
    """The checkpoint to continue from.

    Attributes:
        path: the file; None when there is none that is whole.
        payload: what is in it.
        passed_over: a line for each file that is damaged.
    """

    path: Path | None
    payload: dict[str, Any]
    passed_over: tuple[str, ...] = ()


# ---------------------------------------------------------------------------------------------
# Random state
# ---------------------------------------------------------------------------------------------


def random_state() -> dict[str, Any]:
    """The state of the global generators: `random`, NumPy, torch on the CPU and on every CUDA device.

    Only tensors, lists, numbers and text, so that it can be part of a checkpoint.
    """
    version, words, gauss = random.getstate()
    numpy_state = np.random.get_state(legacy=False)
    return {
        "python": [version, list(words), gauss],
        "numpy": {
            "key": numpy_state["state"]["key"].tolist(),
            "pos": int(numpy_state["state"]["pos"]),
            "has_gauss": int(numpy_state["has_gauss"]),
            "gauss": float(numpy_state["gauss"]),
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Set all generators to a `random_state()`; CUDA devices only as far as both sides have them.

    Raises UserError when `state` is not of that form.
    """
    try:
        version, words, gauss = state["python"]
        random.setstate((version, tuple(words), gauss))
        numpy_state = state["numpy"]
        key = np.array(numpy_state["key"], dtype=np.uint32)
        cached = (numpy_state["has_gauss"], numpy_state["gauss"])
        np.random.set_state(("MT19937", key, numpy_state["pos"], *cached))
        torch.set_rng_state(state["torch"])
        devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
        for device, cuda_state in enumerate(state["cuda"][:devices]):
            torch.cuda.set_rng_state(cuda_state, device)
    except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise UserError(
            "the checkpoint's random state was not written by this program; leave out -r and --resume_file"
        ) from error
