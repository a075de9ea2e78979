"""Images that a table lists: a CSV file beside them, or Parquet files that hold them."""

from __future__ import annotations

import csv
import json
import os
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from utils.data.image_file import read
from utils.data.images import Images, short_digest
from utils.data.shards.images import part_of, sorted_into_parts
from utils.data.shards.index import MOST_CLASSES
from utils.errors import UserError
from utils.text import printable, some_names

_GROUPS = 3  # of rows that are kept, since threads read some images ahead
_PATH, _LABEL, _SPLIT = ("path", "image", "file", "filename"), ("label", "class"), ("split",)


class ListedImages(Images):
    """Image files that a CSV file lists.

    Args:
        table: the CSV file; paths are relative to its folder.
        paths: of the images.
        target: classes, int64 [samples].
        classes: their names.
    """

    def __init__(
        self, table: Path, paths: Sequence[str], target: np.ndarray, classes: tuple[str, ...]
    ) -> None:
        self.place, self.classes, self.target = table, classes, target
        self._folder, self._paths = table.parent, list(paths)

    def read(self, index: int) -> bytes:
        return read(self._folder / self._paths[index])

    def name(self, index: int) -> str:
        return str(self._folder / self._paths[index])

    def key(self, index: int) -> str:
        return os.path.splitext(self._paths[index])[0]

    def digest(self) -> str:
        return short_digest("\n".join(self._paths).encode(errors="surrogateescape") + self.target.tobytes())


def open_csv(table: Path) -> dict[str, Images]:
    """The images that a CSV file lists, by `train` and `val` of its column `split`; without one all are `train`.

    Raises:
        UserError: no column `path` or `label`; an empty cell; labels out of range; an unknown split; a path twice, or
            one without a file.
    """
    rows: list[tuple[str, str, str]] = []
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            lines = csv.DictReader(file, strict=True)
            known = lines.fieldnames or []
            columns = [
                next((name for name in names if name in known), "") for names in (_PATH, _LABEL, _SPLIT)
            ]
            if not all(columns[:2]):
                raise UserError(
                    f"{table} has the columns {some_names(known) or 'of no name'}: its first line must name "
                    "path and label"
                )
            for row in lines:
                cells = [(row[column] or "").strip() if column else "train" for column in columns]
                if not all(cells):
                    raise UserError(f"{table}, line {lines.line_num}: an empty cell")
                if not part_of(cells[2]):
                    raise UserError(
                        f"{table}, line {lines.line_num}: split is {printable(cells[2])}: write train or val"
                    )
                rows.append((cells[0], cells[1], cells[2]))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{table} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not rows:
        raise UserError(f"{table} lists no images")
    paths = [path for path, _, _ in rows]
    if len(set(paths)) != len(paths):
        twice = sorted(path for path, times in Counter(paths).items() if times > 1)
        raise UserError(f"{table} lists images twice: {some_names(twice)}")
    if lost := [path for path in paths if not (table.parent / path).is_file()]:
        raise UserError(f"{table} lists files that are not in {table.parent}: {some_names(lost)}")
    classes = _in_order({label for _, label, _ in rows}, table)
    numbers = {name: number for number, name in enumerate(classes)}
    parts: dict[str, Images] = {}
    for part, words in sorted_into_parts(sorted({split for _, _, split in rows}), table).items():
        chosen = [(path, numbers[label]) for path, label, split in rows if split in words]
        target = np.array([number for _, number in chosen], np.int64)
        parts[part] = ListedImages(table, [path for path, _ in chosen], target, classes)
    return parts


def _in_order(names: set[str], where: Path) -> tuple[str, ...]:
    """Names of classes in the order of their numbers: by value where all are numbers, otherwise by name.

    Raises:
        UserError: all are numbers, and one is not whole, negative or too large; or a name is empty.
    """
    if "" in names:
        raise UserError(f"{where}: the column label is empty in some rows")
    if not all(map(_is_number, names)):
        return tuple(sorted(names))
    for name in sorted(names):
        if not name.isdecimal() or float(name) >= MOST_CLASSES:
            raise _out_of_range(where, name, f"write 0 to {MOST_CLASSES - 1:,}, or names of classes")
    return tuple(sorted(names, key=lambda name: (float(name), name)))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _out_of_range(where: Path, label: object, instead: str) -> UserError:
    return UserError(f"{where}: the label {printable(str(label))} is out of range: {instead}")


