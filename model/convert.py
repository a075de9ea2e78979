"""Quantize any network in place: its convolutions and linear layers get quantizers and keep their weights.

How other programs use this: docs/detectron2.md.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from model import quant  # noqa: F401  (registers what a configuration can name)
from model.layers.quantized import QuantConv2d, QuantLayer, QuantLinear, keep_full_precision
from model.observe import first_input, observing
from model.quantizers.frame import MIN_DIVISOR
from utils.config.schema import QuantConfig
from utils.errors import UserError
from utils.text import format_table

LAYERS: dict[type[nn.Module], type[QuantLayer]] = {nn.Conv2d: QuantConv2d, nn.Linear: QuantLinear}

# Modules that use the weights of their children without calling them, some of them only on a fast path that
# is off while hooks watch.
USED_WITHOUT_A_CALL: dict[type[nn.Module], tuple[str, ...]] = {
    nn.MultiheadAttention: ("out_proj",),
    nn.TransformerEncoderLayer: ("linear1", "linear2"),
}
SWIN = "torchvision.models.swin_transformer"  # its ShiftedWindowAttention is another one

# What multiplies by weights of its own: all that a report and an audit speak of.
WEIGHTED = (_ConvNd, nn.Linear, nn.Bilinear, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)
DEFORMED = "torchvision.ops.deform_conv"  # its DeformConv2d is another one


def _used_without_a_call() -> dict[type[nn.Module], tuple[str, ...]]:
    """All such modules: a network has torchvision's only where somebody has imported them."""
    swin = sys.modules.get(SWIN)
    return USED_WITHOUT_A_CALL | ({swin.ShiftedWindowAttention: ("qkv", "proj")} if swin else {})


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which layers of a network are quantized.

    A pattern is matched against a layer's whole name as the shell matches file names: `*` stands for any
    text, dots included, so that `backbone.*` is everything inside `backbone`. Upper and lower case differ.
    A layer that is held in several places has several names, and matches by any of them.
    Whether the first and the last layer and depth-wise convolutions are quantized is the configuration's
    `first_last` and `depthwise`.

    Attributes:
        convolutions: select `nn.Conv2d`.
        linears: select `nn.Linear`.
        include: patterns; a layer must match one of them.
        exclude: patterns; a layer that matches one of them stays in full precision.
        signed: patterns of layers whose input goes below zero: its levels are symmetric also where the
            configuration's activations have levels from zero up, which would cut off all that is negative.
    """

    convolutions: bool = True
    linears: bool = True
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    signed: tuple[str, ...] = ()


class Left(NamedTuple):
    """A layer that stays as it was, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Report:
    """What became of a network's layers.

    Attributes:
        replaced: names of the layers that were made quantized ones, in the order of definition.
        left: the other layers that multiply by weights, in the order of definition.
    """

    replaced: tuple[str, ...]
    left: tuple[Left, ...]

    def table(self) -> str:
        """A line for each layer that was left, and one of totals."""
        total = f"quantized {len(self.replaced)} layers, left {len(self.left)} as they were"
        rows = format_table(("layer", "left because it"), [*self.left])
        return f"{rows}\n{total}" if self.left else total


def register_layer(kind: type[nn.Module], quantized: type[QuantLayer]) -> None:
    """Let `quantize` turn layers of exactly the class `kind` into `quantized`, a subclass of both.

    For subclasses of `nn.Conv2d` and `nn.Linear` with a forward of their own, which are left otherwise. The
    constructor of `quantized` does not run: it has the state of `kind` and the three quantizers.

    Raises:
        ValueError: when `quantized` is not such a class, or `kind` is registered already.
    """
    if kind in LAYERS:
        raise ValueError(f"{kind.__name__} is registered already")
    if not (issubclass(quantized, kind) and issubclass(quantized, QuantConv2d | QuantLinear)):
        raise ValueError(f"{quantized.__name__}: not a subclass of {kind.__name__} and a quantized layer")
    LAYERS[kind] = quantized


def build_quantizers(module: nn.Module, config: QuantConfig) -> None:
    """Build the quantizers of every quantized layer in `module`, once the layers' names are known."""
    for name, layer in module.named_modules():
        if isinstance(layer, QuantLayer):
            layer.build_quantizers(config, name)


