"""The configuration of loss, teacher, optimizer, schedule and precision."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from utils.config import keyword
from utils.config.command_line import Given
from utils.config.methods import compared_with_weights, record_of
from utils.config.resolve.data_and_run import DATASETS
from utils.config.resolve.families import family_of
from utils.config.resolve.network import model_config
from utils.config.schema import (
    DistillConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    PrecisionConfig,
    QuantConfig,
    ScheduleConfig,
    WeightsConfig,
)  # fmt: skip
from utils.errors import UserError


def loss_config(
    given: Given, words: tuple[str, ...], fields: Mapping[str, Any], model: ModelConfig
) -> LossConfig:
    """The loss that training minimises."""
    smooth = given["label_smooth"]
    for name in ("quant_loss", "dampen"):
        if given[name] > 0:
            _check_levels_are_weights(f"--{name} {given[name]}", model.quant)
    return LossConfig(
        label_smooth=fields.get("loss.label_smooth", 0.0) if smooth is None else smooth,
        focal_gamma=given["focal_gamma"],
        focal_alpha=given["focal_alpha"],
        distill=_distill_config(given, words, model),
        quant_loss=given["quant_loss"],
        dampen=given["dampen"],
    )


def _distill_config(given: Given, words: tuple[str, ...], model: ModelConfig) -> DistillConfig | None:
    """The teacher, a full-precision network for the same data, and the distillation loss."""
    name, source = given["distill_teacher"], given["distill_pretrained"]
    if name == "none":  # takes a config's teacher back
        return None
    if name is None:
        for option in ("distill_keyword", "distill_width_alpha", "distill_pretrained"):
            if option in given.explicit:
                raise UserError(f"--{option} needs a teacher: give --distill_teacher MODEL or leave it out")
        return None
    if source in (None, "none"):
        raise UserError(
            "--distill_teacher needs its weights: give --distill_pretrained CHECKPOINT, or --distill_teacher none"
        )
    theirs, registry = given["distill_keyword"], keyword.registry()
    if theirs is None:
        theirs = tuple(word for word in words if registry[word].group != "quantizer")
    quantizing = [word for word in theirs if word in registry and registry[word].group == "quantizer"]
    if quantizing:
        raise UserError(
            f"--distill_keyword: a teacher is in full precision; leave {', '.join(quantizing)} out"
        )
    if not set(theirs) & set(DATASETS.values()):
        theirs = (*(word for word in words if word in DATASETS.values()), *theirs)
    has_width = family_of(name) not in ("pytorch", "torchvision", "timm")
    options = {
        "model": name,
        "width_alpha": given["distill_width_alpha"] or (given["width_alpha"] if has_width else 1.0),
        **{name: given[name] for name in ("num_classes", "input_size", "channels") if name in given.explicit},
    }
    try:
        fields = keyword.resolve(theirs, family_of(name)).fields
        teacher, _ = model_config(Given(options), fields, QuantConfig())
    except UserError as error:
        raise UserError(
            f"--distill_teacher {name}: {error}; its own keywords are --distill_keyword"
        ) from error
    if teacher.num_classes != model.num_classes:
        raise UserError(
            f"--distill_teacher {name} has {teacher.num_classes} classes, the network {model.num_classes}: "
            "give --distill_keyword the same data set"
        )
    return DistillConfig(
        teacher=teacher,
        pretrained=source,
        alpha=given["distill_loss_alpha"],
        temperature=given["distill_loss_temperature"],
        kind=given["distill_loss_type"],
    )


def _check_levels_are_weights(option: str, quant: QuantConfig) -> None:
    """Refuse an option that compares weights with their levels, where these have another scale."""
    weights = quant.wt
    if not weights.enable:
        raise UserError(f"{option}: no weight is quantized; add --wt_enable or leave it out")
    record = record_of(weights.method, "wt")
    if record.other_scale and not (weights.binary_scale and record.reads_option("binary_scale")):
        raise UserError(
            f"{option}: the levels of {weights.method} are of another scale than the weights; use "
            f"{compared_with_weights()}"
        )
    if weights.adaptive != "none" and not weights.adaptive_restore:
        raise UserError(
            f"{option}: --wt_adaptive {weights.adaptive} leaves the levels at another scale than the weights; "
            "add --wt_adaptive_restore"
        )


def weights_config(given: Given, quant: QuantConfig) -> WeightsConfig:
    """Averaging and freezing of weights, after each step."""
    threshold = given["freeze_threshold"]
    if threshold:
        written = ",".join(map(str, threshold))
        _check_levels_are_weights(f"--freeze_threshold {written}", quant)
        if quant.wt.adaptive != "none":
            raise UserError(
                f"--freeze_threshold {written}: frozen weights would move with --wt_adaptive's mean"
            )
    return WeightsConfig(
        ema_decay=given["ema_decay"], freeze_threshold=threshold, freeze_momentum=given["freeze_momentum"]
    )


def optim_config(given: Given) -> OptimConfig:
    """The optimizer and the rules of its parameter groups."""
    return OptimConfig(
        name=given["optimizer"],
        lr=given["lr"],
        momentum=given["momentum"],
        nesterov=bool(given["nesterov"]) and given["optimizer"].upper() != "ADAM",
        weight_decay=given["weight_decay"],
        decay_small=bool(given["decay_small"]),
        custom_decay_list=given["custom_decay_list"],
        custom_decay=given["custom_decay"] if given["custom_decay_list"] else 0.0,
        custom_lr_list=given["custom_lr_list"],
        custom_lr=given["custom_lr"] if given["custom_lr_list"] else 0.0,
        grad_clip=given["grad_clip"],
        iter_size=given["iter_size"],
    )


def schedule_config(given: Given) -> tuple[ScheduleConfig, tuple[str, ...]]:
    """The schedule, and a warning where a shortened run loses entries of `lr_custom_step`.

    An entry of `lr_custom_step` beyond the epochs is a mistake (`utils.step.schedule.check_schedule`) unless a later
    `--epochs` has replaced the number that it was written for.
    """
    epochs, before = given["epochs"], given.replaced.get("epochs", [])
    steps, beyond, warnings = given["lr_custom_step"], (), ()
    if before and "lr_custom_step" not in given.replaced:
        beyond = tuple(step for step in steps if step > epochs)
    if beyond:
        written = ",".join(map(str, beyond))
        warnings = (f"--lr_custom_step: {written} falls away, since --epochs {epochs} replaces {before[-1]}",)
    config = ScheduleConfig(
        policy=given["lr_policy"],
        epochs=given["epochs"],
        extra_epoch=given["extra_epoch"],
        decay=given["lr_decay"],
        eta_min=given["eta_min"],
        fix_step=given["lr_fix_step"],
        custom_step=tuple(step for step in steps if step not in beyond),
        wakeup=given["wakeup"],
        wakeup_epoch=given["wakeup_epoch"],
        warmup=given["warmup"],
        warmup_epoch=given["warmup_epoch"],
    )
    return config, warnings


def precision_config(given: Given) -> PrecisionConfig:
    """The floating-point types."""
    for name in ("amp_dtype", "amp_backend"):
        if given[name] is not None and not given["fp16"]:
            raise UserError(f"--{name} {given[name]} needs --fp16: without it everything is float32")
    if given["amp_backend"] == "apex":
        raise UserError(
            "--amp_backend apex: NVIDIA removed amp from apex in 2025; leave --amp_backend out, torch has its own"
        )
    if given["compile"] != "none" and given["kernels"] == "compiled":
        raise UserError("--compile compiles the quantizers too: leave --kernels out")
    if given["compile"] != "none" and given["recompute"]:
        raise UserError("--compile decides by itself what is computed again: leave --recompute out")
    if given["compile"] in ("reduce-overhead", "max-autotune") and given["iter_size"] > 1:
        raise UserError(
            f"--compile {given['compile']} replays graphs whose tensors the next pass overwrites, which --iter_size "
            f"{given['iter_size']} still needs: write --compile default"
        )
    level = (given["opt_level"] or "O1") if given["fp16"] else "O0"
    return PrecisionConfig(
        level=level,
        dtype=given["amp_dtype"] or "bfloat16",
        tf32=bool(given["tf32"]),
        channels_last=given["memory_format"] == "channels_last",
        compile=given["compile"],
        kernels=given["kernels"],
        recompute=bool(given["recompute"]),
    )
