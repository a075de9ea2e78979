"""LQ-Nets: the basis that follows least squares."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch

from model.quantizers.frame import Quantizer
from model.quantizers.lq import LQ
from tests import uneven
from tests.model.quantizers.cases import (
    CHANNELS,
    FAN,
    SHAPES,
    Case,
    cases,
    make,
    over,
    sample,
    setting,
    tensor,
)
from tests.oracle import Array


def assert_follows(
    quantizer: Quantizer, case: Case, x: Array, update: Callable[[Array, Array], Array]
) -> None:
    """A step with x: the basis becomes `update` of the last one and of the least-squares fit to x."""
    given, old = setting(case, quantizer), quantizer.get_buffer("basis").double().numpy()
    new = uneven.lq_least_squares(
        x.astype(np.float64), basis=old, half_range=case.half_range, groups=given.groups, activation=not given.weight
    )  # fmt: skip
    expected = update(old, new)
    quantizer(torch.from_numpy(x))
    np.testing.assert_allclose(quantizer.get_buffer("basis").numpy(), expected, rtol=1e-4, atol=1e-6)


@over(cases(levels=(16, 4), groups=(None, 2), where=lambda method: method.method == "lq"))
def test_lq_basis_follows_least_squares(case: Case) -> None:
    quantizer = make(case)
    given = setting(case, quantizer)
    basis = given.state["basis"]
    initial = uneven.lq_initial_basis(len(basis), given.groups.count, fan=FAN if given.weight else None)
    np.testing.assert_allclose(basis, initial, rtol=1e-6)
    for step in range(3):
        x = sample(case, step)
        assert_follows(quantizer, case, x, uneven.lq_blend)
    basis = quantizer.get_buffer("basis").clone()
    quantizer.eval()
    quantizer(torch.from_numpy(x))
    assert torch.equal(quantizer.get_buffer("basis"), basis)


@over(cases(where=lambda method: method.method == "lq"))
def test_lq_custom_update_is_a_running_mean(case: Case) -> None:
    case = case.with_fields(custom_update=True)
    quantizer = make(case)
    for iteration in (1, 2, 3):
        x = sample(case, iteration)
        assert_follows(quantizer, case, x, partial(uneven.lq_running_mean, iteration=iteration))


@over(cases(where=lambda method: method.method == "lq"))
def test_the_running_mean_begins_behind_a_warm_up(case: Case) -> None:
    """A long warm-up weighs nothing: the first basis behind it is that of its tensor, the next one a mean of two."""
    case = case.with_fields(custom_update=True, stable=50)
    quantizer = make(case)
    for iteration in range(50):
        quantizer(torch.from_numpy(sample(case, iteration)))
    for count in (1, 2):
        x = sample(case, 100 + count)
        assert_follows(quantizer, case, x, partial(uneven.lq_running_mean, iteration=count))


@over(cases(where=lambda method: method.method == "lq"))
def test_lq_survives_tensors_without_information(case: Case) -> None:
    """Zeros and constants leave codes unused; the least-squares system must stay solvable."""
    quantizer = make(case)
    for value in (0.0, 1.0, -1.0, 1e-40, 1e30):
        for _ in range(3):
            assert quantizer(torch.full(SHAPES[case.tag], value)).isfinite().all()
            assert quantizer.get_buffer("basis").isfinite().all()


@pytest.mark.parametrize("tag", ["fm", "wt"])
@pytest.mark.parametrize(("theirs", "ours"), [(16, 4), (4, 16)])
def test_a_basis_of_other_bits_gives_its_range(tag: str, theirs: int, ours: int) -> None:
    half = tag == "fm"
    trained, quantizer = (
        make(Case("lq", tag, levels, half_range=half, quant_group=2)) for levels in (theirs, ours)
    )
    entries = quantizer.adapted(trained.state_dict())
    basis = entries["basis"]
    assert basis.shape == (quantizer.get_buffer("basis").shape)
    top = trained.get_buffer("basis").abs().sum(dim=0)
    torch.testing.assert_close(basis.sum(dim=0), top)
    torch.testing.assert_close(basis[1:], 2 * basis[:-1])  # evenly spaced levels


@over(cases(levels=(2, 4, 16), groups=(None, 2, 1), where=lambda method: method.method == "lq"))
def test_least_squares_from_counts_is_that_of_the_codes(case: Case) -> None:
    """One bit at a time gives B^T B and B^T x of the written-out codes."""
    quantizer = make(case)
    assert isinstance(quantizer, LQ)
    rows = quantizer.grouped(tensor(case).float())
    positions, _, order = quantizer.assign(rows)
    numbers = order.gather(1, positions)
    codes = quantizer.codes[numbers].double()
    gram, target = quantizer.normal_equations(rows, numbers)
    torch.testing.assert_close(gram, codes.transpose(1, 2) @ codes)
    torch.testing.assert_close(target, codes.transpose(1, 2) @ rows.double().unsqueeze(2))
    levels, order = quantizer.sorted_levels()
    quantized, found = quantizer.compare(tensor(case), levels, True)
    assert torch.equal(quantizer.grouped(quantized), levels.gather(1, positions))
    assert found is not None
    gram, target = quantizer.equations_of_levels(*found, order)
    torch.testing.assert_close(gram, codes.transpose(1, 2) @ codes)
    torch.testing.assert_close(
        target, codes.transpose(1, 2) @ rows.double().unsqueeze(2), rtol=1e-6, atol=1e-4
    )


@over(cases(levels=(4, 16), groups=(None, 2), where=lambda method: method.method == "lq"))
def test_a_warm_up_gives_lq_its_top_level(case: Case) -> None:
    quantizer = make(case.with_fields(stable=2))
    for step in range(2):
        quantizer(tensor(case, step))
    torch.testing.assert_close(quantizer.current_range(), quantizer.get_buffer("range_mean"))


@pytest.mark.parametrize("levels", [4, 16, 256])
@pytest.mark.parametrize("value", [0.0, 0.03, -0.03])
def test_lq_weights_without_spread_follow_the_regularised_system(levels: int, value: float) -> None:
    """Dead or constant filters: the regularisation makes their system solvable, at any number of bits."""
    quantizer = make(Case("lq", "wt", levels, half_range=False))
    assert isinstance(quantizer, LQ)
    x = torch.full(SHAPES["wt"], value)
    rows = quantizer.grouped(x)
    positions, _, order = quantizer.assign(rows)
    codes = quantizer.codes[order.gather(1, positions)].double().numpy()
    before = quantizer.basis.clone().double().numpy()
    quantizer(x)
    for group in range(CHANNELS):
        b = codes[group]
        gram = b.T @ b
        np.fill_diagonal(gram, (gram.diagonal() + 1e-4) * 1.000001)
        wanted = np.linalg.solve(gram, b.T @ rows[group].double().numpy() + 1e-4 * before[:, group])
        moved = 0.9 * before[:, group] + 0.1 * wanted
        np.testing.assert_allclose(quantizer.basis[:, group].numpy(), moved, rtol=1e-4, atol=1e-6)
