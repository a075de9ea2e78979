"""How a low-bit network is doing while it trains: clipping, dead levels, oscillation, update sizes."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from model.lq import LQ
from model.observe import observing
from model.quant import Quantizer, QuantLayer, quantized_layers
from model.summary import format_table

SHOWN_LEVELS = 16  # of more levels only the dead ones are counted


@dataclass(frozen=True, kw_only=True)
class HealthRow:
    """One quantizer after an epoch; shares are of all elements, 0 to 1.

    Attributes:
        name: the quantizer, in the network.
        range: mean over the groups of the clip value (or top level); None where a method has none.
        clipped: share of values below the lowest or above the highest value of the range; likewise.
        basis: LQ-Nets' basis, mean over the groups; empty for other methods.
        levels: share of each level, from the lowest.
        changed: share of weights whose level is another than an epoch ago; None for activations.
        update: |w - w before| / |w before| over the epoch, in L2 norm; None for activations.
    """

    name: str
    range: float | None
    clipped: float | None
    levels: tuple[float, ...]
    basis: tuple[float, ...] = ()
    changed: float | None = None
    update: float | None = None

    @property
    def dead(self) -> int:
        """Levels that no value takes."""
        return sum(share == 0 for share in self.levels)

    def scalars(self) -> dict[str, float]:
        """The row as curves: `NAME/range` and so on."""
        optional = {
            "range": self.range,
            "clipped": self.clipped,
            "changed": self.changed,
            "update": self.update,
        }
        values = {"dead_levels": float(self.dead)}
        values |= {key: value for key, value in optional.items() if value is not None}
        values |= {f"basis{i}": value for i, value in enumerate(self.basis)}
        if len(self.levels) <= SHOWN_LEVELS:
            values |= {f"level{i}": share for i, share in enumerate(self.levels)}
        return {f"{self.name}/{key}": value for key, value in values.items()}


class Health:
    """Watches the quantizers of a network from one epoch to the next.

    Args:
        model: the network; its weights and their levels now are what the next report compares with.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = dict(quantized_layers(model))
        self._model = model
        self._before = {name: self._snapshot(layer) for name, layer in self.layers.items()}

    @staticmethod
    def _snapshot(layer: QuantLayer) -> tuple[Tensor, Tensor | None]:
        """A layer's weight and the numbers of its levels (None where the weight is not quantized)."""
        weight = layer.weight.detach().clone()
        quantizer = layer.quant_weight
        return weight, quantizer.integers(weight).numbers if isinstance(quantizer, Quantizer) else None

    def report(self, images: Tensor) -> list[HealthRow]:
        """The rows after an epoch, activations from one pass of `images` [N, 3, S, S]; starts the next epoch.

        The network is run in evaluation mode and left as it was.
        """
        rows: dict[str, HealthRow] = {}

        def watch(name: str, quantizer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if isinstance(quantizer, Quantizer):
                rows[name] = _row(name, quantizer, inputs[0], quantizer.integers(inputs[0]).numbers)

        with observing(self._model) as hooks:
            for name, layer in self.layers.items():
                for part, quantizer in layer.quantizers():
                    if part != "quant_weight":
                        hooks.append(quantizer.register_forward_pre_hook(partial(watch, f"{name}.{part}")))
            self._model(images)
        for name, layer in self.layers.items():
            weight, numbers = self._snapshot(layer)
            old_weight, old_numbers = self._before[name]
            self._before[name] = weight, numbers
            quantizer = layer.quant_weight
            if numbers is None or old_numbers is None or not isinstance(quantizer, Quantizer):
                continue
            changed = float((numbers != old_numbers).float().mean())
            update = float((weight - old_weight).norm() / old_weight.norm().clamp_min(1e-12))
            full = f"{name}.quant_weight"
            rows[full] = _row(full, quantizer, weight, numbers, changed=changed, update=update)
        return list(rows.values())


def _row(name: str, quantizer: Quantizer, x: Tensor, numbers: Tensor, **weight: float) -> HealthRow:
    with torch.no_grad():
        counts = torch.bincount(numbers.flatten(), minlength=quantizer.levels)
        bounds = quantizer.bounds()
        high = clipped = None
        if bounds is not None:
            normed = quantizer.normalise(x.float())
            lowest, highest = (quantizer.per_channel(bound) for bound in bounds)
            high, clipped = (
                float(bounds[1].mean()),
                float(((normed < lowest) | (normed > highest)).float().mean()),
            )
        basis = quantizer.basis.mean(dim=1).tolist() if isinstance(quantizer, LQ) else []
    return HealthRow(
        name=name,
        range=high,
        clipped=clipped,
        levels=tuple((counts / counts.sum()).tolist()),
        basis=tuple(basis),
        **weight,
    )


def table(rows: list[HealthRow]) -> str:
    """The rows as text."""

    def percent(share: float | None) -> str:
        return "" if share is None else f"{100 * share:.1f}"

    cells = [
        (
            row.name,
            " ".join(f"{value:.3g}" for value in row.basis)
            or ("" if row.range is None else f"{row.range:.4g}"),
            percent(row.clipped),
            str(row.dead),
            " ".join(percent(share) for share in row.levels) if len(row.levels) <= SHOWN_LEVELS else "",
            percent(row.changed),
            "" if row.update is None else f"{row.update:.2g}",
        )
        for row in rows
    ]
    return format_table(
        ("quantizer", "range or basis", "clipped %", "dead", "levels %", "changed %", "update"), cells
    )


def first_nonfinite(model: nn.Module, images: Tensor) -> tuple[int, str] | None:
    """The first layer that makes a NaN or infinity of `images` [N, 3, S, S], in training mode; None: none does.

    Returns how many layers came before it, and its name and state. This is a step of training without the
    gradients: all processes take part, as norms and quantizers may share statistics, and the network's buffers
    change. Call it when the run ends anyway.
    """
    found: list[tuple[int, str]] = []
    counter = itertools.count()

    def watch(name: str, module: nn.Module, output: Tensor) -> None:
        before = next(counter)
        if found or not isinstance(output, Tensor) or bool(output.isfinite().all()):
            return
        bad = [
            key for key, value in module.named_parameters(recurse=False) if not bool(value.isfinite().all())
        ]
        found.append((before, f"{name} (its {', '.join(bad)} is not finite)" if bad else name))

    hooks = [
        module.register_forward_hook(lambda m, _, out, name=name: watch(name, m, out))
        for name, module in model.named_modules()
        if isinstance(module, QuantLayer) or not (isinstance(module, nn.Identity) or any(module.children()))
    ]
    model.train()
    try:
        with torch.no_grad():
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None
