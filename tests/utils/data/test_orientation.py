"""EXIF's orientation: every data set of image files turns them upright, file by file."""

from __future__ import annotations

import io
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from tests.utils.data.helpers import pixels, read, validation
from utils.config.schema import DataConfig
from utils.data.image_file import Decoding, decode
from utils.data.orientation import TURNS
from utils.data.sources import open_data

# How a picture is stored so that an orientation turns it upright, by the pictures of CIPA DC-008, section 4.6.5.
STORED = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.transpose(1, 0, 2),
    6: lambda upright: np.rot90(upright),
    7: lambda upright: upright[::-1, ::-1].transpose(1, 0, 2),
    8: lambda upright: np.rot90(upright, -1),
}
WRITTEN = {
    "jpg": {"quality": 95, "subsampling": 0},
    "png": {},
    "webp": {"lossless": True},
    "tiff": {},
}


def upright() -> np.ndarray:
    """A picture that no turn leaves as it is."""
    blocks = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(blocks).resize((60, 40), Image.Resampling.BILINEAR))


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def folder(root: Path, images: dict[str, tuple[np.ndarray, int | None]], ending: str) -> Path:
    for split in ("train", "val"):
        (root / split / "one").mkdir(parents=True)
        for name, (array, orientation) in images.items():
            more = {} if orientation is None else {"exif": exif(orientation)}
            path = root / split / "one" / f"{name}.{ending}"
            Image.fromarray(array.copy()).save(path, **WRITTEN[ending], **more)
    return root


def batches(root: Path, dataset: str, *, ignore: bool = False) -> list[np.ndarray]:
    """The only batch of training and of validation, float64 [N, 3, S, S] in [0, 255]."""
    loaders = open_data(
        DataConfig(
            dataset=dataset,
            root=root,
            num_classes=1,
            input_size=28,
            batch_size=8,
            workers=0,
            ignore_orientation=ignore,
        )
    )
    [(train, _)], [(val, _)] = read(loaders.train, epoch=1), read(validation(loaders))
    return [pixels(images, loaders) for images in (train, val)]


@pytest.mark.parametrize("ending", WRITTEN)
def test_every_orientation_is_turned_upright(tmp_path: Path, ending: str) -> None:
    """Crops and flips are those of the upright image; as it is stored with --ignore_orientation, but for TIFF."""
    turned = {str(value): (store(upright()), value) for value, store in STORED.items()}
    expected = {str(value): (upright(), None) for value in STORED}
    as_stored = {name: (array, None) for name, (array, _) in turned.items()}
    roots = [
        folder(tmp_path / name, images, ending)
        for name, images in (("turned", turned), ("expected", expected), ("stored", as_stored))
    ]
    found, right, stored = (batches(root, "imagenet") for root in roots)
    tolerance = 8 if ending == "jpg" else 1.01  # of 255: other blocks of a JPEG; resizing rounds
    for one, two in zip(found, right, strict=True):
        np.testing.assert_allclose(one, two, atol=tolerance)
    for one, two in zip(
        batches(roots[0], "imagenet", ignore=True), found if ending == "tiff" else stored, strict=True
    ):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("ending", WRITTEN)
def test_dali_reads_file_by_file_what_pillow_reads(tmp_path: Path, installed: None, ending: str) -> None:
    images = {str(value): (store(upright()), value) for value, store in STORED.items()}
    root = folder(tmp_path, images, ending)
    for ignore in (False, True):
        pairs = zip(*(batches(root, dataset, ignore=ignore) for dataset in ("imagenet", "dali")), strict=True)
        for usual, fast in pairs:
            for one, two in zip(usual, fast, strict=True):
                np.testing.assert_allclose(one, two, atol=8 if ending == "jpg" else 1e-3)


@pytest.mark.parametrize("value", [0, 9, 300, None])
def test_an_orientation_that_is_none_changes_nothing(value: int | None) -> None:
    buffer = io.BytesIO()
    tags = exif(value) if value is not None else Image.Exif()
    Image.fromarray(upright()).save(buffer, "PNG", exif=tags)
    np.testing.assert_array_equal(np.asarray(decode(buffer.getvalue())), upright())


def png(kind: str) -> bytes:
    """A PNG whose orientation is 6."""
    chunks, payload = PngImagePlugin.PngInfo(), exif(6).tobytes()
    if kind == "profile":
        chunks.add_text("Raw profile type exif", f"\nexif\n{len(payload):8}\n{payload.hex()}\n", zip=True)
    elif kind == "xmp":
        chunks.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="6"/>')
    buffer = io.BytesIO()
    Image.fromarray(STORED[6](upright()).copy()).save(buffer, "PNG", pnginfo=chunks)
    data = buffer.getvalue()
    if not kind.endswith("pixels"):
        return data
    chunk = b"eXIf" + payload.removeprefix(b"Exif\0\0")
    whole = (len(chunk) - 4).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    place = data.index(b"IDAT" if kind == "before the pixels" else b"IEND") - 4
    return data[:place] + whole + data[place:]


@pytest.mark.parametrize("kind", ["before the pixels", "behind the pixels", "profile", "xmp"])
def test_a_png_may_have_its_orientation_in_several_places(kind: str) -> None:
    np.testing.assert_array_equal(np.asarray(decode(png(kind))), upright())
    stored = decode(png(kind), Decoding(ignore_orientation=True))
    np.testing.assert_array_equal(np.asarray(stored), STORED[6](upright()))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")
def test_damaged_metadata_leave_the_image() -> None:
    cut = b"Exif\0\0MM\0*\0\0\0\x08\0\x05"  # of five entries there is none
    buffer = io.BytesIO()
    Image.fromarray(upright()).save(buffer, "WEBP", lossless=True, exif=cut)
    np.testing.assert_array_equal(np.asarray(decode(buffer.getvalue())), upright())


@pytest.mark.parametrize("value", TURNS)
def test_a_part_of_the_upright_image_is_found_in_the_stored_one(value: int) -> None:
    turn, array = TURNS[value], upright()
    stored = torch.from_numpy(STORED[value](array).copy())
    np.testing.assert_array_equal(turn.upright(stored), array)
    top, left, bottom, right = map(int, turn.stored((3, 5, 20, 50), 40, 60))
    assert ((top > bottom), (left > right)) == (
        (turn.across, turn.down) if turn.transpose else (turn.down, turn.across)
    )
    (top, bottom), (left, right) = sorted((top, bottom)), sorted((left, right))
    np.testing.assert_array_equal(turn.upright(stored[top:bottom, left:right]), array[3:20, 5:50])
