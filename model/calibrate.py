"""Initialise quantizer parameters from loaded weights and real images (`--re_init`)."""

from __future__ import annotations

import math
from fractions import Fraction
from functools import partial

import torch
from torch import Tensor, nn

from model.layers import batch_statistics
from model.layers.quantized import quantized_layers
from model.observe import observing
from model.quantizers.frame import Quantizer
from model.quantizers.grid import Grid
from utils.config.schema import QuantConfig

DEFAULT = QuantConfig()
CANDIDATES = 100  # clip values that the search for the least squared error tries ...
ELEMENTS = 2**20  # ... on about so many elements of a tensor


def initialise_ranges(model: nn.Module, images: Tensor, config: QuantConfig = DEFAULT) -> int:
    """Initialise every quantizer from what it will quantize; returns how many of them learn a range.

    Weights are taken as they are; activations and outputs are those of one pass of `images`
    [N, 3, S, S], in the order they are reached, so that each sees its predecessors quantized (unless a
    warm-up, `--stable`, lets them pass). Batch norms normalise by this batch, as they will in training:
    running statistics of a full-precision network do not fit quantized weights of another scale, and
    ranges found behind them can be wrong by orders of magnitude. The network's modes are restored and
    its norms keep their statistics.

    Clip values are found as `config.re_init_range` says, per group: "paper" by the method's own formula, "mse" as
    the one of 100 fractions of max |x| whose levels have the least squared error, "percentile" as the
    `config.re_init_percentile` of |x|. Quantizers without a clip value have only their own way.
    """
    count = 0
    with observing(model) as hooks:
        for _, layer in quantized_layers(model):
            for part, quantizer in layer.quantizers():
                own = type(quantizer).initialise_from is not Quantizer.initialise_from
                count += own or _searched(quantizer, config) is not None
                if part == "quant_weight":
                    _initialise(quantizer, layer.weight, config)
                else:
                    hooks.append(quantizer.register_forward_pre_hook(partial(_from_inputs, config=config)))
        with batch_statistics.of_the_batch(model):
            model(images)
    return count


def _from_inputs(module: Quantizer, inputs: tuple[Tensor, ...], *, config: QuantConfig) -> None:
    _initialise(module, inputs[0], config)


def _searched(quantizer: Quantizer, config: QuantConfig) -> Grid | None:
    """The levels whose clip value is searched for; None where that is left to the method's own formula."""
    return None if config.re_init_range == "paper" else quantizer.search_grid()


def _initialise(quantizer: Quantizer, x: Tensor, config: QuantConfig) -> None:
    """Initialise one quantizer from what it will quantize; a group of zeros keeps its clip value."""
    grid = _searched(quantizer, config)
    if grid is None:
        quantizer.initialise_from(x)
        return
    with torch.no_grad():
        rows = quantizer.grouped(quantizer.normalise(x.float()))
        if config.re_init_range == "mse":
            found = least_error_clip(rows, grid, quantizer)
        else:
            found = quantizer.mean_over_ranks(percentile_clip(rows, config.re_init_percentile))
        found = found.reshape(quantizer.range_shape())
        quantizer.set_range(torch.where(found > 0, found, quantizer.current_range()))


def least_error_clip(rows: Tensor, grid: Grid, quantizer: Quantizer) -> Tensor:
    """The clip value of each row with the least sum of (q(x) - x)^2, of `CANDIDATES` fractions of max |x|.

    Args:
        rows: float32 [groups, elements]; of many elements every k-th is looked at.
        grid: the levels.
        quantizer: sums the errors of all ranks.

    Returns:
        float32 [groups]; 0 for a row of zeros.
    """
    rows = rows[:, :: rows.numel() // ELEMENTS | 1]  # odd, so that it does not keep to columns of an image
    maximum = torch.distributed.ReduceOp.MAX
    largest = quantizer.over_ranks(rows.abs().amax(dim=1, keepdim=True), maximum)
    best, least = torch.zeros_like(largest), torch.full_like(largest, math.inf)
    for number in range(1, CANDIDATES + 1):
        clip = (largest * (number / CANDIDATES)).clamp_min(torch.finfo(torch.float32).tiny)
        levels = grid.ratios(grid.numbers(rows / clip)) * clip
        error = (levels - rows).square().sum(dim=1, keepdim=True)
        error = quantizer.over_ranks(error, torch.distributed.ReduceOp.SUM)
        best, least = torch.where(error < least, clip, best), torch.minimum(error, least)
    return torch.where(largest > 0, best, 0.0).squeeze(1)


def percentile_clip(rows: Tensor, percent: float) -> Tensor:
    """The smallest value of each row that at least `percent` of its |x| do not exceed; float32 [groups]."""
    # Exact, since a rounded product may go up by one.
    rank = math.ceil(Fraction(str(percent)) * rows.shape[1] / 100)
    return rows.abs().kthvalue(max(1, rank), dim=1).values
