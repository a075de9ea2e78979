"""Faults and oddities of image files, for `tools.py --keyword verify-image` and `verify-data`."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from utils.data.image_file import (
    DECODE_ERRORS,
    FORMATS,
    PLAIN,
    decode,
    has_16_bits,
    not_for_dali,
    parse,
    read,
    reason_of,
    values_of,
    walk,
)

# Pillow's names of formats -> their endings; MPO is a JPEG with more pictures after the first.
ENDINGS = {
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "JPEG": (".jpeg", ".jpg"),
    "MPO": (".jpeg", ".jpg"),
    "PNG": (".png",),
    "PPM": (".pgm", ".ppm"),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
}
IMAGE_ENDINGS = tuple(sorted({ending for endings in ENDINGS.values() for ending in endings}))


def image_files(root: Path) -> Iterator[Path]:
    """All files below `root` with the ending of an image; links are followed, each folder is visited once.

    Raises UserError for a folder that cannot be listed.
    """
    return _files(root, images=True)


def other_files(root: Path) -> Iterator[Path]:
    """All other files below `root`, in the same way."""
    return _files(root, images=False)


def _files(root: Path, *, images: bool) -> Iterator[Path]:
    """All files below `root` with the ending of an image, or all others."""
    for folder, names in walk(root):
        for name in names:
            if name.lower().endswith(IMAGE_ENDINGS) == images:
                yield Path(folder, name)


def hidden_images(root: Path) -> list[tuple[Path, str]]:
    """Hidden images and hidden folders with images below `root`, which training leaves out, and what each one is."""
    passed: list[str] = []
    for _ in walk(root, passed):
        pass
    found = []
    for path in map(Path, passed):
        inside = [name for _, _, names in os.walk(path) for name in names]
        images = sum(name.lower().endswith(IMAGE_ENDINGS) for name in inside)
        if images:
            found.append((path, f"a folder of {images} images"))
        elif path.name.lower().endswith(IMAGE_ENDINGS) and not path.is_dir():
            found.append((path, "an image by its name"))
    return sorted(found)


def format_of(path: Path) -> str:
    """The format of an image by its header alone, whatever its ending; empty for other files."""
    if not os.path.isfile(path):  # a pipe might never end
        return ""
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=FORMATS) as image:
            return image.format or ""
    except DECODE_ERRORS:
        return ""


def image_error(path: Path) -> str | None:
    """The reason why the image cannot be decoded to RGB, in one line; None when it can."""
    found = _decodable(path)
    return found if isinstance(found, str) else None


def image_findings(path: Path) -> list[tuple[str, str]]:
    """Faults and oddities of an image: the kind of each finding, and the reason in one line."""
    data = _decodable(path)
    if isinstance(data, str):
        return [("truncated" if "truncated" in data.lower() else "broken", data)]
    with warnings.catch_warnings(action="ignore"), parse(data) as image:
        form, mode, (width, height), refused = image.format or "", image.mode, image.size, not_for_dali(image)
        turn, deep = PLAIN.orientation(image, data), has_16_bits(image)
        most = int(values_of(image, data).max()) if deep else 0
    ending = path.suffix.lower()
    findings = []
    if form in ("JPEG", "MPO") and (warning := _warning(data)):
        findings.append(("damaged", warning))
    if width * height > (Image.MAX_IMAGE_PIXELS or 0):
        findings.append(("huge", f"{width}x{height} pixels in {len(data)} bytes"))
    if ending not in ENDINGS.get(form, ()):
        findings.append(("mislabelled", f"the file is {form}"))
    if mode == "CMYK":
        findings.append(("CMYK", "four channels"))
    if turn != 1:
        findings.append(
            ("EXIF rotation", f"orientation {turn}: training turns it upright, other programs may not")
        )
    if deep:
        findings.append(("16-bit", f"the largest value is {most}; training scales all such images alike"))
    if _is_transparent(data):
        findings.append(("alpha", "training drops transparency, and shows the colours behind it"))
    if ending == ".gif":
        findings.append(("GIF", "training passes over files with this ending"))
    elif refused:
        findings.append(("not for dali", f"DALI cannot decode {refused}, --dataset imagenet can"))
    return findings


def _is_transparent(data: bytes) -> bool:
    """Whether a pixel of an image that decodes is not opaque."""
    with warnings.catch_warnings(action="ignore"), parse(data) as image:
        if not image.has_transparency_data:
            return False
        if image.mode.startswith("I;16"):  # one grey is transparent
            return bool((values_of(image, data) == image.info["transparency"]).any())
        alpha = image if "A" in image.getbands() else image.convert("RGBA")
        return alpha.getchannel("A").getextrema() != (255, 255)


def _decodable(path: Path) -> bytes | str:
    """The bytes of the file, if training can decode the image; else the reason why not, in one line."""
    try:
        data = read(path)
        with warnings.catch_warnings(action="ignore"):  # odd metadata of an image that decodes
            decode(data)
    except DECODE_ERRORS as error:
        return reason_of(error)
    return data


def _warning(data: bytes) -> str:
    """The JPEG decoder's warning, which Pillow hides: data ends early or is invalid; empty without one."""
    os.environ["VIPS_CONCURRENCY"] = "1"  # threads; there is a process per core already
    import pyvips

    pyvips.cache_set_max(0)
    try:
        pyvips.Image.new_from_buffer(data, "", fail_on="warning", access="sequential").avg()
    except pyvips.Error as error:
        return " ".join(error.detail.split()).removeprefix("VipsJpeg: ")
    return ""
