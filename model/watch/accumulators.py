"""The bits of the integer accumulators of quantized layers, in the worst case and on real images."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from model.layers.convolution import QuantConvolution
from model.layers.quantized import QuantLayer, QuantLinear, quantized_layers
from model.observe import first_input
from model.quantizers.frame import Quantizer
from utils.report.accumulator_record import Accumulator

EXACT = 2**24  # float32 holds all integers up to it


def accumulators(model: nn.Module) -> tuple[Accumulator, ...]:
    """The sums of each layer that multiplies integers, in the worst case, with its weight as it is now.

    The greatest sum takes, for each product, the highest or the lowest code of the input, whichever is more:
    the sum of max(w a_low, w a_high). Codes count from the one of zero: where inputs have an offset, what is left of it
    is a part of the bias. Left out are layers whose weight or input is in full precision or has uneven
    levels, or whose input has a scale for each channel or place: no single integer sum is behind them.

    Example:
        >>> from torch import nn
        >>> from model.convert import quantize
        >>> from model.quant import QuantConfig, QuantizerConfig
        >>> from model.watch.accumulators import accumulators
        >>> network = nn.Sequential(nn.Linear(10, 2))
        >>> parts = {"wt": QuantizerConfig(tag="wt", enable=True, method="lsq", levels=2)}
        >>> parts["fm"] = QuantizerConfig(tag="fm", enable=True, method="lsq", levels=4, half_range=True)
        >>> _ = nn.init.ones_(network[0].weight)
        >>> _ = quantize(network, QuantConfig(**parts, first_last=True))
        >>> [(row.products, row.lowest, row.highest, row.bits) for row in accumulators(network)]
        [(10, 0, 30, 6)]
    """
    found = (worst_case(name, layer) for name, layer in quantized_layers(model))
    return tuple(row for row in found if row is not None)


def worst_case(name: str, layer: QuantLayer) -> Accumulator | None:
    """The sums of one layer; None where it does not add products of integers."""
    codes, entering = _weight_codes(layer), _input_codes(layer)
    return None if codes is None or entering is None else _sums_of(name, codes, entering[0])


def _sums_of(name: str, codes: Tensor, ends: tuple[int, int]) -> Accumulator:
    rows = codes.flatten(1).to(torch.int64)
    above, below = rows.clamp(min=0).sum(1), rows.clamp(max=0).sum(1)
    lowest = int((above * ends[0] + below * ends[1]).min())
    highest = int((above * ends[1] + below * ends[0]).max())
    return Accumulator(name=name, products=rows.shape[1], lowest=lowest, highest=highest)


def _even(layer: QuantLayer, part: str, x: Tensor) -> Any:
    """The integers of a part of a layer; None where it has none of even levels at a finite distance."""
    quantizer = getattr(layer, part)
    if not isinstance(quantizer, Quantizer) or not quantizer.enabled:
        return None
    if type(quantizer).encode is Quantizer.encode:  # a user's own quantizer may know no integers
        return None
    found = quantizer.integers(x)
    parts = [found.scale, *([] if found.offset is None else [found.offset])]
    return None if any(part is None or not part.isfinite().all() for part in parts) else found


def _weight_codes(layer: QuantLayer) -> Tensor | None:
    """The integers of the weight, int32 [out, ...]."""
    if not isinstance(layer.quant_weight, Quantizer):  # a product of two activations has no weight at all
        return None
    found = _even(layer, "quant_weight", layer.full_weight().detach())
    return None if found is None else found.codes - found.zero_point


def _input_codes(layer: QuantLayer) -> tuple[tuple[int, int], int] | None:
    """The lowest and the highest integer of the input, and the code from which they count."""
    quantizer = layer.quant_activation
    if not isinstance(quantizer, Quantizer):
        return None
    shape = [2] + [1] * (quantizer.site.ndim - 1)
    shape[quantizer.site.channel_dim] = quantizer.site.channels
    found = _even(layer, "quant_activation", layer.weight.new_ones(shape))
    if found is None or found.scale.numel() > 1 or float(found.scale) <= 0:
        return None  # its layer is no sum of integers
    if found.offset is not None and found.offset.numel() > 1:
        return None
    zero, ends = found.code_of_zero, found.ends
    return (ends[0] + found.zero_point - zero, ends[1] + found.zero_point - zero), zero


class Sums:
    """Hooks before layers that note the integer sums of the images that pass.

    Attributes:
        rows: name of the layer -> its sums; of the layers that have run, as `accumulators`.
    """

    def __init__(self) -> None:
        self.rows: dict[str, Accumulator] = {}

    def __call__(self, name: str, layer: QuantLayer, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        """A hook before a layer, `with_kwargs`."""
        codes, entering, x = _weight_codes(layer), _input_codes(layer), first_input(inputs, named)
        if codes is None or entering is None:
            return
        ends, zero = entering
        row = self.rows.setdefault(name, _sums_of(name, codes, ends))
        own = type(layer).forward not in (
            QuantConvolution.forward,
            QuantLinear.forward,
        )  # may do more with the input
        if own or not x.numel() or (isinstance(layer, QuantConvolution) and x.ndim != layer.weight.ndim):
            return
        kind = torch.float32 if max(-row.lowest, row.highest) < EXACT else torch.float64

        def integers(value: Tensor) -> Tensor:
            found = layer.quant_activation.integers(value)  # pyright: ignore[reportCallIssue]
            return (found.codes - zero).to(kind)

        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            sums = layer.multiply(x, codes.to(kind), None, integers)
        seen = (int(sums.min()), int(sums.max()))
        if row.seen is not None:  # of another call
            seen = min(seen[0], row.seen[0]), max(seen[1], row.seen[1])
        self.rows[name] = dataclasses.replace(row, seen=seen)
