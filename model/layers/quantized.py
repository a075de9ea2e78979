"""What quantized layers share, the quantized linear layer, and finding them in a network."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from model.layers.asked import AskedBits, AskedGroups, with_bits, with_groups
from model.quantizers.frame import Quantizer
from model.quantizers.kernels import in_processes
from model.quantizers.registry import build_quantizer
from model.quantizers.site import LayerSite, group_count
from utils.config.checks import shown
from utils.config.layer_bits import FULL_BITS
from utils.config.schema import QuantConfig, QuantizerConfig, Rule
from utils.errors import UserError


class QuantLayer(nn.Module):
    """The base of quantized layers: their quantizers (`parts`), each `nn.Identity` until `build_quantizers`.

    Those of input, weight and output, but for a product of two activations (`model.layers.matmul`): those of both.

    Attributes:
        parts: the names of the quantizers -> their tags.
        weight: float32 [out, ...], as in the layer's full-precision class.
        quant_activation: quantizes the input.
        quant_weight: quantizes `weight`.
        quant_output: quantizes the output.
        signed_input: the input goes below zero, so that its levels are symmetric whatever the configuration says.
        bits: tag -> the bits of its quantizer where they are not those of the tag (`model.layers.bits`).
        quant_groups: tag -> the groups of its quantizer, likewise.
        reads_images: it is the first layer and its input has bits of its own: levels are signed, around a zero.
        named_whole: only an entry of `--layer_bits` that writes its name out is for it.
        own_signs: whether its levels start at zero is the layer's matter, and no policy changes it.
        weight_is_whole: `weight` is what the layer multiplies by already, and nothing is computed from it.
        recompute: keep no quantized input for the backward pass, but compute it again there from the input.

    Example:
        >>> from torch import nn
        >>> from model.quant import QuantConv2d, QuantLayer
        >>> network = nn.Sequential(QuantConv2d(3, 4, 3), nn.ReLU())
        >>> [isinstance(layer, QuantLayer) for layer in network]
        [True, False]
    """

    parts: ClassVar[Mapping[str, str]] = MappingProxyType(
        {"quant_activation": "fm", "quant_weight": "wt", "quant_output": "ot"}
    )
    weight: nn.Parameter
    bias: nn.Parameter | None
    quant_activation: nn.Module
    quant_weight: nn.Module
    quant_output: nn.Module
    signed_input: bool = False
    bits: Mapping[str, AskedBits] = MappingProxyType({})
    quant_groups: Mapping[str, AskedGroups] = MappingProxyType({})
    reads_images: bool = False
    named_whole: bool = False
    own_signs: ClassVar[bool] = False
    weight_is_whole: bool = False
    recompute: bool = False

    def build_quantizers(self, config: QuantConfig, name: str) -> None:
        """Create the quantizers of this layer, which messages call `name`."""
        for part, tag in self.parts.items():
            settings: QuantizerConfig = getattr(config, tag)
            site, groups = self._site(tag, name), self.quant_groups.get(tag)
            if groups is not None and settings.enable and not self.left_full(tag):
                settings = with_groups(settings, groups, site)
            given = settings
            if tag == "fm" and (self.signed_input or self.reads_images):
                settings = dataclasses.replace(settings, half_range=False)
            asked = self.bits.get(tag)
            if asked is not None:
                settings = with_bits(settings, asked, images=tag == "fm" and self.reads_images, name=name)
            try:
                setattr(self, part, build_quantizer(settings, site))
            except UserError as error:
                if asked is not None:
                    raise UserError(f"{asked.source}: {name}: {error}") from error
                if settings is given:
                    raise
                raise UserError(
                    f"{name} has symmetric levels, since its input goes below zero: {error}"
                ) from error
        off = [asked.source for tag, asked in self.bits.items() if self.left_full(tag)]
        if off and not any(True for _ in self.quantizers()):
            keep_full_precision(self, f"has {FULL_BITS} bits, {off[-1]}")

    def weight_entry(self, name: str) -> str:
        """The name of `weight` in the state of a network that calls the layer `name`."""
        return f"{name}.weight" if name else "weight"

    def full_weight(self) -> Tensor:
        """What `quant_weight` quantizes: `weight`, or in some layers a tensor of its shape that is computed from it."""
        return self.weight

    def computes_weight(self) -> bool:
        """Whether `full_weight` is not `weight` itself."""
        return False

    def _site(self, tag: str, name: str) -> LayerSite:
        raise NotImplementedError

    def group_count(self, tag: str, requested: int | None) -> int | None:
        """The number of groups of a tag's channels; None or 0 requests the default. None: they cannot be divided so."""
        channels = self._site(tag, "").channels
        return group_count(requested or (channels if tag == "wt" else 1), channels)

    def quantizers(self) -> Iterator[tuple[str, Quantizer]]:
        """The quantizers of the layer that are not the identity, with their attribute names."""
        for part in self.parts:
            quantizer = getattr(self, part)
            if isinstance(quantizer, Quantizer):
                yield part, quantizer

    def left_full(self, tag: str) -> bool:
        """Whether its bits of its own leave a tag in full precision."""
        return tag in self.bits and self.bits[tag].bits == FULL_BITS

    def has_own_bits(self, tag: str) -> bool:
        """Whether the bits of a tag are this layer's alone, those of an option for single layers."""
        return self.named_whole or tag in self.bits

    def multiply(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, quantize: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """`quantize` the input, padded where that comes first, and multiply it with the quantized weight."""
        raise NotImplementedError

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None, **more: Any) -> Tensor:
        """Quantize the input and multiply it with the quantized weight; `more`: further arguments of `multiply`."""
        return self.multiply(x, weight, bias, self.quant_activation, **more)

    def product_of(self, x: Tensor, weight: Tensor, bias: Tensor | None, **more: Any) -> Tensor:
        """`product`, of which nothing but its arguments is kept where the layer is to `recompute` it.

        The whole is kept while a pass of the quantizer depends on the passes before it.

        Raises:
            UserError: in the backward pass, where `x` has been changed in place.
        """
        quantizer = self.quant_activation
        if not (
            self.recompute and self.training and isinstance(quantizer, Quantizer) and quantizer.repeats()
        ):
            return self.product(x, weight, bias, **more)
        y = checkpoint(self.product, x, weight, bias, use_reentrant=False, **more)
        held, version = [x.detach()], x._version  # which shares the counter of changes, but has no graph

        def check(_: Tensor) -> None:
            if held and held.pop()._version != version:
                raise UserError(
                    f"--recompute: {quantizer.site.name}: its input is changed in place after the layer has read it, "
                    "and cannot be quantized again: change a copy (x = x + y instead of x += y), or leave --recompute "
                    "out if the network trains without it"
                )

        if y.requires_grad:
            y.register_hook(check)  # before torch finds the same, whose message does not name the layer
        return y

    def check_empty(self) -> None:
        """Check that an empty input may pass without the quantizers.

        Raises:
            ValueError: in distributed training, where other processes would wait forever for the statistics of
                this one.
        """
        if not self.training or not in_processes() or torch.distributed.get_world_size() == 1:
            return
        for part, quantizer in self.quantizers():
            if part != "quant_weight" and quantizer.gathers():
                raise ValueError(
                    f"{quantizer.site.name}: an empty input on this process, while others wait for the statistics that "
                    f"its {part} ({quantizer.config.method}) gathers; give each process something in every step"
                )


