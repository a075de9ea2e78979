"""What a run tells: log, meters, files of an epoch's figures and the picture of the curves."""

from __future__ import annotations

import csv
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from utils.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from utils.schedule import Schedule

T = TypeVar("T")

_LOGGER = logging.getLogger("train")

_BLUE, _ORANGE, _GREEN = "#0072b2", "#d55e00", "#009e73"  # told apart by colour-blind eyes too


class _Console(logging.Handler):
    """Write messages to standard output, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "to_file_only", False):  # how a run ends is said on standard error
            return
        encoding = sys.stdout.encoding or "utf-8"
        tqdm.write(self.format(record).encode(encoding, "backslashreplace").decode(encoding))
        sys.stdout.flush()


class _File(logging.FileHandler):
    """Append messages to a file; one that cannot be written ends the run instead of being lost."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exception()
        if isinstance(error, OSError):
            raise OSError(error.errno, f"{error.strerror}: {self.baseFilename}") from error
        super().handleError(record)


def silent(rank: int) -> logging.Logger:
    """The logger `train` of process `rank`, not the first one of its run.

    What all would say is left to the first one. Shown is what this one alone knows: records with `of_each_process`.
    """
    close()
    console = _Console()
    console.setFormatter(logging.Formatter(f"process {rank}: %(message)s"))
    console.addFilter(lambda record: getattr(record, "of_each_process", False))
    _LOGGER.addHandler(console)
    _LOGGER.setLevel(logging.WARNING)
    _LOGGER.propagate = False
    return _LOGGER


