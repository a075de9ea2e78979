"""Sums over a pass of the images: loss, accuracy, waiting time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Totals:
    """Sums over the images of a pass, kept on the device, so that the host need not wait.

    Counts are exact and the loss is summed in float64, so that the sums of several processes, or of an
    interrupted pass, equal those of one.

    Attributes:
        sums: float64 [4]: loss, images whose class has the highest score, one of the 5 highest, and all images.
    """

    EMPTY = (0.0, 0.0, 0.0, 0.0)

    def __init__(self, device: torch.device | str = "cpu", start: Sequence[float] = EMPTY) -> None:
        self.sums = torch.tensor(start, dtype=torch.float64, device=device)

    def update(self, loss: Tensor, output: Tensor, target: Tensor) -> None:
        """Add a batch.

        Args:
            loss: mean over the batch, [].
            output: scores, float [N, C].
            target: classes, int64 [N].
        """
        count = len(target)
        hits = [hit.double() for hit in top_k(output.detach(), target)]
        total = loss.detach().double() * count
        self.sums += torch.stack([total, *hits, torch.full_like(total, count)])

    @property
    def values(self) -> tuple[float, ...]:
        """The sums as numbers. Waits for the device."""
        return tuple(self.sums.tolist())

    @staticmethod
    def means(sums: Tensor) -> dict[str, float]:
        """`loss`, and `top1` and `top5` in percent, from `sums`; NaN without an image. Waits for the device."""
        loss, hits1, hits5, images = sums.tolist()
        if not images:
            return dict.fromkeys(("loss", "top1", "top5"), math.nan)
        return {"loss": loss / images, "top1": 100 * hits1 / images, "top5": 100 * hits5 / images}


def accuracy_text(top1: float, top5: float, loss: float) -> str:
    """Accuracies in percent and a loss, for the log."""
    return f"top-1 {top1:.2f}, top-5 {top5:.2f}, loss {loss:.4f}"


def top_k(output: Tensor, target: Tensor, ks: Sequence[int] = (1, 5)) -> tuple[Tensor, ...]:
    """Count the images whose class is among the k highest scores.

    Args:
        output: scores, float [N, C].
        target: classes, int64 [N]; or shares of the classes, float [N, C], whose largest one counts.
        ks: the numbers of scores to look at; one above C looks at all.

    Returns:
        One 0-d int64 tensor per k, on the device of `output`.
    """
    classes = output.shape[1]
    if target.ndim == 2:
        target = target.argmax(1)
    best = output.topk(min(max(ks), classes), dim=1).indices
    hits = best == target.unsqueeze(1)
    return tuple(hits[:, :k].sum() for k in ks)


class Waiting(Generic[T]):
    """An iterable that measures how long its user waits for the next item.

    Args:
        items: the items.
        clock: the time in seconds.

    Attributes:
        seconds: the waiting time so far.
    """

    def __init__(self, items: Iterable[T], clock: Callable[[], float] = time.perf_counter) -> None:
        self._items = items
        self._clock = clock
        self.seconds = 0.0

    def __iter__(self) -> Iterator[T]:
        started = self._clock()
        for item in self._items:
            self.seconds += self._clock() - started
            yield item
            started = self._clock()
