"""DoReFa-Net's weights, whose gradient is taken through tanh."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.speed import saved_bytes
from model.quantizers.dorefa import SMALLEST_MAXIMUM
from model.quantizers.grid import ClipSTE, Grid
from tests import oracle
from tests.model.quantizers.cases import (
    Case,
    assert_close,
    away_from_jumps,
    backward,
    expectation,
    generator,
    make,
    sample,
)


@pytest.mark.parametrize("levels", [2, 4, 16])
def test_dorefa_weight_gradient_is_that_of_the_smooth_part(levels: int) -> None:
    case = Case("dorefa-wt", "wt", levels, half_range=False)
    w = sample(case).astype(np.float64)[:2, :2]
    gy = generator("gy").standard_normal(w.shape)
    step = 1e-6
    numeric = np.empty_like(w)
    for index in np.ndindex(w.shape):
        delta = np.zeros_like(w)
        delta[index] = step
        difference = oracle.tanh_normalised(w + delta) - oracle.tanh_normalised(w - delta)
        numeric[index] = (gy * difference).sum() / (2 * step)
    _, gx = backward(make(case), torch.from_numpy(w).float(), torch.from_numpy(gy).float())
    np.testing.assert_allclose(gx.numpy(), numeric, atol=1e-5 * np.abs(numeric).max(), rtol=0)


@pytest.mark.parametrize("unit", [1e-11, 1e-20, 1e-29])
@pytest.mark.parametrize("levels", [2, 3, 4, 16])
def test_dorefa_weights_of_any_size_follow_the_formula(levels: int, unit: float) -> None:
    """Only the ratio of the weights counts where tanh is linear."""
    case = Case("dorefa-wt", "wt", levels, half_range=False)
    w = away_from_jumps(sample(case) * np.float32(1e-6), expectation(case, make(case)))
    gy = generator("gy").standard_normal(w.shape).astype(np.float32)
    w = (w * np.float32(1e6) * unit).astype(np.float64)
    expected = oracle.dorefa_weight(w, gy.astype(np.float64), levels=levels)
    y, gx = backward(make(case), torch.from_numpy(w).float(), torch.from_numpy(gy))
    assert_close(y, expected.y, "output")
    assert_close(gx, expected.gx, "gradient to x")


@pytest.mark.parametrize("adaptive", ["mean", "var", "mean-var", "var-mean"])
@pytest.mark.parametrize("binary", [False, True])
def test_reports_see_the_values_that_are_quantized(adaptive: str, binary: bool) -> None:
    """`normalise` gives what the levels are compared with: the nearest level of it is the quantized weight."""
    case = Case("dorefa-wt", "wt", 2 if binary else 4, half_range=False)
    case = case.with_fields(adaptive=adaptive, binary_scale=binary)
    quantizer = make(case)
    x = torch.from_numpy(sample(case)) + 0.5
    seen = quantizer.normalise(x)
    found = quantizer.integers(x)
    levels = (found.codebook * found.factor).flatten()
    nearest = (seen.unsqueeze(-1) - levels).abs().argmin(-1)
    assert (nearest == found.numbers).double().mean() > 0.999
    assert quantizer(x).unique().numel() <= case.levels


def by_autograd(x: torch.Tensor, levels: int) -> torch.Tensor:
    """The formula in operators that autograd differentiates."""
    squashed = torch.tanh(x)
    largest = squashed.abs().amax()
    ratio = squashed / torch.where(largest < SMALLEST_MAXIMUM, 1.0, largest)
    return ClipSTE.apply(ratio, x.new_ones(1), Grid.of(levels, half_range=False))


WEIGHTS = {
    "normal": torch.from_numpy(sample(Case("dorefa-wt", "wt", 4, half_range=False))),
    "saturated": 20 * torch.from_numpy(sample(Case("dorefa-wt", "wt", 4, half_range=False))),
    "ties": torch.tensor([[0.5, -0.5, 0.2], [0.0, -0.0, -0.5]]),
    "zeros": torch.zeros(3, 2),
    "tiny": torch.tensor([[1e-32, -3e-33]]),
    "huge": torch.tensor([[3e38, -3e38, torch.inf, 1.0]]),
    "channels last": torch.from_numpy(sample(Case("dorefa-wt", "wt", 2, half_range=False))).to(
        memory_format=torch.channels_last
    ),
    "transposed": torch.from_numpy(sample(Case("dorefa-wt", "wt", 2, half_range=False))).flatten(1).T,
}


@pytest.mark.parametrize("grad_type", ["none", "STE-scale"])
@pytest.mark.parametrize("levels", [2, 3, 4, 16, 256])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_dorefa_weights_have_the_bits_of_autograd(kind: str, levels: int, grad_type: str) -> None:
    """And nothing is saved but the weight and its maximum."""
    case = Case("dorefa-wt", "wt", levels, half_range=False).with_fields(grad_type=grad_type)
    x = WEIGHTS[kind]
    gy = torch.from_numpy(generator("gy", kind).standard_normal(x.shape).astype(np.float32))
    y, gx = backward(make(case), x, gy)
    expected_y, expected_gx = backward(lambda x: by_autograd(x, levels), x, gy)
    assert torch.equal(y, expected_y) and torch.equal(gx, expected_gx)
    x = x.clone().requires_grad_()
    with saved_bytes({x.data_ptr()}) as count:
        make(case)(x)
        assert count() == 4


def test_a_weight_that_is_not_finite_is_noticed() -> None:
    y, gx = backward(make(Case("dorefa-wt", "wt", 4, half_range=False)), torch.tensor([[torch.nan, 1.0]]))
    assert y.isnan().any() and gx.isnan().any()
