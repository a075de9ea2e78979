"""Running MNN's files on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from model.deploy.codes import Array
from model.deploy.graph import INPUT, OUTPUT
from model.deploy.mnn.file import read_mnn
from model.deploy.quiet import quiet

WINOGRAD = 3  # the hint that says how much of it is used


class MnnInterpreter:
    """A file in MNN: with the sums of its fast convolutions (Winograd), or with plain ones.

    Args:
        path: the file.
        optimised: with Winograd's, which MNN takes by itself.
        endings: the endings of the names of tensors that a run returns beside the logits.
        threads: of a run; None: as the engine likes.

    Attributes:
        tensors: their names.
        layers: how many convolutions and linear layers there are.
        texts: what travels in the file.
    """

    def __init__(self, path: Path, optimised: bool, endings: tuple[str, ...], threads: int | None) -> None:
        found = read_mnn(path)
        self.layers, self.texts = found.layers, found.texts
        self.tensors = tuple(name for name in found.tensors if endings and name.endswith(endings))
        with quiet(1, 2):
            import MNN

            engine: Any = MNN  # whose types are not written down
            self._expr, nn = engine.expr, engine.nn
            # Numbers of 16 bits, and activations that MNN quantizes by itself, are what other settings mean.
            settings: dict[str, Any] = {"precision": "high", "memory": "normal"}
            settings |= {} if threads is None else {"numThread": threads}
            self._manager = nn.create_runtime_manager((settings,))
            if not optimised:
                self._manager.set_hint(WINOGRAD, 0)
            self._module = nn.load_module_from_file(
                str(path), [INPUT], [OUTPUT, *self.tensors], runtime_manager=self._manager
            )

    def run(self, images: Array) -> dict[str, Array]:
        """Images to the logits and the tensors."""
        images = np.ascontiguousarray(images, np.float32)
        given = self._expr.placeholder(list(images.shape), self._expr.NCHW)
        given.write(images)
        names = (OUTPUT, *self.tensors)
        with quiet(1, 2):
            found = self._module.forward([given])
        if len(found) != len(names):
            raise RuntimeError("it fails on the way")
        return {name: self._read(one) for name, one in zip(names, found, strict=True)}

    def _read(self, tensor: Any) -> Array:
        """A tensor in the order of its dimensions."""
        if tensor.data_format == self._expr.NC4HW4:
            tensor = self._expr.convert(tensor, self._expr.NCHW)
        return tensor.read().copy()
