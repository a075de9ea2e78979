"""Writes the state of the quantizers and TensorBoard's files for each epoch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from logging import Logger
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from model.convert import full_precision
from model.watch import health
from model.watch.health import Health
from utils.config.schema import Config
from utils.report import quantizer_record
from utils.report.epoch_files import RecordsFile
from utils.report.run_report import hyperparameters
from utils.report.tensorboard import Board, metric_tag, quantizer_tag
from utils.report.tracking import Tracking

SHOWN_IMAGES = 32


class Recorder:
    """Writes `quantizers.jsonl`, and with `--tensorboard` its event files.

    Args:
        folder: the run's, `exp/CASE`.
        model: the network.
        config: the run's configuration.
        done: epochs that the run has done; records of later ones are dropped.
        position: images of the next epoch already seen.
        tracking: gets the metrics and the outcome, too.

    Raises:
        UserError: TensorBoard is not installed, a folder cannot be written, a file is damaged.
    """

    def __init__(
        self, folder: Path, model: nn.Module, config: Config, done: int, position: int = 0,
        tracking: Tracking | None = None,
    ) -> None:  # fmt: skip
        self._tracking = tracking
        self.board = Board(folder / "tensorboard" if config.run.tensorboard else None, purge_step=done + 1)
        self._file = RecordsFile(folder / "quantizers.jsonl")
        self._file.truncate_after(done + 1)
        self._model, self._config = model, config
        self._health = Health(model, epoch_begins=position == 0)
        self._images: Tensor | None = None
        self._last = config.schedule.all_epochs

    def show(self, images: Tensor, mean: tuple[float, ...], std: tuple[float, ...], epoch: int) -> None:
        """Write training images [N, 3, S, S] as the network gets them, and with the normalisation undone."""
        images = images[:SHOWN_IMAGES].float()
        low, high = images.amin(), images.amax()
        self.board.images("training images/as given", (images - low) / (high - low).clamp_min(1e-12), epoch)
        shape = (1, len(mean), 1, 1)
        plain = images * images.new_tensor(std).view(shape) + images.new_tensor(mean).view(shape)
        self.board.images("training images/denormalised", plain, epoch)

    def epoch(self, row: Mapping[str, float], images: Callable[[], Tensor], logger: Logger) -> None:
        """Write the records of an epoch.

        Args:
            row: the epoch's metrics.
            images: gives a batch of real images [N, 3, S, S]; called once, so that all epochs measure the same ones.
            logger: gets the table of quantizers, for `--verbose`.
        """
        epoch = int(row["epoch"])
        if self._tracking is not None:
            self._tracking.epoch(row)
        curves = {
            metric_tag(name): value for name, value in row.items() if name != "epoch" and math.isfinite(value)
        }
        self.board.scalars(curves, epoch)  # an epoch without an optimizer step has no learning rate
        if self.board.writes:
            for name in full_precision(self._model):
                weight = getattr(self._model.get_submodule(name), "weight", None)  # attention has none
                if isinstance(weight, Tensor):
                    self.board.histogram(f"weights/{name}", weight, epoch)
        if self._health.layers:
            self._quantizers(epoch, images, logger)
        self.board.flush()  # buffered events would be lost with a killed run

    def _quantizers(self, epoch: int, images: Callable[[], Tensor], logger: Logger) -> None:
        if self._images is None:
            self._images = images()[: health.IMAGES].clone()  # a copy, which does not keep the whole batch
        rows = self._health.report(self._images)
        self._file.append({"epoch": epoch, "quantizers": [each.record() for each in rows]})
        logger.debug("%s", quantizer_record.health_table(rows))
        drawn = epoch in (1, self._last // 2, self._last)  # a picture takes longer than everything else
        for each in rows:
            tag = partial(quantizer_tag, each)
            self.board.scalars({tag(what): value for what, value in each.scalars().items()}, epoch)
            self.board.counts(tag("inputs"), each.histogram, epoch)
            if drawn:
                self.board.levels(tag("levels"), each, epoch)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the run's options beside its outcome, and end the event file."""
        metrics = {
            f"outcome/{name}": float(summary[name])
            for name in ("last_top1", "best_top1", "weight_bytes", "bit_operations")
            if summary[name] is not None
        }
        self.board.outcome(hyperparameters(self._config), metrics, self._last)
        self.board.close()
        if self._tracking is not None:
            self._tracking.finish(self._config, summary)
