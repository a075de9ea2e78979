"""VGG-Small, the plain network of the low-bit literature for CIFAR."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from model.layers import factory
from model.networks.resnet import initialise
from utils.config.image_size import sides, size_text
from utils.config.schema import ModelConfig
from utils.errors import UserError

STAGES = (128, 256, 512)


class VGGSmall(nn.Module):
    """Two 3x3 convolutions of 128, of 256 and of 512 channels, max pooling after each pair, a linear layer.

    The convolutions of BinaryConnect's network for CIFAR (Courbariaux et al., arXiv 1511.00363) with a single
    linear layer in place of its three, as HWGQ (Cai et al., arXiv 1702.00953) and later low-bit work have it.
    Norm and activation follow each convolution. With the `imagenet` stem the first one is 7x7 with stride 2,
    and a 3x3 max pooling with stride 2 follows it.

    Input [N, C, H, W], output logits [N, num_classes]; the linear layer's width depends on H and W.

    Raises:
        UserError: when the width leaves no channel, or the size no position.
    """

    obsolete: ClassVar[frozenset[str]] = frozenset(
        {"bn7"}
    )  # a norm in published files that follows no convolution

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        imagenet = config.stem.kind == "imagenet"
        channels, size = config.channels, sides(config.input_size)
        parts: list[nn.Module] = []
        for wide in STAGES:
            for _ in range(2):
                out, first = factory.width(wide, config), not parts
                full = first and not config.quant.first_last
                kernel, stride = (7, 2) if first and imagenet else (3, 1)
                parts.append(
                    factory.unit(channels, out, kernel, stride, config, full_precision=full, signed=first)
                )
                if first and imagenet:
                    parts.append(nn.MaxPool2d(3, stride=2, padding=1))
                    size = (-(-size[0] // 4), -(-size[1] // 4))
                channels = out
            parts.append(nn.MaxPool2d(2))
            size = (size[0] // 2, size[1] // 2)
        if min(size) < 1:
            raise UserError(
                f"--input_size {size_text(config.input_size)}: {config.name} needs at least {32 if imagenet else 8}"
            )
        self.features = nn.Sequential(*parts)
        self.fc = factory.linear(channels * size[0] * size[1], config.num_classes, config)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.fc(self.features(x).flatten(1))
