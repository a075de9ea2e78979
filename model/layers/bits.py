"""Layers with bits of their own: the first and the last one of a network, and those of `--layer_bits`.

The bits are noted on the layers before `build_quantizers` builds the quantizers; docs/mixed.md has the rules.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from model.layers.attention import Projection, QuantProjection
from model.layers.called import SWIN
from model.layers.convolution import QuantConv1d, QuantConv2d, QuantConvolution
from model.layers.quantized import (
    AskedBits,
    AskedGroups,
    QuantLayer,
    QuantLinear,
    full_precision_reason,
)
from model.layers.weighted import weighted_layers
from model.selection import all_names, close_layers, matches
from utils.config.layer_bits import BOTH, FULL_BITS
from utils.config.schema import TAGS, QuantConfig
from utils.errors import UserError
from utils.text import printable, some_names

LAYERS: dict[type[nn.Module], type[QuantLayer]] = {
    nn.Conv1d: QuantConv1d,
    nn.Conv2d: QuantConv2d,
    nn.Linear: QuantLinear,
    NonDynamicallyQuantizableLinear: QuantLinear,  # of torch's attention; another class for an old tool's sake
    Projection: QuantProjection,
}
ENDS = ("first", "last")
# Reasons for full precision that an entry overcomes which writes the layer's name out.
BY_NAME = (*(f"is the {end} layer" for end in ENDS), "is depth-wise")
_MARK = "ends_of_network"  # attribute of a layer: the ends that it is


def forms() -> dict[type[nn.Module], type[QuantLayer]]:
    """The quantized class of each class of layers: `LAYERS`, users' too, and those of libraries that are imported."""
    found: dict[type[nn.Module], type[QuantLayer]] = {}
    if "timm.layers" in sys.modules:
        from model.layers import of_timm

        found |= of_timm.FORMS
    if SWIN in sys.modules:
        from model.layers import of_torchvision

        found |= of_torchvision.FORMS
    return found | LAYERS


def become_quantized(layer: nn.Module, config: QuantConfig) -> QuantLayer:
    """Turn a layer of a class of `forms` into a quantized one without quantizers, in place.

    A quantized class only adds quantizers, so that a layer becomes one without a copy; this also keeps hooks and
    shared parameters.
    """
    layer.__class__ = forms()[type(layer)]
    assert isinstance(layer, QuantLayer)
    if isinstance(layer, QuantConvolution):
        layer.padding_after_quant = config.padding_after_quant
    layer.quant_activation = nn.Identity()
    layer.quant_weight = nn.Identity()
    layer.quant_output = nn.Identity()
    vars(layer).pop("full_precision_reason", None)
    return layer


def mark_ends(layers: Mapping[str, nn.Module], order: Sequence[str]) -> None:
    """Note on the first and the last layer that they are; `order` are the names of layers as they run."""
    for layer in layers.values():
        vars(layer).pop(_MARK, None)
    for end, name in zip(ENDS, (order[0], order[-1]), strict=True):
        vars(layers[name])[_MARK] = (*ends_of(layers[name]), end)


def ends_of(layer: nn.Module) -> tuple[str, ...]:
    """Which ends of its network a layer is, as `mark_ends` noted: "first", "last", both or none."""
    return vars(layer).get(_MARK, ())


def asked_bits(
    config: QuantConfig, layer: nn.Module, names: Sequence[str], *, whole: bool
) -> dict[str, AskedBits]:
    """The bits that a layer has apart from those of its tags.

    Args:
        config: says them.
        layer: a layer, which `mark_ends` has seen.
        names: all its names.
        whole: it is in full precision otherwise, so that only entries of `layer_bits` that write its name out are
            for it.

    Returns:
        Tag -> bits, of enabled tags.

    Raises:
        UserError: an entry is for a tag that is not enabled.
    """
    enabled = [tag for tag in TAGS if getattr(config, tag).enable]
    found: dict[str, AskedBits] = {}
    for end in ends_of(layer):
        bits = getattr(config, f"{end}_bit")
        if bits is not None:
            whole = True
            found |= dict.fromkeys(enabled, AskedBits(bits, f"--{end}_bit {bits}"))
    for rule in config.layer_bits:
        if not rule.selects(names, whole=whole):
            continue
        for tag, bits in rule.bits.items():
            if tag not in (BOTH, *enabled) and bits != FULL_BITS:
                raise UserError(
                    f"{rule}: {tag}_bit: {TAGS[tag]}s are not quantized: add --{tag}_enable, or leave {tag}_bit out"
                )
            tags = [each for each in ("fm", "wt") if each in enabled] if tag == BOTH else [tag]
            found |= dict.fromkeys((each for each in tags if each in enabled), AskedBits(bits, str(rule)))
    return found


def asked_groups(config: QuantConfig, names: Sequence[str], *, whole: bool) -> dict[str, AskedGroups]:
    """The groups of channels that a layer has apart from those of its tags; arguments as of `asked_bits`.

    Raises:
        UserError: an entry is for a tag that is not enabled.
    """
    enabled = [tag for tag in TAGS if getattr(config, tag).enable]
    found: dict[str, AskedGroups] = {}
    for rule in config.layer_bits:
        if not rule.groups or not rule.selects(names, whole=whole):
            continue
        for tag, groups in rule.groups.items():
            if tag not in (BOTH, *enabled):
                raise UserError(
                    f"{rule}: {tag}_quant_group: {TAGS[tag]}s are not quantized: add --{tag}_enable, or leave "
                    f"{tag}_quant_group out"
                )
            tags = [each for each in ("fm", "wt") if each in enabled] if tag == BOTH else [tag]
            found |= dict.fromkeys(tags, AskedGroups(groups, str(rule)))
    return found


