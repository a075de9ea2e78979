"""Reads the files of an evaluation that the page shows. Without torch."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.report.calibration import Bin
from utils.report.sheet import Shown

MATRIX, CLASSES, EXAMPLES = "confusion.csv", "classes.csv", "examples.json"
CALIBRATION, PICTURES = "calibration.csv", "pictures.json"


@dataclass(frozen=True, kw_only=True)
class Confusion:
    """The files of an evaluation; those of an earlier version have no calibration and no pictures.

    Attributes:
        classes: names of the classes.
        matrix: images by class (row) and prediction (column).
        rows: of each class: class, images, accuracy and precision in percent; None where there is no image.
        examples: "row,column" -> PNG files in base64.
        bins: of the calibration.
        mistakes: the worst ones.
        changes: images whose class is not the reference's.
    """

    classes: list[str]
    matrix: list[list[int]]
    rows: list[dict[str, Any]]
    examples: dict[str, list[str]]
    bins: list[Bin]
    mistakes: list[Shown]
    changes: list[Shown]


def read(folder: Path) -> Confusion | None:
    """The files in the folder of a run; None without an evaluation.

    Raises:
        UserError: they are damaged.
    """
    if not (folder / MATRIX).exists() or not (folder / CLASSES).exists():
        return None
    try:
        head, *lines = csv.reader(_text(folder / MATRIX))
        matrix = [[int(cell) for cell in line[1:]] for line in lines]
        table = list(csv.DictReader(_text(folder / CLASSES)))
        rows = [
            {
                "class": row["class"],
                "images": int(row["images"]),
                "accuracy": float(row["accuracy"]) if row["accuracy"] else None,
                "precision": float(row["precision"]) if row["precision"] else None,
            }
            for row in table
        ]
        examples, pictures = (
            json.load(_text(folder / name)) if (folder / name).exists() else {}
            for name in (EXAMPLES, PICTURES)
        )
        square = all(len(line) == len(head) - 1 == len(matrix) for line in matrix)
        known = {f"{row},{column}" for row in range(len(matrix)) for column in range(len(matrix))}
        if not square or len(rows) != len(matrix) or not known.issuperset(examples):
            raise ValueError
        for cell in examples.values():
            _check_pictures(cell)
        bins = list(csv.DictReader(_text(folder / CALIBRATION))) if (folder / CALIBRATION).exists() else []
        return Confusion(
            classes=head[1:],
            matrix=matrix,
            rows=rows,
            examples=examples,
            bins=[_bin(row) for row in bins],
            mistakes=_shown(pictures, "mistakes"),
            changes=_shown(pictures, "changes"),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        names = f"{MATRIX}, {CLASSES}, {CALIBRATION}, {PICTURES} or {EXAMPLES}"
        raise UserError(f"{folder}: {names} is damaged: evaluate again") from error


def _text(path: Path) -> io.StringIO:
    """A file's text; names of files and folders may be any bytes."""
    return io.StringIO(path.read_bytes().decode("utf-8", "surrogateescape"), newline="")


def _bin(row: dict[str, str]) -> Bin:
    shares = {name: float(row[name]) for name in ("low", "high", "accuracy", "confidence")}
    if not all(0 <= share <= 1 for share in shares.values()) or int(row["images"]) < 1:
        raise ValueError
    return Bin(images=int(row["images"]), **shares)


def _shown(pictures: dict[str, Any], kind: str) -> list[Shown]:
    found = [Shown(**one) for one in pictures.get(kind, [])]
    _check_pictures(one.picture for one in found)
    if not all(isinstance(text, str) for one in found for text in (one.image, one.title, one.caption)):
        raise ValueError
    return found


def _check_pictures(pictures: Iterable[str]) -> None:
    """Raise ValueError or TypeError for anything else than PNG files in base64."""
    if isinstance(pictures, str) or not all(base64.b64decode(one, validate=True) for one in pictures):
        raise ValueError
