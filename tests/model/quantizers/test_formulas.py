"""Every method against the oracle: outputs, gradients, and where both jump."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from model.quantizers.registry import methods
from tests.model.quantizers import formulas
from tests.model.quantizers.cases import (
    CHANNELS,
    METHODS,
    SHAPES,
    Case,
    backward,
    cases,
    compare,
    each_level,
    make,
    over,
    sample,
    setting,
)


def test_every_registered_method_is_in_the_table() -> None:
    assert {(method.method, tag) for method in METHODS.values() for tag in method.tags} == methods().keys()


@over(each_level(cases(groups=(None, 1, 2, CHANNELS), tags=("fm", "wt", "ot"))))
def test_output_and_gradients_match_the_oracle(case: Case) -> None:
    compare(case)


@pytest.mark.parametrize("kind", ["fan-scale", "scale-fan", "element-scale", "scale-element"])
@over(cases(groups=(None, 2), where=lambda method: method.range_name == "clip_val"))
def test_gradient_scale(case: Case, kind: str) -> None:
    compare(case.with_fields(grad_scale=kind, scale=0.7))


@over(cases(where=lambda method: method.expected in (formulas.dorefa_activation, formulas.pact)))
def test_ste_scale_makes_up_for_the_clipped_elements(case: Case) -> None:
    compare(case.with_fields(grad_type="STE-scale"))


@over(cases(where=lambda method: method.expected in (formulas.dorefa_activation, formulas.pact)))
def test_ste_scale_with_every_element_clipped(case: Case) -> None:
    _, gx = backward(make(case.with_fields(grad_type="STE-scale")), torch.full(SHAPES[case.tag], 100.0))
    assert torch.equal(gx, torch.zeros_like(gx))


@over(cases(groups=(None, 1, 2), where=lambda method: not method.fields))
def test_gamma(case: Case) -> None:
    compare(case.with_fields(gamma=True))


@pytest.mark.parametrize("restore", [False, True], ids=["kept", "restored"])
@pytest.mark.parametrize("kind", ["mean", "var", "mean-var", "var-mean"])
@over(
    cases(groups=(2,), where=lambda method: method.monotonic and method.expected is not formulas.fatnn_half)
)
def test_adaptive(case: Case, kind: str, restore: bool) -> None:
    compare(case.with_fields(adaptive=kind, adaptive_restore=restore))


@over(cases(groups=(None, 1), where=lambda method: method.range_name == "clip_val"))
def test_outside_the_range_the_gradient_to_the_clip_value_is_the_slope_of_the_output(case: Case) -> None:
    """Where all is clipped the output is smooth in the clip value, for LSQ below the range too."""
    signs = [1.0] if case.method.expected is formulas.pact else [1.0, -1.0]
    for sign in signs:
        quantizer = make(case)
        x = torch.full(SHAPES[case.tag], 100.0 * sign)
        clip = quantizer.get_parameter("clip_val")
        before = quantizer(x)
        before.sum().backward()
        assert clip.grad is not None
        moved = clip.grad.clone()
        with torch.no_grad():
            delta = clip.clone()
            clip.add_(delta)
            change = quantizer.grouped(quantizer(x) - before).sum(dim=1).reshape(clip.shape)
        torch.testing.assert_close(moved, change / delta)


@pytest.mark.parametrize("tag", ["fm", "wt"])
def test_paper_gradient_scale_moves_the_step_as_the_paper_does(tag: str) -> None:
    """One step of c moves s = c / Qp by rate * dL/ds / sqrt(N * Qp), N elements of a weight or sample."""
    case = Case("lsq-midtread", tag, 16, half_range=False, quant_group=1, fields=(("grad_scale", "paper"),))
    plain = dataclasses.replace(case, fields=())
    quantizer, high, rate = make(case), 7, 0.01
    x = sample(case).astype(np.float64)
    given = setting(plain, quantizer)
    gradient = formulas.lsq_midtread(given, x, np.ones_like(x)).grads["clip_val"] * high
    count = x.size if tag == "wt" else x[0].size
    clip = quantizer.get_parameter("clip_val")
    before = clip.detach().clone()
    quantizer(torch.from_numpy(x).float()).sum().backward()
    torch.optim.SGD([clip], lr=rate).step()
    moved = (clip.detach() - before).double().numpy().ravel() / high
    np.testing.assert_allclose(moved, -rate * gradient / np.sqrt(count * high), rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "levels", "half_range", "boundary", "x", "y"),
    [
        ("lsq", 3, True, 2.0, [0.5, 1.5, -1.0, 2.0, 3.0], [0.0, 2.0, 0.0, 2.0, 2.0]),
        ("lsq", 5, True, 4.0, [0.5, 1.5, 2.5, 3.5], [0.0, 2.0, 2.0, 4.0]),
        ("lsq", 4, False, 3.0, [-4.0, -2.0, 0.0, 2.0, 2.5], [-3.0, -3.0, 1.0, 1.0, 3.0]),
        ("lsq", 2, False, 1.0, [-1e-3, 0.0, 1e-3], [-1.0, -1.0, 1.0]),
        ("lsq", 3, False, 1.0, [-0.5, 0.0, 0.5, 0.6], [-1.0, 0.0, 1.0, 1.0]),
        ("lsq-midtread", 4, False, 1.0, [-3.0, -1.5, -0.5, 0.0, 0.5, 3.0], [-2.0, -2.0, 0.0, 0.0, 0.0, 1.0]),
        ("lsq-midtread", 8, False, 3.0, [-9.0, -2.5, -1.5, 2.5, 3.5], [-4.0, -2.0, -2.0, 2.0, 3.0]),
        ("pact", 5, True, 4.0, [0.5, 1.5, 2.5, 3.5], [0.0, 2.0, 2.0, 4.0]),
        ("dorefa", 5, True, 4.0, [0.5, 1.5, 2.5, 3.5], [0.0, 2.0, 2.0, 4.0]),
        ("xnor", 2, False, 1.0, [-2.0, -0.0, 0.0, 1e-30], [-1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_ties_go_to_the_even_level_number(
    name: str, levels: int, half_range: bool, boundary: float, x: list[float], y: list[float]
) -> None:
    case = Case(name, "fm", levels, half_range, fields=(("boundary", boundary),))
    assert make(case, randomised=False)(torch.tensor(x)).tolist() == pytest.approx(y, abs=1e-6)


@pytest.mark.parametrize("levels", [2, 3, 8, 11, 64, 100, 256, 4096])
@pytest.mark.parametrize("name", ["pact", "lsq"])
def test_an_element_at_the_clip_value(name: str, levels: int) -> None:
    """x = c takes the top level c; PACT's clip value gets its gradient whatever c / (c / n) rounds to."""
    for boundary in np.linspace(0.3, 7.0, 25, dtype=np.float32):
        case = Case(name, "fm", levels, half_range=True, fields=(("boundary", float(boundary)),))
        quantizer = make(case, randomised=False)
        y, gx = backward(quantizer, torch.full((3,), float(boundary)))
        torch.testing.assert_close(y, torch.full((3,), float(boundary)), rtol=3e-7, atol=0)
        clip_grad = quantizer.get_parameter("clip_val").grad
        assert clip_grad is not None
        if name == "pact":
            assert (gx.tolist(), clip_grad.tolist()) == ([0.0] * 3, [3.0])
