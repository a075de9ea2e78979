"""A record for each quantization method and tag: which options it reads, and what they may be.

Everything that must know what an option means to a method asks its record; no other file of the project compares
methods by name. A method of a user's own brings its record when it registers (`model.quant.register`); of one that
brings none nothing is claimed. Nothing heavy is imported here, since options are checked before torch is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from utils.config.layer_bits import FULL_BITS, TERNARY, levels_of
from utils.config.schema import GRAD_TYPES, TAGS, QuantizerConfig
from utils.text import closest

# Options without their tag, fields of keywords, `--re_init` and its search: what some methods read and others do not.
READABLE = frozenset({
    "boundary", "scale", "ratio", "half_range", "grid", "quant_group", "grad_scale", "grad_delta", "grad_window",
    "custom", "binary_scale", "custom_update", "closed_form", "re_init", "re_init_range",
})  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class MethodRecord:
    """The options that a method reads on one tag, and the values that they may have.

    Attributes:
        title: the name of the method in messages; empty: the name it is registered by.
        reads: the options of `READABLE` that it reads; None: unknown, so that no option is reported as without effect.
        reasons: option that it does not read -> the rest of a sentence that says why, for warnings.
        grad_types: values of `grad_type` that it takes beside "none" and "STE", which all methods take; None: unknown.
        idle_grad_types: values of `grad_type` that change nothing -> the rest of a sentence that says why.
        levels: the only number of levels that it has; None: several.
        nearest_levels: the closest number of levels that it takes, of a number and whether they start at zero; None:
            all.
        refuses: option -> why it cannot be written.
        limits: option -> its highest value, the rest of a sentence that says why, and the text to write instead.
        restores: it undoes the normalisation of `adaptive` whatever `adaptive_restore` says.
        other_scale: its levels have another scale than the tensor that it quantizes, unless `binary_scale` is set.
        offset: the lowest level of its activations is learned, too.
        moves_zero: zero may become another level than zero, also where levels start at zero.
        initial_step: its clip value starts from LSQ's formula with `--re_init`.

    Raises:
        ValueError: a value is none that the field takes, such as a name that is not in `READABLE`.

    Example:
        >>> from utils.config.methods import UNKNOWN, MethodRecord
        >>> record = MethodRecord(reads=frozenset({"boundary"}))
        >>> record.reads_option("boundary"), record.ignores("scale"), UNKNOWN.ignores("scale")
        (True, True, False)
    """

    title: str = ""
    reads: frozenset[str] | None = None
    reasons: Mapping[str, str] = field(default_factory=dict)
    grad_types: frozenset[str] | None = None
    idle_grad_types: Mapping[str, str] = field(default_factory=dict)
    levels: int | None = None
    nearest_levels: Callable[[int, bool], int] | None = None
    refuses: Mapping[str, str] = field(default_factory=dict)
    limits: Mapping[str, tuple[float, str, str]] = field(default_factory=dict)
    restores: bool = False
    other_scale: bool = False
    offset: bool = False
    moves_zero: bool = False
    initial_step: bool = False

    def __post_init__(self) -> None:
        """Refuse names that nothing would ever ask for."""
        for name in ("reads", "grad_types"):
            if not isinstance(getattr(self, name), frozenset | set | type(None)):
                raise ValueError(f"{name} must be a set of words, not {getattr(self, name)!r}")
        if unknown := set(self.grad_types or ()) - {*GRAD_TYPES}:
            raise ValueError(f"grad_types: {unknown.pop()!r} is none of {', '.join(GRAD_TYPES)}")
        if not (self.levels is None or (isinstance(self.levels, int) and self.levels >= 2)):
            raise ValueError(f"levels must be a whole number of 2 or more, not {self.levels!r}")
        for name in sorted({*(self.reads or ()), *self.reasons} - READABLE):
            raise ValueError(f"a method cannot read {name!r}{closest(name, READABLE)}")

    def reads_option(self, name: str) -> bool:
        """Whether the method is known to read an option of `READABLE`."""
        return self.reads is not None and name in self.reads

    def ignores(self, name: str) -> bool:
        """Whether the method is known not to read an option of `READABLE`."""
        return self.reads is not None and name not in self.reads

    def without_effect(self, name: str) -> str:
        """The end of a warning about an option that the method ignores: why, where the record says so."""
        return f", {self.reasons[name]}" if name in self.reasons else ""

    def fitting_levels(self, levels: int, half_range: bool) -> int:
        """The number of levels that the method takes: `levels` itself, or the closest one, for messages."""
        if self.levels is not None:
            return self.levels
        return levels if self.nearest_levels is None else self.nearest_levels(levels, half_range)

    def takes_grad_type(self, value: str) -> bool:
        """Whether the method may be given a `grad_type`."""
        return self.grad_types is None or value in ("none", "STE") or value in self.grad_types


UNKNOWN = MethodRecord()
_RECORDS: dict[tuple[str, str], MethodRecord] = {}


def declare(method: str, tags: Iterable[str], record: MethodRecord) -> None:
    """Say what options mean to `method` on each of `tags`.

    Raises:
        ValueError: it is said already.
    """
    for tag in tags:
        if (method, tag) in _RECORDS:
            raise ValueError(f"{method} is declared twice for {tag}")
        _RECORDS[method, tag] = record


def record_of(method: str, tag: str) -> MethodRecord:
    """The record of a method on a tag; `UNKNOWN` where there is none."""
    return _RECORDS.get((method, tag), UNKNOWN)


def methods() -> frozenset[str]:
    """The names of all methods that have a record on some tag."""
    return frozenset(method for method, _ in _RECORDS)


def compared_with_weights() -> str:
    """The methods whose levels have the scale of the weights, for messages."""
    same = [name for (name, tag), record in _RECORDS.items() if tag == "wt" and not record.other_scale]
    return f"{', '.join(same[:-1])} or {same[-1]}"


def methods_with_offset() -> tuple[str, ...]:
    """The methods whose lowest level of activations is learned, for messages."""
    return tuple(name for (name, tag), record in _RECORDS.items() if tag == "fm" and record.offset)


def misfit(config: QuantizerConfig) -> str:
    """The first value of a quantizer's options that its method cannot take; empty when all fit.

    The command line says the same of its options, in their words; this is for configurations that are made in Python.

    Example:
        >>> from utils.config.methods import misfit
        >>> from utils.config.schema import GRAD_TYPES, QuantizerConfig
        >>> misfit(QuantizerConfig(tag="wt", method="dorefa", grid="midtread"))
        "grid 'midtread' belongs to lsq, lsqplus, ewgs or stableqat, not to dorefa"
    """
    record, method = record_of(config.method, config.tag), config.method
    if record.levels not in (None, config.levels):
        return f"{method} has {record.levels} levels, not {config.levels}"
    if config.binary_scale and config.levels != 2:
        return f"binary_scale is for 2 levels, not {config.levels}"
    if not record.takes_grad_type(config.grad_type):
        return f"grad_type {config.grad_type!r} does not go with {method} on {config.tag}"
    for option, default in (("grid", "midrise"), ("custom", "none")):
        value = getattr(config, option)
        if value != default and record.ignores(option):
            return f"{option} {value!r} belongs to {readers(option)}, not to {method}"
    if config.grid == "midtread" and config.half_range:
        return "grid 'midtread' needs half_range=False"
    for option, (most, reason, _) in record.limits.items():
        if getattr(config, option) > most:
            return f"{option} {getattr(config, option)}: {reason}, at most {most:g}"
    return ""


def unfit_levels(config: QuantizerConfig) -> str:
    """Why a method does not have a number of levels, and the bits to give instead; empty where it does.

    Example:
        >>> from utils.config.methods import unfit_levels
        >>> from utils.config.schema import QuantizerConfig
        >>> unfit_levels(QuantizerConfig(tag="wt", method="fatnn", levels=256))
        'FATNN has no 256 levels for weights: give ternary, or 32 for full precision'
    """
    record = record_of(config.method, config.tag)
    fitting = record.fitting_levels(config.levels, config.half_range)
    if fitting == config.levels:
        return ""
    return (
        f"{record.title or config.method} has no {config.levels} levels for {TAGS[config.tag]}s: give "
        f"{TERNARY if fitting == levels_of(TERNARY) else fitting.bit_length() - 1}, or {FULL_BITS} for full precision"
    )


def attention_fault(config: QuantizerConfig) -> str:
    """Why a method of activations cannot quantize the factors of attention's products; empty where it can.

    Query, key and value need signed levels, the output of a softmax those from zero. Zero must stay zero there, since
    masked positions would be seen otherwise.

    Example:
        >>> from utils.config.methods import attention_fault
        >>> from utils.config.schema import QuantizerConfig
        >>> attention_fault(QuantizerConfig(tag="fm", method="fatnn", levels=4))
        'FATNN has no 4 signed levels, which query, key and value need: give 3 levels (ternary)'
    """
    record = record_of(config.method, config.tag)
    name = record.title or config.method
    if record.ignores("half_range"):
        return f"{name} has no levels that start at zero, which the output of a softmax needs: choose another method"
    if record.offset or record.moves_zero:
        return f"{name} may turn the zeros of a mask behind the softmax into another level: choose {EVEN}, for example"
    if (
        "mean" in config.adaptive
        and config.adaptive != "mean"
        and (config.adaptive_restore or record.restores)
    ):
        return (
            f"adaptive {config.adaptive}, undone behind {name}, turns the zeros of a mask behind the softmax into "
            "their mean: leave adaptive out, or choose var or mean"
        )
    for half_range, which in (
        (False, "signed levels, which query, key and value need"),
        (True, "levels from zero"),
    ):
        fitting = record.fitting_levels(config.levels, half_range)
        if fitting != config.levels:
            given = f"{fitting} levels (ternary)" if fitting == levels_of(TERNARY) else f"{fitting} levels"
            return f"{name} has no {config.levels} {which}: give {given}"
    return ""


def readers(option: str) -> str:
    """The methods that are known to read an option on some tag, for messages."""
    known = ((name, record) for (name, _), record in _RECORDS.items() if record.reads_option(option))
    *others, last = dict.fromkeys(record.title or name for name, record in known)
    return f"{', '.join(others)} or {last}" if others else last


# The project's methods ---------------------------------------------------------------------------

_REASONS = {
    "boundary": "which has no clipping value",
    "half_range": "whose levels are symmetric",
    "grad_scale": "which learns no clipping value",
    "quant_group": "whose weights share one range",
    "grad_delta": "whose gradient does not depend on the distance to the level",
    "grad_window": "whose gradient has no window",
}
_ACTIVATIONS, _ALL = ("fm", "ot"), ("fm", "wt", "ot")
_CLIP = frozenset({"boundary", "half_range", "quant_group", "re_init_range"})
_STE_SCALE = frozenset({"STE-scale"})


def _record(**fields: Any) -> MethodRecord:
    return MethodRecord(reasons=_REASONS, **fields)


def _power_of_two(levels: int, half_range: bool) -> int:
    """LQ-Nets: the sums of a basis of up to 8 numbers."""
    return min(2 ** (levels - 1).bit_length(), 256)


_WHOLE_WEIGHT = _record(reads=frozenset({"binary_scale"}), grad_types=_STE_SCALE, other_scale=True)

declare("dorefa", _ACTIVATIONS, _record(reads=_CLIP, grad_types=_STE_SCALE))
declare("dorefa", ["wt"], _WHOLE_WEIGHT)
declare(
    "pact",
    _ACTIVATIONS,
    _record(reads=_CLIP | {"grad_scale", "re_init"}, grad_types=_STE_SCALE, initial_step=True),
)
declare("pact", ["wt"], _WHOLE_WEIGHT)
_LEARNED: dict[str, Any] = {
    "grad_types": _STE_SCALE,
    "idle_grad_types": {"STE-scale": "which rounds a clamped value"},
    "initial_step": True,
}
_STEP = _CLIP | {"grad_scale", "re_init", "grid"}
declare("lsq", _ALL, _record(reads=_STEP, **_LEARNED))
_PLUS = _LEARNED | {
    "initial_step": False
}  # its ranges start at the least squared error, of weights from deviations
declare("lsqplus", _ACTIVATIONS, _record(reads=_STEP - {"grid", "re_init_range"}, offset=True, **_PLUS))
declare("lsqplus", ["wt"], _record(reads=_STEP, **_PLUS))
declare("ewgs", _ALL, _record(reads=_STEP | {"grad_delta"}, **_LEARNED))
declare("stableqat", _ALL, _record(reads=_STEP, **_LEARNED))
declare(
    "lq",
    _ALL,
    _record(
        reads=frozenset({"scale", "half_range", "quant_group", "custom_update", "re_init"}),
        grad_types=frozenset(),
        limits={
            "scale": (
                1.0,
                "LQ-Nets' thresholds lie at this share of the way from a level to the next",
                "give at most 1, or leave it out for 0.5, the middle",
            )
        },
        nearest_levels=_power_of_two,
        restores=True,
    ),
)


def _sums_of_powers(levels: int, half_range: bool) -> int:
    """APoT: 2 to 64 levels from zero; 3, or 4 to 64 with a bit for the sign."""
    if levels == 3 and not half_range:
        return levels
    return max(min(2 ** (levels - 1).bit_length(), 64), 2 if half_range else 4)


declare(
    "apot",
    _ALL,
    _record(title="APoT", reads=_STEP - {"grid"}, nearest_levels=_sums_of_powers, **_LEARNED),
)
declare(
    "n2uq",
    _ACTIVATIONS,
    _record(
        title="N2UQ",
        reads=_CLIP - {"re_init_range"} | {"grad_scale", "re_init"},
        grad_types=frozenset(),
        nearest_levels=lambda levels, half_range: min(levels, 16),
        moves_zero=True,  # where the first threshold learns to be below it
        initial_step=True,
    ),
)
declare("n2uq", ["wt"], _record(title="N2UQ", reads=frozenset({"quant_group"}), grad_types=frozenset()))
_FATNN = frozenset({"scale", "quant_group", "closed_form", "re_init"})
declare(
    "fatnn",
    _ACTIVATIONS,
    _record(
        title="FATNN",
        reads=_FATNN | {"boundary", "half_range"},
        grad_types=frozenset(),
        nearest_levels=lambda levels, half_range: min(levels, 4) if half_range else 3,
        other_scale=True,
    ),
)
declare(
    "fatnn",
    ["wt"],
    _record(
        title="FATNN",
        reads=_FATNN,
        grad_types=frozenset(),
        nearest_levels=lambda levels, half_range: 3,
        refuses={"half_range": "FATNN's weights are ternary, -1, 0 and 1; leave it out"},
        other_scale=True,
    ),
)
_SIGNS = frozenset({"quant_group", "grad_window"})
declare(
    "xnor",
    _ACTIVATIONS,
    _record(reads=_SIGNS | {"custom"}, grad_types=frozenset({"Triangle"}), levels=2),
)
declare("xnor", ["wt"], _record(reads=_SIGNS, grad_types=frozenset(), levels=2))
declare(
    "reactnet",
    _ACTIVATIONS,
    _record(
        title="ReActNet",
        reads=_SIGNS | {"re_init"},
        grad_types=frozenset({"Triangle"}),
        levels=2,
    ),
)
declare(
    "reactnet",
    ["wt"],
    _record(title="ReActNet", reads=_SIGNS, grad_types=frozenset(), levels=2),
)

PROJECT = methods()  # without those of users, which register later
EVEN = "lsq"  # has evenly spaced levels of any range and number on each tag, as measurements without training need
