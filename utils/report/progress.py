"""Progress bars on standard error."""

from __future__ import annotations

import resource
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from utils.step.meters import Waiting

T = TypeVar("T")


def progress(iterable: Iterable[T], total: int, description: str, enabled: bool) -> tqdm[T]:
    """Wrap an iterable in a progress bar.

    Args:
        iterable: the items.
        total: its length.
        description: the word before the bar.
        enabled: False, or standard error not being a terminal, shows nothing and only passes the items on.
    """
    disable = None if enabled else True  # None: tqdm looks for the terminal
    return tqdm(iterable, total=total, desc=description, disable=disable, leave=False, dynamic_ncols=True)


class TrainingBar(tqdm):  # generic for type checkers only
    """The bar of a training epoch: images per second, data wait, memory, time left of the epoch and of the run.

    All of it is looked up when the bar is drawn, ten times a second at most, and never without a bar.

    Args:
        batches: the epoch's batches.
        total: number of them that are left.
        later: batches of the epochs after this one; validation is not counted.
        images: images of a batch, of all processes.
        device: whose memory is shown.
        description: the word before the bar.
        enabled: as for `progress`.
    """

    def __init__(
        self, batches: Waiting[Any], *, total: int, later: int, images: int, device: torch.device, description: str,
        enabled: bool,
    ) -> None:  # fmt: skip
        self._waiting, self._later, self._device = batches, later, device
        super().__init__(
            batches, total=total, desc=description, disable=None if enabled else True, leave=False,
            dynamic_ncols=True, unit=" images", unit_scale=images,
        )  # fmt: skip

    @property
    def format_dict(self) -> dict[str, Any]:
        """The fields that tqdm shows, with those of this bar appended."""
        values = dict(super().format_dict)
        elapsed, done = values["elapsed"], values["n"]
        if self.disable or not elapsed or not done:
            return values
        rate = values["rate"] or done / elapsed
        left = self.format_interval((self.total - done + self._later) / rate)
        wait = 100 * self._waiting.seconds / elapsed
        notes = f"wait {wait:.0f}%, {peak_memory(self._device) / 2**30:.1f} GiB, run {left}"
        return values | {"postfix": notes}


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has held: of tensors on a GPU, of everything on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
