"""The images that the word predict is given: files, folders of them, and sets that know the classes of their images."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from utils.errors import UserError
from utils.text import printable


@dataclass(frozen=True, kw_only=True)
class Given:
    """An image.

    Attributes:
        name: where it lies.
        label: its class in its set, or the name of the folder that a file lies in, which may be no class.
        file: the path, or the bytes; raises `OSError`.
    """

    name: str
    label: str
    file: Callable[[], str | bytes]


def given_images(places: Sequence[Path]) -> list[Given]:
    """The images named, those below the folders named, as the data sets list them, and those of shards and tables.

    Of a set with images for training and for validation, the latter.

    Raises:
        UserError: there is no such file, or no image in a folder; a faulty set.
    """
    from utils.data.shards.files import is_pattern, url_of

    found: list[Given] = []
    for place in places:
        if url_of(place) or is_pattern(place):
            found += _of_set(place)
        elif not os.path.lexists(place):
            raise UserError(
                f"{place}: no such file or folder; name images, or folders, shards or tables of them"
            )
        elif not place.is_dir():
            is_table = place.suffix.lower() in (".csv", ".parquet")
            found += _of_set(place) if is_table else [_of_file(place)]
        elif below := _images_below(place):
            found += map(_of_file, sorted(below))
        elif _is_shards(place) or any(place.glob("*.parquet")):
            found += _of_set(place)
        else:
            raise UserError(f"{place} has no image in it or in a folder below it, no shards and no tables")
    return found


def _is_shards(folder: Path) -> bool:
    from utils.data.shards.images import is_shards  # imports torch

    return is_shards(folder)


def _images_below(folder: Path) -> list[Path]:
    from torchvision.datasets.folder import is_image_file  # imports torch

    from utils.data.image_file import walk

    return [Path(place, name) for place, names in walk(folder) for name in names if is_image_file(name)]


def numbers_of(given: Sequence[Given], classes: Sequence[str], wanted: str) -> dict[str, int]:
    """The numbers of classes; raises `UserError`, which begins with `wanted`, where a label is no class."""
    numbers = {name: number for number, name in enumerate(classes)}
    for one in given:
        if one.label not in numbers:
            raise UserError(
                f"{wanted}: the class of {printable(one.name)} is not known: images must lie in folders that are named "
                "by the network's classes, or in shards or a table of these classes"
            )
    return numbers


def _of_file(path: Path) -> Given:
    return Given(
        name=str(path),
        label=os.path.basename(os.path.dirname(os.path.abspath(path))),
        file=partial(str, path),
    )


def _of_set(place: Path) -> Iterator[Given]:
    from utils.data.shards.origin import open_origin

    parts = open_origin(place)
    images = parts.get("val") or parts["train"]
    for i in range(len(images)):
        yield Given(name=images.name(i), label=images.classes[images.target[i]], file=partial(images.read, i))
