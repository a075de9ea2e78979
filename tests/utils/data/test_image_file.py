"""Finding image files below a folder, and decoding one."""

from __future__ import annotations

import io
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from utils.data.image_file import DECODE_ERRORS, Decoding, decode, largest_value, read, reason_of, walk
from utils.errors import UserError
from utils.text import printable

RAMP = np.linspace(0, 65535, 96).astype(np.uint16).reshape(8, 12)


def written(image: Image.Image, form: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_sixteen_bits_become_their_upper_eight(form: str) -> None:
    pixels = np.asarray(decode(written(Image.fromarray(RAMP), form)))
    np.testing.assert_array_equal(pixels, np.repeat(RAMP[..., None] // 256, 3, axis=2))


@pytest.mark.parametrize("most", [1, 1023, 4095, 4000, 65534])
def test_sixteen_bits_are_scaled_so_that_the_largest_value_is_white(most: int) -> None:
    """10 and 12 bits would leave 4 and 16 greys; what lies above the largest value is white too."""
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    pixels = np.asarray(decode(written(Image.fromarray(ramp), "PNG"), Decoding(max_value=most)))
    expected = np.minimum(np.floor(ramp.astype(np.float64) * 255 / most + 0.5), 255)
    np.testing.assert_array_equal(pixels, np.repeat(expected[..., None], 3, axis=2))


@pytest.mark.parametrize("bands", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("ending", "how"),
    [
        (".png", {}), (".png", {"interlace": True}), (".tif", {}), (".tif", {"compression": "deflate"}),
        (".tif", {"compression": "lzw", "predictor": "horizontal"}),
    ],
)  # fmt: skip
def test_colours_of_sixteen_bits_are_read_whole(bands: int, ending: str, how: dict[str, object]) -> None:
    """Also beside an alpha channel, which is dropped; Pillow by itself reads the upper byte only."""
    pyvips = pytest.importorskip("pyvips")
    array = np.random.default_rng(0).integers(0, 4096, (6, 9, bands)).astype(np.uint16)
    array[0, 0] = 4095
    image = pyvips.Image.new_from_array(array)
    data = image.copy(interpretation="rgb16" if bands > 2 else "grey16").write_to_buffer(ending, **how)
    if bands == 2 and ending == ".tif":
        with pytest.raises(DECODE_ERRORS, match="cannot identify image file"):
            decode(data)
        return
    colours = array[..., : 3 if bands > 2 else 1].astype(np.float64)
    expected = np.broadcast_to(np.floor(colours * 255 / 4095 + 0.5), (6, 9, 3))
    pixels = np.asarray(decode(data, Decoding(max_value=4095)))
    np.testing.assert_array_equal(pixels, expected)
    np.testing.assert_array_equal(np.asarray(decode(data))[0, 0], 3 * [4095 >> 8])


def test_the_largest_value_is_that_of_sixteen_bits_alone(tmp_path: Path) -> None:
    Image.fromarray(RAMP // 16).save(tmp_path / "12 bits.png")
    Image.fromarray((RAMP // 256).astype(np.uint8)).save(tmp_path / "8 bits.png")
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "cut.png").write_bytes((tmp_path / "12 bits.png").read_bytes()[:-30])
    os.mkfifo(tmp_path / "pipe.png")
    found = {path.stem: largest_value(str(path)) for path in tmp_path.iterdir()}
    assert found == {"12 bits": 4095, "8 bits": None, "text": None, "cut": None, "pipe": None}


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixels_of_32_bits_are_refused(dtype: type) -> None:
    with pytest.raises(DECODE_ERRORS, match=r"pixels of 32 bits, mode [IF]: convert them to 8 or 16 bits"):
        decode(written(Image.fromarray(RAMP.astype(dtype)), "TIFF"))


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "1"])
def test_other_modes_become_rgb(mode: str) -> None:
    image = Image.fromarray((RAMP // 256).astype(np.uint8)).convert(mode)
    decoded = decode(written(image, "PNG"))
    assert decoded.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(decoded), np.asarray(image.convert("RGB")))


@pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::RuntimeWarning"
)  # Pillow's, of odd metadata and sizes
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "PPM", "GIF"])
def test_damage_is_one_of_the_known_errors(form: str) -> None:
    """Cut short and with bytes changed, in the header above all."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 11, 3), dtype=np.uint8))
    whole = written(image.convert("P") if form == "GIF" else image, form)
    words = np.random.default_rng(1)
    bad = 0
    for _ in range(200):
        data = np.frombuffer(whole, np.uint8).copy()
        places = words.integers(0, len(data) if words.random() < 0.3 else 60, words.choice([1, 4]))
        data[places] = words.integers(0, 256, len(places))
        try:
            decode(data[: words.integers(1, len(data))].tobytes() if words.random() < 0.3 else data.tobytes())
        except DECODE_ERRORS as error:
            bad += 1
            assert reason_of(error)
            assert "\n" not in reason_of(error)
    assert bad > 20


def test_reasons_are_short() -> None:
    with pytest.raises(DECODE_ERRORS) as caught:
        decode(b"")
    assert reason_of(caught.value) == "no image"
    assert reason_of(FileNotFoundError(2, "No such file", "x.jpg")) == "No such file"
    assert reason_of(ValueError("two\n  lines:")) == "two lines"
    assert reason_of(EOFError()) == "EOFError"


@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
def test_what_might_never_end_is_not_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.jpg"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as unix:
            unix.bind(os.path.relpath(path))  # such a name has a hundred bytes at the most
    else:
        path.symlink_to("/dev/zero")
    code = (
        "import sys; from utils.data.image_file import read, reason_of\n"
        "try: read(sys.argv[1])\nexcept OSError as error: print(reason_of(error))"
    )
    done = subprocess.run(  # it is ended should it wait after all
        [sys.executable, "-c", code, path], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout, done.stderr) == ("not a regular file\n", "")


def test_a_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(b"12")
    (tmp_path / "y.jpg").symlink_to("x.jpg")
    assert read(tmp_path / "x.jpg") == read(str(tmp_path / "y.jpg")) == b"12"


def test_odd_metadata_is_passed_over_without_a_word(tmp_path: Path) -> None:
    """Warnings would come from every process that decodes, into the bar, and name no file."""
    path = tmp_path / "x.jpg"
    cut = b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01\x03\0\x01\0\0\0\x01\0\0\0"  # one entry where there should be five
    Image.new("RGB", (8, 8)).save(path, exif=cut)
    code = "import sys; from utils.data.image_file import decode, read; print(decode(read(sys.argv[1])).size)"
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("(8, 8)\n", "")


def test_postscript_is_no_image() -> None:
    """Pillow would start Ghostscript for it."""
    with pytest.raises(DECODE_ERRORS) as caught:
        decode(written(Image.new("RGB", (8, 8)), "EPS"))
    assert reason_of(caught.value) == "no image"


def test_more_pictures_in_a_file() -> None:
    image = Image.new("RGB", (8, 8), (9, 9, 9))
    buffer = io.BytesIO()
    image.save(buffer, "MPO", save_all=True, append_images=[image])
    assert decode(buffer.getvalue()).size == (8, 8)


def test_names_are_printed_in_one_line() -> None:
    assert printable("a b/ä \u3000日.jpg") == "a b/ä \u3000日.jpg"
    assert printable("a\n\x1b[2J\x7f\u2028b") == r"a\n\x1b[2J\x7f\u2028b"
    assert printable(os.fsdecode(b"\xff.jpg")) == r"\udcff.jpg"


def test_every_folder_is_visited_once(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    for folder in (root / "b", root / "a" / "deep", elsewhere):
        folder.mkdir(parents=True)
        for name in ("2.jpg", "1.jpg"):
            (folder / name).touch()
    (root / "a" / "up").symlink_to(root)
    (root / "linked").symlink_to(elsewhere)
    (root / "linked again").symlink_to(elsewhere)
    (root / "self").symlink_to(root / "self")
    found = dict(walk(root))
    assert {str(Path(path).relative_to(root)): names for path, names in found.items()} == {
        ".": ["self"], "a": [], "a/deep": ["1.jpg", "2.jpg"], "b": ["1.jpg", "2.jpg"], "linked": ["1.jpg", "2.jpg"],
    }  # fmt: skip


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list every folder")
def test_a_folder_that_cannot_be_listed(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0)
    with pytest.raises(UserError, match=r"closed: cannot be listed \(Permission denied\)"):
        list(walk(tmp_path))


def test_a_folder_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none: cannot be listed \(No such file or directory\)"):
        list(walk(tmp_path / "none"))


def test_torch_is_not_imported() -> None:
    """`tools.py` starts a process per core that decodes."""
    code = "import sys, utils.data.image_file; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
