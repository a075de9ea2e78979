"""The findings of the audit, as a record and as a table."""

from __future__ import annotations

from dataclasses import dataclass

from utils.report.accumulator_record import Accumulator, accumulator_table
from utils.text import format_table, some_names

MOST_CUT_OFF = 0.1  # the share of an input outside the range of its levels that is remarked on


@dataclass(frozen=True, kw_only=True)
class AuditRow:
    """The output of one quantizer.

    Attributes:
        name: in the network.
        allowed: levels that its bits allow.
        seen: most distinct values in any of its groups; 0 when it was never reached.
        changed: some value of the output differs from its input.
        exact: the output always had the values of the quantizer's own integers.
        finite: no value of the output was infinite or not a number.
        warming: it still passes its input on (`--stable`).
        reason: why it is switched off on purpose, the rest of a sentence; empty for others.
        below: share of its input, 0 to 1, below the range of its levels (`model.watch.cut_off`); 0 for weights.
        above: likewise, above it.
        pixels: share of the values of the images, 0 to 1, that it makes 0 since its levels start there; 0 for a
            quantizer that does not read the images.
    """

    name: str
    allowed: int
    seen: int
    changed: bool = True
    exact: bool = True
    finite: bool = True
    warming: bool = False
    reason: str = ""
    below: float = 0.0
    above: float = 0.0
    pixels: float = 0.0

    @property
    def problem(self) -> str:
        """The quantizer's problem; empty when there is none."""
        if self.reason:
            return ""
        if self.seen == 0:
            return "was never reached"
        if self.warming:
            return "passes its input: the warm-up of --stable has not ended"
        if not self.finite:
            return "puts out values that are not finite"
        if self.seen > self.allowed and not self.changed:
            return "passes its input"
        if self.seen > self.allowed:
            return f"shows {self.seen} values where {self.allowed} are allowed"
        # At many bits a small group has fewer values than levels, but its integers still tell.
        return "" if self.exact else "puts out values that are not those of its levels"

    @property
    def note(self) -> str:
        """A remark on a quantizer without a problem: ok, off, constant, or how much of its input its levels cut off."""
        if self.reason:
            return f"full precision: it {self.reason}"
        if self.seen == 1:
            return "constant, carries nothing"
        return f"ok, cuts off {self.cut_off}" if self.cut_off else "ok"

    @property
    def cut_off(self) -> str:
        """The shares of its input that its levels cut off, in words; empty when they are a tenth or less."""
        if self.below + self.above <= MOST_CUT_OFF:
            return ""
        shares = [(self.below, "below"), (self.above, "above")]
        parts = [f"{100 * share:.0f} % {where}" for share, where in shares if share >= 0.005]
        return f"{' and '.join(parts)} its range"


@dataclass(frozen=True, kw_only=True)
class LayerRow:
    """A layer that computes in full precision, or a quantized one that does not compute what it should.

    Attributes:
        name: in the network.
        reason: why it stays in full precision, the rest of a sentence; empty for others.
        problem: its problem; empty when there is none.
    """

    name: str
    reason: str = ""
    problem: str = ""


@dataclass(frozen=True)
class Audit:
    """The rows of all quantizers, of the layers that stand out, and of those that add products of integers."""

    rows: tuple[AuditRow, ...]
    layers: tuple[LayerRow, ...] = ()
    accumulators: tuple[Accumulator, ...] = ()

    @property
    def problems(self) -> tuple[str, ...]:
        """One line per quantizer and per layer that fails."""
        return tuple(f"{row.name} {row.problem}" for row in (*self.rows, *self.layers) if row.problem)

    @property
    def verdict(self) -> str:
        """One line: passed, failed, or that there is nothing to check."""
        if not self.rows and not self.problems:
            return "full precision, nothing to audit"
        if self.problems:
            wrong = [sum(bool(row.problem) for row in rows) for rows in (self.rows, self.layers)]
            parts = [f"{wrong[0]} of {len(self.rows)} quantizers"] * bool(wrong[0])
            parts += [f"{wrong[1]} {'layer' if wrong[1] == 1 else 'layers'}"] * bool(wrong[1])
            return f"FAILED: {', '.join(parts)}"
        on = [row for row in self.rows if not row.reason]
        constant, off = sum(row.seen == 1 for row in on), len(self.rows) - len(on)
        note = f", {constant} of them constant" if constant else ""
        if cutting := sum(row.below > MOST_CUT_OFF for row in on):
            note += f", {cutting} of them cutting off the lower part of their input"
        note += f", {off} switched off on purpose" if off else ""
        return f"passed: {len(on)} quantizers within their levels{note}"

    @property
    def warning(self) -> str:
        """One line about layers that cut off the pixels below zero, and what to write instead; empty for none."""
        found = [
            f"{row.name.removesuffix('.quant_activation')} makes {100 * row.pixels:.0f} % of the images' values 0"
            for row in self.rows
            if row.pixels > 0 and not row.reason
        ]
        if not found:
            return ""
        return (
            f"{some_names(found)}, those below zero, since its levels start there: train with --first_bit 8 or "
            "--fm_first_signed, which give it signed levels"
        )

    @property
    def remark(self) -> str:
        """One line about the quantizers that cut off much of their input; empty when there are none."""
        found = [f"{row.name} {row.cut_off}" for row in self.rows if row.cut_off]
        if not found:
            return ""
        return f"quantizers that cut off more than a tenth of their input: {some_names(found)}"

    def table(self) -> str:
        """The rows as text."""
        rows = [(row.name, str(row.seen), str(row.allowed), row.problem or row.note) for row in self.rows]
        text = format_table(("quantizer", "levels seen", "allowed", "verdict"), rows)
        if self.layers:
            layers = [(row.name, row.problem or f"full precision: it {row.reason}") for row in self.layers]
            text = f"{text}\n\n{format_table(('layer', 'verdict'), layers)}\n"
        if self.accumulators:
            text = f"{text}\n\n{accumulator_table(self.accumulators)}\n"
        return f"{text}\nwarning: {self.warning}" if self.warning else text
