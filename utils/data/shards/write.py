"""Writing a set of shards, a tar file at a time, so that an interrupted writing goes on where it ended."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import tarfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from utils.checkpoint.archive import atomic, write_atomic
from utils.data.image_file import (
    DECODE_ERRORS,
    PLAIN,
    decode,
    has_16_bits,
    parse,
    reason_of,
    stored_size,
    values_of,
)
from utils.data.images import Images
from utils.data.lock import exclusive
from utils.data.shards.index import LABEL, MANIFEST, UNFINISHED, Manifest, Shard, as_npy, index_name, scan
from utils.errors import UserError
from utils.text import printable, some_names

_ORDER = 0  # seed of the order of training images in the shards
_KEY = 80  # characters of a key at most: longer member names need headers that not all readers know
_KINDS = {
    "JPEG": "jpg", "MPO": "jpg", "PNG": "png", "BMP": "bmp", "PPM": "ppm", "TIFF": "tiff", "WEBP": "webp",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Reduction:
    """Larger images are written at this size, as JPEG.

    Attributes:
        max_side: pixels of the longer side.
        quality: of JPEG, 1 to 100.
    """

    max_side: int
    quality: int


def reduced(data: bytes, to: Reduction) -> bytes:
    """An image whose longer side is not above `to.max_side`: the same file, or a JPEG, upright, grey if it was grey.

    Images of 16 bits stay as they are. Raises DECODE_ERRORS.
    """
    with parse(data) as image:
        if max(stored_size(image)) <= to.max_side or has_16_bits(image):
            return data
        grey = image.mode in ("1", "L", "LA")
    pixels = decode(data, PLAIN)
    scale = to.max_side / max(pixels.size)
    size = tuple(max(1, round(side * scale)) for side in pixels.size)
    smaller = pixels.resize((size[0], size[1]), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    (smaller.convert("L") if grey else smaller).save(file, "JPEG", quality=to.quality)
    return file.getvalue()


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def write_set(
    parts: Mapping[str, Images],
    folder: Path,
    *,
    per_shard: int,
    reduction: Reduction | None,
    threads: int,
    force: bool,
    progress: Callable[[int], object] = lambda _: None,
) -> Manifest:
    """Write the shards of a set, their index, and at last the manifest, without which it is not finished.

    Training images are in an order of their own, which is always the same, for readers that shuffle little;
    others as they come. The same call goes on with what an interrupted one has left. What the folder held before stays
    as it was until all of the new set is written, into a folder inside it.

    Args:
        parts: images of `train`, of `val` or of both, with the same classes.
        folder: where to; made if it is missing.
        per_shard: images of a tar file.
        reduction: what happens to large images; None: all are written as they are.
        threads: that read and reduce images.
        force: whether to write over another set.
        progress: called with the number of images that are done.

    Raises:
        UserError: `folder` holds something else, or another process writes into it; an image cannot be read; a class is
            missing in a part; no space.
    """
    for images in parts.values():
        source = Path(str(images.place).removeprefix("file://"))
        if folder.resolve() in (place := source.resolve(), *place.parents):
            raise UserError(
                f"--to {folder} holds the images that are read, {images.place}: name another folder"
            )
    classes = _classes(parts)
    wanted = {
        "parts": {name: images.identity() for name, images in parts.items()},
        "per_shard": per_shard,
        "reduction": None if reduction is None else asdict(reduction),
    }
    with _alone(folder):
        place = _begin(folder, json.dumps(wanted, indent=1) + "\n", force)
        try:
            written = _write_parts(parts, place, per_shard, reduction, threads, progress)
        except BaseException:
            _leave(place)
            raise
        manifest = Manifest(
            classes=classes,
            max_side=reduction.max_side if reduction else 0,
            quality=reduction.quality if reduction else 0,
            parts=written,
        )
        write_atomic(place / MANIFEST, manifest.as_json().encode())
        if place != folder:
            _move(place, folder)
        (folder / UNFINISHED).unlink()
    return manifest


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Make the folder, and hold its lock where the file system has locks; a second process is refused."""
    if os.path.lexists(folder) and not folder.is_dir():
        raise UserError(f"--to {folder} is no folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--to {folder} cannot be made ({reason_of(error)}): name another folder") from error
    with exclusive(folder, None) as mine:
        if not mine:
            raise UserError(
                f"another process writes shards into {folder}: wait for it, or name another folder"
            )
        yield


