"""The audit: on real data, is what is multiplied quantized, and to no more levels than its bits allow?"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from model.convert import full_precision
from model.observe import first_input, observing
from model.quant import Quantizer, QuantLayer, full_precision_reason, quantized_layers, quantizers
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
        finite: no value that came out was infinite or not a number.
        warming: it still passes its input (`--stable`).
    """

    name: str
    allowed: int
    seen: int
    changed: bool = True
    exact: bool = True
    finite: bool = True
    warming: bool = False

    @property
    def problem(self) -> str:
        """What is wrong, empty when nothing is."""
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
        # At many bits a small group has fewer values than levels; its integers tell all the same.
        return "" if self.exact else "puts out values that are not those of its levels"

    @property
    def note(self) -> str:
        """What a quantizer without a problem looks like: ok, or constant, which carries no information."""
        return "constant, carries nothing" if self.seen == 1 else "ok"


@dataclass(frozen=True, kw_only=True)
class LayerRow:
    """A layer that computes in full precision, or a quantized one that does not compute what it should.

    Attributes:
        name: in the network.
        reason: why it stays in full precision, the rest of a sentence; empty for others.
        problem: what is wrong, empty when nothing is.
    """

    name: str
    reason: str = ""
    problem: str = ""


@dataclass(frozen=True)
class Audit:
    """The rows of all quantizers, and of the layers that stand out."""

    rows: tuple[AuditRow, ...]
    layers: tuple[LayerRow, ...] = ()

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
        constant = sum(row.seen == 1 for row in self.rows)
        note = f", {constant} of them constant" if constant else ""
        return f"passed: {len(self.rows)} quantizers within their levels{note}"

    def table(self) -> str:
        """The rows as text."""
        rows = [(row.name, str(row.seen), str(row.allowed), row.problem or row.note) for row in self.rows]
        text = format_table(("quantizer", "levels seen", "allowed", "verdict"), rows)
        if not self.layers:
            return text
        layers = [(row.name, row.problem or f"full precision: it {row.reason}") for row in self.layers]
        return f"{text}\n\n{format_table(('layer', 'verdict'), layers)}\n"