def quantize(
    module: nn.Module,
    config: QuantConfig,
    *,
    select: Selection | None = None,
    example: Sequence[Any] | None = None,
) -> Report:
    """Turn convolutions and linear layers into quantized ones.

    Do this before the optimizer is built, which must know the quantizers' parameters, and before the network
    is compiled or distributed. A second call with another configuration quantizes further layers.

    Args:
        module: any network; changed in place. Parameters keep their identity, names and values, layers their
            hooks, mode and device.
        config: the quantizers, and whether the first and the last layer and depth-wise convolutions get them.
        select: which layers; default: all.
        example: positional inputs of one forward pass, run in evaluation mode and without gradients. It shows
            which layer runs first and which last, otherwise taken from the order of definition, and which are
            never called as modules, so that a quantizer of theirs would be without effect: these are left.

    Returns:
        What was replaced, and what was left and why.

    Raises:
        UserError: when the configuration quantizes nothing, a pattern matches no layer, or a quantizer does
            not fit its layer.
    """
    if not config.enabled:
        raise UserError("the configuration quantizes nothing: enable its fm, wt or ot")
    order = None if example is None else called(module, *example)[1]
    report = replace(module, config, select or Selection(), order)
    for name in report.replaced:
        layer = module.get_submodule(name)
        assert isinstance(layer, QuantConv2d | QuantLinear)
        layer.build_quantizers(config, name)
        for _, quantizer in layer.quantizers():
            quantizer.to(layer.weight.device).train(layer.training)
    return report


def called(module: nn.Module, *inputs: Any) -> tuple[Any, tuple[str, ...]]:
    """The output of one forward pass, and the layers that it called, in the order of their first calls."""
    names: dict[str, None] = {}
    with observing(module) as hooks:
        hooks += [
            layer.register_forward_hook(lambda m, i, out, name=name: names.setdefault(name))
            for name, layer in _layers(module)
        ]
        return module(*inputs), tuple(names)


