"""`--layer_bits`: entries of a file, or of a program, as typed rules, checked without torch (docs/mixed.md)."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

from utils.config.checks import shown
from utils.config.layer_bits import BOTH, LayerBits
from utils.config.schema import TAGS, QuantConfig
from utils.errors import UserError
from utils.text import closest

OPTION = "--layer_bits"
KINDS = ("bit", "quant_group")
FIELDS = ("name", "tag", *(f"{tag}{kind}" for kind in KINDS for tag in ("", "wt_", "fm_", "ot_")))
EXAMPLE = "- name: layer1.*, then wt_bit: 4 and fm_bit: 4"


def read_layer_bits(path: str | os.PathLike[str]) -> tuple[LayerBits, ...]:
    """The entries of a YAML or JSON file, in their order.

    The file is a list of entries, or has it under `init`, as a policy file.

    Raises:
        UserError: the file cannot be read, or an entry is wrong for every network.
    """
    from utils.config.yaml_file import read_yaml  # imports yaml, which takes its time

    content = read_yaml(path, OPTION)
    if isinstance(content, dict) and list(content) == ["init"]:
        content = content["init"]
    return layer_rules(content, f"{OPTION} {path}")


def layer_rules(entries: object, source: str = OPTION) -> tuple[LayerBits, ...]:
    """Entries as rules.

    Args:
        entries: a list of mappings with the fields of the file, or of rules; both may be mixed.
        source: names the list in messages.

    Raises:
        UserError: it is no such list.

    Example:
        >>> from utils.config.layer_rules import layer_rules
        >>> layer_rules([{"name": "layer1.*", "bit": 4}, {"name": "fc", "wt_bit": 8, "fm_bit": 8}])[1].bits
        {'wt': 8, 'fm': 8}
    """
    if isinstance(entries, str) or not isinstance(entries, Sequence) or not entries:
        raise UserError(f"{source}: write a list of entries, like {EXAMPLE}")
    return tuple(
        entry if isinstance(entry, LayerBits) else _rule(number, entry)
        for number, entry in enumerate(entries, 1)
    )


def with_layer_bits(
    config: QuantConfig,
    first_bit: int | str | None,
    last_bit: int | str | None,
    layer_bits: str | os.PathLike[str] | Sequence[Any] | None,
) -> QuantConfig:
    """A configuration with the bits of single layers that are given, not None; the rest stays.

    Raises:
        UserError: one is no number of bits, or the file or list is wrong.
    """
    rules = read_layer_bits(layer_bits) if isinstance(layer_bits, str | os.PathLike) else layer_bits
    given = {
        "first_bit": first_bit,
        "last_bit": last_bit,
        "layer_bits": None if rules is None else layer_rules(rules),
    }
    return dataclasses.replace(config, **{name: value for name, value in given.items() if value is not None})


def plain_entries(rules: Sequence[LayerBits]) -> list[dict[str, Any]]:
    """Rules as the entries of a file, for YAML or JSON.

    Example:
        >>> from utils.config.layer_rules import layer_rules, plain_entries
        >>> plain_entries(layer_rules([{"name": "fc", "tag": "wt", "bit": 8}]))
        [{'name': 'fc', 'wt_bit': 8}]
    """
    return [
        {"name": rule.names[0] if len(rule.names) == 1 else list(rule.names)}
        | {
            f"{tag}_{kind}" if tag else kind: value
            for kind, values in zip(KINDS, (rule.bits, rule.groups), strict=True)
            for tag, value in values.items()
        }
        for rule in rules
    ]


def _rule(number: int, entry: Any) -> LayerBits:
    """Check an entry and return its rule."""
    where = f"{OPTION}: entry {number}"
    if not isinstance(entry, dict):
        raise UserError(f"{where}: write names with values, like {EXAMPLE}, not {shown(entry)}")
    for name in entry:
        if name == "method":
            raise UserError(
                f"{where}: method: all layers have the method that --keyword names; leave method out"
            )
        if name not in FIELDS:
            hint = closest(name, FIELDS) or f": there are {', '.join(FIELDS)}"
            raise UserError(f"{where}: {shown(name)} is not known{hint}")
    tag, patterns = entry.get("tag", BOTH), entry.get("name", "*")
    if "tag" in entry and tag not in tuple(TAGS):  # a list or a mapping has no hash
        raise UserError(f"{where}: tag {shown(tag)} must be one of {', '.join(TAGS)}")
    names: list[Any] = patterns if isinstance(patterns, list) and patterns else [patterns]
    if not all(isinstance(name, str) and name for name in names):
        raise UserError(f"{where}: name must be a pattern of layers like 'layer1.*', or a list of patterns")
    found: dict[str, dict[str, Any]] = {}
    for kind in KINDS:
        written = [name for name in FIELDS if name in entry and name.endswith(kind)]
        if kind in written and len(written) > 1:
            raise UserError(f"{where}: {kind} and {written[1]} contradict each other: give one")
        if "tag" in entry and written not in ([], [kind]):
            raise UserError(f"{where}: tag belongs to {kind}, not to {written[0]}: leave it out")
        found[kind] = {
            tag if name == kind else name.removesuffix(f"_{kind}"): entry[name] for name in written
        }
    bits, groups = (found[kind] for kind in KINDS)
    if not bits and not groups:
        raise UserError(f"{where}: sets no bits: add bit, or wt_bit and fm_bit")
    return LayerBits(names=tuple(names), bits=bits, groups=groups, number=number)
