"""The data sets by name: the checks and the loaders of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from utils.config.data_sets import FOLDER_SETS, WITHOUT_FILES
from utils.config.image_size import RESIZE_RATIO
from utils.config.schema import DataConfig
from utils.data import class_weights, workers
from utils.data.cifar import CIFAR10_SET, CIFAR100_SET
from utils.data.folder_sets import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    build_dali,
    build_imagenet,
    check_dali,
    check_imagenet,
)
from utils.data.loaders import CPU, Loaders, deliveries_of
from utils.data.small_sets import (
    build_digits,
    build_fake,
    build_glyphs,
    check_digits,
    check_fake,
    check_glyphs,
)
from utils.data.transform import ImageTransform, transform_of
from utils.errors import UserError


@dataclass(frozen=True)
class Source:
    """A data set by name.

    Attributes:
        check: raises `UserError` for mistakes that would make `build` fail, as far as a quick look can find them;
            returns what it has read on the way, such as the names of all images.
        build: makes the loaders, for batches on a device, from what `check` returned.
    """

    check: Callable[[DataConfig], Any]
    build: Callable[[DataConfig, torch.device, Any], Loaders]


SOURCES: dict[str, Source] = {
    "digits": Source(check_digits, build_digits),
    "fake": Source(check_fake, build_fake),
    "glyphs": Source(check_glyphs, build_glyphs),
    "cifar10": Source(CIFAR10_SET.check, CIFAR10_SET.build),
    "cifar100": Source(CIFAR100_SET.check, CIFAR100_SET.build),
    "imagenet": Source(check_imagenet, build_imagenet),
    "shards": Source(check_imagenet, build_imagenet),
    "dali": Source(check_dali, build_dali),
}
"""Every data set by its name."""


# Largest mean and std, and 1 over the smallest std, for images in [0, 1]; float32 has room for the quotients.
_FARTHEST = 1e6


def refuse_root(root: Path | None, dataset: str) -> None:
    """Refuse --root for a data set that reads no files.

    Raises:
        UserError: both are given.
    """
    if root is not None and dataset in WITHOUT_FILES:
        raise UserError(
            f"--root {root} has no effect with the data set {dataset}, which needs no files: leave --root out"
        )


def check_data(config: DataConfig) -> Any:
    """Look for mistakes that are cheap to find, before anything heavy is built.

    Nothing is downloaded or read beyond the names of folders and files. These are returned for `open_data`, which
    else would list them again.

    Raises:
        UserError: an unknown data set; a number of classes that is not the set's; a root, its `train/` or
            `val/`, class folders or images that are missing; classes that differ between training and
            validation; a mean or std with another number of channels, or too large or small for float32;
            RandAugment on a data set without it; too many workers; a file of class weights that does not fit;
            DALI that is not installed or cannot be imported.
    """
    if config.dataset not in SOURCES:
        raise UserError(f"--dataset {config.dataset} is unknown: choose one of {', '.join(SOURCES)}")
    if config.rand_augment is not None and config.dataset in ("dali", "digits", "glyphs"):
        raise UserError(
            f"--rand_augment is not for --dataset {config.dataset}: use imagenet, cifar10, cifar100 or fake"
        )
    for name, values in (("mean", config.mean), ("std", config.std)):
        if values is not None and len(values) != config.channels:
            wanted = (
                "write three, for red, green and blue" if config.channels == 3 else "grey images have one"
            )
            raise UserError(f"--{name} has {len(values)} values: {wanted}")
        if values is not None and max(map(abs, values)) > _FARTHEST:
            raise UserError(
                f"--{name} has the value {max(values, key=abs):g}: write {_FARTHEST:g} at the most"
            )
    if config.std is not None and min(config.std) < 1 / _FARTHEST:
        raise UserError(
            f"--std has the value {min(config.std):g}: write numbers above 0, {1 / _FARTHEST:g} at the least"
        )
    workers.check_workers(config.workers)
    try:
        checked = SOURCES[config.dataset].check(config)
    except OSError as error:
        raise UserError(
            f"cannot read {error.filename}: {error.strerror}; check --root and its permissions"
        ) from error
    class_weights_of_file(config, checked)
    return checked


def class_weights_of_file(config: DataConfig, checked: Any) -> tuple[float, ...]:
    """The values of a file of class weights, in the order of the classes; empty where no file is given.

    Args:
        config: the data set.
        checked: what `check_data` returned for this configuration.

    Raises:
        UserError: as `read_weights`.
    """
    if config.class_weights in (None, class_weights.BALANCED):
        return ()
    return class_weights.read_weights(Path(config.class_weights), _names(config, checked))


def settled(config: DataConfig, checked: Any) -> DataConfig:
    """The configuration with what its files say: weights and number of classes, which validation images are split off.

    Args:
        config: the data set.
        checked: what `check_data` returned for this configuration.
    """
    config = _counted(replace(config, class_weight_values=class_weights_of_file(config, checked)), checked)
    if config.dataset in FOLDER_SETS and config.val_split and not config.val_files:
        config = replace(config, val_files=checked["val"].identity()["files"])
    return config


def _counted(config: DataConfig, checked: Any) -> DataConfig:
    """The configuration with the number of classes that its files have."""
    if config.dataset not in FOLDER_SETS:
        return config
    return replace(config, num_classes=len(_names(config, checked)), count_classes=False)


_PUBLISHED = {
    **dict.fromkeys(FOLDER_SETS, (IMAGENET_MEAN, IMAGENET_STD)),
    "cifar10": (CIFAR10_SET.mean, CIFAR10_SET.std),
    "cifar100": (CIFAR100_SET.mean, CIFAR100_SET.std),
}  # of images in [0, 1]


def transform_by_name(config: DataConfig) -> ImageTransform:
    """The transform of a data set from its configuration alone, for checkpoints that do not hold it."""
    if config.dataset not in _PUBLISHED:
        return transform_of(config, open_data(replace(config, root=None, train=True, rank=0, world_size=1)))
    mean, std = _PUBLISHED[config.dataset]
    delivery, _ = deliveries_of(config, CPU, mean, std)
    ratio = RESIZE_RATIO if config.dataset in FOLDER_SETS else None
    loaders = Loaders(None, None, config.num_classes, delivery.mean, delivery.std, resize_ratio=ratio)
    return transform_of(config, replace(loaders, max_value=config.max_value))


def _names(config: DataConfig, checked: Any) -> Sequence[str]:
    """The classes' names: of their folders where there are some, otherwise their numbers."""
    if config.dataset in FOLDER_SETS:
        return next(iter(checked.values())).classes
    return [str(number) for number in range(config.num_classes)]


def open_data(config: DataConfig, device: torch.device = CPU, checked: Any = None) -> Loaders:
    """Open the data set that a configuration names; check it first unless that is done.

    Args:
        config: the data set, its batches and their augmentation.
        device: the device that the batches are for.
        checked: what `check_data` returned for this configuration.

    Returns:
        The loaders of both sets; `val` is None when `val_batch_size` is 0.

    Raises:
        UserError: as `check_data`; or the CIFAR files are missing and cannot be downloaded, or are damaged.
    """
    checked = check_data(config) if checked is None else checked
    config = _counted(config, checked)
    loaders = SOURCES[config.dataset].build(config, device, checked)
    if config.class_weights is None:
        return loaders
    names = _names(config, checked)
    return replace(
        loaders,
        classes=loaders.classes or tuple(names),
        class_weights=class_weights.weights_of(config.class_weights, loaders.train.target, names),
    )