def setup(log_file: Path | None, verbose: bool) -> logging.Logger:
    """Direct the logger `train` to standard output and, with times, to the end of a file.

    A second call replaces what the first one set up.

    Args:
        log_file: the file to append to, its folder made when missing; None for no file.
        verbose: show debug messages too.

    Raises:
        UserError: the file cannot be written.
    """
    close()
    handlers: list[logging.Handler] = [_Console()]
    if log_file is not None:
        try:
            log_file.parent.mkdir(parents=True, exist_ok=True)
            file_handler = _File(log_file, encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise UserError(
                f"cannot write the log {log_file} ({error.strerror}): choose another folder with --log_dir"
            ) from error
        file_handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        handlers.append(file_handler)
    for handler in handlers:
        _LOGGER.addHandler(handler)
    _LOGGER.setLevel(logging.DEBUG if verbose else logging.INFO)
    _LOGGER.propagate = False  # a handler of the root logger would say everything twice
    return _LOGGER


def close() -> None:
    """Detach and close what `setup` attached; nothing happens without it."""
    for handler in list(_LOGGER.handlers):
        _LOGGER.removeHandler(handler)
        handler.close()
    _LOGGER.propagate = True


class Totals:
    """Sums over the images of a pass, kept on the device, so that no host waits for it.

    Counts are exact and the loss is summed in float64, so that the sums of several processes, or of a pass
    that was interrupted, are those of one.

    Attributes:
        sums: float64 [4]: loss, images whose class is the best, is among the best 5, and all images.
    """

    EMPTY = (0.0, 0.0, 0.0, 0.0)

    def __init__(self, device: torch.device | str = "cpu", start: Sequence[float] = EMPTY) -> None:
        self.sums = torch.tensor(start, dtype=torch.float64, device=device)

    def update(self, loss: Tensor, output: Tensor, target: Tensor) -> None:
        """Add a batch.

        Args:
            loss: mean over the batch, [].
            output: scores, float [N, C].
            target: classes, int64 [N].
        """
        count = len(target)
        hits = [hit.double() for hit in top_k(output.detach(), target)]
        total = loss.detach().double() * count
        self.sums += torch.stack([total, *hits, torch.full_like(total, count)])

    @property
    def values(self) -> tuple[float, ...]:
        """The sums as numbers. Waits for the device."""
        return tuple(self.sums.tolist())

    @staticmethod
    def means(sums: Tensor) -> dict[str, float]:
        """`loss`, and `top1` and `top5` in percent, of such sums; NaN without an image. Waits for the device."""
        loss, hits1, hits5, images = sums.tolist()
        if not images:
            return dict.fromkeys(("loss", "top1", "top5"), math.nan)
        return {"loss": loss / images, "top1": 100 * hits1 / images, "top5": 100 * hits5 / images}


def top_k(output: Tensor, target: Tensor, ks: Sequence[int] = (1, 5)) -> tuple[Tensor, ...]:
    """Count the images whose class is among the k highest scores.

    Args:
        output: scores, float [N, C].
        target: classes, int64 [N]; or shares of the classes, float [N, C], whose largest one counts.
        ks: the numbers of scores to look at; one above C looks at all.

    Returns:
        One 0-d int64 tensor per k, on the device of `output`.
    """
    classes = output.shape[1]
    if target.ndim == 2:
        target = target.argmax(1)
    best = output.topk(min(max(ks), classes), dim=1).indices
    hits = best == target.unsqueeze(1)
    return tuple(hits[:, :k].sum() for k in ks)


class Waiting(Generic[T]):
    """An iterable that measures how long its user waits for the next item.

    Args:
        items: what is iterated over.
        clock: the time in seconds.

    Attributes:
        seconds: the waiting so far.
    """

    def __init__(self, items: Iterable[T], clock: Callable[[], float] = time.perf_counter) -> None:
        self._items = items
        self._clock = clock
        self.seconds = 0.0

    def __iter__(self) -> Iterator[T]:
        started = self._clock()
        for item in self._items:
            self.seconds += self._clock() - started
            yield item
            started = self._clock()


class MetricsFile:
    """A CSV file with one row of numbers per epoch.

    Args:
        path: the file; its folder is made when missing, the file with the first row.
        fields: the columns; `epoch` is one of them.
    """

    def __init__(self, path: Path, fields: Sequence[str]) -> None:
        self.path = path
        self.fields = tuple(fields)

    def append(self, row: Mapping[str, float]) -> None:
        """Add a row; the header comes first in a new file.

        Args:
            row: a number for each field; a missing one is written as `nan`, one that is no field is a
                ValueError.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.fields, restval=math.nan, lineterminator="\n")
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(row)
            file.flush()
            os.fsync(file.fileno())  # a checkpoint that knows of the row must not outlive it

    def truncate_after(self, epoch: int) -> None:
        """Drop the rows from `epoch` on, so that training can go on (or, with 0, start) with that epoch.

        Rows before it stay as they are, byte by byte; a line that a killed run left unfinished goes.
        The file is replaced in one move. Nothing happens when it does not exist.

        Raises:
            UserError: the file has other columns or is not a metrics file.
        """
        if not self.path.exists():
            return
        header = ",".join(self.fields) + "\n"
        kept = [header]
        if epoch > 0:
            found, *lines = _lines(self.path) or [header]
            if found != header:
                raise UserError(f"{self.path} has other columns than this run writes: move it away")
            column = self.fields.index("epoch")
            kept += [line for line in lines if _numbers(self.path, line, self.fields)[column] < epoch]
        _replace(self.path, kept)

    @staticmethod
    def read(path: Path) -> list[dict[str, float]]:
        """Read the finished rows of a metrics file, in order.

        Raises:
            UserError: the file does not exist or is not a metrics file.
        """
        found, *lines = _lines(path) or [""]
        fields = found.rstrip("\n").split(",")
        return [dict(zip(fields, _numbers(path, line, fields), strict=True)) for line in lines]


class RecordsFile:
    """A file with one JSON object per epoch and line; the key `epoch` is one of the object's.

    Args:
        path: the file; its folder is made when missing, the file with the first record.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a record; a number in it that is not finite is a ValueError, JSON has none."""
        line = json.dumps(record, allow_nan=False, separators=(",", ":"))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")
            file.flush()
            os.fsync(file.fileno())

    def truncate_after(self, epoch: int) -> None:
        """Drop the records from `epoch` on; as `MetricsFile.truncate_after`."""
        if self.path.exists():
            kept = [] if epoch == 0 else [line for line in _lines(self.path) if self._epoch(line) < epoch]
            _replace(self.path, kept)

    def _epoch(self, line: str) -> int:
        return _record(self.path, line)["epoch"]

    @staticmethod
    def read(path: Path) -> list[dict[str, Any]]:
        """Read the finished records, in order.

        Raises:
            UserError: the file does not exist or holds something else.
        """
        return [_record(path, line) for line in _lines(path)]


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
    _draw_line(loss, rows, "train_loss", "training", _BLUE)
    _draw_line(loss, rows, "val_loss", "validation", _ORANGE)
    _draw_line(top1, rows, "train_top1", "training", _BLUE)
    best = max(_points(rows, "val_top1"), key=lambda point: point[1], default=None)
    best_label = "validation" if best is None else f"validation, best {best[1]:.2f} in epoch {best[0]:g}"
    _draw_line(top1, rows, "val_top1", best_label, _ORANGE)
    _draw_line(rate, rows, "lr", "learning rate", _GREEN)
    rates = [value for _, value in _points(rows, "lr")]
    if rates and 0 < 10 * min(rates) < max(rates):
        rate.set_yscale("log")
    for axes in (loss, top1):
        if axes.lines:
            axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def draw_schedule(rates: Schedule, path: Path, title: str) -> None:
    """Draw the learning rate of every step of a run into a picture; the name's ending says the format."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    steps = range(rates.total_steps)
    axes.plot(
        [step / rates.steps_per_epoch for step in steps], [rates.at(step) for step in steps],
        color=_GREEN, linewidth=1.6, drawstyle="steps-post",
    )  # fmt: skip
    axes.set_title(title, fontsize=13, fontweight="bold", parse_math=False)
    axes.set_xlabel("epoch")
    axes.set_ylabel("learning rate")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _lines(path: Path) -> list[str]:
    """Read the lines that were written to their end."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror})") from error
    return [line for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _replace(path: Path, lines: Iterable[str]) -> None:
    """Write a file anew, in one move."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _record(path: Path, line: str) -> dict[str, Any]:
    """Read a line of a file of records."""
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict) or not isinstance(record.get("epoch"), int):
        raise UserError(f"{path} is damaged: its line '{line.strip()[:40]}' is not the record of an epoch")
    return record


def _numbers(path: Path, line: str, fields: Sequence[str]) -> list[float]:
    """Read the numbers of a row, one per field."""
    try:
        numbers = [float(text) for text in line.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != len(fields):
        raise UserError(
            f"{path} is not a metrics file: its row '{line.strip()}' has not {len(fields)} numbers"
        )
    return numbers


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
