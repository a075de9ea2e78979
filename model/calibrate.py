"""Initialise quantizer parameters from loaded weights and real images (`--re_init`)."""

from __future__ import annotations

import math
from collections.abc import Container
from fractions import Fraction
from functools import partial

import torch
from torch import Tensor, nn

from model.layers import batch_statistics
from model.layers.quantized import check_one_copy, quantized_layers
from model.observe import observing
from model.quantizers.frame import Quantizer
from model.quantizers.grid import Grid
from utils.config.checks import shown, unlike
from utils.config.schema import QuantConfig

__all__ = ["initialise_range", "initialise_ranges", "least_error_clip", "percentile_clip"]

_DEFAULT = QuantConfig()
_CANDIDATES = 100  # clip values that the search for the least squared error tries ...
_ELEMENTS = 2**20  # ... on about so many elements of a tensor


def initialise_ranges(
    model: nn.Module, images: Tensor, config: QuantConfig = _DEFAULT, kept: Container[str] = ()
) -> int:
    """Initialise every quantizer from the weights and activations that it will quantize.

    Quantizers of weights are initialised first. Then one pass of `images` initialises those of activations and
    outputs in the order in which it reaches them, so that each sees its predecessors quantized (unless a warm-up,
    `stable`, lets values pass). Batch norms normalise by this batch, as they will in training: running statistics of
    a full-precision network do not fit quantized weights of another scale, and ranges found behind them can be wrong
    by orders of magnitude. The network keeps its modes, and its norms keep their statistics.

    `config.re_init_range` says how the clip value of each group is found. "paper": by the formula of the method.
    "mse": of 100 fractions of max |x|, the one whose levels have the least squared error. "percentile": the
    `config.re_init_percentile` of |x|. Quantizers without a clip value are initialised by their method in any case.

    Args:
        model: a quantized network; its quantizers change in place.
        images: one batch, floating point [N, 3, S, S], on the device of the network. Networks without convolutions
            take their own inputs [N, ...].
        config: only `re_init_range` and `re_init_percentile` are read.
        kept: names of quantizers that stay as they are (`--re_init_missing`).

    Returns:
        How many quantizers were initialised.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: `images` is not a batch, or is empty.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from model.calibrate import initialise_ranges
        >>> from model.convert import quantize
        >>> from model.quant import QuantConfig, QuantizerConfig
        >>> network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> fm = QuantizerConfig(tag="fm", enable=True, method="lsq", levels=4, half_range=True)
        >>> config = QuantConfig(fm=fm, first_last=True, re_init_range="percentile", re_init_percentile=75.0)
        >>> _ = quantize(network, config)
        >>> initialise_ranges(network, torch.tensor([[1.0, 2.0], [3.0, 100.0]]), config)
        2
        >>> network[0].quant_activation.current_range()  # the outlier is left out
        tensor([3.])
    """
    _check_arguments(model, images, config)
    count = 0
    with observing(model) as hooks:
        for name, layer in quantized_layers(model):
            for part, quantizer in layer.quantizers():
                if (f"{name}.{part}" if name else part) in kept:
                    continue
                own = type(quantizer).initialise_from is not Quantizer.initialise_from
                count += own or _searched(quantizer, config) is not None
                if part == "quant_weight":
                    initialise_range(quantizer, layer.full_weight(), config)
                else:
                    hooks.append(quantizer.register_forward_pre_hook(partial(_from_inputs, config=config)))
        with batch_statistics.of_the_batch(model):
            model(images)
    return count


def _check_arguments(model: object, images: object, config: object) -> None:
    """Refuse arguments of `initialise_ranges` that are wrong, and say what to write."""
    where = "initialise_ranges:"
    if not isinstance(model, nn.Module):
        raise TypeError(f"{where} model is {shown(model)}: give the network, a torch.nn.Module")
    check_one_copy(model)
    if isinstance(images, tuple | list):
        raise TypeError(f"{where} images is a {type(images).__name__}: write one tensor, torch.stack(images)")
    if not isinstance(images, Tensor):
        raise TypeError(f"{where} images is {shown(images)}: give one batch of images, a tensor [N, 3, S, S]")
    if not isinstance(config, QuantConfig):
        raise TypeError(
            f"{where} config is {unlike(config, QuantConfig)}: give the QuantConfig of the network, or leave it out"
        )
    shape = list(images.shape)
    convolves = any(isinstance(layer, nn.Conv2d) for layer in model.modules())
    if convolves and images.ndim == 3:
        raise ValueError(
            f"{where} images of shape {shape} are no batch: write images.unsqueeze(0) for one image"
        )
    if images.ndim < 2 or (convolves and images.ndim != 4):
        wanted = "[N, 3, S, S]" if convolves else "[N, ...]"
        raise ValueError(f"{where} images of shape {shape}: give one batch of images {wanted}")
    if images.numel() == 0:
        raise ValueError(f"{where} images of shape {shape} are empty: give at least one image")


