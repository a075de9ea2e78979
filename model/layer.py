"""Norms, activations and convolutions of the flexible networks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.quant import QuantConv2d, QuantLinear, group_count, keep_full_precision, undivided
from utils.config import ModelConfig
from utils.errors import UserError

# Norms -------------------------------------------------------------------------------------------


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
    """Batch normalisation whose affine part comes first: normalise(x * weight + bias)."""

    def forward(self, input: Tensor) -> Tensor:
        """Input and output [N, C, H, W]."""
        shape = (1, -1, 1, 1)
        weight, bias = self.weight, self.bias
        self._check_input_dim(input)
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        return functional.batch_norm(
            input * weight.reshape(shape) + bias.reshape(shape), self.running_mean, self.running_var,
            training=self.training, momentum=self.momentum or 0.1, eps=self.eps,
        )  # fmt: skip


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "static": StaticBatchNorm2d,
    "frozen": lambda channels: StaticBatchNorm2d(channels, frozen=True),
    "reverse": ReverseBatchNorm2d,
    "instance": nn.InstanceNorm2d,
    "none": lambda channels: nn.Identity(),
}


class GroupNorm(nn.GroupNorm):
    """Group normalisation of as many groups as a group option asks for (`model.quant.group_count`).

    Where they do not divide the channels it is `unfit`, and `check_norms` refuses it by its name.
    """

    def __init__(self, requested: int, channels: int) -> None:
        groups = group_count(requested, channels)
        super().__init__(groups or 1, channels)
        self.unfit = "" if groups else undivided("fm", requested, channels)


def norm(channels: int, config: ModelConfig) -> nn.Module:
    """The network's normalisation of `channels` channels."""
    if config.norm == "group":
        return GroupNorm(config.quant.fm.quant_group or 1, channels)
    return NORMS[config.norm](channels)


def check_norms(network: nn.Module) -> None:
    """Refuse, with a `UserError`, a group normalisation whose groups do not divide the channels."""
    for name, module in network.named_modules():
        if isinstance(module, GroupNorm) and module.unfit:
            raise UserError(f"{name}, a norm by the keyword group-norm: {module.unfit}")


# Activations -------------------------------------------------------------------------------------

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "none": nn.Identity,
    "prelu": nn.PReLU,
    "relu6": nn.ReLU6,
    "leaky": nn.LeakyReLU,
}


def activation(config: ModelConfig) -> nn.Module:
    """The network's activation."""
    return ACTIVATIONS[config.activation]()


# Convolutions ------------------------------------------------------------------------------------


def width(channels: int, config: ModelConfig) -> int:
    """`channels` times the network's `width_alpha`, rounded.

    Raises:
        UserError: when nothing is left.
    """
    scaled = round(channels * config.width_alpha)
    if scaled < 1:
        raise UserError(
            f"--width_alpha {config.width_alpha} leaves no channel of {channels}; use a larger one"
        )
    return scaled


