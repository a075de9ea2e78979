"""The quantizers that options and keywords ask for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from utils.config.command_line import Given
from utils.config.layer_bits import FULL_BITS
from utils.config.methods import PROJECT, attention_fault, readers, record_of
from utils.config.resolve.bits import fitting_bits, is_full_precision
from utils.config.resolve.effects import refuse_naming
from utils.config.resolve.families import family_of
from utils.config.resolve.layers import layer_options
from utils.config.schema import GRAD_TYPES, TAGS, QuantConfig, QuantizerConfig, Rule
from utils.config.vocabulary import METHOD_WORDS, own_method_words
from utils.errors import UserError


def quant_config(given: Given, fields: Mapping[str, Any]) -> tuple[QuantConfig, tuple[str, ...]]:
    """The quantizers of options and keyword fields, and warnings about options without effect."""
    warnings: list[str] = []
    parts = {tag: _quantizer_config(tag, given, fields, warnings) for tag in TAGS}
    first_last = bool(fields.get("quant.first_last", False))
    matmul = bool(fields.get("quant.attention_matmul", False))
    if matmul:
        _check_matmul(given, parts["fm"], warnings)
    quant = QuantConfig(
        **parts,
        **layer_options(given, parts, first_last=first_last),
        padding_after_quant=bool(given["padding_after_quant"]),
        re_init=bool(given["re_init"] or given["re_init_missing"]),
        re_init_missing=bool(given["re_init_missing"]),
        re_init_range=given["re_init_range"],
        re_init_percentile=given["re_init_percentile"],
        first_last=first_last,
        first_signed=bool(given["fm_first_signed"]),
        depthwise=bool(fields.get("quant.depthwise", True)),
        attention_matmul=matmul,
    )
    records = [record_of(part.method, tag) for tag, part in parts.items() if part.enable]
    known = all(part.method in PROJECT for part in parts.values() if part.enable)
    searching = quant.re_init_range != "paper"
    clipping = not all(record.ignores("re_init_range") for record in records)
    if quant.re_init and quant.enabled and searching and not clipping:
        warnings.append(
            f"--re_init_range {quant.re_init_range} has no effect: "
            + ("no quantizer has a clipping value that it could find" if known else "no quantizer reads it")
        )
    learning = not all(record.ignores("re_init") for record in records) or (searching and clipping)
    if quant.re_init and quant.enabled and not learning:
        why = (
            "no quantizer of this network learns its range"
            if known
            else "no quantizer of this network reads it"
        )
        warnings.append(f"--re_init has no effect: {why}")
    if not quant.enabled:
        for name in ("padding_after_quant", "re_init", "re_init_missing", "stable", "stable_epoch"):
            if name in given.explicit:
                warnings.append(
                    f"--{name} has no effect: nothing is quantized, see --fm_enable and --wt_enable"
                )
        if any(part.method != "none" for part in parts.values()) and not is_full_precision(given):
            warnings.append(
                "the network stays in full precision: add --bits 2, or --fm_enable and --wt_enable, to quantize it"
            )
    return quant, tuple(warnings)


def _quantizer_config(
    tag: str, given: Given, fields: Mapping[str, Any], warnings: list[str]
) -> QuantizerConfig:
    bit, level = given[f"{tag}_bit"], given[f"{tag}_level"]
    enable = bool(given[f"{tag}_enable"])
    if not 1 <= bit <= (16 if enable else 32):  # configs write 32 for "full precision" on a disabled tag
        raise UserError(
            f"--{tag}_bit {bit}: must be from 1 to 16; leave --{tag}_enable out for full precision"
        )
    if level is not None and not 2 <= level <= 2**16:
        raise UserError(f"--{tag}_level {level}: must be from 2 to 65536 (3 is ternary)")
    if level is not None and f"{tag}_bit" in given.explicit and level > 2**bit:
        raise UserError(f"--{tag}_level {level} does not fit --{tag}_bit {bit}, which has {2**bit} levels")
    method = fields.get(f"quant.{tag}.method", "none")
    if enable and method == "none":
        naming = (*METHOD_WORDS, *own_method_words(tag))
        asked = given.through.get(f"{tag}_enable", f"--{tag}_enable")
        raise UserError(
            f"{asked}: which quantizer? Add one of the keywords {', '.join(naming[:-1])} or {naming[-1]} to --keyword"
        )
    if not enable:
        written = sorted(name for name in given.explicit if name.startswith(f"{tag}_"))
        warnings.extend(f"--{name} has no effect without --{tag}_enable" for name in written)
    levels = 2**bit if level is None else level
    record = record_of(method, tag)
    if record.levels is not None and level is None and f"{tag}_bit" not in given.explicit:
        levels = record.levels
    binary_scale = bool(fields.get(f"quant.{tag}.binary_scale", False))
    if enable:
        _check_method(tag, method, levels, binary_scale, given, fields, warnings)
    half_default = tag == "fm"
    return QuantizerConfig(
        tag=tag,
        enable=enable,
        method=method,
        levels=levels,
        half_range=half_default != bool(given[f"{tag}_half_range"]),
        grid=given[f"{tag}_grid"],
        boundary=given[f"{tag}_boundary"],
        scale=given[f"{tag}_scale"],
        ratio=given[f"{tag}_ratio"],
        correlate=given[f"{tag}_correlate"],
        quant_group=given[f"{tag}_quant_group"],
        adaptive=given[f"{tag}_adaptive"],
        adaptive_restore=bool(given[f"{tag}_adaptive_restore"]) or record.restores,
        grad_type=given[f"{tag}_grad_type"],
        grad_scale=given[f"{tag}_grad_scale"],
        grad_delta=given[f"{tag}_grad_delta"],
        grad_window=given[f"{tag}_grad_window"],
        gamma=bool(fields.get(f"quant.{tag}.gamma", False)),
        binary_scale=binary_scale,
        custom=given["fm_custom"] if tag == "fm" else "none",
        custom_update=bool(fields.get("quant.custom_update", False)),
        closed_form=bool(fields.get("quant.closed_form", False)),
        proxquant_step=given["proxquant_step"] if "quant.proxquant" in fields else 0,
        progressive=bool(fields.get("quant.progressive", False)),
        stable=given["stable"],
        stable_epoch=given["stable_epoch"],
        extra=extra(fields),
    )


def _check_method(
    tag: str, method: str, levels: int, binary_scale: bool, given: Given, fields: Mapping[str, Any],
    warnings: list[str],
) -> None:  # fmt: skip
    """Refuse options that contradict an enabled quantizer's method; warn of those without effect."""
    record, kind = record_of(method, tag), given[f"{tag}_grad_type"]
    for option, reason in record.refuses.items():
        if f"{tag}_{option}" in given.explicit:
            raise UserError(f"--{tag}_{option}: {reason}")
    if binary_scale and levels != 2:
        raise UserError(f"the keyword {tag}_bin needs {_proposal(tag, given, fields)}, not {levels} levels")
    if record.levels not in (None, levels):
        what = "binary" if record.levels == 2 else f"of {record.levels} levels"
        which = "keyword" if method in PROJECT else "method"
        raise UserError(
            f"the {which} {method} is {what}: give {_proposal(tag, given, fields)}, not {levels} levels"
        )
    if _by_bits(tag, given) and _fitting(tag, levels, given, fields) != levels:
        # The options of the tag are checked where the quantizer is built, in their words.
        raise UserError(
            f"--bits {given['bits']}: {record.title or method} has no {levels} levels for {TAGS[tag]}s: give "
            f"{_proposal(tag, given, fields)}"
        )
    *others, last = (each for each in GRAD_TYPES if record.takes_grad_type(each))
    takes = f"{', '.join(others)} or {last}"
    if kind == "Triangle" and not record.takes_grad_type(kind):
        raise UserError(f"--{tag}_grad_type Triangle belongs to binary activations; write {takes}")
    if not record.takes_grad_type(kind):
        raise UserError(f"--{tag}_grad_type {kind} does not go with {method}; write {takes}")
    if kind in record.idle_grad_types:
        reason = record.idle_grad_types[kind]
        warnings.append(f"--{tag}_grad_type {kind} has no effect with {method}, {reason}")
    if given[f"{tag}_grid"] == "midtread":
        if record.ignores("grid"):
            raise UserError(f"--{tag}_grid midtread belongs to {readers('grid')}, not to {method}")
        if (tag == "fm") != bool(given[f"{tag}_half_range"]):
            raise UserError(f"--{tag}_grid midtread needs a full range: change --{tag}_half_range")
        if levels < 3:
            raise UserError(f"--{tag}_grid midtread has no level above zero at {levels} levels; use midrise")
    if tag == "fm" and given["fm_custom"] != "none" and record.ignores("custom"):
        raise UserError(f"--fm_custom belongs to the keyword {readers('custom')}, not to {method}")
    by_group = f"quant.{tag}.gamma" in fields or given[f"{tag}_adaptive"] != "none"
    for option, written in (
        ("half_range", f"{tag}_half_range" in given.explicit),
        ("boundary", f"{tag}_boundary" in given.explicit),
        ("grad_scale", given[f"{tag}_grad_scale"] != "none"),
        ("quant_group", f"{tag}_quant_group" in given.explicit and not by_group),
    ):
        if written and record.ignores(option):
            warnings.append(f"--{tag}_{option} has no effect with {method}{record.without_effect(option)}")
    for option, (most, reason, instead) in record.limits.items():
        if given[f"{tag}_{option}"] > most:
            raise UserError(f"--{tag}_{option} {given[f'{tag}_{option}']}: {reason}; {instead}")
    behind_relu = (
        tag == "fm" and not given["fm_half_range"] and fields.get("model.activation", "relu") == "relu"
    )
    by_formula = given["re_init"] and given["re_init_range"] == "paper" and not given["evaluate"]
    if by_formula and behind_relu and record.initial_step and levels == 2:
        warnings.append(
            "--re_init: the formula's clip value is too small for one-bit activations behind a ReLU; give "
            "--re_init_range mse"
        )
    scaled = given[f"{tag}_grad_scale"] not in ("none", "paper")
    if f"{tag}_scale" in given.explicit and record.ignores("scale") and not scaled:
        unless = (
            "" if record.ignores("grad_scale") and method not in PROJECT else f" without --{tag}_grad_scale"
        )
        warnings.append(f"--{tag}_scale has no effect with {method}{unless}")
    first = given.through.get("first_bit", "--first_bit")
    if tag == "fm" and given["fm_first_signed"]:
        for idle, when in (
            (
                given["first_bit"] not in (None, FULL_BITS),
                f"with {first}, whose levels are signed anyway",
            ),
            (
                given["first_bit"] == FULL_BITS and "quant.first_last" in fields,
                f"with {first} {FULL_BITS}, which keeps the first layer in full precision",
            ),
            ("quant.first_last" not in fields, "without the keyword first-last"),
            (
                (family_of(given["model"]) not in ("resnet", "pytorch", "own")),
                f"on {given['model']}, whose first layer has signed levels anyway",
            ),
            (
                bool(given["fm_half_range"]),
                "with --fm_half_range, which makes the levels of all layers signed",
            ),
            (record.ignores("half_range"), f"with {method}{record.without_effect('half_range')}"),
        ):
            if idle:
                warnings.append(f"--fm_first_signed has no effect {when}")
    for word, option in (("custom-update", "custom_update"), ("closed_form", "closed_form")):
        if f"quant.{option}" in fields and record.ignores(option):
            reading_methods = readers(option)
            warnings.append(
                f"the keyword {word} has no effect on {tag}, which is not quantized by {reading_methods}"
            )


