"""How a user writes the fields of the configuration, for messages: the option or the keyword that sets each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from utils.config import keyword
from utils.config.options import OPTIONS
from utils.config.schema import TAGS

# Field -> its option, where that has another name.
_OTHER = {
    "model.name": "model",
    "model.stem.kernel": "stem_kernel",
    "model.block.downsample_order": "order",
    "model.quant.first_signed": "fm_first_signed",
    "model.quant.fm.custom": "fm_custom",
    "data.balanced": "balanced_sampler",
    "data.colour": "addition_augment",
    "loss.distill": "distill_teacher",
    "loss.distill.alpha": "distill_loss_alpha",
    "loss.distill.temperature": "distill_loss_temperature",
    "loss.distill.kind": "distill_loss_type",
    "loss.distill.pretrained": "distill_pretrained",
    "loss.distill.teacher.name": "distill_teacher",
    "loss.distill.teacher.width_alpha": "distill_width_alpha",
    "optim.name": "optimizer",
    "schedule.policy": "lr_policy",
    "schedule.decay": "lr_decay",
    "schedule.fix_step": "lr_fix_step",
    "schedule.custom_step": "lr_custom_step",
    "precision.level": "opt_level",
    "precision.dtype": "amp_dtype",
    "precision.channels_last": "memory_format",
    "probe.layers": "probe_list",
    "probe.images": "probe_index",
    "probe.iterations": "probe_iteration",
}


def changed(field: str, before: Any, now: Any) -> str:
    """A change of a field, in the words of a user.

    Args:
        field: its dotted name in `Config`.
        before: the value that it had, as `to_dict` gives it.
        now: the value that it has.

    Example:
        >>> from utils.config.spelling import changed
        >>> changed("data.balanced", False, True)
        '--balanced_sampler was off and is on now'
        >>> changed("model.quant.fm.levels", 4, 3)
        '--fm_level was 4 and is 3 now'
        >>> changed("model.activation", "relu", "none")
        '--keyword was with ReLU and is with NReLU now'
    """
    if field == "policy":
        return _changed_policy(before, now)
    if field == "model.quant.layer_bits":
        return f"--layer_bits {_changed_entries(before, now)}"
    if field == "data.world_size":
        return f"the number of processes was {before} and is {now} now"
    if field == "data.class_weight_values":
        return "--class_weights: the file has other weights now"
    if field == "loss.distill":
        before, now = (value["teacher"]["name"] if value else "none" for value in (before, now))
    option = option_of(field)
    if not option and field.startswith("loss.distill.teacher."):
        return "--distill_keyword has other words now"
    if field.endswith(".levels") and not any(value & (value - 1) for value in (before, now)):
        option, before, now = f"{option[:2]}_bit", before.bit_length() - 1, now.bit_length() - 1
    if option:
        if option == "input_size":
            before, now = (
                "x".join(map(str, value)) if isinstance(value, list) else value for value in (before, now)
            )
        elif field == "precision.channels_last":
            before, now = ("channels_last" if value else "contiguous" for value in (before, now))
        elif OPTIONS[option].kind is bool:
            flipped = field == "model.quant.fm.half_range"  # the option takes the default back
            before, now = ("on" if bool(value) != flipped else "off" for value in (before, now))
        return f"--{option} was {_text(before)} and is {_text(now)} now"
    words = [word_of(field, value) for value in (before, now)]
    if any(words):
        was, is_now = (f"with {word}" if word else f"without {words[1 - i]}" for i, word in enumerate(words))
        return f"--keyword was {was} and is {is_now} now"
    return f"{field} was {_text(before)} and is {_text(now)} now"


def option_of(field: str) -> str:
    """The option that sets a field, without dashes; empty where a keyword does, or neither."""
    parts = field.split(".")
    if field in _OTHER:
        return _OTHER[field]
    if len(parts) == 4 and parts[2] in TAGS:
        name = f"{parts[2]}_{'level' if parts[3] == 'levels' else parts[3]}"
        return name if name in OPTIONS else parts[3] if parts[3] in OPTIONS else ""
    last = parts[-1]
    if field.startswith("loss.distill.teacher.") or len(parts) == 1:
        return ""
    return last if last in OPTIONS and parts[1] not in ("block", "stem") else ""


def word_of(field: str, value: Any) -> str:
    """The first keyword that sets a field to a value; empty where none does."""
    short = field.removeprefix("model.") if field.count(".") > 1 else field
    parts = short.split(".")
    names = {field, short, f"{parts[0]}.{parts[-1]}", f"extra.{parts[-1]}"}
    for word, one in keyword.registry().items():
        if any(name in names and one.sets[name] == value for name in one.sets):
            return word
    return ""


def _changed_policy(before: Any, now: Any) -> str:
    """The change of the rules, which are those of a policy file and of `--full_precision`."""
    try:
        named = [[rule["name"] for rule in rules if rule["number"] == 0] for rules in (before, now)]
        others = [[rule for rule in rules if rule["number"] != 0] for rules in (before, now)]
    except (TypeError, KeyError):  # of another program
        return "--policy has other entries now"
    said = (
        [f"--full_precision was {_text(named[0])} and is {_text(named[1])} now"]
        if named[0] != named[1]
        else []
    )
    if others[0] != others[1]:
        said.append(f"--policy {_changed_entries(*others)}")
    return ", ".join(said)


def _changed_entries(before: Any, now: Any) -> str:
    """The end of a sentence about an option with entries, which are other ones now."""
    kinds = [f"{len(rules)} entries" if rules else "none" for rules in (before, now)]
    return f"was {kinds[0]} and is {kinds[1]} now" if kinds[0] != kinds[1] else "has other entries now"


def _text(value: Any) -> str:
    """A value as it is written on the command line."""
    if isinstance(value, list | tuple):
        return ",".join(map(str, value)) or "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_text(each)}" for name, each in value.items())
    return "none" if value in (None, "") else str(value)