def conv(
    channels_in: int, channels_out: int, kernel: int, stride: int, config: ModelConfig, *, groups: int = 1,
    full_precision: bool = False, signed: bool = False,
) -> nn.Conv2d:  # fmt: skip
    """A convolution without bias, "same" padding; quantized unless `full_precision` is asked for.

    Its quantizers are built once its name is known (`model.build`). It is depth-wise with as many `groups` as
    input channels. The input of a `signed` one goes below zero, which makes its levels symmetric.
    """
    size: dict[str, Any] = {"stride": stride, "padding": kernel // 2, "bias": False, "groups": groups}
    depthwise = 1 < groups == channels_in
    if full_precision or not config.quant.enabled or (depthwise and not config.quant.depthwise):
        made = nn.Conv2d(channels_in, channels_out, kernel, **size)
        return keep_full_precision(made, "is kept so by its network" if full_precision else "is depth-wise")
    after = config.quant.padding_after_quant
    made = QuantConv2d(channels_in, channels_out, kernel, **size, padding_after_quant=after)
    made.signed_input = signed
    return made


def unit(
    channels_in: int, channels_out: int, kernel: int, stride: int, config: ModelConfig, *, groups: int = 1,
    full_precision: bool = False, signed: bool = False, activated: bool = True,
) -> nn.Sequential:  # fmt: skip
    """A convolution `conv` (see there), a norm `bn` and, where `activated`, an activation `relu`."""
    parts: dict[str, nn.Module] = {
        "conv": conv(
            channels_in,
            channels_out,
            kernel,
            stride,
            config,
            groups=groups,
            full_precision=full_precision,
            signed=signed,
        ),
        "bn": norm(channels_out, config),
    }
    if activated:
        parts["relu"] = activation(config)
    return nn.Sequential(OrderedDict(parts))


def linear(features_in: int, features_out: int, config: ModelConfig) -> nn.Linear:
    """The last layer, in full precision unless the first and last layers are quantized too."""
    quantized = config.quant.first_last and config.quant.enabled
    if quantized:
        return QuantLinear(features_in, features_out)
    return keep_full_precision(nn.Linear(features_in, features_out), "is the last layer")


class SpaceToDepthConv(nn.Module):
    """Space-to-depth by `block` (torch's `pixel_unshuffle` order), then a convolution of stride 1.

    Input [N, in, H, W], output [N, out, H / block, W / block].
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        block: int,
        kernel: int,
        config: ModelConfig,
        *,
        full_precision: bool,
    ) -> None:
        super().__init__()
        self.block = block
        self.conv = conv(
            channels_in * block**2, channels_out, kernel, 1, config, full_precision=full_precision
        )

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.conv(functional.pixel_unshuffle(x, self.block))


class ProneConv(nn.Module):
    """A 3x3 convolution as a 1x1 one on larger pixels.

    Space-to-depth by 2 * stride, 1x1 convolution to 4 * out channels, depth-to-space by 2.

    Input [N, in, H, W]. A size that 2 * stride does not divide is padded with zeros first, half of the
    remainder on each side, and the output is (padded size) / stride, as in published networks (14 becomes 8
    with stride 2). An odd remainder has no halves: the output is cut to ceil(size / stride).
    With `norm_inside` the norm comes before depth-to-space.
    """

    def __init__(
        self, channels_in: int, channels_out: int, stride: int, config: ModelConfig, *, norm_inside: bool
    ) -> None:
        super().__init__()
        self.block, self.stride = 2 * stride, stride
        self.conv = conv(channels_in * self.block**2, 4 * channels_out, 1, 1, config)
        self.bn = norm(4 * channels_out, config) if norm_inside else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        remainders = tuple(-size % self.block for size in x.shape[-2:])
        height, width = (
            (-(-size // self.stride) if rest % 2 else (size + rest) // self.stride)
            for size, rest in zip(x.shape[-2:], remainders, strict=True)
        )
        x = functional.pixel_unshuffle(_padded(x, remainders), self.block)
        x = functional.pixel_shuffle(self.bn(self.conv(x)), 2)
        top, left = (x.shape[-2] - height) // 2, (x.shape[-1] - width) // 2
        return x[..., top : top + height, left : left + width]


class PadToBlocks(nn.Module):
    """Zeros around [N, C, H, W] until `block` divides height and width; a size with an odd remainder stays.

    What a strided layer beside a `ProneConv` of this block needs to give outputs of the same size.
    """

    def __init__(self, block: int) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        rests = (-size % self.block for size in x.shape[-2:])
        return _padded(x, tuple(0 if rest % 2 else rest for rest in rests))


def _padded(x: Tensor, remainders: tuple[int, ...]) -> Tensor:
    """`x` with zeros above and below, and left and right: half of the remainders of height and width on each side."""
    rows, columns = remainders
    if rows or columns:
        return functional.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
    return x


class RepeatChannels(nn.Module):
    """Concatenate `times` copies along the channels: [N, C, H, W] to [N, times * C, H, W]."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return x.repeat(1, self.times, 1, 1)