class _Watch:
    """Collects the distinct values of one quantizer, per group, over batches."""

    def __init__(self) -> None:
        self.values: list[Tensor] = []
        self.changed = False
        self.exact = True
        self.finite = True

    def __call__(self, module: Quantizer, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.changed = self.changed or not torch.equal(inputs[0], output)
        if not output.isfinite().all():  # no level's number
            self.finite = False
            self.values = self.values or [row[:1] for row in module.level_rows(output.detach())]
            return
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


# Where a convolution or a matrix product takes its two factors.
_aten = torch.ops.aten
PRODUCTS: dict[Any, tuple[int, int]] = {
    **dict.fromkeys((_aten.convolution, _aten.conv1d, _aten.conv2d, _aten.conv3d), (0, 1)),
    **dict.fromkeys((_aten.linear, _aten.matmul, _aten.mm, _aten.bmm, _aten.mv, _aten.dot), (0, 1)),
    **dict.fromkeys((_aten.addmm, _aten.addmv, _aten.addbmm, _aten.baddbmm), (1, 2)),
}


@dataclass
class _Call:
    """One call of a quantized layer: what its quantizers have put out so far, and what it has multiplied."""

    outputs: dict[str, list[Tensor]] = field(default_factory=dict)
    products: int = 0
    problem: str = ""


class _Products(TorchDispatchMode):
    """Looks at what enters the convolutions and matrix products of quantized layers, and at what leaves the layers.

    All that a layer multiplies must be what its quantizers have put out: every product has a factor whose values are
    those of the activations' quantizer (or padding's zeros), and another one with those of the weights'.

    Attributes:
        problems: layer -> the first thing that was wrong.
    """

    def __init__(self) -> None:
        super().__init__()
        self.problems: dict[str, str] = {}
        self._calls: list[tuple[QuantLayer, _Call] | None] = []  # within each other; None: within a quantizer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        places = PRODUCTS.get(func.overloadpacket)
        if places is not None and self._calls and self._calls[-1] is not None:
            layer, call = self._calls[-1]
            call.products += 1
            call.problem = call.problem or _multiplied(layer, call, [args[place] for place in places])
        return func(*args, **(kwargs or {}))

    def enter_layer(self, layer: QuantLayer, inputs: object) -> None:
        """A hook before a quantized layer."""
        self._calls.append((layer, _Call()))

    def leave_layer(
        self, name: str, layer: QuantLayer, inputs: tuple[Any, ...], named: dict[str, Any], output: Tensor
    ) -> None:
        """A hook behind it."""
        entry = self._calls.pop()
        assert entry is not None
        call, problem = entry[1], entry[1].problem
        if first_input(inputs, named).numel() == 0:  # then nothing but the weight is quantized
            return
        if not problem and call.products == 0:
            problem = "has no convolution and no matrix product that could be looked at"
        if not problem and "quant_output" in dict(layer.quantizers()):
            outputs = call.outputs.get("quant_output", [])
            problem = "" if _among(output, outputs) else "puts out values that quant_output did not"
        if problem:
            self.problems.setdefault(name, problem)

    def enter_quantizer(self, quantizer: Quantizer, inputs: object) -> None:
        """A hook before a quantizer, whose own products are no business of the layer's."""
        self._calls.append(None)

    def leave_quantizer(self, part: str, quantizer: Quantizer, inputs: object, output: Tensor) -> None:
        """A hook behind it."""
        self._calls.pop()
        if self._calls and self._calls[-1] is not None:
            self._calls[-1][1].outputs.setdefault(part, []).append(output)


def _multiplied(layer: QuantLayer, call: _Call, factors: Sequence[Tensor]) -> str:
    """What is wrong with the two factors of a product; empty when they are what the quantizers put out."""
    parts = [part for part, _ in layer.quantizers() if part != "quant_output"]
    of_part = {part: [_among(factor, call.outputs.get(part, [])) for factor in factors] for part in parts}
    if any(
        all(of_part[part][i] for part, i in zip(parts, order, strict=False)) for order in ((0, 1), (1, 0))
    ):
        return ""
    wrong = [part for part in parts if not any(of_part[part])] or parts
    return f"multiplies values that {' and '.join(wrong)} did not put out"


def _among(factor: Tensor, outputs: Sequence[Tensor]) -> bool:
    """Whether all values of `factor` are values of the outputs, or zero."""
    rounded = [
        output.detach().to(factor.dtype) for output in outputs
    ]  # autocast multiplies in a lower precision
    for output, view in itertools.product(rounded, (factor, factor.mT if factor.ndim > 1 else factor)):
        if output.numel() == view.numel() and torch.equal(output.reshape(view.shape), view):
            return True
    values = torch.cat([factor.new_zeros(1), *(output.unique() for output in rounded)])
    return bool(torch.isin(factor, values).all())


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
    """Run image batches [N, 3, S, S] through `model` in evaluation mode, count levels, look at what is multiplied.

    A quantizer that `config` asks for in a quantized layer and that is not there counts as never reached. In a
    quantized network a convolution or linear layer without quantizers fails unless it was left so on purpose: by
    `model.layer`, by `model.convert`, or with `model.quant.keep_full_precision`. The network's mode is restored;
    nothing else of it changes.
    """
    found = dict(quantizers(model))
    watches = {name: _Watch() for name in found}
    products = _Products()
    with observing(model) as hooks:
        hooks += [module.register_forward_hook(watches[name]) for name, module in found.items()]
        for name, layer in quantized_layers(model):
            hooks.append(layer.register_forward_pre_hook(products.enter_layer))
            hooks.append(layer.register_forward_hook(partial(products.leave_layer, name), with_kwargs=True))
            for part, quantizer in layer.quantizers():
                hooks.append(quantizer.register_forward_pre_hook(products.enter_quantizer))
                hooks.append(quantizer.register_forward_hook(partial(products.leave_quantizer, part)))
        with products:
            for images in batches:
                model(images)
        rows = [
            AuditRow(
                name=name,
                allowed=module.levels,
                seen=watches[name].seen,
                changed=watches[name].changed,
                exact=watches[name].exact,
                finite=watches[name].finite,
                warming=bool(module.warming_up()),
            )
            for name, module in found.items()
        ]
    missing = [] if config is None else unquantized(model, config)
    rows += [AuditRow(name=name, allowed=0, seen=0) for name in missing]
    layers = [LayerRow(name=name, problem=problem) for name, problem in products.problems.items()]
    return Audit(tuple(rows), (*(full_precision_rows(model) if rows else ()), *layers))


def full_precision_rows(model: nn.Module) -> tuple[LayerRow, ...]:
    """The layers that multiply in full precision; those that no `keep_full_precision` is about have a problem."""
    reasons = {name: full_precision_reason(model.get_submodule(name)) for name in full_precision(model)}
    problem = "computes in full precision, and no model.quant.keep_full_precision(layer, reason) says that it should"
    return tuple(
        LayerRow(name=name, reason=reason, problem="" if reason else problem)
        for name, reason in reasons.items()
    )


def unexplained(model: nn.Module) -> tuple[str, ...]:
    """What the audit of a quantized network will find that shows without data: a line per layer."""
    rows = full_precision_rows(model) if any(True for _ in quantizers(model)) else ()
    return tuple(f"{row.name} {row.problem}; the audit fails" for row in rows if row.problem)
