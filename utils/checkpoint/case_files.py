"""The checkpoint files of a case: names, retention, and the newest whole one."""

from __future__ import annotations

import difflib
import itertools
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.checkpoint.archive import load_archive, read, write_atomic
from utils.checkpoint.exported import what_instead
from utils.errors import UserError
from utils.text import SHOWN, some_names


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
        if instead := what_instead(candidate):
            raise UserError(f"--{option} {value} is {instead}")
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        names = []
    close = difflib.get_close_matches(path.name, names, n=SHOWN, cutoff=0.5)
    there = (
        f"close names there: {some_names(close)}"
        if close
        else f"in that folder: {some_names(names) or 'nothing'}"
    )
    looked = f"{folder} or the current folder" if bare else str(folder)
    without = {
        "pretrained": "; write 'none' to start without",
        "distill_pretrained": "; --distill_teacher none trains without a teacher",
    }.get(option, "")
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
    def lock(self) -> Path:
        """The file of `utils.checkpoint.case_lock`."""
        return self.folder / f".{self.case}.lock"

    @property
    def latest(self) -> Path:
        """The checkpoint that each save replaces."""
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
        """Write the latest checkpoint; `keep` - 1 earlier ones stay as backups.

        The earlier ones are renamed once the new one is on the disk, and surplus ones are removed last: at every moment
        there are as many whole ones as before, whatever fails. Raises UserError when the disk refuses.
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
        """Make the latest checkpoint the first backup; the other backups move up by one, to a free number."""
        first = self.backup(1)
        if not self.latest.exists():
            return
        # An interrupted save came this far. Some disks report all files as the same one, but have no links.
        if first.exists() and first.samefile(self.latest) and self.latest.stat().st_nlink > 1:
            return
        taken = self._backups()
        free = next(number for number in itertools.count(1) if number not in taken)
        for number in range(free, 1, -1):
            os.replace(self.backup(number - 1), self.backup(number))
        try:
            os.link(self.latest, first)
        except OSError:  # the disk has no links
            os.replace(self.latest, first)

    def promote(self, path: Path) -> None:
        """Make a whole checkpoint the latest one if the latest one is damaged or gone.

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
        """Remove temporary files of a run that was killed while writing."""
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
            file: the file to take otherwise.
            launchers: take the newest one also when one of these started the run that wrote it, since this is then
                a restart of that run.
        """
        found = self.newest() if newest or launchers else Found(None, {})
        wrote = found.payload.get("launchers")
        if not newest and not (isinstance(wrote, list) and any(one in wrote for one in launchers)):
            found = Found(None, {})
        if found.path is None and file is not None:
            return Found(file, read(file), found.passed_over)
        return found

    def newest(self) -> Found:
        """The whole checkpoint with the most progress; of equals, the latest. Damaged files are skipped."""
        found: list[tuple[int, int, bool, Path]] = []
        passed: list[str] = []
        for path in self.existing():
            try:
                payload = load_archive(path, mapped=True)
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
        path: the file; None when there is no whole one.
        payload: its contents.
        passed_over: a line for each file that is damaged.
    """

    path: Path | None
    payload: dict[str, Any]
    passed_over: tuple[str, ...] = ()
