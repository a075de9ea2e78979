"""What of the options shows only beside the network and the data: batches of one, warm-ups, the size of images."""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import torch
from torch import Tensor, nn

from model import batch_statistics
from model.observe import observing
from model.quant import quantized_layers, quantizers
from model.summary import Cost, cost, one_of_a_kind
from model.xnor import XNORActivation
from utils.config import Config
from utils.errors import UserError
from utils.schedule import Schedule


def batches(config: Config, samples: int) -> None:
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


def warmups(
    model: nn.Module, config: Config, batches: int, rates: Schedule
) -> tuple[Schedule, tuple[str, ...]]:
    """The schedule with warm-ups that fit into the run, and warnings.

    A warm-up that the run never leaves is a mistake. Where the command line has shortened the run of a
    config, whose warm-ups are for the long one, they shrink to half of what there is.
    """
    total = (config.schedule.epochs + config.schedule.extra_epoch) * batches
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
    return rates, tuple(warnings)


def signs(model: nn.Module, config: Config) -> tuple[str, ...]:
    """A warning when signs are taken of what never goes below zero, as behind a ReLU: all of them are +1.

    Found with two images of noise, which norms that follow a batch centre as they will in training.
    """
    taken = {
        name: layer.quant_activation
        for name, layer in quantized_layers(model)
        if isinstance(layer.quant_activation, XNORActivation)
        and layer.quant_activation.config.adaptive in ("none", "var")  # the other ways subtract a mean
    }
    if not taken:
        return ()
    lowest: dict[str, float] = {}

    def watch(name: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        lowest[name] = min(float(inputs[0].min()), lowest.get(name, math.inf))

    size = config.model.input_size
    parameter = next(model.parameters())
    noise = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)).to(parameter)
    with one_of_a_kind(model), observing(model) as hooks, batch_statistics.of_the_batch(model):
        hooks += [
            quantizer.register_forward_pre_hook(partial(watch, name)) for name, quantizer in taken.items()
        ]
        model(noise)
    constant = [name for name, value in lowest.items() if value >= 0]
    if not constant:
        return ()
    return (
        f"the inputs of {len(constant)} of {len(lowest)} binary layers, the first is {constant[0]}, never go below "
        "zero: their signs are all +1 and carry nothing; choose an activation that does (the keyword NReLU or PReLU, "
        "where a network knows it) or another method for them",
    )


def trial(model: nn.Module, config: Config) -> Cost:
    """What the network costs, found by running it once, which shows that the image size suits it."""
    try:
        return cost(model, config.model.input_size)
    except (RuntimeError, ValueError) as error:  # how torch says that shapes do not fit
        raise UserError(
            f"--input_size {config.model.input_size}: {config.model.name} cannot take images of this size "
            f"({error}); use a multiple of 32, or of 4 for the networks of three stages"
        ) from error
