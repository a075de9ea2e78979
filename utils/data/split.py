"""Validation images taken from the training images, where a folder or shards have none."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np

from utils.data.image_folder import ImageNames, check_root
from utils.data.images import PARTS, Images
from utils.data.shards.images import ShardImages, open_shards
from utils.errors import UserError
from utils.text import printable, some_names

_NO_CLASSES = {"dev"}.union(*PARTS.values())  # names of parts of a set
_SEED = b"validation images\0"  # of the split, the same in every run


def split_folder(root: Path | None, dataset: str, share: float) -> dict[str, ImageNames]:
    """The images of a root without `val/`, split into `train` and `val`.

    The class folders are those of `train/`, or where there is none those of the root itself.

    Args:
        root: the folder.
        dataset: the data set's name, for messages.
        share: of each class that is for validation, see `validation_images`.

    Raises:
        UserError: as `ImageNames`; there is a `val/`; or a class has a single image.
    """
    root = check_root(root, dataset)
    if os.path.lexists(root / "val"):
        raise UserError(
            f"--val_split {share:g}: {root} has validation images of its own, in val/; leave it out"
        )
    names = ImageNames(root / "train" if (root / "train").is_dir() else root)
    if names.folder == root and (parts := [name for name in names.classes if name.lower() in _NO_CLASSES]):
        raise UserError(
            f"--val_split {share:g}: {root} has no train/, and its folders {some_names(parts)} do not look like "
            "classes: call the folder of the training images train/, or that of a class otherwise"
        )
    skipped = len(os.fsencode(os.path.join(names.folder, "")))
    relative = [os.fsencode(names.path(i))[skipped:] for i in range(len(names))]
    chosen = _chosen(names, relative, share, "add images or remove the folder")
    return {"train": names.part(~chosen), "val": names.part(chosen)}


def split_shards(root: Path | str, share: float) -> dict[str, ShardImages]:
    """The images of shards for training alone, split into `train` and `val`.

    Images are chosen by their tar file and their place in it, so that none is read.

    Args:
        root: as for `utils.data.shards.images.open_shards`.
        share: of each class that is for validation, see `validation_images`.

    Raises:
        UserError: as `open_shards`; there are shards for validation; or a class has a single image.
    """
    found = open_shards(root)
    if "val" in found:
        raise UserError(f"--val_split {share:g}: {root} has shards for validation; leave it out")
    images = found["train"]
    chosen = _chosen(images, images.places(), share, "add images, or make the shards without this class")
    return {"train": images.part(~chosen), "val": images.part(chosen)}


def _chosen(images: Images, names: list[bytes], share: float, instead: str) -> np.ndarray:
    """As `validation_images`; raises `UserError` where a class has a single image."""
    counts = np.bincount(images.target, minlength=len(images.classes))
    if few := [name for name, count in zip(images.classes, counts, strict=True) if count < 2]:
        raise UserError(
            f"--val_split {share:g}: a class needs two images, one of them for validation, and {images.place} has one "
            f"of {some_names(few)}: {instead}"
        )
    return validation_images(images.target, names, share)


def validation_images(target: np.ndarray, names: list[bytes], share: float) -> np.ndarray:
    """Choose the validation images of a set; returns bool [N].

    Of a class with n images, round(share * n) are chosen, at least 1 and at most n - 1: those whose names have the
    smallest SHA-256. So the choice depends on names and classes alone, on no run's seed, no order and no version of a
    library, and an image that is added changes it little.

    Args:
        target: classes, int64 [N], each with two images or more.
        names: of the images within the set.
        share: above 0 and below 1.
    """
    digests = np.array([hashlib.sha256(_SEED + name).digest() for name in names], dtype="S32")
    order = np.lexsort((digests, target))
    counts = np.bincount(target)
    wanted = np.clip(np.round(share * counts), 1, counts - 1)
    places = np.arange(len(target)) - np.repeat(np.cumsum(counts) - counts, counts)  # within the class
    chosen = np.zeros(len(target), bool)
    chosen[order] = places < wanted[target[order]]
    return chosen


def check_split(names: Images, before: str, root: Path | None) -> str:
    """The digest of a split's validation images, which a checkpoint holds.

    Args:
        names: of the validation images.
        before: the digest in the checkpoint that is evaluated; empty without one.
        root: the folder, for the message.

    Raises:
        UserError: they are others than those of the checkpoint.
    """
    found = names.identity()["files"]
    if before and found != before:
        raise UserError(
            f"--val_split: {printable(str(root))} has other images than in the training, which may have seen some of "
            "those that would be validated: bring the files back, or name a root with validation images"
        )
    return found
