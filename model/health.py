"""How a low-bit network is doing while it trains: clipping, dead levels, oscillation, update sizes."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from model.lq import LQ
from model.observe import observing
from model.quant import Integers, Quantizer, QuantLayer, quantized_layers
from model.summary import format_table, stored_bits

IMAGES = 64  # of a batch that are looked at
BINS = 64  # of a histogram
REACH = 5  # standard deviations around the mean that a histogram covers at most, beside the levels
SHOWN_LEVELS = 16  # of more levels only the dead ones are counted in the log and in TensorBoard
KEPT_LEVELS = 64  # of more levels neither shares nor values are kept


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """How often values fall into bins of equal width; the outermost bins hold all that lies beyond.

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
        used: levels that some value takes; None where the method of a user's own knows no integers.
        range: mean over the groups of the clip value (or top level); None where a method has none.
        range_lowest, range_highest: the least and the greatest of the groups; likewise.
        clipped: share of values below the lowest or above the highest value of the range; likewise.
        shares: share of each level, from the lowest; empty with more than `KEPT_LEVELS`.
        values: the levels, mean over the groups, before a normalisation is undone and without `gamma`; likewise.
        basis: LQ-Nets' basis, mean over the groups; empty for other methods.
        changed: share of weights whose level is another than an epoch ago; None for activations, where
            the number of levels is another, and in an epoch that was gone on with in its middle.
        update: |w - w before| / |w before| over the epoch, in L2 norm; None for activations and in such an epoch.
        histogram: of the values that come in, as the method sees them (`Quantizer.normalise`).
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
        """What needs somebody's attention; empty when nothing does."""
        return "constant, carries nothing" if self.used == 1 else ""

    @property
    def positions(self) -> tuple[float, ...]:
        """Where the levels lie among the values that come in.

        They are the levels themselves, but for a method whose levels are integers (FATNN): there the top one
        is put at the end of the range and the others in proportion.
        """
        if self.range is None or not self.values or self.values[-1] <= 0:
            return self.values
        return tuple(value * self.range / self.values[-1] for value in self.values)

    def scalars(self) -> dict[str, float]:
        """The row as curves: `NAME/range` and so on."""
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
        return {f"{self.name}/{key}": value for key, value in values.items()}

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


@dataclass(frozen=True)
class _Snapshot:
    """A layer's weight and, as its quantizer stood then, the level of each element; small, since it is kept."""

    weight: Tensor
    levels: int
    numbers: Tensor | None


