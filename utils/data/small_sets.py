"""The data sets that need no files: digits, glyphs and fake images."""

from __future__ import annotations

import dataclasses
import string
from functools import partial

import numpy as np
import torch
from torch import Tensor

from utils.config.image_size import InputSize, sides
from utils.config.schema import DataConfig
from utils.data.augment import Augment, warp
from utils.data.fake import FakeImages
from utils.data.glyphs import CHARACTERS, find_fonts, glyphs
from utils.data.loaders import Loaders, check_classes, tensor_loaders
from utils.data.tensor_loader import Store, resize
from utils.errors import UserError


def check_digits(config: DataConfig) -> None:
    """Raise `UserError` for another number of classes."""
    check_classes(config, 10, "--dataset digits")


def digits(size: InputSize) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Load the digits, a fifth of each class held out for validation.

    The split is part of the data set: it has a fixed seed and is the same in every run.

    Args:
        size: that the images are resized to (bicubic).

    Returns:
        Training and validation set, each as images, uint8 [n, 1, H, W], and classes, int64 [n].
    """
    # Imported here: it takes a second or more, which other data sets need not spend.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, classes = load_digits(return_X_y=True)  # [1797, 64] in 0 ... 16
    small = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) * (255 / 16)
    images = resize(small, sides(size), "bicubic").round_().clamp_(0, 255).to(torch.uint8)
    target = torch.from_numpy(classes).long()
    train, val = train_test_split(np.arange(len(classes)), test_size=0.2, stratify=classes, random_state=0)
    return (images[train], target[train]), (images[val], target[val])


def _grey_loaders(
    config: DataConfig,
    device: torch.device,
    train: tuple[Tensor, Tensor],
    val: tuple[Tensor, Tensor],
    augment: Augment,
    classes: str,
) -> Loaders:
    """Loaders over grey images, normalised by the statistics of the training set; `classes` are characters."""
    std, mean = torch.std_mean(train[0].float() / 255)
    loaders = tensor_loaders(
        config,
        device,
        train,
        val if config.val_batch_size else None,
        mean=(mean.item(),) * 3,
        std=(std.item(),) * 3,
        augment=augment,
    )
    return dataclasses.replace(loaders, classes=tuple(classes))


def build_digits(config: DataConfig, device: torch.device, _: None) -> Loaders:
    """The 1,797 handwritten digits of 8x8 pixels that come with scikit-learn."""
    return _grey_loaders(config, device, *digits(config.input_size), warp, string.digits)


def check_glyphs(config: DataConfig) -> None:
    """Raise `UserError` for another number of classes, or without the fonts."""
    check_classes(config, len(CHARACTERS), "--dataset glyphs")
    find_fonts(config.fonts)


def build_glyphs(config: DataConfig, device: torch.device, _: None) -> Loaders:
    """Characters that `utils.data.glyphs` draws."""
    return _grey_loaders(config, device, *glyphs(config.fonts), partial(warp, padding="border"), CHARACTERS)


def check_fake(config: DataConfig) -> None:
    """Raise `UserError` for a number of images below 1."""
    if config.fake_size < 1:
        raise UserError(f"--fake_size {config.fake_size}: write the number of training images, 1 or more")


def build_fake(config: DataConfig, device: torch.device, _: None) -> Loaders:
    """Computed images, in place of another data set's."""

    def part(split: int, samples: int) -> tuple[Store, Tensor]:
        store = FakeImages(split, config.num_classes, config.input_size)
        return store, torch.arange(samples) % config.num_classes

    return tensor_loaders(
        config,
        device,
        part(0, config.fake_size),
        part(1, max(1, config.fake_size // 4)) if config.val_batch_size else None,
        mean=FakeImages.MEAN,
        std=FakeImages.STD,
        augment=None,
    )
