"""The network beside which an evaluation lists changed classes, such as the one in full precision."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor, nn

from model.training.rebuilt import trained_from
from model.training.training_state import TrainingState
from utils.checkpoint import archive, case_files
from utils.config.schema import Config
from utils.data.loaders import Loaders
from utils.data.transform import transform_of
from utils.errors import UserError
from utils.text import printable, some_names


def find_reference(config: Config) -> Path | None:
    """The file of `--reference`; None without one. Raises UserError where there is no such file."""
    name = config.run.reference
    if name is None:
        return None
    return case_files.find_pretrained(name, config.run.weights_dir, config.model.name, option="reference")


def load_reference(config: Config, loaders: Loaders, device: torch.device) -> nn.Module | None:
    """The network of `--reference` on the device, in float32; None without one.

    Raises:
        UserError: the file is missing, damaged or holds no configuration; its network has other classes, or takes
            the images in another form than the one that is evaluated.
    """
    path = find_reference(config)
    if path is None:
        return None
    trained = trained_from(archive.read(path), path)
    name, classes = (
        printable(f"--reference {path}"),
        loaders.classes or tuple(map(str, range(config.model.num_classes))),
    )
    if len(trained.labels) != len(classes):
        raise UserError(f"{name} has {len(trained.labels)} classes, and the evaluated network {len(classes)}")
    if trained.classes and trained.classes != classes:
        other = (one for one, two in zip(trained.classes, classes, strict=True) if one != two)
        raise UserError(f"{name} has other classes, or another order of them: {some_names(other)}")
    now, before = (dataclasses.asdict(one) for one in (transform_of(config.data, loaders), trained.transform))
    for field, value in now.items():
        if before[field] != value and not (field == "max_value" and None in (before[field], value)):
            raise UserError(
                f"{name} takes the images in another form, {field} {before[field]} and not {value}: name a checkpoint "
                "that was trained with the same images"
            )
    return trained.network.to(device)


def reference_logits(training: TrainingState, images: Tensor) -> Tensor | None:
    """The reference's logits, float32 [N, classes], of a loader's images; None without a reference.

    Raises:
        UserError: they are not finite.
    """
    if training.reference is None:
        return None
    with torch.autocast(training.device.type, enabled=False):
        logits = training.reference(images.to(training.device))
    if not logits.isfinite().all():
        raise UserError(f"--reference {training.config.run.reference} puts out values that are not finite")
    return logits