def _write_parts(
    parts: Mapping[str, Images],
    folder: Path,
    per_shard: int,
    reduction: Reduction | None,
    threads: int,
    progress: Callable[[int], object],
) -> dict[str, tuple[Shard, ...]]:
    """Write the shards that are not there yet, and the index of all."""
    written: dict[str, tuple[Shard, ...]] = {}
    with ThreadPoolExecutor(threads) as pool:
        for part, images in parts.items():
            shards, entries = [], []
            order = _order(images, part)
            for number, first in enumerate(range(0, len(order), per_shard)):
                chosen = order[first : first + per_shard]
                path = folder / f"{part}-{number:06}.tar"
                if not path.exists():
                    samples = _samples(images, chosen, reduction, pool)
                    _write(path, samples, progress)
                else:
                    progress(len(chosen))
                with path.open("rb") as file:
                    found = scan(file, str(path), number)
                    if len(found) != len(chosen):
                        raise UserError(
                            f"{path} is no shard of this set: remove it and call make-shards again"
                        )
                    file.seek(0)
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                shards.append(
                    Shard(file=path.name, samples=len(found), bytes=path.stat().st_size, sha256=digest)
                )
                entries.append(found)
            write_atomic(folder / index_name(part), as_npy(np.concatenate(entries)))
            written[part] = tuple(shards)
    return written


def _leave(folder: Path) -> None:
    """Leave nothing behind where no shard has been written."""
    if not any(_OURS.fullmatch(path.name) for path in folder.iterdir()):
        (folder / UNFINISHED).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # something else is in it
            folder.rmdir()


def _classes(parts: Mapping[str, Images]) -> tuple[str, ...]:
    """The classes of all parts; raises `UserError` where they are not the same."""
    first, *others = parts.values()
    for other in others:
        if other.classes != first.classes:
            differing = set(other.classes) ^ set(first.classes)
            raise UserError(
                f"train and val have different classes: {some_names(sorted(differing))} must be in both"
            )
    for part, images in parts.items():
        counts = np.bincount(images.target, minlength=len(images.classes))
        if missing := [name for name, count in zip(images.classes, counts, strict=True) if not count]:
            raise UserError(
                f"{part} has no image of {some_names(missing)}: every class needs one in each part"
            )
    return first.classes


def _begin(folder: Path, wanted: str, force: bool) -> Path:
    """Make the folder ready for the shards of a set, or go on with it; returns where they are to be written."""
    present = sorted(path.name for path in folder.iterdir() if not _LEFT.fullmatch(path.name))
    if MANIFEST in present and not force:
        raise UserError(f"{folder / MANIFEST} exists: the shards are made; --force makes them again")
    if present and UNFINISHED not in present and not force:
        raise UserError(f"--to {folder} is not empty ({some_names(present)}): name a new folder")
    replaces = _NEW in present or MANIFEST in present or (present and UNFINISHED not in present)
    place = folder / _NEW if replaces else folder
    unfinished = place / UNFINISHED
    foreign = not place.is_dir() or (any(place.iterdir()) and not unfinished.exists())
    if replaces and os.path.lexists(place) and foreign:
        raise UserError(f"{place} is in the way of the new shards: move it away")
    if unfinished.exists() and unfinished.read_bytes() != wanted.encode():
        if not force:
            raise UserError(
                f"{folder} holds unfinished shards of other images or options; --force begins anew"
            )
        _remove_set(place)
    if place.exists():
        for left in place.iterdir():
            if _LEFT.fullmatch(left.name):  # of a process that was killed
                left.unlink()
    write_atomic(unfinished, wanted.encode())
    return place


