"""MobileNetV1 (Howard et al., arXiv 1704.04861) and MobileNetV2 (Sandler et al., arXiv 1801.04381).

`width_alpha` is the papers' width multiplier. With the `cifar` stem the first convolution has stride 1, and in
MobileNetV2 the first strided block as well, so that images of 32 pixels end at 2x2 and 4x4.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from model.layers import factory
from model.networks.resnet import initialise
from utils.config.schema import ModelConfig

# Output channels and stride of each block of MobileNetV1 (table 1; the last block has stride 1, as in the
# authors' code).
V1_BLOCKS = (
    (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1),
)  # fmt: skip

# Expansion, output channels, blocks and stride of the first block of each stage of MobileNetV2 (table 2).
V2_STAGES = (
    (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
)  # fmt: skip


class _MobileNet(nn.Module):
    """The frame of both: `stem`, `blocks`, and the classifier `fc` on the mean over all positions."""

    stem: nn.Module
    blocks: nn.Module
    fc: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """Images float [N, C, H, W] to logits [N, num_classes]."""
        return self.fc(self.blocks(self.stem(x)).mean(dim=(2, 3)))


def _stem(channels: int, config: ModelConfig) -> nn.Sequential:
    """The first convolution; images have negative values."""
    stride = 2 if config.stem.kind == "imagenet" else 1
    return factory.unit(
        config.channels, channels, 3, stride, config, full_precision=not config.quant.first_last, signed=True
    )


class MobileNetV1(_MobileNet):
    """Blocks of a depth-wise 3x3 and a 1x1 convolution, each followed by a norm and an activation.

    Input [N, C, H, W], output logits [N, num_classes]. Block i owns `blocks.i.depthwise` and
    `blocks.i.pointwise`, each with its `conv`, `bn` and `relu`. 4.23 M parameters and 569 M
    multiply-accumulates at 224 pixels.

    Raises:
        UserError: when the width leaves no channel.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        channels = factory.width(32, config)
        self.stem = _stem(channels, config)
        blocks: list[nn.Module] = []
        for wide, stride in V1_BLOCKS:
            out = factory.width(wide, config)
            parts = {
                "depthwise": factory.unit(channels, channels, 3, stride, config, groups=channels),
                "pointwise": factory.unit(channels, out, 1, 1, config),
            }
            blocks.append(nn.Sequential(OrderedDict(parts)))
            channels = out
        self.blocks = nn.Sequential(*blocks)
        self.fc = factory.linear(channels, config.num_classes, config)
        initialise(self)


class InvertedResidual(nn.Module):
    """A block of MobileNetV2: 1x1 `expand`, depth-wise 3x3, 1x1 `project` without activation.

    Input [N, in, H, W], output [N, out, H / stride, W / stride]; the input is added where shapes agree. It
    comes from a projection, so it goes below zero; only the first block, which has expansion 1 and no `expand`,
    reads activations.
    """

    def __init__(
        self, channels_in: int, channels_out: int, stride: int, expansion: int, config: ModelConfig
    ) -> None:
        super().__init__()
        inner = channels_in * expansion
        self.adds = stride == 1 and channels_in == channels_out
        self.expand = (
            nn.Sequential() if expansion == 1 else factory.unit(channels_in, inner, 1, 1, config, signed=True)
        )
        self.depthwise = factory.unit(inner, inner, 3, stride, config, groups=inner)
        self.project = factory.unit(inner, channels_out, 1, 1, config, activated=False)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        out = self.project(self.depthwise(self.expand(x)))
        return x + out if self.adds else out


class MobileNetV2(_MobileNet):
    """Inverted residuals with linear bottlenecks; activations are ReLU6 unless another is configured.

    Input [N, C, H, W], output logits [N, num_classes]. There is no dropout before the classifier. 3.50 M
    parameters and 301 M multiply-accumulates at 224 pixels.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        channels = divisible(32 * config.width_alpha)
        stem = _stem(channels, config)
        blocks: list[nn.Module] = []
        for stage, (expansion, wide, count, first) in enumerate(V2_STAGES):
            out = divisible(wide * config.width_alpha)
            for i in range(count):
                stride = first if i == 0 and (config.stem.kind == "imagenet" or stage != 1) else 1
                blocks.append(InvertedResidual(channels, out, stride, expansion, config))
                channels = out
        last = divisible(1280 * max(1.0, config.width_alpha))
        self.stem = stem
        self.blocks = nn.Sequential(*blocks, factory.unit(channels, last, 1, 1, config, signed=True))
        self.fc = factory.linear(last, config.num_classes, config)
        initialise(self)


def divisible(channels: float, by: int = 8) -> int:
    """The multiple of `by` nearest to `channels`, at least `by` and nine tenths of it, as the authors do."""
    nearest = max(by, int(channels + by / 2) // by * by)
    return nearest + by if nearest < 0.9 * channels else nearest
