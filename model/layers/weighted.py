"""The layers that multiply by weights of their own."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from torch import nn
from torch.nn.modules.conv import _ConvNd

from model.layers.attention import CalledAttention
from model.layers.quantized import full_precision_reason
from model.quantizers.frame import Quantizer

# Those that are known. Whatever else multiplies shows when the network runs, see `model.convert.called`.
_WEIGHTED = (_ConvNd, nn.Linear, nn.Bilinear, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)
# Others of libraries, which a network can only have where their files have been imported already.
_ELSEWHERE = {"torchvision.ops.deform_conv": "DeformConv2d", "timm.layers.cond_conv2d": "CondConv2d"}


def weighted_layers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers of which `multiplies` is true, with their names, in the order of definition."""
    for name, layer in module.named_modules():
        if multiplies(layer):
            yield name, layer


def multiplies(layer: nn.Module) -> bool:
    """Whether a module is known to multiply by its weights, by its class or since `keep_full_precision` says so."""
    kinds = (
        *_WEIGHTED,
        *(getattr(sys.modules[file], kind) for file, kind in _ELSEWHERE.items() if file in sys.modules),
    )
    noted = full_precision_reason(layer) != "" and any(True for _ in layer.parameters(recurse=False))
    if isinstance(layer, CalledAttention):  # its layers do
        return False
    return isinstance(layer, kinds) or (noted and not isinstance(layer, Quantizer))
