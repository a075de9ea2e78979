"""Image files: finding them below a folder, reading and decoding one; without torch."""

from __future__ import annotations

import functools
import io
import os
import stat
import struct
import sys
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
from PIL import ExifTags, Image, ImageFile, TiffImagePlugin

from utils.errors import UserError

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "JPEG2000", "PPM", "TIFF", "WEBP")
"""Pillow's names of the formats that are decoded; JPEG includes MPO. None runs another program, as EPS does."""

DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    EOFError,
    MemoryError,
    RuntimeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
"""Exceptions that Pillow raises for files that are missing, truncated, no image, broken or suspiciously large."""


# Pillow warns of odd metadata, which some photographs of ImageNet have, and of size, and names no file.
warnings.filterwarnings("ignore", module=r"PIL\.")


def read(path: str | Path) -> bytes:
    """Read an image file. Raises `OSError`, also for a pipe or the like, whose data might never end."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError("not a regular file")
    with open(path, "rb") as file:
        return file.read()


def parse(data: bytes) -> ImageFile.ImageFile:
    """Read the header of an image file that training can use. Raises DECODE_ERRORS."""
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    check_mode(image)
    return image


@dataclass(frozen=True)
class Decoding:
    """What decoding does with the pixels of a data set.

    Attributes:
        ignore_orientation: leave images as they are stored, whatever EXIF says; TIFF is turned upright even so.
        max_value: the value of 16-bit images that becomes 255, white, as all above it.
    """

    ignore_orientation: bool = False
    max_value: int = 65535

    def orientation(self, image: ImageFile.ImageFile, data: bytes) -> int:
        """Return EXIF's orientation, 1 to 8, by which an image is turned; 1 where it has none that is valid.

        The image may come from `parse`: only its header is needed.
        """
        if self.ignore_orientation and image.format != "TIFF":
            return 1
        # Without metadata in its header Pillow decodes a PNG, since they may follow the pixels.
        if image.format == "PNG" and not any(name in data for name in _PNG_METADATA):
            return 1
        try:
            value = image.getexif().get(ExifTags.Base.Orientation, 1)
        except DECODE_ERRORS:  # damaged metadata of an image that may be whole
            return 1
        return int(value) if value in range(1, 9) else 1


PLAIN = Decoding()

_PNG_METADATA = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")  # where Pillow finds an orientation

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def stored_size(image: ImageFile.ImageFile) -> tuple[int, int]:
    """Width and height of an image from `parse` as it is stored; of a TIFF Pillow gives them turned upright."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return image.tag_v2[TiffImagePlugin.IMAGEWIDTH], image.tag_v2[TiffImagePlugin.IMAGELENGTH]
    return image.size


def decode(data: bytes, decoding: Decoding = PLAIN) -> Image.Image:
    """Decode an image file to RGB, 16 bits to 8 by `decoding.max_value`, and turn it upright. Raises DECODE_ERRORS."""
    with parse(data) as image:
        # Pillow itself turns a TIFF.
        turn = None if image.format == "TIFF" else _TURNS.get(decoding.orientation(image, data))
        if has_16_bits(image):
            decoded = Image.fromarray(_table(decoding.max_value)[values_of(image, data)]).convert("RGB")
        elif image.mode == "RGB":
            image.load()  # `convert` would copy it
            decoded = image
        else:
            decoded = image.convert("RGB")
    return decoded if turn is None else decoded.transpose(turn)


def as_rgb(image: Image.Image, decoding: Decoding = PLAIN) -> Image.Image:
    """As `decode`, for an image that Pillow has opened: of colours with 16 bits it has kept the upper 8.

    Raises DECODE_ERRORS.
    """
    check_mode(image)
    turn = None
    if image.format != "TIFF" and not decoding.ignore_orientation:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    if image.mode.startswith("I;16"):
        image = Image.fromarray(_table(decoding.max_value)[np.asarray(image).astype(np.uint16)])
    decoded = image.convert("RGB")
    return decoded if turn is None else decoded.transpose(turn)


def has_16_bits(image: ImageFile.ImageFile) -> bool:
    """Whether an image from `parse` has values of 9 to 16 bits whose lower ones `values_of` can read."""
    return image.mode.startswith("I;16") or _raw_mode(image) in _LOWER


def values_of(image: ImageFile.ImageFile, data: bytes) -> np.ndarray:
    """Return the values of an image for which `has_16_bits` holds: uint16 [H, W], or of colours [H, W, 3].

    Args:
        image: from `parse`, not decoded yet; it is decoded.
        data: its file.
    """
    if image.mode.startswith("I;16"):
        return np.asarray(image).astype(np.uint16)
    # Pillow reads only the upper byte of a colour; with the other byte order it takes the lower one for that.
    upper, lower = _LOWER[_raw_mode(image)]
    parts = []
    for raw in (upper, lower):
        with parse(data) as part:
            part.tile = [
                tile._replace(args=raw if isinstance(tile.args, str) else (raw, *(tile.args or ())[1:]))
                for tile in part.tile
            ]
            parts.append(np.asarray(part).astype(np.uint16))
    high, low = parts
    if upper == lower:  # grey and alpha, two bytes each
        return 256 * high[..., 0] + high[..., 1]
    return 256 * high[..., :3] + low[..., :3]


