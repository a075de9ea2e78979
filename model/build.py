"""From a configuration to a network."""

from __future__ import annotations

import difflib

from torch import nn

from model import dorefa, fatnn, lq, lsq, pact, xnor  # noqa: F401  (importing a method registers it)
from model.quant import QuantLayer, quantizers
from model.resnet import DEPTHS, ResNet
from utils.config import ModelConfig
from utils.errors import UserError


def build(config: ModelConfig) -> nn.Module:
    """The network that `config` describes, float32, on the CPU, in training mode.

    Raises:
        UserError: when the configuration has no network, naming the layer where that helps.
    """
    if config.name not in DEPTHS:
        close = difflib.get_close_matches(config.name, DEPTHS, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else f"one of {', '.join(DEPTHS)}"
        raise UserError(f"--model {config.name}: no such network; {hint}")
    network = ResNet(config)
    for name, module in network.named_modules():
        if isinstance(module, QuantLayer):
            module.build_quantizers(config.quant, name)
    return network


def set_stable(model: nn.Module, steps_per_epoch: int) -> None:
    """Tell every quantizer how long an epoch is, for warm-ups given in epochs."""
    for _, quantizer in quantizers(model):
        quantizer.set_stable(steps_per_epoch)


def models() -> tuple[str, ...]:
    """The names that `--model` takes."""
    return tuple(DEPTHS)
