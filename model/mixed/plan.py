"""Bits of each layer under a budget: `tools.py --keyword plan`. Without torch, but for `--engine`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.mixed.integer_bits import ENGINES, integer_bits
from utils.errors import UserError
from utils.report import sensitivity_record
from utils.report.sensitivity_record import MOST, Sensitivity
from utils.text import closest, format_table, printable
from utils.tools.options import Options, given_path, refuse_existing

_BYTES = {"B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_COUNTS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_NUMBER = re.compile(r"(\d+(?:\.\d+)?|\.\d+)(?:e(\d{1,2}))?\s*([A-Za-z]*)")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The bits of each layer, of weight and input.

    Attributes:
        bits: name of the layer -> bits, in the order of the network.
        loss: the sum of the measured changes of the loss, each of one layer alone.
        bytes: of the weights of all layers.
        bit_operations: of one image.
    """

    bits: Mapping[str, int]
    loss: float
    bytes: int
    bit_operations: int


def plan(options: Options) -> int:
    """Choose the bits of each layer under a budget, from a record of sensitivity, for --layer_bits."""
    old, new = given_path(options.old), given_path(options.new)
    if new.suffix not in (".yaml", ".yml", ".json") or not new.parent.is_dir():
        raise UserError(f"--new {new}: name a .yaml or .json file in a folder that exists")
    if new.exists() and old.exists() and new.samefile(old):
        raise UserError(f"--new {new} is --old: name another file, which is written")
    refuse_existing(options, new)
    if (options.budget_size is None) == (options.budget_bops is None):
        raise UserError("the word plan needs one budget: --budget_size 96KiB, or --budget_bops 0.5G")
    record = sensitivity_record.read(old)
    widths = _widths(options, record)
    size = options.budget_size is not None
    option, units, example = (
        ("--budget_size", _BYTES, "96KiB") if size else ("--budget_bops", _COUNTS, "0.5G")
    )
    given = options.budget_size or options.budget_bops or ""
    budget = _amount(given, units)
    if budget is None:
        raise UserError(f"{option} {given}: write a number with its unit, such as {example}")
    costs = {bits: _total(record, bits, size=size) for bits in widths}
    least, most = min(costs.values()), max(costs.values())
    if budget < least:
        raise UserError(
            f"{option} {given} is too small: {min(widths)} bits everywhere take {_shown(least, size=size)}; give "
            "at least that, or measure fewer bits (sensitivity --bits)"
        )
    if budget >= most:
        raise UserError(
            f"{option} {given} needs no plan: {max(widths)} bits everywhere take {_shown(most, size=size)}; give "
            "less, or take these bits for all layers"
        )
    chosen = best(record, budget, size=size, widths=widths)
    _write(new, record, chosen, f"{option} {given}")
    print(as_text(record, chosen, widths))
    print(f"written: {printable(str(new))}, for main.py --layer_bits {printable(str(new))}")
    return 0


def _widths(options: Options, record: Sensitivity) -> tuple[int, ...]:
    """The bits to choose from, the most first: those asked for, or all that are measured and that the engine takes."""
    asked, engine = options.bits, options.engine
    if engine is not None and engine not in ENGINES:
        raise UserError(f"--engine {engine}: write one of {', '.join(ENGINES)}{closest(engine, ENGINES)}")
    if asked is not None and (unknown := sorted({*asked} - {*record.bits})):
        raise UserError(
            f"--bits: {unknown[0]} bits are not measured in {options.old}, but {_listed(record.bits)}: leave them out, "
            "or measure again with sensitivity --bits"
        )
    widths = tuple(sorted(asked or record.bits, reverse=True))
    if engine is None:
        return widths
    taken = integer_bits(widths)
    if asked is not None and len(taken) < len(widths):
        other = next(width for width in widths if width not in taken)
        raise UserError(
            f"--bits: {engine} does not multiply {other} by {other} bits as integers, but in float: leave {other} out, "
            "or leave --engine out"
        )
    if not taken:
        raise UserError(
            f"--engine {engine}: multiplies none of {_listed(widths)} bits as integers: measure fewer bits "
            "(sensitivity --bits)"
        )
    return taken


def _listed(widths: Sequence[int]) -> str:
    return ", ".join(map(str, widths))


def _amount(text: str, units: Mapping[str, int]) -> int | None:
    """A number with a unit; None where it is none, or too large for any network."""
    found = _NUMBER.fullmatch(text.strip())
    unit = found and units.get(found[3].upper())
    if not (found and unit):
        return None
    value = float(found[1]) * 10.0 ** int(found[2] or 0) * unit
    return int(value) if value < MOST else None


