"""Attentions that use the weights of layers without calling them, changed so that they call them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from model.layers.attention import CalledAttention, call_projections

SWIN = "torchvision.models.swin_transformer"  # its ShiftedWindowAttention is another one
_SEPARATE = "qkv_bias_separate"  # timm's switch


def call_layers(network: nn.Module) -> None:
    """Let attentions call their linear layers, where by default they hand weights to a function, past any quantizer.

    Those are `nn.MultiheadAttention`, those of torchvision's Swin, and those of timm's BEiT, EVA-02 and Swin V2, which
    then add the bias behind `qkv`; not those whose forward is a subclass's. Transformer layers of torch lose their fast
    path of evaluation. The results differ by rounding alone.
    """
    swin = sys.modules.get(
        SWIN
    )  # a network can have torchvision's only where its file has been imported already
    for module in list(network.modules()):
        if type(module) is nn.MultiheadAttention and "forward" not in vars(module):
            call_projections(module)
        elif swin and isinstance(module, swin.ShiftedWindowAttention) and "forward" not in vars(module):
            from model.layers.of_torchvision import call_window_layers

            call_window_layers(module)
        elif isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # what torch asks before it takes the fast path
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
        elif type(module).__module__.startswith("timm.") and getattr(module, _SEPARATE, True) is False:
            vars(module)[_SEPARATE] = True


def uncalled(module: nn.Module) -> tuple[str, ...]:
    """The names of the children whose weights a module uses without calling them, as `call_layers` has left it."""
    if isinstance(module, nn.MultiheadAttention) and not isinstance(module, CalledAttention):
        return ("out_proj",)
    if isinstance(module, nn.TransformerEncoderLayer) and module.activation_relu_or_gelu:
        return ("linear1", "linear2")
    swin = sys.modules.get(SWIN)
    if swin and isinstance(module, swin.ShiftedWindowAttention):
        from model.layers.of_torchvision import CalledWindowAttention

        return () if isinstance(module, CalledWindowAttention) else ("qkv", "proj")
    return ()


@contextmanager
def layers_called(network: nn.Module) -> Iterator[None]:
    """`call_layers` for a while."""
    before = _state(network)
    try:
        call_layers(network)
        yield
    finally:
        _restore(before)


@contextmanager
def undone_on_error(module: nn.Module) -> Iterator[None]:
    """Give all modules of a network their classes, attributes and children back where the block fails."""
    before = _state(module)
    try:
        yield
    except BaseException:
        _restore(before)
        raise


def _state(network: nn.Module) -> list[tuple[Any, type, dict[str, Any], dict[str, Any]]]:
    return [
        (each, type(each), dict(vars(each)), dict(each._modules))
        for each in network.modules()
        if not isinstance(each, torch.jit.ScriptModule)
    ]


def _restore(before: list[tuple[Any, type, dict[str, Any], dict[str, Any]]]) -> None:
    for each, kind, attributes, children in before:
        if type(each) is not kind:
            each.__class__ = kind
        vars(each).clear()
        vars(each).update(attributes)
        each._modules.clear()
        each._modules.update(children)
