"""Builds a network from its configuration."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from torch import nn

from model.convert import build_quantizers
from model.layers import norms
from model.layers.matmul import WORD, QuantMatmul
from model.layers.quantized import kept_off, quantizers
from model.networks import library, torchvision_resnet
from model.networks.mobilenet import MobileNetV1, MobileNetV2
from model.networks.nin import NIN
from model.networks.resnet import DEPTHS, ResNet
from model.networks.vgg import VGGSmall
from utils.config.schema import ModelConfig
from utils.errors import UserError

_MODELS: dict[str, Callable[[ModelConfig], nn.Module]] = {
    **dict.fromkeys(DEPTHS, ResNet),
    **dict.fromkeys(torchvision_resnet.NAMES, torchvision_resnet.build_torchvision_resnet),
    "mobilenetv1": MobileNetV1,
    "mobilenetv2": MobileNetV2,
    "vgg_small": VGGSmall,
    "nin": NIN,
}


PROJECT = frozenset(_MODELS)  # without those of users, which register later


def register_model(name: str, make: Callable[[ModelConfig], nn.Module]) -> None:
    """Let `--model name` build `make(config)`; user files call this too.

    Raises:
        UserError: when the name is taken.

    Example:
        >>> from torch import nn
        >>> from model.networks.build import build_network, register_model
        >>> from utils.config.schema import ModelConfig
        >>> register_model("tiny-example", lambda config: nn.Linear(4, config.num_classes))
        >>> build_network(ModelConfig(name="tiny-example", num_classes=3))
        Linear(in_features=4, out_features=3, bias=True)
    """
    if name in _MODELS:
        raise UserError(f"the model {name!r} is declared already; choose another name")
    _MODELS[name] = make


def build_network(config: ModelConfig) -> nn.Module:
    """The network that `config` describes, float32, on the CPU, in training mode.

    Raises:
        UserError: when there is no such network, or it cannot be built as configured, naming the layer where
            that helps.
    """
    source, colon, _ = config.name.partition(":")
    make = library.build_library_network if colon and source in library.SOURCES else _MODELS.get(config.name)
    if make is None:
        known = library.torchvision_names()
        names = {f"torchvision:{name}": f"torchvision:{name}" for name in known}
        names |= {name: f"torchvision:{name}" for name in known} | {name: name for name in _MODELS}
        close = dict.fromkeys(names[match] for match in difflib.get_close_matches(config.name, names, n=3))
        others = ", ".join([*_MODELS, *(f"{source}:NAME" for source in library.SOURCES)])
        hint = f"did you mean {' or '.join(close)}?" if close else f"one of {others}"
        raise UserError(f"--model {config.name}: no such network; {hint}")
    network = make(config)
    if not isinstance(network, nn.Module):
        raise UserError(
            f"--model {config.name}: its function returned a {type(network).__name__}, no nn.Module"
        )
    if config.quant.quantizes_matmuls and not any(
        isinstance(each, QuantMatmul) for each in network.modules()
    ):
        raise UserError(
            f"{WORD}: --model {config.name} has no attention with quantized products: leave the word out, or, in a "
            "function of your own, call model.convert.quantize(network, config.quant, example=(images,))"
        )
    norms.check_norms(network)
    build_quantizers(network, config.quant)
    if config.quant.enabled and not any(True for _ in quantizers(network)):
        raise UserError(
            f"--model {config.name} has no layer that can be quantized: build it with model.layers.factory or "
            "model.convert.quantize, or leave --fm_enable and --wt_enable out"
        )
    return network


def is_quantized(model: nn.Module) -> bool:
    """Whether all quantizers are on and past their warm-up (`--stable`); true in full precision.

    Those that are switched off on purpose, to the end of the run, do not count.
    """
    return all(
        kept_off(quantizer) or (quantizer.enabled and bool(quantizer.warmed_up()))
        for _, quantizer in quantizers(model)
    )


def set_stable(model: nn.Module, steps_per_epoch: int) -> None:
    """Tell every quantizer how long an epoch is, for warm-ups given in epochs."""
    for _, quantizer in quantizers(model):
        quantizer.set_stable(steps_per_epoch)


def models() -> tuple[str, ...]:
    """The names that `--model` takes, beside those of other packages (`model.networks.library`)."""
    return tuple(_MODELS)