def _move(new: Path, folder: Path) -> None:
    """Put a whole set into the place of another one.

    Where this is interrupted nothing reads the folder, and the same call of `write_set` goes on in `new`.
    """
    write_atomic(folder / UNFINISHED, b"moving\n")  # as of no set: what is in the folder belongs to two
    _remove_set(folder)
    try:
        for name in reversed(_names_of_set(new)):  # the manifest at last
            os.replace(new / name, folder / name)
        (new / UNFINISHED).unlink()
        with contextlib.suppress(OSError):  # something else is in it
            new.rmdir()
    except OSError as error:
        raise UserError(
            f"{new} cannot be moved into {folder} ({reason_of(error)}): call make-shards again"
        ) from error


def _remove_set(folder: Path) -> None:
    for name in _names_of_set(folder):
        try:
            (folder / name).unlink()
        except OSError as error:
            raise UserError(
                f"{folder / name} cannot be removed ({reason_of(error)}): name another folder"
            ) from error


def _names_of_set(folder: Path) -> list[str]:
    """The files of a set in a folder, its manifest first."""
    return sorted(
        (path.name for path in folder.iterdir() if path.name == MANIFEST or _OURS.fullmatch(path.name)),
        key=lambda name: (name != MANIFEST, name),
    )


_NEW = ".unfinished"  # the folder of a set that is to replace another one
_OURS = re.compile(r"(train|val)(-\d{6}\.tar|\.index\.npy)")
_LEFT = re.compile(rf"\.({MANIFEST}|{UNFINISHED}|{_OURS.pattern})\.\d+\.tmp")


def _order(images: Images, part: str) -> np.ndarray:
    """The numbers of the images as they are written, int64 [samples]."""
    if part == "train" and images.any_order:
        return np.random.default_rng(_ORDER).permutation(len(images))
    return np.arange(len(images))


Sample = tuple[str, str, int, bytes]  # key, ending, class, file


def _samples(
    images: Images, numbers: np.ndarray, reduction: Reduction | None, pool: ThreadPoolExecutor
) -> Iterator[Sample]:
    """Read and reduce images some ahead of what is written."""

    def sample(number: int) -> Sample:
        try:
            data = images.read(number)
            if reduction is not None:
                data = reduced(data, reduction)
            with parse(data) as image:
                kind = _KINDS.get(str(image.format), "")
                if not kind:  # GIF and JPEG 2000, which not all readers of shards know
                    deep = has_16_bits(image)
                    pixels = Image.fromarray(values_of(image, data)) if deep else decode(data, PLAIN)
                    data, kind = _png(pixels), "png"
        except DECODE_ERRORS as error:
            raise UserError(
                f"cannot read the image {printable(images.name(number))} ({reason_of(error)}): replace or remove it; "
                "once it is removed, --force begins the shards anew"
            ) from error
        return images.key(number), kind, int(images.target[number]), data

    waiting: deque[Future[Sample]] = deque()
    remaining = iter(numbers.tolist())
    while True:
        while len(waiting) < 64 and (number := next(remaining, None)) is not None:
            waiting.append(pool.submit(sample, number))
        if not waiting:
            return
        yield waiting.popleft().result()


def _write(path: Path, samples: Iterator[Sample], progress: Callable[[int], object]) -> None:
    """Write a shard."""
    used: set[str] = set()
    with atomic(path) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key, kind, label, data in samples:
            key = _free(re.sub(r"[^A-Za-z0-9_/-]+", "_", key)[-_KEY:].strip("/") or "image", used)
            _add(tar, f"{key}.{kind}", data)
            _add(tar, f"{key}.{LABEL}", str(label).encode())
            progress(1)


def _free(key: str, used: set[str]) -> str:
    """The key, with a number where the shard has it already."""
    chosen, number = key, 1
    while chosen in used:
        number += 1
        chosen = f"{key}-{number}"
    used.add(chosen)
    return chosen


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # of no time and no owner: the same images make the same bytes
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