def _from_inputs(module: Quantizer, inputs: tuple[Tensor, ...], *, config: QuantConfig) -> None:
    initialise_range(module, inputs[0], config)


def _searched(quantizer: Quantizer, config: QuantConfig) -> Grid | None:
    """The levels whose clip value is searched for; None where the formula of the method decides."""
    return None if config.re_init_range == "paper" else quantizer.search_grid()


def initialise_range(quantizer: Quantizer, x: Tensor, config: QuantConfig) -> None:
    """Initialise one quantizer from the tensor that it will quantize; a group of zeros keeps its clip value.

    Args:
        quantizer: it changes in place.
        x: floating point, of the shape that the quantizer gets.
        config: only `re_init_range` and `re_init_percentile` are read.

    Example:
        >>> import torch
        >>> from model.calibrate import initialise_range
        >>> from model.quant import LayerSite, QuantConfig, QuantizerConfig, methods
        >>> config = QuantizerConfig(tag="wt", enable=True, method="lsq", levels=3)
        >>> site = LayerSite(name="fc", channels=1, channel_dim=0, ndim=2, fan=3)
        >>> quantizer = methods()["lsq", "wt"](config, site)
        >>> initialise_range(quantizer, torch.tensor([[-2.0, 0.0, 2.0]]), QuantConfig(re_init_range="mse"))
        >>> quantizer.current_range()
        tensor([[2.]])
    """
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
    """The clip value of each row with the least sum of (q(x) - x)^2, of 100 fractions of max |x|.

    Args:
        rows: float32 [groups, elements]; of more than a million elements every k-th is read.
        grid: the levels.
        quantizer: adds the errors of all ranks.

    Returns:
        float32 [groups]; 0 for a row of zeros.

    Example:
        >>> import torch
        >>> from model.calibrate import least_error_clip
        >>> from model.quant import Grid, LayerSite, QuantizerConfig, methods
        >>> config = QuantizerConfig(tag="wt", enable=True, method="lsq", levels=3)
        >>> site = LayerSite(name="fc", channels=1, channel_dim=0, ndim=2, fan=5)
        >>> quantizer = methods()["lsq", "wt"](config, site)
        >>> rows = torch.tensor([[-0.5, 0.0, 0.5, 0.5, 1.0]])  # three of five are +-0.5, and 1 is clipped a little
        >>> least_error_clip(rows, Grid.of(3, half_range=False), quantizer)
        tensor([0.6200])
    """
    rows = rows[
        :, :: rows.numel() // _ELEMENTS | 1
    ]  # an odd stride, which does not follow the columns of an image
    maximum = torch.distributed.ReduceOp.MAX
    largest = quantizer.over_ranks(rows.abs().amax(dim=1, keepdim=True), maximum)
    best, least = torch.zeros_like(largest), torch.full_like(largest, math.inf)
    for number in range(1, _CANDIDATES + 1):
        clip = (largest * (number / _CANDIDATES)).clamp_min(torch.finfo(torch.float32).tiny)
        levels = grid.ratios(grid.numbers(rows / clip)) * clip
        error = (levels - rows).square().sum(dim=1, keepdim=True)
        error = quantizer.over_ranks(error, torch.distributed.ReduceOp.SUM)
        best, least = torch.where(error < least, clip, best), torch.minimum(error, least)
    return torch.where(largest > 0, best, 0.0).squeeze(1)


def percentile_clip(rows: Tensor, percent: float) -> Tensor:
    """The smallest value that at least `percent` of the |x| of a row do not exceed, for each row.

    Args:
        rows: float32 [groups, elements].
        percent: above 0, at most 100.

    Returns:
        float32 [groups].

    Example:
        >>> import torch
        >>> from model.calibrate import percentile_clip
        >>> percentile_clip(torch.tensor([[1.0, -2.0, 3.0, 100.0]]), 75.0)
        tensor([3.])
    """
    # Exact, since a rounded product could be one too many.
    rank = math.ceil(Fraction(str(percent)) * rows.shape[1] / 100)
    return rows.abs().kthvalue(max(1, rank), dim=1).values
