"""The data sets with a folder per class: imagenet, decoded by Pillow, and dali."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from functools import partial

import torch

from utils.config.schema import DataConfig
from utils.data.loader import Delivery, Loader
from utils.data.loaders import Loaders, check_classes, deliveries_of, loaders_of
from utils.errors import UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def check_imagenet(config: DataConfig) -> None:
    """Raise `UserError` for folders that are missing or another number of classes."""
    # Here and below: other data sets need not wait for torchvision.
    from utils.data.image_folder import check_folders

    classes = check_folders(config.root, config.dataset, val=bool(config.val_batch_size))
    check_classes(config, classes, f"{config.root}")


def build_imagenet(config: DataConfig, device: torch.device) -> Loaders:
    """Loaders of images that Pillow decodes."""
    from utils.data.folder_loader import FolderLoader

    return _folder_loaders(config, device, partial(FolderLoader, randaugment=config.rand_augment))


def _folder_loaders(config: DataConfig, device: torch.device, loader: Callable[..., Loader]) -> Loaders:
    """Loaders over the folders of `--root`, made by `loader`, which takes the arguments of `FolderLoader`."""
    from utils.data.image_folder import ImageNames, Unreadable

    assert config.root is not None  # checked
    root, unreadable = config.root, Unreadable(config.skip_corrupt)

    names: dict[bool, ImageNames] = {}

    def open_(delivery: Delivery) -> Loader:
        names[delivery.train] = ImageNames(root / ("train" if delivery.train else "val"))
        return loader(
            names[delivery.train],
            delivery,
            size=config.input_size,
            workers=config.workers,
            unreadable=unreadable,
        )

    loaders = loaders_of(config, deliveries_of(config, device, IMAGENET_MEAN, IMAGENET_STD), open_)
    return dataclasses.replace(loaders, classes=names[True].classes)


def check_dali(config: DataConfig) -> None:
    """As `check_imagenet`; and raise `UserError` where DALI is not installed or cannot be imported."""
    install = (
        "pip install nvidia-dali-cuda130 (or the one of your CUDA version); --dataset imagenet reads the same "
        "folders without it"
    )
    if importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None:
        raise UserError(f"--dataset dali needs NVIDIA's DALI: {install}")
    try:
        from utils.data import dali_loader  # noqa: F401
    except (ImportError, OSError) as error:  # built for another platform, or a library is missing
        raise UserError(
            f"--dataset dali: NVIDIA's DALI is installed but cannot be imported ({error}): {install}"
        ) from error
    check_imagenet(config)


def build_dali(config: DataConfig, device: torch.device) -> Loaders:
    """Loaders of images that DALI decodes."""
    from utils.data.dali_loader import DaliLoader  # imports an optional library

    return _folder_loaders(config, device, DaliLoader)
