"""The data sets of photographs in folders or shards: imagenet and shards, decoded by Pillow, and dali."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch

from utils.config.image_size import RESIZE_RATIO
from utils.config.schema import DataConfig
from utils.data.loader import Delivery, Loader
from utils.data.loaders import Loaders, check_classes, deliveries_of, loaders_of
from utils.errors import UserError
from utils.processes.distributed import broadcast
from utils.text import some_names

if TYPE_CHECKING:
    from pathlib import Path

    from utils.data.images import Images

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def check_imagenet(config: DataConfig) -> dict[str, Images]:
    """List the images of folders or shards; raises `UserError` for what is missing or another number of classes."""
    # Here and below: other data sets need not wait for torchvision.
    from utils.data.image_folder import check_folders
    from utils.data.shards.images import check_shards, is_shards
    from utils.data.split import check_split, split_folder, split_shards

    val = bool(config.val_batch_size)
    train, known = config.train or not val, bool(config.classes)
    in_shards = config.root is not None and (config.dataset == "shards" or is_shards(config.root))
    names: dict[str, Images]
    if config.val_split and not (config.val_files and _has_val(config.root, in_shards=in_shards)):
        if in_shards:
            assert config.root is not None
            names = {**split_shards(config.root, config.val_split)}
        else:
            names = {**split_folder(config.root, config.dataset, config.val_split)}
        check_split(names["val"], config.val_files, config.root)
        names = names if train else {"val": names["val"]}
    elif in_shards:
        assert config.root is not None
        names = {**check_shards(config.root, val=val, train=train)}
    else:
        names = {**check_folders(config.root, config.dataset, val=val, train=train, known=known)}
    if known:
        for part in names.values():
            _number_as(config, part)
    part = next(iter(names.values()))
    left_out = f" ({said})" if (said := part.left_out()) else ""
    if not config.count_classes:
        check_classes(config, len(part.classes), f"{config.root}{left_out}")
    return names


def _has_val(root: Path | None, *, in_shards: bool) -> bool:
    """Whether a root has validation images by now, to which the split of a checkpoint gives way."""
    from utils.data.shards.images import open_shards

    if root is None:
        return False
    return "val" in open_shards(root) if in_shards else (root / "val").is_dir()


def _number_as(config: DataConfig, part: Images) -> None:
    """Give a part of a checkpoint's classes the numbers that they have there.

    As many classes under other names, or in another order, are compared when the checkpoint is loaded.
    """
    if len(part.classes) == len(config.classes):
        return
    unknown = [name for name in part.classes if name not in config.classes]
    if unknown:
        raise UserError(
            f"{part.place} has classes that the checkpoint was not trained with: {some_names(unknown)}; its classes "
            f"are {some_names(config.classes)}: rename or remove them"
        )
    part.number_as(config.classes)


def build_imagenet(config: DataConfig, device: torch.device, names: dict[str, Images]) -> Loaders:
    """Loaders of images that Pillow decodes."""
    from utils.data.folder_loader import FolderLoader

    return _folder_loaders(config, device, names, partial(FolderLoader, randaugment=config.rand_augment))


def _folder_loaders(
    config: DataConfig, device: torch.device, names: dict[str, Images], loader: Callable[..., Loader]
) -> Loaders:
    """Loaders over the images of `--root`, made by `loader`, which takes the arguments of `FolderLoader`."""
    from utils.data.image_file import Decoding
    from utils.data.image_folder import Unreadable, value_range

    unreadable = Unreadable(config.skip_corrupt)
    warnings = [part.left_out() for part in names.values()]
    if (max_value := config.max_value) is None:
        part, first = next(iter(names.items()))  # training images where there are some
        max_value, said = broadcast(lambda: value_range(first, config.workers, training=part == "train"))
        warnings.append(said)
    decoding = Decoding(
        ignore_orientation=config.ignore_orientation, max_value=65535 if max_value is None else max_value
    )

    def open_(delivery: Delivery) -> Loader:
        return loader(
            names["train" if delivery.train else "val"],
            delivery,
            size=config.input_size,
            workers=config.workers,
            unreadable=unreadable,
            decoding=decoding,
        )

    deliveries = deliveries_of(config, device, IMAGENET_MEAN, IMAGENET_STD)
    said = tuple(filter(None, warnings))
    loaders = loaders_of(config, deliveries, open_, train="train" in names, warnings=said)
    classes = next(iter(names.values())).classes
    return dataclasses.replace(loaders, classes=classes, max_value=max_value, resize_ratio=RESIZE_RATIO)


def check_dali(config: DataConfig) -> dict[str, Images]:
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
    return check_imagenet(config)


def build_dali(config: DataConfig, device: torch.device, names: dict[str, Images]) -> Loaders:
    """Loaders of images that DALI decodes."""
    from utils.data.dali_loader import DaliLoader  # imports an optional library

    return _folder_loaders(config, device, names, DaliLoader)
