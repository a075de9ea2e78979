"""Why a layer cannot be quantized."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from model.layers import bits
from model.layers.called import uncalled
from model.layers.quantized import BASES, QuantLayer


def obstacles(module: nn.Module, layers: dict[str, nn.Module], order: Sequence[str] | None) -> dict[str, str]:
    """Layers that cannot be quantized -> why not, the rest of a sentence about each."""
    found: dict[str, str] = {}
    for name, layer in layers.items():
        kind = type(layer)
        if isinstance(layer, nn.MultiheadAttention):
            found[name] = "projects its inputs by a parameter, not by a layer"
        elif isinstance(layer, QuantLayer):
            found[name] = "is quantized already"
        elif not isinstance(layer, BASES):
            found[name] = f"is a {kind.__name__}, which has no quantized form"
        elif isinstance(layer, LazyModuleMixin):
            found[name] = f"is a {kind.__name__}, which has no weights yet: run the network once before"
        elif parametrize.is_parametrized(layer):
            found[name] = "is parametrized, which has changed its class: quantize first, parametrize then"
        elif kind not in bits.forms():
            base = next(one.__name__ for one in BASES if isinstance(layer, one))
            found[name] = f"is a {kind.__name__}, whose forward may not be nn.{base}'s; see register_layer"
        elif "forward" in vars(layer):
            found[name] = "has had its forward replaced"
        elif order is not None and name not in order:
            found[name] = "is not called as a module"
    for prefix, parent in module.named_modules():
        names = (f"{prefix}.{child}" if prefix else child for child in uncalled(parent))
        reason = f"is used by {type(parent).__name__} without a call"
        found |= {name: reason for name in names if name in layers}
    return found
