"""Image files in a folder per class: names and classes, unreadable images, checks of the folders."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torchvision.datasets.folder import is_image_file

from utils.data.image_file import is_hidden, largest_value, read, walk
from utils.data.images import REPLACE, Images, short_digest
from utils.errors import UserError
from utils.text import printable


@dataclass
class Unreadable:
    """The images of a run that could not be read, up to the number that may be left out.

    Attributes:
        limit: how many images may be left out.
        paths: those left out so far; an image counts once, however often it is met.
    """

    limit: int
    paths: set[str] = field(default_factory=set)

    def add(self, path: str, reason: str, instead: str = REPLACE) -> None:
        """Leave an image out and say so in the log. Raises `UserError` when it is one too many."""
        if path in self.paths:
            return
        shown = printable(path)
        if len(self.paths) >= self.limit:
            more = (
                f"{self.limit} others are left out already" if self.limit else "--skip_corrupt N leaves out N"
            )
            raise UserError(
                f"cannot read the image {shown} ({reason}): {instead} ({more}; "
                "tools.py --keyword verify-data lists all such files)"
            )
        self.paths.add(path)
        logging.getLogger("train").warning(
            "left out an image that cannot be read, %d of %d: %s (%s)",
            len(self.paths), self.limit, shown, reason, extra={"of_each_process": True},
        )  # fmt: skip


class ImageNames(Images):
    """Paths and classes of the images in a folder per class, in the order of torchvision's `ImageFolder`.

    Attributes:
        folder: the folder.
        hidden: paths of hidden folders, and of hidden files that end as images do, all of which are left out.

    Raises:
        UserError: the folder is missing or has no class folders; a class folder has no images or cannot be listed; a
            link leads nowhere.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = self.place = folder
        names, passed = _class_folders(folder)
        self.classes = tuple(names)
        # `ImageFolder` itself would list the images below a link that leads back up some forty times.
        images = [_images(folder / name, passed) for name in self.classes]
        self.hidden = [path for path in passed if is_image_file(path) or os.path.isdir(path)]
        empty = [name for name, paths in zip(self.classes, images, strict=True) if not paths]
        if empty:
            raise UserError(f"{folder} has class folders without images: fill or remove {_some(empty)}")
        # Arrays, not lists of objects: they reach the workers quickly and are stored once per worker.
        self._paths = np.array([os.fsencode(path) for paths in images for path in paths])
        self.target = np.repeat(np.arange(len(self.classes)), [len(paths) for paths in images])

    def part(self, chosen: np.ndarray) -> ImageNames:
        """Some of the images, bool [samples], with all classes and without hidden files."""
        part = copy.copy(self)
        # As long as the longest of them: the digest must not depend on names that are not in it.
        part._paths = np.array(self._paths[chosen].tolist())
        part.target, part.hidden = self.target[chosen], []
        return part

    def path(self, index: int) -> str:
        """Return the path of an image."""
        return os.fsdecode(bytes(self._paths[index]))

    name = path

    def key(self, index: int) -> str:
        return os.path.splitext(os.path.relpath(self.path(index), self.folder))[0]

    def read(self, index: int) -> bytes:
        return read(self.path(index))

    def kind(self, index: int) -> str:
        return os.path.splitext(self.path(index))[1].lower().removeprefix(".")

    def largest_value(self, index: int) -> int | None:
        return largest_value(self.path(index))

    def left_out(self) -> str:
        """Say how many hidden files and folders are left out, and name some; empty without any."""
        if not self.hidden:
            return ""
        names = [os.path.relpath(path, self.folder) for path in self.hidden]
        return f"left out of {self.folder}: {len(names)} hidden files and folders, {_some(names)}"

    def digest(self) -> str:
        """Of the files' names; the folder itself may be another one."""
        skipped = len(os.fsencode(os.path.join(self.folder, "")))
        names = self._paths.view(np.uint8).reshape(len(self), -1)[:, skipped:]
        return short_digest(np.ascontiguousarray(names).data)


def _images(folder: Path, hidden: list[str]) -> list[str]:
    """Paths of the image files below a folder, sorted by folder and name; those of hidden ones go to `hidden`."""
    return [
        os.path.join(path, name)
        for path, names in sorted(walk(folder, hidden))
        for name in names
        if is_image_file(name)
    ]


