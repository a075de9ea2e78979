"""Scores of six images and their classes."""

from __future__ import annotations

import torch
from torch import Tensor


def logits(*, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (scale * torch.randn(6, 5, generator=generator)).requires_grad_()


TARGET = torch.tensor([0, 1, 2, 3, 4, 0])


def mixture() -> Tensor:
    return torch.randn(6, 5, generator=torch.Generator().manual_seed(1)).softmax(dim=1)
