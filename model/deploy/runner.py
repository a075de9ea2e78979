"""What every engine's loaded file offers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import numpy as np

from model.deploy.codes import Array
from model.deploy.offsets import OFFSETS
from utils.errors import UserError


class Runner(Protocol):
    """A loaded file.

    Attributes:
        path: the file.
        tensors: the names of the quantized tensors that a run returns beside the logits.
        integer: how many convolutions and linear layers compute with integers; None where the engine does not say.
        layers: how many there are.
    """

    path: Path
    tensors: tuple[str, ...]
    integer: int | None
    layers: int

    def prepared(self, images: Array) -> Array:
        """Normalised images as the file's input takes them: bytes, where it normalises them itself."""
        ...

    def run(self, images: Array) -> dict[str, Array]:
        """Prepared images to `logits` [N, classes] and the quantized tensors, float32."""
        ...

    def __call__(self, images: Array) -> dict[str, Array]:
        """Images, float32 [N, channels, height, width] and normalised, to what `run` gives."""
        ...


class BaseRunner:
    """What runners share."""

    path: Path
    _shape: tuple[int, ...] | None = None  # of an image, channels first; None where the file does not say
    _pixels: Callable[[Array], Array] | None = None  # of normalised images
    _offsets: Mapping[str, float] = MappingProxyType({})

    def prepared(self, images: Array) -> Array:
        """See `Runner`."""
        return images if self._pixels is None else self._pixels(images)

    def run(self, images: Array) -> dict[str, Array]:
        """See `Runner`."""
        raise NotImplementedError

    def __call__(self, images: Array) -> dict[str, Array]:
        """See `Runner`."""
        self._check(images)
        found = self.run(self.prepared(images))
        for name, offset in self._offsets.items():
            if name in found:
                found[name] = found[name] + np.float32(offset)
        return found

    def _check(self, images: Array) -> None:
        kind = getattr(images, "dtype", type(images).__name__)
        if not isinstance(images, np.ndarray) or kind != np.float32:
            raise UserError(
                f"{self.path}: computes normalised images, a NumPy array of float32, and these are {kind}"
            )
        shape = images.shape[1:] if self._shape is None else self._shape
        if images.ndim < 2 or not len(images) or images.shape[1:] != shape:
            wanted, given = ("x".join(map(str, sizes)) for sizes in (shape, images.shape))
            raise UserError(
                f"{self.path}: computes a batch of images of {wanted}, and this is a batch of {given}"
            )


def read_numbers(metadata: Mapping[str, str], path: object, entry: str = OFFSETS) -> dict[str, float]:
    """The numbers that an entry of a file's metadata names, such as its offsets; none without the entry.

    Raises:
        UserError: the text is no table of numbers.
    """
    try:
        return {str(name): float(value) for name, value in json.loads(metadata.get(entry, "{}")).items()}
    except (AttributeError, TypeError, ValueError):
        raise UserError(f"{path}: its {entry} are no table of numbers; export it anew") from None
