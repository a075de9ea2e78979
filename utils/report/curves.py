"""Pictures of a run: its curves, and its learning rates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from utils.step.schedule import Schedule

BLUE, ORANGE, GREEN = "#0072b2", "#d55e00", "#009e73"  # colour-blind eyes can tell them apart


def draw_curves(rows: Sequence[Mapping[str, float]], path: Path, title: str) -> None:
    """Draw loss, top-1 accuracy and learning rate over the epochs into a picture.

    Args:
        rows: as of `MetricsFile.read`: `epoch`, `lr`, `train_loss`, `train_top1` (percent) and, where
            there was a validation, `val_loss` and `val_top1`. A column that is missing or NaN is a gap.
        path: the picture; the name's ending says the format.
        title: the line above the panels.
    """
    # Only this function needs matplotlib; its object interface leaves no global state behind.
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(13.5, 4.2), dpi=120, layout=ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.1))
    figure.suptitle(title, fontsize=13, fontweight="bold", parse_math=False)
    loss, top1, rate = figure.subplots(1, 3)
    for axes, label in ((loss, "loss"), (top1, "top-1 accuracy (%)"), (rate, "learning rate")):
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.margins(x=0.02, y=0.08)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    _draw_line(loss, rows, "train_loss", "training", BLUE)
    _draw_line(loss, rows, "val_loss", "validation", ORANGE)
    _draw_line(top1, rows, "train_top1", "training", BLUE)
    best = max(_points(rows, "val_top1"), key=lambda point: point[1], default=None)
    best_label = "validation" if best is None else f"validation, best {best[1]:.2f} in epoch {best[0]:g}"
    _draw_line(top1, rows, "val_top1", best_label, ORANGE)
    _draw_line(rate, rows, "lr", "learning rate", GREEN)
    rates = [value for _, value in _points(rows, "lr")]
    if rates and 0 < 10 * min(rates) < max(rates):
        rate.set_yscale("log")
    for axes in (loss, top1):
        if axes.lines:
            axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def draw_schedule(rates: Schedule, path: Path, title: str) -> None:
    """Draw the learning rate of every optimizer step of a run into a picture; the name's ending says the format."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    steps = range(rates.total_steps)
    axes.plot(
        [step / rates.steps_per_epoch for step in steps], [rates.taken(step) for step in steps],
        color=GREEN, linewidth=1.6, drawstyle="steps-post",
    )  # fmt: skip
    axes.set_title(title, fontsize=13, fontweight="bold", parse_math=False)
    axes.set_xlabel("epoch")
    axes.set_ylabel("learning rate")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _points(rows: Sequence[Mapping[str, float]], column: str) -> list[tuple[float, float]]:
    """Give `(epoch, value)` of the rows in which the column has a finite number."""
    points = [(row["epoch"], row.get(column, math.nan)) for row in rows]
    return [point for point in points if math.isfinite(point[1])]


def _draw_line(axes: Axes, rows: Sequence[Mapping[str, float]], column: str, label: str, color: str) -> None:
    """Draw a column over the epochs; few points are marked, so that even one is seen."""
    points = _points(rows, column)
    if points:
        epochs, values = zip(*points, strict=True)
        marker = "o" if len(points) <= 30 else ""
        axes.plot(epochs, values, label=label, color=color, marker=marker, markersize=4, linewidth=1.6)