def value_range(images: Images, threads: int, *, training: bool) -> tuple[int | None, str]:
    """The largest value of the set's 16-bit images, which becomes white, and a line about it; None and "" without any.

    Only names that end as PNG or TIFF do are looked at. The line depends on whether these are the training images.
    """
    chosen = [index for index in range(len(images)) if images.kind(index) in _MAY_HAVE_16_BITS]
    values: list[int] = []
    with ThreadPoolExecutor(max(1, threads)) as pool:
        for first in range(0, len(chosen), 1024):  # a million tasks at once would need a gigabyte
            found = pool.map(images.largest_value, chosen[first : first + 1024])
            values += [value for value in found if value is not None]
    if not values:
        return None, ""
    largest = max(1, *values)
    advice = (
        f"write --max_value {largest} where the network meets other images, or another one if this is an outlier"
        if training
        else "it may be another one than that of the training images: write --max_value with theirs"
    )
    return largest, (
        f"{len(values)} of {len(images)} images in {images.place} have 16 bits: their largest value, {largest}, "
        f"becomes white (255); {advice}"
    )


_MAY_HAVE_16_BITS = ("png", "tif", "tiff")


def note(
    unreadable: Unreadable, images: Images, bad: Sequence[tuple[int, str]], left: int, *, train: bool
) -> None:
    """Record a batch's unreadable images.

    Raises `UserError` also when a training batch has only one image left, or none: too few for batch statistics.
    """
    for index, reason in bad:
        unreadable.add(images.name(index), reason, images.instead())
    if bad and train and left <= 1:
        few = f"{'a single' if left else 'no'} image of a training batch"
        raise UserError(
            f"{few} can be read, the last that cannot is {printable(images.name(bad[-1][0]))}: replace or remove them "
            "(tools.py --keyword verify-data lists all such files), or write a larger --batch_size"
        )


def check_folders(
    root: Path | None, dataset: str, *, val: bool, train: bool = True, known: bool = False
) -> dict[str, ImageNames]:
    """Return the images of `train/` in `root`, and of `val/` when that is wanted, by these two words.

    Args:
        root: the folder that holds both.
        dataset: the data set's name, for messages.
        val: whether `val/` is wanted.
        train: whether `train/` must be there; if not, it is read where it is.
        known: whether the classes' numbers are known from elsewhere, so that a `train/` that need not be there may
            have other classes; it is not read then.

    Raises:
        UserError: as `ImageNames`; or the classes differ.
    """
    root = check_root(root, dataset)
    wanted = {"train": train or (root / "train").is_dir(), "val": val}
    parts = {name: ImageNames(root / name) for name, is_wanted in wanted.items() if is_wanted}
    if len(parts) == 2:
        other = set(parts["train"].classes) ^ set(parts["val"].classes)
        if other and known and not train:
            del parts["train"]
        elif other:
            raise UserError(
                f"train/ and val/ in {root} have different classes: {_some(sorted(other))} must be in both"
            )
    return parts


def check_root(root: Path | None, dataset: str) -> Path:
    """The folder of a data set. Raises UserError where it is not given, or is no folder."""
    if root is None and dataset == "shards":
        raise UserError("--dataset shards needs --root: a folder that make-shards has written, or its URL")
    if root is None:
        what = (
            "a folder of images (--dataset folder or imagenet)"
            if dataset == "imagenet"
            else f"--dataset {dataset}"
        )
        raise UserError(f"{what} needs --root: the folder that holds train/ and val/")
    if not root.is_dir():
        raise UserError(f"--root {root} is not a folder: name the one that holds train/ and val/")
    return root


def _class_folders(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the class folders, sorted, and paths of hidden ones; raises `UserError` unless there are some."""
    if not folder.is_dir():
        alone = "; only --evaluate without --bn_batches needs no train/" if folder.name == "train" else ""
        raise UserError(
            f"{folder} is missing: --root names the folder that holds train/ and val/, each with a folder "
            f"per class; --val_split 0.1 takes validation images from a folder without val/{alone}"
        )
    everything = sorted(os.scandir(folder), key=lambda entry: entry.name)
    entries = [entry for entry in everything if not is_hidden(entry.name)]
    hidden = [entry.path for entry in everything if is_hidden(entry.name) and entry.is_dir()]
    lost = [entry.name for entry in entries if not os.path.exists(entry.path)]
    if lost:
        raise UserError(f"{folder} has links that lead nowhere: mend or remove {_some(lost)}")
    classes = [entry.name for entry in entries if entry.is_dir()]
    if not classes:
        raise UserError(f"{folder} has no class folders: put its images into one folder per class")
    return classes, hidden


def _some(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(printable, names[:3])) + more
