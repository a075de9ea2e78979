"""Policy files: the YAML text as typed rules, checked without torch (docs/policies.md)."""

from __future__ import annotations

import difflib
import math
from pathlib import Path
from typing import Any

from utils.config.checks import LARGEST, shown
from utils.config.options import OPTIONS
from utils.config.schema import LEAST, MOST, TAGS, TRAINING, Rule
from utils.errors import UserError
from utils.text import printable

SECTIONS = ("init", "epoch", "iteration")
SELECTORS = ("index", "name", "tag")
# An entry sets them in this order: `progressive` decides how levels change, and `boundary` comes last.
FLAGS = ("progressive", "enable", "half_range")
WORDS = ("grad_type", "grad_scale")
FACTORS = ("scale", "grad_delta", "grad_window")  # fields of the quantizer's configuration
NUMBERS = (*FACTORS, "level_num", "boundary")
ATTRIBUTES = (*FLAGS, *WORDS, *NUMBERS)


def read_policy(path: Path) -> tuple[Rule, ...]:
    """The rules of a policy file, by section and in their order.

    Raises:
        UserError: the file cannot be read, or an entry is wrong for every network.
    """
    from utils.config.yaml_file import read_yaml  # imports yaml, which takes its time

    content = read_yaml(path, "--policy")
    if not isinstance(content, dict) or not content:
        raise UserError(f"--policy {path}: give entries under {', '.join(SECTIONS)}")
    rules: list[Rule] = []
    for section, entries in content.items():
        if section not in SECTIONS:
            raise UserError(
                f"--policy {path}: section {printable(str(section))} is not known: use {', '.join(SECTIONS)}"
            )
        if not isinstance(entries, list) or not entries:
            raise UserError(f"--policy {path}: {section} must be a list of entries, each beginning with '-'")
        rules += [_rule(section, number, entry) for number, entry in enumerate(entries, 1)]
    return tuple(rules)


def _rule(section: str, number: int, entry: Any) -> Rule:
    """Check an entry and return its rule."""
    where = f"--policy: entry {number} of {section}"
    if not isinstance(entry, dict):
        raise UserError(f"{where}: write names with values, like 'bit: 4', not {entry!r}")
    known = ("at", *SELECTORS, "bit", *ATTRIBUTES, *TRAINING)
    for name in entry:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=2)
            hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(known)}"
            raise UserError(f"{where}: {printable(str(name))} is not known: {hint}")
    values = {name: value for name, value in entry.items() if name not in ("at", *SELECTORS)}
    if not values:
        raise UserError(f"{where}: changes nothing; set one of bit, {', '.join((*ATTRIBUTES, *TRAINING))}")
    options = [name for name in values if name in TRAINING]
    selectors = [name for name in SELECTORS if name in entry]
    if options and (len(options) < len(values) or selectors):
        other = next(name for name in (*selectors, *values) if name not in options)
        raise UserError(f"{where}: {options[0]} is of the training, {other} of quantizers; write two entries")
    if (section == "init") == ("at" in entry):
        fault = "takes no at: it is before training" if section == "init" else f"needs at: [{section}s done]"
        raise UserError(f"{where}: {fault}")
    if "bit" in values:
        if "level_num" in values:
            raise UserError(f"{where}: bit and level_num contradict each other; give one")
        bit = values.pop("bit")
        if not is_integer(bit) or not 1 <= bit <= 16:
            raise UserError(
                f"{where}: bit {shown(bit)} must be from 1 to 16; full precision is 'enable: false'"
            )
        values["level_num"] = 2**bit
    for name, value in values.items():
        check_value(where, name, value)
    tag, pattern = entry.get("tag", ""), entry.get("name", "*")
    if "tag" in entry and tag not in tuple(TAGS):  # a list or a mapping has no hash
        raise UserError(f"{where}: tag {shown(tag)} must be one of {', '.join(TAGS)}")
    if not isinstance(pattern, str):
        raise UserError(f"{where}: name {pattern!r} must be a pattern like 'layer1.*'")
    order = (*ATTRIBUTES, *TRAINING)
    return Rule(
        section=section,
        number=number,
        at=_integers(where, "at", entry["at"]) if "at" in entry else (),
        index=_integers(where, "index", entry["index"]) if "index" in entry else (),
        name=pattern,
        tag=tag,
        values={name: values[name] for name in order if name in values},
    )


def is_integer(value: Any) -> bool:
    """Whether a value of a YAML file is a whole number; true and false are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def _integers(where: str, name: str, value: Any) -> tuple[int, ...]:
    """A number or a list of numbers, not negative, without repetition."""
    numbers = value if isinstance(value, list) else [value]
    if not numbers or not all(is_integer(number) and number >= 0 for number in numbers):
        raise UserError(f"{where}: {name} {shown(value)} must be a list of whole numbers from 0, like [3, 6]")
    if len(set(numbers)) < len(numbers):
        raise UserError(f"{where}: {name} {value} names a number twice")
    return tuple(numbers)


def _is_written_number(value: Any) -> bool:
    """Whether YAML has taken a number for text, as it does with 1e-3."""
    try:
        return isinstance(value, str) and math.isfinite(float(value))
    except ValueError:
        return False


def check_value(where: str, name: str, value: Any) -> None:
    """Refuse a value that neither quantizers nor the training take."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST
    point = "; YAML wants a point in such a number: 1.0e-3" if _is_written_number(value) else ""
    if name in FLAGS:
        if not isinstance(value, bool):
            raise UserError(f"{where}: {name} {shown(value)} must be true or false")
    elif name in WORDS:
        choices = OPTIONS[f"fm_{name}"].choices
        if value not in choices:
            raise UserError(f"{where}: {name} {shown(value)} must be one of {', '.join(choices)}")
    elif name == "level_num":
        if not is_integer(value) or not 2 <= value <= 2**16:
            raise UserError(f"{where}: level_num {shown(value)} must be from 2 to 65536")
    elif name in (*FACTORS, "boundary"):
        least = 0 if name == "grad_delta" else LEAST
        if not number or not least <= value <= MOST:
            raise UserError(
                f"{where}: {name} {shown(value)} must be a number from {least:g} to {MOST:g}{point}"
            )
    elif name == "grad_clip":
        if not number or value <= 0:
            raise UserError(f"{where}: {name} {shown(value)} must be a number greater than 0{point}")
    elif not number or value < 0 or (name == "momentum" and value >= 1):
        limit = " and is below 1" if name == "momentum" else ""
        raise UserError(f"{where}: {name} {shown(value)} must be a number that is not negative{limit}{point}")