def is_8_bit_png(start: bytes) -> bool:
    """Whether the first 25 bytes of a file are those of a PNG of 8 bits or fewer; far faster than opening it."""
    return start.startswith(b"\x89PNG") and start[-1] != 16


def largest_value(file: str | bytes) -> int | None:
    """The largest value of an image of 16 bits, a path or its data; None for one of 8, and for what cannot be read."""
    try:
        if isinstance(file, str):
            if not os.path.isfile(file):
                return None
            with open(file, "rb") as opened:
                start = opened.read(25)
        else:
            start = file[:25]
        if is_8_bit_png(start):
            return None
        with Image.open(file if isinstance(file, str) else io.BytesIO(file), formats=FORMATS) as image:
            if not has_16_bits(image):
                return None
        data = read(file) if isinstance(file, str) else file
        with parse(data) as image:
            return int(values_of(image, data).max())
    except DECODE_ERRORS:
        return None


def _raw_mode(image: ImageFile.ImageFile) -> str:
    """Pillow's name of how a file stores its pixels."""
    args = image.tile[0].args if image.tile else ""
    return args if isinstance(args, str) else str(args[0]) if args else ""


# Of files with colours of 16 bits: how they store them, and what Pillow takes to be the upper and the lower byte.
_OTHER = "B" if sys.byteorder == "little" else "L"
_LOWER = {
    f"{bands};16{order}": (f"{bands};16{order}", f"{bands};16{swapped}")
    for bands in ("RGB", "RGBX", "RGBA")
    for order, swapped in (("B", "L"), ("L", "B"), ("N", _OTHER))
} | {"LA;16B": ("RGBA", "RGBA")}


@functools.cache
def _table(max_value: int) -> np.ndarray:
    """The value of 8 bits for each of 16 bits, uint8 [65536]."""
    values = np.arange(65536)
    if max_value == 65535:
        return (values >> 8).astype(np.uint8)
    return np.minimum((values * 255 + max_value // 2) // max_value, 255).astype(np.uint8)


def check_mode(image: Image.Image) -> None:
    """Raise `ValueError` for pixels whose range is not known."""
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of 32 bits, mode {image.mode}: convert them to 8 or 16 bits")


def reason_of(error: BaseException) -> str:
    """Return the error of a file in one line."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    text = "no image" if isinstance(error, Image.UnidentifiedImageError) else text
    return " ".join(text.split()).rstrip(":") or type(error).__name__


def not_for_dali(image: ImageFile.ImageFile) -> str:
    """Name the kind of an image that DALI cannot decode or decodes to other pixels; empty for all others.

    The image may come from `parse`: only its header is needed.
    """
    if image.format not in ("JPEG", "MPO", "PNG", "BMP", "TIFF", "WEBP", "PPM"):
        return str(image.format)
    if image.format == "PPM" and image.tile[0].codec_name != "raw":
        return "PPM with text or other than 255 levels"
    if image.format == "TIFF" and image.mode in ("1", "LA", "LAB"):
        return f"TIFF of the mode {image.mode}"
    return ""


def dali_decodes_alike(image: ImageFile.ImageFile, data: bytes) -> bool:
    """Whether DALI can be given the file itself; if not, it is given the pixels that `decode` returns."""
    # DALI 2.4 finds no end of a WebP with metadata behind pixels of an odd number of bytes.
    extended = image.format == "WEBP" and data[12:16] == b"VP8X"
    return not extended and not has_16_bits(image)


_OF_SYSTEMS = frozenset(
    {  # in lower case
        "__macosx", "@eadir", "@recycle", "@recently-snapshot", "@tmp", "#recycle", "#snapshot", "$recycle.bin",
        "recycler", "system volume information", "lost+found", "__pycache__",
    }
)  # fmt: skip


def is_hidden(name: str) -> bool:
    """Whether a file or folder is none of the user's: its name begins with a dot, or a system has made it.

    Examples are `.ipynb_checkpoints`, `.Trash-1000`, `._x.jpg` (macOS), `__MACOSX` (its archives), `@eaDir` (Synology).
    """
    return name.startswith(".") or name.lower() in _OF_SYSTEMS


def walk(root: Path, hidden: list[str] | None = None) -> Iterator[tuple[str, list[str]]]:
    """Yield `root` and every folder below it, with the sorted names of the files in it.

    Links are followed, but a folder that was visited already, as by a link that leads back up, is passed over. So are
    hidden files and folders below `root`.

    Args:
        root: the folder.
        hidden: gets the paths of what is passed over for `is_hidden`, if it is given.

    Raises:
        UserError: a folder cannot be listed.
    """

    def refuse(error: OSError) -> NoReturn:
        raise UserError(f"{error.filename}: cannot be listed ({error.strerror})") from error

    visited: set[str] = set()
    for folder, inside, names in os.walk(root, onerror=refuse, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited:
            inside.clear()
            continue
        visited.add(real)
        if hidden is not None:
            hidden += [os.path.join(folder, name) for name in sorted([*inside, *names]) if is_hidden(name)]
        # Sorted, so that of two links to a folder always the same one is passed over.
        inside[:] = sorted(name for name in inside if not is_hidden(name))
        yield folder, sorted(name for name in names if not is_hidden(name))
