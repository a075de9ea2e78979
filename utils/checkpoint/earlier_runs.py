"""The files of a case's earlier runs, kept under other names when a run starts or goes back."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from utils.checkpoint import archive
from utils.checkpoint.case_files import CheckpointFiles, Found
from utils.checkpoint.case_lock import locked
from utils.errors import UserError


@contextlib.contextmanager
def prepared(
    folder: Path, files: CheckpointFiles, found: Found, chosen: Path | None, *, writes: bool
) -> Iterator[None]:
    """The time in which a run has its case for itself; its files are prepared as `prepare_files` says.

    Args:
        folder: see `prepare_files`.
        files: likewise.
        found: likewise.
        chosen: likewise.
        writes: this process writes files; otherwise nothing is done.

    Raises:
        UserError: another run of the case is going on, of this network or, with the same log, of another one.
    """
    if not writes:
        yield
        return
    log = folder.with_name(f".{folder.name}.lock")
    with locked(files.lock, files.case, "weights_dir"), locked(log, files.case, "log_dir"):
        prepare_files(folder, files, found, chosen=chosen)
        yield


def prepare_files(folder: Path, files: CheckpointFiles, found: Found, *, chosen: Path | None) -> None:
    """Leave the case only files that the run continues from; other ones get a new name.

    Args:
        folder: with the log and the metrics.
        files: the checkpoints.
        found: the checkpoint that the run continues from.
        chosen: the file that the user named.

    Raises:
        UserError: the checkpoints' folder cannot be written.
    """
    try:
        files.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=files.folder):
            pass
    except OSError as error:
        raise UserError(
            f"--weights_dir: {files.folder} cannot be written ({error.strerror}); choose another --weights_dir"
        ) from error
    own = {path.resolve() for path in files.existing()}
    if found.path is None or found.path.resolve() not in own:
        keep_earlier_run(folder, files)
    elif chosen is not None and found.path == chosen:
        keep_later(folder, files, found)
    elif found.path != files.latest:
        files.promote(found.path)
    files.remove_leftovers()


def keep_later(folder: Path, files: CheckpointFiles, found: Found) -> None:
    """Rename checkpoints that are further than `found` to CASE.N, so that `-r` continues from new ones."""
    later = [path for path in files.existing() if path != found.path and _reached(path) > _far(found.payload)]
    if not later:
        return
    earlier = _free_name(folder, files)
    _rename(files, later, earlier)
    print(f"checkpoints of {files.case} that are further than {found.path} are kept as {earlier}")


def _reached(path: Path) -> tuple[float, float]:
    """How far a checkpoint is; a damaged one counts as further than any."""
    try:
        return _far(archive.read(path))
    except UserError:
        return math.inf, 0


def _far(payload: Mapping[str, Any]) -> tuple[float, float]:
    return payload.get("epoch", 0), payload.get("position", 0)


def _free_name(folder: Path, files: CheckpointFiles) -> str:
    """The first CASE.N that neither a log nor a checkpoint has."""
    names = (f"{files.case}.{number}" for number in itertools.count(1))
    return next(
        name for name in names
        if not folder.with_name(name).exists() and not dataclasses.replace(files, case=name).existing()
    )  # fmt: skip


def _rename(files: CheckpointFiles, paths: Iterable[Path], case: str) -> None:
    """Move checkpoints of the case to another one."""
    for path in paths:
        path.rename(path.with_name(case + path.name.removeprefix(files.case)))


def keep_earlier_run(folder: Path, files: CheckpointFiles) -> None:
    """Rename the files of an earlier run of the case to CASE.N, so that nothing is overwritten."""
    mine = files.existing()
    if not mine and not (folder / "metrics.csv").exists():
        return
    earlier = _free_name(folder, files)
    try:
        if folder.exists():
            folder.rename(folder.with_name(earlier))
        _rename(files, mine, earlier)
    except OSError as error:
        raise UserError(
            f"cannot move the earlier run of {files.case} away: {error}; use another --case"
        ) from error
    print(f"the earlier run of the case {files.case} is kept as {earlier}")
