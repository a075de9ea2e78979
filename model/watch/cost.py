"""Counts the cost of a network by running it once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from model.layers.matmul import QuantMatmul
from model.layers.quantized import BASES, QuantLayer, quantizers
from model.observe import ParameterProducts, Product, first_input, observing, within
from model.quantizers.frame import Quantizer
from utils.config.image_size import InputSize, sides
from utils.config.layer_bits import FULL_BITS
from utils.config.schema import QuantizerConfig
from utils.report.cost_record import TERNARY, Cost, LayerCost, MatmulCost, stored_bits


def describe_quantizer(quantizer: nn.Module | None) -> tuple[str, int]:
    """A quantizer in words, and its bits; ("", 32) for the identity, none or one that is switched off."""
    if not isinstance(quantizer, Quantizer) or not quantizer.enabled:
        return "", FULL_BITS
    bits = stored_bits(quantizer.levels)
    width = "ternary" if quantizer.levels == TERNARY else f"{bits} bit"
    return f"{quantizer.config.method} {width}, {quantizer.levels} levels, {quantizer.groups} gr.", bits


def network_cost(model: nn.Module, input_size: InputSize, channels: int = 3) -> Cost:
    """Run one black image of this size and number of channels through `model` and count; its mode is restored.

    Modules of any other class that multiply by parameters of their own are counted by the operators that run.

    Of quantizers with equal options only the first one runs, to check that it can; the others, which would take
    most of the time, pass their input on.
    """
    called: dict[str, LayerCost] = {}
    # Before most of them are switched off for the run.
    described = {quantizer: describe_quantizer(quantizer) for _, quantizer in quantizers(model)}

    levels: dict[nn.Module, int] = {one: one.levels for one in described if one.enabled}

    def describe(quantizer: nn.Module | None) -> tuple[str, int]:
        return described[quantizer] if isinstance(quantizer, Quantizer) else describe_quantizer(quantizer)

    def count(
        name: str,
        module: nn.Conv1d | nn.Conv2d | nn.Linear,
        inputs: tuple[Any, ...],
        named: dict[str, Any],
        output: Tensor,
    ) -> None:
        quantized = isinstance(module, QuantLayer)
        weight, weight_bits = describe(module.quant_weight if quantized else None)
        activation, bits = describe(module.quant_activation if quantized else None)
        result, _ = describe(module.quant_output if quantized else None)
        before = called[name].macs if name in called else 0  # of a layer that runs several times
        called[name] = LayerCost(
            name=name,
            kind=_kind(module),
            output=tuple(output.shape[1:]),
            weights=module.weight.numel(),
            # Every output value takes one product per weight of its output channel.
            macs=before + output.numel() * module.weight[0].numel(),  # windows may be its first dimension
            weight=weight,
            activation=activation,
            weight_bits=weight_bits,
            activation_bits=bits,
            result=result,
            weight_levels=levels.get(module.quant_weight) if quantized else None,
            activation_levels=levels.get(module.quant_activation) if quantized else None,
            inputs=first_input(inputs, named)[0].numel(),
        )

    matmuls: dict[QuantMatmul, MatmulCost] = {}

    def count_matmul(module: QuantMatmul, factors: tuple[Tensor, ...], output: Tensor) -> None:
        kind, bits = describe(module.quant_left)
        if kind:
            before = matmuls[module].macs if module in matmuls else 0
            macs = before + output.numel() * factors[0].shape[-1]
            matmuls[module] = MatmulCost(kind=kind, macs=macs, bits=bits)

    parameter = next(model.parameters())
    image = torch.zeros(1, channels, *sides(input_size), device=parameter.device, dtype=parameter.dtype)
    with one_of_a_kind(model), observing(model) as hooks, ParameterProducts(model) as products:
        hooks += [
            module.register_forward_hook(partial(count, name), with_kwargs=True)
            for name, module in model.named_modules()
            if isinstance(module, BASES)
        ]
        hooks += [
            module.register_forward_hook(count_matmul)
            for module in model.modules()
            if isinstance(module, QuantMatmul)
        ]
        model(image)
    layers: dict[str, LayerCost] = {}  # in the order they run
    for owner, product in products.found.items():
        name = next((name for name in within(owner) if name in called), owner)
        layers[name] = called.get(name) or _other_cost(owner, model.get_submodule(owner), product)
    return Cost(
        layers=tuple((layers | called).values()),
        parameters=sum(p.numel() for p in model.parameters()),
        matmuls=tuple(matmuls.values()),
    )


def _other_cost(name: str, module: nn.Module, product: Product) -> LayerCost:
    """The cost of a module that multiplies by its parameters without being a layer that is called."""
    shapes = ", ".join("x".join(map(str, shape)) for shape in product.shapes)
    return LayerCost(
        name=name or "the network",
        kind=_kind(module) if isinstance(module, BASES) else f"{type(module).__name__} {shapes}",
        output=product.output[1:],
        weights=product.weights,
        macs=product.macs,
        weight="",
        activation="",
        weight_bits=FULL_BITS,
        activation_bits=FULL_BITS,
    )


@contextmanager
def one_of_a_kind(model: nn.Module) -> Iterator[None]:
    """For a while, use one thread and only one of several quantizers with equal options.

    One image is too little work to share: on a busy machine, threads take many times as long waiting for each other.
    """
    threads = torch.get_num_threads()
    kinds: list[QuantizerConfig] = []
    repeated: list[Quantizer] = []
    for _, quantizer in quantizers(model):
        if not quantizer.enabled:
            continue
        if quantizer.config not in kinds:
            kinds.append(quantizer.config)
        else:
            repeated.append(quantizer)
    try:
        torch.set_num_threads(1)
        for quantizer in repeated:
            quantizer.enabled = False
        yield
    finally:
        torch.set_num_threads(threads)
        for quantizer in repeated:
            quantizer.enabled = True


def _kind(module: nn.Conv1d | nn.Conv2d | nn.Linear) -> str:
    if isinstance(module, nn.Linear):
        return f"linear {module.in_features}-{module.out_features}"
    kernel = "x".join(map(str, module.kernel_size))
    stride = f"/{module.stride[0]}" if module.stride[0] != 1 else ""
    groups = f" g{module.groups}" if module.groups != 1 else ""
    return f"conv {kernel}{stride} {module.in_channels}-{module.out_channels}{groups}"