class QuantLinear(QuantLayer, nn.Linear):
    """`nn.Linear` with quantizers on its input, weight and output; of an empty input only the weight is quantized.

    Example:
        >>> import torch
        >>> from model.quant import QuantConfig, QuantizerConfig, QuantLinear
        >>> fm = QuantizerConfig(tag="fm", enable=True, method="dorefa", levels=4, half_range=True)
        >>> layer = QuantLinear(4, 2)
        >>> layer.build_quantizers(QuantConfig(fm=fm), "fc")
        >>> layer.quant_activation(torch.tensor([[-1.0, 0.3, 0.6, 2.0]]))
        tensor([[0.0000, 0.3333, 0.6667, 1.0000]])
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.quant_activation = self.quant_weight = self.quant_output = nn.Identity()

    def _site(self, tag: str, name: str) -> LayerSite:
        fan = self.in_features
        if tag == "fm":
            return LayerSite(name=name, channels=self.in_features, channel_dim=-1, ndim=2, fan=fan)
        dim = 0 if tag == "wt" else -1
        return LayerSite(name=name, channels=self.out_features, channel_dim=dim, ndim=2, fan=fan)

    def forward(self, input: Tensor) -> Tensor:
        """Input [..., in], output [..., out], as `nn.Linear`."""
        x = input
        if x.ndim == 1:
            return QuantLinear.forward(self, x.unsqueeze(0)).squeeze(0)
        return self.quantized(x)

    def quantized(self, x: Tensor, **more: Any) -> Tensor:
        """`forward` of an input with two dimensions or more; `more`: further arguments of `multiply`."""
        weight = self.quant_weight(self.full_weight())
        if x.numel() == 0:
            self.check_empty()
            return self.multiply(x, weight, self.bias, lambda empty: empty, **more)
        return self.quant_output(self.product_of(x, weight, self.bias, **more))

    def multiply(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, quantize: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """See `QuantLayer`."""
        return functional.linear(quantize(x), weight, bias)


BASES = (nn.Conv1d, nn.Conv2d, nn.Linear)  # the classes of torch whose layers have a quantized form

Module = TypeVar("Module", bound=nn.Module)


def keep_full_precision(layer: Module, reason: str) -> Module:
    """Record on a convolution or linear layer that it computes in full precision on purpose.

    The audit of a quantized network fails for a full-precision layer without such a record.

    Args:
        layer: any layer, or a quantizer that is switched off.
        reason: the rest of a sentence about it: "is the last layer".

    Returns:
        The layer itself.

    Raises:
        TypeError: `layer` is no module.
        ValueError: `reason` is empty or no string.

    Example:
        >>> from torch import nn
        >>> from model.quant import full_precision_reason, keep_full_precision
        >>> head = keep_full_precision(nn.Linear(4, 2), "is the last layer")
        >>> full_precision_reason(head)
        'is the last layer'
    """
    if not isinstance(layer, nn.Module):
        raise TypeError(
            f"keep_full_precision: layer is {shown(layer)}: give the layer itself, a torch.nn.Module"
        )
    if not isinstance(reason, str) or not reason.strip():
        raise ValueError(
            f'keep_full_precision: reason is {shown(reason)}: write why, as in "is the last layer"'
        )
    vars(layer)["full_precision_reason"] = reason
    return layer


def full_precision_reason(layer: nn.Module) -> str:
    """The reason that `keep_full_precision` recorded on a layer or a quantizer; empty where there is none.

    Example:
        >>> from torch import nn
        >>> from model.quant import full_precision_reason
        >>> full_precision_reason(nn.Linear(4, 2))
        ''
    """
    return vars(layer).get("full_precision_reason", "")


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, QuantLayer]]:
    """Every layer of a network that has a quantizer, with its name.

    Example:
        >>> from torch import nn
        >>> from model.convert import quantize
        >>> from model.quant import QuantConfig, QuantizerConfig, quantized_layers
        >>> network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
        >>> wt = QuantizerConfig(tag="wt", enable=True, method="lsq", levels=4)
        >>> _ = quantize(network, QuantConfig(wt=wt))
        >>> [name for name, layer in quantized_layers(network)]
        ['1']
    """
    for name, module in model.named_modules():
        if isinstance(module, QuantLayer) and any(True for _ in module.quantizers()):
            yield name, module


def quantized_weights(model: nn.Module) -> Iterator[tuple[str, QuantLayer, Quantizer]]:
    """Every layer whose weight is quantized, with its name and the quantizer of its weight.

    A quantizer that is turned off, as a policy may do, does not count.

    Example:
        >>> from torch import nn
        >>> from model.convert import quantize
        >>> from model.quant import QuantConfig, QuantizerConfig, quantized_weights
        >>> network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
        >>> wt = QuantizerConfig(tag="wt", enable=True, method="lsq", levels=4)
        >>> _ = quantize(network, QuantConfig(wt=wt))
        >>> for name, layer, quantizer in quantized_weights(network):
        ...     print(name, quantizer(layer.weight).shape, quantizer.levels)
        1 torch.Size([4, 4]) 4
    """
    for name, layer in quantized_layers(model):
        if isinstance(layer.quant_weight, Quantizer) and layer.quant_weight.enabled:
            yield name, layer, layer.quant_weight


def kept_off(quantizer: Quantizer) -> bool:
    """Whether a quantizer is switched off on purpose, as `keep_full_precision` has recorded on it.

    Example:
        >>> from torch import nn
        >>> from model.convert import quantize
        >>> from model.layers.quantized import kept_off
        >>> from model.quant import QuantConfig, QuantizerConfig, keep_full_precision
        >>> network = nn.Sequential(nn.Linear(4, 4))
        >>> wt = QuantizerConfig(tag="wt", enable=True, method="lsq", levels=4)
        >>> _ = quantize(network, QuantConfig(wt=wt, first_last=True))
        >>> quantizer = keep_full_precision(network[0].quant_weight, "is compared with")
        >>> quantizer.enabled = False
        >>> kept_off(quantizer)
        True
    """
    return not quantizer.enabled and bool(full_precision_reason(quantizer))


def quantizers(model: nn.Module) -> Iterator[tuple[str, Quantizer]]:
    """Every quantizer of a network, with its name.

    Example:
        >>> from torch import nn
        >>> from model.convert import quantize
        >>> from model.quant import QuantConfig, QuantizerConfig, quantizers
        >>> network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
        >>> parts = {tag: QuantizerConfig(tag=tag, enable=True, method="lsq", levels=4) for tag in ("fm", "wt")}
        >>> _ = quantize(network, QuantConfig(**parts))
        >>> [name for name, quantizer in quantizers(network)]
        ['1.quant_activation', '1.quant_weight']
    """
    for name, module in model.named_modules():
        if isinstance(module, Quantizer):
            yield name, module


def selected(rule: Rule, model: nn.Module) -> list[tuple[str, Quantizer]]:
    """The quantizers that a policy's rule selects, with their names; none where it selects nothing.

    Numbers of levels reach quantizers with bits of their own only by the layer's name, written out, or its index.
    `half_range` passes over layers that have signs of their own.
    """
    return [
        (f"{name}.{part}", quantizer)
        for number, (name, layer) in enumerate(quantized_layers(model))
        if (not rule.index or number in rule.index) and (fnmatchcase(name, rule.name) or name == rule.name)
        for part, quantizer in layer.quantizers()
        for tag in [layer.parts[part]]
        if rule.tag in ("", tag)
        if "level_num" not in rule.values or rule.index or name == rule.name or not layer.has_own_bits(tag)
        if "half_range" not in rule.values or not layer.own_signs
    ]


def check_one_copy(model: nn.Module) -> None:
    """Refuse, with a `TypeError`, a network with quantizers of another copy of this package, which nothing here sees.

    A process has two copies where it imports both the repository's modules and those of the installed package.
    """
    for name, module in model.named_modules():
        for kind in type(module).__mro__:
            same = kind.__name__ == "Quantizer" and kind.__module__.endswith("model.quantizers.frame")
            if same and kind is not Quantizer:
                raise TypeError(
                    f"{name} is a quantizer of {kind.__module__}, another copy of {Quantizer.__module__}: import "
                    "both from one package"
                )
