"""What the word predict writes of images whose classes are known: the files of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from utils.report.outcome import Outcome
from utils.step import meters

if TYPE_CHECKING:
    from model.deploy.given import Given
    from utils.data.transform import ImageTransform


class Evaluated:
    """Loss, accuracy and predictions of images, added batch by batch.

    Args:
        classes: names of the network's classes.
        numbers: of the labels that images may have, at least of those that they have.
        transform: of the images.
    """

    def __init__(self, classes: Sequence[str], numbers: dict[str, int], transform: ImageTransform) -> None:
        self._numbers = numbers
        self._names: list[str] = []
        self._totals = meters.Totals()
        self._outcome = Outcome(classes, transform.mean, transform.std)

    def update(
        self, given: Sequence[Given], images: Tensor, logits: Tensor, reference: Tensor | None
    ) -> None:
        """Add a batch: its images, float32 [N, C, H, W], and logits, float32 [N, classes], perhaps of two networks."""
        target = torch.tensor([self._numbers[one.label] for one in given])
        self._outcome.update(images, target, logits, reference)
        self._totals.update(functional.cross_entropy(logits, target), logits, target)
        self._names += [one.name for one in given]

    def write(self, folder: Path) -> list[str]:
        """Write the files that an evaluation by `main.py` writes; returns lines about them."""
        folder.mkdir(parents=True, exist_ok=True)
        self._outcome.numbers = torch.arange(len(self._names))
        found = meters.Totals.means(self._totals.sums)
        written = self._outcome.write(folder, first=True, name=self._names.__getitem__)
        return [meters.accuracy_text(found["top1"], found["top5"], found["loss"]), *written]
