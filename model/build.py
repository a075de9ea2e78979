"""From a configuration to a network."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from torch import nn

from model import dorefa, fatnn, lq, lsq, pact, torchvision_resnet, xnor  # noqa: F401  (importing registers methods)
from model.convert import build_quantizers
from model.quant import quantizers
from model.resnet import DEPTHS, ResNet
from utils.config import ModelConfig
from utils.errors import UserError

_MODELS: dict[str, Callable[[ModelConfig], nn.Module]] = {
    **dict.fromkeys(DEPTHS, ResNet),
    **dict.fromkeys(torchvision_resnet.NAMES, torchvision_resnet.build),
}


def register_model(name: str, make: Callable[[ModelConfig], nn.Module]) -> None:
    """Let `--model name` build `make(config)`; user files call this too.

    Raises:
        UserError: when the name is taken.
    """
    if name in _MODELS:
        raise UserError(f"the model {name!r} is declared already; choose another name")
    _MODELS[name] = make


def build(config: ModelConfig) -> nn.Module:
    """The network that `config` describes, float32, on the CPU, in training mode.

    Raises:
        UserError: when there is no such network, or the configuration has none, naming the layer where
            that helps.
    """
    if config.name not in _MODELS:
        close = difflib.get_close_matches(config.name, _MODELS, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else f"one of {', '.join(_MODELS)}"
        raise UserError(f"--model {config.name}: no such network; {hint}")
    network = _MODELS[config.name](config)
    build_quantizers(network, config.quant)
    return network


def set_stable(model: nn.Module, steps_per_epoch: int) -> None:
    """Tell every quantizer how long an epoch is, for warm-ups given in epochs."""
    for _, quantizer in quantizers(model):
        quantizer.set_stable(steps_per_epoch)


def models() -> tuple[str, ...]:
    """The names that `--model` takes."""
    return tuple(_MODELS)