def single_settings(module: nn.Module, config: QuantConfig) -> dict[tuple[str, str, str], int | str | None]:
    """The bits and groups that single layers of a network, once its quantizers are built, would have.

    Returns:
        (layer, tag, "bits" or "groups") -> value; 32 bits are left out where the layer has no quantizer otherwise, and
        groups that are those of the tag.
    """
    layers = dict(weighted_layers(module))
    names, found = all_names(module, layers), dict[tuple[str, str, str], int | str | None]()
    for name, layer in layers.items():
        whole = not isinstance(layer, QuantLayer) or layer.named_whole
        asked = asked_bits(config, layer, names[name], whole=whole)
        if not whole or quantizes(asked):
            found |= {(name, tag, "bits"): one.bits for tag, one in asked.items()}
        if isinstance(layer, QuantLayer):
            for tag, one in asked_groups(config, names[name], whole=whole).items():
                groups = layer.group_count(tag, one.groups)
                if groups != layer.group_count(tag, getattr(config, tag).quant_group):
                    found[name, tag, "groups"] = groups
    return found


def quantizes(asked: Mapping[str, AskedBits]) -> bool:
    """Whether bits are not those of full precision alone."""
    return any(one.bits != FULL_BITS for one in asked.values())


def assign_bits(module: nn.Module, config: QuantConfig, only: Collection[str] | None = None) -> None:
    """Note the bits of single layers on them; layers in full precision that get some become quantized ones.

    Args:
        module: the network, before its quantizers are built; the order of definition says which layer is the first
            and which the last, unless `mark_ends` has.
        config: the quantizers.
        only: names of the layers that may get bits; default: all.

    Raises:
        UserError: a pattern selects no layer, or a layer cannot be quantized.
    """
    layers = dict(weighted_layers(module))
    if not layers or not config.enabled:
        return
    if not any(map(ends_of, layers.values())):
        mark_ends(layers, list(layers))
    own = all_names(module, layers)
    reached: dict[str, bool] = {}  # name -> whether a pattern must write it out
    fixed: dict[str, str] = {}  # name -> why it gets no bits even so
    for name, layer in layers.items():
        if only is not None and name not in only:
            reached[name] = True
            reason = "is quantized already" if isinstance(layer, QuantLayer) else full_precision_reason(layer)
            fixed |= {name: reason} if reason not in BY_NAME else {}
            _check_left(
                name,
                layer,
                asked_bits(config, layer, own[name], whole=True),
                asked_groups(config, own[name], whole=True),
            )
            continue
        given = any(getattr(config, f"{end}_bit") is not None for end in ends_of(layer))
        whole = given or not isinstance(layer, QuantLayer) or layer.named_whole
        reached[name] = whole
        asked = asked_bits(config, layer, own[name], whole=whole)
        groups = asked_groups(config, own[name], whole=whole)
        if not isinstance(layer, QuantLayer):
            if not quantizes(asked):
                _refuse_groups(name, groups)
                continue
            if type(layer) not in forms():
                source = next(one.source for one in asked.values())
                raise UserError(
                    f"{source}: {name} is a {type(layer).__name__}, which has no quantized form: leave it out"
                )
            become_quantized(layer, config).named_whole = True
        assert isinstance(layer, QuantLayer)
        layer.bits, layer.quant_groups = asked, groups
        layer.reads_images = "first" in ends_of(layer) and "fm" in asked
    for rule in config.layer_bits:
        for pattern in rule.names:
            _check_pattern(str(rule), pattern, own, reached, fixed)


def _check_left(
    name: str, layer: nn.Module, bits: Mapping[str, AskedBits], groups: Mapping[str, AskedGroups]
) -> None:
    """Refuse other bits and groups for a layer that has quantizers already, and groups for one that gets none."""
    if not isinstance(layer, QuantLayer):
        _refuse_groups(name, groups)
        return
    for noted, asked in ((layer.bits, bits), (layer.quant_groups, groups)):
        for tag, one in asked.items():
            if tag not in noted or noted[tag][0] != one[0]:
                raise UserError(f"{one.source}: {name} is quantized already: leave it out")


def _refuse_groups(name: str, groups: Mapping[str, AskedGroups]) -> None:
    for one in groups.values():
        raise UserError(f"{one.source}: {name} is in full precision: give it bits too, or leave it out")


def _check_pattern(
    rule: str,
    pattern: str,
    names: Mapping[str, Sequence[str]],
    whole: Mapping[str, bool],
    fixed: Mapping[str, str],
) -> None:
    """Refuse a pattern that selects no layer."""
    found = [name for name in names if matches(pattern, names[name]) or pattern in names[name]]
    if any(not whole[name] or pattern in names[name] for name in found):
        return
    shown = printable(pattern)
    if found and all(name in fixed for name in found):
        raise UserError(
            f"{rule}: {shown} selects no layer that can get bits: {found[0]} {fixed[found[0]]}: leave it out"
        )
    if found:
        found = [name for name in found if name not in fixed]
        raise UserError(
            f"{rule}: {shown} selects no quantized layer, only {some_names(found)}: write such a name out to give "
            "the layer bits"
        )
    known = [name for each in names.values() for name in each]
    raise UserError(f"{rule}: no layer is called {shown}{close_layers(pattern, known)}")