def check_gradients(given: Given, quant: QuantConfig, policy: Sequence[Rule]) -> list[str]:
    """Refuse the fields of a gradient that a method, or its type of gradient, does not read; warn of defaults."""
    warnings = []
    typed = any("grad_type" in rule.values for rule in policy)  # later, perhaps
    for config in (quant.fm, quant.wt, quant.ot):
        tag, method, kind = config.tag, config.method, f"{config.tag}_grad_type"
        record = record_of(method, tag)
        for option in ("grad_delta", "grad_window"):
            name = f"{tag}_{option}"
            if not config.enable or name not in given.explicit:
                continue
            if record.ignores(option):
                when, decides = f"with {method}{record.without_effect(option)}", ("keyword",)
                instead = f"choose {readers(option)}"
            elif option == "grad_window" and method in PROJECT and config.grad_type == "none" and not typed:
                when, decides = f"while --{kind} is none", ("keyword", kind)
                instead = f"add --{kind} STE{' or Triangle' if record.takes_grad_type('Triangle') else ''}"
            else:
                continue
            refuse_naming(name, when, given, decides, instead)
            warnings.append(f"--{name} has no effect {when}")
    return warnings


def _check_matmul(given: Given, fm: QuantizerConfig, warnings: list[str]) -> None:
    """Refuse the word `attention-matmul` for a method without the levels that it needs; warn where it is idle."""
    if fm.enable and (fault := attention_fault(fm)):
        raise UserError(f"attention-matmul: {fault}")
    if not fm.enable and not is_full_precision(given):
        warnings.append("the keyword attention-matmul has no effect without --fm_enable")


def _by_bits(tag: str, given: Given) -> bool:
    """Whether `--bits` says the number of levels of a tag."""
    return f"{tag}_bit" in given.through


def _fitting(tag: str, levels: int, given: Given, fields: Mapping[str, Any]) -> int:
    """The number of levels that a tag's method and keywords take, closest to `levels`."""
    if fields.get(f"quant.{tag}.binary_scale", False):
        return 2
    half_range = (tag == "fm") != bool(given[f"{tag}_half_range"])
    return record_of(fields.get(f"quant.{tag}.method", "none"), tag).fitting_levels(levels, half_range)


def _proposal(tag: str, given: Given, fields: Mapping[str, Any]) -> str:
    """What to write for a number of levels that is taken: `--bits` where that was written, else the tag's option."""
    if _by_bits(tag, given):
        return f"--bits {fitting_bits(given, lambda name, levels: _fitting(name, levels, given, fields))}"
    levels = _fitting(tag, 2 ** given[f"{tag}_bit"], given, fields)
    return f"--{tag}_bit 1" if levels == 2 else f"--{tag}_level {levels}"


def extra(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that a user's own keywords set, by their names without `extra.`."""
    return {name.removeprefix("extra."): value for name, value in fields.items() if name.startswith("extra.")}
