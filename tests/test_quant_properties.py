"""Properties that hold for every tensor, found by searching for one where they do not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.quant import Quantizer, TensorSite, build
from tests import oracle
from tests.test_quant import METHODS, Case, Method, cases, each_level

search = settings(max_examples=150, deadline=None, derandomize=True, database=None)

any_float = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=True)
near_range = st.floats(-4.0, 4.0, width=32)
below_top = any_float.filter(lambda value: abs(value) < 1e38)  # sums of two basis vectors stay finite
clips = st.floats(2.0**-10, 2.0**10, width=32)


def tensors(*elements: st.SearchStrategy[float]) -> st.SearchStrategy[Tensor]:
    """Tensors [n, 1, 1, 1] of a mixture of these elements."""
    values = st.lists(st.one_of(*elements), min_size=1, max_size=24)
    return values.map(lambda found: torch.tensor(found).reshape(-1, 1, 1, 1))


def any_case(where: Callable[[Method], bool] = bool) -> st.SearchStrategy[Case]:
    """Every method with each of its levels and ranges."""
    return st.sampled_from(each_level(cases(where=where)))


def is_uniform(method: Method) -> bool:
    return bool(method.range_name) or method is METHODS["dorefa"]


def per_tensor(case: Case, x: Tensor) -> Quantizer:
    """The quantizer of a case for tensors like x [n, 1, 1, 1], all elements in one group."""
    channels, dim = (len(x), 0) if case.tag == "wt" else (1, 1)
    site = TensorSite(name="conv1", channels=channels, channel_dim=dim, ndim=4, fan=9)
    quantizer = build(dataclasses.replace(case.config, quant_group=1), site)
    assert isinstance(quantizer, Quantizer)
    return quantizer.eval()


def ends(case: Case, clip: float) -> tuple[float, float]:
    """The lowest and the highest level of an evenly spaced method."""
    if case.half_range:
        return 0.0, clip
    if case.config.grid == "midtread":
        return -clip * (case.levels // 2) / ((case.levels - 1) // 2), clip
    return -clip, clip


@search
@given(case=any_case(is_uniform), x=tensors(any_float, near_range), clip=clips)
def test_bounds_count_and_gradients(case: Case, x: Tensor, clip: float) -> None:
    quantizer = per_tensor(case.with_fields(boundary=clip), x)
    x.requires_grad_()
    y = quantizer(x)
    low, high = ends(case, clip)
    assert (y >= low * (1 + 1e-6)).all()
    assert (y <= high * (1 + 1e-6)).all()
    assert len(y.unique()) <= case.levels
    y.sum().backward()
    assert x.grad is not None
    assert ((x.grad == 0) | (x.grad == 1)).all()
    for parameter in quantizer.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


@search
@given(case=any_case(), x=tensors(any_float, near_range))
def test_output_and_gradients_are_finite(case: Case, x: Tensor) -> None:
    quantizer = per_tensor(case, x).train()
    x.requires_grad_()
    y = quantizer(x)
    y.sum().backward()
    assert y.isfinite().all()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert all(value.isfinite().all() for value in quantizer.state_dict().values())


@search
@given(case=any_case(is_uniform), x=tensors(near_range), clip=clips)
def test_the_level_is_the_nearest(case: Case, x: Tensor, clip: float) -> None:
    low, high = ends(case, clip)
    x = (x * clip).clamp(low, high)
    step = (high - low) / (case.levels - 1)
    difference = (per_tensor(case.with_fields(boundary=clip), x)(x) - x).abs()
    assert (difference <= step / 2 + 1e-6 * (high - low)).all()


@search
@given(case=any_case(lambda method: method.method == "lq"), x=tensors(any_float, near_range))
def test_lq_takes_the_nearest_of_its_levels(case: Case, x: Tensor) -> None:
    quantizer = per_tensor(case, x)
    basis = quantizer.get_buffer("basis").double().numpy().ravel()
    levels = oracle.lq_codes(len(basis), case.half_range) @ basis
    values = x.double().numpy()
    nearest = np.abs(values[..., None] - levels).min(axis=-1)
    found = np.abs(quantizer(x).double().numpy() - values)
    np.testing.assert_allclose(found, nearest, rtol=1e-6, atol=1e-6)


@search
@given(case=any_case(lambda method: method.monotonic), x=tensors(any_float, near_range))
def test_larger_inputs_never_get_smaller_levels(case: Case, x: Tensor) -> None:
    x = x.sort(dim=0).values
    assert (per_tensor(case, x)(x).diff(dim=0) >= 0).all()


@search
@given(case=any_case(lambda method: method.idempotent), x=tensors(any_float, near_range), clip=clips)
def test_quantizing_twice_changes_nothing(case: Case, x: Tensor, clip: float) -> None:
    quantizer = per_tensor(case.with_fields(boundary=clip), x)
    y = quantizer(x)
    assert torch.equal(quantizer(y), y)


@search
@given(
    case=any_case(lambda method: is_uniform(method) and "grid" not in method.fields).filter(
        lambda case: not case.half_range
    ),
    x=tensors(near_range),
    clip=clips,
)
def test_a_full_range_is_symmetric(case: Case, x: Tensor, clip: float) -> None:
    """Ties aside, which go to the even level number on both sides."""
    quantizer = per_tensor(case.with_fields(boundary=clip), x)
    x = x * clip
    ratio = x.double().numpy() / clip
    jumps = oracle.uniform_jumps(case.levels, half_range=False)
    clear = torch.from_numpy(np.abs(ratio[..., None] - jumps).min(axis=-1) > 1e-5)
    torch.testing.assert_close(quantizer(-x)[clear], -quantizer(x)[clear], rtol=1e-6, atol=1e-6 * clip)


@search
@given(case=any_case(), x=tensors(any_float, near_range))
def test_integers_stand_for_the_quantized_tensor(case: Case, x: Tensor) -> None:
    quantizer = per_tensor(case, x)
    assert torch.equal(quantizer.integers(x).dequantize(), quantizer(x))


@search
@given(case=any_case(lambda method: method.calibrates), x=tensors(below_top, near_range))
def test_any_first_batch_calibrates(case: Case, x: Tensor) -> None:
    quantizer = per_tensor(case.with_fields(stable=1), x).train()
    assert torch.equal(quantizer(x), x)
    y = quantizer(x)
    assert y.isfinite().all()
    assert len(y.unique()) <= case.levels
    quantizer.eval()
    assert torch.equal(quantizer.integers(x).dequantize(), quantizer(x))
