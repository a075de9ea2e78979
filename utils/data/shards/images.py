"""Images in tar files, read by offset."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import tarfile
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.lib.format import read_array

from utils.checkpoint.archive import write_atomic
from utils.data.image_file import is_8_bit_png, is_hidden
from utils.data.images import PARTS, Images, short_digest
from utils.data.lock import exclusive
from utils.data.shards.files import Files, is_pattern, url_of
from utils.data.shards.index import (
    MANIFEST,
    UNFINISHED,
    Manifest,
    Shard,
    as_npy,
    check_entries,
    fits,
    index_name,
    manifest_of,
    samples_of,
    scan,
    split,
)
from utils.errors import UserError
from utils.text import some_names

HEADER = tarfile.BLOCKSIZE  # bytes before a member's data
_VERSION = 1  # of the indexes in the cache


class ShardImages(Images):
    """The images of a part of a set of shards.

    Args:
        files: the folder.
        shards: the tar files.
        entries: the samples, ENTRY [samples].
        classes: names of the classes.
    """

    def __init__(
        self, files: Files, shards: Sequence[Shard], entries: np.ndarray, classes: Sequence[str]
    ) -> None:
        self.place = files.root
        self.shards = tuple(shards)
        self.classes = tuple(classes)
        self.target = entries["label"].astype(np.int64)
        self.files = files
        self._entries = entries

    def read(self, index: int) -> bytes:
        """As in `Images`; it also raises `OSError` where the shard is missing, shorter or another one than before."""
        header, data = self._member(index, int(self._entries["size"][index]))
        try:
            fits = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").size == len(data)
        except tarfile.HeaderError:
            fits = False
        if not fits or len(data) != self._entries["size"][index]:
            raise OSError(f"{self._shard(index)} has changed since its index was made, or is truncated")
        return data

    def _member(self, index: int, size: int) -> tuple[bytes, bytes]:
        """The header of an image's member, and its first bytes."""
        start = int(self._entries["offset"][index]) - HEADER
        try:
            read = self.files.read(self._shard(index), start, HEADER + size)
        except OSError as error:
            raise OSError(f"{self._shard(index)}: {error.strerror or error}") from error
        return read[:HEADER], read[HEADER:]

    def _shard(self, index: int) -> str:
        return self.shards[self._entries["shard"][index]].file

    def key(self, index: int) -> str:
        """Of the sample, as its member has it; its number where the shard cannot be read or the name is a long one."""
        with contextlib.suppress(OSError, tarfile.HeaderError):
            header, _ = self._member(index, 0)
            if header[99]:  # the field is full, and the whole name perhaps elsewhere
                return str(index)
            return split(tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name)[0]
        return str(index)

    def name(self, index: int) -> str:
        key = self.key(index) if self.files.url is None else str(index)  # which would be a request for each
        return f"{self.files.path(self._shard(index))}: {key}.{self.kind(index)}"

    def instead(self) -> str:
        return "fetch the shards again, or make them again without it"

    def largest_value(self, index: int) -> int | None:
        with contextlib.suppress(OSError):
            if is_8_bit_png(self._member(index, 25)[1]):
                return None
        return super().largest_value(index)

    def kind(self, index: int) -> str:
        return self._entries["kind"][index].decode()

    def part(self, chosen: np.ndarray) -> ShardImages:
        """Some of the images, bool [samples], with all classes and shards."""
        return ShardImages(self.files, self.shards, self._entries[chosen], self.classes)

    def places(self) -> list[bytes]:
        """The tar file of each image and where it begins there, which tells it from all others."""
        names = [os.fsencode(shard.file) for shard in self.shards]
        shards, offsets = self._entries["shard"].tolist(), self._entries["offset"].tolist()
        return [b"%s %d" % (names[shard], offset) for shard, offset in zip(shards, offsets, strict=True)]

    def digest(self) -> str:
        """Of the images' places, sizes and classes."""
        return short_digest(np.ascontiguousarray(self._entries).view(np.uint8).data)


def is_shards(root: Path) -> bool:
    """Whether a root is a URL or pattern, or a folder with a manifest or tar files in it."""
    if url_of(root) or is_pattern(root):
        return True
    with contextlib.suppress(OSError):
        if (root / MANIFEST).is_file():
            return True
        folders = [root / part for part in ("train", "val") if (root / part).is_dir()]
        if any(path.is_dir() and not is_hidden(path.name) for folder in folders for path in folder.iterdir()):
            return False  # class folders; a tar file beside them is something else
        return any(name.endswith(".tar") for name in Files(root).names())
    return False


