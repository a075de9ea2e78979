"""Weights of the classes in the loss, from their numbers of images or from a file."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from utils.config.schema import LEAST, MOST
from utils.errors import UserError
from utils.text import closest, printable, some_names

BALANCED = "balanced"
_HEAD = ["class", "weight"]


def read_weights(path: Path, names: Sequence[str]) -> tuple[float, ...]:
    """Read the weight of each class from a CSV file: the line `class,weight`, then a line for every class.

    Args:
        path: the file, UTF-8.
        names: of the classes, in their order.

    Raises:
        UserError: the file cannot be read; a class is missing, unknown or there twice; a weight is no number from
            1e-6 to 1e6.
    """
    where = f"--class_weights {printable(str(path))}"
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = [row for row in csv.reader(file) if row]
    except OSError as error:
        raise UserError(f"{where}: {error.strerror}; write balanced, or the path of a CSV file") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(
            f"{where} is no CSV file in UTF-8; write balanced, or the path of a file with lines class,weight"
        ) from error
    if not rows or [cell.strip() for cell in rows[0]] != _HEAD:
        raise UserError(f"{where}: the first line must be class,weight, then a line for every class")
    weights: dict[str, float] = {}
    for row in rows[1:]:
        if len(row) != len(_HEAD):
            raise UserError(f"{where}: {printable(','.join(row))!r} must be a class, a comma and its weight")
        name, text = row[0].strip(), row[1].strip()
        if name not in names:
            raise UserError(f"{where}: there is no class {printable(name)!r}{closest(name, names)}")
        if name in weights:
            raise UserError(f"{where}: the class {printable(name)!r} is there twice; keep one line")
        try:
            weights[name] = float(text)
        except ValueError:
            weights[name] = 0.0
        if not LEAST <= weights[name] <= MOST:
            raise UserError(
                f"{where}: the weight {printable(text)!r} of {printable(name)!r} must be a number from {LEAST:g} to "
                f"{MOST:g}"
            )
    missing = [name for name in names if name not in weights]
    if missing:
        raise UserError(f"{where} lacks {len(missing)} classes: add {some_names(missing)}")
    return tuple(weights[name] for name in names)


def weights_of(choice: str, target: Tensor, names: Sequence[str]) -> tuple[float, ...]:
    """The weight of each class, scaled so that the mean over the training images is 1.

    Balanced: w_c = N / (C * n_c) for n_c of N images in class c of C.

    Args:
        choice: "balanced", or the path of a file.
        target: classes of the training images, int64 [N].
        names: of the classes, in their order.

    Raises:
        UserError: as `read_weights`; or a class without images is to be balanced.
    """
    counts = counts_of(target, names)
    weights = 1 / counts if choice == BALANCED else torch.tensor(read_weights(Path(choice), names))
    return tuple((weights.double() * (len(target) / (counts * weights).sum())).tolist())


def counts_of(target: Tensor, names: Sequence[str]) -> Tensor:
    """The number of training images of each class, float64 [C]; raises `UserError` for a class without any."""
    counts = torch.bincount(target, minlength=len(names)).double()
    empty = [name for name, count in zip(names, counts.tolist(), strict=True) if count == 0]
    if empty:
        raise UserError(f"--class_weights: the training set has no image of {some_names(empty)}")
    return counts
