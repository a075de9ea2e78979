"""The warm-up of a range (--stable), and ProxQuant after it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from model.quantizers.frame import Quantizer
from tests.model.quantizers.cases import SHAPES, Case, backward, cases, make, over, row_counts, sample, tensor
from tests.oracle import Groups


@over(cases(groups=(None, 2)))
def test_warm_up_passes_exactly_the_first_training_iterations(case: Case) -> None:
    quantizer = make(case.with_fields(stable=3))
    for step in range(5):
        x = tensor(case, step)
        y, gx = backward(quantizer, x)
        assert torch.equal(y, x) == (step < 3)
        if step < 3:
            assert torch.equal(gx, torch.ones_like(gx))
        else:
            assert max(row_counts(quantizer, y)) <= case.levels


@pytest.mark.parametrize("correlate", [-1.0, 0.5])
@over(cases(groups=(None, 2), where=lambda method: method.calibrates and method.method != "lq"))
def test_warm_up_takes_the_mean_of_the_largest_magnitudes(case: Case, correlate: float) -> None:
    quantizer = make(case.with_fields(stable=3, correlate=correlate))
    groups = Groups(quantizer.groups, case.site.channel_dim)
    largest = np.array([np.abs(groups.rows(sample(case, step))).max(axis=1) for step in range(3)])
    for step in range(3):
        quantizer(tensor(case, step))
    expected = largest.mean(axis=0) * (correlate if correlate > 0 else 1.0)
    np.testing.assert_allclose(quantizer.current_range().numpy().ravel(), expected, rtol=1e-5)
    quantizer(tensor(case, 4) * 100)  # past the warm-up nothing is collected
    np.testing.assert_allclose(quantizer.current_range().numpy().ravel(), expected, rtol=1e-5)


@over(cases(groups=(None, 2), where=lambda method: method.calibrates))
def test_warm_up_in_epochs_is_saved(case: Case) -> None:
    case = case.with_fields(stable_epoch=1)
    quantizer = make(case)
    quantizer.set_stable(2)
    for step in range(3):
        x = tensor(case, step)
        assert torch.equal(quantizer(x), x) == (step < 2)
    fresh = make(case, randomised=False)
    fresh.set_stable(2)
    fresh.load_state_dict(quantizer.state_dict())
    assert torch.equal(fresh.eval()(tensor(case)), quantizer.eval()(tensor(case)))


@over(cases(groups=(None, 2), where=lambda method: method.calibrates))
def test_after_the_warm_up_a_range_is_left_alone(case: Case) -> None:
    """What training has made of slopes, clip values or a basis stays, to the bit."""
    quantizer = make(case.with_fields(stable=1))
    quantizer(tensor(case))
    with torch.no_grad():
        for number, parameter in enumerate(quantizer.parameters(), 1):
            parameter.mul_(number)  # slopes that differ
    before = {name: value.clone() for name, value in quantizer.named_parameters()}
    buffers = {
        name: value.clone() for name, value in quantizer.named_buffers() if name in ("clip", "range_mean")
    }
    quantizer(tensor(case, 1))
    for name, value in (before | buffers).items():
        assert torch.equal(value, quantizer.state_dict()[name]), name


@pytest.mark.parametrize(("stable", "expected"), [(2, 6), (9, 9)])
def test_the_longer_warm_up_counts(stable: int, expected: int) -> None:
    case = Case("lsq", "fm", 4, half_range=True, fields=(("stable", stable), ("stable_epoch", 2)))
    quantizer = make(case)
    quantizer.set_stable(3)
    passed = [torch.equal(quantizer(tensor(case)), tensor(case)) for _ in range(12)]
    assert passed == [True] * expected + [False] * (12 - expected)


@over(cases(groups=(None, 2), where=lambda method: method.calibrates))
def test_warm_up_on_zeros_recovers(case: Case) -> None:
    """A layer whose first inputs are all zero has no range yet; later ones give it one."""
    quantizer = make(case.with_fields(stable=3))
    for step in range(3):
        quantizer(tensor(case, step) * (step > 0))
    y, gx = backward(quantizer, tensor(case))
    assert y.isfinite().all()
    assert gx.isfinite().all()
    assert 1 < max(row_counts(quantizer, y)) <= case.levels
    assert (quantizer.current_range() > 0.1 * case.method.spread).all()


@over(cases(where=lambda method: method.calibrates))
def test_warm_up_on_nothing_but_zeros_stays_finite(case: Case) -> None:
    quantizer = make(case.with_fields(stable=1))
    quantizer(torch.zeros(SHAPES[case.tag]))
    for x in (torch.zeros(SHAPES[case.tag]), tensor(case)):
        y, gx = backward(quantizer, x)
        assert y.isfinite().all()
        assert gx.isfinite().all()
        assert torch.equal(quantizer.eval().integers(x).dequantize(), quantizer(x).detach())
        quantizer.train()


@over(cases(where=lambda method: method.calibrates))
def test_two_forwards_before_a_backward(case: Case) -> None:
    """A layer that is used twice, while its warm-up collects and after."""
    quantizer = make(case.with_fields(stable=2))
    for _ in range(3):
        x = tensor(case).requires_grad_()
        (quantizer(x).sum() + quantizer(2 * x).sum()).backward()
        assert x.grad is not None


@pytest.mark.parametrize(
    "fields", [{}, {"adaptive": "var-mean", "adaptive_restore": True}], ids=["plain", "restored"]
)
def test_proxquant_blends_the_quantized_value_in(fields: dict[str, Any]) -> None:
    case = Case("lsq", "wt", 4, half_range=False).with_fields(**fields)
    quantizer, plain = make(case.with_fields(proxquant_step=4)), make(case)
    plain.load_state_dict(quantizer.state_dict())
    x = tensor(case)
    for share in (0.75, 0.5, 0.25, 0.0, 0.0):
        torch.testing.assert_close(quantizer(x), share * x + (1 - share) * plain(x))
    assert torch.equal(quantizer.eval()(x), plain(x))


def test_proxquant_begins_after_the_warm_up() -> None:
    case = Case("lsq", "wt", 4, half_range=False)
    quantizer, plain = make(case.with_fields(proxquant_step=2, stable=2)), make(case)
    x = tensor(case)
    for _ in range(2):
        assert torch.equal(quantizer(x), x)
    plain.load_state_dict({"clip_val": quantizer.get_parameter("clip_val")}, strict=False)
    torch.testing.assert_close(quantizer(x), 0.5 * x + 0.5 * plain(x))
    assert torch.equal(quantizer(x), plain(x))


class Operators(TorchDispatchMode):
    """Notes which operators run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "_local_scalar_dense" not in func.name():  # reading the counter
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def operators(case: Case, quantizer: Quantizer) -> list[str]:
    quantizer.zero_grad()
    with Operators() as seen:
        backward(quantizer, tensor(case))
    return seen.names


