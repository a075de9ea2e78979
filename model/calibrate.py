"""Initialise quantizer parameters from loaded weights and real images (`--re_init`)."""

from __future__ import annotations

from torch import Tensor, nn

from model.observe import observing
from model.quant import Quantizer, quantized_layers


def initialise_ranges(model: nn.Module, images: Tensor) -> int:
    """Initialise every quantizer from what it will quantize; returns how many there are.

    Weights are taken as they are; activations and outputs are those of one pass of `images`
    [N, 3, S, S], in the order they are reached, so that each sees its predecessors quantized (unless a warm-up, `--stable`, lets them pass).
    The network's mode is restored; its norms keep their statistics.
    """
    count = 0
    with observing(model) as hooks:
        for _, layer in quantized_layers(model):
            for part, quantizer in layer.quantizers():
                count += 1
                if part == "quant_weight":
                    quantizer.initialise_from(layer.weight)
                else:
                    hooks.append(quantizer.register_forward_pre_hook(_initialise))
        model(images)
    return count


def _initialise(module: Quantizer, inputs: tuple[Tensor, ...]) -> None:
    module.initialise_from(inputs[0])
