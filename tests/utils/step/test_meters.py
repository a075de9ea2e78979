"""Totals of losses and hits, and the time that is waited."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from utils.step import meters


def batch(seed: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of 7 classes and the right ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 7, generator=generator), torch.randint(7, (count,), generator=generator)


def test_totals_are_those_of_all_images() -> None:
    """Batches of any size, summed in parts, give what one pass of NumPy gives."""
    totals = meters.Totals()
    assert all(math.isnan(value) for value in meters.Totals.means(totals.sums).values())
    outputs, targets, losses = [], [], []
    for seed, count in enumerate((3, 1, 8)):
        output, target = batch(seed, count)
        loss = torch.nn.functional.cross_entropy(output, target, reduction="none")
        if seed == 2:  # go on from the sums so far, as a resumed run does
            totals = meters.Totals(start=totals.values)
        totals.update(loss.mean().requires_grad_(), output, target)
        outputs.append(output), targets.append(target), losses.append(loss)
    assert not totals.sums.requires_grad
    ranks = np.argsort(-torch.cat(outputs).numpy(), axis=1) == torch.cat(targets).numpy()[:, None]
    means = meters.Totals.means(totals.sums)
    assert means["loss"] == pytest.approx(np.mean(torch.cat(losses).double().numpy()), rel=1e-6)
    assert means["top1"] == 100 * ranks[:, 0].sum() / 12 and means["top5"] == 100 * ranks[:, :5].sum() / 12


def test_totals_do_not_lose_small_parts() -> None:
    """In float32 the sum would stop growing at 2^24; half precision would overflow."""
    output, target = batch(0, 1)
    totals = meters.Totals(start=(2.0**24, 0, 0, 2.0**24))
    totals.update(torch.tensor(3.0), output, target)
    assert meters.Totals.means(totals.sums)["loss"] == (2**24 + 3) / (2**24 + 1)
    output, target = batch(0, 256)
    half = meters.Totals()
    for _ in range(3):
        half.update(torch.tensor(60000.0, dtype=torch.float16), output, target)
    assert meters.Totals.means(half.sums)["loss"] == torch.tensor(60000.0, dtype=torch.float16).item()


class _Reads(TorchDispatchMode):
    """Count the calls that bring a number to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_totals_read_tensors_only_for_their_values() -> None:
    totals = meters.Totals()
    output, target = batch(0, 8)
    with _Reads() as reads:
        for _ in range(3):
            totals.update(torch.tensor(2.0), output, target)
        assert reads.count == 0
        assert meters.Totals.means(totals.sums)["loss"] == 2.0


def test_top_k_takes_the_largest_share_of_mixed_classes() -> None:
    output = torch.tensor([[1.0, 2, 3], [3, 2, 1]])
    shares = torch.tensor([[0.3, 0.1, 0.6], [0.0, 0.9, 0.1]])
    assert [count.item() for count in meters.top_k(output, shares, (1, 2))] == [1, 2]


def test_waiting_counts_the_time_before_items_and_not_after_them() -> None:
    clock = [0.0]

    def items() -> Iterator[int]:
        for item in range(3):
            clock[0] += 2
            yield item

    waiting = meters.Waiting(items(), clock=lambda: clock[0])
    for _ in waiting:
        clock[0] += 10
    assert waiting.seconds == 6


def test_top_k_by_hand() -> None:
    output = torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.3, 0.2], [0.1, 0.2, 0.7], [0.3, 0.1, 0.6]])
    target = torch.tensor([1, 1, 0, 0])
    counts = meters.top_k(output, target, (1, 2, 3, 5))
    assert [int(count) for count in counts] == [1, 3, 4, 4]
    assert all(count.shape == () and count.dtype == torch.int64 for count in counts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_top_k_against_numpy(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(0)
    scores = np.stack([rng.permutation(12) for _ in range(64)])  # no ties, exact in every type
    target = rng.integers(0, 12, 64)
    rank = (scores > scores[np.arange(64), target][:, None]).sum(1)
    counts = meters.top_k(torch.tensor(scores, dtype=dtype), torch.tensor(target))
    assert [int(count) for count in counts] == [(rank < 1).sum(), (rank < 5).sum()]
