"""Sources of data, and what is done with their loaders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from utils.config.schema import DataConfig
from utils.data.loader import Batch, Loader
from utils.data.loaders import Loaders

CLASSES = ("ant", "bee", "cat")


def write_folder(root: Path, train: int, val: int) -> None:
    """Write `train` and `val` JPEG files per class, of several sizes, in ImageNet's layout."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for name in CLASSES:
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                height, width = rng.integers(24, 48, 2)
                # Coarse blocks: pure noise would lose its detail in the JPEG.
                pixels = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
                Image.fromarray(pixels).resize((int(width), int(height))).save(folder / f"{i}.jpg")


DIGITS = DataConfig(dataset="digits", batch_size=200, val_batch_size=100)
FAKE = DataConfig(dataset="fake", fake_size=50, batch_size=12, val_batch_size=5, input_size=16, num_classes=4)


def read(loader: Loader, epoch: int = 0, position: int = 0) -> list[Batch]:
    loader.set_epoch(epoch)
    loader.set_position(position)
    return list(loader)


def validation(loaders: Loaders) -> Loader:
    assert loaders.val is not None
    return loaders.val


def same(left: list[Batch], right: list[Batch]) -> bool:
    pairs = zip(left, right, strict=True)
    return all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in pairs)


def pixels(images: Tensor, loaders: Loaders) -> np.ndarray:
    """Undo the normalisation: float64 [N, 3, S, S] in [0, 255]."""
    mean, std = (np.array(values).reshape(3, 1, 1) for values in (loaders.mean, loaders.std))
    return (images.numpy().astype(np.float64) * std + mean) * 255


def resized(channel: np.ndarray, size: tuple[int, int], method: Image.Resampling) -> np.ndarray:
    """Let Pillow resize one channel in floating point."""
    return np.asarray(Image.fromarray(channel.astype(np.float32)).resize(size, method))
