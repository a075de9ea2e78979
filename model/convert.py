"""Quantize any network in place: its convolutions and linear layers get quantizers and keep their weights.

How other programs use this: docs/detectron2.md.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from model import quant  # noqa: F401  (registers what a configuration can name)
from model.layers import bits
from model.layers.bits import asked_bits, assign_bits, become_quantized, mark_ends, quantizes
from model.layers.called import call_layers, layers_called, undone_on_error
from model.layers.convolution import QuantConvolution
from model.layers.fused_attention import add_matmuls
from model.layers.matmul import check_matmuls
from model.layers.quantized import BASES, QuantLayer, QuantLinear, keep_full_precision
from model.layers.weighted import multiplies, weighted_layers
from model.observe import ParameterProducts, first_input, observing, within
from model.obstacles import obstacles
from model.quantizers.adaptive import MIN_DIVISOR
from model.quantizers.registry import method_class
from model.selection import Left, Report, Selection, all_names, matches
from utils.config.checks import shown, unlike
from utils.config.layer_rules import with_layer_bits
from utils.config.schema import QuantConfig, QuantizerConfig
from utils.errors import UserError

__all__ = [
    "Left",
    "Report",
    "Selection",
    "below_zero",
    "build_quantizers",
    "called",
    "full_precision",
    "quantize",
    "register_layer",
    "replace",
]


def register_layer(kind: type[nn.Module], quantized: type[QuantLayer]) -> None:
    """Let `quantize` turn layers of the class `kind` into layers of the class `quantized`.

    Use it for a subclass of `nn.Conv1d`, `nn.Conv2d` or `nn.Linear` that has a forward of its own; without it such
    layers are left in full precision. Subclasses of `kind` are not affected.

    Args:
        kind: the class of the layers.
        quantized: a subclass of `kind` and of `QuantConvolution` or `QuantLinear`. Its constructor does not run: the
            layer keeps the state of `kind` and gets the three quantizers.

    Raises:
        TypeError: an argument is not a class, such as a layer itself.
        ValueError: `quantized` is not such a subclass, or `kind` is registered already.

    Example:
        >>> from torch import nn
        >>> from model.convert import quantize, register_layer
        >>> from model.quant import QuantConfig, QuantizerConfig, QuantLinear
        >>> class Gated(nn.Linear):
        ...     def forward(self, x):
        ...         return super().forward(x).sigmoid() * x
        >>> class QuantGated(QuantLinear, Gated):
        ...     def forward(self, x):
        ...         return QuantLinear.forward(self, x).sigmoid() * x
        >>> register_layer(Gated, QuantGated)
        >>> wt = QuantizerConfig(tag="wt", enable=True, method="lsq", levels=4)
        >>> quantize(nn.Sequential(Gated(4, 4)), QuantConfig(wt=wt, first_last=True)).replaced
        ('0',)
    """
    for name, value in (("kind", kind), ("quantized", quantized)):
        if not isinstance(value, type):
            raise TypeError(
                f"register_layer: {name} is {shown(value)}, not a class: give the class of the layer"
            )
    if kind in bits.LAYERS:
        raise ValueError(f"{kind.__name__} is registered already")
    if not (issubclass(quantized, kind) and issubclass(quantized, QuantConvolution | QuantLinear)):
        raise ValueError(f"{quantized.__name__}: not a subclass of {kind.__name__} and a quantized layer")
    bits.LAYERS[kind] = quantized


def build_quantizers(module: nn.Module, config: QuantConfig) -> None:
    """Build the quantizers of every quantized layer in `module`, once the names of the layers are known.

    `quantize` does this itself. Call it for a network whose class creates `QuantConv2d` and `QuantLinear`.

    Args:
        module: the network, float32 on the CPU; changed in place.
        config: the quantizers.

    Raises:
        UserError: a method is not known, or a quantizer does not fit its layer.

    Example:
        >>> from torch import nn
        >>> from model.convert import build_quantizers
        >>> from model.quant import QuantConfig, QuantLinear, QuantizerConfig
        >>> network = nn.Sequential(QuantLinear(4, 2))
        >>> network[0].quant_weight
        Identity()
        >>> wt = QuantizerConfig(tag="wt", enable=True, method="lsq", levels=4)
        >>> build_quantizers(network, QuantConfig(wt=wt))
        >>> network[0].quant_weight
        LSQ(wt, lsq, levels=4, groups=2)
    """
    with undone_on_error(module):
        assign_bits(module, config)
        for name, layer in module.named_modules():
            if isinstance(layer, QuantLayer):
                layer.build_quantizers(config, name)


def quantize(
    module: nn.Module,
    config: QuantConfig,
    *,
    select: Selection | None = None,
    example: Sequence[Any] | None = None,
    first_bit: int | str | None = None,
    last_bit: int | str | None = None,
    layer_bits: str | os.PathLike[str] | Sequence[Any] | None = None,
) -> Report:
    """Turn convolutions and linear layers into quantized ones.

    Call it before the optimizer is built, since the optimizer must know the parameters of the quantizers, and
    before the network is compiled or distributed. A second call with another configuration quantizes further layers.

    Args:
        module: any network; changed in place. Parameters keep their identity, names and values; layers keep their
            hooks, mode and device.
        config: the quantizers, and whether the first and the last layer and depth-wise convolutions get them.
        select: which layers; default: all. An attention gets products (`config.attention_matmul`) where its own name
            is included and not excluded.
        example: a tuple of positional inputs for one forward pass, which runs in evaluation mode and without
            gradients. It shows which layer runs first and which runs last; without it the order of definition
            decides. Layers that are never called as modules are left, since a quantizer there would never run.
            `config.attention_matmul` needs it.
        first_bit: bits of the first layer, whose input gets signed levels: 1 to 16, "ternary", or 32 for full
            precision; default: the configuration's.
        last_bit: the same of the last layer.
        layer_bits: bits of single layers: the path of a file (docs/mixed.md), or its entries as a list of mappings;
            default: the configuration's.

    Returns:
        The layers that were replaced, with the products of attention behind them, and the layers that were left with
        the reasons.

    Raises:
        UserError: the configuration quantizes nothing or names an unknown method, a pattern matches no layer, a
            method does not have the bits, a quantizer does not fit its layer, or `attention_matmul` does not fit the
            network. The network is as it was then.
        TypeError: an argument is of the wrong type.

    Example:
        >>> from torch import nn
        >>> from model.convert import quantize
        >>> from model.quant import QuantConfig, QuantizerConfig
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 2))
        >>> wt = QuantizerConfig(tag="wt", enable=True, method="lsq", levels=4)
        >>> report = quantize(network, QuantConfig(wt=wt))
        >>> print(report.table())
        layer  left because it
        -----  ------------------
            0  is the first layer
            3  is the last layer
        quantized 1 layers, left 2 as they were
        >>> report.replaced, network[1].quant_weight
        (('1',), LSQ(wt, lsq, levels=4, groups=8))
    """
    _check_arguments(module, config, select, example)
    config = with_layer_bits(config, first_bit, last_bit, layer_bits)
    if not config.enabled:
        raise UserError("the configuration quantizes nothing: enable its fm, wt or ot")
    for part in (config.fm, config.wt, config.ot):
        if part.enable:
            method_class(part)  # an unknown method is refused before anything has changed
    if config.attention_matmul:
        check_matmuls(config, example)
    select = select or Selection()
    with undone_on_error(module):
        call_layers(module)
        order = None if example is None else called(module, *example)[1]
        report = replace(module, config, select, order)
        matmuls: tuple[str, ...] = ()
        if config.attention_matmul and example is not None:
            matmuls = add_matmuls(module, *example, select=select)
        assign_bits(module, config, report.replaced)
        for name in (*report.replaced, *matmuls):
            layer = module.get_submodule(name)
            assert isinstance(layer, QuantLayer)
            device = _device(module, name)
            layer.build_quantizers(config, name)
            for _, quantizer in layer.quantizers():
                quantizer.to(device).train(layer.training)
    return dataclasses.replace(report, replaced=(*report.replaced, *matmuls))


def _device(module: nn.Module, name: str) -> torch.device:
    """That of a layer's weight, or, where it has none, of a parameter of the closest module around it that has."""
    weight = getattr(module.get_submodule(name), "weight", None)
    if weight is not None:
        return weight.device
    around = (value for each in within(name) for value in module.get_submodule(each).parameters())
    return next((value.device for value in around), torch.device("cpu"))


