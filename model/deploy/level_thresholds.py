"""Where activations with uneven levels change from a level to the next one."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from model.deploy.codes import one_place, quantized
from model.quantizers.frame import Quantizer
from model.quantizers.integers import QuantizedTensor
from utils.errors import UserError

FAR = 2.0**100  # beyond all thresholds
SPREAD = 2001  # values near thresholds, and as many far ones of each sign, with which these are checked


def thresholds(name: str, quantizer: Quantizer, like: Tensor) -> tuple[Tensor, Tensor]:
    """Where an activation quantizer with static, increasing levels changes from a level to the next one.

    Found by bisection over the float32 numbers from -2^100 to 2^100, so that x >= threshold is exactly what the
    quantizer does. That is compared on both sides of each threshold and on a spread of values.

    Args:
        name: the quantizer's name in the network.
        quantizer: of any method.
        like: an input of it, normalised, float32; its first dimension holds images.

    Returns:
        Thresholds float32 [n - 1, ...] and levels float32 [n, ...] of the n levels that such a number reaches, whose
        other dimensions broadcast against the input.

    Raises:
        UserError: the quantizer is not monotonic, or its integers are not what it quantizes.
    """
    dim = quantizer.site.channel_dim % like.ndim
    shape = [1] * like.ndim
    if quantizer.groups > 1:
        shape[dim] = like.shape[dim]
    probe = one_place(quantizer, like)

    def number(order: Tensor) -> Tensor:
        """The level numbers, int64 [levels - 1, channels or 1, ...], at floats in increasing order, int64."""
        x = _float(order).expand(-1, *probe)
        found = _encoded(quantizer, x).numbers
        return found if quantizer.groups > 1 else found.narrow(dim, 0, 1)

    count = quantizer.levels - 1
    wanted = torch.arange(1, count + 1).reshape(-1, *[1] * (like.ndim - 1))
    edge = int(_order(torch.tensor(FAR)))
    low = torch.full((count, *shape[1:]), -edge - 1, dtype=torch.int64)
    high = torch.full_like(low, edge)
    while bool((high - low > 1).any()):
        middle = (low + high) // 2
        reached = number(middle) >= wanted
        low, high = torch.where(reached, low, middle), torch.where(reached, middle, high)
    reached = number(torch.full_like(low, edge)) >= wanted
    some = reached.flatten(1).any(1)
    reached, high = reached[some], high[some]
    places = torch.where(reached, _float(high), torch.inf)  # of another channel
    ends = torch.cat([torch.full((1, *shape[1:]), -FAR), _float(high)])
    levels = _encoded(quantizer, ends.expand(-1, *probe)).dequantize()
    levels = levels if quantizer.groups > 1 else levels.narrow(dim, 0, 1)
    spread = _spread_over(places).reshape(-1, *[1] * (like.ndim - 1)).expand(-1, *probe)
    sides = torch.cat([places, _float(high - 1)]).expand(-1, *probe)
    for x in (sides, spread, like):
        _check_thresholds(name, quantizer, x, places, levels)
    return places, levels


def by_thresholds(x: Tensor, places: Tensor, levels: Tensor) -> Tensor:
    """The level of each value, see `thresholds`."""
    value = levels[0]
    for place, level in zip(places, levels[1:], strict=True):
        value = torch.where(x >= place, level, value)
    return value


def _spread_over(places: Tensor) -> Tensor:
    """Values around thresholds and far from them, float32 [n], in increasing order."""
    finite = places[places.isfinite()]
    low, high = (float(finite.min()), float(finite.max())) if finite.numel() else (0.0, 0.0)
    near = torch.linspace(low - (high - low + 1), high + (high - low + 1), SPREAD)
    far = torch.logspace(-9, 9, SPREAD)
    return torch.cat([near, far, -far, torch.zeros(1)]).sort().values


def _check_thresholds(name: str, quantizer: Quantizer, x: Tensor, places: Tensor, levels: Tensor) -> None:
    wanted = quantized(quantizer, x)
    wrong = (by_thresholds(x, places, levels).expand_as(wanted) != wanted).nonzero()
    if len(wrong):
        at = tuple(wrong[0].tolist())
        found = float(by_thresholds(x, places, levels).expand_as(wanted)[at])
        raise UserError(
            f"{name}: {quantizer.config.method} cannot be exported by thresholds: it makes {float(wanted[at]):g} of "
            f"{float(x[at]):g}, where {found:g} follows from where its levels begin; a larger value must never get a "
            "lower level, and its encode must give what it quantizes; or export --to program"
        )


def _encoded(quantizer: Quantizer, x: Tensor) -> QuantizedTensor:
    """`Quantizer.integers` of an input that is normalised already."""
    with torch.no_grad():
        found = quantizer.encode(x)
        if not quantizer.config.gamma:
            return found
        return replace(found, gamma=quantizer.per_channel(quantizer.gamma.float()))


def _order(x: Tensor) -> Tensor:
    """The place of float32 numbers in their order, int64; zero has place 0."""
    bits = x.view(torch.int32).long()
    return torch.where(bits >= 0, bits, -(bits & 0x7FFFFFFF))


def _float(order: Tensor) -> Tensor:
    """The float32 number at a place of the order."""
    bits = torch.where(order >= 0, order, -order - 2**31)
    return bits.to(torch.int32).view(torch.float32)
