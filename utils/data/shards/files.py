"""Files of a folder on this machine, or of a URL that fsspec can open, read in parts."""

from __future__ import annotations

import functools
import io
import os
import re
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

from utils.data.image_file import is_hidden
from utils.errors import UserError

T = TypeVar("T")
_STAMPS = ("size", "ETag", "etag", "LastModified", "mtime", "created")  # what servers say of a file

_OPEN = (
    resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2
)  # files of one process that stay open, of those it may


def url_of(root: Path | str) -> str | None:
    """The URL that a root is, with both of its slashes, of which a `Path` keeps one; None for a path of this machine.

    Example:
        >>> from pathlib import Path
        >>> from utils.data.shards.files import url_of
        >>> url_of(Path("https://example.org/photos")), url_of("photos/train")
        ('https://example.org/photos', None)
    """
    found = re.fullmatch(r"([A-Za-z][A-Za-z0-9+.-]+):(/+)(.+)", str(root))
    if not found:
        return None
    slashes = "///" if found[1] == "file" else "//" if len(found[2]) == 1 else found[2]
    return f"{found[1]}:{slashes}{found[3]}"


def is_pattern(root: Path | str) -> bool:
    """Whether a root names tar files, as `train-{000..127}.tar` does, and not a folder."""
    return str(root).endswith(".tar")


class Files:
    """Files below a folder or URL. It can be sent to other processes.

    Args:
        root: the folder, or the URL of one.

    Raises:
        UserError: fsspec does not know the URL's protocol, or what it needs for it is not installed.
    """

    def __init__(self, root: Path | str) -> None:
        self.url = url_of(root)
        self.root = self.url or Path(root)
        self._opened: Callable[[str], _Opened] | None = None
        self._system: Any = None
        if self.url is not None:
            self._connect()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": None, "_system": None}  # what is open belongs to one process

    def path(self, name: str) -> str:
        """The whole name of a file."""
        return os.path.join(self.root, name) if self.url is None else f"{self.url.rstrip('/')}/{name}"

    def read(self, name: str, start: int = 0, size: int | None = None) -> bytes:
        """Read a part of a file, or all of it; less where it ends before. Raises `OSError`."""
        if self.url is not None:
            end = None if size is None else start + size
            data = self.asked(lambda: self._connect().cat_file(self.path(name), start=start, end=end))
            if size is not None and len(data) > size:  # findings/fsspec-http-ranges.sh
                raise OSError(
                    "the server sends a whole file when it is asked for a part, so that nothing can be read here"
                )
            return data
        if size is None:
            return Path(self.path(name)).read_bytes()[start:]
        if self._opened is None:
            self._opened = functools.lru_cache(_OPEN)(_Opened)
        return self._opened(self.path(name)).read(start, size)

    def open(self, name: str) -> io.BufferedReader:
        """Open a file, which can seek. Raises `OSError`."""
        if self.url is not None:
            return cast(io.BufferedReader, self.asked(lambda: self._connect().open(self.path(name), "rb")))
        return open(self.path(name), "rb")

    def facts(self, name: str) -> tuple[int, str]:
        """The bytes of a file, and text that changes with its content, by its time or what the server says.

        Raises `OSError`, also where the server does not tell the size.
        """
        if self.url is None:
            found = os.stat(self.path(name))
            return found.st_size, f"{found.st_size} {found.st_mtime_ns}"
        info = self.asked(lambda: self._connect().info(self.path(name)))
        if (size := info.get("size")) is None:
            raise OSError("the server does not tell its size")
        return size, repr([info.get(field) for field in _STAMPS])

    def names(self) -> list[str]:
        """Names of the files in the folder and in the folders in it, sorted, without hidden ones. Raises `OSError`."""
        here = _visible(self.root)
        below = [entry for folder in here if folder.is_dir() for entry in _visible(folder.path)]
        return sorted(os.path.relpath(entry, self.root) for entry in (*here, *below) if entry.is_file())

    def asked(self, ask: Callable[[], T]) -> T:
        """What a server or the disk answers. Raises `OSError`, also for what servers' own libraries raise."""
        try:
            return ask()
        except (OSError, UserError):
            raise
        except Exception as error:
            raise OSError(f"{type(error).__name__}: {' '.join(str(error).split())}") from error

    def _connect(self) -> Any:
        if self._system is None:
            import fsspec

            try:
                self._system = fsspec.url_to_fs(self.url)[0]
            except (ImportError, ValueError) as error:
                raise UserError(f"--root {self.root}: {error}") from error
        return self._system


def _visible(folder: Path | str) -> list[os.DirEntry[str]]:
    """What is in a folder, without hidden files; of a million names it asks the disk for nothing more."""
    with os.scandir(folder) as entries:
        return [entry for entry in entries if not is_hidden(entry.name)]


class _Opened:
    """A file that is read by several threads, and closed when nobody has it any more."""

    def __init__(self, path: str) -> None:
        self._number: int | None = None
        self._number = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))

    def __del__(self) -> None:
        if self._number is not None:
            os.close(self._number)

    def read(self, start: int, size: int) -> bytes:
        assert self._number is not None
        return os.pread(self._number, size, start)
