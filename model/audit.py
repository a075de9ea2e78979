"""The audit: on real data, is what is multiplied quantized, and to no more levels than its bits allow?"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn

from model.convert import full_precision
from model.layers.quantized import QuantLayer, full_precision_reason, quantized_layers, quantizers
from model.observe import observing
from model.quantizers.frame import Quantizer
from model.watch.products import Products
from utils.config.schema import QuantConfig
from utils.report.audit_record import Audit, AuditRow, LayerRow


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
    `model.layers.factory`, by `model.convert`, or with `model.quant.keep_full_precision`. The network's mode is
    restored; nothing else of it changes.
    """
    found = dict(quantizers(model))
    watches = {name: _Watch() for name in found}
    products = Products()
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
