"""The bits of single layers that options ask for: `--first_bit`, `--last_bit` and `--layer_bits`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.config.command_line import Given
from utils.config.layer_bits import FULL_BITS, SINGLE_LAYERS, levels_of
from utils.config.layer_rules import read_layer_bits
from utils.config.methods import unfit_levels
from utils.config.resolve.bits import behind_bits, is_full_precision
from utils.config.schema import QuantizerConfig
from utils.errors import UserError


def layer_options(given: Given, parts: Mapping[str, QuantizerConfig], *, first_last: bool) -> dict[str, Any]:
    """The fields `first_bit`, `last_bit` and `layer_bits` of a `QuantConfig`.

    Args:
        given: the options.
        parts: tag -> its quantizers.
        first_last: the keyword `first-last` quantizes both ends; 32 bits then take one of them back.

    Raises:
        UserError: nothing is quantized that could have other bits, a method does not have them, or the file is wrong.
    """
    enabled = {tag: part for tag, part in parts.items() if part.enable}
    for name in SINGLE_LAYERS:
        if given[name] in (None, FULL_BITS) or enabled:
            continue
        asked = given.through.get(name, f"--{name}")
        if is_full_precision(given):
            if behind_bits(name, given):
                raise UserError(
                    f"{asked} {given[name]}: nothing is quantized with --bits {given['bits']}: write the bits of the "
                    f"other layers as --bits, or leave {asked} out"
                )
            continue  # of a config that is trained in full precision: a warning
        raise UserError(
            f"{asked} {given[name]}: nothing is quantized: add --bits 2, the bits of all other layers, and the keyword "
            f"of a method, or leave {asked} out"
        )
    fields: dict[str, Any] = {}
    for name in ("first_bit", "last_bit"):
        bits = given[name]
        if bits is None or not enabled or (bits == FULL_BITS and not first_last):
            continue
        for tag, part in enabled.items():
            levels = levels_of(bits)
            half_range = part.half_range and (tag, name) != ("fm", "first_bit")
            if levels is not None and (
                fault := unfit_levels(dataclasses.replace(part, levels=levels, half_range=half_range))
            ):
                raise UserError(f"{given.through.get(name, f'--{name}')} {bits}: {fault}")
        fields[name] = bits
    if given["layer_bits"] is not None:
        rules = read_layer_bits(Path(given["layer_bits"]))
        fields |= {"layer_bits": rules} if enabled else {}
    return fields
