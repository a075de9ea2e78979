"""Encoded images with classes, wherever they lie: what the loaders of photographs read from."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from utils.data.image_file import largest_value

PARTS = {"train": {"train", "training"}, "val": {"val", "valid", "validation"}, "test": {"test", "testing"}}
"""Parts of a set, and words of which one is in the names of their files and folders."""

REPLACE = "replace or remove it"


class Images(ABC):
    """Encoded images, numbered from 0, and their classes.

    Attributes:
        place: the folder or URL that holds them, for messages.
        classes: names of the classes, in the order of their numbers.
        target: classes, int64 [samples].
        any_order: whether reading in another order than the images' own takes no longer.
    """

    place: Path | str
    classes: tuple[str, ...]
    target: np.ndarray
    any_order: bool = True

    def __len__(self) -> int:
        return len(self.target)

    @abstractmethod
    def read(self, index: int) -> bytes:
        """Read an image file. Raises `OSError`, with a reason for people."""

    @abstractmethod
    def name(self, index: int) -> str:
        """Where an image lies, for messages and lists."""

    @abstractmethod
    def key(self, index: int) -> str:
        """The name of an image in its set: of folders and file, without what is above them and without the ending."""

    @abstractmethod
    def digest(self) -> str:
        """Of what the set holds, wherever it lies: twelve digits."""

    def kind(self, index: int) -> str:
        """The ending of an image's name in lower case, without a dot; empty where that is not known."""
        return ""

    def largest_value(self, index: int) -> int | None:
        """The largest value of an image of 16 bits; None for one of 8, and for what cannot be read."""
        try:
            return largest_value(self.read(index))
        except OSError:
            return None

    def instead(self) -> str:
        """What to do about an image that cannot be read, for the end of a message."""
        return REPLACE

    def left_out(self) -> str:
        """Say what is left out of the set; empty where nothing is."""
        return ""

    def number_as(self, classes: Sequence[str]) -> None:
        """Take the numbers of `classes`, of which these are a part, as the classes' numbers."""
        places = np.array([classes.index(name) for name in self.classes])
        self.target, self.classes = places[self.target], tuple(classes)

    def identity(self) -> dict[str, str]:
        """Texts that tell it from another set: the classes with their numbers of images, and the digest."""
        counts = np.bincount(self.target, minlength=len(self.classes))
        classes = ", ".join(f"{name}: {count}" for name, count in zip(self.classes, counts, strict=True))
        return {"classes": classes, "files": self.digest()}


def short_digest(data: bytes | memoryview) -> str:
    """The first twelve digits of the data's SHA-256."""
    return hashlib.sha256(data).hexdigest()[:12]
