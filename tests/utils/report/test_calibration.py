"""Calibration error and its bins, against the definition in plain loops."""

from __future__ import annotations

import numpy as np
import pytest

from utils.report.calibration import BINS, calibration_bins, calibration_error


@pytest.mark.parametrize("images", [1, 7, 1000])
def test_expected_calibration_error(images: int) -> None:
    """sum_b n_b / n * |accuracy - confidence|, a bin being (b / 15, (b + 1) / 15]."""
    draw = np.random.default_rng(images)
    confidence = np.concatenate([draw.random(images), np.arange(BINS + 1) / BINS])  # borders, too
    right = draw.random(len(confidence)) < confidence**2
    expected, counts = 0.0, []
    for i in range(BINS):
        low, high = np.linspace(0, 1, BINS + 1)[i : i + 2]
        inside = (confidence <= high) & ((confidence > low) | (i == 0))
        if inside.any():
            counts.append(int(inside.sum()))
            gap = abs(right[inside].mean() - confidence[inside].mean())
            expected += inside.sum() / len(confidence) * gap
    bins = calibration_bins(confidence, right)
    assert [one.images for one in bins] == counts
    assert calibration_error(bins) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("right", "error"), [(True, 0.0), (False, 1.0)])
def test_one_class(right: bool, error: float) -> None:
    """Its probability is 1; all images may be right, or wrong."""
    (one,) = calibration_bins(np.ones(5), np.full(5, right))
    assert (one.low, one.high, one.images) == (pytest.approx(1 - 1 / BINS), 1, 5)
    assert calibration_error([one]) == error


def test_no_images() -> None:
    assert calibration_error(calibration_bins(np.zeros(0), np.zeros(0, bool))) == 0
