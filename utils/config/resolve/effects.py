"""Options that nothing in the run reads: warnings, and errors where an option names what is meant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from utils.config import keyword
from utils.config.command_line import Given
from utils.config.data_sets import FOLDER_SETS, WITHOUT_FILES
from utils.config.layer_bits import SINGLE_LAYERS
from utils.config.methods import PROJECT, record_of
from utils.config.options import OLDER, OPTIONS
from utils.config.resolve.bits import is_full_precision
from utils.config.resolve.data_and_run import resume_file
from utils.config.schema import READ_ETA_MIN, TAGS
from utils.errors import UserError

# Options that name what a run shall use: option -> the option that decides whether it does, and what to write.
# Without effect they are errors: the run would train something else than was meant.
NAMING = {
    "root": ("dataset", "write --dataset folder to train on a folder of images"),
    **{
        name: ("dataset", "write --dataset folder and --root for image files of your own")
        for name in ("skip_corrupt", "max_value", "ignore_orientation", "val_split")
    },
    "fake_size": ("dataset", "write --dataset fake for computed images"),
    "fonts": ("dataset", "write --dataset glyphs to draw with them"),
    "opt_level": ("fp16", "add --fp16"),
    "re_init_missing": ("pretrained", "write --re_init"),
    "re_init_range": ("re_init", "add --re_init"),
    "re_init_percentile": ("re_init_range", "add --re_init --re_init_range percentile"),
    "mixup_alpha": ("mixup_enable", "add --mixup_enable"),
    "cutmix_alpha": ("cutmix_enable", "add --cutmix_enable"),
    "reference": ("evaluate", "add -e to evaluate beside it"),
    "freeze_momentum": ("freeze_threshold", "add --freeze_threshold"),
    "proxquant_step": ("keyword", "add the keyword proxquant"),
}
FULL_PRECISION = 32  # bits; configs write them for a tag that is not quantized


def without_effect(given: Given, fields: Mapping[str, Any]) -> list[str]:
    """Warnings for options that were given although nothing in this run reads them.

    Raises:
        UserError: such an option names what the run shall use, and is no default that configs write out.
    """
    _refuse_unused_bits(given, fields)
    nothing = is_full_precision(given) and not any(given[f"{tag}_enable"] for tag in TAGS)
    policy = given["lr_policy"]
    dataset = given["dataset"] or fields.get("data.dataset", "digits")
    calibrates = bool(given["stable"] or given["stable_epoch"])
    untaught = given["distill_teacher"] in (None, "none")
    unloaded = given["pretrained"] in (None, "", "none")
    idle = {
        "lr_fix_step": (policy != "fix_step", "without --lr_policy fix_step"),
        "lr_custom_step": (policy in ("fix_step", "decay", "fix", "cos"), f"with --lr_policy {policy}"),
        "eta_min": (policy not in READ_ETA_MIN, f"with --lr_policy {policy}"),
        "momentum": (given["optimizer"].upper() == "ADAM", "with --optimizer ADAM"),
        "nesterov": (given["optimizer"].upper() == "ADAM", "with --optimizer ADAM"),
        "custom_lr": (not given["custom_lr_list"], "without --custom_lr_list"),
        "custom_decay": (not given["custom_decay_list"], "without --custom_decay_list"),
        "freeze_momentum": (not given["freeze_threshold"], "without --freeze_threshold"),
        "distill_loss_temperature": (
            untaught or given["distill_loss_type"] == "mse",
            "without --distill_teacher" if untaught else "with --distill_loss_type mse",
        ),
        **{
            name: (untaught, "without --distill_teacher")
            for name in ("distill_loss_alpha", "distill_loss_type")
        },
        "resume_file": (
            given["resume_file"] is not None and resume_file(given) is None and not given["resume"],
            "here: checkpoint.pth.tar is no file, and -r continues a case",
        ),
        "opt_level": (not given["fp16"] and given["opt_level"] != "O0", "without --fp16: all is float32"),
        "re_init_missing": (unloaded, "without --pretrained"),
        "re_init_range": (not (given["re_init"] or given["re_init_missing"]), "without --re_init"),
        "re_init_percentile": (given["re_init_range"] != "percentile", "without --re_init_range percentile"),
        "proxquant_step": ("quant.proxquant" not in fields, "without the keyword proxquant"),
        "unresume_scope": (unloaded, "without --pretrained"),
        "fake_size": (dataset != "fake", f"with the data set {dataset}"),
        "fonts": (dataset != "glyphs", f"with the data set {dataset}"),
        **{
            name: (dataset not in FOLDER_SETS, f"with the data set {dataset}")
            for name in ("skip_corrupt", "max_value", "ignore_orientation", "val_split")
        },
        "mixup_alpha": (not given["mixup_enable"], "without --mixup_enable"),
        "cutmix_alpha": (not given["cutmix_enable"], "without --cutmix_enable"),
        **{
            name: (bool(given["evaluate"]), "with --evaluate")
            for name in ("track", "probe_list", "probe_index", "probe_iteration")
        },
        "reference": (not given["evaluate"], "without --evaluate"),
        "balanced_sampler": (bool(given["evaluate"]) and not given["bn_batches"], "with --evaluate"),
        "class_weights": (
            bool(given["evaluate"]) or (not untaught and given["distill_loss_alpha"] == 1),
            "with --evaluate"
            if given["evaluate"]
            else "with --distill_loss_alpha 1, which leaves the labels out",
        ),
        **{
            name: (nothing and given[name] != FULL_PRECISION, f"with --bits {given['bits']}")
            for name in SINGLE_LAYERS
        },
        "order": ("block.downsample_order" not in fields, "without the keyword ReShapeResolution"),
        "root": (
            dataset in WITHOUT_FILES and (dataset != "fake" or "dataset" not in given.replaced),
            f"with the data set {dataset}, which needs no files",
        ),
        **{f"{tag}_correlate": (not calibrates, "without --stable") for tag in TAGS},
        **{
            f"{tag}_adaptive_restore": (given[f"{tag}_adaptive"] == "none", f"without --{tag}_adaptive")
            for tag in TAGS
        },
        **{
            f"{tag}_ratio": (record_of(method, tag).ignores("ratio"), f"with {_called(method)}")
            for tag in TAGS
            for method in [fields.get(f"quant.{tag}.method", "none")]
        },
        **{option.name: (True, f"here: it is {option.help}") for group in OLDER.values() for option in group},
    }
    warnings = []
    for name, (is_idle, when) in idle.items():
        if is_idle and name in given.explicit:
            if name in NAMING:
                decides, instead = NAMING[name]
                refuse_naming(name, when, given, (decides,), instead)
            warnings.append(f"{given.through.get(name, f'--{name}')} has no effect {when}")
    warnings = list(dict.fromkeys(warnings))  # --first_last_bit is two options
    warnings += _idle_words(given)
    for name in ("custom_lr", "custom_decay"):
        if given[f"{name}_list"] and name not in given.explicit:
            warnings.append(f"--{name}_list without --{name}: it is {given[name]}")
    return warnings


def _refuse_unused_bits(given: Given, fields: Mapping[str, Any]) -> None:
    """Refuse bits and levels of tensors that are not quantized, where a method is named."""
    if all(fields.get(f"quant.{tag}.method", "none") == "none" for tag in TAGS):
        return
    for tag, what in TAGS.items():
        for name in (f"{tag}_bit", f"{tag}_level"):
            written = name in given.explicit and given[name] != FULL_PRECISION
            if written and not given[f"{tag}_enable"]:
                raise UserError(
                    f"--{name} {given[name]}: {what}s are not quantized: add --{tag}_enable, or leave --{name} out"
                )


def refuse_naming(name: str, when: str, given: Given, decides: Sequence[str], instead: str) -> None:
    """Refuse an option without effect that names what is meant, unless it has its default or was made idle.

    Defaults stay a warning, since configs write them out, and so does what a later option has made idle.

    Args:
        name: the option.
        when: it has no effect.
        given: the options.
        decides: the options that decide whether it has an effect.
        instead: what to write.
    """
    default = given[name] in (OPTIONS[name].default, "O1")  # O1: the opt_level that --fp16 alone takes
    if not default and not given.replaced.keys() & set(decides):
        value = "" if given[name] is True else f" {given[name]}"
        raise UserError(f"--{name}{value} has no effect {when}: {instead}, or leave --{name} out")


def _called(method: str) -> str:
    """A method's name in a warning; the project's own methods are named together."""
    return "the methods of this project" if method in PROJECT else method


def _idle_words(given: Given) -> list[str]:
    """Warnings for keywords of disabled quantizers, and for `progressive` without a policy."""
    enabled = [tag for tag in TAGS if given[f"{tag}_enable"]]
    warnings = []
    for word in given["keyword"]:
        tags = {
            tag for name in keyword.registry()[word].sets for tag in TAGS if name.startswith(f"quant.{tag}.")
        }
        if len(tags) == 1 and enabled and not tags & set(enabled):
            warnings.append(f"the keyword {word} has no effect without --{tags.pop()}_enable")
        if word == "progressive" and given["policy"] in (None, "none"):
            warnings.append("the keyword progressive has no effect without --policy, which changes levels")
    return warnings
