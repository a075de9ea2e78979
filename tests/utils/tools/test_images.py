"""The words of images: verify-image, verify-data, make-fake-imagenet."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import ROOT
from tests.utils.processes.jobs import job_is_gone, processes, started_by
from tests.utils.tools.commands import Call, run
from utils.data.fake import photograph
from utils.tools import image_findings

# --- verify-image ----------------------------------------------------------------------------


def images(folder: Path) -> None:
    """Nine good images of several formats and modes, and a file that is none."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(256, size=(20, 30, 3), dtype=np.uint8)
    names = ["RGB.jpg", "L.JPEG", "CMYK.jpg", "RGBA.png", "P.png", "1.png", "RGB.bmp", "RGB.webp", "L.tiff"]
    for number, name in enumerate(names):
        mode, ending = name.split(".")
        path = folder / f"class{number % 2}" / f"{number}.{ending}"
        path.parent.mkdir(exist_ok=True, parents=True)
        Image.fromarray(pixels).convert(mode).save(path)
    (folder / "README.txt").write_text("no image")


def test_good_images(tmp_path: Path) -> None:
    """All are decoded, also through a link to a folder: status 0."""
    images(tmp_path / "elsewhere")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path / "elsewhere")
    done = run("--keyword", "verify-image", "--root", tmp_path / "root")
    assert (done.returncode, done.stdout, done.stderr) == (0, "9 images, 0 bad\n", "")


