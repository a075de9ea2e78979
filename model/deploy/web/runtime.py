"""onnxruntime-web, one version of it: fetched once from the package index of npm, checked, and kept in a cache."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import tarfile
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path

from utils.errors import UserError

VERSION = "1.30.0"
URL = f"https://registry.npmjs.org/onnxruntime-web/-/onnxruntime-web-{VERSION}.tgz"
INTEGRITY = (
    "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="  # SHA-512
)
# The build for WebAssembly alone, without WebGPU: the program, its loader, and the engine.
NAMES = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
PATIENCE = 60  # seconds without an answer


def archive_path() -> Path:
    """Where the package is kept: `$XDG_CACHE_HOME/lowbit`, or `~/.cache/lowbit`."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "lowbit" / URL.rpartition("/")[2]


def files() -> dict[str, bytes]:
    """The files that a page needs, by name.

    Raises:
        UserError: the package is not in the cache and cannot be fetched, or it is not the one that was published.
    """
    path = archive_path()
    by_hand = f"download {URL} where there is a network and put it at {path}"
    if not path.is_file():
        try:
            with urllib.request.urlopen(URL, timeout=PATIENCE) as answer:
                content = answer.read()
        except (OSError, HTTPException) as error:  # URLError and a time that is up are kinds of OSError
            reason = getattr(error, "reason", None) or error
            raise UserError(f"--to web: cannot fetch {URL} ({reason}); {by_hand}") from error
        _check(content, f"what {URL} answers", by_hand)
        _keep(content, path)
    else:
        content = path.read_bytes()
        _check(content, str(path), f"remove it, or {by_hand}")
    with tarfile.open(fileobj=io.BytesIO(content)) as package:
        return {name: _member(package, f"package/dist/{name}") for name in NAMES}


def _check(content: bytes, what: str, instead: str) -> None:
    if base64.b64encode(hashlib.sha512(content).digest()).decode() != INTEGRITY:
        raise UserError(f"--to web: {what} is not onnxruntime-web {VERSION}; {instead}")


def _keep(content: bytes, path: Path) -> None:
    """Put the package into the cache; where that cannot be written, it is fetched again the next time."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content)
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)


def _member(package: tarfile.TarFile, name: str) -> bytes:
    file = package.extractfile(name)
    assert file is not None  # the digest says which package it is
    return file.read()
