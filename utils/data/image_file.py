"""Image files: finding them below a folder, reading and decoding one; without torch."""

from __future__ import annotations

import io
import os
import stat
import struct
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
    """

    ignore_orientation: bool = False

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
    """Decode an image file to RGB, 16 bits to their upper 8, and turn it upright. Raises DECODE_ERRORS."""
    with parse(data) as image:
        # Pillow itself turns a TIFF.
        turn = None if image.format == "TIFF" else _TURNS.get(decoding.orientation(image, data))
        decoded = _decoded(image)
    return decoded if turn is None else decoded.transpose(turn)


def _decoded(image: ImageFile.ImageFile) -> Image.Image:
    if image.mode == "RGB":
        image.load()  # `convert` would copy it
        return image
    if image.mode.startswith("I;16"):
        # `convert` would turn all but the darkest greys white.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


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
    return image.format != "WEBP" or data[12:16] != b"VP8X"


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
