"""The audit: does a network multiply quantized values only, and do these have no more levels than their bits allow?"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from model.convert import full_precision
from model.layers.fused_attention import ActivationProducts
from model.layers.matmul import QuantMatmul
from model.layers.quantized import (
    QuantLayer,
    check_one_copy,
    full_precision_reason,
    kept_off,
    quantized_layers,
    quantizers,
)
from model.observe import ParameterProducts, Product, first_input, observing, within
from model.quantizers.frame import Quantizer
from model.watch.accumulators import Sums
from model.watch.cut_off import cut_off, holds_images, starts_at_zero
from model.watch.products import Products
from utils.config.checks import shown, unlike
from utils.config.schema import QuantConfig
from utils.report.audit_record import Audit, AuditRow, LayerRow

__all__ = ["audit", "full_precision_rows", "unexplained", "unquantized"]


class _Watch:
    """Collects the distinct values of one quantizer, per group, over batches."""

    def __init__(self) -> None:
        self.values: list[Tensor] = []
        self.changed = False
        self.exact = True
        self.finite = True
        self.elements = 0
        self.cut_off = torch.zeros(2, dtype=torch.float64)

    def __call__(self, module: Quantizer, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.changed = self.changed or not torch.equal(inputs[0], output)
        if not output.isfinite().all():  # no level's number
            self.finite = False
            self.values = self.values or [row[:1] for row in module.level_rows(output.detach())]
            return
        self._measure_cut_off(module, inputs[0])
        if type(module).encode is not Quantizer.encode:  # a user's own quantizer may know no integers
            expected = module.integers(inputs[0]).dequantize().to(output.dtype)
            self.exact = self.exact and torch.equal(output, expected)
        rows = module.level_rows(output.detach())
        if not self.values:
            self.values = [row.unique() for row in rows]
            return
        # Rows of samples (per-sample normalisation) are groups of their own in each batch.
        same = rows.shape[0] == len(self.values) and not module.levels_per_sample()
        old = self.values if same else [row[:0] for row in rows]
        fresh = [torch.cat([a, row.unique()]).unique() for a, row in zip(old, rows, strict=True)]
        self.values = fresh if same else [*self.values, *fresh]

    def _measure_cut_off(self, module: Quantizer, x: Tensor) -> None:
        """Take a mean over batches; weights, whose ranges are their own, are left out."""
        found = None if module.config.tag == "wt" else cut_off(module, x)
        if found is not None:
            self.elements += x.numel()
            self.cut_off += (found.cpu() - self.cut_off) * (x.numel() / self.elements)

    @property
    def seen(self) -> int:
        return max((len(values) for values in self.values), default=0)


class _Pixels:
    """Counts the values of the images that layers which read them cut off, since their levels start at zero.

    Attributes:
        images: the batch that runs.
        counts: layer -> values below zero, all values.
    """

    def __init__(self) -> None:
        self.images: object = None
        self.counts: dict[str, tuple[int, int]] = {}

    def look(self, name: str, layer: QuantLayer, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        """A hook before a quantized layer, `name`."""
        quantizer, images = layer.quant_activation, self.images
        if not (isinstance(images, Tensor) and isinstance(quantizer, Quantizer) and quantizer.enabled):
            return
        x = first_input(inputs, named)
        if starts_at_zero(quantizer) and holds_images(x, images):
            below, total = self.counts.get(name, (0, 0))
            self.counts[name] = (below + int((x < 0).sum()), total + x.numel())

    def share(self, quantizer: str) -> float:
        """The share of the images' values that a quantizer cuts off below zero."""
        below, total = self.counts.get(quantizer.removesuffix(".quant_activation"), (0, 1))
        return below / total


def unquantized(model: nn.Module, config: QuantConfig) -> list[str]:
    """Names of the quantizers that `config` asks for in quantized layers and that are not there.

    Example:
        >>> from torch import nn
        >>> from model.audit import unquantized
        >>> from model.quant import QuantConfig, QuantLinear, QuantizerConfig
        >>> wt = QuantizerConfig(tag="wt", enable=True, method="lsq", levels=4)
        >>> unquantized(nn.Sequential(QuantLinear(4, 2)), QuantConfig(wt=wt))
        ['0.quant_weight']
    """
    return [
        f"{name}.{part}"
        for name, layer in model.named_modules()
        if isinstance(layer, QuantLayer)
        for part, tag in layer.parts.items()
        if getattr(config, tag).enable
        and not (isinstance(getattr(layer, part), Quantizer) or layer.left_full(tag))
    ]


