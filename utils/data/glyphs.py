"""Glyphs: 62 classes of distorted characters, drawn from the fonts that come with matplotlib or from a folder's.

Nothing is downloaded and nothing is stored: the images are drawn when they are needed, and are the same every
time. docs/data.md shows some.
"""

from __future__ import annotations

import math
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

HELD_OUT = 5  # of a folder's fonts each fifth one, by path, is held out

_SEED = 62  # of the data set, whatever the run's seed is
_CANVAS = 2 * SIZE  # glyphs are drawn at twice the size and averaged down
_CAPITAL = 34  # height of a capital H on the canvas, pixels


@dataclass(frozen=True)
class _Distortion:
    """Limits of the random changes; lengths in pixels of the canvas, brightness from 0 to 1."""

    turn: float = 0.15  # radians, each way
    shear: float = 0.15  # pixels sideways per pixel up, each way
    stretch: float = 0.1  # share of width and of height, each way
    shift: float = 4.0  # each way
    stroke: float = 1.0  # largest growth of outlines
    blur: float = 1.5  # largest radius
    lines: int = 1  # largest number of lines that cross the image
    contrast: float = 0.4  # least difference of glyph and background
    gradient: float = 0.3  # largest change of the background over the image
    noise: float = 0.1  # largest standard deviation


_DISTORTION = _Distortion()
_RAMP = np.linspace(-0.5, 0.5, SIZE, dtype=np.float32)


@dataclass(frozen=True)
class Fonts:
    """Font files of the training images and of the validation images.

    Attributes:
        train: in the order in which the images of a class take them.
        val: likewise.
        rotate: a class begins with the font behind the last one of the class before, so that many fonts are all used.
    """

    train: tuple[Path, ...]
    val: tuple[Path, ...]
    rotate: bool = False


def find_fonts(folder: Path | None) -> Fonts:
    """The fonts to draw with: matplotlib's, or the TrueType and OpenType files anywhere in a folder.

    Each fifth font of a folder, in the order of paths, is held out for validation.

    Raises:
        UserError: matplotlib lacks a font; the folder is none, or has too few fonts; a font cannot be read, or lacks a
            character.
    """
    if folder is None:
        files = font_files()
        return Fonts(tuple(files[name] for name in TRAIN_FONTS), tuple(files.values()))
    if not folder.is_dir():
        raise UserError(f"--fonts {folder} is not a folder: name one that holds .ttf or .otf files")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".ttf", ".otf"))
    if len(found) < HELD_OUT:
        raise UserError(
            f"--fonts {folder} holds {len(found)} .ttf and .otf files: put {HELD_OUT} or more there, of which each "
            "fifth is held out"
        )
    for path in found:
        _check_font(path)
    held_out = found[HELD_OUT - 1 :: HELD_OUT]
    return Fonts(tuple(path for path in found if path not in held_out), tuple(held_out), rotate=True)


def _check_font(path: Path) -> None:
    """Refuse a font that cannot be read, or that draws a character as it draws one that it lacks."""
    try:
        font = ImageFont.truetype(path, 16, layout_engine=ImageFont.Layout.BASIC)
        drawn = {character: _plain(character, font) for character in ("\uffff", " ", *CHARACTERS)}
    except OSError as error:
        raise UserError(f"--fonts: {path} cannot be read as a font ({error}); remove it") from None
    lacking = [character for character in CHARACTERS if drawn[character] in (drawn["\uffff"], drawn[" "])]
    if lacking:
        raise UserError(f"--fonts: {path} has no {lacking[0]!r}; remove it")


def _plain(character: str, font: ImageFont.FreeTypeFont) -> bytes:
    """A character as it is drawn, without distortions."""
    canvas = Image.new("L", (SIZE, SIZE))
    ImageDraw.Draw(canvas).text((SIZE / 2, SIZE * 3 / 4), character, fill=255, font=font, anchor="ms")
    return canvas.tobytes()


def font_files() -> dict[str, Path]:
    """The file of each of matplotlib's fonts by its name.

    Raises:
        UserError: when this installation of matplotlib lacks one of them.
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


def glyphs(folder: Path | None = None) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Draw the data set; takes seconds.

    Args:
        folder: of fonts; None: matplotlib's.

    Returns:
        Training and validation set, each as images, uint8 [n, 1, 32, 32], and classes, int64 [n], which
        count through `CHARACTERS`.

    Raises:
        UserError: see `find_fonts`.
    """
    fonts = find_fonts(folder)
    train, val = ([_sized(path) for path in paths] for paths in (fonts.train, fonts.val))
    return (
        _draw_set(0, TRAIN_IMAGES, train, rotate=fonts.rotate),
        _draw_set(1, VAL_IMAGES, val, rotate=fonts.rotate),
    )


