"""Gradients of evenly spaced levels at the ends of the range, and what may happen to a tensor around the quantizer."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model.quantizers.grid import ClipSTE, Grid
from model.quantizers.pact import ClippedRound
from tests.model.quantizers.cases import Case, backward, cases, make, over, tensor

GRIDS = {
    "half": Grid.of(4, half_range=True),
    "full": Grid.of(4, half_range=False),
    "mid-tread": Grid.of(8, half_range=False, midtread=True),
}
CLIPS = np.random.default_rng(0).uniform(0.01, 100, 200).astype(np.float32)
CLIPS = np.concatenate(
    [CLIPS, 2.0 ** np.arange(-6, 7, dtype=np.float32), np.nextafter(np.float32([1, 2, 4]), 0)]
)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("function", [ClipSTE, ClippedRound])
def test_the_ends_are_inside_and_their_neighbours_outside(function: type[ClipSTE], grid: Grid) -> None:
    """One clip value, which is compared with, and several, which are divided by; PACT's top is outside."""
    infinity = np.float32(np.inf)
    for clip in CLIPS:
        # The ends as x / c in float32, whatever x has that quotient.
        low = np.float32(grid.bottom / grid.top) * clip
        near = low + np.arange(-4, 5, dtype=np.float32) * np.spacing(max(abs(low), np.float32(1e-30)))
        x = np.concatenate([near, [clip, np.nextafter(clip, infinity), np.nextafter(clip, -infinity), 0]])
        x = torch.from_numpy(x.astype(np.float32))
        ratio = x / float(clip)
        inside = ratio.clamp(grid.bottom / grid.top, 1) == ratio
        above = ratio >= 1
        expected = inside if function is ClipSTE else inside & ~above
        for count in (1, 2):
            found = torch.full((count,) + (1,) * (count - 1), float(clip), requires_grad=True)
            values = x.expand(count, -1) if count > 1 else x
            _, gx = backward(lambda v, f=found: function.apply(v, f, grid), values)
            assert torch.equal(gx != 0, expected.expand_as(gx)), (clip, count)
            if function is ClippedRound:
                assert found.grad is not None and found.grad.unique().tolist() == [float(above.sum())]


def learned(case: Case) -> bool:
    return case.method.range_name == "clip_val"


@over(cases(tags=("ot",)))
def test_an_output_may_be_changed_in_place(case: Case) -> None:
    """As by the activation that comes next."""
    plain, changed = make(case), make(case)
    _, expected = backward(lambda x: plain(x).relu(), tensor(case))
    _, found = backward(lambda x: changed(x).relu_(), tensor(case))
    assert torch.equal(found, expected)
    for one, two in zip(plain.parameters(), changed.parameters(), strict=True):
        assert torch.equal(one.grad, two.grad)


@over([case for case in cases(groups=(None, 2)) if learned(case)])
def test_an_infinite_element_leaves_the_gradients_finite(case: Case) -> None:
    x = tensor(case)
    x[0, 0, 0, 0] = torch.inf
    quantizer = make(case)
    _, gx = backward(quantizer, x)
    largest = tensor(case)
    largest[0, 0, 0, 0] = 1e30
    other = make(case)
    _, expected = backward(other, largest)
    assert torch.equal(gx, expected)
    for one, two in zip(quantizer.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad)


@over([case for case in cases(groups=(None, 2)) if learned(case) and case.method.method != "stableqat"])
def test_a_gradient_of_the_gradient(case: Case) -> None:
    """That of a penalty on the gradient, in which rounding counts as the identity too; StableQAT's slope is another."""

    x = tensor(case).requires_grad_()
    y = make(case.with_fields(grad_delta=0.0))(x)
    (gx,) = torch.autograd.grad(y.pow(3).sum() / 3, x, create_graph=True)
    gx.pow(2).sum().backward()
    torch.testing.assert_close(x.grad, 4 * y.detach().pow(3) * (gx != 0))
