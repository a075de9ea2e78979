"""What tar files of images hold: where each image lies, its class, and the manifest beside them.

A sample is two members that follow each other: `KEY.jpg`, or another image, and `KEY.cls` with the number of its class
as text. This is the naming of WebDataset, which DALI reads too; other members of a sample are passed over.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO

import numpy as np

from utils.errors import UserError
from utils.text import printable

ENTRY = np.dtype([("offset", "<i8"), ("size", "<u4"), ("shard", "<u4"), ("label", "<i4"), ("kind", "S4")])
"""A sample: the image's first byte in its tar file and its bytes, the file's number, the class, the image's ending."""

KINDS = frozenset({"jpg", "jpeg", "png", "ppm", "bmp", "pgm", "tif", "tiff", "webp"})
"""Endings of members that are images."""

MANIFEST = "manifest.json"
UNFINISHED = "unfinished.json"  # beside shards that are being written
LABEL = "cls"
_VERSION = 1
MOST_CLASSES = 10**6  # larger numbers are no classes, but damage
_DIGITS = len(str(MOST_CLASSES)) - 1


def index_name(part: str) -> str:
    """The file that holds the entries of a part, `train` or `val`."""
    return f"{part}.index.npy"


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A tar file of a set.

    Attributes:
        file: its name, below the folder of the manifest.
        samples: how many it holds.
        bytes: its size.
        sha256: of all of it; empty where nobody has computed it.
    """

    file: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a folder of shards holds.

    Attributes:
        classes: names of the classes, in the order of their numbers.
        max_side: pixels of the longer side that larger images were reduced to; 0: all are as they were.
        quality: of JPEG, of reduced images; 0: there are none.
        parts: the shards of `train` and of `val`, in their order.
    """

    classes: tuple[str, ...]
    max_side: int = 0
    quality: int = 0
    parts: Mapping[str, tuple[Shard, ...]]

    def as_json(self) -> str:
        """The text of `manifest.json`."""
        return json.dumps({"version": _VERSION, **asdict(self)}, indent=1, ensure_ascii=False) + "\n"


def manifest_of(text: str | bytes, where: str) -> Manifest:
    """Read a manifest.

    Args:
        text: of the file.
        where: its name, for messages.

    Raises:
        UserError: it is no manifest, or one of a later version.
    """
    try:
        found = json.loads(text)
        if (version := found.pop("version")) != _VERSION:
            raise UserError(
                f"{where} has version {version}, and this program reads {_VERSION}: make the shards again"
            )
        parts = {
            name: tuple(Shard(**shard) for shard in shards) for name, shards in found.pop("parts").items()
        }
        manifest = Manifest(**{**found, "classes": tuple(found["classes"]), "parts": parts})
        _check(manifest)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{where} is damaged: make the shards again (tools.py --keyword make-shards)"
        ) from error
    return manifest


def _check(manifest: Manifest) -> None:
    """Raise `ValueError` for values that no manifest has."""
    shards = [shard for part in manifest.parts.values() for shard in part]
    files = [shard.file for shard in shards]
    numbers = [number for shard in shards for number in (shard.samples, shard.bytes)]
    texts = [*manifest.classes, *files, *(shard.sha256 for shard in shards)]
    if (
        not manifest.classes
        or not shards
        or not {"train", "val"} >= set(manifest.parts)
        or not all(isinstance(number, int) and number > 0 for number in numbers)
        or not all(isinstance(text, str) for text in texts)
        or len(set(files)) != len(files)
        or len(set(manifest.classes)) != len(manifest.classes)
        or any("/" in file or "\\" in file or not file.endswith(".tar") for file in files)
    ):
        raise ValueError("no manifest")


