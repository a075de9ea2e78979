"""The state of quantizers after an epoch, as records and as a table."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from utils.text import format_table

SHOWN_LEVELS = 16  # with more levels, log and TensorBoard only count the dead ones
KEPT_LEVELS = 64  # with more levels, neither shares nor values are kept


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Counts of values in bins of equal width; the outermost bins hold all values beyond.

    Attributes:
        edges: the bins' ends, one more than counts.
        counts: finite values in each.
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class HealthRow:
    """One quantizer after an epoch; shares are of all elements, 0 to 1.

    Attributes:
        name: the quantizer, in the network.
        tag: what it quantizes: fm activations, wt weights, ot outputs.
        method: its method.
        levels: the number of levels it may use.
        bits: of a stored value.
        used: levels that some value takes; None for a user's own method without integers.
        range: mean over the groups of the clip value (or top level); None where a method has none.
        range_lowest, range_highest: the least and the greatest of the groups; likewise.
        clipped: share of values below the lowest or above the highest value of the range; likewise.
        shares: share of each level, from the lowest; empty with more than `KEPT_LEVELS`.
        values: the levels, mean over the groups, before a normalisation is undone and without `gamma`; likewise.
        basis: LQ-Nets' basis, mean over the groups; empty for other methods.
        changed: share of weights whose level differs from an epoch ago; None for activations, where the
            number of levels has changed, and in an epoch that was resumed in its middle.
        update: |w - w before| / |w before| over the epoch, in L2 norm; None for activations and in such an epoch.
        histogram: of the input values, as the method sees them (`Quantizer.normalise`).
    """

    name: str
    tag: str
    method: str
    levels: int
    bits: int
    used: int | None
    range: float | None
    range_lowest: float | None
    range_highest: float | None
    clipped: float | None
    shares: tuple[float, ...]
    values: tuple[float, ...]
    histogram: Histogram
    basis: tuple[float, ...] = ()
    changed: float | None = None
    update: float | None = None

    @property
    def dead(self) -> int:
        """Levels that no value takes."""
        return 0 if self.used is None else self.levels - self.used

    @property
    def notice(self) -> str:
        """A state that needs attention; empty when there is none."""
        return "constant, carries nothing" if self.used == 1 else ""

    @property
    def positions(self) -> tuple[float, ...]:
        """The positions of the levels among the input values.

        They are the levels themselves, except for a method whose levels are integers (FATNN): there the top one
        is put at the end of the range and the others in proportion.
        """
        if self.range is None or not self.values or self.values[-1] <= 0:
            return self.values
        return tuple(value * self.range / self.values[-1] for value in self.values)

    def scalars(self) -> dict[str, float]:
        """The row as curves: `range` and so on."""
        grouped = self.range_lowest != self.range_highest
        optional = {
            "range": self.range,
            "range_lowest": self.range_lowest if grouped else None,
            "range_highest": self.range_highest if grouped else None,
            "clipped": self.clipped,
            "changed": self.changed,
            "update": self.update,
        }
        values = {"dead_levels": float(self.dead)}
        values |= {key: value for key, value in optional.items() if value is not None}
        values |= {f"basis{i}": value for i, value in enumerate(self.basis)}
        if len(self.shares) <= SHOWN_LEVELS:
            values |= {f"level{i}": share for i, share in enumerate(self.shares)}
        return values

    def record(self) -> dict[str, Any]:
        """The row as plain JSON: six digits, None for what is not finite."""
        return _plain(dataclasses.asdict(self) | {"positions": self.positions})


def _plain(value: Any) -> Any:
    """Tuples as lists, floats with six digits, None for those that are not finite."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def health_table(rows: list[HealthRow]) -> str:
    """The rows as text."""

    def percent(share: float | None) -> str:
        return "" if share is None else f"{100 * share:.1f}"

    cells = [
        (
            row.name,
            " ".join(f"{value:.3g}" for value in row.basis)
            or ("" if row.range is None else f"{row.range:.4g}"),
            ""
            if row.range_lowest == row.range_highest
            else f"{row.range_lowest:.3g} - {row.range_highest:.3g}",
            percent(row.clipped),
            str(row.dead),
            " ".join(percent(share) for share in row.shares) if len(row.shares) <= SHOWN_LEVELS else "",
            percent(row.changed),
            "" if row.update is None else f"{row.update:.2g}",
            row.notice,
        )
        for row in rows
    ]
    head = (
        "quantizer",
        "range or basis",
        "over groups",
        "clipped %",
        "dead",
        "levels %",
        "changed %",
        "update",
    )
    return format_table((*head, ""), cells)
