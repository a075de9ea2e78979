"""A sheet of small pictures with a caption below each."""

from __future__ import annotations

import base64
import io
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from utils.text import printable

if TYPE_CHECKING:
    from PIL.Image import Image

SHOWN = 24  # pictures of a sheet
SIDE = 96  # their height and width in pixels at the most
COLUMNS = 6
_LETTERS, _LINES = 30, 3  # of a caption


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A picture of a sheet.

    Attributes:
        image: name of the image.
        title: its class; empty where it is not known.
        caption: what it was called.
        picture: a PNG file in base64.
    """

    image: str
    title: str
    caption: str
    picture: str


def as_picture(image: Image, side: int = SIDE) -> str:
    """A PNG file in base64 of an image, made smaller where it has more than `side` pixels in height or width."""
    image = image.copy()
    image.thumbnail((side, side))
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode("ascii")


def draw_sheet(pictures: Sequence[Shown], path: Path, heading: str) -> None:
    """Draw pictures with their titles and captions into a PNG file; without any, the file is removed."""
    from matplotlib.figure import Figure
    from PIL import Image as images

    if not pictures:
        path.unlink(missing_ok=True)
        return
    columns = min(COLUMNS, len(pictures))
    rows = -(-len(pictures) // columns)
    figure = Figure(figsize=(max(1.9 * columns, 4.5), 2.2 * rows + 0.5), dpi=120, layout="constrained")
    figure.suptitle(printable(heading), fontsize=11, fontweight="bold", parse_math=False)
    places = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in places:
        axes.set_axis_off()
    for axes, shown in zip(places, pictures, strict=False):
        axes.imshow(images.open(io.BytesIO(base64.b64decode(shown.picture))), interpolation="nearest")
        lines = [
            line
            for text in (shown.title, shown.caption)
            for line in textwrap.wrap(printable(text), _LETTERS, max_lines=_LINES, placeholder=" ...")
        ]
        axes.set_title("\n".join(lines), fontsize=7, parse_math=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # names in other scripts become boxes
        figure.savefig(path)