def below_zero(module: nn.Module, *inputs: Any) -> dict[str, float]:
    """How far the input of each layer goes below zero in a forward pass: -min / max|x|, from 0 to 1.

    For `Selection.signed`: sums and normalised tensors come near 1; activations do not go below zero (ReLU)
    or, in a trained network, not far (SiLU, GELU), and lose little to levels that start at zero.
    """
    shares: dict[str, float] = {}

    def watch(name: str, _: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        x = first_input(inputs, named)
        if x.numel():
            share = float(-x.min() / x.abs().max().clamp_min(MIN_DIVISOR))
            shares[name] = max(shares.get(name, 0.0), share)

    with observing(module) as hooks:
        hooks += [
            layer.register_forward_pre_hook(partial(watch, name), with_kwargs=True)
            for name, layer in _layers(module)
            if isinstance(layer, nn.Conv2d | nn.Linear)
        ]
        module(*inputs)
    return shares


def replace(
    module: nn.Module, config: QuantConfig, select: Selection, order: Sequence[str] | None = None
) -> Report:
    """Make the selected layers of `module` quantized ones that have no quantizers yet.

    Args:
        module: changed in place.
        config: the quantizers; only the switches beside them are read.
        select: which layers.
        order: the layers that are called, the first and the last at its ends; default: all, as defined.
    """
    layers = dict(_layers(module))
    if not layers:
        raise UserError("there is no layer to quantize: the network has no convolution and no linear layer")
    names = _names(module, layers)
    known = [name for group in names.values() for name in group]
    for pattern in (*select.include, *select.exclude, *select.signed):
        if not _match(pattern, known):
            close = difflib.get_close_matches(pattern, known, n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else "`*` stands for any text"
            raise UserError(f"no layer is called {pattern}; {hint}")
    obstacles = _obstacles(module, layers, order)
    ends = tuple(layers) if order is None else order
    replaced, left = [], []
    for name, layer in layers.items():
        reason = obstacles.get(name) or _deselected(names[name], layer, config, select, ends)
        if reason:
            left.append(Left(name, reason))
            if not isinstance(layer, QuantLayer):
                keep_full_precision(layer, reason)
            continue
        replaced.append(name)
        # A quantized class only adds quantizers, so that a layer becomes one without a copy; this also keeps
        # hooks and shared parameters.
        layer.__class__ = LAYERS[type(layer)]
        assert isinstance(layer, QuantLayer)
        if isinstance(layer, QuantConv2d):
            layer.padding_after_quant = config.padding_after_quant
        layer.signed_input = any(_match(pattern, names[name]) for pattern in select.signed)
        layer.quant_activation = nn.Identity()
        layer.quant_weight = nn.Identity()
        layer.quant_output = nn.Identity()
    return Report(tuple(replaced), tuple(left))


def full_precision(module: nn.Module) -> tuple[str, ...]:
    """The names of the layers that multiply by weights without any quantizer, in the order of definition."""
    return tuple(
        name
        for name, layer in _layers(module)
        if not (isinstance(layer, QuantLayer) and any(layer.quantizers()))
    )


def _layers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The convolutions, linear layers, attention modules and so on, which have weights to multiply by."""
    deformed = sys.modules.get(DEFORMED)
    kinds = (*WEIGHTED, *([deformed.DeformConv2d] if deformed else []))
    for name, layer in module.named_modules():
        if isinstance(layer, kinds):
            yield name, layer


def _names(module: nn.Module, layers: dict[str, nn.Module]) -> dict[str, list[str]]:
    """All names of each layer under the first of them, which is the one in `layers`."""
    first = {layer: name for name, layer in layers.items()}
    found: dict[str, list[str]] = {name: [] for name in layers}
    for name, layer in module.named_modules(remove_duplicate=False):
        if layer in first:
            found[first[layer]].append(name)
    return found


def _match(pattern: str, names: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names)


def _obstacles(
    module: nn.Module, layers: dict[str, nn.Module], order: Sequence[str] | None
) -> dict[str, str]:
    """Layers that cannot be quantized, and why, as the rest of a sentence about them."""
    found: dict[str, str] = {}
    for name, layer in layers.items():
        kind = type(layer)
        if isinstance(layer, nn.MultiheadAttention):
            found[name] = "projects its inputs by a parameter, not by a layer"
        elif isinstance(layer, QuantLayer):
            found[name] = "is quantized already"
        elif not isinstance(layer, nn.Conv2d | nn.Linear):
            found[name] = f"is a {kind.__name__}, which has no quantized form"
        elif isinstance(layer, LazyModuleMixin):
            found[name] = f"is a {kind.__name__}, which has no weights yet: run the network once before"
        elif parametrize.is_parametrized(layer):
            found[name] = "is parametrized, which has changed its class: quantize first, parametrize then"
        elif kind not in LAYERS:
            base = "Conv2d" if isinstance(layer, nn.Conv2d) else "Linear"
            found[name] = f"is a {kind.__name__}, whose forward may not be nn.{base}'s; see register_layer"
        elif "forward" in vars(layer):
            found[name] = "has had its forward replaced"
        elif order is not None and name not in order:
            found[name] = "is not called as a module"
    used = _used_without_a_call()
    for prefix, parent in module.named_modules():
        for kind, children in used.items():
            if isinstance(parent, kind):
                names = (f"{prefix}.{child}" if prefix else child for child in children)
                reason = f"is used by {kind.__name__} without a call"
                found |= {name: reason for name in names if name in layers}
    return found


def _deselected(
    names: Sequence[str], layer: nn.Module, config: QuantConfig, select: Selection, ends: Sequence[str]
) -> str:
    """Why a layer that can be quantized shall not be, the rest of a sentence about it; empty if it shall."""
    name = names[0]
    convolution = isinstance(layer, nn.Conv2d)
    excluded = next((pattern for pattern in select.exclude if _match(pattern, names)), None)
    if excluded is not None:
        return f"is excluded by {excluded}"
    if not any(_match(pattern, names) for pattern in select.include):
        return "is not included"
    if not (select.convolutions if convolution else select.linears):
        return f"is a {'convolution' if convolution else 'linear layer'}"
    if not config.first_last and name in (ends[0], ends[-1]):
        return f"is the {'first' if name == ends[0] else 'last'} layer"
    if convolution and not config.depthwise and 1 < layer.groups == layer.in_channels:
        return "is depth-wise"
    return ""
