"""Runs a network once before training: does the image size suit it, and do its signs carry information?"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn

from model.layers import batch_statistics
from model.layers.quantized import quantized_layers
from model.networks import build
from model.observe import observing
from model.quantizers.frame import Quantizer
from model.watch.cost import network_cost, one_of_a_kind
from utils.config.image_size import sides, size_text
from utils.config.methods import PROJECT
from utils.config.schema import Config
from utils.errors import UserError
from utils.report.cost_record import Cost


def constant_signs(model: nn.Module, config: Config) -> tuple[str, ...]:
    """Warn when inputs of binary layers never go below zero, as behind a ReLU: all signs are +1.

    Two images of noise show it, since norms with batch statistics centre them as in training.
    """
    taken = {
        name: layer.quant_activation
        for name, layer in quantized_layers(model)
        if isinstance(layer.quant_activation, Quantizer) and layer.quant_activation.output_is_sign()
    }
    if not taken:
        return ()
    lowest: dict[str, float] = {}

    def watch(name: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        lowest[name] = min(float(inputs[0].min()), lowest.get(name, math.inf))

    size = sides(config.model.input_size)
    parameter = next(model.parameters())
    noise = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0)).to(parameter)
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


def run_once(model: nn.Module, config: Config) -> Cost:
    """Run the network once to count its cost, which also shows that the image size suits it."""
    try:
        return network_cost(model, config.model.input_size)
    except (RuntimeError, ValueError) as error:  # torch's errors for shapes that do not fit
        quant = config.model.quant
        methods = {part.method for part in (quant.fm, quant.wt, quant.ot) if part.enable}
        size = size_text(config.model.input_size)
        own = config.model.name not in build.PROJECT and ":" not in config.model.name
        if own or methods - PROJECT:
            raise UserError(
                f"--model {config.model.name}: an image of {size} pixels could not be run through "
                f"it, through the network's or the method's own fault or because of --input_size ({error})"
            ) from error
        raise UserError(
            f"--input_size {size}: {config.model.name} cannot take images of this size "
            f"({error}); use a multiple of 32, or of 4 for the networks of three stages"
        ) from error
