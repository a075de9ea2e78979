"""torchvision's own ResNets, converted in place: `--model pytorch-resnet18` and so on."""

from __future__ import annotations

import dataclasses
from functools import partial

from torch import Tensor, nn

from model.convert import Selection, replace
from model.layers import norms
from model.networks.grey import take_grey
from model.networks.resnet import Block, ResNet
from utils.checkpoint.earlier_names import with_layers
from utils.config.schema import BlockConfig, ModelConfig, StemConfig
from utils.errors import UserError

NAMES = {f"pytorch-resnet{depth}": f"resnet{depth}" for depth in (18, 34, 50, 101, 152)}


def build_torchvision_resnet(config: ModelConfig) -> nn.Module:
    """Torchvision's network with its parameter names.

    The first and the last layer stay in full precision unless they are to be quantized too.

    Raises:
        UserError: for a width, which these networks do not have.
    """
    if config.width_alpha != 1.0:
        raise UserError(
            f"--width_alpha {config.width_alpha}: {config.name} has one width; use {NAMES[config.name]}"
        )
    from torchvision.models import resnet  # here: other networks need not wait for it

    network = getattr(resnet, NAMES[config.name])(
        num_classes=config.num_classes, norm_layer=partial(norms.norm, config=config)
    )
    if config.channels == 1:
        take_grey(network)
    if config.quant.enabled:
        replace(network, config.quant, Selection())
    return network


ORIGINAL = "origin,cbsa,fix_pooling,singleconv,fix"
"""The keywords with which our ResNet computes what torchvision's does."""


def from_torchvision(
    state: dict[str, Tensor], network: nn.Module, config: ModelConfig, source: str, *, reverse: bool = False
) -> dict[str, Tensor]:
    """Weights with the names of torchvision's (and timm's) ResNets, under the names of our ResNet.

    Args:
        state: the weights of a file; all others are returned as they are.
        network: to load them into; for one that is not our ResNet they are returned as they are.
        config: the network's.
        source: names the file in messages.
        reverse: whether the weights may be of a network with `reverse-bn`, whose names are the same.

    Raises:
        UserError: the network computes something else than torchvision's from the same weights.
    """
    if "layer1.0.conv1.weight" not in state:
        return state
    if config.name in NAMES and config.norm == "reverse" and not reverse:
        raise UserError(
            f"{source} has weights of networks with batch norms, and this network computes something else: "
            "leave out the keyword reverse-bn"
        )
    if not isinstance(network, ResNet):
        return state
    if not _is_original(config):
        raise UserError(
            f"{source} has the weights of torchvision's ResNet, and this network computes something else: "
            f"write --keyword imagenet,{ORIGINAL} or --model torchvision:{config.name}"
        )
    layers = _torchvision_layers(network)
    return with_layers(state, layers)  # a file may have entries that our layer lacks, such as a counter


def _is_original(config: ModelConfig) -> bool:
    """Whether our ResNet computes what torchvision's does; parts without effect on that are left out."""
    block = dataclasses.replace(
        config.block, zero_init=False, shortcut_full_precision=False, prone_strided=True
    )
    return (
        block == BlockConfig(order="cbsa", skip="block", fix=True, shortcut_pool=False)
        and config.stem == StemConfig(norm_before_pool=True)
        and config.activation == "relu"
        and config.norm in ("batch", "static", "frozen")
    )


def _torchvision_layers(network: ResNet) -> dict[str, str]:
    """Our names of all layers by torchvision's."""
    found = {}
    for name in network.state_dict():
        parts = name.split(".")
        if parts[0] == "bn1":
            found["bn1"] = ".".join(parts[:2])
        elif parts[0].startswith("layer") and parts[2] != "skip":
            found[".".join(parts[:3])] = ".".join(parts[:4])
    for place, block in network.named_modules():
        if not isinstance(block, Block):
            continue
        layers = [i for i, layer in block.skip.named_children() if layer.state_dict()]
        found |= {f"{place}.downsample.{theirs}": f"{place}.skip.{i}" for theirs, i in enumerate(layers)}
    return found
