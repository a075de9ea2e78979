"""Writing shards: what is in them, and an interrupted writing."""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import tools
from tests.utils.data.helpers import write_folder
from tests.utils.data.shards.helpers import make, pairs, picture
from utils.data.image_file import decode
from utils.data.shards import write
from utils.data.shards.images import open_shards
from utils.data.shards.index import UNFINISHED
from utils.data.shards.origin import open_origin
from utils.data.shards.write import Reduction, reduced
from utils.data.split import split_folder
from utils.errors import UserError


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    write_folder(tmp_path / "photos", train=6, val=3)
    return tmp_path / "photos"


def content(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.iterdir())
    }


def test_shards_hold_the_files_as_they_are(photos: Path, tmp_path: Path) -> None:
    manifest = make(photos, tmp_path / "shards")
    assert {part: [s.samples for s in shards] for part, shards in manifest.parts.items()} == {
        "train": [7, 7, 4], "val": [7, 2],
    }  # fmt: skip
    found, source = open_shards(tmp_path / "shards"), open_origin(photos)
    for part, images in found.items():
        assert images.classes == ("ant", "bee", "cat")
        assert pairs(images) == pairs(source[part])
    val = source["val"]
    assert [found["val"].key(i) for i in range(9)] == [val.key(i) for i in range(9)]
    labels = found["train"].target[:7].tolist()
    assert labels != sorted(labels)  # mixed, for readers that shuffle little
    for shard in (shard for shards in manifest.parts.values() for shard in shards):
        assert hashlib.sha256((tmp_path / "shards" / shard.file).read_bytes()).hexdigest() == shard.sha256
    assert len(found["train"]._entries.tobytes()) + found["train"].target.nbytes < 100 * 18


def test_the_same_call_writes_the_same_bytes_and_shards_of_shards_keep_the_images(
    photos: Path, tmp_path: Path
) -> None:
    make(photos, tmp_path / "one")
    make(photos, tmp_path / "two")
    assert content(tmp_path / "one") == content(tmp_path / "two")
    make(tmp_path / "one", tmp_path / "three", per_shard=100)
    for part, images in open_shards(tmp_path / "three").items():
        assert pairs(images) == pairs(open_shards(tmp_path / "one")[part])


