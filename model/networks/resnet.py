"""The keyword-configured ResNet (He et al., arXiv 1512.03385, and its low-bit relatives).

The order of the layers of a unit is data: the letters c (convolution), b (normalisation),
a (activation) and s (skip connection) are walked one by one. Names of all parts: docs/resnet.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.layers import factory, norms, space_to_depth
from utils.config.schema import ModelConfig
from utils.errors import UserError


@dataclass(frozen=True)
class Depth:
    """The blocks of a depth: how many per stage, and whether they are bottlenecks."""

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


def channels_at(letter: str, order: str, channels_in: int, channels_out: int) -> int:
    """The channels of a unit at a letter of its order: before the convolution those of its input."""
    return channels_in if order.index(letter) < order.index("c") else channels_out


def shortcut(channels_in: int, channels_out: int, stride: int, config: ModelConfig) -> nn.Module:
    """The skip connection from [N, in, H, W] to [N, out, H / stride, W / stride].

    Pooling (or a strided convolution), then the 1x1 convolution and its norm and activation in the
    order that the block's own order asks for; the identity when shapes agree.
    """
    block = config.block
    if stride == 1 and channels_in == channels_out:
        parts = [nn.Identity(), norms.norm(channels_in, config)] if block.identity_norm else []
        return nn.Sequential(*parts)
    pool = (
        nn.AvgPool2d(stride)
        if stride != 1 and (block.shortcut_pool or block.shortcut_repeat)
        else nn.Identity()
    )
    if block.shortcut_repeat:
        if channels_out % channels_in:
            raise UserError(
                f"the keyword DCHR cannot repeat {channels_in} channels to {channels_out}; leave it out"
            )
        return nn.Sequential(pool, space_to_depth.RepeatChannels(channels_out // channels_in))
    parts = [pool]
    if channels_in != channels_out:
        conv_stride = 1 if block.shortcut_pool else stride
        full = block.shortcut_full_precision
        conv = factory.conv(channels_in, channels_out, 1, conv_stride, config, full_precision=full)
        last_norm = [norms.norm(channels_out, config)] if block.fix else []
        if block.fixup:
            parts += [conv]
        elif block.order == "bacs":
            parts += [
                norms.norm(channels_in, config),
                factory.activation(channels_in, config),
                conv,
                *last_norm,
            ]
        elif block.order == "bcas":
            parts += [
                norms.norm(channels_in, config),
                conv,
                factory.activation(channels_out, config),
                *last_norm,
            ]
        else:
            parts += [conv, norms.norm(channels_out, config)]
            parts += [] if block.fix else [factory.activation(channels_out, config)]
    return nn.Sequential(*parts)


def downsample(channels_in: int, channels_out: int, stride: int, config: ModelConfig) -> nn.Sequential:
    """Lossless downsampling from [N, in, H, W] to [N, out, H / stride, W / stride].

    Space-to-depth with a 1x1 convolution (c), a norm (b) and an activation (a) in the configured order. The
    convolution stays in full precision where those of shortcuts do.
    """
    order = config.block.downsample_order
    parts: dict[str, Callable[[], nn.Module]] = {
        "c": lambda: space_to_depth.SpaceToDepthConv(
            channels_in,
            channels_out,
            stride,
            1,
            config,
            full_precision=config.block.shortcut_full_precision,
        ),
        "b": lambda: norms.norm(channels_at("b", order, channels_in, channels_out), config),
        "a": lambda: factory.activation(channels_at("a", order, channels_in, channels_out), config),
    }
    return nn.Sequential(*(parts[letter]() for letter in order))


class Block(nn.Module):
    """A residual block of two (basic) or three (bottleneck) units, with `base` parallel branches.

    Input [N, in, H, W], output [N, width * expansion, H / stride, W / stride]. Unit k of branch j
    owns `conv{k}.{j}`, `bn{k}.{j}` and `relu{k}.{j}`; `skip` is the shortcut, `shrink` the lossless
    downsampling before it all, `scales` weigh the branches when there is more than one; `fix_relu` or
    `fix_bn` belongs to the sum. With Fixup (arXiv 1901.09321) `fixup_scale` multiplies the last
    convolution's output, and `fixup_bias{k}a`, `fixup_bias{k}b` are added before and after convolution k.
    """

    fixup_bias1a: nn.Parameter

    def __init__(self, channels_in: int, width: int, stride: int, depth: Depth, config: ModelConfig) -> None:
        super().__init__()
        block = config.block
        out = width * depth.expansion
        self.shrink = nn.Sequential()
        if block.downsample_order and stride != 1:
            self.shrink = downsample(channels_in, out, stride, config)
            channels_in, stride = out, 1
        units = units_of(channels_in, width, stride, depth)
        self.order, self.base, self.units = block.order, config.base, len(units)
        self.block_skip = block.skip == "block"
        self.fixup, self.fixup_bias = block.fixup, block.fixup_bias
        # The original ResNet applies the last activation to the sum; b-first orders normalise the branch added.
        sum_activation = self.block_skip and block.fix and block.order in ("cbas", "cbsa")
        sum_norm = self.block_skip and block.fix and block.order.startswith("b")

        self.skip = shortcut(channels_in, out, stride, config)
        self.identity_skip = not any(True for _ in self.skip.children())
        # Space-to-depth may pad; then the strided layers beside it pad as well.
        self.grow = space_to_depth.PadToBlocks(2 * stride) if block.prone and stride != 1 else nn.Identity()
        for k, unit in enumerate(units, start=1):
            norm_width, activation_width = (
                channels_at(letter, block.order, unit.channels_in, unit.channels_out) for letter in "ba"
            )
            prone = is_prone(unit, config)
            no_norm = block.fixup or (prone and block.prone_norm_inside)
            bare = unit is units[-1] and sum_activation
            for part, make in {
                "bn": lambda w=norm_width, no=no_norm: nn.Identity() if no else norms.norm(w, config),
                "conv": lambda u=unit: convolution(u, config),
                "relu": lambda w=activation_width, bare=bare: (
                    nn.Identity() if bare else factory.activation(w, config)
                ),
            }.items():
                self.add_module(f"{part}{k}", nn.ModuleList(make() for _ in range(self.base)))
            if block.fixup_bias:
                for place in "ab":
                    self.register_parameter(f"fixup_bias{k}{place}", nn.Parameter(torch.zeros(1)))
        self.fix_relu = factory.activation(out, config) if sum_activation else nn.Identity()
        self.fix_bn = norms.norm(out, config) if sum_norm else nn.Identity()
        if block.fixup:
            self.fixup_scale = nn.Parameter(torch.ones(1))
        if self.base > 1:
            self.scales = nn.ParameterList(
                [nn.Parameter(torch.full((1,), 1 / self.base)) for _ in range(self.base)]
            )

    def _branch(self, x: Tensor, branch: int) -> Tensor:
        """One branch: the units in order; layer-wise skips are added where the order says."""
        for k in range(1, self.units + 1):
            unit_input = x
            for letter in self.order:
                if letter == "s":
                    if not self.block_skip:
                        x = x + (self._shortcut(unit_input) if k == 1 else unit_input)
                    continue
                if letter == "c" and self.fixup_bias:
                    x = x + getattr(self, f"fixup_bias{k}a")
                x = self._layer(getattr(self, f"{PARTS[letter]}{k}")[branch], x)
                if letter == "b" and self.fixup:
                    x = self._fixup_norm(x, k)
        return x

    def _fixup_norm(self, x: Tensor, k: int) -> Tensor:
        """Apply Fixup's scale and bias in place of a norm."""
        if k == self.units:
            x = x * self.fixup_scale
        return x + getattr(self, f"fixup_bias{k}b") if self.fixup_bias else x

    def _shortcut(self, x: Tensor) -> Tensor:
        """The skip connection; one with a convolution takes Fixup's first bias."""
        if self.fixup_bias and not self.identity_skip:
            x = x + self.fixup_bias1a
        if isinstance(self.grow, nn.Identity):
            return self.skip(x)
        for part in self.skip.children():
            x = self._layer(part, x)
        return x

    def _layer(self, part: nn.Module, x: Tensor) -> Tensor:
        """Run a layer of the block; beside space-to-depth, strided layers pad as that does."""
        strided = isinstance(part, nn.Conv2d | nn.AvgPool2d) and part.stride not in (1, (1, 1))
        return part(self.grow(x) if strided else x)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        x = self.shrink(x)
        if self.base == 1:
            result = self._branch(x, 0)
        else:
            result = torch.stack([self._branch(x, j) * scale for j, scale in enumerate(self.scales)]).sum(
                dim=0
            )
        if self.block_skip:
            result = self.fix_bn(result) + self._shortcut(x)
        return self.fix_relu(result)


