"""Checks of option values that are wrong whatever else is given."""

from __future__ import annotations

import math

from utils.config.command_line import Given
from utils.config.image_size import sides, size_text
from utils.config.resolve.data_and_run import resume_file
from utils.config.schema import LEAST, MOST, TAGS
from utils.errors import UserError


def _positive(given: Given, *names: str) -> None:
    for name in names:
        if given[name] is not None and not 0 < given[name] < math.inf:
            raise UserError(f"--{name} {given[name]}: must be a number greater than 0")


def _not_negative(given: Given, *names: str) -> None:
    for name in names:
        if given[name] is not None and not 0 <= given[name] < math.inf:
            raise UserError(f"--{name} {given[name]}: must be a number that is not negative")


def _share(given: Given, *names: str) -> None:
    for name in names:
        if given[name] is not None and not 0 <= given[name] < 1:
            raise UserError(f"--{name} {given[name]}: must be at least 0 and less than 1")


def check_numbers(given: Given) -> None:
    """Refuse values that are wrong whatever else is given."""
    _positive(
        given, "batch_size", "epochs", "iter_size", "num_classes", "width_alpha", "base",
        "report_freq", "keep", "fake_size", "grad_clip", "custom_lr", "lr_fix_step", "mixup_alpha", "cutmix_alpha",
        "focal_alpha", "distill_loss_temperature", "distill_width_alpha",
        *(f"{tag}_{name}" for tag in TAGS for name in ("boundary", "scale")),
    )  # fmt: skip
    _not_negative(
        given, "val_batch_size", "workers", "lr", "weight_decay", "custom_decay", "extra_epoch", "eta_min",
        "wakeup", "wakeup_epoch", "warmup", "warmup_epoch", "stable", "stable_epoch", "save_freq", "delay", "lr_decay",
        "save_every", "skip_corrupt", "bn_batches", "focal_gamma", "quant_loss", "dampen",
    )  # fmt: skip
    _share(given, "momentum", "label_smooth", "ema_decay", "val_split")
    _check_methods(given)
    for name in ("unresume_scope", "full_precision"):
        if "none" in given[name]:
            raise UserError(f"--{name} {','.join(given[name])}: none stands alone: leave it or the names out")
    size = given["input_size"]
    if size is not None and min(sides(size)) < 1:
        raise UserError(
            f"--input_size {size_text(size)}: must be a number greater than 0, or two, like 96x160"
        )
    if given["channels"] not in (1, 3):
        raise UserError(f"--channels {given['channels']}: write 3 for colours, or 1 for grey images")
    if given["rand_augment"] is not None and not 0 <= given["rand_augment"] <= 30:
        raise UserError(f"--rand_augment {given['rand_augment']}: must be from 0 to 30")
    if given["max_value"] is not None and not 1 <= given["max_value"] <= 65535:
        raise UserError(f"--max_value {given['max_value']}: must be from 1 to 65535")
    if given["batch_size"] == 1 and not given["evaluate"]:
        raise UserError("--batch_size 1: batch statistics need at least 2 images")
    if given["resume"] and resume_file(given) is not None:
        raise UserError("--resume contradicts --resume_file: keep one of them")
    if "proxquant_step" in given.explicit and given["proxquant_step"] <= 0:
        raise UserError(f"--proxquant_step {given['proxquant_step']}: must be greater than 0")
    if (given["mean"] is None) != (given["std"] is None):
        raise UserError("--mean and --std belong together: give both or neither")
    numbers, these = "three numbers, one per channel, like 0.5,0.5,0.5", "all three"
    if given["channels"] == 1:
        numbers, these = "one number with --channels 1, like 0.5", "it"
    for name in ("mean", "std"):
        if given[name] is not None and len(given[name]) != given["channels"]:
            instead = ", or add --channels 1" if len(given[name]) == 1 else ""
            raise UserError(f"--{name}: give {numbers}{instead}")
        if given[name] is not None and not all(map(math.isfinite, given[name])):
            raise UserError(f"--{name}: give finite numbers")
        if given[name] is not None and max(given[name]) > 1:
            raise UserError(
                f"--{name}: {max(given[name]):g} is not of images in [0, 1]; divide {these} by 255"
            )
    if given["mean"] is not None and min(given["mean"]) < 0:
        raise UserError(
            f"--mean: {min(given['mean']):g} is not of images in [0, 1]; give numbers from 0 to 1"
        )
    if given["std"] is not None and min(given["std"]) <= 0:
        raise UserError("--std: must be greater than 0")
    for tag in TAGS:
        for name in (f"{tag}_boundary", f"{tag}_scale", f"{tag}_grad_window"):
            if not LEAST <= given[name] <= MOST:
                raise UserError(f"--{name} {given[name]}: must be from {LEAST:g} to {MOST:g}")
        if not 0 <= given[f"{tag}_grad_delta"] <= MOST:
            raise UserError(f"--{tag}_grad_delta {given[f'{tag}_grad_delta']}: must be from 0 to {MOST:g}")
        if not math.isfinite(given[f"{tag}_correlate"]):
            raise UserError(f"--{tag}_correlate {given[f'{tag}_correlate']}: give a finite number")
    if not 0 <= given["seed"] < 2**63:
        raise UserError(f"--seed {given['seed']}: must be from 0 to 2^63 - 1")
    if given["val_split"] and given["val_batch_size"] == 0:
        raise UserError(
            "--val_split and --val_batch_size 0: nothing would be validated; leave one of them out"
        )
    if given["evaluate"] and given["val_batch_size"] == 0:
        raise UserError("--evaluate needs validation images: give a --val_batch_size above 0")


def _check_methods(given: Given) -> None:
    """Refuse numbers of the training methods that are wrong whatever else is given."""
    threshold = given["freeze_threshold"]
    if "freeze_threshold" in given.explicit and (
        len(threshold) not in (1, 2) or not all(0 < value < 1 for value in threshold)
    ):
        raise UserError("--freeze_threshold: give one number between 0 and 1, or two, like 0.04,0.01")
    if not 0 < given["freeze_momentum"] < 1:
        raise UserError(f"--freeze_momentum {given['freeze_momentum']}: must be between 0 and 1")
    if not 0 < given["distill_loss_alpha"] <= 1:
        raise UserError(
            f"--distill_loss_alpha {given['distill_loss_alpha']}: must be above 0 and at most 1, which leaves the "
            "labels out"
        )
    if not 0 < given["re_init_percentile"] <= 100:
        raise UserError(
            f"--re_init_percentile {given['re_init_percentile']}: must be above 0 and at most 100"
        )
    if given["ema_weights"] and given["pretrained"] in (None, "none"):
        raise UserError("--ema_weights needs a checkpoint that has them: give --pretrained")