@pytest.mark.parametrize("images", [3, 9, 20])
def test_an_interrupted_writing_goes_on(
    images: int, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "shards"
    make(photos, whole)

    done = []

    def interrupt(number: int) -> None:
        done.append(number)
        if len(done) == images:
            raise KeyboardInterrupt

    arguments = {"per_shard": 7, "reduction": None, "threads": 2, "force": False}
    with pytest.raises(KeyboardInterrupt):
        write.write_set(open_origin(photos), folder, **arguments, progress=interrupt)  # type: ignore[arg-type]
    if images < 7:  # nothing is left of a set without a single shard
        assert not folder.exists()
    else:
        with pytest.raises(UserError, match=r"is not finished: call make-shards again"):
            open_shards(folder)
        with pytest.raises(UserError, match="unfinished shards of other images or options; --force"):
            make(photos, folder, per_shard=6)
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.tar")}
    make(photos, folder)
    assert content(folder) == content(whole)
    assert all(
        (folder / name).stat().st_mtime_ns == time for name, time in before.items()
    )  # not written again


def test_folders_that_hold_something_are_kept(photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    make(photos, folder)
    before = content(folder)
    with pytest.raises(
        UserError, match=r"manifest.json exists: the shards are made; --force makes them again"
    ):
        make(photos, folder)
    assert content(folder) == before
    (folder / "mine.txt").write_text("mine")
    make(photos, folder, per_shard=100, force=True)
    assert set(content(folder)) == {
        "manifest.json", "mine.txt", "train-000000.tar", "train.index.npy", "val-000000.tar", "val.index.npy",
    }  # fmt: skip
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").write_text("mine")
    for target, reason in ((other, "is not empty"), (other / "mine.txt", "is no folder")):
        with pytest.raises(UserError, match=reason):
            make(photos, target)
    assert [path.name for path in other.iterdir()] == ["mine.txt"]


_KILLED = """
import os, signal, sys
from pathlib import Path
from utils.data.shards import write
from utils.data.shards.origin import open_origin

source, folder, images, moved = sys.argv[1:]
done = 0

def progress(number):
    global done
    done += number
    if done == int(images):
        os.kill(os.getpid(), signal.SIGKILL)

def replace(old, new, rename=os.replace):
    rename(old, new)
    if Path(new).parent == Path(folder) and Path(new).name == moved:
        os.kill(os.getpid(), signal.SIGKILL)

os.replace = replace
write.write_set(
    open_origin(source), Path(folder), per_shard=7, reduction=None, threads=2, force=True, progress=progress
)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("earlier", "images", "shards", "moved"),
    [
        (False, 9, 1, ""),
        (True, 3, 0, ""),
        (True, 20, 3, ""),
        (True, 0, 0, "train.index.npy"),
        (True, 0, 0, "manifest.json"),
    ],
)
def test_a_killed_writing_goes_on_and_leaves_an_earlier_set_as_it_was(
    earlier: bool, images: int, shards: int, moved: str, photos: Path, tmp_path: Path
) -> None:
    """Killed inside a shard, after so many whole ones, or while the new set takes the place of the earlier one."""
    folder, whole = tmp_path / "shards", tmp_path / "whole"
    if earlier:
        make(photos, folder, per_shard=100)
    before = content(folder) if earlier else {}
    make(photos, whole)
    killed = subprocess.run(
        [sys.executable, "-c", _KILLED, str(photos), str(folder), str(images), moved], check=False
    )
    assert killed.returncode == -signal.SIGKILL
    place = folder / ".unfinished" if earlier else folder
    if moved:
        assert (folder / moved).exists() and place.exists()
    else:
        assert len(list(place.glob(".*.tmp"))) == 1  # a half-written shard
        assert len(list(place.glob("*.tar"))) == shards
        assert before.items() <= content(folder).items()
        if earlier:
            with pytest.raises(UserError, match="the shards are made; --force"):
                make(photos, folder)
    make(photos, folder, force=True)
    assert content(folder) == content(whole)


def test_a_set_that_fails_leaves_an_earlier_set_as_it_was(photos: Path, tmp_path: Path) -> None:
    folder, image = tmp_path / "shards", photos / "val" / "bee" / "1.jpg"
    make(photos, folder)
    before, good = content(folder), image.read_bytes()
    image.write_bytes(b"no image")
    for per_shard in (100, 5, 5):
        with pytest.raises(UserError, match="cannot read the image"):
            make(photos, folder, per_shard=per_shard, force=True)
        assert content(folder) == before | {".unfinished": "folder"}
    image.write_bytes(good)
    make(photos, folder, per_shard=5, force=True)
    make(photos, tmp_path / "whole", per_shard=5)
    assert content(folder) == content(tmp_path / "whole")


def test_a_finished_set_with_its_mark_left_is_not_removed_first(photos: Path, tmp_path: Path) -> None:
    """As where a process was killed behind the manifest."""
    folder, image = tmp_path / "shards", photos / "val" / "bee" / "1.jpg"
    make(photos, folder)
    (folder / UNFINISHED).write_text("of another set")
    before = content(folder)
    image.write_bytes(b"no image")
    with pytest.raises(UserError, match="cannot read the image"):
        make(photos, folder, per_shard=5, force=True)
    assert before.items() <= content(folder).items()


def test_what_is_left_of_two_sets_is_no_set(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new set's folder is removed by hand after an end in the swap: its shards are not made of old ones."""
    folder, whole, other = tmp_path / "shards", tmp_path / "whole", tmp_path / "other"
    write_folder(other, train=6, val=3)
    make(photos, folder)
    with monkeypatch.context() as patch:
        patch.setattr(write, "_remove_set", lambda place: (place / "manifest.json").unlink() or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            make(other, folder, force=True)
    shutil.rmtree(folder / ".unfinished")
    assert (folder / "train-000000.tar").exists()
    with pytest.raises(UserError, match="unfinished shards of other images or options; --force"):
        make(other, folder)
    make(other, folder, force=True)
    make(other, whole)
    assert content(folder) == content(whole)


def test_one_process_writes_into_a_folder(photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    handle = os.open(folder, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        with pytest.raises(UserError, match=r"another process writes shards into .*shards: wait for it"):
            make(photos, folder, force=True)
    finally:
        os.close(handle)
    make(photos, folder)
    for other in ("file", "folder"):
        way = folder / ".unfinished"
        way.write_text("mine") if other == "file" else way.mkdir()
        if other == "folder":
            (way / "train-000000.tar").write_bytes(b"mine")
        with pytest.raises(UserError, match=r"\.unfinished is in the way of the new shards: move it away"):
            make(photos, folder, force=True)
        way.unlink() if other == "file" else shutil.rmtree(way)


def test_an_unreadable_image_leaves_no_part_of_a_shard(photos: Path, tmp_path: Path) -> None:
    (photos / "val" / "bee" / "1.jpg").write_bytes(b"no image")
    with pytest.raises(
        UserError, match=r"cannot read the image .*bee/1.jpg \(no image\): replace or remove it"
    ):
        make(photos, tmp_path / "shards")
    assert not list((tmp_path / "shards").glob(".*")) and not (tmp_path / "shards" / "manifest.json").exists()


def test_a_class_that_is_missing_in_a_part(photos: Path, tmp_path: Path) -> None:
    table = photos / "labels.csv"
    table.write_text(
        "path,label,split\ntrain/ant/0.jpg,a,train\ntrain/bee/0.jpg,b,train\nval/ant/0.jpg,a,val\n"
    )
    with pytest.raises(UserError, match="val has no image of b: every class needs one in each part"):
        make(table, tmp_path / "shards")
    assert not (tmp_path / "shards").exists()


def test_odd_names_and_kinds(tmp_path: Path) -> None:
    """Names that a tar file or a reader may not take are changed, and stay apart; all kinds of images are kept."""
    folder = tmp_path / "photos" / "train" / "schöne Blumen"
    folder.mkdir(parents=True)
    for name in ("a.b.jpg", "a.c.jpg", "ü.jpg", f"{'x' * 200}.jpg", f"{'x' * 201}.jpg"):
        (folder / name).write_bytes(picture(len(name)))
    (folder / "g.jpg").write_bytes(picture(7, form="GIF"))
    (folder / "p.jpg").write_bytes(picture(8, form="PNG"))
    make(tmp_path / "photos", tmp_path / "shards")
    images = open_shards(tmp_path / "shards")["train"]
    assert images.classes == ("schöne Blumen",)
    keys = [images.key(i) for i in range(len(images))]
    assert len(set(keys)) == 7 and all(len(key) < 90 and key.isascii() for key in keys)
    assert sorted(images.kind(i) for i in range(7)) == ["jpg"] * 5 + ["png"] * 2
    assert {decode(images.read(i)).tobytes() for i in range(7)} == {
        decode(path.read_bytes()).tobytes() for path in folder.iterdir()
    }


def test_large_images_are_reduced() -> None:
    to = Reduction(max_side=100, quality=95)
    small = picture(0, (100, 15))
    assert reduced(small, to) == small
    for mode, size in (("RGB", (400, 200)), ("L", (200, 400)), ("CMYK", (300, 300))):
        data = picture(1, size, mode=mode)
        with Image.open(io.BytesIO(reduced(data, to))) as image:
            assert (image.format, max(image.size), image.mode) == ("JPEG", 100, "L" if mode == "L" else "RGB")
            expected = decode(data).resize(image.size, Image.Resampling.LANCZOS)
            assert np.abs(np.asarray(image.convert("RGB"), float) - np.asarray(expected, float)).mean() < 4
    turned = io.BytesIO()
    exif = Image.Exif()
    exif[274] = 6
    Image.open(io.BytesIO(picture(2, (200, 100)))).save(turned, "JPEG", exif=exif)
    with Image.open(io.BytesIO(reduced(turned.getvalue(), to))) as image:
        assert image.size == (50, 100) and not image.getexif().get(274)
    deep = io.BytesIO()
    Image.fromarray(np.full((150, 50), 4095, np.uint16)).save(deep, "PNG")
    assert reduced(deep.getvalue(), to) == deep.getvalue()


def test_the_manifest_says_what_was_done(photos: Path, tmp_path: Path) -> None:
    make(photos, tmp_path / "shards", reduction=Reduction(max_side=24, quality=80))
    found = json.loads((tmp_path / "shards" / "manifest.json").read_text())
    assert (found["max_side"], found["quality"], found["classes"]) == (24, 80, ["ant", "bee", "cat"])
    images = open_shards(tmp_path / "shards")["train"]
    assert max(max(decode(images.read(i)).size) for i in range(len(images))) == 24


def test_mistakes_of_the_word(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    to = ("--to", str(tmp_path / "shards"))
    for arguments, reason in (
        (("--from", str(photos)), "the word make-shards needs --to"),
        (to, "the word make-shards needs --from"),
        (
            ("--from", str(photos), *to, "--quality", "90"),
            "--quality is that of images which --max_side reduces",
        ),
        (
            ("--from", str(photos), *to, "--max-side", "9", "--quality", "101"),
            "--quality 101: write 1 to 100",
        ),
        (("--from", str(photos), *to, "--shard-size", "0"), "'0' is not a number of 1 or more"),
        (("--from", str(photos), *to, "--workers", "9999"), "--workers 9999: at most"),
        (
            ("--from", str(photos / "nowhere"), *to),
            "no such folder or file; it may be a folder with train/ and val/",
        ),
    ):
        assert tools.main(["--keyword", "make-shards", *arguments]) == 2
        found = capsys.readouterr()
        assert reason in found.err and found.err.count("\n") == 1 and not found.out
    assert not (tmp_path / "shards").exists()


def test_the_source_is_never_written_over(photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    make(photos, folder)
    before = content(folder)
    for source, to in ((folder, folder), (photos, photos), (f"{folder}/train-000000.tar", folder)):
        with pytest.raises(UserError, match="holds the images that are read"):
            make(source, to, force=True)
    assert content(folder) == before


def test_a_folder_without_val_is_split(photos: Path, tmp_path: Path) -> None:
    shutil.rmtree(photos / "val")
    make(photos, tmp_path / "one")
    assert list(open_shards(tmp_path / "one")) == ["train"]
    arguments = ["--keyword", "make-shards", "--from", str(photos / "train"), "--to", str(tmp_path / "two")]
    assert tools.main([*arguments, "--val_split", "0.4"]) == 0
    found, expected = open_shards(tmp_path / "two"), split_folder(photos, "folder", 0.4)
    assert {part: pairs(images) for part, images in found.items()} == {
        part: pairs(images) for part, images in expected.items()
    }
    assert len(found["val"]) == 6
    assert tools.main([*arguments, "--val_split", "1"]) == 2
