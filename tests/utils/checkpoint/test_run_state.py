"""Where a resumed run goes on within an epoch."""

from __future__ import annotations

import pytest

from utils.checkpoint.run_state import first_batch, sums_until


@pytest.mark.parametrize(
    ("position", "images", "passes", "batches", "expected"),
    [
        (0, 8, 1, 10, 0),
        (24, 8, 1, 10, 3),
        (80, 8, 1, 10, 10),
        (24, 8, 3, 10, 3),
        (24, 16, 1, 5, 1),  # half a batch is seen twice
        (32, 8, 3, 10, 3),  # a group of passes begins anew
        (80, 16, 1, 5, 5),
        (80, 8, 3, 10, 10),  # the shorter group at the end was whole
        (16, 8, 1, 2, 2),
    ],
)
def test_first_batch(position: int, images: int, passes: int, batches: int, expected: int) -> None:
    assert first_batch(position, images, passes, batches) == expected


def test_images_that_are_seen_again_count_once() -> None:
    assert sums_until((6.0, 3.0, 3.0, 24.0), 24, 24) == (6.0, 3.0, 3.0, 24.0)
    assert sums_until((6.0, 3.0, 3.0, 24.0), 24, 16) == (4.0, 2.0, 2.0, 16.0)
    assert sums_until((6.0, 3.0, 3.0, 24.0), 24, 0) == (0.0, 0.0, 0.0, 0.0)
    assert sums_until((0.0, 0.0, 0.0, 0.0), 0, 0) == (0.0, 0.0, 0.0, 0.0)
