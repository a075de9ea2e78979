"""ImageNet as the challenge's archives: a tar of a tar per class, a tar of validation images, and the devkit.

Nothing is unpacked: images are read where they lie in the archives.
"""

from __future__ import annotations

import io
import os
import re
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from utils.data.images import Images, short_digest
from utils.data.shards.files import Files
from utils.data.shards.index import check_end
from utils.errors import UserError
from utils.text import printable, some_names

_META, _TRUTH = "data/meta.mat", "validation_ground_truth.txt"  # ends of names in the devkit
_NUMBER = re.compile(r"_(\d+)\.\w+$")


def archives_in(folder: Path) -> dict[str, Path]:
    """The archives in a folder by `train`, `val` and `devkit`; of each kind at most one, by the published names.

    Raises:
        UserError: two files are of one kind.
    """
    patterns = {
        "train": r".*img_train.*\.tar",
        "val": r".*img_val.*\.tar",
        "devkit": r".*devkit.*(\.tar\.gz|\.tgz|\.tar)",
    }
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        for kind, pattern in patterns.items():
            if re.fullmatch(pattern, path.name, re.IGNORECASE) and path.is_file():
                if kind in found:
                    raise UserError(
                        f"{folder} has two archives for {kind}, {found[kind].name} and {path.name}: keep one"
                    )
                found[kind] = path
    return found


def open_archives(found: dict[str, Path], folder: Path) -> dict[str, Images]:
    """The images of the challenge's archives; classes are WordNet's numbers, in their order.

    Raises:
        UserError: the devkit is missing, or does not fit the archives; an archive is damaged.
    """
    if "devkit" not in found:
        raise UserError(
            f"{folder} has no devkit (ILSVRC2012_devkit_t12.tar.gz), which says the classes: put it there"
        )
    names, truth = _devkit(found["devkit"])
    classes = tuple(sorted(names.values()))
    parts: dict[str, Images] = {}
    if "train" in found:
        parts["train"] = _training(found["train"], classes)
    if "val" in found:
        parts["val"] = _validation(found["val"], classes, names, truth)
    if not parts:
        raise UserError(
            f"{folder} has a devkit but no archive of images (ILSVRC2012_img_train.tar, ..._img_val.tar)"
        )
    return parts


class ArchiveImages(Images):
    """Images that lie uncompressed in an archive.

    Args:
        path: the archive.
        keys: names without endings.
        places: first byte and bytes of each, int64 [samples, 2].
        target: classes, int64 [samples].
        classes: their names.
    """

    def __init__(
        self, path: Path, keys: list[str], places: np.ndarray, target: np.ndarray, classes: tuple[str, ...]
    ) -> None:
        self.place, self.classes, self.target = path, classes, target
        self._keys = np.array([os.fsencode(key) for key in keys])
        self._places = places
        self._files = Files(path.parent)

    def read(self, index: int) -> bytes:
        start, size = map(int, self._places[index])
        data = self._files.read(Path(self.place).name, start, size)
        if len(data) != size:
            raise OSError(f"{self.place} is truncated")
        return data

    def key(self, index: int) -> str:
        return os.fsdecode(bytes(self._keys[index]))

    def name(self, index: int) -> str:
        return f"{self.place}: {self.key(index)}"

    def digest(self) -> str:
        return short_digest(self._keys.tobytes() + self._places.tobytes() + self.target.tobytes())


