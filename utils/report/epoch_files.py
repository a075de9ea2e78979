"""Files of a run with a row or a record for each epoch."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.errors import UserError


class MetricsFile:
    """A CSV file with one row of numbers per epoch.

    Args:
        path: the file; its folder is made when missing, the file with the first row.
        fields: the columns; `epoch` is one of them.
    """

    def __init__(self, path: Path, fields: Sequence[str]) -> None:
        self.path = path
        self.fields = tuple(fields)

    def append(self, row: Mapping[str, float]) -> None:
        """Add a row; the header comes first in a new file.

        Args:
            row: a number for each field; a missing one is written as `nan`, one that is no field is a
                ValueError.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.fields, restval=math.nan, lineterminator="\n")
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(row)
            file.flush()
            os.fsync(file.fileno())  # a checkpoint that knows of the row must not outlive it

    def truncate_after(self, epoch: int) -> None:
        """Drop the rows from `epoch` on, so that training can resume (or, with 0, start) with that epoch.

        Rows before it stay as they are, byte by byte; a line that a killed run left unfinished goes.
        The file is replaced in one move. Nothing happens when it does not exist.

        Raises:
            UserError: the file has other columns or is not a metrics file.
        """
        if not self.path.exists():
            return
        header = ",".join(self.fields) + "\n"
        kept = [header]
        if epoch > 0:
            found, *lines = _lines(self.path) or [header]
            if found != header:
                raise UserError(f"{self.path} has other columns than this run writes: move it away")
            column = self.fields.index("epoch")
            kept += [line for line in lines if _numbers(self.path, line, self.fields)[column] < epoch]
        _replace(self.path, kept)

    @staticmethod
    def read(path: Path) -> list[dict[str, float]]:
        """Read the finished rows of a metrics file, in order.

        Raises:
            UserError: the file does not exist or is not a metrics file.
        """
        found, *lines = _lines(path) or [""]
        fields = found.rstrip("\n").split(",")
        return [dict(zip(fields, _numbers(path, line, fields), strict=True)) for line in lines]


class RecordsFile:
    """A file with one JSON object per epoch and line; the key `epoch` is one of the object's.

    Args:
        path: the file; its folder is made when missing, the file with the first record.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a record; a number in it that is not finite is a ValueError, JSON has none."""
        line = json.dumps(record, allow_nan=False, separators=(",", ":"))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")
            file.flush()
            os.fsync(file.fileno())

    def truncate_after(self, epoch: int) -> None:
        """Drop the records from `epoch` on; as `MetricsFile.truncate_after`."""
        if self.path.exists():
            kept = [] if epoch == 0 else [line for line in _lines(self.path) if self._epoch(line) < epoch]
            _replace(self.path, kept)

    def _epoch(self, line: str) -> int:
        return _record(self.path, line)["epoch"]

    @staticmethod
    def read(path: Path) -> list[dict[str, Any]]:
        """Read the finished records, in order.

        Raises:
            UserError: the file does not exist or holds something else.
        """
        return [_record(path, line) for line in _lines(path)]


def _lines(path: Path) -> list[str]:
    """Read the lines that were written to their end."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror})") from error
    return [line for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _replace(path: Path, lines: Iterable[str]) -> None:
    """Replace a file in one move."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _record(path: Path, line: str) -> dict[str, Any]:
    """Read a line of a file of records."""
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict) or not isinstance(record.get("epoch"), int):
        raise UserError(f"{path} is damaged: its line '{line.strip()[:40]}' is not the record of an epoch")
    return record


def _numbers(path: Path, line: str, fields: Sequence[str]) -> list[float]:
    """Read the numbers of a row, one per field."""
    try:
        numbers = [float(text) for text in line.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != len(fields):
        raise UserError(
            f"{path} is not a metrics file: its row '{line.strip()}' has not {len(fields)} numbers"
        )
    return numbers
