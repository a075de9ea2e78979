"""Initialise quantizer parameters from loaded weights and real images (`--re_init`)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from model.observe import observing
from model.quant import Quantizer, quantized_layers


def initialise_ranges(model: nn.Module, images: Tensor) -> int:
    """Initialise every quantizer from what it will quantize; returns how many of them learn a range.

    Weights are taken as they are; activations and outputs are those of one pass of `images`
    [N, 3, S, S], in the order they are reached, so that each sees its predecessors quantized (unless a
    warm-up, `--stable`, lets them pass). Batch norms normalise by this batch, as they will in training:
    running statistics of a full-precision network do not fit quantized weights of another scale, and
    ranges found behind them can be wrong by orders of magnitude. The network's modes are restored and
    its norms keep their statistics.
    """
    count = 0
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    statistics = [{name: value.clone() for name, value in norm.named_buffers()} for norm in norms]
    with observing(model) as hooks:
        for _, layer in quantized_layers(model):
            for part, quantizer in layer.quantizers():
                count += type(quantizer).initialise_from is not Quantizer.initialise_from
                if part == "quant_weight":
                    quantizer.initialise_from(layer.weight)
                else:
                    hooks.append(quantizer.register_forward_pre_hook(_initialise))
        for norm in norms:
            norm.train()
        model(images)
        for norm, saved in zip(norms, statistics, strict=True):
            for name, value in norm.named_buffers():
                value.copy_(saved[name])
    return count


def _initialise(module: Quantizer, inputs: tuple[Tensor, ...]) -> None:
    module.initialise_from(inputs[0])
