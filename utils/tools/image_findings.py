"""What is wrong or odd about image files: the looks of `tools.py --keyword verify-image` and `verify-data`."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from utils.data.image_file import DECODE_ERRORS, FORMATS, decode, not_for_dali, parse, read, reason_of, walk

# Pillow's names of formats, and the endings that say so; MPO is a JPEG with more pictures behind the first.
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


def format_of(path: Path) -> str:
    """The format of an image, whatever its ending, by its header alone; empty for what is no image."""
    if not os.path.isfile(path):  # a pipe might never end
        return ""
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=FORMATS) as image:
            return image.format or ""
    except DECODE_ERRORS:
        return ""


def image_error(path: Path) -> str | None:
    """Why the image cannot be decoded to RGB, in one line; None when it can."""
    found = _decodable(path)
    return found if isinstance(found, str) else None


def image_findings(path: Path) -> list[tuple[str, str]]:
    """What is wrong or odd about an image: the kind of each finding, and the reason in one line."""
    data = _decodable(path)
    if isinstance(data, str):
        return [("truncated" if "truncated" in data.lower() else "broken", data)]
    with warnings.catch_warnings(action="ignore"), parse(data) as image:
        form, mode, (width, height), refused = image.format or "", image.mode, image.size, not_for_dali(image)
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
    if mode in ("1", "L", "LA", "La") or mode.startswith("I;"):
        findings.append(("single-channel", f"the mode is {mode}"))
    if ending == ".gif":
        findings.append(("GIF", "training passes over files with this ending"))
    elif refused:
        findings.append(("not for dali", f"DALI cannot decode {refused}, --dataset imagenet can"))
    return findings


def _decodable(path: Path) -> bytes | str:
    """The image's file, if training can decode it; else the reason why not, in one line."""
    try:
        data = read(path)
        with warnings.catch_warnings(action="ignore"):  # odd metadata of an image that decodes
            decode(data)
    except DECODE_ERRORS as error:
        return reason_of(error)
    return data


def _warning(data: bytes) -> str:
    """What the JPEG decoder warns of, which Pillow does not pass on: data that ends early, or that means nothing."""
    os.environ["VIPS_CONCURRENCY"] = "1"  # threads; the processes are as many as the cores
    import pyvips

    pyvips.cache_set_max(0)
    try:
        pyvips.Image.new_from_buffer(data, "", fail_on="warning", access="sequential").avg()
    except pyvips.Error as error:
        return " ".join(error.detail.split()).removeprefix("VipsJpeg: ")
    return ""
