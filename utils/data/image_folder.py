"""Image files in a folder per class: names and classes, unreadable images, checks of the folders."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torchvision.datasets.folder import is_image_file

from utils.data.image_file import walk
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

    def add(self, path: str, reason: str) -> None:
        """Leave an image out and say so in the log. Raises `UserError` when it is one too many."""
        if path in self.paths:
            return
        shown = printable(path)
        if len(self.paths) >= self.limit:
            more = (
                f"{self.limit} others are left out already" if self.limit else "--skip_corrupt N leaves out N"
            )
            raise UserError(
                f"cannot read the image {shown} ({reason}): replace or remove it ({more}; "
                "tools.py --keyword verify-data lists all such files)"
            )
        self.paths.add(path)
        logging.getLogger("train").warning(
            "left out an image that cannot be read, %d of %d: %s (%s)",
            len(self.paths), self.limit, shown, reason, extra={"of_each_process": True},
        )  # fmt: skip


class ImageNames:
    """Paths and classes of the images in a folder per class, in the order of torchvision's `ImageFolder`.

    Attributes:
        target: classes, int64 [samples].

    Raises:
        UserError: a folder cannot be listed.
    """

    def __init__(self, folder: Path) -> None:
        classes = sorted(entry.path for entry in os.scandir(folder) if entry.is_dir())
        # `ImageFolder` itself would list the images below a link that leads back up some forty times.
        images = [_images(Path(path)) for path in classes]
        # Arrays, not lists of objects: they reach the workers quickly and are stored once per worker.
        self._paths = np.array([os.fsencode(path) for paths in images for path in paths])
        self.target = np.repeat(np.arange(len(classes)), [len(paths) for paths in images])
        self._folder = folder
        self._classes = [
            (os.path.basename(path), len(paths)) for path, paths in zip(classes, images, strict=True)
        ]

    def __len__(self) -> int:
        return len(self.target)

    def path(self, index: int) -> str:
        """Return the path of an image."""
        return os.fsdecode(bytes(self._paths[index]))

    def identity(self) -> dict[str, str]:
        """Texts that tell it from another set: the classes with their numbers of images, a digest of the files' names.

        The folder itself may be another one.
        """
        skipped = len(os.fsencode(os.path.join(self._folder, "")))
        names = self._paths.view(np.uint8).reshape(len(self), -1)[:, skipped:]
        digest = hashlib.sha256(np.ascontiguousarray(names).data).hexdigest()
        classes = ", ".join(f"{name}: {count}" for name, count in self._classes)
        return {"classes": classes, "files": digest[:12]}


def _images(folder: Path) -> list[str]:
    """Paths of the image files below a folder, sorted by folder and name."""
    return [
        os.path.join(path, name)
        for path, names in sorted(walk(folder))
        for name in names
        if is_image_file(name)
    ]


def note(
    unreadable: Unreadable, names: ImageNames, bad: Sequence[tuple[int, str]], left: int, *, train: bool
) -> None:
    """Record a batch's unreadable images.

    Raises `UserError` also when a training batch has only one image left, or none: too few for batch statistics.
    """
    for index, reason in bad:
        unreadable.add(names.path(index), reason)
    if bad and train and left <= 1:
        few = f"{'a single' if left else 'no'} image of a training batch"
        raise UserError(
            f"{few} can be read, the last that cannot is {printable(names.path(bad[-1][0]))}: replace or remove them "
            "(tools.py --keyword verify-data lists all such files), or write a larger --batch_size"
        )


def check_folders(root: Path | None, dataset: str, *, val: bool) -> int:
    """Return the number of classes of `train/` in `root`, and of `val/` when that is wanted.

    Raises:
        UserError: a folder is missing or has no class folders; a class folder has no images; a link leads nowhere;
            the classes differ.
    """
    if root is None:
        raise UserError(f"--dataset {dataset} needs --root: the folder that holds train/ and val/")
    if not root.is_dir():
        raise UserError(f"--root {root} is not a folder: name the one that holds train/ and val/")
    classes = _class_folders(root / "train")
    if val:
        other = set(classes) ^ set(_class_folders(root / "val"))
        if other:
            raise UserError(
                f"train/ and val/ in {root} have different classes: {_some(sorted(other))} must be in both"
            )
    return len(classes)


def _class_folders(folder: Path) -> list[str]:
    """Names of the class folders, sorted; raises `UserError` unless there are some and each has an image."""
    if not folder.is_dir():
        raise UserError(
            f"{folder} is missing: --root names the folder that holds train/ and val/, each with a folder "
            "per class"
        )
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    lost = [entry.name for entry in entries if not os.path.exists(entry.path)]
    if lost:
        raise UserError(f"{folder} has links that lead nowhere: mend or remove {_some(lost)}")
    classes = [entry.name for entry in entries if entry.is_dir()]
    if not classes:
        raise UserError(f"{folder} has no class folders: put its images into one folder per class")
    empty = [name for name in classes if not _has_image(folder / name)]
    if empty:
        raise UserError(f"{folder} has class folders without images: fill or remove {_some(empty)}")
    return classes


def _has_image(folder: Path) -> bool:
    return any(is_image_file(name) for _, names in walk(folder) for name in names)


def _some(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(printable, names[:3])) + more
