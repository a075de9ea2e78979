"""Running a C header with the C compiler of the machine."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from model.deploy.codes import Array
from model.deploy.offsets import read_offsets
from utils.checkpoint.exported import C_MARK
from utils.errors import UserError

FIELDS = {"quantizers", "shape", "classes", "integer", "layers", "texts"}
COMPILERS = ("cc", "gcc", "clang")
PROGRAM = """\
#include <stddef.h>
static float *watched;
static int watching;
#define LOWBIT_WATCH(values, count, scale) \\
    if (watching) for (int w_ = 0; w_ < (count); ++w_) *watched++ = (float)(values)[w_] * (scale);
#include "{header}"
void run(const float *images, int count, float *logits, float *values) {{
    watched = values, watching = values != NULL;
    const size_t size = (size_t)LOWBIT_CHANNELS * LOWBIT_HEIGHT * LOWBIT_WIDTH;
    for (size_t i = 0; i < (size_t)count; ++i) lowbit_run(images + i * size, logits + i * LOWBIT_CLASSES);
}}
"""


def compiler() -> str:
    """The C compiler: that of the environment's CC, or one that is installed; raises UserError where there is none."""
    given = os.environ.get("CC")
    for name in (given,) if given else COMPILERS:
        if found := shutil.which(name):
            return found
    if given:
        raise UserError(f"CC={given}: no such program; name a C compiler, or unset CC")
    raise UserError("no C compiler is installed: install gcc or clang, or name one in the environment's CC")


def read_description(path: Path) -> dict[str, Any]:
    """What the first line of a header says: shapes, quantizers, texts.

    Raises:
        UserError: the file is missing, or no header that export has written.
    """
    try:
        with path.open(encoding="utf-8") as file:
            first = file.readline()
        if first.startswith(C_MARK):
            found = json.loads(first.removeprefix(C_MARK))
            if isinstance(found, dict) and {
                "quantizers",
                "shape",
                "classes",
                "integer",
                "layers",
                "texts",
            } <= set(found):
                return found
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a header: {error}") from error
    raise UserError(f"{path}: not a header that export --to c has written")


class CRunner:
    """A compiled header; see `model.deploy.engines.Runner`.

    The compiler runs on the file, and what it makes runs in this process.
    """

    def __init__(self, path: Path, tensors: bool) -> None:
        self.path = path
        described = read_description(path)
        self._shape, self._classes = tuple(described["shape"]), int(described["classes"])
        self._sizes = {name: tuple(shape)[1:] for name, shape in described["quantizers"].items()}
        self.tensors = tuple(self._sizes) if tensors else ()
        self.integer, self.layers = int(described["integer"]), int(described["layers"])
        self._offsets = read_offsets(described["texts"], path)
        with tempfile.TemporaryDirectory() as folder:
            source, library = Path(folder) / "network.c", Path(folder) / "network.so"
            shutil.copyfile(path, Path(folder) / "network.h")
            source.write_text(PROGRAM.format(header="network.h"), "utf-8")
            # Without contraction, products are rounded before they are added, as the file says.
            flags = ["-std=c99", "-O2", "-ffp-contract=off", "-fPIC", "-shared"]
            command = [compiler(), *flags, str(source), "-o", str(library), "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                said = next((line for line in done.stderr.splitlines() if "error" in line), "no reason given")
                raise UserError(f"{path}: the compiler does not take it: {said}")
            self._run = ctypes.CDLL(str(library)).run
        self._run.restype = None

    def prepared(self, images: Array) -> Array:
        """The images."""
        return images

    def run(self, images: Array) -> dict[str, Array]:
        """See `Runner`."""
        images = np.ascontiguousarray(images, np.float32)
        if images.shape[1:] != self._shape:
            wanted, given = ("x".join(map(str, shape)) for shape in (self._shape, images.shape[1:]))
            raise UserError(f"{self.path}: computes images of {wanted}, and these have {given}")
        logits = np.zeros((len(images), self._classes), np.float32)
        width = sum(int(np.prod(size)) for size in self._sizes.values())
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
            end = start + int(np.prod(self._sizes[name]))
            found[name] = values[:, start:end].reshape(-1, *self._sizes[name])
            start = end
        return found

    def __call__(self, images: Array) -> dict[str, Array]:
        """See `Runner`."""
        found = self.run(images)
        for name, offset in self._offsets.items():
            if name in found:
                found[name] = found[name] + np.float32(offset)
        return found
