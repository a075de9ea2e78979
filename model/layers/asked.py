"""What options for single layers ask of a quantizer: its bits, and its groups of channels."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from model.quantizers.site import LayerSite, group_count, undivided
from utils.config.layer_bits import levels_of
from utils.config.methods import record_of, unfit_levels
from utils.config.schema import TAGS, QuantizerConfig
from utils.errors import UserError


class AskedBits(NamedTuple):
    """Bits of a layer's quantizer apart from those of its tag, and the option that says them.

    Attributes:
        bits: 1 to 16, "ternary", or 32 for full precision.
        source: the option, for messages.
    """

    bits: int | str
    source: str


class AskedGroups(NamedTuple):
    """Groups of channels of a layer's quantizer apart from those of its tag, and the option that says them.

    Attributes:
        groups: their number, -k for groups of k channels, or 0 for the default.
        source: the option, for messages.
    """

    groups: int
    source: str


def with_bits(settings: QuantizerConfig, asked: AskedBits, *, images: bool, name: str) -> QuantizerConfig:
    """The options of a quantizer at other bits.

    Levels on both sides of zero get one at zero where the method has such: those for images, and those of 8 bits and
    more, whose codes are odd numbers beyond 8 bits otherwise, which no engine multiplies as integers.
    """
    levels = levels_of(asked.bits)
    if levels is None or not settings.enable:
        return dataclasses.replace(settings, enable=False)
    wanted = (images and levels > 2) or (levels > 128 and not settings.half_range)
    centred = wanted and record_of(settings.method, settings.tag).reads_option("grid")
    changed = dataclasses.replace(
        settings,
        levels=levels,
        binary_scale=settings.binary_scale and levels == 2,
        grid="midtread" if centred else settings.grid,
    )
    if fault := unfit_levels(changed):
        raise UserError(f"{asked.source}: {name}: {fault}")
    return changed


def with_groups(settings: QuantizerConfig, asked: AskedGroups, site: LayerSite) -> QuantizerConfig:
    """The options of a quantizer with other groups of channels."""
    if asked.groups and group_count(asked.groups, site.channels) is None:
        raise UserError(
            f"{asked.source}: {site.name}: {undivided(settings.tag, asked.groups, site.channels)}"
        )
    record = record_of(settings.method, settings.tag)
    if asked.groups and record.ignores("quant_group"):
        raise UserError(
            f"{asked.source}: {site.name}: {record.title or settings.method} has no groups of {TAGS[settings.tag]}s: "
            "leave quant_group out"
        )
    return dataclasses.replace(settings, quant_group=asked.groups or None)