def _sized(path: Path) -> ImageFont.FreeTypeFont:
    """The font of this file, in the size that gives capitals the same height in all fonts."""

    def load(size: float) -> ImageFont.FreeTypeFont:
        # The basic layout is in every build of Pillow.
        return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)

    _, top, _, bottom = load(100).getbbox("H", anchor="ls")
    return load(100 * _CAPITAL / (bottom - top))


def _draw_set(
    split: int, count: int, fonts: Sequence[ImageFont.FreeTypeFont], *, rotate: bool
) -> tuple[Tensor, Tensor]:
    """`count` images per class, which take the fonts in turn."""
    images = np.empty((len(CHARACTERS), count, SIZE, SIZE), dtype=np.uint8)
    for label, character in enumerate(CHARACTERS):
        rng = np.random.default_rng((_SEED, split, label))
        first = label * count if rotate else 0
        for i in range(count):
            images[label, i] = _image(character, fonts[(first + i) % len(fonts)], rng)
    target = torch.arange(len(CHARACTERS)).repeat_interleave(count)
    return torch.from_numpy(images).view(-1, 1, SIZE, SIZE), target


def _image(character: str, font: ImageFont.FreeTypeFont, rng: np.random.Generator) -> NDArray[np.uint8]:
    """One image, uint8 [SIZE, SIZE]."""
    limit = _DISTORTION
    canvas = Image.new("L", (_CANVAS, _CANVAS))
    # Capitals are centred vertically, and all characters share their baseline: size and position tell C from c
    # and P from p.
    foot = ((_CANVAS / 2), (_CANVAS + _CAPITAL) / 2)
    stroke = rng.uniform(0, limit.stroke)
    ImageDraw.Draw(canvas).text(foot, character, fill=255, font=font, anchor="ms", stroke_width=stroke)
    canvas = canvas.transform(
        canvas.size, Image.Transform.AFFINE, _inverse_map(rng), resample=Image.Resampling.BILINEAR
    )
    draw = ImageDraw.Draw(canvas)
    for _ in range(rng.integers(limit.lines + 1)):
        ends = rng.uniform(0, _CANVAS, 4).tolist()
        draw.line(ends, fill=255 * int(rng.integers(2)), width=int(rng.integers(1, 4)))  # ink, or a gap
    canvas = canvas.filter(ImageFilter.GaussianBlur(rng.uniform(0, limit.blur))).reduce(2)
    return _shaded(np.asarray(canvas, dtype=np.float32) / np.float32(255), rng)


def _inverse_map(rng: np.random.Generator) -> tuple[float, float, float, float, float, float]:
    """A random affine map about the centre, as Pillow takes it: from the result's pixels to the source's."""
    limit = _DISTORTION
    angle = rng.uniform(-limit.turn, limit.turn)
    shear = rng.uniform(-limit.shear, limit.shear)
    width, height = 1 + rng.uniform(-limit.stretch, limit.stretch, 2)
    cos, sin = math.cos(angle), math.sin(angle)
    # The map stretches, shears and turns, in this order; here are the rows of its inverse.
    a, b = (cos + shear * sin) / width, (sin - shear * cos) / width
    c, d = -sin / height, cos / height
    centre = _CANVAS / 2
    x, y = centre + rng.uniform(-limit.shift, limit.shift, 2)  # where the centre goes
    return a, b, centre - a * x - b * y, c, d, centre - c * x - d * y


def _shaded(ink: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Make ink, 1 on the glyph and 0 beside it, bright on a darker background, with noise."""
    limit = _DISTORTION
    contrast = rng.uniform(limit.contrast, 1)
    background = rng.uniform(0, 1 - contrast)
    down, right = rng.uniform(-limit.gradient / 2, limit.gradient / 2, 2).astype(np.float32)
    field = np.float32(background) + down * _RAMP[:, None] + right * _RAMP
    noise = rng.standard_normal(ink.shape, dtype=np.float32) * np.float32(rng.uniform(0, limit.noise))
    shade = field + (np.float32(background + contrast) - field) * ink + noise
    return np.round(255 * shade.clip(0, 1)).astype(np.uint8)