def _check_arguments(module: object, config: object, select: object, example: object) -> None:
    """Refuse arguments of `quantize` that are of the wrong type, and say what to write."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"quantize: module is {shown(module)}: give the network, a torch.nn.Module")
    if isinstance(config, QuantizerConfig):
        raise TypeError(
            f"quantize: config is a QuantizerConfig, of one tag alone: write QuantConfig({config.tag}=...)"
        )
    if not isinstance(config, QuantConfig):
        raise TypeError(
            f"quantize: config is {unlike(config, QuantConfig)}: write QuantConfig(fm=..., wt=...)"
        )
    if select is not None and not isinstance(select, Selection):
        raise TypeError(
            f'quantize: select is {unlike(select, Selection)}: write Selection(include=("layer1.*",))'
        )
    if isinstance(example, Tensor):
        raise TypeError("quantize: example is a tensor: write the tuple of all inputs, example=(images,)")
    if example is not None and (isinstance(example, str | Mapping) or not isinstance(example, Sequence)):
        raise TypeError(f"quantize: example is {shown(example)}: write a tuple of inputs, example=(images,)")


def called(module: nn.Module, *inputs: Any) -> tuple[Any, tuple[str, ...]]:
    """Run one forward pass and record which layers it calls.

    Args:
        module: the network; runs in evaluation mode and without gradients, and is left as it was.
        inputs: its positional inputs.

    Returns:
        The output, and the names of the layers with weights in the order of their first calls; modules of any
        other class that multiply by their parameters are among them.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from model.convert import called
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.head, self.body = nn.Linear(4, 2), nn.Linear(4, 4)
        ...     def forward(self, x):
        ...         return self.head(self.body(x))
        >>> output, names = called(Net(), torch.zeros(1, 4))
        >>> output.shape, names
        (torch.Size([1, 2]), ('body', 'head'))
    """
    names: dict[str, None] = {}
    layers = dict(weighted_layers(module))
    seen = 0

    def note(name: str | None, *_: Any) -> None:
        """Add the modules of other classes that have multiplied since the last layer, and this one."""
        nonlocal seen
        for owner in islice(products.found, seen, None):
            if not any(each in layers for each in within(owner)):
                names.setdefault(owner)
        seen = len(products.found)
        if name is not None:
            names.setdefault(name)

    with observing(module) as hooks, ParameterProducts(module) as products:
        hooks += [layer.register_forward_hook(partial(note, name)) for name, layer in layers.items()]
        output = module(*inputs)
    note(None)
    return output, tuple(names)


def below_zero(module: nn.Module, *inputs: Any) -> dict[str, float]:
    """Measure how far the input of each convolution and linear layer goes below zero in one forward pass.

    This helps to fill in `Selection.signed`. Sums and normalised tensors come near 1. The outputs of ReLU give 0,
    and those of SiLU and GELU in a trained network give little: levels that start at zero cost them little.

    Args:
        module: the network; runs in evaluation mode and without gradients, and is left as it was.
        inputs: its positional inputs.

    Returns:
        Name of the layer -> max(0, -min x) / max |x|, from 0 to 1. Layers with an empty input are left out.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from model.convert import below_zero
        >>> network = nn.Sequential(nn.Identity(), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
        >>> below_zero(network, torch.tensor([[-1.0, 2.0]]))
        {'1': 0.5, '3': 0.0}
    """
    shares: dict[str, float] = {}

    def watch(name: str, _: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        x = first_input(inputs, named)
        if x.numel():
            share = float(-x.min() / x.abs().max().clamp_min(MIN_DIVISOR))
            shares[name] = max(shares.get(name, 0.0), share)

    with layers_called(module), observing(module) as hooks:
        hooks += [
            layer.register_forward_pre_hook(partial(watch, name), with_kwargs=True)
            for name, layer in weighted_layers(module)
            if isinstance(layer, BASES)
        ]
        module(*inputs)
    return shares


def replace(
    module: nn.Module, config: QuantConfig, select: Selection, order: Sequence[str] | None = None
) -> Report:
    """Turn the selected layers of `module` into quantized layers whose quantizers are not built yet.

    `quantize` is this and `build_quantizers` of the replaced layers; call it alone where the names of the layers
    still change in between.

    Args:
        module: the network; changed in place.
        config: only its switches are read: `first_last`, `first_signed`, `depthwise` and `padding_after_quant`.
        select: which layers.
        order: names of the layers that are called, and of other modules that multiply by their parameters, in the
            order of their calls (`called`); default: all layers, in the order of definition.

    Returns:
        The layers that were replaced, and the layers that were left with the reasons.

    Raises:
        UserError: there is no layer to quantize, or a pattern matches none.

    Example:
        >>> from torch import nn
        >>> from model.convert import Selection, replace
        >>> from model.quant import QuantConfig
        >>> network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
        >>> replace(network, QuantConfig(), Selection()).replaced
        ('1',)
        >>> type(network[1]).__name__, network[1].quant_weight
        ('QuantLinear', Identity())
    """
    layers = {
        name: layer for name, layer in module.named_modules() if multiplies(layer) or name in (order or ())
    }
    if not layers:
        raise UserError("there is no layer to quantize: the network has no convolution and no linear layer")
    names = all_names(module, layers)
    select.check_patterns([name for group in names.values() for name in group])
    found = obstacles(module, layers, order)
    ends = tuple(layers) if order is None else order
    if not ends:
        raise UserError("there is no layer to quantize: with example the network calls no layer with weights")
    mark_ends(layers, ends)
    replaced, left = [], []
    for name, layer in layers.items():
        reason, named_whole = _deselected(names[name], layer, config, select, ends)
        reason = reason or found.get(name, "")
        if reason:
            asked = asked_bits(config, layer, names[name], whole=True)
            if quantizes(asked) and not isinstance(layer, QuantLayer):
                raise UserError(f"{next(iter(asked.values())).source}: {name} {reason}: leave it out")
            left.append(Left(name, reason))
            if not isinstance(layer, QuantLayer):
                keep_full_precision(layer, reason)
            continue
        replaced.append(name)
        quantized = become_quantized(layer, config)
        first = config.first_signed and name == ends[0]
        quantized.signed_input = first or any(matches(pattern, names[name]) for pattern in select.signed)
        quantized.named_whole = named_whole
    return Report(tuple(replaced), tuple(left))


def full_precision(module: nn.Module) -> tuple[str, ...]:
    """Names of the layers that multiply by weights without any quantizer that is on, in the order of definition.

    Example:
        >>> from torch import nn
        >>> from model.convert import full_precision
        >>> full_precision(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.LSTM(4, 2)))
        ('0', '2')
    """
    return tuple(
        name
        for name, layer in weighted_layers(module)
        if not (
            isinstance(layer, QuantLayer) and any(quantizer.enabled for _, quantizer in layer.quantizers())
        )
    )


def _deselected(
    names: Sequence[str], layer: nn.Module, config: QuantConfig, select: Selection, ends: Sequence[str]
) -> tuple[str, bool]:
    """Why a layer that could be quantized is not selected, the rest of a sentence; empty where it is selected.

    Also whether it is selected only since an option gives bits to this layer.
    """
    name = names[0]
    convolution = isinstance(layer, nn.Conv1d | nn.Conv2d)
    excluded = next((pattern for pattern in select.exclude if matches(pattern, names)), None)
    if excluded is not None:
        return f"is excluded by {excluded}", False
    if not any(matches(pattern, names) for pattern in select.include):
        return "is not included", False
    if not (select.convolutions if convolution else select.linears):
        return f"is a {'convolution' if convolution else 'linear layer'}", False
    reason = ""
    if not config.first_last and name in (ends[0], ends[-1]):
        reason = f"is the {'first' if name == ends[0] else 'last'} layer"
    elif convolution and not config.depthwise and 1 < layer.groups == layer.in_channels:
        reason = "is depth-wise"
    if reason and quantizes(asked_bits(config, layer, names, whole=True)):
        return "", True
    return reason, False
