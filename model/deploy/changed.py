"""Images whose class two networks predict differently: as a table, a file and a sheet of pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.report.changes import HEAD, HEADING, Change, as_csv
from utils.report.sheet import SHOWN, Shown, as_picture, draw_sheet
from utils.text import format_table, json_lines, printable

if TYPE_CHECKING:
    from utils.data.transform import ImageTransform


def changes_of(
    rows: Sequence[Mapping[str, Any]], reference: Sequence[Mapping[str, Any]], classes: Sequence[str]
) -> list[Change]:
    """The images that have another class in `rows` than in `reference`.

    Args:
        rows: of `model.deploy.predict.predictions`.
        reference: the same of the other network, for the same images.
        classes: names of the classes. An image is of a class where the folder that it lies in has its name.
    """
    before, known = {row["image"]: row for row in reference}, set(classes)
    found = []
    for row in rows:
        other, folder = before[row["image"]], Path(row["image"]).resolve().parent.name
        if other["classes"][0] != row["classes"][0]:
            found.append(
                Change(
                    image=row["image"], true=folder if folder in known else None,
                    reference=other["classes"][0], reference_probability=other["probabilities"][0],
                    called=row["classes"][0], probability=row["probabilities"][0],
                )
            )  # fmt: skip
    return found


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


def draw_changes(changes: Sequence[Change], transform: ImageTransform, path: Path) -> None:
    """Draw the images with the reference's highest probabilities; without any, the file is removed."""
    first = sorted(changes, key=lambda change: -change.reference_probability)[:SHOWN]
    shown = [
        Shown(
            image=one.image,
            title=one.true or "",
            caption=one.caption,
            picture=as_picture(transform.decoded(one.image)),
        )
        for one in first
    ]
    draw_sheet(shown, path, HEADING)


FORMATS = {".csv": as_csv, ".jsonl": as_json_lines}
