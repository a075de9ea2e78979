"""A penalty on the distance of weights from their levels (`--quant_loss`)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.layers.quantized import quantized_weights
from model.quantizers.numbered import numbered


def quantization_error(model: nn.Module) -> Tensor:
    """Mean over layers of sum (q - w)^2 / sum w^2, w the weights and q their levels; float32 [].

    Its gradient pulls each weight to its level: q and sum w^2 count as constants, since the straight-through
    gradient of q would cancel that of w. Learned clip values get the gradient of the same error through q with
    constant w (`Quantizer.range_error`), which leads to the range of least squared error. The caller must refuse
    quantizers whose levels are values of another kind than the weights.
    """
    errors = []
    for _, layer, quantizer in quantized_weights(model):
        weight = layer.full_weight().float()
        fixed = weight.detach()
        size = fixed.square().sum().clamp_min(torch.finfo(torch.float32).tiny)
        numbers, level_of = numbered(quantizer, fixed)
        error = (weight - level_of(numbers)).square().sum()
        learned = quantizer.range_error(fixed)
        if learned is not None:
            error = error + learned
        errors.append(quantizer.warmed_up().squeeze() * error / size)
    if not errors:  # a policy may have turned all of them off
        return torch.zeros(())
    return torch.stack(errors).mean()