class Health:
    """Watches the quantizers of a network from one epoch to the next.

    Args:
        model: the network; its weights and their levels now are what the next report compares with.
        epoch_begins: otherwise this is the middle of an epoch, whose beginning is not known: its report compares
            with nothing.
    """

    def __init__(self, model: nn.Module, *, epoch_begins: bool = True) -> None:
        self.layers = dict(quantized_layers(model))
        self._model = model
        self._before: dict[str, _Snapshot | None] = {
            name: _snapshot(layer, layer.quant_weight, _integers(layer.quant_weight, layer.weight))
            if epoch_begins
            else None
            for name, layer in self.layers.items()
            if isinstance(layer.quant_weight, Quantizer)
        }

    def report(self, images: Tensor) -> list[HealthRow]:
        """The rows after an epoch, activations from one pass of the first `IMAGES` of `images` [N, 3, S, S].

        Starts the next epoch. The network is run in evaluation mode and left as it was.
        """
        found: dict[str, tuple[Quantizer, dict[str, Tensor]]] = {}

        def watch(name: str, quantizer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if isinstance(quantizer, Quantizer):
                found[name] = quantizer, _measure(quantizer, inputs[0], _integers(quantizer, inputs[0]))

        with observing(self._model) as hooks:
            for name, layer in self.layers.items():
                for part, quantizer in layer.quantizers():
                    if part != "quant_weight":
                        hooks.append(quantizer.register_forward_pre_hook(partial(watch, f"{name}.{part}")))
            self._model(images[:IMAGES])
        for name, before in self._before.items():
            layer = self.layers[name]
            quantizer = layer.quant_weight
            if isinstance(quantizer, Quantizer):
                integers = _integers(quantizer, layer.weight)
                now = self._before[name] = _snapshot(layer, quantizer, integers)
                measured = _measure(quantizer, layer.weight, integers) | _movement(before, now)
                found[f"{name}.quant_weight"] = quantizer, measured
        figures = _fetch(measured for _, measured in found.values())
        return [
            _row(name, quantizer, values)
            for (name, (quantizer, _)), values in zip(found.items(), figures, strict=True)
        ]


def _snapshot(layer: QuantLayer, quantizer: Quantizer, integers: Integers | None) -> _Snapshot:
    small = torch.uint8 if quantizer.levels <= 256 else torch.int32
    numbers = None if integers is None else integers.numbers.to(small)
    return _Snapshot(layer.weight.detach().clone(), quantizer.levels, numbers)


def _integers(quantizer: Quantizer, x: Tensor) -> Integers | None:
    """The codes of `x`; None for a method of the user's own that does not tell them."""
    return None if type(quantizer).encode is Quantizer.encode else quantizer.integers(x)


def _measure(quantizer: Quantizer, x: Tensor, integers: Integers | None) -> dict[str, Tensor]:
    """The figures of a quantizer and what comes in, as float64 vectors on the device."""
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        normed = quantizer.normalise(x.float())
        figures: dict[str, Tensor] = {}
        levels = normed.new_zeros(0)
        if integers is not None:
            counts = torch.bincount(
                integers.numbers.flatten().clamp(0, quantizer.levels - 1), minlength=quantizer.levels
            )
            figures["used"] = (counts > 0).sum()
            levels = integers.codebook.mean(dim=0) * integers.factor.mean()
            if quantizer.levels <= KEPT_LEVELS:
                figures["shares"] = counts / counts.sum()
                figures["values"] = levels
        bounds = quantizer.bounds()
        if bounds is not None:
            lowest, highest = (quantizer.per_channel(bound) for bound in bounds)
            figures["range"] = bounds[1].mean()
            figures["range_lowest"], figures["range_highest"] = bounds[1].aminmax()
            figures["clipped"] = ((normed < lowest) | (normed > highest)).double().mean()
            levels = torch.stack([bound.mean() for bound in bounds])
        if isinstance(quantizer, LQ):
            figures["basis"] = quantizer.basis.mean(dim=1)
        figures["ends"], figures["counts"] = _histogram(normed, levels)
        return {name: value.detach().double().flatten() for name, value in figures.items()}


def _histogram(x: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """The ends [2] and the counts [BINS] of a histogram of `x` that covers `levels`; not finite ones are left out."""
    finite = x.isfinite()
    values = torch.where(finite, x, 0.0).double()
    count = finite.sum().clamp_min(1)
    mean = values.sum() / count
    spread = (torch.where(finite, values - mean, 0.0).square().sum() / count).sqrt() * REACH
    low = torch.maximum(torch.where(finite, values, math.inf).amin(), mean - spread)
    high = torch.minimum(torch.where(finite, values, -math.inf).amax(), mean + spread)
    ends = torch.stack([low, high])
    if levels.numel() > 0:
        ends = torch.stack([torch.minimum(low, levels.amin()), torch.maximum(high, levels.amax())])
    ends = torch.where(ends.isfinite(), ends, 0.0)
    # A width of zero, where all is one value, would leave it without a bin.
    width = ((ends[1] - ends[0]) / BINS).clamp_min(1e-12)
    bins = ((values - ends[0]) / width).floor().clamp(0, BINS - 1).long()
    counts = torch.bincount(bins.flatten(), weights=finite.double().flatten(), minlength=BINS)
    return torch.stack([ends[0], ends[0] + BINS * width]), counts


def _movement(before: _Snapshot | None, now: _Snapshot) -> dict[str, Tensor]:
    """How far the weights went over the epoch, and the share of them that changed their level."""
    if before is None:
        return {}
    update = (now.weight - before.weight).norm() / before.weight.norm().clamp_min(1e-12)
    figures = {"update": update.double().flatten()}
    if now.numbers is not None and before.numbers is not None and now.levels == before.levels:
        figures["changed"] = (now.numbers != before.numbers).double().mean().flatten()
    return figures


def _fetch(measured: Iterable[dict[str, Tensor]]) -> list[dict[str, list[float]]]:
    """The vectors as numbers, in one transfer from the device."""
    rows = list(measured)
    vectors = [vector for row in rows for vector in row.values()]
    numbers = iter(torch.cat(vectors).tolist() if vectors else [])
    return [
        {name: list(itertools.islice(numbers, len(vector))) for name, vector in row.items()} for row in rows
    ]


def _row(name: str, quantizer: Quantizer, figures: dict[str, list[float]]) -> HealthRow:
    names = ("range", "range_lowest", "range_highest", "clipped", "changed", "update")
    single = {name: figures[name][0] for name in names if name in figures}
    low, high = figures["ends"]
    return HealthRow(
        name=name,
        tag=quantizer.config.tag,
        method=quantizer.config.method,
        levels=quantizer.levels,
        bits=stored_bits(quantizer.levels),
        used=int(figures["used"][0]) if "used" in figures else None,
        range=single.get("range"),
        range_lowest=single.get("range_lowest"),
        range_highest=single.get("range_highest"),
        clipped=single.get("clipped"),
        shares=tuple(figures.get("shares", ())),
        values=tuple(figures.get("values", ())),
        histogram=Histogram(
            edges=tuple(low + (high - low) * i / BINS for i in range(BINS + 1)),
            counts=tuple(int(count) for count in figures["counts"]),
        ),
        basis=tuple(figures.get("basis", ())),
        changed=single.get("changed"),
        update=single.get("update"),
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


def first_nonfinite(model: nn.Module, images: Tensor, *, training: bool = True) -> tuple[int, str] | None:
    """The first layer that makes a NaN or infinity of `images` [N, 3, S, S]; None: none does.

    Returns how many layers came before it, and its name and state. In training mode this is a step of training
    without the gradients: all processes take part, as norms and quantizers may share statistics, and the network's
    buffers change. Call it when the run ends anyway.
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
    model.train(training)
    try:
        with torch.no_grad():
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None
