"""A copy of a buffer for the backward pass of a compiled graph."""

from __future__ import annotations

import torch
from torch import Tensor


# Named after the module: the repository and the installed package may be imported in one process.
@torch.library.custom_op(f"lowbit::snapshot_{__name__.replace('.', '_')}", mutates_args=())
def snapshot(value: Tensor) -> Tensor:
    """A copy that a compiled graph keeps for its backward pass.

    Without it the compiler would read the buffer again in the backward pass, when forward has already changed it.
    """
    return value.clone()


@snapshot.register_fake
def _(value: Tensor) -> Tensor:
    return torch.empty_like(value)