def check_shards(root: Path, *, val: bool, train: bool) -> dict[str, ShardImages]:
    """Open the parts of a set that are wanted, and training images where they are; raises `UserError` as `open_shards`.

    Args:
        root: as for `open_shards`.
        val: whether validation images are wanted.
        train: whether training images must be there.
    """
    found = open_shards(root, [part for part, wanted in (("train", True), ("val", val)) if wanted])
    for part, is_wanted, instead in (
        ("train", train, "only --evaluate without --bn_batches needs none"),
        ("val", val, "--val_split 0.1 takes some of each class, --val_batch_size 0 trains without"),
    ):
        if is_wanted and part not in found:
            raise UserError(f"--root {next(iter(found.values())).place} has no shards for {part}: {instead}")
    return found


def open_shards(root: Path | str, parts: Collection[str] = ("train", "val")) -> dict[str, ShardImages]:
    """Open the parts of a set that it has.

    A folder or URL that `make-shards` has written has a manifest and an index. Other tar files are read once by their
    headers; what they hold is kept in the user's folder of caches.

    Args:
        root: folder or URL; or the names of tar files, with `{000..127}` or `{a,b}` in them.
        parts: `train`, `val` or both.

    Raises:
        UserError: nothing is there, something is missing, truncated, damaged or has changed.
    """
    root = Path(root)
    if is_pattern(root):
        files, names = _expanded(root)
    else:
        files = Files(root)
        text = _manifest_text(files)
        if text is not None:
            manifest = manifest_of(text, files.path(MANIFEST))
            return {
                part: _with_manifest(files, manifest, part)
                for part in ("train", "val")
                if part in parts and part in manifest.parts
            }
        if files.url is None and (root / UNFINISHED).exists():
            raise UserError(f"--root {root} is not finished: call make-shards again, which goes on with it")
        if files.url:
            raise UserError(
                f"--root {files.url}: there is no {MANIFEST}, which make-shards writes; for other shards write their "
                "names, as in https://.../train-{000..127}.tar"
            )
        try:
            names = [name for name in files.names() if name.endswith(".tar")]
        except OSError as error:
            raise UserError(f"--root {root}: {error.strerror}: name a folder of shards") from error
        if not names:
            raise UserError(
                f"--root {root} has neither {MANIFEST} nor tar files: name a folder that make-shards has "
                "written, or write --dataset imagenet for a folder with train/ and val/"
            )
    return _without_manifest(files, names, parts)


def _manifest_text(files: Files) -> bytes | None:
    try:
        return files.read(MANIFEST)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"--root {files.root} cannot be read: {error.strerror or error}") from error


def _with_manifest(files: Files, manifest: Manifest, part: str) -> ShardImages:
    shards, name = manifest.parts[part], index_name(part)
    try:
        entries = read_array(io.BytesIO(files.read(name)), allow_pickle=False)
    except FileNotFoundError as error:
        raise UserError(f"{files.path(name)} is missing: make the shards again") from error
    except OSError as error:
        raise UserError(f"{files.path(name)} cannot be read: {error.strerror or error}") from error
    except (ValueError, EOFError, MemoryError) as error:
        raise UserError(f"{files.path(name)} is damaged: make the shards again") from error
    entries = check_entries(entries, shards, len(manifest.classes), files.path(name))
    if files.url is None:
        for shard in shards:
            _check_size(files, shard)
    else:  # a thousand questions to a server would take minutes: one, and reading finds the rest
        try:
            files.read(shards[0].file, 0, HEADER)
        except OSError as error:
            where = files.path(shards[0].file)
            raise UserError(f"the shard {where} cannot be read: {error.strerror or error}") from error
    return ShardImages(files, shards, entries, manifest.classes)


def _check_size(files: Files, shard: Shard) -> None:
    path = files.path(shard.file)
    try:
        size, _ = files.facts(shard.file)
    except OSError as error:
        raise UserError(
            f"the shard {path} cannot be read ({error.strerror}): fetch it or make the shards again"
        ) from error
    if size != shard.bytes:
        what = "is truncated" if size < shard.bytes else "has changed"
        raise UserError(
            f"the shard {path} {what}: {size} bytes instead of {shard.bytes}; fetch it or make the shards again"
        )


def _expanded(root: Path | str) -> tuple[Files, list[str]]:
    """The folder and the names of tar files that a pattern stands for."""
    try:
        from braceexpand import UnbalancedBracesError, braceexpand  # pyright: ignore[reportAttributeAccessIssue]
    except ImportError as error:
        raise UserError(
            f"--root {root}: names with braces need braceexpand: pip install braceexpand"
        ) from error

    try:
        paths = sorted(set(braceexpand(url_of(root) or str(root))))
    except UnbalancedBracesError as error:
        raise UserError(f"--root {root}: {error}") from error
    folder, slash, _ = os.path.commonprefix(paths).rpartition("/")  # noqa: RUF071
    base = folder or slash or "."
    return Files(base), [path[len(folder + slash) :] for path in paths]