def _shown(value: int, *, size: bool) -> str:
    return f"{value / 1024:.1f}KiB" if size else f"{value / 1e9:.4g}G bit operations"


def _total(record: Sensitivity, bits: int, *, size: bool) -> int:
    """The cost of the same bits everywhere."""
    all_bits = dict.fromkeys((layer.name for layer in record.layers), bits)
    return record.bytes_with(all_bits) if size else record.bit_operations_with(all_bits)


def best(record: Sensitivity, budget: int, *, size: bool, widths: Sequence[int] = ()) -> Plan:
    """The bits with the least sum of changes of the loss whose cost is within a budget.

    A linear program with one variable, 0 or 1, for each layer and number of bits, solved exactly by HiGHS through
    `scipy.optimize.milp`. Changes of layers are added up as if they did not depend on each other.

    Args:
        record: the changes.
        budget: bytes of all weights, or bit operations of an image; at least what the fewest bits take.
        size: whether it is bytes.
        widths: the bits to choose from, of those of the record; default: all.
    """
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp

    choices = [(layer, bits) for layer in record.layers for bits in widths or record.bits]
    loss = np.array([layer.loss_at(bits) for layer, bits in choices])
    # Where losses are equal, more bits: a millionth of the largest loss decides nothing else.
    loss += 1e-6 * max(loss.max(), 1e-9) * np.array([max(record.bits) - bits for _, bits in choices]) / 8
    fixed = _total(record, 0, size=size)
    cost = np.array(
        [layer.bytes_at(bits) if size else layer.bit_operations_at(bits) for layer, bits in choices]
    )
    one_each = np.array([[mine is layer for mine, _ in choices] for layer in record.layers], dtype=float)
    unit = float(max(cost.max(), 1))  # HiGHS likes numbers near 1
    found = milp(
        loss / max(loss.max(), 1e-30), integrality=np.ones(len(choices)), bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(cost[None] / unit, ub=(budget - fixed) / unit)],
        options={"mip_rel_gap": 0.0},
    )  # fmt: skip
    if found.x is None:
        raise UserError(f"the solver has found no bits for the budget: {found.message}")
    bits = {layer.name: width for (layer, width), taken in zip(choices, found.x, strict=True) if taken > 0.5}
    return of_bits(record, bits)


def of_bits(record: Sensitivity, bits: Mapping[str, int]) -> Plan:
    """What bits of each layer cost and lose."""
    loss = sum(layer.loss_at(bits[layer.name]) for layer in record.layers)
    return Plan(
        bits=dict(bits),
        loss=loss,
        bytes=record.bytes_with(bits),
        bit_operations=record.bit_operations_with(bits),
    )


def as_text(record: Sensitivity, chosen: Plan, widths: Sequence[int]) -> str:
    """The bits of each layer, and totals beside those of the same bits everywhere, as far as a plan may have them."""
    rows = [
        (
            printable(layer.name), layer.kind, f"{layer.weights:,}", f"{layer.macs:,}", str(chosen.bits[layer.name]),
            f"{layer.loss_at(chosen.bits[layer.name]):+.4f}",
        )
        for layer in record.layers
    ]  # fmt: skip
    plans = {"plan": chosen} | {
        f"{bits} bit": of_bits(record, dict.fromkeys(chosen.bits, bits)) for bits in widths
    }
    totals = [
        (name, f"{one.bytes / 1024:.1f}", f"{one.bit_operations / 1e6:.1f}", f"{one.loss:+.4f}")
        for name, one in plans.items()
    ]
    return "\n".join(
        (
            format_table(("layer", "kind", "weights", "MACs", "bits", "loss"), rows),
            "",
            format_table(("all layers", "KiB", "million bit operations", "sum of losses"), totals),
        )
    )


def _write(path: Path, record: Sensitivity, chosen: Plan, budget: str) -> None:
    """The file of --layer_bits: an entry for each layer."""
    import json

    import yaml

    from utils.checkpoint import archive

    entries: list[dict[str, Any]] = [
        {"name": name, "wt_bit": bits, "fm_bit": bits} for name, bits in chosen.bits.items()
    ]
    if path.suffix == ".json":
        text = json.dumps(entries, indent=1)
    else:
        text = f"# {budget}, from {printable(record.checkpoint)}\n{yaml.safe_dump(entries, sort_keys=False)}"
    archive.write_atomic(path, text.encode())