def test_bad_images_are_listed(tmp_path: Path) -> None:
    """Cut short, of another kind, empty, a broken link: one line each, status 1."""
    images(tmp_path)
    whole = (tmp_path / "class0" / "0.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) * 9 // 10])
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere")
    png = bytearray((tmp_path / "class1" / "3.png").read_bytes())
    png[len(png) // 2] ^= 0xFF
    (tmp_path / "flipped.png").write_bytes(png)
    done = run("--keyword", "verify-image", "--root", tmp_path, "--workers", "2")
    assert (done.returncode, done.stderr) == (1, "")
    *lines, last = done.stdout.splitlines()
    assert last == "14 images, 5 bad"
    reasons = dict(line.split(": ", 1) for line in lines)
    assert list(reasons) == [
        str(tmp_path / n) for n in ("cut.jpg", "empty.jpg", "flipped.png", "gone.jpg", "text.png")
    ]
    assert "truncated" in reasons[str(tmp_path / "cut.jpg")]
    assert reasons[str(tmp_path / "gone.jpg")] == "No such file or directory"
    assert reasons[str(tmp_path / "text.png")] == "no image"


# --- verify-data -----------------------------------------------------------------------------


def test_findings_of_every_kind_are_listed(tmp_path: Path) -> None:
    """One line each, with their kind; an image may have several; status 1."""
    folder = tmp_path / "train" / "a"
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(256, size=(20, 30, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image.save(folder / "good.jpg")
    image.convert("P").save(folder / "good.png")
    image.convert("CMYK").save(folder / "four.jpg")
    image.convert("L").save(folder / "grey.jpg")
    image.convert("L").save(folder / "both.jpg", "PNG")
    image.save(folder / "png.JPEG", "PNG")
    whole = (folder / "good.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[:-30])
    (folder / "text.jpg").write_text("no image")
    (folder / os.fsdecode(b"\xff\n.jpg")).write_text("no image")
    image.save(folder / "picture.gif")
    Image.fromarray(pixels[..., 0].astype(np.float32)).save(folder / "float.tif")
    (folder / "photo.jfif").write_bytes(whole)
    (folder / "photo").write_bytes(whole)
    (folder / "README.txt").write_text("no image")
    os.mkfifo(folder / "pipe")
    (tmp_path / "val" / "b").mkdir(parents=True)
    image.save(tmp_path / "val" / "b" / "good.jpg")
    done = run("--keyword", "verify-data", "--root", tmp_path, "-j", "2")
    assert (done.returncode, done.stderr) == (1, "")
    *lines, last = done.stdout.splitlines()
    assert last == ("12 images: 4 mislabelled, 1 truncated, 3 broken, 1 CMYK, 1 GIF, 1 class folders")
    found = {tuple(line.removeprefix(f"{folder}/").split(": ", 2)[:2]) for line in lines[:-1]}
    assert found == {
        ("both.jpg", "mislabelled"), ("cut.jpg", "truncated"), ("four.jpg", "CMYK"),
        ("png.JPEG", "mislabelled"), ("text.jpg", "broken"),
        ("picture.gif", "GIF"), ("float.tif", "broken"), (r"\udcff\n.jpg", "broken"),
        ("photo.jfif", "mislabelled"), ("photo", "mislabelled"),
    }  # fmt: skip
    assert len(lines[:-1]) == len(found)
    assert lines[-1].startswith(
        f"{tmp_path}: class folders: train/ and val/ in {tmp_path} have different classes"
    )


def test_the_folder_that_is_made_is_good_and_the_same_every_time(call: Call, tmp_path: Path) -> None:
    """Also other tools find nothing in it; a folder that is there is not touched."""
    for name in ("one", "two"):
        status, out, err = call(
            "--keyword", "make-fake-imagenet", "--root", tmp_path / name, "--num_classes", "3",
            "--fake_size", "12", "--image-size", "50x37",
        )  # fmt: skip
        assert (status, out) == (0, f"{tmp_path / name}: 15 images of 3 classes, 50x37 pixels\n"), err
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.jpg"))
    assert [str(path.parent) for path in files] == [
        *["train/class0"] * 4, *["train/class1"] * 4, *["train/class2"] * 4, *(f"val/class{i}" for i in range(3)),
    ]  # fmt: skip
    contents = [(tmp_path / "one" / path).read_bytes() for path in files]
    assert contents == [(tmp_path / "two" / path).read_bytes() for path in files]
    assert len(set(contents)) == 15
    with Image.open(tmp_path / "one" / files[0]) as image:
        assert (image.size, image.mode, image.format) == ((50, 37), "RGB", "JPEG")
    status, out, _ = call("--keyword", "verify-data", "--root", tmp_path / "one", "--workers", "1")
    assert (status, out) == (0, "15 images: nothing found\n")
    base = ("--keyword", "make-fake-imagenet", "--root")
    for more, text in (
        ((tmp_path / "one",), f"{tmp_path / 'one' / 'train'} exists; name another --root"),
        ((tmp_path / "x", "--image_size", "50"), "'50' is not WIDTHxHEIGHT, like 500x375"),
        ((tmp_path / "x", "--image_size", "0x5"), "'0' is not a number of 1 or more"),
        ((tmp_path / "x", "--fake_size", "3"), "--fake_size 3: 10 classes need at least 10 training images"),
    ):
        status, out, err = call(*base, *more)
        assert (status, out) == (2, "")
        assert text in err
    assert not (tmp_path / "x").exists()


def test_a_thousand_images(tmp_path: Path) -> None:
    """All are counted, a few bad ones among them are found."""
    pixels = np.random.default_rng(0).integers(256, size=(9, 8, 3), dtype=np.uint8)
    whole = tmp_path / "0000.jpg"
    Image.fromarray(pixels).save(whole)
    bad = {77, 500, 999}
    for number in range(1, 1000):
        path = tmp_path / f"{number:04}.jpg"
        path.write_bytes(b"no image" if number in bad else whole.read_bytes())
    done = run("--keyword", "verify-data", "--root", tmp_path, "-j", "2")
    assert (done.returncode, done.stderr) == (1, "")
    lines = [f"{tmp_path / f'{number:04}.jpg'}: broken: no image" for number in sorted(bad)]
    assert done.stdout.splitlines() == [*lines, "1000 images: 3 broken"]


def test_images_beside_the_class_folders_are_listed(tmp_path: Path) -> None:
    for part in ("train", "val"):
        (tmp_path / part / "a" / "deeper").mkdir(parents=True)
        for path in ("a/0.png", "a/deeper/1.png", "2.png"):
            Image.new("RGB", (8, 8)).save(tmp_path / part / path)
    done = run("--keyword", "verify-data", "--root", f"{tmp_path}/", "-j", "1")
    says = "without class: training passes over images beside the class folders"
    assert (done.returncode, done.stderr) == (1, "")
    lines = [f"{tmp_path / part / '2.png'}: {says}" for part in ("train", "val")]
    assert done.stdout.splitlines() == [*lines, "6 images: 2 without class"]


def test_what_changes_what_is_learned_is_listed(tmp_path: Path) -> None:
    """Grey images and opaque alpha are no finding; turned, transparent and 16-bit images are. The summary is last."""
    image = Image.linear_gradient("L").resize((12, 8))
    turned = Image.Exif()
    for value in (1, 6):
        turned[0x0112] = value
        image.save(tmp_path / f"turned {value}.jpg", exif=turned)
    clear, low = Image.merge("RGBA", [image] * 4), int(np.asarray(image)[0, 0])
    palette = image.convert("P")
    palette.save(tmp_path / "palette.png", transparency=int(np.asarray(palette)[0, 0]))
    clear.save(tmp_path / "clear.png")
    clear.save(tmp_path / "clear.webp")
    clear.convert("LA").save(tmp_path / "clear grey.png")
    image.convert("RGB").save(tmp_path / "clear colour.png", transparency=(low, low, low))
    clear.convert("RGB").convert("RGBA").save(tmp_path / "opaque.png")
    image.save(tmp_path / "grey.png")
    image.convert("1").save(tmp_path / "bits.png")
    twelve = Image.fromarray(np.asarray(image).astype(np.uint16) * 16 + 15)
    for name, more in (
        ("twelve.png", {}),
        ("twelve.tif", {}),
        ("twelve clear.png", {"transparency": low * 16 + 15}),
    ):
        twelve.save(tmp_path / name, **more)
    done = run("--keyword", "verify-data", "--root", tmp_path, "-j", "1")
    assert (done.returncode, done.stderr) == (0, "")
    *lines, last = (line.removeprefix(f"{tmp_path}/") for line in done.stdout.splitlines())
    most = int(np.asarray(twelve).max())
    alpha = "alpha: training drops transparency, and shows the colours behind it"
    deep = f"16-bit: the largest value is {most}; training scales all such images alike"
    assert lines == [
        f"clear colour.png: {alpha}", f"clear grey.png: {alpha}", f"clear.png: {alpha}", f"clear.webp: {alpha}",
        f"palette.png: {alpha}",
        "turned 6.jpg: EXIF rotation: orientation 6: training turns it upright, other programs may not",
        f"twelve clear.png: {deep}", f"twelve clear.png: {alpha}", f"twelve.png: {deep}", f"twelve.tif: {deep}",
    ]  # fmt: skip
    assert last == "13 images: 6 alpha, 1 EXIF rotation, 3 16-bit"
    for name in lines:
        (tmp_path / name.split(": ")[0]).unlink(missing_ok=True)
    done = run("--keyword", "verify-data", "--root", tmp_path, "-j", "1")
    assert (done.returncode, done.stdout) == (0, "4 images: nothing found\n")


def test_hidden_images_are_listed(tmp_path: Path) -> None:
    """Training leaves them out; hidden folders without images are nobody's concern."""
    hidden = ("train/.Trash/0.png", "train/a/._0.jpg", "val/@eaDir/a/0.png", "val/@eaDir/a/1.png")
    for name in ("train/a/0.png", "val/a/0.png", ".git/index", "val/a/.DS_Store", *hidden):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name, "PNG")
    done = run("--keyword", "verify-data", "--root", tmp_path, "-j", "1")
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.removeprefix(f"{tmp_path}/") for line in done.stdout.splitlines()] == [
        "train/.Trash: hidden: a folder of 1 images, left out of training",
        "train/a/._0.jpg: hidden: an image by its name, left out of training",
        "val/@eaDir: hidden: a folder of 2 images, left out of training",
        "2 images: 3 hidden",
    ]
    assert run("--keyword", "verify-image", "--root", tmp_path).stdout == "2 images, 0 bad\n"


def test_a_missing_half_of_a_data_set_is_listed(tmp_path: Path) -> None:
    """Validation images are needed by a training; an evaluation needs nothing else."""
    (tmp_path / "train" / "a").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "train" / "a" / "0.png")
    done = run("--keyword", "verify-data", "--root", tmp_path, "-j", "1")
    assert (done.returncode, done.stderr) == (1, "")
    line, last = done.stdout.splitlines()
    assert line.startswith(f"{tmp_path}: class folders: {tmp_path / 'val'} is missing")
    assert last == "1 images: 1 class folders"
    (tmp_path / "train").rename(tmp_path / "val")
    done = run("--keyword", "verify-data", "--root", tmp_path, "-j", "1")
    assert (done.returncode, done.stdout, done.stderr) == (0, "1 images: nothing found\n", "")


def test_damage_that_pillow_passes_over_is_listed(tmp_path: Path) -> None:
    """In files of the size of photographs; what means another picture is no damage to a decoder."""
    photograph(0, 0, 1, 500, 375).save(tmp_path / "good.jpg", quality=95)
    photograph(0, 0, 1, 500, 375).save(tmp_path / "steps.jpg", quality=95, progressive=True)
    good, steps = ((tmp_path / name).read_bytes() for name in ("good.jpg", "steps.jpg"))
    size = good.index(b"\xff\xc0") + 5  # of two bytes each: rows and columns
    middle = len(good) // 2
    files = {
        "half.jpg": good[:middle] + b"\xff\xd9",
        "half steps.jpg": steps[: len(steps) // 2] + b"\xff\xd9",
        "marker.jpg": good[:middle] + b"\xff\xd3" + good[middle + 2 :],
        "rows.jpg": good[:size] + (475).to_bytes(2, "big") + good[size + 2 :],
        "huge.jpg": good[:size] + (12000).to_bytes(2, "big") * 2 + good[size + 4 : 1500] + b"\xff\xd9",
        "more.jpg": good + b"more",
        "zeros.jpg": good[:middle] + bytes(500) + good[middle + 500 :],
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        assert image_findings.image_error(tmp_path / name) is None
    done = run("--keyword", "verify-data", "--root", tmp_path, "-j", "2")
    assert (done.returncode, done.stderr) == (1, "")
    found = [line.removeprefix(f"{tmp_path}/") for line in done.stdout.splitlines()]
    short = "damaged: Corrupt JPEG data: premature end of data segment"
    names = ("half steps.jpg", "half.jpg", "huge.jpg", "marker.jpg", "rows.jpg")
    listed = [*(f"{name}: {short}" for name in names), "huge.jpg: huge: 12000x12000 pixels in 1502 bytes"]
    assert found == [*sorted(listed), "9 images: 5 damaged, 1 huge"]


def test_what_dali_decodes_otherwise_is_listed(tmp_path: Path) -> None:
    grey = Image.linear_gradient("L")
    grey.convert("RGB").save(tmp_path / "gif.jpg", "GIF")
    grey.convert("LA").save(tmp_path / "LA.tiff")
    Image.new("LAB", (8, 8)).save(tmp_path / "LAB.tiff")
    (tmp_path / "levels.pgm").write_bytes(b"P5 2 2 100\n1234")
    (tmp_path / "good.ppm").write_bytes(b"P6 1 1 255\n123")
    found = {path.name: image_findings.image_findings(path) for path in tmp_path.iterdir()}
    assert {name for name, kinds in found.items() if "not for dali" in dict(kinds)} == {
        "gif.jpg", "LA.tiff", "LAB.tiff", "levels.pgm",
    }  # fmt: skip


def test_verify_data_needs_pyvips(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyvips", None)
    status, out, err = call("--keyword", "verify-data", "--root", tmp_path)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "verify-data needs pyvips" in err and "pip install pyvips pyvips-binary" in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_it_with_a_line_and_all_its_processes(tmp_path: Path, number: signal.Signals) -> None:
    """As a terminal sends them, to every process, several times."""
    Image.effect_noise((1500, 1000), 50).convert("RGB").save(tmp_path / "0.jpg")
    for name in range(1, 5000):  # a minute or two of decoding
        (tmp_path / f"{name}.jpg").symlink_to("0.jpg")
    process = subprocess.Popen(
        [sys.executable, "tools.py", "--keyword", "verify-data", "--root", tmp_path, "-j", "2"],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while len(started_by(process.pid)) < 5:  # itself, two that decode, what these are forked from, a tracker
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    everyone = started_by(process.pid)
    for _ in range(3):
        for pid in everyone & processes().keys():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (128 + number, "", f"tools.py: ended by {number.name}\n")
    job_is_gone(everyone)


@pytest.mark.parametrize(
    ("root", "text"),
    [("nowhere", "no such folder"), ("file.png", "no such folder"), ("empty", "no image below")],
)
def test_a_root_without_images(call: Call, tmp_path: Path, root: str, text: str) -> None:
    """Status 2."""
    (tmp_path / "file.png").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.txt").touch()
    status, out, err = call("--keyword", "verify-image", "--root", tmp_path / root)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert text in err


def test_a_link_that_leads_back_up(tmp_path: Path) -> None:
    """Every image once, and an end."""
    images(tmp_path)
    (tmp_path / "class0" / "loop").symlink_to(tmp_path)
    (tmp_path / "again").symlink_to(tmp_path / "class1")
    found = list(image_findings.image_files(tmp_path))
    assert len(found) == len({os.path.realpath(path) for path in found}) == 9


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "tiff", "gif", "bmp", "ppm"])
def test_damaged_images_never_escape(tmp_path: Path, ending: str) -> None:
    """Changed bytes anywhere give an image or a reason of one line."""
    rng = np.random.default_rng(0)
    path = tmp_path / f"a.{ending}"
    Image.fromarray(rng.integers(256, size=(16, 16, 3), dtype=np.uint8)).save(path)
    assert image_findings.image_error(path) is None
    whole = np.frombuffer(path.read_bytes(), dtype=np.uint8)
    for _ in range(100):
        changed = whole.copy()
        changed[rng.integers(min(len(whole), 200), size=4)] = rng.integers(256, size=4, dtype=np.uint8)
        path.write_bytes(changed[: rng.integers(len(whole) + 1)].tobytes())
        reason = image_findings.image_error(path)
        assert reason is None or (reason and "\n" not in reason)
