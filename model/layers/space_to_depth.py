"""Convolutions through space-to-depth, and the layers that are used beside them."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from model.layers.factory import conv
from model.layers.norms import norm
from utils.config.schema import ModelConfig


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
        signed: bool = False,
    ) -> None:
        super().__init__()
        self.block = block
        self.conv = conv(
            channels_in * block**2,
            channels_out,
            kernel,
            1,
            config,
            full_precision=full_precision,
            signed=signed,
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

    A strided layer beside a `ProneConv` of this block needs it to give outputs of the same size.
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
