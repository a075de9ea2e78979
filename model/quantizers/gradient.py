"""Calling functions with gradients of their own, without what only a backward pass needs."""

from __future__ import annotations

from typing import Any

import torch


class _NoGradients:
    """Stands for the context of a function: keeps nothing."""

    needs_input_grad = (False,) * 8

    def save_for_backward(self, *tensors: torch.Tensor) -> None:
        pass


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """`function.apply(*args)`; where no gradients are recorded its forward pass alone, in a fraction of the time."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return function.apply(*args)
    return function.forward(_NoGradients(), *args)