class ParquetImages(Images):
    """Images in a column of Parquet files.

    Args:
        paths: the files.
        rows: the number of the file, of its group of rows, and of the row in it, of each image, int64 [samples, 3].
        target: classes, int64 [samples].
        classes: their names.
    """

    any_order = False  # a group of rows is read at once

    def __init__(
        self, paths: Sequence[Path], rows: np.ndarray, target: np.ndarray, classes: tuple[str, ...]
    ) -> None:
        self.place, self.classes, self.target = _where(paths), classes, target
        self._paths, self._rows = tuple(paths), rows
        self._lock = threading.Lock()
        self._groups: dict[tuple[int, int], Any] = {}  # those that were read last

    def _cell(self, index: int) -> Any:
        from pyarrow import parquet

        file, group, row = map(int, self._rows[index])
        with self._lock:
            if (file, group) not in self._groups:
                if len(self._groups) == _GROUPS:
                    del self._groups[next(iter(self._groups))]
                with parquet.ParquetFile(self._paths[file]) as opened:
                    column = opened.read_row_group(group, columns=["image"]).column("image")
                self._groups[file, group] = column
            return self._groups[file, group][row].as_py()

    def read(self, index: int) -> bytes:
        cell = self._cell(index)
        data = cell.get("bytes") if isinstance(cell, dict) else cell
        if not data:
            raise OSError("an empty cell")
        return data

    def name(self, index: int) -> str:
        file, _, _ = map(int, self._rows[index])
        return f"{self._paths[file]}: {self.key(index)}"

    def key(self, index: int) -> str:
        cell = self._cell(index)
        path = cell.get("path") if isinstance(cell, dict) else None
        return os.path.splitext(path)[0] if path else f"{self._paths[int(self._rows[index][0])].stem}/{index}"

    def digest(self) -> str:
        names = "\n".join(f"{path.name} {path.stat().st_size}" for path in self._paths)
        return short_digest(names.encode() + self.target.tobytes())


def open_parquet(paths: Sequence[Path]) -> dict[str, Images]:
    """The images of Parquet files with the columns `image` and `label`; the parts by the files' names.

    `image` holds files, or a record with their `bytes`, as Hugging Face's do; `label` numbers or names of classes.

    Raises:
        UserError: pyarrow is missing; other columns, or other kinds of them; labels out of range; a damaged file.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError("Parquet files need pyarrow: pip install pyarrow") from error
    labels: dict[Path, list[Any]] = {}
    sizes: dict[Path, list[int]] = {}
    names: tuple[str, ...] = ()
    for path in paths:
        try:
            with parquet.ParquetFile(path) as file:
                _check_columns(path, file.schema_arrow)
                names = names or _names(file.schema_arrow.metadata)
                labels[path] = file.read(columns=["label"]).column("label").to_pylist()
                groups = range(file.metadata.num_row_groups)
                sizes[path] = [file.metadata.row_group(group).num_rows for group in groups]
        except (OSError, pyarrow.ArrowException) as error:
            raise UserError(
                f"{path}: no Parquet file, or a damaged one ({' '.join(str(error).split())})"
            ) from error
    values = [value for of_file in labels.values() for value in of_file]
    if not values or None in values:
        raise UserError(
            f"{_where(paths)}: the column label is {'empty' if not values else 'empty in some rows'}"
        )
    if len({type(value) for value in values}) > 1:
        raise UserError(f"{_where(paths)}: the column label has numbers in some files and names in others")
    if isinstance(values[0], int):
        classes = names or tuple(map(str, range(min(max(values), MOST_CLASSES) + 1)))
        if min(values) < 0 or max(values) >= min(len(classes), MOST_CLASSES):
            wrong = min(values) if min(values) < 0 else max(values)
            instead = f"{len(names)} classes are named" if names else f"write 0 to {MOST_CLASSES - 1:,}"
            raise _out_of_range(_where(paths), wrong, instead)
        numbers: dict[Any, int] = {number: number for number in range(len(classes))}
    else:
        classes = names or _in_order(set(values), _where(paths))
        numbers = {name: number for number, name in enumerate(classes)}
        if unknown := sorted(set(values) - set(classes)):
            raise UserError(
                f"{_where(paths)}: the labels {some_names(unknown)} are none of the classes that are named"
            )
    files = {path.name: path for path in paths}
    if len(paths) == 1 and not part_of(paths[0].name):  # a single file need not say what it is for
        found = {"train": [*files]}
    else:
        found = sorted_into_parts([*files], _where(paths))
    parts: dict[str, Images] = {}
    for part, chosen in found.items():
        of_part = [files[name] for name in chosen]
        rows = [
            (n, g, row)
            for n, path in enumerate(of_part)
            for g, size in enumerate(sizes[path])
            for row in range(size)
        ]
        target = np.array([numbers[value] for path in of_part for value in labels[path]], np.int64)
        parts[part] = ParquetImages(of_part, np.array(rows, np.int64), target, classes)
    return parts


def _where(paths: Sequence[Path]) -> Path:
    """What files have in common, for messages."""
    return paths[0] if len(paths) == 1 else paths[0].parent


def _check_columns(path: Path, schema: Any) -> None:
    import pyarrow

    if not {"image", "label"} <= set(schema.names):
        raise UserError(f"{path} has the columns {some_names(schema.names)}: it needs image and label")
    image, label = (schema.field(name).type for name in ("image", "label"))
    inner = (
        image.field("bytes").type
        if pyarrow.types.is_struct(image) and image.get_field_index("bytes") >= 0
        else image
    )
    if not (pyarrow.types.is_binary(inner) or pyarrow.types.is_large_binary(inner)):
        raise UserError(
            f"{path}: the column image is of the type {image}: it must hold image files, or their bytes"
        )
    if not (
        pyarrow.types.is_integer(label)
        or pyarrow.types.is_string(label)
        or pyarrow.types.is_large_string(label)
    ):
        raise UserError(
            f"{path}: the column label is of the type {label}: it must hold numbers or names of classes"
        )


def _names(metadata: dict[bytes, bytes] | None) -> tuple[str, ...]:
    """Names of classes as Hugging Face's libraries write them into a file; empty without any."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(map(str, features["label"]["names"]))
    except (KeyError, ValueError, TypeError):
        return ()
