"""Properties that hold for every tensor, found by searching for one where they do not."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.quant import Quantizer, TensorSite, build
from tests import oracle
from tests.test_quant import METHODS, Case, Method

search = settings(max_examples=40, deadline=None, derandomize=True, database=None)
floats = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=True)
near_one = st.floats(-4.0, 4.0, width=32)
clips = st.floats(2.0**-10, 2.0**10, width=32)


def tensors(elements: st.SearchStrategy[float] = floats) -> st.SearchStrategy[Tensor]:
    return st.lists(elements, min_size=1, max_size=24).map(lambda values: torch.tensor(values).reshape(-1, 1, 1, 1))


def per_tensor(case: Case, x: Tensor) -> Quantizer:
    """The quantizer of a case for tensors like x [n, 1, 1, 1], all elements in one group."""
    channels, dim = (len(x), 0) if case.tag == "wt" else (1, 1)
    site = TensorSite(name="conv1", channels=channels, channel_dim=dim, ndim=4, fan=9)
    quantizer = build(dataclasses.replace(case.config, quant_group=1), site)
    assert isinstance(quantizer, Quantizer)
    return quantizer.eval()


def cases(name: str = "", **attributes: object) -> pytest.MarkDecorator:
    """Every method with these attributes (or this one) at each of its levels and ranges."""
    found = [
        Case(key, tag, levels, half_range)
        for key, method in METHODS.items()
        if name in ("", key) and all(getattr(method, item) == value for item, value in attributes.items())
        for tag in method.tags
        if tag != "ot"
        for levels in method.levels
        for half_range in method.half_range
    ]
    return pytest.mark.parametrize("case", found, ids=str)


def top(case: Case, clip: float) -> tuple[float, float]:
    """The lowest and the highest level of an evenly spaced method."""
    if case.half_range:
        return 0.0, clip
    if case.config.grid == "midtread":
        return -clip * (case.levels // 2) / ((case.levels - 1) // 2), clip
    return -clip, clip


def even(method: Method) -> bool:
    return method.range_name == "clip_val" or method is METHODS["dorefa"]


EVEN = {name for name, method in METHODS.items() if even(method)}
evenly_spaced = pytest.mark.parametrize(
    "case",
    [mark for name in sorted(EVEN) for mark in cases(name).args[1]],
    ids=str,
)


@evenly_spaced
@search
@given(x=tensors(), clip=clips)
def test_bounds_count_and_finite_gradients(case: Case, x: Tensor, clip: float) -> None:
    quantizer = per_tensor(case.with_fields(boundary=clip), x)
    x.requires_grad_()
    y = quantizer(x)
    low, high = top(case, clip)
    assert (y >= low * (1 + 1e-6)).all()
    assert (y <= high * (1 + 1e-6)).all()
    assert len(y.unique()) <= case.levels
    y.sum().backward()
    assert x.grad is not None
    assert ((x.grad == 0) | (x.grad == 1)).all()
    for parameter in quantizer.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


@evenly_spaced
@search
@given(x=tensors(near_one), clip=clips)
def test_the_level_is_the_nearest(case: Case, x: Tensor, clip: float) -> None:
    low, high = top(case, clip)
    x = (x * clip).clamp(low, high)
    step = (high - low) / (case.levels - 1)
    difference = (per_tensor(case.with_fields(boundary=clip), x)(x) - x).abs()
    assert (difference <= step / 2 + 1e-6 * (high - low)).all()


@cases(monotonic=True)
@search
@given(x=tensors(st.one_of(floats, near_one)))
def test_larger_inputs_never_get_smaller_levels(case: Case, x: Tensor) -> None:
    x = x.sort(dim=0).values
    y = per_tensor(case, x)(x)
    assert y.isfinite().all()
    assert (y.diff(dim=0) >= 0).all()


@cases(idempotent=True)
@search
@given(x=tensors(st.one_of(floats, near_one)), clip=clips)
def test_quantizing_twice_changes_nothing(case: Case, x: Tensor, clip: float) -> None:
    quantizer = per_tensor(case.with_fields(boundary=clip), x)
    y = quantizer(x)
    assert torch.equal(quantizer(y), y)


@pytest.mark.parametrize("levels", [2, 3, 4, 8, 256])
@pytest.mark.parametrize(("name", "tag"), [("lsq", "fm"), ("lsq", "wt"), ("pact", "fm"), ("dorefa", "fm")])
@search
@given(x=tensors(near_one), clip=clips)
def test_a_full_range_is_symmetric(name: str, tag: str, levels: int, x: Tensor, clip: float) -> None:
    """Ties aside, which go to the even level number on both sides."""
    case = Case(name, tag, levels, half_range=False, fields=(("boundary", clip),))
    quantizer = per_tensor(case, x)
    x = x * clip
    ratio = x.double().numpy() / clip
    jumps = oracle.uniform_jumps(levels, half_range=False)
    clear = torch.from_numpy(np.abs(ratio[..., None] - jumps).min(axis=-1) > 1e-5)
    assert torch.equal(quantizer(-x)[clear], -quantizer(x)[clear])


@cases()
@search
@given(x=tensors(st.one_of(floats.filter(lambda value: abs(value) < 1e30), near_one)))
def test_integers_stand_for_the_quantized_tensor(case: Case, x: Tensor) -> None:
    quantizer = per_tensor(case, x)
    y = quantizer(x)
    assert y.isfinite().all()
    assert torch.equal(quantizer.integers(x).dequantize(), y)


@cases("lq")
@search
@given(x=tensors(st.one_of(floats, near_one)))
def test_lq_takes_the_nearest_of_its_levels(case: Case, x: Tensor) -> None:
    quantizer = per_tensor(case, x)
    basis = quantizer.get_buffer("basis").double().numpy().ravel()
    levels = oracle.lq_codes(len(basis), case.half_range) @ basis
    values = x.double().numpy()
    nearest = np.abs(values[..., None] - levels).min(axis=-1)
    found = np.abs(quantizer(x).double().numpy() - values)
    np.testing.assert_allclose(found, nearest, rtol=1e-6, atol=1e-6)


@cases(calibrates=True)
@search
@given(x=tensors(st.one_of(floats.filter(lambda value: abs(value) < 1e30), near_one)))
def test_any_first_batch_calibrates(case: Case, x: Tensor) -> None:
    quantizer = per_tensor(case.with_fields(stable=1), x).train()
    assert torch.equal(quantizer(x), x)
    y = quantizer(x)
    assert y.isfinite().all()
    assert len(y.unique()) <= case.levels