def part_of(name: str) -> str:
    """The part that a file belongs to by the words of its name: train, val or test; empty where that is not clear.

    Example:
        >>> from utils.data.shards.images import part_of
        >>> part_of("imagenet-train-000012.tar"), part_of("validation/0.tar"), part_of("latest.tar")
        ('train', 'val', '')
    """
    found = [part for part, words in PARTS.items() if words & set(re.split(r"[^a-z]+", name.lower()))]
    return found[0] if len(found) == 1 else ""


def sorted_into_parts(names: Sequence[str], where: Path | str) -> dict[str, list[str]]:
    """Names of files, or words, by `train` and `val`; those of `test` are `val` where there are no others.

    Raises:
        UserError: a name does not say what it is for, or there are both.
    """
    if unclear := [name for name in names if not part_of(name)]:
        raise UserError(
            f"{where}: {some_names(unclear)}: for training or for validation? train, val or test must be in the name"
        )
    found = {part: [name for name in names if part_of(name) == part] for part in PARTS}
    if found["val"] and found["test"]:
        raise UserError(
            f"{where} has images for val and for test, {some_names(found['test'])}: keep one of the two there"
        )
    parts = {"train": found["train"], "val": found["val"] or found["test"]}
    return {part: of_part for part, of_part in parts.items() if of_part}


def _without_manifest(files: Files, names: Sequence[str], parts: Collection[str]) -> dict[str, ShardImages]:
    found = sorted_into_parts(names, files.root)
    indexed = {part: _indexed(files, of_part) for part, of_part in found.items() if part in parts}
    if not indexed:
        raise UserError(f"{files.root} has no shards for {' or '.join(parts)}")
    classes = [str(n) for n in range(1 + max(int(entries["label"].max()) for _, entries in indexed.values()))]
    return {part: ShardImages(files, shards, entries, classes) for part, (shards, entries) in indexed.items()}


def _indexed(files: Files, names: Sequence[str]) -> tuple[list[Shard], np.ndarray]:
    """The shards and the entries of tar files without a manifest, from the cache where they have not changed."""
    from tqdm import tqdm

    shown = ""
    try:
        sizes, stamps = [], []
        for name in names:
            shown = f"the shard {files.path(name)}"
            size, stamp = files.facts(name)
            sizes.append(size)
            stamps.append(f"{files.path(name)} {stamp}")
        key = hashlib.sha256("\n".join(stamps).encode()).hexdigest()[:32]
        with _one_index(key) as cached:
            entries = _cached(cached)
            if entries is None or not fits(entries, sizes):
                parts = []
                for number, name in enumerate(
                    tqdm(names, unit="shard", desc="reading headers", disable=None)
                ):
                    shown = f"the shard {files.path(name)}"
                    parts.append(files.asked(partial(_scan, files, name, number)))
                entries = np.concatenate(parts)
                _keep(cached, entries)
    except OSError as error:
        raise UserError(f"{shown} cannot be read: {error.strerror or error}") from error
    counts = samples_of(entries, len(names))
    shards = [
        Shard(file=name, samples=count, bytes=size, sha256="")
        for name, count, size in zip(names, counts, sizes, strict=True)
    ]
    return shards, entries


def _scan(files: Files, name: str, number: int) -> np.ndarray:
    with files.open(name) as file:
        return scan(file, files.path(name), number)


def cache_folder() -> Path | None:
    """Where indexes of tar files without a manifest are kept; None for a user without a home."""
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:
        return None
    return Path(base) / "lowbit" / "shards"


@contextlib.contextmanager
def _one_index(key: str) -> Iterator[Path | None]:
    """The file of an index in the cache, which one process of a machine makes while others wait; None without one."""
    folder = cache_folder()
    if folder is not None:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
    if folder is None or not os.path.isdir(folder):  # which is no error where it cannot be entered
        yield None
        return
    with exclusive(folder, f".{key}.lock"):
        yield folder / f"{_VERSION}-{key}.npy"


def _cached(path: Path | None) -> np.ndarray | None:
    try:
        if path is None:
            return None
        with path.open("rb") as file:
            return read_array(file, allow_pickle=False)
    except (OSError, ValueError, EOFError, MemoryError):
        return None


def _keep(path: Path | None, entries: np.ndarray) -> None:
    """Keep an index for the next run; where that is not possible it is made anew each time."""
    if path is None:
        return
    with contextlib.suppress(UserError):
        write_atomic(path, as_npy(entries))
