"""Computing quantized inputs again in the backward pass, which then keeps none (`--recompute`)."""

from __future__ import annotations

from torch import nn

from model.layers.quantized import quantized_layers
from model.quantizers.frame import Quantizer
from utils.errors import UserError


def recompute_inputs(model: nn.Module) -> None:
    """Let every layer that quantizes its input compute it again in the backward pass.

    Raises:
        UserError: no layer can.
    """
    found = [
        (layer, layer.quant_activation)
        for _, layer in quantized_layers(model)
        if isinstance(layer.quant_activation, Quantizer)
    ]
    if not found:
        raise UserError(
            "--recompute: no layer quantizes its input; add --fm_enable, or leave --recompute out"
        )
    # A warm-up gathers too, until it is over.
    if all(quantizer.gathers() and not quantizer.calibrating for _, quantizer in found):
        method = found[0][1].config.method
        raise UserError(
            f"--recompute: the levels of {method} on inputs change with each training pass, which cannot be computed "
            "again; leave --recompute out"
        )
    for layer, _ in found:
        layer.recompute = True
