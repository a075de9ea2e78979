"""Normalising before quantizing: sizes that float32 hardly holds, groups without variance."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch

from tests.model.quantizers.cases import (
    CHANNELS,
    SHAPES,
    Case,
    backward,
    cases,
    generator,
    learns,
    make,
    over,
    tensor,
)


@pytest.mark.parametrize("kind", ["mean", "var", "var-mean"])
@over(
    cases(levels=(4, 3, 2), where=lambda method: not {"clip_val", "alpha0", "threshold"} & set(method.state))
)
def test_a_gradient_does_not_overflow_where_normalisation_is_undone(case: Case, kind: str) -> None:
    """Multiplied by the deviation and divided by it again, it is that of the same tensor in another unit."""
    quantizer = make(case.with_fields(adaptive=kind, adaptive_restore=True))
    assert not learns(quantizer)
    x, gy = tensor(case).clamp(-3, 3) + 0.5, 100 * tensor(case, "gy")
    y, gx = backward(copy.deepcopy(quantizer), x, gy)
    huge_y, huge_gx = backward(quantizer, x * 2.0**126, gy)
    torch.testing.assert_close(huge_y * 2.0**-126, y, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(huge_gx, gx, rtol=1e-4, atol=1e-4 * float(gx.abs().max()))


LARGEST = torch.finfo(torch.float32).max


@pytest.mark.parametrize("restore", [False, True])
@pytest.mark.parametrize("kind", ["mean", "mean-var"])
@pytest.mark.parametrize("values", [[1e38, -1e38, 2e38], [LARGEST, -LARGEST], [LARGEST], [LARGEST, 0.0, 1.0]])
@over(cases(levels=(4, 3, 2)))
def test_normalised_sums_do_not_overflow(case: Case, values: list[float], kind: str, restore: bool) -> None:
    quantizer = make(case.with_fields(adaptive=kind, adaptive_restore=restore))
    count = int(np.prod(SHAPES[case.tag]))
    x = torch.tensor((values * count)[:count]).reshape(SHAPES[case.tag])
    y, gx = backward(quantizer, x, torch.full_like(x, 1e-6))  # times the deviation where it is undone
    assert y.isfinite().all()
    assert gx.isfinite().all()
    assert all(value.isfinite().all() for value in quantizer.state_dict().values())
    assert torch.equal(quantizer.eval().integers(x).dequantize(), quantizer(x))


def test_huge_values_are_normalised_as_small_ones() -> None:
    """1e38 times a tensor, whose sums are no float32: the same levels."""
    quantizer = make(Case("lsq", "wt", 4, half_range=False, fields=(("adaptive", "var-mean"),)))
    x = torch.from_numpy(generator("x").standard_normal(SHAPES["wt"])).float().clamp(-3, 3)
    assert torch.equal(quantizer(x * 2.0**126), quantizer(x))


@pytest.mark.parametrize("restore", [False, True])
@pytest.mark.parametrize("kind", ["mean", "var-mean"])
@pytest.mark.parametrize("size", [1, 9])
@over(cases(levels=(4, 3, 2), where=lambda method: "wt" in method.tags))
def test_adaptive_groups_without_variance(case: Case, size: int, kind: str, restore: bool) -> None:
    """One element per group, as a depth-wise 1x1 convolution has, and groups of equal elements."""
    quantizer = make(dataclasses.replace(case, tag="wt").with_fields(adaptive=kind, adaptive_restore=restore))
    x = torch.linspace(-1, 1, CHANNELS).reshape(CHANNELS, 1, 1, 1).repeat(1, size, 1, 1)
    y, gx = backward(quantizer, x)
    assert y.isfinite().all()
    assert gx.isfinite().all()


@over(cases(where=lambda method: method.method == "lq"))
def test_a_mean_that_cancels_the_epsilon_stays_finite(case: Case) -> None:
    quantizer = make(case.with_fields(adaptive="mean", adaptive_restore=True))
    y, gx = backward(quantizer, torch.full(SHAPES[case.tag], -1e-5))
    assert y.isfinite().all()
    assert gx.isfinite().all()


@pytest.mark.parametrize("adaptive", ["none", "var-mean"])
@over(cases(groups=(None, 1)))
def test_a_tensor_of_zeros_keeps_the_size_of_its_gradient(case: Case, adaptive: str) -> None:
    """Zero-initialised weights must not get a gradient that ends the training in the first step."""
    _, gx = backward(make(case.with_fields(adaptive=adaptive)), torch.zeros(SHAPES[case.tag]))
    assert gx.abs().max() <= 1e6


def test_adaptive_undone_gives_back_the_mean_of_a_constant_group() -> None:
    fields = (("adaptive", "var-mean"), ("adaptive_restore", True))
    quantizer = make(Case("lsq", "wt", 4, half_range=False, fields=fields))
    x = torch.linspace(-1, 1, CHANNELS).reshape(CHANNELS, 1, 1, 1).repeat(1, 6, 3, 3)
    torch.testing.assert_close(quantizer(x), x)
