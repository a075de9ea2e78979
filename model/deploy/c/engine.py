"""Running a C header with the C compiler of the machine."""

from __future__ import annotations

import ctypes
import json
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from model.deploy.codes import Array
from model.deploy.runner import BaseRunner, read_numbers
from utils.checkpoint.exported import C_MARK
from utils.errors import UserError

COMPILERS = ("cc", "gcc", "clang")
PROGRAM = """\
#include <stddef.h>
static float *watched;
static int watching;
#define LOWBIT_WATCH(values, count, scale) \\
    if (watching) for (int w_ = 0; w_ < (count); ++w_) *watched++ = (float)(values)[w_] * (scale);
#include "network.h"
#if !({expected})
#error the first line and the loops have other sizes
#endif
void run(const float *images, int count, float *logits, float *values) {{
    watched = values, watching = values != NULL;
    const size_t size = (size_t)LOWBIT_CHANNELS * LOWBIT_HEIGHT * LOWBIT_WIDTH;
    for (size_t i = 0; i < (size_t)count; ++i) lowbit_run(images + i * size, logits + i * LOWBIT_CLASSES);
}}
"""


def compiler() -> list[str]:
    """The C compiler: that of the environment's CC, or one that is installed; raises UserError where there is none."""
    given = shlex.split(os.environ.get("CC", ""))
    for name, *options in [given] if given else [[name] for name in COMPILERS]:
        if found := shutil.which(name):
            return [found, *options]
    if given:
        raise UserError(f"CC={given[0]}: no such program; name a C compiler, or unset CC")
    raise UserError("no C compiler is installed: install gcc or clang, or name one in the environment's CC")


@dataclass(frozen=True, kw_only=True)
class Description:
    """What the first line of a header says.

    Attributes:
        shape: of an image, channels first.
        classes: number of logits.
        quantizers: shapes of the quantizers of activations, by name, without the batch.
        integer: products of codes.
        layers: all products.
        texts: what travels in each exported file.
    """

    shape: tuple[int, ...]
    classes: int
    quantizers: dict[str, tuple[int, ...]]
    integer: int
    layers: int
    texts: dict[str, str]


def read_description(path: Path) -> Description:
    """What a header says of itself.

    Raises:
        UserError: the file is missing or damaged, or no header that export has written.
    """
    try:
        with path.open(encoding="utf-8") as file:
            first = file.readline()
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a header: {error}") from error
    try:
        found = json.loads(first.removeprefix(C_MARK)) if first.startswith(C_MARK) else {}
        sizes = {str(name): tuple(map(int, shape))[1:] for name, shape in found["quantizers"].items()}
        texts = found["texts"]
        shape = tuple(map(int, found["shape"]))
        if not all(isinstance(text, str) for text in texts.values()) or len(shape) != 3:
            raise ValueError
        numbers = [int(found[name]) for name in ("classes", "integer", "layers")]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise UserError(f"{path}: not a header that export --to c has written, or a damaged one") from None
    return Description(
        shape=shape, classes=numbers[0], quantizers=sizes, integer=numbers[1], layers=numbers[2], texts=texts
    )


def build(path: Path, library: Path, command: Sequence[str]) -> None:
    """Compile a header to a shared library with the function `run` of `PROGRAM`.

    Raises:
        UserError: the compiler does not take it.
    """
    described = read_description(path)
    sizes = zip(
        ("CHANNELS", "HEIGHT", "WIDTH", "CLASSES"), (*described.shape, described.classes), strict=True
    )
    expected = [f"LOWBIT_{name} == {size}" for name, size in sizes]
    expected.append(f"LOWBIT_WATCHED == {sum(prod(size) for size in described.quantizers.values())}")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "network.c"
        shutil.copyfile(path, Path(folder) / "network.h")
        source.write_text(PROGRAM.format(expected=" && ".join(expected)), "utf-8")
        # Without contraction, products are rounded before they are added, as the file says.
        flags = ["-std=c99", "-O2", "-ffp-contract=off", "-fPIC", "-shared"]
        done = subprocess.run(
            [*command, *flags, str(source), "-o", str(library), "-lm"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    if done.returncode != 0:
        said = next(
            (line for line in done.stderr.splitlines() if "error" in line), f"exit status {done.returncode}"
        )
        raise UserError(f"{path}: the compiler does not take it: {said}")


class CRunner(BaseRunner):
    """A compiled header; see `model.deploy.engines.Runner`.

    The compiler runs on the file, and what it makes runs in this process.
    """

    def __init__(self, path: Path, tensors: bool) -> None:
        self.path = path
        described = read_description(path)
        self._shape, self._classes, self._sizes = described.shape, described.classes, described.quantizers
        self.tensors = tuple(self._sizes) if tensors else ()
        self.integer, self.layers = described.integer, described.layers
        self._offsets = read_numbers(described.texts, path)
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder) / "network.so"
            build(path, library, compiler())
            self._run = ctypes.CDLL(str(library)).run
        self._run.restype = None

    def run(self, images: Array) -> dict[str, Array]:
        """See `Runner`."""
        images = np.ascontiguousarray(images, np.float32)
        logits = np.zeros((len(images), self._classes), np.float32)
        width = sum(prod(size) for size in self._sizes.values())
        values = np.zeros((len(images), width if self.tensors else 0), np.float32)
        pointer = ctypes.POINTER(ctypes.c_float)
        self._run(
            images.ctypes.data_as(pointer),
            len(images),
            logits.ctypes.data_as(pointer),
            values.ctypes.data_as(pointer) if self.tensors else None,
        )
        found, start = {"logits": logits}, 0
        for name in self.tensors:
            end = start + prod(self._sizes[name])
            found[name] = values[:, start:end].reshape(-1, *self._sizes[name])
            start = end
        return found
