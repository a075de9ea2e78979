"""Images in tar files, read by offset."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import tarfile
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from utils.checkpoint.archive import write_atomic
from utils.data.images import Images, short_digest
from utils.data.shards.files import Files, url_of
from utils.data.shards.index import (
    MANIFEST,
    UNFINISHED,
    Manifest,
    Shard,
    check_entries,
    index_name,
    manifest_of,
    scan,
    split,
)
from utils.errors import UserError
from utils.text import some_names

PARTS = {"train": {"train", "training"}, "val": {"val", "valid", "validation", "test"}}
"""Parts of a set, and words of which one is in the names of its files where no manifest says so."""

HEADER = tarfile.BLOCKSIZE  # bytes before a member's data


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
        self._files = files
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
            read = self._files.read(self._shard(index), start, HEADER + size)
        except OSError as error:
            raise OSError(f"{self._shard(index)}: {error.strerror or error}") from error
        return read[:HEADER], read[HEADER:]

    def _shard(self, index: int) -> str:
        return self.shards[self._entries["shard"][index]].file

    def key(self, index: int) -> str:
        """Of the sample, as its member has it; its number where the shard cannot be read or the name is a long one."""
        with contextlib.suppress(OSError, tarfile.HeaderError):
            header, _ = self._member(index, 0)
            return split(tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name)[0]
        return str(index)

    def name(self, index: int) -> str:
        return f"{self._files.path(self._shard(index))}: {self.key(index)}.{self.kind(index)}"

    def kind(self, index: int) -> str:
        return self._entries["kind"][index].decode()

    def digest(self) -> str:
        """Of the images' places, sizes and classes."""
        return short_digest(np.ascontiguousarray(self._entries).view(np.uint8).data)


def is_pattern(root: Path | str) -> bool:
    """Whether a root names tar files, as `train-{000..127}.tar` does, and not a folder."""
    return str(root).endswith(".tar")


def is_shards(root: Path) -> bool:
    """Whether a root is a URL or pattern, or a folder with a manifest or tar files in it."""
    if url_of(root) or is_pattern(root):
        return True
    with contextlib.suppress(OSError):
        return (root / MANIFEST).is_file() or any(root.glob("*.tar"))
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
        ("val", val, "--val_batch_size 0 trains without"),
    ):
        if is_wanted and part not in found:
            raise UserError(f"--root {next(iter(found.values())).place} has no shards for {part}: {instead}")
    return found


def open_shards(root: Path | str, parts: Collection[str] = tuple(PARTS)) -> dict[str, ShardImages]:
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
                for part in PARTS
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
        entries = np.load(io.BytesIO(files.read(name)), allow_pickle=False)
    except FileNotFoundError as error:
        raise UserError(f"{files.path(name)} is missing: make the shards again") from error
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{files.path(name)} is damaged: make the shards again") from error
    entries = check_entries(entries, shards, len(manifest.classes), files.path(name))
    if files.url is None:  # a thousand questions to a server would take minutes; reading finds it there
        for shard in shards:
            _check_size(files, shard)
    return ShardImages(files, shards, entries, manifest.classes)


def _check_size(files: Files, shard: Shard) -> None:
    path = files.path(shard.file)
    try:
        size = files.size(shard.file)
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
    """The part that a file belongs to by the words of its name; empty where that is not clear.

    Example:
        >>> from utils.data.shards.images import part_of
        >>> part_of("imagenet-train-000012.tar"), part_of("validation/0.tar"), part_of("latest.tar")
        ('train', 'val', '')
    """
    found = [part for part, words in PARTS.items() if words & set(re.split(r"[^a-z]+", name.lower()))]
    return found[0] if len(found) == 1 else ""


def _without_manifest(files: Files, names: Sequence[str], parts: Collection[str]) -> dict[str, ShardImages]:
    unclear = [name for name in names if not part_of(name)]
    if unclear:
        raise UserError(
            f"{files.root}: {some_names(unclear)}: are these for training or for validation? write train or val into "
            "their names, or --keyword make-shards --from them"
        )
    found = {part: [name for name in names if part_of(name) == part] for part in PARTS if part in parts}
    indexed = {part: _indexed(files, of_part) for part, of_part in found.items() if of_part}
    if not indexed:
        raise UserError(f"{files.root} has no shards for {' or '.join(parts)}")
    classes = [str(n) for n in range(1 + max(int(entries["label"].max()) for _, entries in indexed.values()))]
    return {part: ShardImages(files, shards, entries, classes) for part, (shards, entries) in indexed.items()}


def _indexed(files: Files, names: Sequence[str]) -> tuple[list[Shard], np.ndarray]:
    """The shards and the entries of tar files without a manifest, from the cache where they have not changed."""
    from tqdm import tqdm

    shown = f"the shard {files.path(names[0])}"
    try:
        stamps = []
        for name in names:
            shown = f"the shard {files.path(name)}"
            stamps.append(f"{files.path(name)} {files.stamp(name)}")
        key = hashlib.sha256("\n".join(stamps).encode()).hexdigest()[:32]
        cached = cache_folder() / f"{key}.npy"
        entries = _cached(cached)
        if entries is None:
            parts = []
            for number, name in enumerate(tqdm(names, unit="shard", desc="reading headers", disable=None)):
                shown = f"the shard {files.path(name)}"
                parts.append(files.asked(partial(_scan, files, name, number)))
            entries = np.concatenate(parts)
            _keep(cached, entries)
        counts = np.bincount(entries["shard"], minlength=len(names))
        shards = []
        for name, count in zip(names, counts.tolist(), strict=True):
            shown = f"the shard {files.path(name)}"
            shards.append(Shard(file=name, samples=count, bytes=files.size(name), sha256=""))
    except OSError as error:
        raise UserError(f"{shown} cannot be read: {error.strerror or error}") from error
    return shards, check_entries(entries, shards, 2**31, str(cached))


def _scan(files: Files, name: str, number: int) -> np.ndarray:
    with files.open(name) as file:
        return scan(file, files.path(name), number)


def cache_folder() -> Path:
    """Where indexes of tar files without a manifest are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "lowbit" / "shards"


def _cached(path: Path) -> np.ndarray | None:
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None


def _keep(path: Path, entries: np.ndarray) -> None:
    """Keep an index for the next run; where that is not possible it is made anew each time."""
    data = io.BytesIO()
    np.save(data, entries, allow_pickle=False)
    with contextlib.suppress(UserError):
        write_atomic(path, data.getbuffer())
