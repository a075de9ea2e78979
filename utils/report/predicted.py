"""Predictions of many images as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TOPK = 5  # classes of an image


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """Predictions of N images, on the CPU.

    Attributes:
        true: classes, int64 [N].
        classes: the most probable classes, int64 [N, k].
        probabilities: theirs, float32 [N, k].
        own: probability of the true class, float32 [N].
        reference: the class by another network, int64 [N]; -1 without one.
        reference_probability: that it gives this class, float32 [N]; 0 without one.
    """

    true: Tensor
    classes: Tensor
    probabilities: Tensor
    own: Tensor
    reference: Tensor
    reference_probability: Tensor

    @classmethod
    def of(cls, target: Tensor, output: Tensor, reference: Tensor | None) -> Predicted:
        """From classes, int64 [N], and logits, float [N, classes]."""
        shares, true = output.detach().float().softmax(1).cpu(), target.cpu()
        best = shares.topk(min(TOPK, shares.shape[1]), dim=1)
        before, called = torch.zeros(len(true)), torch.full((len(true),), -1)
        if reference is not None:
            before, called = reference.detach().float().softmax(1).max(1)
        return cls(
            true=true, classes=best.indices, probabilities=best.values, own=shares.gather(1, true[:, None])[:, 0],
            reference=called.cpu(), reference_probability=before.cpu(),
        )  # fmt: skip

    @classmethod
    def joined(cls, parts: Sequence[Predicted]) -> Predicted:
        """All images of at least one part."""
        return cls(**{name: torch.cat([getattr(part, name) for part in parts]) for name in vars(parts[0])})

    def __len__(self) -> int:
        return len(self.true)

    def __getitem__(self, chosen: Tensor) -> Predicted:
        return Predicted(**{name: values[chosen] for name, values in vars(self).items()})

    @property
    def called(self) -> Tensor:
        """The most probable class, int64 [N]."""
        return self.classes[:, 0]

    @property
    def mistakes(self) -> Tensor:
        """The probability of a wrong class that an image is called, float32 [N]; 0 for the right one."""
        return (self.called != self.true) * self.probabilities[:, 0]

    @property
    def changes(self) -> Tensor:
        """The reference's probability of a class that became another one, float32 [N]; 0 where it did not."""
        return (self.called != self.reference) * self.reference_probability


def highest(scores: Tensor, count: int) -> list[int]:
    """Numbers of the highest of scores above 0, the highest first and equal ones in their order."""
    order = scores.argsort(descending=True, stable=True)[:count]
    return order[scores[order] > 0].tolist()
