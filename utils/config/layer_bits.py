"""The bits and groups of single layers: an entry of `--layer_bits`, and what a number of bits means."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from utils.config.checks import Checks, shown
from utils.errors import UserError

FULL_BITS, MOST_BITS, TERNARY = 32, 16, "ternary"
WIDTHS = f"a number of bits from 1 to {MOST_BITS}, {TERNARY}, or {FULL_BITS} for full precision"
SINGLE_LAYERS = ("first_bit", "last_bit", "layer_bits")  # options, and fields of a `QuantConfig`
MOST_GROUPS = 2**20  # and channels in a group
# Names of quantizers in a layer, or in a product of two activations -> their tags.
PARTS = {
    "quant_activation": "fm",
    "quant_weight": "wt",
    "quant_output": "ot",
    "quant_left": "fm",
    "quant_right": "fm",
}
BOTH = ""  # in place of a tag: weights and inputs, as far as they are quantized


def is_width(value: object) -> bool:
    """Whether a value is a number of bits, `ternary`, or 32 for full precision."""
    if not isinstance(value, int) or isinstance(value, bool):
        return value == TERNARY
    return 1 <= value <= MOST_BITS or value == FULL_BITS


def width(text: str) -> int | str:
    """The bits that an option says."""
    value = text.strip().lower()
    bits = int(value) if value.isdecimal() and value.isascii() else value
    if not is_width(bits):
        raise argparse.ArgumentTypeError(f"{text!r} is not {WIDTHS}")
    return bits


def levels_of(bits: int | str) -> int | None:
    """The number of levels of bits; None: full precision.

    Example:
        >>> from utils.config.layer_bits import levels_of
        >>> levels_of(4), levels_of("ternary"), levels_of(32)
        (16, 3, None)
    """
    if bits == FULL_BITS:
        return None
    return 3 if isinstance(bits, str) else 2**bits


@dataclass(frozen=True, kw_only=True)
class LayerBits:
    """The bits and the groups of channels of some layers: one entry of `--layer_bits`.

    Attributes:
        names: shell patterns of whole names of layers; it is for the layers that match one of them.
        bits: tag -> bits, "ternary", or 32 for full precision; "" in place of a tag means weights and inputs.
        groups: tag, as in `bits`, -> groups of channels that share a range, -k for groups of k, or 0 for the default.
        number: of the entry, from 1.

    Raises:
        UserError: a field does not take its value.

    Example:
        >>> from utils.config.layer_bits import LayerBits
        >>> rule = LayerBits(names=("layer1.*", "fc"), bits={"wt": 4, "fm": 8}, number=1)
        >>> rule.selects(["layer1.0.conv1"]), rule.selects(["layer1.0.conv1"], whole=True)
        (True, False)
    """

    names: tuple[str, ...]
    bits: Mapping[str, int | str] = field(hash=False)  # which has no hash, but counts for equality
    number: int = 1
    # Left out of files that have none, which earlier versions read.
    groups: Mapping[str, int] = field(default_factory=dict, hash=False, metadata={"optional": True})

    def __post_init__(self) -> None:
        """Refuse what is no pattern, no number of bits and no number of groups."""
        check = Checks(self)
        check.strings("names")
        check.integer("number", 1)
        check.names("bits")
        check.names("groups")
        if not self.names or not (self.bits or self.groups):
            raise UserError(f"{self}: give it patterns of names and bits or groups")
        for name, values in (("bits", self.bits), ("groups", self.groups)):
            for tag in values:
                if tag not in (BOTH, "fm", "wt", "ot"):
                    raise UserError(f"{self}: {name} of {tag!r}: a tag is fm, wt or ot")
        for tag, groups in self.groups.items():
            if not isinstance(groups, int) or isinstance(groups, bool) or abs(groups) > MOST_GROUPS:
                raise UserError(
                    f"{self}: {tag}{'_' * bool(tag)}quant_group {shown(groups)} must be a number of groups, -k for "
                    "groups of k channels, or 0 for the default"
                )
        for tag, bits in self.bits.items():
            if not is_width(bits):
                raise UserError(f"{self}: {tag}{'_' * bool(tag)}bit {shown(bits)} must be {WIDTHS}")

    def selects(self, names: Sequence[str], *, whole: bool = False) -> bool:
        """Whether it is for a layer, by any of its names; `whole`: only where one of them is written out."""
        patterns = [pattern for pattern in self.names if pattern in names] if whole else self.names
        return any(fnmatchcase(name, pattern) or name == pattern for name in names for pattern in patterns)

    def __str__(self) -> str:
        """Its name in messages."""
        return f"--layer_bits: entry {self.number}"
