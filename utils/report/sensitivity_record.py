"""What each layer of a network loses with few bits: the record of `tools.py --keyword sensitivity`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from utils.config.layer_bits import FULL_BITS
from utils.errors import UserError
from utils.report.cost_record import stored_bytes
from utils.text import format_table, printable

FILE = "sensitivity.json"  # in the folder of a run
FORMAT = 1
ESTIMATE_WEIGHT = "estimate and change of the loss with the weight alone"
ESTIMATE_BOTH = "estimate and change of the loss"
LOSS_TOP1 = "change of the loss and drop of top-1"
MOST = 10**18  # of a count; no network has as many


@dataclass(frozen=True, kw_only=True)
class Change:
    """One layer at some bits, all others in full precision, beside the network in full precision.

    Attributes:
        loss: change of the mean cross-entropy, weight and input quantized.
        weight_loss: the same, the weight alone quantized.
        top1: change in points, weight and input quantized.
        estimate: of `weight_loss` to second order: half the mean trace of the Hessian times the squared error of the
            weight.
    """

    loss: float
    weight_loss: float
    top1: float
    estimate: float


@dataclass(frozen=True, kw_only=True)
class LayerSensitivity:
    """A layer.

    Attributes:
        name: in the network.
        kind: its class and geometry.
        weights: their number.
        macs: multiply-accumulates of one image.
        trace: of the Hessian of the loss with respect to its weight, over the number of weights.
        changes: bits -> what they change.
    """

    name: str
    kind: str
    weights: int
    macs: int
    trace: float
    changes: Mapping[int, Change]

    def bytes_at(self, bits: int) -> int:
        """Bytes of its weight."""
        return stored_bytes(self.weights, bits)

    def bit_operations_at(self, bits: int) -> int:
        """Bit operations of one image, weight and input of the same bits."""
        return self.macs * bits**2

    def loss_at(self, bits: int) -> float:
        """The change of the loss at these bits, without what only noise can explain.

        A loss that falls counts as none, and one that is lower than with more bits as that with more bits.
        """
        return max(0.0, *(change.loss for more, change in self.changes.items() if more >= bits))


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """What the layers of a network lose.

    Attributes:
        checkpoint: of the network in full precision.
        images: how many were run.
        loss: mean cross-entropy in full precision.
        top1: percent, likewise.
        layers: the layers that can be quantized, in the order in which they run.
        other_bytes: float32 bytes of the weights of layers that cannot.
        other_macs: their multiply-accumulates.
    """

    checkpoint: str
    images: int
    loss: float
    top1: float
    layers: tuple[LayerSensitivity, ...]
    other_bytes: int
    other_macs: int

    @property
    def bits(self) -> tuple[int, ...]:
        """The bits that were tried, the most first."""
        return tuple(sorted(self.layers[0].changes, reverse=True))

    def bytes_with(self, bits: Mapping[str, int]) -> int:
        """Bytes of the weights of all layers, for bits of each layer by its name."""
        return self.other_bytes + sum(layer.bytes_at(bits[layer.name]) for layer in self.layers)

    def bit_operations_with(self, bits: Mapping[str, int]) -> int:
        """Bit operations of one image, likewise; weight and input have the same bits."""
        low = sum(layer.bit_operations_at(bits[layer.name]) for layer in self.layers)
        return low + self.other_macs * FULL_BITS**2

    def correlations(self) -> dict[str, dict[int, float]]:
        """Spearman's rank correlations over the layers, for each number of bits; NaN where one side is constant.

        Not over all bits at once: that fewer bits lose more would show in it, and no more.
        """
        found: dict[str, dict[int, float]] = {ESTIMATE_WEIGHT: {}, ESTIMATE_BOTH: {}, LOSS_TOP1: {}}
        for bits in self.bits:
            changes = [layer.changes[bits] for layer in self.layers]
            estimates, losses = [one.estimate for one in changes], [one.loss for one in changes]
            found[ESTIMATE_WEIGHT][bits] = _rank_correlation(estimates, [one.weight_loss for one in changes])
            found[ESTIMATE_BOTH][bits] = _rank_correlation(estimates, losses)
            found[LOSS_TOP1][bits] = _rank_correlation(losses, [-one.top1 for one in changes])
        return found

    def as_text(self) -> str:
        """A table, a row for each layer, and what must be known of it."""
        head = ("layer", "kind", "weights", "MACs", "trace", *(f"{b} bit" for b in self.bits))
        rows = [
            (
                printable(layer.name), layer.kind, f"{layer.weights:,}", f"{layer.macs:,}", f"{layer.trace:.2e}",
                *(f"{layer.changes[b].loss:+.4f} {layer.changes[b].top1:+.1f}" for b in self.bits),
            )
            for layer in self.layers
        ]  # fmt: skip
        lines = [
            format_table(head, rows),
            f"in full precision: loss {self.loss:.4f}, top-1 {self.top1:.2f} on {self.images} images; in the table: "
            "change of the loss and of top-1 in points with this layer alone quantized",
        ]
        for name, values in self.correlations().items():
            said = ", ".join(f"{value:.2f} at {bits} bits" for bits, value in values.items())
            lines.append(f"rank correlation over the layers, {name}: {said}")
        return "\n".join(lines)

    def as_json(self) -> str:
        """The text of a JSON file, for `read`."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1, allow_nan=False)


