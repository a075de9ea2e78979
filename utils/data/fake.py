"""Images that are computed: as tensors, or as a folder of JPEG files in the layout of ImageNet."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from utils.config.image_size import InputSize, sides
from utils.data.loader import NOISE, PATTERN, generator, seed_of


class FakeImages:
    """Images that are half their class's pattern of 4x4 coloured tiles and half noise of their own.

    They are computed when they are fetched, so that their number and size cost no memory. An image depends on
    its split, index and class only; the images are the same in every run.

    Args:
        split: 0 for training, 1 for validation.
        num_classes: number of classes; image i has class i modulo this.
        size: of the images.
    """

    MEAN = (0.5,) * 3
    STD = (0.2,) * 3  # of the mean of two numbers uniform in [0, 1]: sqrt(1 / 24)

    def __init__(self, split: int, num_classes: int, size: InputSize) -> None:
        self._split = split
        self._size = sides(size)
        shape = (num_classes, 3, 4, 4)
        self._patterns = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator(PATTERN))

    def __getitem__(self, index: Tensor, /) -> Tensor:
        """Return the images of these indices, int64 [N], as uint8 [N, 3, H, W]."""
        noise = torch.empty(len(index), 3, *self._size, dtype=torch.uint8)
        for image, i in zip(noise, index.tolist(), strict=True):
            image.random_(0, 256, generator=generator(NOISE, self._split, i))
        pattern = F.interpolate(self._patterns[index % len(self._patterns)], size=self._size)
        return pattern // 2 + noise // 2


# Detail of a photograph at several scales: cells across, and standard deviation in grey values.
_SCALES = ((4, 30), (16, 20), (64, 15), (160, 10), (500, 8))
# Of the JPEG files; 500x375 pixels take about 100 KB, ImageNet's 1,281,167 files 115 KB on average.
_QUALITY = 95


def photograph(split: int, index: int, classes: int, width: int, height: int) -> Image.Image:
    """Compute an image that compresses like a photograph: its class's colours, and detail of its own.

    The class, `index` modulo `classes`, has a pattern of 4x4 colours that flow into each other. An image is
    the same in every run.

    Args:
        split: 0 for training, 1 for validation.
        index: number of the image.
        classes: number of classes.
        width: in pixels.
        height: likewise.
    """
    pattern = np.random.default_rng(seed_of(PATTERN, index % classes)).uniform(40, 216, (4, 4, 3))
    own = np.random.default_rng(seed_of(NOISE, split, index))
    layers = [pattern] + [own.normal(0, deviation, (cells, cells, 3)) for cells, deviation in _SCALES]
    pixels = np.zeros((height, width, 3), np.float32)
    for layer in layers:
        for channel in range(3):
            flat = Image.fromarray(layer[..., channel].astype(np.float32))
            pixels[..., channel] += np.asarray(flat.resize((width, height), Image.Resampling.BICUBIC))
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def write_folder(root: Path, samples: int, classes: int, width: int, height: int) -> Iterator[Path]:
    """Write `samples` training images and a quarter as many for validation, at least one of each class.

    Args:
        root: gets `train/CLASS/NUMBER.jpg` and `val/CLASS/NUMBER.jpg`.
        samples: number of training images, at least the number of classes.
        classes: number of classes.
        width: of the images, in pixels.
        height: likewise.

    Yields:
        The path of each file when it is written.
    """
    digits = len(str(classes - 1))
    for split, (name, count) in enumerate((("train", samples), ("val", max(classes, samples // 4)))):
        for index in range(count):
            path = root / name / f"class{index % classes:0{digits}}" / f"{index:06}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            photograph(split, index, classes, width, height).save(path, quality=_QUALITY)
            yield path
