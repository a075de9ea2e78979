"""The keyword-configured ResNet (He et al., arXiv 1512.03385, and its low-bit relatives).

The order of the layers of a unit is data: the letters c (convolution), b (normalisation),
a (activation) and s (skip connection) are walked one by one. Names of all parts: docs/resnet.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model import layer
from utils.config import ModelConfig
from utils.errors import UserError


@dataclass(frozen=True)
class Depth:
    """What a depth means: blocks per stage, and whether blocks are bottlenecks."""

    stages: tuple[int, ...]
    bottleneck: bool = False

    @property
    def expansion(self) -> int:
        """Output channels of a block over its inner width."""
        return 4 if self.bottleneck else 1


DEPTHS = {
    "resnet18": Depth((2, 2, 2, 2)),
    "resnet20": Depth((3, 3, 3)),
    "resnet32": Depth((5, 5, 5)),
    "resnet34": Depth((3, 4, 6, 3)),
    "resnet44": Depth((7, 7, 7)),
    "resnet50": Depth((3, 4, 6, 3), bottleneck=True),
    "resnet56": Depth((9, 9, 9)),
    "resnet101": Depth((3, 4, 23, 3), bottleneck=True),
    "resnet152": Depth((3, 8, 36, 3), bottleneck=True),
}


PARTS = {"c": "conv", "b": "bn", "a": "relu"}  # a letter of the order -> the parts' name


@dataclass(frozen=True)
class Unit:
    """One convolution of a block."""

    channels_in: int
    channels_out: int
    kernel: int
    stride: int


def units_of(channels_in: int, width: int, stride: int, depth: Depth) -> list[Unit]:
    """The convolutions of a block of inner `width`; a bottleneck strides in its 3x3."""
    if depth.bottleneck:
        out = width * depth.expansion
        return [Unit(channels_in, width, 1, 1), Unit(width, width, 3, stride), Unit(width, out, 1, 1)]
    return [Unit(channels_in, width, 3, stride), Unit(width, width, 3, 1)]


def shortcut(channels_in: int, channels_out: int, stride: int, config: ModelConfig) -> nn.Module:
    """The skip connection from [N, in, H, W] to [N, out, H / stride, W / stride].

    Pooling (or a strided convolution), then the 1x1 convolution and its norm and activation in the
    order that the block's own order asks for; the identity when shapes agree.
    """
    block = config.block
    if stride == 1 and channels_in == channels_out:
        return nn.Sequential()
    pooled = block.shortcut_pool and stride != 1
    parts: list[nn.Module] = [nn.AvgPool2d(stride) if pooled else nn.Identity()]
    if channels_in != channels_out:
        conv_stride = 1 if block.shortcut_pool else stride
        conv = layer.conv(
            channels_in, channels_out, 1, conv_stride, config, full_precision=block.shortcut_full_precision
        )
        after_norm = [layer.norm(channels_out, config)] if block.fix else []
        if block.order == "bacs":
            parts += [layer.norm(channels_in, config), layer.activation(config), conv, *after_norm]
        elif block.order == "bcas":
            parts += [layer.norm(channels_in, config), conv, layer.activation(config), *after_norm]
        else:
            parts += [conv, layer.norm(channels_out, config)]
            parts += [] if block.fix else [layer.activation(config)]
    return nn.Sequential(*parts)


class Block(nn.Module):
    """A residual block of two (basic) or three (bottleneck) units, with `base` parallel branches.

    Input [N, in, H, W], output [N, width * expansion, H / stride, W / stride]. Unit k of branch j
    owns `conv{k}.{j}`, `bn{k}.{j}` and `relu{k}.{j}`; `skip` is the shortcut, `scales` weigh the
    branches when there is more than one; `fix_relu` or `fix_bn` belongs to the sum.
    """

    def __init__(self, channels_in: int, width: int, stride: int, depth: Depth, config: ModelConfig) -> None:
        super().__init__()
        block = config.block
        self.order = block.order
        self.units = units_of(channels_in, width, stride, depth)
        self.base = config.base
        self.block_skip = block.skip == "block"
        channels_out = self.units[-1].channels_out
        # The original ResNet applies the last activation to the sum; b-first orders normalise what they add.
        convolution_first = block.order in ("cbas", "cbsa")
        sum_activation = self.block_skip and block.fix and convolution_first
        sum_norm = self.block_skip and block.fix and block.order.startswith("b")

        self.skip = shortcut(channels_in, channels_out, stride, config)
        for k, unit in enumerate(self.units, start=1):
            last = unit is self.units[-1]
            norm_width = unit.channels_in if block.order.index("b") < block.order.index("c") else unit.channels_out
            bare = last and sum_activation
            for part, make in {
                "bn": lambda width=norm_width: layer.norm(width, config),
                "conv": lambda u=unit: layer.conv(u.channels_in, u.channels_out, u.kernel, u.stride, config),
                "relu": lambda bare=bare: nn.Identity() if bare else layer.activation(config),
            }.items():
                self.add_module(f"{part}{k}", nn.ModuleList(make() for _ in range(self.base)))
        self.fix_relu = layer.activation(config) if sum_activation else nn.Identity()
        self.fix_bn = layer.norm(channels_out, config) if sum_norm else nn.Identity()
        if self.base > 1:
            self.scales = nn.ParameterList([nn.Parameter(torch.full((1,), 1 / self.base)) for _ in range(self.base)])

    def _branch(self, x: Tensor, branch: int) -> Tensor:
        """One branch: the units in order; layer-wise skips are added where the order says."""
        for k in range(1, len(self.units) + 1):
            unit_input = x
            for letter in self.order:
                if letter != "s":
                    x = getattr(self, f"{PARTS[letter]}{k}")[branch](x)
                elif not self.block_skip:
                    x = x + (self.skip(unit_input) if k == 1 else unit_input)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        if self.base == 1:
            result = self._branch(x, 0)
        else:
            result = torch.stack([self._branch(x, j) * scale for j, scale in enumerate(self.scales)]).sum(dim=0)
        if self.block_skip:
            result = self.fix_bn(result) + self.skip(x)
        return self.fix_relu(result)


class ResNet(nn.Module):
    """Stem, stages of blocks, head. Input [N, 3, S, S], output logits [N, num_classes].

    Raises:
        UserError: for a combination that has no network (layer-wise skips around bottlenecks).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        depth = DEPTHS[config.name]
        if depth.bottleneck and config.block.skip == "layer":
            raise UserError(
                f"{config.name} has bottlenecks, whose convolutions change the shape, so skips around every "
                "convolution are impossible: add the keyword `origin` for a skip around the whole block"
            )
        width = round(64 * config.width_alpha)
        if width < 1:
            raise UserError(f"--width_alpha {config.width_alpha} leaves no channel; use at least {1 / 64}")
        stem = config.stem
        kernel, stride = (7, 2) if stem.kind == "imagenet" else (3, 1)
        self.conv1 = nn.Conv2d(3, width, kernel, stride=stride, padding=kernel // 2, bias=False)
        pool = nn.MaxPool2d(3, stride=2, padding=1) if stem.kind == "imagenet" else nn.Identity()
        norm = nn.Sequential() if stem.pre_norm else nn.Sequential(layer.norm(width, config), layer.activation(config))
        self.bn1, self.maxpool = norm, pool
        self.norm_before_pool = stem.norm_before_pool
        channels = width
        for i, blocks in enumerate(depth.stages):
            inner = width * 2**i
            stage = []
            for j in range(blocks):
                stage.append(Block(channels, inner, 2 if i > 0 and j == 0 else 1, depth, config))
                channels = inner * depth.expansion
            self.add_module(f"layer{i + 1}", nn.Sequential(*stage))
        self.stages = len(depth.stages)
        self.bn2 = nn.Sequential(layer.norm(channels, config)) if stem.pre_norm else nn.Sequential()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, config.num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images float [N, 3, S, S] to logits [N, num_classes]."""
        x = self.conv1(x)
        x = self.maxpool(self.bn1(x)) if self.norm_before_pool else self.bn1(self.maxpool(x))
        for i in range(self.stages):
            x = getattr(self, f"layer{i + 1}")(x)
        return self.fc(self.avgpool(self.bn2(x)).flatten(1))


def initialise(model: nn.Module) -> None:
    """Convolutions from N(0, 2 / (out * kh * kw)) (He et al., arXiv 1502.01852), norms to identity."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
