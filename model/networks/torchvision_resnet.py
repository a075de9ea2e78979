"""torchvision's own ResNets, converted in place: `--model pytorch-resnet18` and so on."""

from __future__ import annotations

from functools import partial

from torch import nn

from model.convert import Selection, replace
from model.layers import norms
from utils.config.schema import ModelConfig
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
    if config.quant.enabled:
        replace(network, config.quant, Selection())
    return network
