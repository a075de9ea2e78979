"""Norms by name (`NORMS`), for networks that a configuration describes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.quantizers.site import group_count, undivided
from utils.config.schema import ModelConfig
from utils.errors import UserError
from utils.text import closest


class StaticBatchNorm2d(nn.Module):
    """Batch normalisation with fixed statistics.

    (x - running_mean) / sqrt(running_var + 1e-5) * weight + bias; input and output [N, C, H, W]. The
    statistics are buffers that nothing updates; the affine part learns unless `frozen`.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, *, frozen: bool = False) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.weight = nn.Parameter(torch.ones(channels), requires_grad=not frozen)
        self.bias = nn.Parameter(torch.zeros(channels), requires_grad=not frozen)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)


class ReverseBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation with its affine part on both sides: normalise(x * weight + bias) * weight + bias.

    This is what the published code of the keyword `reverse-bn` computes: it applies the affine part, then calls its
    parent class, which normalises and applies it again. The statistics are those of x * weight + bias.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Input and output [N, C, H, W]."""
        self._check_input_dim(input)
        return super().forward(affine(input, self))


def affine(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """The affine part of a norm: x * weight + bias, one of each a channel; x is [N, C, H, W]."""
    shape = (1, -1, 1, 1)
    return x * norm.weight.view(shape) + norm.bias.view(shape)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "static": StaticBatchNorm2d,
    "frozen": lambda channels: StaticBatchNorm2d(channels, frozen=True),
    "reverse": ReverseBatchNorm2d,
    "instance": nn.InstanceNorm2d,
    "none": lambda channels: nn.Identity(),
}


class GroupNorm(nn.GroupNorm):
    """Group normalisation of as many groups as a group option asks for (`model.quantizers.site.group_count`).

    Where they do not divide the channels, `unfit` says so, and `check_norms` refuses the norm by its name.
    """

    def __init__(self, requested: int, channels: int) -> None:
        groups = group_count(requested, channels)
        super().__init__(groups or 1, channels)
        self.unfit = "" if groups else undivided("fm", requested, channels)


def norm(channels: int, config: ModelConfig) -> nn.Module:
    """The normalisation of the network for `channels` channels.

    Raises:
        UserError: `config.norm` is no name in `NORMS` and is not "group".

    Example:
        >>> from model.layers.norms import norm
        >>> from utils.config.schema import ModelConfig
        >>> type(norm(8, ModelConfig(norm="instance"))).__name__
        'InstanceNorm2d'
    """
    if config.norm == "group":
        return GroupNorm(config.quant.fm.quant_group or 1, channels)
    if str(config.norm) not in NORMS:
        known = (*NORMS, "group")
        hint = closest(config.norm, known) or f"; use one of {', '.join(known)}"
        raise UserError(f"ModelConfig: norm {config.norm!r} is not known{hint}")
    return NORMS[config.norm](channels)


def check_norms(network: nn.Module) -> None:
    """Refuse, with a `UserError`, a group normalisation whose groups do not divide the channels."""
    for name, module in network.named_modules():
        if isinstance(module, GroupNorm) and module.unfit:
            raise UserError(f"{name}, a norm by the keyword group-norm: {module.unfit}")


def untrained_statistics(network: nn.Module) -> tuple[str, ...]:
    """Warn, in one line, of norms with fixed statistics that are still those of a new network: mean 0, variance 1."""
    found = [
        name
        for name, module in network.named_modules()
        if isinstance(module, StaticBatchNorm2d)
        and not module.running_mean.any()
        and bool((module.running_var == 1).all())
    ]
    if not found:
        return ()
    return (
        f"{len(found)} norms, the first is {found[0]}, normalise by mean 0 and variance 1, which no training found and "
        "none will change: start static-bn and freeze-bn from a trained network (--pretrained) or leave the word out",
    )
