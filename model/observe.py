"""Observing a network without changing it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


@contextmanager
def observing(model: nn.Module) -> Iterator[list[RemovableHandle]]:
    """Put `model` into evaluation mode without gradients; hooks added to the yielded list are removed.

    Afterwards every module is in its earlier mode, also where the modes differed.
    """
    modes = [(module, module.training) for module in model.modules()]
    hooks: list[RemovableHandle] = []
    model.eval()
    try:
        with torch.no_grad():
            yield hooks
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes:
            module.training = training


def first_input(inputs: tuple[Any, ...], named: Mapping[str, Any]) -> Tensor:
    """The first argument of a layer, by position or by name, from the arguments of a hook `with_kwargs`."""
    return next(iter((*inputs, *named.values())))
