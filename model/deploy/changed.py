"""Images whose class two networks predict differently: as a table, a file and a sheet of pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.report.changes import HEAD, HEADING, Change, as_csv
from utils.report.sheet import SHOWN, Shown, as_picture, draw_sheet
from utils.text import format_table, json_lines, printable

if TYPE_CHECKING:
    from model.deploy.given import Given
    from utils.data.transform import ImageTransform


def changes_of(
    given: Sequence[Given],
    rows: Sequence[Mapping[str, Any]],
    reference: Sequence[Mapping[str, Any]],
    classes: Sequence[str],
) -> list[Change]:
    """The images that have another class in `rows` than in `reference`.

    Args:
        given: the images.
        rows: theirs by `model.deploy.predict.rows_of`.
        reference: the same of the other network.
        classes: names of the classes.
    """
    known = set(classes)
    return [
        Change(
            image=one.name, true=one.label if one.label in known else None,
            reference=before["classes"][0], reference_probability=before["probabilities"][0],
            called=row["classes"][0], probability=row["probabilities"][0],
        )
        for one, row, before in zip(given, rows, reference, strict=True)
        if before["classes"][0] != row["classes"][0]
    ]  # fmt: skip


def as_text(changes: Sequence[Change]) -> str:
    """The images as a table."""
    rows = [
        tuple(
            f"{value:.4f}" if isinstance(value, float) else printable(str(value or ""))
            for value in change.row.values()
        )
        for change in changes
    ]
    return format_table(HEAD, rows)


def as_json_lines(changes: Sequence[Change]) -> str:
    """The images as JSON, an object in each line; `class` is null where it is not known."""
    return json_lines(change.row for change in changes)


def draw_changes(
    changes: Sequence[Change],
    files: Mapping[str, Callable[[], str | bytes]],
    transform: ImageTransform,
    path: Path,
) -> None:
    """Draw the images with the reference's highest probabilities; without any, the file is removed.

    `files` has what the transform takes, by the names of the images.
    """
    first = sorted(changes, key=lambda change: -change.reference_probability)[:SHOWN]
    shown = [
        Shown(
            image=one.image,
            title=one.true or "",
            caption=one.caption,
            picture=as_picture(transform.decoded(files[one.image]())),
        )
        for one in first
    ]
    draw_sheet(shown, path, HEADING)


FORMATS = {".csv": as_csv, ".jsonl": as_json_lines}
