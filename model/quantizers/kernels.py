"""Kernels that `torch.compile` generates from what a quantizer computes, for CPUs and GPUs (`--kernels`)."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor


@functools.cache
def generated(compute: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function as kernels, forwards and backwards, for any shape: made at its first call, which takes some seconds.

    One elementwise definition serves every method and device. Quantizers with the same options share their kernels.
    """
    return torch.compile(compute, fullgraph=True, dynamic=True)


def in_processes() -> bool:
    """Whether several processes train together."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def kernels_fit(*, gathers: bool) -> bool:
    """Whether a pass may run in generated kernels: it `gathers` nothing from other processes, no mode watches it."""
    return not (gathers and in_processes()) and torch._C._len_torch_dispatch_stack() == 0
