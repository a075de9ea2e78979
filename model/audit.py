"""The audit: on real data, does every quantizer put out no more levels than its bits allow?"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.observe import observing
from model.quant import Quantizer, quantizers
from model.summary import format_table


@dataclass(frozen=True, kw_only=True)
class AuditRow:
    """What one quantizer put out.

    Attributes:
        name: in the network.
        allowed: levels that its bits allow.
        seen: most distinct values in any of its groups; 0 when it was never reached.
        changed: some value came out other than it went in.
    """

    name: str
    allowed: int
    seen: int
    changed: bool

    @property
    def problem(self) -> str:
        """What is wrong, empty when nothing is."""
        if self.seen == 0:
            return "was never reached"
        if self.seen <= self.allowed:
            return ""
        return (
            f"shows {self.seen} values where {self.allowed} are allowed"
            if self.changed
            else "passes its input"
        )

    @property
    def note(self) -> str:
        """What a quantizer without a problem looks like: ok, or constant, which carries no information."""
        return "constant, carries nothing" if self.seen == 1 else "ok"


@dataclass(frozen=True)
class Audit:
    """The rows of all quantizers."""

    rows: tuple[AuditRow, ...]

    @property
    def problems(self) -> tuple[str, ...]:
        """One line per quantizer that fails."""
        return tuple(f"{row.name} {row.problem}" for row in self.rows if row.problem)

    @property
    def verdict(self) -> str:
        """One line: passed, failed, or that there is nothing to check."""
        if not self.rows:
            return "full precision, nothing to audit"
        if self.problems:
            return f"FAILED: {len(self.problems)} of {len(self.rows)} quantizers"
        constant = sum(row.seen == 1 for row in self.rows)
        note = f", {constant} of them constant" if constant else ""
        return f"passed: {len(self.rows)} quantizers within their levels{note}"

    def table(self) -> str:
        """The rows as text."""
        rows = [(row.name, str(row.seen), str(row.allowed), row.problem or row.note) for row in self.rows]
        return format_table(("quantizer", "levels seen", "allowed", "verdict"), rows)


class _Watch:
    """Collects the distinct values of one quantizer, per group, over batches."""

    def __init__(self) -> None:
        self.values: list[Tensor] = []
        self.changed = False

    def __call__(self, module: Quantizer, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.changed = self.changed or not torch.equal(inputs[0], output)
        rows = module.level_rows(output.detach())
        if not self.values:
            self.values = [row.unique() for row in rows]
            return
        # Rows of samples (per-sample normalisation) are groups of their own in each batch.
        same = rows.shape[0] == len(self.values) and not module.levels_per_sample
        old = self.values if same else [row[:0] for row in rows]
        fresh = [torch.cat([a, row.unique()]).unique() for a, row in zip(old, rows, strict=True)]
        self.values = fresh if same else [*self.values, *fresh]

    @property
    def seen(self) -> int:
        return max((len(values) for values in self.values), default=0)


def audit(model: nn.Module, batches: Iterable[Tensor]) -> Audit:
    """Run image batches [N, 3, S, S] through `model` in evaluation mode and count levels.

    The network's mode is restored; nothing else of it changes.
    """
    found = dict(quantizers(model))
    watches = {name: _Watch() for name in found}
    with observing(model) as hooks:
        hooks += [module.register_forward_hook(watches[name]) for name, module in found.items()]
        for images in batches:
            model(images)
    return Audit(
        tuple(
            AuditRow(name=name, allowed=module.levels, seen=watches[name].seen, changed=watches[name].changed)
            for name, module in found.items()
        )
    )
