"""What shards are made from: the challenge's archives, tables, and what is none of these."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.utils.data.shards.helpers import (
    TRUTH,
    WNIDS,
    devkit,
    make,
    pairs,
    picture,
    sample,
    tar_of,
    write_challenge,
)
from utils.data.shards.images import open_shards
from utils.data.shards.origin import open_origin
from utils.errors import UserError

# ---- archives


def test_archives_are_read_as_they_are(tmp_path: Path) -> None:
    write_challenge(tmp_path / "archives")
    parts = open_origin(tmp_path / "archives")
    assert pairs(parts["train"]) == sorted(
        (picture(10 * n + i), name) for n, name in enumerate(WNIDS) for i in range(4)
    )
    names = dict(enumerate(reversed(WNIDS), 1))  # the challenge's numbers are not those of the names' order
    assert pairs(parts["val"]) == sorted((picture(100 + i), names[n]) for i, n in enumerate(TRUTH, 1))
    make(tmp_path / "archives", tmp_path / "shards")
    for part, images in open_shards(tmp_path / "shards").items():
        assert images.classes == WNIDS
        assert pairs(images) == pairs(parts[part])
    keys = {open_shards(tmp_path / "shards")["train"].key(i) for i in range(12)}
    assert "n02/n02_3" in keys
    assert sorted(path.name for path in (tmp_path / "archives").iterdir()) == [
        "ILSVRC2012_devkit_t12.tar.gz", "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar",
    ]  # fmt: skip
    (tmp_path / "archives" / "ILSVRC2012_img_train.tar").unlink()
    assert list(open_origin(tmp_path / "archives")) == ["val"]


KIT, VAL, TRAIN = "ILSVRC2012_devkit_t12.tar.gz", "ILSVRC2012_img_val.tar", "ILSVRC2012_img_train.tar"


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        (KIT, devkit(truth=TRUTH[:-1]), r"the devkit has 5 validation images, and .*00000006.JPEG is none of them"),
        (KIT, devkit(truth=(*TRUTH, 1)), r"has 6 images, and the devkit says the classes of 7: use its devkit"),
        (KIT, devkit(truth=(9, *TRUTH[1:])), r"the devkit says class 9 of .*, and has no such class"),
        (KIT, devkit(wnids=("n01", "n02", "n04")), r"has the class n03, which the devkit does not know"),
        (KIT, devkit(wnids=(*WNIDS, "n09")), r"has no archive of n09, which are in the devkit"),
        (KIT, devkit(wnids=("n01", "n02", "n03", "n03")), r"has a class twice"),
        (KIT, b"no archive", r"devkit_t12.tar.gz: no archive, or a damaged one"),
        (KIT, bytes([*devkit()[:100], 255, *devkit()[101:]]), r"devkit_t12.tar.gz"),
        (KIT, devkit()[:200], r"devkit_t12.tar.gz: no archive, or a damaged one"),
        (KIT, tar_of({"x/data/meta.mat": b"x"}, "w:gz"), r"has 0 files validation_ground_truth.txt, not one"),
        (KIT, tar_of({"x/data/meta.mat": b"x", "y/data/a_validation_ground_truth.txt": b"1"}, "w:gz"),
         r"meta.mat or validation_ground_truth.txt in it is damaged"),
        (VAL, b"no archive", r"img_val.tar: no tar file, or a damaged one"),
        (TRAIN, tar_of({"n01.tar": b"no archive" * 100}), r"img_train.tar: no tar of tars, or a damaged one"),
        (TRAIN, tar_of({f"{name}.tar": tar_of({"a.JPEG": b"x"})[:1024] for name in WNIDS}),
         r"img_train.tar: n01.tar is damaged or truncated at byte 1,024"),
        (TRAIN, tar_of({f"{name}.tar": tar_of({"a.JPEG": b"x"}) for name in WNIDS})[:-10240],
         r"img_train.tar"),
        (TRAIN, tar_of({"n01.tar": tar_of({"a.JPEG": b"x"})}), r"has no archive of n02, n03"),
        ("ILSVRC2012_img_val_2.tar", b"", r"has two archives for val, ILSVRC2012_img_val.tar and"),
    ],
)  # fmt: skip
def test_archives_that_do_not_fit(name: str, data: bytes, reason: str, tmp_path: Path) -> None:
    write_challenge(tmp_path / "archives")
    (tmp_path / "archives" / name).write_bytes(data)
    with pytest.raises(UserError, match=reason) as caught:
        make(tmp_path / "archives", tmp_path / "shards")
    assert "\n" not in str(caught.value) and not (tmp_path / "shards").exists()


def test_archives_without_a_devkit_or_images(tmp_path: Path) -> None:
    write_challenge(tmp_path)
    (tmp_path / KIT).rename(tmp_path / "kit")
    with pytest.raises(UserError, match=r"has no devkit \(ILSVRC2012_devkit_t12.tar.gz\)"):
        open_origin(tmp_path)
    (tmp_path / "kit").rename(tmp_path / KIT)
    for name in (VAL, TRAIN):
        (tmp_path / name).unlink()
    with pytest.raises(UserError, match=r"has a devkit but no archive of images"):
        open_origin(tmp_path)


# ---- tables


def write_table(folder: Path, text: str) -> Path:
    """A CSV file beside four images."""
    for name in "abcd":
        (folder / "images").mkdir(parents=True, exist_ok=True)
        (folder / "images" / f"{name}.jpg").write_bytes(picture(ord(name)))
    (folder / "labels.csv").write_text(text)
    return folder / "labels.csv"


LINES = "images/a.jpg,bee,train\nimages/b.jpg,ant,train\nimages/c.jpg,bee,val\nimages/d.jpg,ant,validation\n"


def test_a_table_of_files(tmp_path: Path) -> None:
    table = write_table(tmp_path, f"path,label,split\n{LINES}")
    make(table, tmp_path / "shards")
    found = open_shards(tmp_path / "shards")
    assert pairs(found["train"]) == sorted([(picture(ord("a")), "bee"), (picture(ord("b")), "ant")])
    assert pairs(found["val"]) == sorted([(picture(ord("c")), "bee"), (picture(ord("d")), "ant")])
    table.write_text("\ufeffimage,class\nimages/a.jpg,10\nimages/b.jpg,9\n", encoding="utf-8")
    (alone,) = open_origin(table).values()
    assert alone.classes == ("9", "10") and alone.target.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "file name,label\na,b\n",
            r"has the columns file name, label: its first line must name path and label",
        ),
        ("", r"labels.csv has the columns of no name"),
        ("path,label\n", r"labels.csv lists no images"),
        ("path,label\nimages/a.jpg,\n", r"labels.csv, line 2: an empty cell"),
        ("path,label\nimages/a.jpg\n", r"labels.csv, line 2: an empty cell"),
        *(
            (
                f"path,label\nimages/a.jpg,{label}\nimages/b.jpg,0\n",
                rf"labels.csv: the label {label} is out of range",
            )
            for label in ("-1", "1.5", "nan", "1e3", "1000000")
        ),
        ("path,label,split\nimages/a.jpg,x,other\n", r"line 2: split is other: write train or val"),
        ("path,label\nimages/a.jpg,x\nimages/a.jpg,y\n", r"lists images twice: images/a.jpg"),
        ("path,label\nimages/a.jpg,x\nimages/z.jpg,y\n", r"lists files that are not in .*: images/z.jpg"),
        (f"path,label,split\n{LINES.replace('d.jpg,ant', 'd.jpg,bee')}", r"val has no image of ant"),
    ],
)
def test_tables_with_mistakes(text: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=reason):
        make(write_table(tmp_path, text), tmp_path / "shards")
    assert not (tmp_path / "shards").exists()


def write_parquet(path: Path, images: object, labels: object, metadata: dict[str, str] | None = None) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({"image": images, "label": labels})
    parquet.write_table(table.replace_schema_metadata(metadata), path, row_group_size=2)


@pytest.mark.parametrize("form", ["record", "bytes"])
def test_parquet_files(form: str, tmp_path: Path) -> None:
    names = {"info": {"features": {"label": {"names": ["ant", "bee", "cat"]}}}}
    files = [picture(i) for i in range(8)]
    cells = (
        [{"bytes": data, "path": f"x/{i}.jpeg"} for i, data in enumerate(files)]
        if form == "record"
        else files
    )
    source = tmp_path / "tables"
    source.mkdir()
    metadata = {"huggingface": json.dumps(names)}
    write_parquet(source / "train-00000-of-00002.parquet", cells[:3], [0, 1, 2], metadata)
    write_parquet(source / "train-00001-of-00002.parquet", cells[3:5], [2, 1], metadata)
    write_parquet(source / "validation.parquet", cells[5:], [0, 1, 2], metadata)
    make(source, tmp_path / "shards", per_shard=4)
    found = open_shards(tmp_path / "shards")
    assert found["train"].classes == ("ant", "bee", "cat")
    assert pairs(found["train"]) == sorted(zip(files, ["ant", "bee", "cat", "cat", "bee"], strict=False))
    assert pairs(found["val"]) == sorted(zip(files[5:], ["ant", "bee", "cat"], strict=True))
    if form == "record":
        assert found["val"].key(0) == "x/5"
    write_parquet(tmp_path / "words.parquet", cells[:2], ["dog", "ant"])
    (words,) = open_origin(tmp_path / "words.parquet").values()
    assert words.classes == ("ant", "dog") and words.target.tolist() == [1, 0]


def test_parquet_files_with_mistakes(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    path = tmp_path / "train.parquet"
    names = {"huggingface": json.dumps({"info": {"features": {"label": {"names": ["ant", "bee"]}}}})}
    for images, labels, metadata, reason in (
        ([b"x"], [2], names, r"the label 2 is out of range: 2 classes are named"),
        ([b"x", b"x"], [0, -1], None, r"the label -1 is out of range"),
        ([b"x", b"x"], [0, None], None, r"the column label is empty in some rows"),
        ([], [], None, r"the column (label|image) is"),
        ([b"x"], [0.5], None, r"the column label is of the type double: it must hold numbers or names"),
        (["x"], [0], None, r"the column image is of the type string: it must hold image files"),
        ([b"no image"], [0], None, r"cannot read the image .*train.parquet: train/0 \(no image\)"),
        ([b"x"], [2_000_000_000], None, r"the label 2000000000 is out of range: write 0 to 999,999"),
        ([b"x", b"x"], ["ant", "bird"], names, r"the labels bird are no classes|the labels bird are none"),
        (
            [b"x", b"x"],
            ["1.5", "0"],
            None,
            r"the label 1.5 is out of range: write 0 to 999,999, or names of cl",
        ),
        ([b"x", b"x"], ["", "ant"], None, r"the column label is empty in some rows"),
        (
            [b"x", b"x"],
            [1.0, 0.0],
            None,
            r"the column label is of the type double: it must hold numbers or names",
        ),
        ([None, b"x"], [0, 0], None, r"cannot read the image .*train.parquet: train/0 \(an empty cell\)"),
    ):
        write_parquet(path, images, labels, metadata)
        with pytest.raises(UserError, match=reason):
            make(path, tmp_path / "shards", force=True)
    write_parquet(path, [b"x"], [0])
    for name, labels, reason in (
        ("val.parquet", ["ant"], r"the column label has numbers in some files and names in others"),
        ("dev-0.parquet", [0], r"dev-0.parquet: for training or for validation\?"),
    ):
        write_parquet(tmp_path / name, [b"x"], labels)
        with pytest.raises(UserError, match=reason):
            open_origin(tmp_path)
        (tmp_path / name).unlink()
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"picture": [b"x"], "label": [0]}), path)
    with pytest.raises(UserError, match=r"has the columns picture, label: it needs image and label"):
        open_origin(path)
    path.write_bytes(b"no table")
    with pytest.raises(UserError, match=r"train.parquet: no Parquet file, or a damaged one"):
        open_origin(path)


# ---- the rest


def test_places_without_images(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("x")
    for place, reason in (
        (tmp_path, r"no images are found so; it may be a folder with train/ and val/, ImageNet's archives"),
        (tmp_path / "note.txt", r"no such folder or file"),
        (tmp_path / "nowhere", r"no such folder or file"),
        (tmp_path / "x.csv", r"no such folder or file"),
    ):
        with pytest.raises(UserError, match=reason):
            open_origin(place)
    (tmp_path / "train.tar").write_bytes(tar_of(sample("a", 0)))
    (images,) = open_origin(tmp_path).values()
    assert np.array_equal(images.target, [0]) and images.read(0) == picture(0)
