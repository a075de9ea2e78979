"""Network in network."""

from __future__ import annotations

from torch import Tensor, nn

from model.layers import factory
from model.networks.resnet import initialise
from utils.config.schema import ModelConfig

# Channels and kernel of the convolutions of each block; the classes' 1x1 convolution ends the last one.
CIFAR = (((192, 5), (160, 1), (96, 1)), ((192, 5), (192, 1), (192, 1)), ((192, 3), (192, 1)))
IMAGENET = (
    ((96, 11), (96, 1), (96, 1)), ((256, 5), (256, 1), (256, 1)), ((384, 3), (384, 1), (384, 1)),
    ((1024, 3), (1024, 1)),
)  # fmt: skip


class NIN(nn.Module):
    """Blocks of a spatial and two 1x1 convolutions; the last one gives the classes, averaged over positions.

    Lin et al., "Network In Network", arXiv 1312.4400; the sizes are those of the authors' published networks
    for CIFAR and, with the `imagenet` stem, whose first convolution strides by 4, for ImageNet. For low-bit
    training a norm and an activation follow each convolution but the last, in place of biases and dropout,
    and all pooling takes the maximum.

    Input [N, C, H, W], output logits [N, num_classes].

    Raises:
        UserError: when the width leaves no channel.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        imagenet = config.stem.kind == "imagenet"
        ends_full = not config.quant.first_last
        channels = config.channels
        parts: list[nn.Module] = []
        for block in IMAGENET if imagenet else CIFAR:
            if parts:
                parts.append(nn.MaxPool2d(3, stride=2, padding=1))
            for wide, kernel in block:
                out, first = factory.width(wide, config), not parts
                stride = 4 if first and imagenet else 1
                full = first and ends_full
                parts.append(
                    factory.unit(channels, out, kernel, stride, config, full_precision=full, signed=first)
                )
                channels = out
        self.features = nn.Sequential(*parts)
        self.classifier = factory.conv(channels, config.num_classes, 1, 1, config, full_precision=ends_full)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.classifier(self.features(x)).mean(dim=(2, 3))
