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


@pytest.mark.parametrize(("value", "ends"), [(0.0, [-1, 1]), (3.0, [0, 3]), (-3.0, [-3, 0])])
def test_equal_activations_are_an_end_of_the_range(value: float, ends: list[float]) -> None:
    """Zeros say nothing of a range, which stays."""
    quantizer = make(Case("lsqplus", "fm", 4, half_range=False), randomised=False)
    quantizer.initialise_from(activation(torch.full((16,), value)))
    assert [float(bound) for bound in quantizer.bounds() or ()] == ends


@pytest.mark.parametrize(
    ("low", "width", "fewer"),
    [(-1.5, 3.0, (-0.3, 0.3)), (0.0, 3.0, (0.0, 0.6)), (2.0, 3.0, (2.0, 2.6)), (-4.0, 3.0, (-1.6, -1.0))],
)
def test_a_step_that_is_kept_leaves_zero_where_it_is(
    low: float, width: float, fewer: tuple[float, float]
) -> None:
    """From 16 levels to 4 and back; where zero lies outside, the end next to it stays."""
    quantizer = make(Case("lsqplus", "fm", 16, half_range=False), randomised=False)
    with torch.no_grad():
        quantizer.get_parameter("offset").fill_(low)
        quantizer.get_parameter("clip_val").fill_(width)
    for levels, ends in ((4, fewer), (16, (low, low + width))):
        changed = quantizer.set_levels(levels, keep_step=True)
        assert {id(one) for one in changed} == {id(one) for one in quantizer.parameters()}
        assert [float(bound) for bound in quantizer.bounds() or ()] == pytest.approx(ends, abs=1e-6)


@pytest.mark.parametrize("half_range", [True, False])
def test_the_range_of_an_lsq_checkpoint_is_taken(half_range: bool) -> None:
    lsq, quantizer = (
        make(Case(name, "fm", 4, half_range=half_range), randomised=False) for name in ("lsq", "lsqplus")
    )
    with torch.no_grad():
        lsq.set_range(torch.tensor([0.5]))
    entries = dict(lsq.state_dict())
    assert quantizer.of_another_method(entries) and not quantizer.of_another_method(quantizer.state_dict())
    quantizer.load_state_dict(quantizer.adapted(entries))
    x = activation(torch.linspace(-1, 1, 16))
    torch.testing.assert_close(quantizer(x), lsq(x))


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
