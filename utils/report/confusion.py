"""The files of an evaluation: accuracy of each class, the confusion matrix, examples of its cells. Without torch."""

from __future__ import annotations

import base64
import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.errors import UserError

MATRIX, CLASSES, EXAMPLES = "confusion.csv", "classes.csv", "examples.json"


@dataclass(frozen=True, kw_only=True)
class Confusion:
    """The files of an evaluation.

    Attributes:
        classes: names of the classes.
        matrix: images by class (row) and prediction (column).
        rows: of each class: class, images, accuracy and precision in percent; None where there is no image.
        examples: "row,column" -> PNG files in base64.
    """

    classes: list[str]
    matrix: list[list[int]]
    rows: list[dict[str, Any]]
    examples: dict[str, list[str]]


def read(folder: Path) -> Confusion | None:
    """The files in the folder of a run; None without an evaluation.

    Raises:
        UserError: they are damaged.
    """
    if not (folder / MATRIX).exists() or not (folder / CLASSES).exists():
        return None
    try:
        head, *lines = csv.reader((folder / MATRIX).read_text(encoding="utf-8").splitlines())
        matrix = [[int(cell) for cell in line[1:]] for line in lines]
        table = list(csv.DictReader((folder / CLASSES).read_text(encoding="utf-8").splitlines()))
        rows = [
            {
                "class": row["class"],
                "images": int(row["images"]),
                "accuracy": float(row["accuracy"]) if row["accuracy"] else None,
                "precision": float(row["precision"]) if row["precision"] else None,
            }
            for row in table
        ]
        examples = json.loads((folder / EXAMPLES).read_text("utf-8")) if (folder / EXAMPLES).exists() else {}
        square = all(len(line) == len(head) - 1 == len(matrix) for line in matrix)
        known = {f"{row},{column}" for row in range(len(matrix)) for column in range(len(matrix))}
        pictures = all(
            name in known
            and isinstance(cell, list)
            and all(base64.b64decode(one, validate=True) for one in cell)
            for name, cell in examples.items()
        )
        if not square or not pictures or len(rows) != len(matrix):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder}: {MATRIX}, {CLASSES} or {EXAMPLES} is damaged: evaluate again") from error
    return Confusion(classes=head[1:], matrix=matrix, rows=rows, examples=examples)
