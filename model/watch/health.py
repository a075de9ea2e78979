"""The health of a low-bit network during training: clipping, dead levels, oscillation, update sizes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from model.layers.quantized import QuantLayer, quantized_layers
from model.observe import observing
from model.quantizers.frame import Quantizer
from model.quantizers.integers import QuantizedTensor
from utils.report.cost_record import stored_bits
from utils.report.quantizer_record import KEPT_LEVELS, HealthRow, Histogram

IMAGES = 64  # of a batch that are measured
BINS = 64  # of a histogram
REACH = 5  # standard deviations around the mean that a histogram covers at most, beside the levels


@dataclass(frozen=True)
class _Snapshot:
    """A layer's weight at one time, and the level of each element; small, since it is kept."""

    weight: Tensor
    levels: int
    numbers: Tensor | None


class Health:
    """Watches the quantizers of a network from one epoch to the next.

    Args:
        model: the network; the next report compares with its present weights and their levels.
        epoch_begins: False in the middle of an epoch, whose start is not known: its report compares with nothing.
    """

    def __init__(self, model: nn.Module, *, epoch_begins: bool = True) -> None:
        self.layers = dict(quantized_layers(model))
        self._model = model
        self._before: dict[str, _Snapshot | None] = {
            name: _begin(layer, layer.quant_weight) if epoch_begins else None
            for name, layer in self.layers.items()
            if isinstance(layer.quant_weight, Quantizer)
        }

    def report(self, images: Tensor) -> list[HealthRow]:
        """The rows after an epoch; activations come from one pass of the first `IMAGES` of `images` [N, 3, S, S].

        Starts the next epoch. The network runs in evaluation mode and is left as it was.
        """
        found: dict[str, tuple[Quantizer, dict[str, Tensor]]] = {}

        def watch(name: str, quantizer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if isinstance(quantizer, Quantizer):
                found[name] = quantizer, _measure(quantizer, inputs[0], _integers(quantizer, inputs[0]))

        with observing(self._model) as hooks:
            for name, layer in self.layers.items():
                for part, quantizer in layer.quantizers():
                    if part != "quant_weight" and quantizer.enabled:
                        hooks.append(quantizer.register_forward_pre_hook(partial(watch, f"{name}.{part}")))
            self._model(images[:IMAGES])
        for name, before in self._before.items():
            layer = self.layers[name]
            quantizer = layer.quant_weight
            if not isinstance(quantizer, Quantizer):
                continue
            if not quantizer.enabled:
                self._before[name] = None
            else:
                weight = layer.full_weight().detach()
                integers = _integers(quantizer, weight)
                now = self._before[name] = _snapshot(weight, quantizer, integers)
                measured = _measure(quantizer, weight, integers) | _movement(before, now)
                found[f"{name}.quant_weight"] = quantizer, measured
        figures = _fetch(measured for _, measured in found.values())
        return [
            _row(name, quantizer, values)
            for (name, (quantizer, _)), values in zip(found.items(), figures, strict=True)
        ]


def _begin(layer: QuantLayer, quantizer: Quantizer) -> _Snapshot:
    weight = layer.full_weight().detach()
    return _snapshot(weight, quantizer, _integers(quantizer, weight))


def _snapshot(weight: Tensor, quantizer: Quantizer, integers: QuantizedTensor | None) -> _Snapshot:
    small = torch.uint8 if quantizer.levels <= 256 else torch.int32
    numbers = None if integers is None else integers.numbers.to(small)
    return _Snapshot(weight.detach().clone(), quantizer.levels, numbers)


def _integers(quantizer: Quantizer, x: Tensor) -> QuantizedTensor | None:
    """The codes of `x`; None for a user's own method without them."""
    return None if type(quantizer).encode is Quantizer.encode else quantizer.integers(x)


def _measure(quantizer: Quantizer, x: Tensor, integers: QuantizedTensor | None) -> dict[str, Tensor]:
    """The figures of a quantizer and its input, as float64 vectors on the device."""
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
            levels = levels if integers.offset is None else levels + integers.offset.mean()
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
        figures |= quantizer.figures()
        figures["ends"], figures["counts"] = _histogram(normed, levels)
        return {name: value.detach().double().flatten() for name, value in figures.items()}


def _histogram(x: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """The ends [2] and the counts [BINS] of a histogram of `x` that covers `levels`; only finite values count."""
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
    # Where all values are equal, a width of zero would leave no bin.
    width = ((ends[1] - ends[0]) / BINS).clamp_min(1e-12)
    bins = ((values - ends[0]) / width).floor().clamp(0, BINS - 1).long()
    counts = torch.bincount(bins.flatten(), weights=finite.double().flatten(), minlength=BINS)
    return torch.stack([ends[0], ends[0] + BINS * width]), counts


def _movement(before: _Snapshot | None, now: _Snapshot) -> dict[str, Tensor]:
    """How far the weights moved in the epoch, and the share of them that changed their level."""
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