def audit(model: nn.Module, batches: Iterable[Tensor], config: QuantConfig | None = None) -> Audit:
    """Run batches through the network, count the levels of every quantizer, and look at what layers multiply.

    In a quantized network whatever multiplies by its parameters without a quantizer fails, a module of any class,
    unless it was left so on purpose: by `model.convert`, by `model.layers.factory`, or with
    `model.quant.keep_full_precision`. Where `config.attention_matmul` asks for it, the same holds for products of two
    activations. Convolutions and matrix products are seen as they run
    (`model.observe.ParameterProducts`).

    Args:
        model: the network; runs in evaluation mode and without gradients, and is left as it was.
        batches: inputs of the network, each a tensor [N, 3, S, S] for a classifier.
        config: a quantizer that it asks for in a quantized layer and that is not there counts as never reached.

    Returns:
        A row for each quantizer and each layer that stands out; `problems` is empty where the audit passes.

    Raises:
        TypeError: an argument is of the wrong type, such as one tensor instead of a list of batches, or a batch of
            images and labels.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from model.audit import audit
        >>> from model.convert import quantize
        >>> from model.quant import QuantConfig, QuantizerConfig
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 2, 3))
        >>> wt = QuantizerConfig(tag="wt", enable=True, method="lsq", levels=4)
        >>> config = QuantConfig(wt=wt)
        >>> _ = quantize(network, config)
        >>> images = torch.rand(2, 3, 8, 8)
        >>> audit(network, [images], config).verdict
        'passed: 1 quantizers within their levels'
        >>> network[2] = nn.Conv2d(4, 10, 3)  # another last layer, which nobody quantized and nobody left on purpose
        >>> audit(network, [images], config).verdict
        'FAILED: 1 layer'
    """
    _check_arguments(model, batches, config)
    found = dict(quantizers(model))
    reasons = {
        name: full_precision_reason(module) if kept_off(module) else "" for name, module in found.items()
    }
    watches = {name: _Watch() for name in found}
    matmuls = config is not None and config.quantizes_matmuls
    products, of_parameters = Products(), ActivationProducts(model) if matmuls else ParameterProducts(model)
    sums, pixels = Sums(), _Pixels()

    def is_constant(module: Quantizer, inputs: object, output: Tensor) -> None:
        if module.enabled:
            of_parameters.forget(output)

    with observing(model) as hooks:
        summed = [
            layer.register_forward_pre_hook(partial(sums, name), with_kwargs=True)
            for name, layer in quantized_layers(model)
        ]
        hooks += summed
        if isinstance(of_parameters, ActivationProducts):
            hooks += of_parameters.watch()
        hooks += [module.register_forward_hook(is_constant) for module in found.values()]
        hooks += [
            module.register_forward_hook(watches[name]) for name, module in found.items() if not reasons[name]
        ]
        for name, layer in quantized_layers(model):
            hooks.append(layer.register_forward_pre_hook(partial(pixels.look, name), with_kwargs=True))
            hooks.append(layer.register_forward_pre_hook(products.enter_layer, with_kwargs=True))
            hooks.append(layer.register_forward_hook(partial(products.leave_layer, name), with_kwargs=True))
            for part, quantizer in layer.quantizers():
                hooks.append(quantizer.register_forward_pre_hook(products.enter_quantizer))
                hooks.append(quantizer.register_forward_hook(partial(products.leave_quantizer, part)))
        for images in batches:  # a loader's own operators are none of the network's
            _check_batch(images)
            pixels.images = images
            with products, of_parameters:
                model(images)
            for hook in summed:  # one batch tells
                hook.remove()
        rows = [
            AuditRow(
                name=name,
                allowed=module.levels,
                seen=watches[name].seen,
                changed=watches[name].changed,
                exact=watches[name].exact,
                finite=watches[name].finite,
                warming=bool(module.warming_up()),
                reason=reasons[name],
                below=float(watches[name].cut_off[0]),
                above=float(watches[name].cut_off[1]),
                pixels=pixels.share(name),
            )
            for name, module in found.items()
        ]
    missing = [] if config is None else unquantized(model, config)
    rows += [AuditRow(name=name, allowed=0, seen=0) for name in missing]
    layers = [LayerRow(name=name, problem=problem) for name, problem in products.problems.items()]
    if config is not None and config.enabled and not rows:
        layers.append(
            LayerRow(name="the network", problem="has no quantizer, though its configuration enables some")
        )
    if isinstance(of_parameters, ActivationProducts):
        layers += _matmul_rows(model, of_parameters.others)
    left = full_precision_rows(model) if rows else ()
    known = {row.name for row in left} | {name for name, _ in quantized_layers(model)}
    if rows:
        layers += _unknown_rows(of_parameters.found, known)
    return Audit(tuple(rows), (*left, *layers), tuple(sums.rows.values()))


