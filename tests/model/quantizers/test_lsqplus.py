"""LSQ+: where the clip value and the offset start."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from model.watch.cut_off import cut_off
from tests.model.quantizers.cases import Case, make


def activation(x: Tensor) -> Tensor:
    """Images [N, C, 1, 1] of one channel as the quantizers of the cases get them."""
    return x.reshape(-1, 8, 1, 1)


def squared_error(x: np.ndarray, low: float, high: float, levels: int) -> float:
    """The error of evenly spaced levels from low to high."""
    grid = np.linspace(low, high, levels)
    return float((np.abs(x[:, None] - grid).min(axis=1) ** 2).sum())


@pytest.mark.parametrize("levels", [2, 4, 16])
@pytest.mark.parametrize("name", ["hardswish", "gelu", "leaky_relu", "relu"])
def test_activations_start_from_the_least_squared_error(name: str, levels: int) -> None:
    """As good as the best of 90,000 ranges, but for a tenth of it."""
    x = getattr(functional, name)(torch.randn(4000, generator=torch.Generator().manual_seed(levels)) * 2)
    quantizer = make(Case("lsqplus", "fm", levels, half_range=True), randomised=False)
    quantizer.initialise_from(activation(x))
    low, high = (float(bound) for bound in quantizer.bounds() or ())
    values = np.sort(x.double().numpy())[::8]
    ends = np.linspace(values[0], values[-1], 60)
    best = min(squared_error(values, a, b, levels) for a in ends for b in ends if a < b)
    assert squared_error(values, low, high, levels) <= 1.1 * best


def test_levels_that_are_there_are_found() -> None:
    """Values on evenly spaced levels get exactly these."""
    x = -0.7 + 0.3 * torch.arange(4).repeat(20).float()
    quantizer = make(Case("lsqplus", "fm", 4, half_range=True), randomised=False)
    quantizer.initialise_from(activation(x))
    low, high = (float(bound) for bound in quantizer.bounds() or ())
    assert (low, high) == pytest.approx((-0.7, 0.2), abs=1e-6)


def test_a_constant_activation_keeps_its_range() -> None:
    quantizer = make(Case("lsqplus", "fm", 4, half_range=False), randomised=False)
    quantizer.initialise_from(activation(torch.zeros(16)))
    assert [float(bound) for bound in quantizer.bounds() or ()] == [-1, 1]


@pytest.mark.parametrize(("grid", "top"), [("midtread", 7), ("midrise", 7.5)])
def test_weights_start_from_mean_and_deviation(grid: str, top: float) -> None:
    """The step s = max(|m - 3 d|, |m + 3 d|) / 2^(b - 1), times the highest level in steps (paper, section 3.2)."""
    w = torch.randn(8, 6, 3, 3, generator=torch.Generator().manual_seed(0)) + 0.2
    quantizer = make(
        Case("lsqplus-wt", "wt", 16, half_range=False, fields=(("grid", grid),)), randomised=False
    )
    quantizer.initialise_from(w)
    rows = w.double().numpy().reshape(8, -1)
    mean, deviation = rows.mean(axis=1), rows.std(axis=1, ddof=1)
    step = np.maximum(np.abs(mean - 3 * deviation), np.abs(mean + 3 * deviation)) / 8
    found = quantizer.current_range().double().numpy().ravel()
    np.testing.assert_allclose(found, step * top, rtol=1e-5)


def test_values_half_a_step_below_a_lowest_level_above_zero_are_not_cut_off() -> None:
    quantizer = make(Case("lsqplus", "fm", 4, half_range=True), randomised=False)
    with torch.no_grad():
        quantizer.get_parameter("offset").fill_(0.1)
    found = cut_off(quantizer, activation(torch.tensor([0.0, 0.0, 0.0, 0.5, 0.5, 0.5, 1.0, -0.3])))
    assert found is not None and found.tolist() == [1 / 8, 0]
