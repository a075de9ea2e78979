"""A run's place, device and starting point, found before its network is built."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from model.networks import library
from model.training.teacher import find_teacher
from utils.checkpoint import case_files
from utils.checkpoint.case_files import CheckpointFiles, Found
from utils.checkpoint.exported import what_instead
from utils.config.schema import Config, DataConfig
from utils.data.sources import check_data, settled
from utils.errors import UserError
from utils.processes import distributed
from utils.processes.agreement import check_agreement, file_digest, run_fields
from utils.processes.distributed import Place
from utils.processes.memory import keep_freed_memory
from utils.report.tracking import check_tracker
from utils.step import optimizer, precision
from utils.step.compiled import check_compiler


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """Everything known about a run before its network is built.

    Attributes:
        config: the run's, with this process's rank in `data`.
        place: which process this is.
        device: where it computes.
        folder: for the log and the metrics.
        files: the case's checkpoints.
        teacher: the teacher's checkpoint; None without distillation.
        checked_data: what `utils.data.sources.check_data` has read of the data set.
        warnings: warnings so far.
    """

    config: Config
    place: Place
    device: torch.device
    folder: Path
    files: CheckpointFiles
    teacher: Path | None
    checked_data: Any
    warnings: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The checkpoint or the weights that a run starts from.

    Attributes:
        found: the checkpoint that it continues from.
        pretrained: the weights that it begins with, a file or a library's (`torchvision`, `timm`); None: random ones,
            or those of `found`.
        launchers: the torchrun of each of its machines, see `utils.processes.distributed.launchers`.
    """

    found: Found
    pretrained: Path | str | None
    launchers: tuple[str, ...]


def find_surroundings(config: Config) -> Surroundings:
    """Find this process's place and device, and check the options without building anything.

    Raises:
        UserError: an option does not fit this machine, or names a file that is not there.
    """
    settings = config.run
    place = distributed.place(config.devices, os.environ)
    if place.first and settings.resume_file is not None and not os.path.isfile(settings.resume_file):
        instead = what_instead(settings.resume_file)
        what = f" is {instead}" if instead else ": no such file; -r finds a case's newest"
        raise UserError(f"--resume_file {settings.resume_file}{what}")
    shard = dataclasses.replace(config.data, rank=place.rank, world_size=place.world_size)
    config = dataclasses.replace(config, data=shard)
    device, warnings = distributed.device_of(place, config.devices)
    warnings += precision.check_precision(config.precision, device)
    check_compiler(config.precision, device)
    if device.type == "cpu":
        keep_freed_memory()
    check_tracker(config)
    files = CheckpointFiles(settings.weights_dir, config.model.name, settings.case)
    optimizer.check_optimizer(config.optim)
    distill = None if settings.evaluate else config.loss.distill
    teacher = None if distill is None else find_teacher(distill, settings.weights_dir)
    checked = check_data(config.data)
    config = _with_data(config, settled(config.data, checked))
    return Surroundings(
        config=config, place=place, device=device, folder=settings.log_dir / settings.case, files=files,
        teacher=teacher, checked_data=checked, warnings=warnings,
    )  # fmt: skip


def _with_data(config: Config, data: DataConfig) -> Config:
    """The configuration with this data set, and networks of its number of classes."""
    if data.num_classes == config.model.num_classes:
        return dataclasses.replace(config, data=data)
    classes, distill = {"num_classes": data.num_classes}, config.loss.distill
    if distill is not None:
        distill = dataclasses.replace(distill, teacher=dataclasses.replace(distill.teacher, **classes))
    return dataclasses.replace(
        config,
        data=data,
        model=dataclasses.replace(config.model, **classes),
        loss=dataclasses.replace(config.loss, distill=distill),
        origins={**config.origins, "model.num_classes": "the class folders"},
    )


def find_origin(here: Surroundings) -> Origin:
    """Find the checkpoint that the run continues from, or the weights that it begins with.

    Raises:
        UserError: there is no such file, or nothing to evaluate; or the run's processes differ.
    """
    settings, files = here.config.run, here.files
    check_agreement(lambda: run_fields(here.config, here.device.type))
    launchers = distributed.launchers(os.environ)
    found = distributed.broadcast(lambda: files.find(settings.resume, settings.resume_file, launchers))
    pretrained = None  # a resumed checkpoint already has the weights, and the file may have moved since
    if found.path is None:
        name = here.config.model.name
        pretrained = settings.pretrained
        if pretrained not in library.SOURCES:
            pretrained = case_files.find_pretrained(pretrained or "", settings.weights_dir, name)
    if settings.evaluate and settings.resume and found.path is None and settings.pretrained is None:
        raise UserError(
            f"--resume: no whole checkpoint of case {settings.case} in {files.folder} to evaluate; with "
            "--pretrained none random weights are"
        )
    check_agreement(
        lambda: {"the pretrained weights": _digest(pretrained), "the teacher": _digest(here.teacher)}
    )
    return Origin(found=found, pretrained=pretrained, launchers=launchers)


def _digest(weights: Path | str | None) -> str:
    """What is compared of weights: a file's digest, or the library that has them."""
    return weights if isinstance(weights, str) else file_digest(weights)