def _matmul_rows(model: nn.Module, others: Iterable[str]) -> list[LayerRow]:
    """A row with a problem for each module that multiplies activations in full precision, or for there being none."""
    problem = "multiplies two activations in full precision, and attention_matmul asks for quantized ones"
    rows = [
        LayerRow(name=name or "the network", problem=problem)
        for name in others
        if not any(full_precision_reason(model.get_submodule(each)) for each in within(name))
    ]
    if not rows and not any(isinstance(each, QuantMatmul) for each in model.modules()):
        problem = "has no attention with quantized products, and attention_matmul asks for them"
        rows.append(LayerRow(name="the network", problem=problem))
    return rows


def _unknown_rows(found: Mapping[str, Product], known: Collection[str]) -> list[LayerRow]:
    """A row with a problem for each module that multiplies by its parameters and is in no other row."""
    return [
        LayerRow(
            name=owner or "the network",
            problem=f"multiplies by {', '.join(product.parameters)} ({product.weights:,} weights) in full precision, "
            "and no model.quant.keep_full_precision(module, reason) says that it should",
        )
        for owner, product in found.items()
        if not any(name in known for name in within(owner))
    ]


def _check_arguments(model: object, batches: object, config: object) -> None:
    """Refuse arguments of `audit` that are of the wrong type, and say what to write."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"audit: model is {shown(model)}: give the network, a torch.nn.Module")
    check_one_copy(model)
    if isinstance(batches, Tensor):
        raise TypeError("audit: batches is one tensor: write a list of batches, [images]")
    if not isinstance(batches, Iterable):
        raise TypeError(f"audit: batches is {shown(batches)}: write a list of batches, [images]")
    if config is not None and not isinstance(config, QuantConfig):
        raise TypeError(
            f"audit: config is {unlike(config, QuantConfig)}: give the QuantConfig of the network, or leave it out"
        )


def _check_batch(batch: Any) -> None:
    """Refuse a batch that a loader made of images and labels; a detector may take a list of images."""
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        return
    images, labels = batch
    if isinstance(images, Tensor) and isinstance(labels, Tensor) and not labels.is_floating_point():
        raise TypeError(
            "audit: a batch has images and labels: write (images for images, labels in batches), without labels"
        )


def full_precision_rows(model: nn.Module) -> tuple[LayerRow, ...]:
    """A row for each layer without quantizers that multiplies; it has a problem unless `keep_full_precision` noted it.

    Example:
        >>> from torch import nn
        >>> from model.audit import full_precision_rows
        >>> from model.quant import keep_full_precision
        >>> network = nn.Sequential(keep_full_precision(nn.Linear(4, 4), "is the first layer"), nn.Linear(4, 2))
        >>> [(row.name, bool(row.problem)) for row in full_precision_rows(network)]
        [('0', False), ('1', True)]
    """
    off = {name for name, _ in quantized_layers(model)}  # their quantizers have rows of their own
    reasons = {
        name: full_precision_reason(model.get_submodule(name))
        for name in full_precision(model)
        if name not in off
    }
    problem = "computes in full precision, and no model.quant.keep_full_precision(layer, reason) says that it should"
    return tuple(
        LayerRow(name=name, reason=reason, problem="" if reason else problem)
        for name, reason in reasons.items()
    )


def unexplained(model: nn.Module) -> tuple[str, ...]:
    """The problems that an audit of a quantized network will report and that show without data, a line for each.

    Example:
        >>> from torch import nn
        >>> from model.audit import unexplained
        >>> from model.convert import quantize
        >>> from model.quant import QuantConfig, QuantizerConfig
        >>> network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
        >>> wt = QuantizerConfig(tag="wt", enable=True, method="lsq", levels=4)
        >>> _ = quantize(network, QuantConfig(wt=wt))
        >>> unexplained(network)
        ()
        >>> network[2] = nn.Linear(4, 10)
        >>> [line[:31] for line in unexplained(network)]
        ['2 computes in full precision, a']
    """
    rows = full_precision_rows(model) if any(True for _ in quantizers(model)) else ()
    return tuple(f"{row.name} {row.problem}; the audit fails" for row in rows if row.problem)
