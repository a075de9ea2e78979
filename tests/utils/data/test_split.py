"""Validation images that are split off the training folder."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import tools
from tests.utils.data.helpers import CLASSES, read, validation, write_folder
from tests.utils.data.shards.helpers import make, pairs
from utils.config.schema import DataConfig
from utils.data.image_folder import ImageNames
from utils.data.shards.images import open_shards
from utils.data.sources import check_data, open_data
from utils.data.split import split_folder, validation_images
from utils.errors import UserError


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    """Of a root with `train/` alone, 20 images of each of 3 classes."""
    write_folder(tmp_path / "root", train=20, val=0)
    for name in CLASSES:
        (tmp_path / "root" / "val" / name).rmdir()
    (tmp_path / "root" / "val").rmdir()
    return DataConfig(
        dataset="imagenet", root=tmp_path / "root", num_classes=3, val_split=0.1, batch_size=4, val_batch_size=4,
        input_size=16, workers=0,
    )  # fmt: skip


def paths(names: ImageNames) -> set[str]:
    return {names.path(i).removeprefix(f"{names.folder}/") for i in range(len(names))}


@pytest.mark.parametrize("share", [0.01, 0.1, 0.25, 0.5, 0.99])
def test_each_class_gives_its_share(share: float) -> None:
    """round(share * n) images of n, at least one, and not all; those with the smallest digests of their names."""
    draw = np.random.default_rng(0)
    counts = [2, 3, 7, 100, 1000]
    target = draw.permutation(np.repeat(np.arange(5), counts))
    names = [f"{c}/{i}.jpg".encode() for i, c in enumerate(target)]
    chosen = validation_images(target, names, share)
    for c, n in enumerate(counts):
        own = [name for name, of in zip(names, target, strict=True) if of == c]
        own.sort(key=lambda name: hashlib.sha256(b"validation images\0" + name).digest())
        wanted = set(own[: min(max(round(share * n), 1), n - 1)])
        assert {
            name for name, of, is_chosen in zip(names, target, chosen, strict=True) if of == c and is_chosen
        } == wanted
    order = draw.permutation(len(target))
    assert (validation_images(target[order], [names[i] for i in order], share) == chosen[order]).all()


def test_the_choice_stays() -> None:
    """It is written down in checkpoints as a digest: another version of this code must choose the same."""
    names = [f"{c}/{i}.jpg".encode() for c in "ab" for i in range(6)]
    chosen = validation_images(np.repeat([0, 1], 6), names, 0.34)
    assert [names[i].decode() for i in np.flatnonzero(chosen)] == ["a/0.jpg", "a/1.jpg", "b/2.jpg", "b/5.jpg"]


def test_parts_are_disjoint_and_the_same_for_all_runs(config: DataConfig) -> None:
    found = [check_data(replace(config, seed=seed)) for seed in (0, 1)]
    train, val = (paths(found[0][name]) for name in ("train", "val"))
    assert not train & val and len(train) == 54 and len(val) == 6
    assert [paths(found[1][name]) for name in ("train", "val")] == [train, val]
    assert np.bincount(found[0]["val"].target).tolist() == [2, 2, 2]
    loaders = open_data(config)
    assert sum(len(target) for _, target in read(loaders.train)) == 52  # whole batches
    seen = {validation(loaders).name(i) for i in range(6)}
    assert {path.removeprefix(f"{config.root}/train/") for path in seen} == val


def test_class_folders_may_lie_in_the_root(config: DataConfig) -> None:
    """The split is that of the same folders in `train/`."""
    assert config.root is not None
    before = {name: paths(part) for name, part in check_data(config).items()}
    for name in CLASSES:
        (config.root / "train" / name).rename(config.root / name)
    (config.root / "train").rmdir()
    assert {name: paths(part) for name, part in check_data(config).items()} == before


def test_an_added_image_changes_little(config: DataConfig) -> None:
    assert config.root is not None
    before = paths(check_data(config)["val"])
    for i in range(20, 24):
        (config.root / "train" / "ant" / f"{i}.jpg").touch()
    after = paths(check_data(config)["val"])
    assert {name for name in before ^ after if not name.startswith("ant/")} == set()
    assert len(before - after) <= 1


@pytest.mark.parametrize("dataset", ["imagenet", "dali"])
def test_both_data_sets_split_alike(config: DataConfig, dataset: str) -> None:
    if dataset == "dali":
        pytest.importorskip("nvidia.dali", reason="NVIDIA's DALI is not installed")
    loaders = open_data(replace(config, dataset=dataset))
    expected = split_folder(config.root, dataset, config.val_split)
    assert (validation(loaders).samples, loaders.train.samples) == (6, 54)
    assert validation(loaders).identity()["files"] == expected["val"].identity()["files"]
    assert sum(len(target) for _, target in read(validation(loaders))) == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("val/ant", "has validation images of its own, in val/; leave it out"),
        ("single", "two images, .* and .*train has one of dog: add images"),
        ("elsewhere", "has no train/, and its folders Training, validation do not look like classes"),
    ],
)
def test_folders_that_cannot_be_split(config: DataConfig, change: str, message: str) -> None:
    assert config.root is not None
    if change == "val/ant":
        (config.root / change).mkdir(parents=True)
    elif change == "single":
        (config.root / "train" / "dog").mkdir()
        (config.root / "train" / "dog" / "0.jpg").touch()
    else:
        (config.root / "train").rename(config.root / "Training")
        (config.root / "validation" / "a").mkdir(parents=True)
        (config.root / "validation" / "a" / "0.jpg").touch()
    with pytest.raises(UserError, match=message):
        check_data(replace(config, num_classes=4 if change == "single" else 3))


@pytest.mark.parametrize("dataset", ["imagenet", "shards", "dali"])
def test_shards_are_split(config: DataConfig, dataset: str, tmp_path: Path) -> None:
    """By file and place, so that a set that is elsewhere is split alike; it may get shards for val."""
    if dataset == "dali":
        pytest.importorskip("nvidia.dali", reason="NVIDIA's DALI is not installed")
    assert config.root is not None
    make(config.root, tmp_path / "shards", per_shard=7)
    split = replace(config, dataset=dataset, root=tmp_path / "shards")
    found = check_data(split)
    train, val = (pairs(found[name]) for name in ("train", "val"))
    assert (len(train), len(val)) == (54, 6) and np.bincount(found["val"].target).tolist() == [2, 2, 2]
    assert sorted(train + val) == pairs(open_shards(tmp_path / "shards")["train"])
    loaders = open_data(split)
    assert (validation(loaders).samples, loaders.train.samples) == (6, 54)
    assert sum(len(target) for _, target in read(validation(loaders))) == 6

    (tmp_path / "shards").rename(tmp_path / "moved")
    known = replace(split, root=tmp_path / "moved", train=False, val_files=found["val"].identity()["files"])
    assert {part: pairs(images) for part, images in check_data(known).items()} == {"val": val}
    make(config.root, tmp_path / "others", per_shard=8)
    with pytest.raises(UserError, match="has other images than in the training"):
        check_data(replace(known, root=tmp_path / "others"))
    arguments = ["--from", str(tmp_path / "moved"), "--to", str(tmp_path / "both"), "--val_split", "0.1"]
    assert tools.main(["--keyword", "make-shards", *arguments]) == 0
    assert pairs(open_shards(tmp_path / "both")["val"]) == val
    assert pairs(check_data(replace(known, root=tmp_path / "both"))["val"]) == val
    with pytest.raises(UserError, match=r"--val_split 0.1: .* has shards for validation; leave it out"):
        check_data(replace(split, root=tmp_path / "both"))


def test_a_checkpoints_split_gives_way_to_validation_images(config: DataConfig) -> None:
    """Of an evaluation, whose checkpoint holds the digest of its own; other training images are an error."""
    assert config.root is not None
    digest = check_data(config)["val"].identity()["files"]
    known = replace(config, val_files=digest, train=False)
    assert set(check_data(known)) == {"val"}
    path = sorted((config.root / "train" / "ant").iterdir())
    chosen = check_data(known)["val"].path(0)
    Path(chosen).rename(chosen + ".gone")
    with pytest.raises(UserError, match="has other images than in the training"):
        check_data(known)
    for name in CLASSES:
        (config.root / "val" / name).mkdir(parents=True)
        (config.root / "val" / name / "0.jpg").write_bytes(path[-1].read_bytes())
    assert len(check_data(known)["val"]) == 3
