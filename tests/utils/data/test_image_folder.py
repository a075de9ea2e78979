"""Folders of images: what is found in them, and what is wrong with them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.utils.data.helpers import CLASSES, write_folder
from utils.config.schema import DataConfig
from utils.data.image_file import is_hidden
from utils.data.image_folder import ImageNames
from utils.data.sources import check_data, open_data
from utils.errors import UserError


def test_images_below_a_link_that_leads_back_up_are_read_once(tmp_path: Path) -> None:
    write_folder(tmp_path, train=2, val=1)
    (tmp_path / "train" / "ant" / "up").symlink_to(tmp_path / "train" / "ant")
    deep = tmp_path / "train" / "bee" / "more" / "still more"
    deep.mkdir(parents=True)
    (tmp_path / "train" / "bee" / "0.jpg").rename(deep / "7.jpg")
    (tmp_path / "train" / "bee" / "folder.jpg").mkdir()
    names = ImageNames(tmp_path / "train")
    assert [names.path(i).removeprefix(f"{tmp_path}/train/") for i in range(len(names))] == [
        "ant/0.jpg", "ant/1.jpg", "bee/1.jpg", "bee/more/still more/7.jpg", "cat/0.jpg", "cat/1.jpg",
    ]  # fmt: skip
    assert names.target.tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("folders", "files", "message"),
    [
        ([], [], "/train is missing: --root names"),
        ([], ["train/a/1.jpg"], "/val is missing: --root names"),
        (["train"], [], "/train has no class folders"),
        ([], ["train/a/1.jpg", "val/1.jpg"], "/val has no class folders: .* one folder per class"),
        (["train/b"], ["train/a/1.jpg"], "/train has class folders without images: fill or remove b$"),
        (["val/b"], ["train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg", "val/b/1.txt"], "/val has .* b$"),
        ([f"train/{i}" for i in range(6)], [], "fill or remove 0, 1, 2 and 3 more$"),
        ([], ["train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg"], "different classes: b must be in both"),
        ([], ["train/a/1.jpg", "val/a/1.jpg", "val/b/1.jpg"], "different classes: b must be in both"),
        ([], ["train/a/1.jpg", "val/a/1.jpg"], "has 1 classes, not 2: write --num_classes 1"),
    ],
)
def test_image_folders_are_checked(
    folders: list[str], files: list[str], message: str, tmp_path: Path
) -> None:
    for name in folders:
        (tmp_path / name).mkdir(parents=True)
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    config = DataConfig(dataset="imagenet", root=tmp_path, num_classes=2)
    for function in (check_data, open_data):
        with pytest.raises(UserError, match=message):
            function(config)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_class_folder_that_is_a_lost_link_is_no_silent_loss(tmp_path: Path, split: str) -> None:
    write_folder(tmp_path, train=1, val=1)
    (tmp_path / split / "dog").symlink_to(tmp_path / "gone")
    config = DataConfig(dataset="imagenet", root=tmp_path, num_classes=3)
    with pytest.raises(UserError, match=f"{split} has links that lead nowhere: mend or remove dog$"):
        check_data(config)


def test_check_needs_no_validation_folder_without_validation(tmp_path: Path) -> None:
    write_folder(tmp_path, train=1, val=0)
    for name in CLASSES:
        (tmp_path / "val" / name).rmdir()
    config = DataConfig(dataset="imagenet", root=tmp_path, num_classes=3, val_batch_size=0, workers=0)
    check_data(config)
    assert open_data(config).val is None


HIDDEN = (
    "train/.ipynb_checkpoints/0.jpg", "train/@eaDir/ant/0.jpg", "train/__MACOSX/ant/._0.jpg", "train/.Trash/0.jpg",
    "train/ant/._0.jpg", "train/bee/.ipynb_checkpoints/1-checkpoint.jpg", "train/bee/deep/@eaDir/1.jpg",
    "train/cat/.DS_Store", "val/Lost+Found/0.jpg", "val/ant/.hidden.png",
)  # fmt: skip


@pytest.mark.parametrize("dataset", ["imagenet", "dali"])
def test_hidden_files_and_folders_are_left_out_and_counted(tmp_path: Path, dataset: str) -> None:
    """As systems make them: they would be images of no use, or further classes."""
    write_folder(tmp_path, train=2, val=1)
    config = DataConfig(dataset=dataset, root=tmp_path, num_classes=3, input_size=16, batch_size=2, workers=0)
    assert open_data(config).warnings == ()
    before = [ImageNames(tmp_path / part) for part in ("train", "val")]
    for name in HIDDEN:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"Mac OS X")
    (tmp_path / "train" / ".lost").symlink_to(tmp_path / "gone")
    after = [ImageNames(tmp_path / part) for part in ("train", "val")]
    for one, two in zip(before, after, strict=True):
        assert one.classes == two.classes
        assert [one.path(i) for i in range(len(one))] == [two.path(i) for i in range(len(two))]
    loaders = open_data(config)
    assert sum(len(target) for _, target in loaders.train) == 6
    train, val = tmp_path / "train", tmp_path / "val"
    assert loaders.warnings == (
        f"left out of {train}: 7 hidden files and folders, .Trash, .ipynb_checkpoints, @eaDir and 4 more",
        f"left out of {val}: 2 hidden files and folders, Lost+Found, ant/.hidden.png",
    )
    message = (
        r"\(left out of .*train: 7 hidden files and folders, .*\) has 3 classes, not 4: write --num_classes 3"
    )
    with pytest.raises(UserError, match=message):
        check_data(replace(config, num_classes=4))


def test_what_is_hidden_is_named_by_what_lies_below_the_root(tmp_path: Path) -> None:
    write_folder(tmp_path / ".cache" / "@eaDir", train=2, val=1)
    assert len(ImageNames(tmp_path / ".cache" / "@eaDir" / "train")) == 6
    assert [is_hidden(name) for name in ("a.b", "_x", "@home", "lost", "..jpg")] == [False] * 4 + [True]