def is_prone(unit: Unit, config: ModelConfig) -> bool:
    """Whether a convolution goes through space-to-depth."""
    return config.block.prone and unit.kernel == 3 and (unit.stride == 1 or config.block.prone_strided)


def convolution(unit: Unit, config: ModelConfig) -> nn.Module:
    """The convolution of a unit."""
    if is_prone(unit, config):
        inside = config.block.prone_norm_inside
        return space_to_depth.ProneConv(
            unit.channels_in, unit.channels_out, unit.stride, config, norm_inside=inside
        )
    return factory.conv(unit.channels_in, unit.channels_out, unit.kernel, unit.stride, config)


class ResNet(nn.Module):
    """Stem, stages of blocks, head. Input [N, C, H, W], output logits [N, num_classes].

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
        self.conv1, self.maxpool = stem_layers(width, config)
        has_norm = not stem.pre_norm or (stem.pre_norm_activation and stem.norm_before_pool)
        self.bn1 = (
            nn.Sequential(*self._norm_activation(width, config, stem.activation))
            if has_norm
            else nn.Sequential()
        )
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
        last = self._norm_activation(channels, config, stem.pre_norm_activation) if stem.pre_norm else []
        self.bn2 = nn.Sequential(*last)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = factory.linear(channels, config.num_classes, config)
        self.fixup_bias = config.block.fixup_bias
        if self.fixup_bias:
            self.fixup_bias1 = nn.Parameter(torch.zeros(1))
            self.fixup_bias2 = nn.Parameter(torch.zeros(1))
        initialise(self)
        if config.block.fixup:
            initialise_fixup(self, sum(depth.stages))
        if config.block.zero_init:
            zero_last_norms(self)

    @staticmethod
    def _norm_activation(channels: int, config: ModelConfig, activation: bool) -> list[nn.Module]:
        norm = nn.Identity() if config.block.fixup else norms.norm(channels, config)
        return [norm, factory.activation(channels, config)] if activation else [norm]

    def forward(self, x: Tensor) -> Tensor:
        """Images float [N, C, H, W] to logits [N, num_classes]."""
        x = self.conv1(x)
        if self.fixup_bias:
            x = x + self.fixup_bias1
        x = self.maxpool(self.bn1(x)) if self.norm_before_pool else self.bn1(self.maxpool(x))
        for i in range(self.stages):
            x = getattr(self, f"layer{i + 1}")(x)
        x = self.avgpool(self.bn2(x)).flatten(1)
        return self.fc(x + self.fixup_bias2 if self.fixup_bias else x)


def stem_layers(width: int, config: ModelConfig) -> tuple[nn.Module, nn.Module]:
    """The first convolution and the pooling after it; quantized where the first and last layers are."""
    stem = config.stem
    full, signed = not config.quant.first_last, config.quant.first_signed
    if stem.space_to_depth:
        conv = space_to_depth.SpaceToDepthConv(
            config.channels,
            width,
            stem.space_to_depth,
            stem.kernel,
            config,
            full_precision=full,
            signed=signed,
        )
        pool = stem.space_to_depth == 2
    else:
        kernel, stride = (7, 2) if stem.kind == "imagenet" else (3, 1)
        conv = factory.conv(
            config.channels, width, kernel, stride, config, full_precision=full, signed=signed
        )
        pool = stem.kind == "imagenet"
    return conv, nn.MaxPool2d(3, stride=2, padding=1) if pool else nn.Identity()


def initialise(model: nn.Module) -> None:
    """Convolutions from N(0, 2 / (out * kh * kw)) (He et al., arXiv 1502.01852), norms to identity."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def initialise_fixup(model: ResNet, blocks: int) -> None:
    """Fixup's initialisation (arXiv 1901.09321, section 3), with B = `blocks` residual blocks.

    Convolutions of a block but the last: std sqrt(2 / (out * kh * kw)) * B^(-1 / (2m - 2)) for m of them in
    the block (B^(-1/2) in basic blocks, B^(-1/4) in bottlenecks); the last and the linear layer zero.
    """
    for block in model.modules():
        if not isinstance(block, Block):
            continue
        for k in range(1, block.units + 1):
            for branch in getattr(block, f"conv{k}"):
                for conv in branch.modules():
                    if isinstance(conv, nn.Conv2d) and k == block.units:
                        nn.init.zeros_(conv.weight)
                    elif isinstance(conv, nn.Conv2d):
                        conv.weight.data.mul_(blocks ** (-1 / (2 * block.units - 2)))
    nn.init.zeros_(model.fc.weight)
    if model.fc.bias is not None:
        nn.init.zeros_(model.fc.bias)


def zero_last_norms(model: ResNet) -> None:
    """Start the scale of each block's last norm at zero, so that a block begins as its shortcut.

    The last norm is the one of the block's output where there is one, else the last unit's, which is inside
    a space-to-depth convolution where that has one.
    """
    for block in model.modules():
        if not isinstance(block, Block):
            continue
        inside = [
            conv.bn
            for conv in getattr(block, f"conv{block.units}")
            if isinstance(conv, space_to_depth.ProneConv)
        ]
        for last in ([block.fix_bn], inside, getattr(block, f"bn{block.units}")):
            scales = [
                scale for norm in last if isinstance(scale := getattr(norm, "weight", None), nn.Parameter)
            ]
            for scale in scales:
                nn.init.zeros_(scale)
            if scales:
                break
