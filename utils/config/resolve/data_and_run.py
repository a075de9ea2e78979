"""The configuration of data, devices, checkpoints, logs and probes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.config.command_line import Given
from utils.config.data_sets import FOLDER_SETS
from utils.config.schema import DataConfig, DeviceConfig, ModelConfig, ProbeConfig, RunConfig
from utils.errors import UserError

DATASETS = {"digits": "digits", "glyphs": "glyphs", "cifar10": "cifar10", "cifar100": "cifar100",
            "imagenet": "imagenet", "shards": "imagenet", "dali": "imagenet"}  # --dataset -> its keyword  # fmt: skip
CLASSES = {"digits": 10, "glyphs": 62, "cifar10": 10, "cifar100": 100}  # of data sets whose classes are fixed


def data_keyword(given: Given) -> tuple[str, ...]:
    """The keywords, with the data set's own added when none is given.

    `fake` imitates the data set that it replaces.
    """
    words = tuple(dict.fromkeys(given["keyword"]))
    present = [word for word in words if word in DATASETS.values()]
    dataset = given["dataset"] or (present[0] if present else "digits")
    if dataset == "fake":
        replaced = [name for name in given.replaced.get("dataset", ()) if name != "fake"]
        if not present and replaced:
            return (DATASETS[replaced[-1]], *words)
        if not present and (given["num_classes"] is None or given["input_size"] is None):
            raise UserError(
                "--dataset fake: say which images to imitate with one of the keywords "
                f"{', '.join(sorted(set(DATASETS.values())))}, or give --num_classes and --input_size"
            )
        return words
    wanted = DATASETS[dataset]
    if len(present) == 1 and present != [wanted]:
        raise UserError(
            f"--dataset {dataset} contradicts the keyword {present[0]}: write {wanted} or leave it out"
        )
    return words if present else (wanted, *words)


def data_config(given: Given, fields: Mapping[str, Any], model: ModelConfig) -> DataConfig:
    """Where the images come from and how they are batched."""
    dataset = given["dataset"] or fields["data.dataset"]
    classes = CLASSES.get(dataset, model.num_classes)
    if classes != model.num_classes and given["dataset"] is not None:
        raise UserError(f"--num_classes {model.num_classes}: {dataset} has {classes} classes; leave it out")
    if given["balanced_sampler"] and given["class_weights"] == "balanced":
        raise UserError(
            "--balanced_sampler and --class_weights balanced even out the classes twice: keep one of them"
        )
    batch = given["batch_size"]
    return DataConfig(
        dataset=dataset,
        root=None if given["root"] is None else Path(given["root"]),
        batch_size=batch,
        val_batch_size=batch if given["val_batch_size"] is None else given["val_batch_size"],
        train=not given["evaluate"] or given["bn_batches"] > 0,
        workers=given["workers"],
        num_classes=model.num_classes,
        count_classes=dataset in FOLDER_SETS and "num_classes" not in given.explicit,
        val_split=given["val_split"] if dataset in FOLDER_SETS else 0.0,
        input_size=model.input_size,
        channels=model.channels,
        mean=given["mean"],
        std=given["std"],
        balanced=bool(given["balanced_sampler"]),
        class_weights=None if given["evaluate"] else given["class_weights"],
        fonts=None if given["fonts"] is None else Path(given["fonts"]),
        fake_size=given["fake_size"],
        seed=given["seed"],
        colour=bool(given["addition_augment"]),
        rand_augment=given["rand_augment"],
        mixup_alpha=given["mixup_alpha"] if given["mixup_enable"] else 0.0,
        cutmix_alpha=given["cutmix_alpha"] if given["cutmix_enable"] else 0.0,
        skip_corrupt=given["skip_corrupt"],
        max_value=given["max_value"],
        ignore_orientation=bool(given["ignore_orientation"]),
    )


def device_config(given: Given) -> DeviceConfig:
    """The devices and processes."""
    ids = given["device_ids"] or ()
    written = " ".join(map(str, ids))
    if any(index < 0 for index in ids):
        raise UserError(f"--device_ids {written}: GPUs are counted from 0")
    if len(set(ids)) < len(ids):
        raise UserError(f"--device_ids {written}: each GPU takes one process, name it once")
    for name, alone in (("world_size", 1), ("rank", 0)):
        if given[name] not in (None, alone) and not given["distributed"]:
            raise UserError(f"--{name} {given[name]} belongs to --distributed: add it or leave --{name} out")
    world, rank = given["world_size"], given["rank"]
    if world is not None and world < 1:
        raise UserError(f"--world_size {world}: must be at least 1")
    if rank is not None and not 0 <= rank < (world or rank + 1):
        raise UserError(f"--rank {rank}: processes are counted from 0 to world_size - 1")
    return DeviceConfig(
        ids=ids,
        distributed=bool(given["distributed"]),
        world_size=world,
        rank=rank,
        sync_bn=bool(given["sync_bn"]),
    )


def resume_file(given: Given) -> Path | None:
    """The checkpoint to continue from; an older config's default `checkpoint.pth.tar` counts only if it is a file."""
    value = given["resume_file"]
    if value is None or (value == "checkpoint.pth.tar" and not os.path.isfile(value)):
        return None
    return Path(value)


def run_config(given: Given, fields: Mapping[str, Any]) -> RunConfig:
    """The job of the run, and where its results go."""
    return RunConfig(
        case=given["case"],
        seed=given["seed"],
        evaluate=bool(given["evaluate"]),
        audit=bool(given["audit"]),
        dry_run=bool(given["dry_run"]),
        lr_test=bool(fields.get("run.lr_test", False)),
        resume=bool(given["resume"]),
        resume_file=resume_file(given),
        pretrained=given["pretrained"],
        ema_weights=bool(given["ema_weights"]),
        reference=given["reference"] if given["evaluate"] else None,
        keyword_file=given["keyword_file"],
        unresume_scope=given["unresume_scope"],
        weights_dir=Path(given["weights_dir"]),
        log_dir=Path(given["log_dir"]),
        save_freq=given["save_freq"],
        save_every=given["save_every"],
        keep=given["keep"],
        report_freq=given["report_freq"],
        tensorboard=bool(given["tensorboard"]),
        track=given["track"],
        verbose=bool(given["verbose"]) or bool(fields.get("run.verbose", False)),
        shortened=bool(given.replaced.keys() & {"epochs", "dataset", "fake_size"}),
        bn_batches=given["bn_batches"],
        delay=given["delay"],
    )


def probe_config(given: Given, fields: Mapping[str, Any]) -> ProbeConfig:
    """The tensors to write, and when."""
    for name in ("probe_index", "probe_iteration"):
        if any(number < 0 for number in given[name]):
            raise UserError(f"--{name}: {min(given[name])} is not a number from 0")
    if not given["probe_index"]:
        raise UserError("--probe_index: name at least one image of the batch, like 0")
    chosen = {"probe_list", "probe_index", "probe_iteration"} & given.explicit
    enable = bool(fields.get("probe.enable", False)) or bool(chosen)
    if enable and given["compile"] != "none":
        raise UserError("a probe sees no tensors inside a compiled network: leave --compile or the probe out")
    return ProbeConfig(
        enable=enable,
        layers=given["probe_list"],
        images=given["probe_index"],
        iterations=given["probe_iteration"],
    )
