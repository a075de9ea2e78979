"""Glyphs: 62 classes of distorted characters, drawn from the fonts that come with matplotlib.

Nothing is downloaded and nothing is stored: the images are drawn when they are asked for, and are the same
every time. What they look like: docs/data.md.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor

from utils.errors import UserError

CHARACTERS = string.digits + string.ascii_uppercase + string.ascii_lowercase
"""The character of each class."""

SIZE = 32  # height and width of an image, pixels
TRAIN_IMAGES = 50  # per class
VAL_IMAGES = 20  # per class; one of each font

TRAIN_FONTS = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSansMono-BoldOblique",
    "DejaVuSerif", "DejaVuSerif-BoldItalic", "DejaVuSerif-Italic", "STIXGeneral", "STIXGeneralBol",
    "STIXGeneralItalic", "STIXGeneralBolIta", "cmr10", "cmb10", "cmtt10", "DejaVuSansMono-Oblique",
)  # fmt: skip
HELD_OUT_FONTS = ("DejaVuSans-BoldOblique", "DejaVuSerif-Bold", "cmss10", "cmti10")
"""Fonts that only validation images are drawn from; the others are in both sets."""

_SEED = 62  # of the data set, whatever the run's seed is
_CANVAS = 2 * SIZE  # glyphs are drawn at twice the size and averaged down
_CAPITAL = 34  # height of a capital H on the canvas, pixels


@dataclass(frozen=True)
class _Distortion:
    """How far random changes go; lengths in pixels of the canvas, brightness from 0 to 1."""

    turn: float = 0.22  # radians, each way
    shear: float = 0.25  # pixels sideways per pixel up, each way
    stretch: float = 0.12  # share of width and of height, each way
    shift: float = 6.0  # each way
    stroke: float = 1.0  # most that outlines grow by
    blur: float = 1.8  # largest radius
    lines: int = 2  # most lines that cross the image
    contrast: float = 0.3  # least difference of glyph and background
    gradient: float = 0.3  # largest change of the background over the image
    noise: float = 0.12  # largest standard deviation


_DISTORTION = _Distortion()


def font_files() -> dict[str, Path]:
    """The file of each font by its name.

    Raises:
        UserError: when this installation of matplotlib has come without one of them.
    """
    import matplotlib  # here: other data sets need not wait for it

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    files = {name: folder / f"{name}.ttf" for name in TRAIN_FONTS + HELD_OUT_FONTS}
    missing = [path.name for path in files.values() if not path.is_file()]
    if missing:
        raise UserError(
            f"--dataset glyphs draws with matplotlib's fonts, and {missing[0]} is not in {folder}: install "
            "matplotlib with pip, or choose another data set"
        )
    return files


def glyphs() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Draw the data set; takes seconds.

    Returns:
        Training and validation set, each as images, uint8 [n, 1, 32, 32], and classes, int64 [n], which
        count through `CHARACTERS`.

    Raises:
        UserError: when a font is missing.
    """
    fonts = {name: _sized(path) for name, path in font_files().items()}
    train = [fonts[name] for name in TRAIN_FONTS]
    return _draw_set(0, TRAIN_IMAGES, train), _draw_set(1, VAL_IMAGES, list(fonts.values()))


def _sized(path: Path) -> ImageFont.FreeTypeFont:
    """The font of this file, in the size that makes capitals as high as those of all other fonts."""

    def load(size: float) -> ImageFont.FreeTypeFont:
        # The basic layout is in every build of Pillow.
        return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)

    _, top, _, bottom = load(100).getbbox("H", anchor="ls")
    return load(100 * _CAPITAL / (bottom - top))


def _draw_set(split: int, count: int, fonts: Sequence[ImageFont.FreeTypeFont]) -> tuple[Tensor, Tensor]:
    """`count` images per class, which take the fonts in turn."""
    images = np.empty((len(CHARACTERS), count, SIZE, SIZE), dtype=np.uint8)
    for label, character in enumerate(CHARACTERS):
        for i in range(count):
            # A stream of its own, so that no image depends on what others drew.
            rng = np.random.default_rng((_SEED, split, label, i))
            images[label, i] = _image(character, fonts[i % len(fonts)], rng)
    target = torch.arange(len(CHARACTERS)).repeat_interleave(count)
    return torch.from_numpy(images).view(-1, 1, SIZE, SIZE), target


def _image(character: str, font: ImageFont.FreeTypeFont, rng: np.random.Generator) -> NDArray[np.uint8]:
    """One image, uint8 [SIZE, SIZE]."""
    limit = _DISTORTION
    canvas = Image.new("L", (_CANVAS, _CANVAS))
    # Capitals are centred on their height, and other characters stand on the same line: the size and the
    # place tell C from c and P from p.
    foot = ((_CANVAS / 2), (_CANVAS + _CAPITAL) / 2)
    stroke = rng.uniform(0, limit.stroke)
    ImageDraw.Draw(canvas).text(foot, character, fill=255, font=font, anchor="ms", stroke_width=stroke)
    canvas = canvas.transform(
        canvas.size, Image.Transform.AFFINE, _inverse_map(rng), resample=Image.Resampling.BICUBIC
    )
    draw = ImageDraw.Draw(canvas)
    for _ in range(rng.integers(limit.lines + 1)):
        ends = rng.uniform(0, _CANVAS, 4).tolist()
        draw.line(ends, fill=255 * int(rng.integers(2)), width=int(rng.integers(1, 4)))  # ink, or a gap
    canvas = canvas.filter(ImageFilter.GaussianBlur(rng.uniform(0, limit.blur))).reduce(2)
    return _shaded(np.asarray(canvas, dtype=np.float64) / 255, rng)


def _inverse_map(rng: np.random.Generator) -> tuple[float, ...]:
    """A random affine map about the centre, as Pillow takes it: from the result's pixels to the source's."""
    limit = _DISTORTION
    angle, shear = rng.uniform(-1, 1, 2) * (limit.turn, limit.shear)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    slant = np.array([[1.0, shear], [0.0, 1.0]])
    inverse = np.linalg.inv(turn @ slant @ np.diag(1 + rng.uniform(-1, 1, 2) * limit.stretch))
    centre = np.full(2, _CANVAS / 2)
    offset = centre - inverse @ (centre + rng.uniform(-1, 1, 2) * limit.shift)
    return (*inverse[0], offset[0], *inverse[1], offset[1])


def _shaded(ink: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Give ink, 1 on the glyph and 0 beside it, a brightness, a background and noise."""
    limit = _DISTORTION
    contrast = rng.uniform(limit.contrast, 1)
    dark = rng.uniform(0, 1 - contrast)
    ends = (dark, dark + contrast) if rng.integers(2) else (dark + contrast, dark)
    background, glyph = ends
    slope = rng.uniform(-1, 1, 2) * limit.gradient / 2
    down, right = np.mgrid[:SIZE, :SIZE] / (SIZE - 1) - 0.5
    field = background + slope[0] * down + slope[1] * right
    shade = field + (glyph - field) * ink + rng.normal(0, rng.uniform(0, limit.noise), ink.shape)
    return np.round(255 * shade.clip(0, 1)).astype(np.uint8)