def scan(file: BinaryIO, name: str, shard: int = 0) -> np.ndarray:
    """Find the samples of a tar file by its headers; only these and the classes are read.

    Args:
        file: the tar file, which can seek.
        name: its name, for messages.
        shard: its number in the set.

    Returns:
        Its samples in their order, ENTRY [samples].

    Raises:
        UserError: no tar file, or a truncated one; a sample without a class or an image, or with two; a key that comes
            twice; no samples.
    """
    entries: list[tuple[int, int, int, int, bytes]] = []
    keys: set[str] = set()
    sample: dict[str, Any] = {}

    def end() -> None:
        if not sample:
            return
        key = printable(sample["key"])
        if sample["key"] in keys:
            raise UserError(f"{name}: {key} comes twice: a key is that of one sample")
        keys.add(sample["key"])
        for field, what in (("image", "no image"), ("label", f"no .{LABEL} with the number of its class")):
            if field not in sample:
                raise UserError(
                    f"{name}: {key} has {what}; a sample is KEY.jpg and KEY.{LABEL}, one behind the other"
                )
        entries.append((*sample["image"], shard, sample["label"], sample["kind"]))

    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                tar.members.clear()  # type: ignore[attr-defined]  # else it keeps all headers
                if not member.isreg():
                    continue
                key, kind = split(member.name)
                if kind != LABEL and kind not in KINDS:
                    continue
                if sample.get("key") != key:
                    end()
                    sample = {"key": key}
                if kind == LABEL:
                    _once(sample, "label", name, key)
                    opened = tar.extractfile(member)
                    sample["label"] = _label(opened.read(_DIGITS + 3) if opened else b"", name, key)
                else:
                    _once(sample, "image", name, key)
                    if member.size >= 2**32 or not member.size:
                        raise UserError(
                            f"{name}: {printable(member.name)} has {member.size} bytes, which is no image"
                        )
                    sample |= {"image": (member.offset_data, member.size), "kind": kind.encode()}
            end()
            check_end(tar, name)
    except (tarfile.TarError, EOFError) as error:
        raise UserError(
            f"{name}: no tar file, or a damaged one ({error}): write or fetch it again"
        ) from error
    if not entries:
        raise UserError(
            f"{name} has no samples: a sample is KEY.jpg and KEY.{LABEL}, one behind the other; tools.py --keyword "
            "make-shards reads other archives"
        )
    return np.array(entries, ENTRY)


def check_end(tar: tarfile.TarFile, name: str) -> None:
    """Raise `UserError` where what was read of a tar file to the last ends in something else than an empty block.

    `tarfile` stops without a word at a damaged header, and at the end of a file that has lost the rest.
    """
    file: Any = tar.fileobj
    file.seek(tar.offset)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise UserError(f"{name} is damaged or truncated at byte {tar.offset:,}: write or fetch it again")


def split(member: str) -> tuple[str, str]:
    """The key of a member's name and its ending, in lower case: what is before and behind the first dot of its file.

    Example:
        >>> from utils.data.shards.index import split
        >>> split("n01440764/n01440764_10026.JPEG")
        ('n01440764/n01440764_10026', 'jpeg')
    """
    folder, slash, file = member.rpartition("/")
    base, _, kind = file.partition(".")
    return f"{folder}{slash}{base}", kind.lower()


def _once(sample: Mapping[str, Any], field: str, name: str, key: str) -> None:
    if field in sample:
        raise UserError(
            f"{name}: {printable(key)} has two members that are its {'class' if field == 'label' else field}"
        )


def _label(text: bytes, name: str, key: str) -> int:
    digits = text.strip()
    if not digits.isdigit() or len(digits) > _DIGITS:
        shown = printable(digits.decode("latin1"))
        raise UserError(
            f"{name}: the class of {printable(key)} is {shown!r}, not a number below {MOST_CLASSES:,}"
        )
    return int(digits)


def samples_of(entries: np.ndarray, shards: int) -> list[int]:
    """How many samples each of so many tar files has."""
    return np.bincount(entries["shard"], minlength=shards).tolist()


def fits(entries: np.ndarray, sizes: Sequence[int]) -> bool:
    """Whether an array that was read from a file has samples that lie in tar files of these bytes."""
    if (
        entries.dtype != ENTRY
        or entries.ndim != 1
        or not len(entries)
        or entries["shard"].max() >= len(sizes)
    ):
        return False
    ends = entries["offset"] + entries["size"]
    return bool(
        entries["label"].min() >= 0
        and entries["offset"].min() >= tarfile.BLOCKSIZE
        and (ends <= np.array(sizes)[entries["shard"]]).all()
    )


def as_npy(entries: np.ndarray) -> memoryview:
    """The file of an index."""
    data = io.BytesIO()
    np.save(data, entries, allow_pickle=False)
    return data.getbuffer()


def check_entries(entries: np.ndarray, shards: Sequence[Shard], classes: int, where: str) -> np.ndarray:
    """Return entries that were read from a file, when they fit the shards. Raises `UserError` otherwise."""
    if (
        not fits(entries, [shard.bytes for shard in shards])
        or entries["label"].max() >= classes
        or samples_of(entries, len(shards)) != [shard.samples for shard in shards]
    ):
        raise UserError(f"{where} is damaged or belongs to other shards: make the shards again")
    return entries
