"""Biases that an engine rounds give the codes of those that it does not."""

from __future__ import annotations

import numpy as np
import pytest

from model.deploy.bias import roundable_bias
from model.deploy.codes import ActivationCodes


def codes_of(sums: np.ndarray, unit: float, bias: float, codes: ActivationCodes) -> np.ndarray:
    assert codes.step is not None
    return np.clip(np.round((sums * unit + bias) / codes.step), codes.lowest, codes.highest)


@pytest.mark.parametrize(("levels", "parts"), [(2, 64), (3, 64), (4, 32), (8, 16)])
def test_no_channel_changes_a_code(levels: int, parts: int) -> None:
    rng, channels = np.random.default_rng(levels), 300
    codes = ActivationCodes(name="x", levels=levels, highest=levels - 1, step=0.4)
    bias, quantum = rng.normal(size=channels), rng.uniform(0.003, 0.05, channels)
    most = rng.integers(20, 2000, channels)
    rounded, stretch = roundable_bias(bias, quantum, most, parts, codes)
    multiples = rounded / (quantum * stretch) * parts
    assert np.abs(multiples - np.round(multiples)).max() < 1e-2  # float32
    for i in range(channels):
        sums = np.arange(-most[i], most[i] + 1)
        expected = codes_of(sums, quantum[i], bias[i], codes)
        assert np.array_equal(codes_of(sums, quantum[i] * stretch[i], rounded[i], codes), expected)


def test_thresholds_that_lie_just_beside_sums_have_a_wide_search() -> None:
    """At -22.0004, -6.9926 and 8.0152: one of 336 channels of a 2-bit network."""
    codes = ActivationCodes(name="x", levels=4, highest=3, step=15.0078)
    bias, _ = roundable_bias(np.array([29.5043]), np.ones(1), np.array([1176]), 16, codes)
    assert bias != np.float32(29.5043)  # which a channel without such a bias keeps


def test_thresholds_closer_than_a_sum_are_no_division_by_zero() -> None:
    codes = ActivationCodes(name="x", levels=4, highest=3, step=0.5)
    bias, stretch = roundable_bias(np.array([0.3]), np.ones(1), np.array([9]), 1, codes)
    assert np.isfinite(bias).all() and np.isfinite(stretch).all()
