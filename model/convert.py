"""Quantize any network in place: its convolutions and linear layers get quantizers and keep their weights."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from model.quant import QuantConv2d, QuantLayer, QuantLinear
from utils.config import QuantConfig

LAYERS: dict[type[nn.Module], type[QuantLayer]] = {nn.Conv2d: QuantConv2d, nn.Linear: QuantLinear}


def build_quantizers(module: nn.Module, config: QuantConfig) -> None:
    """Build the quantizers of every quantized layer in `module`, once the layers' names are known."""
    for name, layer in module.named_modules():
        if isinstance(layer, QuantLayer):
            layer.build_quantizers(config, name)


def candidates(module: nn.Module) -> list[str]:
    """The names of the layers that can be quantized, in the order of definition."""
    return [name for name, layer in module.named_modules() if type(layer) in LAYERS]


def replace(module: nn.Module, config: QuantConfig, select: Callable[[str, nn.Module], bool]) -> tuple[str, ...]:
    """Make the selected layers of `module` quantized ones that have no quantizers yet; returns their names."""
    names = tuple(name for name in candidates(module) if select(name, module.get_submodule(name)))
    for name in names:
        layer = module.get_submodule(name)
        # The quantized classes only add quantizers, so that a layer becomes one without a copy; this also
        # keeps hooks and shared parameters.
        layer.__class__ = LAYERS[type(layer)]
        if isinstance(layer, QuantConv2d):
            layer.padding_after_quant = config.padding_after_quant
        for part in ("quant_activation", "quant_weight", "quant_output"):
            setattr(layer, part, nn.Identity())
    return names


def quantize(
    module: nn.Module, config: QuantConfig, *, select: Callable[[str, nn.Module], bool] = lambda name, layer: True
) -> tuple[str, ...]:
    """Replace convolutions (`nn.Conv2d`) and linear layers (`nn.Linear`) by quantized ones.

    Args:
        module: changed in place; parameters keep their identity, names and values.
        config: the quantizers.
        select: which layers, by name and layer.

    Returns:
        The names of the layers that were replaced.
    """
    names = replace(module, config, select)
    build_quantizers(module, config)
    return names