def _rank_correlation(left: Sequence[float], right: Sequence[float]) -> float:
    from scipy.stats import spearmanr

    if min(len({*left}), len({*right})) < 2:
        return math.nan
    return float(spearmanr(left, right).statistic)  # pyright: ignore[reportAttributeAccessIssue]


def read(path: Path) -> Sensitivity:
    """The record in a file.

    Raises:
        UserError: it is missing, damaged or another file.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found.pop("format") != FORMAT:
            raise ValueError
        layers = tuple(_layer(entry) for entry in found.pop("layers"))
        record = Sensitivity(
            checkpoint=_of(found, "checkpoint", str), images=_of(found, "images", int),
            loss=_of(found, "loss", float), top1=_of(found, "top1", float), layers=layers,
            other_bytes=_of(found, "other_bytes", int), other_macs=_of(found, "other_macs", int),
        )  # fmt: skip
        names = {layer.name for layer in layers}
        if not layers or len(names) < len(layers) or any(set(name) & set("*?[") for name in names):
            raise ValueError
        if any(set(layer.changes) != set(layers[0].changes) for layer in layers):
            raise ValueError
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path}: no file that tools.py --keyword sensitivity has written, or damaged: measure again"
        ) from error
    return record


def _layer(entry: dict[str, Any]) -> LayerSensitivity:
    changes = {
        int(bits): Change(**{name: _of(change, name, float) for name in Change.__dataclass_fields__})
        for bits, change in entry["changes"].items()
    }
    if not changes or len(changes) < len(entry["changes"]) or not all(1 <= bits <= 8 for bits in changes):
        raise ValueError
    return LayerSensitivity(
        name=_of(entry, "name", str), kind=_of(entry, "kind", str), weights=_of(entry, "weights", int),
        macs=_of(entry, "macs", int), trace=_of(entry, "trace", float), changes=changes,
    )  # fmt: skip


def _of(entry: Mapping[str, Any], name: str, kind: type) -> Any:
    """A value of a kind; whole numbers are numbers too, and counts are not negative."""
    value = entry[name]
    if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind):
        raise TypeError
    if not (abs(value) < MOST if kind is float else kind is str or 0 <= value < MOST):
        raise ValueError
    return value


def draw(record: Sensitivity, path: Path) -> None:
    """Draw the changes of the loss over the layers, a line for each number of bits; the ending says the format."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(
        figsize=(max(7.0, 0.42 * len(record.layers)), 5.0), dpi=120,
        layout=ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.1),
    )  # fmt: skip
    axes = figure.subplots()
    places = range(len(record.layers))
    for bits, marker in zip(record.bits, "osD^vP*Xh<>dp", strict=False):
        losses = [layer.changes[bits].loss for layer in record.layers]
        axes.plot(places, losses, marker=marker, markersize=5, linewidth=1.2, label=f"{bits} bit")
    axes.set_xticks(
        places, [layer.name for layer in record.layers], rotation=60, ha="right", parse_math=False
    )
    axes.set_yscale("symlog", linthresh=1e-3)
    axes.set_ylabel("change of the loss, this layer alone quantized")
    axes.set_title(Path(record.checkpoint).name, parse_math=False)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)
