"""TensorBoard's event files: curves, histograms with their levels, images, hyperparameters."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from utils.config.schema import TAGS
from utils.errors import UserError
from utils.report.curves import BLUE, ORANGE

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.utils.tensorboard.writer import SummaryWriter

    from utils.report.quantizer_record import HealthRow, Histogram

# A tag's part before the first "/" is its group. TensorBoard sorts groups by name and opens the first two.
_GROUPS = {"top1": "accuracy", "top5": "accuracy", "loss": "loss", "lr": "optimizer", "frozen": "optimizer"}


def metric_tag(column: str) -> str:
    """The tag of a column of the metrics, such as `accuracy/val_top1`."""
    return f"{_GROUPS.get(column.rpartition('_')[2], 'performance')}/{column}"


def quantizer_tag(row: HealthRow, what: str) -> str:
    """The tag of something of a quantizer, in a group for each layer: `quantizers of layer1.0.conv1/weight range`."""
    return f"quantizers of {row.name.rpartition('.')[0]}/{TAGS[row.tag]} {what}"


def probe_tag(name: str) -> str:
    """The tag of a tensor of the probe, `LAYER.weight.gradient`, in a group for each layer."""
    layer = name.removesuffix(".gradient").rpartition(".")[0]
    return f"probe of {layer}/{name.removeprefix(f'{layer}.')}"


class Board:
    """TensorBoard's event files, or nothing.

    Args:
        folder: where the event files go; None writes nothing and does not import TensorBoard.
        purge_step: the first step of a resumed run; events that a former run wrote from there on are hidden.

    Raises:
        UserError: TensorBoard is not installed, or the folder cannot be written.
    """

    def __init__(self, folder: Path | None, purge_step: int | None = None) -> None:
        self._writer = None if folder is None else _writer(folder, purge_step)

    @property
    def writes(self) -> bool:
        """Whether events are written, so that making them is worthwhile."""
        return self._writer is not None

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Write one point of each curve."""
        if self._writer is not None:
            for tag, value in values.items():
                self._writer.add_scalar(tag, value, step)

    def histogram(self, tag: str, values: Tensor, step: int) -> None:
        """Write the distribution of a tensor's finite elements, of any shape, float type and device."""
        if self._writer is not None:
            numbers = values.detach().to("cpu", torch.float32)
            numbers = numbers[numbers.isfinite()]
            if numbers.numel() > 0:
                self._writer.add_histogram(tag, numbers, step)

    def counts(self, tag: str, histogram: Histogram, step: int) -> None:
        """Write a distribution that is counted already; its sums take each value as the middle of its bin."""
        if self._writer is not None:
            edges, counts = histogram.edges, histogram.counts
            middles = [(low + high) / 2 for low, high in itertools.pairwise(edges)]
            pairs = list(zip(middles, counts, strict=True))
            self._writer.add_histogram_raw(
                tag,
                min=edges[0],
                max=edges[-1],
                num=sum(counts),
                sum=sum(middle * count for middle, count in pairs),
                sum_squares=sum(middle**2 * count for middle, count in pairs),
                bucket_limits=list(edges[1:]),
                bucket_counts=list(counts),
                global_step=step,
            )

    def levels(self, tag: str, row: HealthRow, step: int) -> None:
        """Draw a quantizer's inputs and levels as a picture."""
        if self._writer is not None:
            from matplotlib.backends.backend_agg import FigureCanvasAgg

            canvas = FigureCanvasAgg(draw_levels(row, step))
            canvas.draw()
            pixels = np.asarray(canvas.buffer_rgba())[..., :3]
            self._writer.add_image(tag, pixels, step, dataformats="HWC")

    def images(self, tag: str, images: Tensor, step: int) -> None:
        """Write images, float [N, 3, S, S] in [0, 1], side by side."""
        if self._writer is not None:
            self._writer.add_images(tag, images.detach().float().clamp(0, 1).cpu(), step)

    def outcome(self, options: Mapping[str, object], metrics: Mapping[str, float], step: int) -> None:
        """Write the run's options with their results, for the page HPARAMS.

        Args:
            options: numbers, texts and truth values stay; others become text.
            metrics: finite numbers; their names become curves, so they must differ from those of `scalars`.
            step: of the metrics' points.
        """
        if self._writer is None:
            return
        from torch.utils.tensorboard.summary import hparams

        plain = {
            name: value if isinstance(value, bool | int | float | str) else str(value)
            for name, value in options.items()
        }
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        # Not `add_hparams`, which writes into a folder of its own that TensorBoard would list as another run.
        file = self._writer.file_writer
        assert file is not None  # it is until `close`
        for summary in hparams(plain, finite):
            file.add_summary(summary)
        self.scalars(finite, step)

    def flush(self) -> None:
        """Write buffered events."""
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Write buffered events and close the event file."""
        if self._writer is not None:
            self._writer.close()


def draw_levels(row: HealthRow, epoch: int) -> Figure:
    """Draw the histogram of a quantizer's inputs with a line at each level (at the ends only, where there are many)."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    figure = Figure(figsize=(5.2, 2.6), dpi=80)
    axes = figure.add_axes((0.18, 0.12, 0.79, 0.76))  # a computed layout would take longer than the drawing
    edges, counts = row.histogram.edges, row.histogram.counts
    total = max(sum(counts), 1)
    axes.stairs([count / total for count in counts], edges, fill=True, color=BLUE, alpha=0.7)
    for position in row.positions:
        axes.axvline(position, color=ORANGE, linewidth=1)
    axes.set_yscale("log")  # a ReLU's zeros would leave nothing to see of the others
    # Small ticks, powers as formulas and a title that makes room for ticks take most of the time.
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_title(f"{row.name}, epoch {epoch}: {row.levels} levels", fontsize=9, parse_math=False, y=1.0)
    axes.set_ylabel("share")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _writer(folder: Path, purge_step: int | None) -> SummaryWriter:
    """Open TensorBoard's writer."""
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError as error:
        raise UserError("--tensorboard needs the package tensorboard: pip install tensorboard") from error
    try:
        return SummaryWriter(folder, purge_step=purge_step)
    except OSError as error:
        raise UserError(
            f"cannot write TensorBoard's files to {folder} ({error.strerror}): choose another --log_dir"
        ) from error
