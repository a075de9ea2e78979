"""The audit: on real data, does every quantizer put out no more levels than its bits allow?"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.observe import observing
from model.quant import Quantizer, QuantLayer, quantizers
from model.summary import format_table
from utils.config import QuantConfig


@dataclass(frozen=True, kw_only=True)
class AuditRow:
    """What one quantizer put out.

    Attributes:
        name: in the network.
        allowed: levels that its bits allow.
        seen: most distinct values in any of its groups; 0 when it was never reached.
        changed: some value came out other than it went in.
        exact: the output was always what the quantizer's own integers stand for.
        warming: it still passes its input (`--stable`).
    """

    name: str
    allowed: int
    seen: int
    changed: bool = True
    exact: bool = True
    warming: bool = False

    @property
    def problem(self) -> str:
        """What is wrong, empty when nothing is."""
        if self.seen == 0:
            return "was never reached"
        if self.warming:
            return "passes its input: the warm-up of --stable has not ended"
        if self.seen > self.allowed and not self.changed:
            return "passes its input"
        if self.seen > self.allowed:
            return f"shows {self.seen} values where {self.allowed} are allowed"
        # At many bits a small group has fewer values than levels; its integers tell all the same.
        return "" if self.exact else "puts out values that are not those of its levels"

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
        self.exact = True

    def __call__(self, module: Quantizer, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.changed = self.changed or not torch.equal(inputs[0], output)
        if type(module).encode is not Quantizer.encode:  # a user's own quantizer may know no integers
            expected = module.integers(inputs[0]).dequantize().to(output.dtype)
            self.exact = self.exact and torch.equal(output, expected)
        rows = module.level_rows(output.detach())
        if not self.values:
            self.values = [row.unique() for row in rows]
            return
        # Rows of samples (per-sample normalisation) are groups of their own in each batch.
        same = rows.shape[0] == len(self.values) and not module.levels_per_sample()
        old = self.values if same else [row[:0] for row in rows]
        fresh = [torch.cat([a, row.unique()]).unique() for a, row in zip(old, rows, strict=True)]
        self.values = fresh if same else [*self.values, *fresh]

    @property
    def seen(self) -> int:
        return max((len(values) for values in self.values), default=0)


def unquantized(model: nn.Module, config: QuantConfig) -> list[str]:
    """The quantizers that quantized layers should have by the configuration and do not have."""
    parts = {"quant_activation": config.fm, "quant_weight": config.wt, "quant_output": config.ot}
    return [
        f"{name}.{part}"
        for name, layer in model.named_modules()
        if isinstance(layer, QuantLayer)
        for part, settings in parts.items()
        if settings.enable and not isinstance(getattr(layer, part), Quantizer)
    ]


def audit(model: nn.Module, batches: Iterable[Tensor], config: QuantConfig | None = None) -> Audit:
    """Run image batches [N, 3, S, S] through `model` in evaluation mode and count levels.

    A quantizer that `config` asks for in a quantized layer and that is not there counts as never reached.
    The network's mode is restored; nothing else of it changes.
    """
    found = dict(quantizers(model))
    watches = {name: _Watch() for name in found}
    with observing(model) as hooks:
        hooks += [module.register_forward_hook(watches[name]) for name, module in found.items()]
        for images in batches:
            model(images)
        rows = [
            AuditRow(
                name=name,
                allowed=module.levels,
                seen=watches[name].seen,
                changed=watches[name].changed,
                exact=watches[name].exact,
                warming=bool(module.warming_up()),
            )
            for name, module in found.items()
        ]
    missing = [] if config is None else unquantized(model, config)
    return Audit((*rows, *(AuditRow(name=name, allowed=0, seen=0) for name in missing)))
