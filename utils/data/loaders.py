"""The loaders of a data set for training and validation, by its configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from utils.config.schema import DataConfig
from utils.data.augment import Augment, mixing
from utils.data.grey import grey_value
from utils.data.loader import Delivery, Loader
from utils.data.tensor_loader import Store, TensorLoader
from utils.errors import UserError

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Loaders:
    """The loaders of a data set, and its statistics.

    Attributes:
        training: batches of the training set; None in the evaluation of a data set without one.
        val: batches of the validation set; None without validation.
        num_classes: number of classes.
        mean: per channel, of images in [0, 1]; used to normalise the images.
        std: per channel, likewise.
        warnings: for the log, about the files.
        classes: names of the classes in their order; empty where they have none.
        class_weights: weight of each class in the loss; empty: all are 1.
        max_value: the value of 16-bit images that becomes white, given or found; None: there are no such images.
        resize_ratio: side of a resized validation image over that of the centre that is cut out; None: whole images.
    """

    training: Loader | None
    val: Loader | None
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    warnings: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    class_weights: tuple[float, ...] = ()
    max_value: int | None = None
    resize_ratio: float | None = None

    @property
    def train(self) -> Loader:
        """Batches of the training set. Raises `ValueError` where there is none."""
        if self.training is None:
            raise ValueError("the data set was opened for an evaluation and has no training images")
        return self.training

    def identity(self) -> dict[str, str]:
        """What tells both sets from others, see `Loader.identity`; and the weights of the classes."""
        parts = {"train": self.training, "val": self.val}
        weights = ", ".join(f"{weight:.9g}" for weight in self.class_weights)
        return {"class weights": weights or "none"} | {
            f"{what} of {part}": text
            for part, loader in parts.items()
            if loader is not None
            for what, text in loader.identity().items()
        }


def check_classes(config: DataConfig, classes: int, what: str) -> None:
    """Raise `UserError` when the configuration has another number of classes than the data."""
    if config.num_classes != classes:
        raise UserError(
            f"{what} has {classes} classes, not {config.num_classes}: write --num_classes {classes} or name "
            "another data set"
        )


def deliveries_of(
    config: DataConfig, device: torch.device, mean: tuple[float, ...], std: tuple[float, ...]
) -> tuple[Delivery, Delivery]:
    """How batches of training and validation are delivered; `mean` and `std` are the set's own, of three channels."""
    if config.channels == 1:
        mean, std = (grey_value(mean),), (grey_value(std),)

    def delivery(batch_size: int, *, train: bool) -> Delivery:
        return Delivery(
            batch_size=batch_size,
            train=train,
            seed=config.seed,
            mean=config.mean or mean,
            std=config.std or std,
            device=device,
            rank=config.rank,
            world_size=config.world_size,
            colour=config.colour,
            balanced=config.balanced,
            mix=mixing(config.mixup_alpha, config.cutmix_alpha, config.num_classes),
        )

    return delivery(config.batch_size, train=True), delivery(config.val_batch_size, train=False)


def loaders_of(
    config: DataConfig,
    deliveries: tuple[Delivery, Delivery],
    open_: Callable[[Delivery], Loader],
    *,
    train: bool = True,
    warnings: tuple[str, ...] = (),
) -> Loaders:
    """Both loaders, each made by `open_`; `train` says whether there is a training set."""
    training, val = deliveries
    return Loaders(
        training=open_(training) if train else None,
        val=open_(val) if config.val_batch_size else None,
        num_classes=config.num_classes,
        mean=training.mean,
        std=training.std,
        warnings=warnings,
    )


def tensor_loaders(
    config: DataConfig,
    device: torch.device,
    train: tuple[Store, Tensor],
    val: tuple[Store, Tensor] | None,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    augment: Augment | None,
) -> Loaders:
    """Loaders over (images, classes) in memory; `mean` and `std` are the set's own, of three channels."""

    def open_(delivery: Delivery) -> TensorLoader:
        part = train if delivery.train else val
        assert part is not None  # with a validation batch there is a validation set
        return TensorLoader(
            *part, delivery, size=config.input_size, augment=augment, randaugment=config.rand_augment
        )

    return loaders_of(config, deliveries_of(config, device, mean, std), open_)