def _devkit(path: Path) -> tuple[dict[int, str], list[int]]:
    """The WordNet number of each class of the challenge by its number, and the numbers of the validation images."""
    try:
        with tarfile.open(path) as tar:
            members = {member.name: member for member in tar if member.isreg()}
            parts: dict[str, bytes] = {}
            for end in (_META, _TRUTH):
                names = [name for name in members if name.endswith(end)]
                if len(names) != 1:
                    raise UserError(
                        f"{path} has {len(names)} files {end}, not one: it is no devkit of the challenge"
                    )
                opened = tar.extractfile(members[names[0]])
                parts[end] = opened.read() if opened else b""
        synsets = _synsets(parts[_META])
        leaves = synsets[synsets["num_children"] == 0]
        names_by_number = {
            int(number): str(name)
            for number, name in zip(leaves["ILSVRC2012_ID"], leaves["WNID"], strict=True)
        }
        truth = [int(line) for line in parts[_TRUTH].split()]
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: no archive, or a damaged one ({error})") from error
    except (ValueError, KeyError, IndexError, TypeError, NotImplementedError) as error:
        raise UserError(f"{path}: {_META} or {_TRUTH} in it is damaged ({error})") from error
    if len(set(names_by_number.values())) != len(leaves) or len(names_by_number) != len(leaves):
        raise UserError(f"{path}: {_META} in it has a class twice")
    return names_by_number, truth


def _synsets(data: bytes) -> Any:
    """The record of classes in `meta.mat`. Raises `ValueError`, or `KeyError` without one."""
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        return loadmat(io.BytesIO(data), squeeze_me=True)["synsets"]
    except (MatReadError, zlib.error, OSError, EOFError) as error:
        raise ValueError(str(error)) from error


def _training(path: Path, classes: tuple[str, ...]) -> Images:
    """A tar that holds a tar for each class."""
    from tqdm import tqdm

    keys: list[str] = []
    places: list[tuple[int, int]] = []
    target: list[int] = []
    seen: list[str] = []
    try:
        with tarfile.open(path, "r:") as outer:
            for member in tqdm(outer, unit="class", total=len(classes), desc=path.name, disable=None):
                if not member.isreg() or not member.name.endswith(".tar"):
                    continue
                name = Path(member.name).stem
                if name not in classes:
                    raise UserError(
                        f"{path} has the class {printable(name)}, which the devkit does not know: use its devkit"
                    )
                seen.append(name)
                opened = outer.extractfile(member)
                assert opened is not None
                with tarfile.open(fileobj=opened, mode="r:") as inner:
                    for image in inner:
                        if image.isreg():
                            keys.append(f"{name}/{Path(image.name).stem}")
                            places.append((member.offset_data + image.offset_data, image.size))
                            target.append(classes.index(name))
                    check_end(inner, f"{path}: {printable(member.name)}")
            check_end(outer, str(path))
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{path}: no tar of tars, or a damaged one ({error}): fetch it again") from error
    if missing := [name for name in classes if name not in set(seen)]:
        raise UserError(
            f"{path} has no archive of {some_names(missing)}, which are in the devkit: use its devkit"
        )
    if len(set(seen)) != len(seen):
        raise UserError(f"{path} has a class twice")
    return ArchiveImages(
        path, keys, np.array(places, np.int64).reshape(-1, 2), np.array(target, np.int64), classes
    )


def _validation(path: Path, classes: tuple[str, ...], names: dict[int, str], truth: list[int]) -> Images:
    """A tar of images whose names end with their number from 1, in which the devkit says their classes."""
    keys: list[str] = []
    places: list[tuple[int, int]] = []
    target: list[int] = []
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isreg():
                    continue
                found = _NUMBER.search(member.name)
                if not found or not 1 <= int(found[1]) <= len(truth):
                    raise UserError(
                        f"{path}: the devkit has {len(truth)} validation images, and {printable(member.name)} is none "
                        "of them: use its devkit"
                    )
                number = truth[int(found[1]) - 1]
                if number not in names:
                    raise UserError(
                        f"the devkit says class {number} of {printable(member.name)}, and has no such class"
                    )
                keys.append(Path(member.name).stem)
                places.append((member.offset_data, member.size))
                target.append(classes.index(names[number]))
            check_end(tar, str(path))
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{path}: no tar file, or a damaged one ({error}): fetch it again") from error
    if len(set(keys)) != len(truth):
        raise UserError(
            f"{path} has {len(set(keys))} images, and the devkit says the classes of {len(truth)}: use its devkit"
        )
    return ArchiveImages(
        path, keys, np.array(places, np.int64).reshape(-1, 2), np.array(target, np.int64), classes
    )