@pytest.mark.parametrize("device", ["the CPU", "another"])
@pytest.mark.parametrize("fields", [{"stable": 2}, {"proxquant_step": 2}, {"stable": 1, "proxquant_step": 1}])
@over(cases(where=lambda method: method.calibrates and not method.fields))
def test_afterwards_it_costs_nothing(case: Case, fields: dict[str, int], device: str) -> None:
    """The same operators run as without; where reading the counter would wait, from the next call of `train` on."""
    plain, quantizer = make(case), make(case.with_fields(**fields))
    if device == "another":
        quantizer.settle = lambda: None
    first = operators(case, quantizer)
    for _ in range(2):
        quantizer(tensor(case))
    if device == "another":
        assert len(operators(case, quantizer)) > len(operators(case, plain))
        del quantizer.settle
        quantizer.train()
        quantizer.settle = lambda: None
    with torch.no_grad():
        plain.set_range(quantizer.current_range())  # a range of 1 takes fewer operators
    assert operators(case, quantizer) == operators(case, plain)
    if case.method.method != "lq":
        assert not quantizer.gathers()
        checkpoint(quantizer, tensor(case).requires_grad_(), use_reentrant=False).sum().backward()
    quantizer.eval()
    assert operators(case, quantizer) == operators(case, plain.eval())
    fresh = make(case.with_fields(**fields)).state_dict()
    vars(quantizer).pop("settle", None)
    quantizer.load_state_dict(fresh)  # which begins anew
    assert operators(case, quantizer.train()) == first
