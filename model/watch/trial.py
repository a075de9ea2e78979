"""Runs a network before training: does the image size suit it, and do the inputs suit the levels of its quantizers?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from model.layers import batch_statistics
from model.layers.quantized import quantized_layers
from model.networks import build
from model.observe import first_input, observing
from model.quantizers.frame import Quantizer
from model.watch.cost import network_cost, one_of_a_kind
from model.watch.cut_off import cut_off, holds_images, starts_at_zero
from utils.config.image_size import sides, size_text
from utils.config.methods import PROJECT, methods_with_offset, record_of
from utils.config.schema import Config, QuantConfig
from utils.errors import UserError
from utils.report.audit_record import MOST_CUT_OFF
from utils.report.cost_record import Cost
from utils.text import printable, some_names

FEW_LEVELS = 4  # of which signed ones have two on each side of zero, too few for most inputs: docs/results.md


@dataclass
class _Input:
    """What the calls of a layer with an activation quantizer showed of its input.

    Attributes:
        quantizer: the quantizer.
        images: the input has the values of the images, and no others.
        sign: its output says the sign alone.
        lowest: the least value that such a one got, above its threshold.
        below: the greatest share below the range of the levels.
        above: likewise, above it.
    """

    quantizer: Quantizer
    images: bool = False
    sign: bool = False
    lowest: float = math.inf
    below: float = 0.0
    above: float = 0.0

    @property
    def unsigned(self) -> bool:
        """Whether its levels start at zero."""
        return starts_at_zero(self.quantizer)


def unsuitable_inputs(
    model: nn.Module, images: Tensor, config: Config, real: Callable[[], Tensor | None], *, ranges: bool
) -> tuple[tuple[str, ...], str]:
    """Look for inputs that do not suit the levels of their quantizers, in one pass of images.

    Inputs of binary layers that never go below zero, as behind a ReLU, have the sign +1 everywhere. Levels that start
    at zero cut off inputs below it. Both are warned of: training cannot mend them. Inputs beyond a clip value are
    noted, since most methods learn theirs. Norms with batch statistics centre the images as in training.

    Args:
        model: the network; it is left as it was.
        images: at least two, float32 [N, 3, H, W], normalised; noise will do.
        config: the run's configuration.
        real: gives normalised images of the data set, at least two, which then tell; None where there are no others.
            Called only where levels that start at zero cut off a part of `images`.
        ranges: the clip values are those that training starts from; without it nothing is noted of them.

    Returns:
        Warnings, and the note about clip values, which is empty where they suit.
    """
    seen = _watched(model, images)
    cuts_off = any(each.unsigned and each.below > 0 for each in seen.values())
    if cuts_off and (found := real()) is not None:
        seen = _watched(model, found)
    signs = {name: each for name, each in seen.items() if each.sign}
    constant = [name for name, each in signs.items() if each.lowest >= 0]
    cut = {name: each for name, each in seen.items() if each.below + each.above > MOST_CUT_OFF}
    below = {name: each for name, each in cut.items() if each.unsigned and each.below > MOST_CUT_OFF}
    first = {name: each for name, each in below.items() if each.images}
    inner = {name: each for name, each in below.items() if name not in first}
    beyond = {name: each for name, each in cut.items() if name not in below and not each.quantizer.calibrates}
    warnings = []
    if constant:
        learned = any(True for _ in seen[constant[0]].quantizer.parameters())
        warnings.append(
            f"the inputs of {len(constant)} of {len(signs)} binary layers, the first is {constant[0]}, never go below "
            f"{'their thresholds' if learned else 'zero'}: their signs are all +1 and carry nothing; "
            f"{'give --re_init, or ' if learned else ''}choose an activation that does (the keyword "
            f"{'RPReLU' if learned else 'NReLU or PReLU'}, where a network knows it) or another method for them"
        )
    for name, each in first.items():
        known = config.model.name in build.PROJECT and config.model.quant.first_last
        option = (
            "--first_bit 8, or --fm_first_signed for the bits of the others" if known else "--fm_half_range"
        )
        warnings.append(
            f"{name} reads the images with levels that start at zero: {100 * each.below:.0f} % of their values are "
            f"below zero and are cut off; give {option} (signed levels)"
        )
    offset = [name for name, each in inner.items() if record_of(each.quantizer.config.method, "fm").offset]
    if offset and not config.model.quant.re_init:  # which has found it, or will when the training begins
        warnings.append(
            f"the levels of {len(offset)} of {len(seen)} activation quantizers start at zero, and inputs below it are "
            f"cut off until the offset is learned; give --re_init, which finds it"
        )
    inner = {name: each for name, each in inner.items() if name not in offset}
    if inner:
        some = any(each.quantizer.half_range_changes() for each in inner.values()) and len(inner) < len(seen)
        policy = (
            ", or for these layers alone a policy with half_range: false (docs/policies.md)" if some else ""
        )
        signed = f"--fm_half_range (signed levels){policy}"
        learned = f"the keyword {' or '.join(methods_with_offset())}, which learns the lowest level"
        few = any(each.quantizer.levels <= FEW_LEVELS for each in inner.values())
        instead = f"{learned}, or with more than 2 bits {signed}" if few else f"{signed}, or {learned}"
        warnings.append(
            f"the levels of {len(inner)} of {len(seen)} activation quantizers start at zero, and inputs below it are "
            f"cut off, {_shares(inner, [each.below for each in inner.values()], config)}; give {instead}"
        )
    note = ""
    if beyond and ranges:
        note = (
            f"{len(beyond)} of {len(seen)} activation quantizers start with a range that cuts off "
            f"{_shares(beyond, [each.below + each.above for each in beyond.values()], config)}"
            f"{_wider(config.model.quant)}"
        )
    return tuple(warnings), note


def _watched(model: nn.Module, images: Tensor) -> dict[str, _Input]:
    """The inputs of the layers with an activation quantizer that is on, in the order of their calls."""
    seen: dict[str, _Input] = {}

    def watch(name: str, quantizer: Quantizer, _: nn.Module, inputs: tuple[Any, ...], named: Any) -> None:
        x = first_input(inputs, named)
        if not x.numel():
            return
        each = seen.setdefault(name, _Input(quantizer))
        each.images = holds_images(x, images)
        threshold = quantizer.sign_threshold()
        if threshold is not None:
            each.sign = True
            each.lowest = min(float((quantizer.normalise(x.float()) - threshold).min()), each.lowest)
        found = cut_off(quantizer, x)
        if found is not None:
            below, above = found.tolist()
            each.below, each.above = max(below, each.below), max(above, each.above)

    layers = [  # (name, the module whose input it is, quantizer)
        (name, layer, quantizer) if part == "quant_activation" else (f"{name}.{part}", quantizer, quantizer)
        for name, layer in quantized_layers(model)
        for part, quantizer in layer.quantizers()
        if quantizer.config.tag == "fm" and quantizer.enabled
    ]
    if not layers:
        return seen
    with one_of_a_kind(model), observing(model) as hooks, batch_statistics.of_the_batch(model):
        hooks += [
            layer.register_forward_pre_hook(partial(watch, name, quantizer), with_kwargs=True)
            for name, layer, quantizer in layers
        ]
        model(images)
    return seen


def _shares(names: Iterable[str], shares: Sequence[float], config: Config) -> str:
    """The shares of their inputs that layers' quantizers cut off, and the layers' names, all of them with `verbose`."""
    said = ", ".join(map(printable, names)) if config.run.verbose else some_names(names)
    low, high = f"{100 * min(shares):.0f}", f"{100 * max(shares):.0f}"
    return f"{low if low == high else f'{low} to {high}'} % of their values ({said})"


def _wider(quant: QuantConfig) -> str:
    """The end of the note about narrow ranges: the options that the method has against them; empty without any."""
    record = record_of(quant.fm.method, "fm")
    options = []
    if not quant.re_init and record.reads_option("re_init"):
        options.append("--re_init")
    elif quant.re_init_range == "paper" and record.reads_option("re_init_range"):
        options.append("--re_init_range mse" if quant.re_init else "--re_init --re_init_range mse")
    if not quant.re_init and record.reads_option("boundary"):
        options.append("a larger --fm_boundary")
    return f"; {' or '.join(options)} would widen it" if options else ""


def noise_images(config: Config, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Two images of uniform noise, normalised: float32 [2, C, H, W]; the same in every process and run."""
    size = sides(config.model.input_size)
    noise = torch.rand(2, len(mean), *size, generator=torch.Generator().manual_seed(0))
    shape = (len(mean), 1, 1)
    return (noise - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)


def run_once(model: nn.Module, config: Config) -> Cost:
    """Run the network once to count its cost, which also shows that the image size suits it."""
    try:
        return network_cost(model, config.model.input_size, config.model.channels)
    except (RuntimeError, ValueError) as error:  # torch's errors for shapes that do not fit
        quant = config.model.quant
        methods = {part.method for part in (quant.fm, quant.wt, quant.ot) if part.enable}
        size = size_text(config.model.input_size)
        own = config.model.name not in build.PROJECT and ":" not in config.model.name
        if own or methods - PROJECT:
            grey = " or --channels 1" if config.model.channels == 1 else ""
            raise UserError(
                f"--model {config.model.name}: an image of {size} pixels could not be run through "
                f"it, through the network's or the method's own fault or because of --input_size{grey} ({error})"
            ) from error
        raise UserError(
            f"--input_size {size}: {config.model.name} cannot take images of this size "
            f"({error}); use a multiple of 32, or of 4 for the networks of three stages"
        ) from error
