"""Checks of options that need network and data: batches of one image, and warm-ups."""

from __future__ import annotations

import dataclasses

from torch import nn

from model.layers.quantized import quantizers
from utils.config.schema import Config
from utils.errors import UserError
from utils.step.schedule import Schedule


def check_batches(config: Config, samples: int) -> None:
    """Raise `UserError` when a process would train on batches of one image.

    Args:
        config: the run's.
        samples: number of training images.
    """
    world = config.data.world_size
    if samples // world < 2 and not config.run.evaluate:
        raise UserError(
            f"{samples} training images for {world} processes: batch statistics need at least 2 images for each"
            if world > 1
            else f"{samples} training image: batch statistics need at least 2"
        )


def fit_warmups(
    model: nn.Module, config: Config, batches: int, rates: Schedule
) -> tuple[Schedule, tuple[str, ...]]:
    """Fit warm-ups into the run; returns the schedule and warnings.

    A warm-up that the run never leaves is a mistake. But where the command line has shortened the run of a config,
    its warm-ups shrink to half of the short run.
    """
    total = config.schedule.all_epochs * batches
    longest = max((quantizer.stable for _, quantizer in quantizers(model)), default=0)
    skips = rates.skip_update(rates.total_steps - 1)
    warnings: list[str] = []
    if config.run.evaluate:
        return rates, ()
    if longest >= total:
        if not config.run.shortened:
            raise UserError(
                f"--stable: a warm-up of {longest} iterations is the whole run of {total}; shorten it"
            )
        warnings.append(f"--stable: the shortened run of {total} iterations takes {total // 2} of {longest}")
        for _, quantizer in quantizers(model):
            quantizer.stable = total // 2
    if skips:
        steps = rates.total_steps
        if not config.run.shortened:
            raise UserError(f"--warmup: no iteration of {steps} is left for the optimizer; shorten it")
        warnings.append(f"--warmup: the shortened run of {steps} iterations takes {steps // 2}")
        rates = dataclasses.replace(
            rates, config=dataclasses.replace(rates.config, warmup=steps // 2, warmup_epoch=0)
        )
    wakeup, steps = rates.wakeup_steps, config.schedule.epochs * rates.steps_per_epoch
    by_epochs = config.schedule.wakeup_epoch * rates.steps_per_epoch >= config.schedule.wakeup
    option = "wakeup_epoch" if by_epochs else "wakeup"
    if wakeup > steps:
        if not config.run.shortened:
            raise UserError(
                f"--{option}: a learning-rate warm-up of {wakeup} iterations does not end within the {steps} "
                "of --epochs; shorten it"
            )
        warnings.append(f"--{option}: the shortened run of {steps} iterations takes {steps // 2} of {wakeup}")
        schedule = dataclasses.replace(rates.config, wakeup=steps // 2, wakeup_epoch=0)
        rates = dataclasses.replace(rates, config=schedule)
    return rates, tuple(warnings)
