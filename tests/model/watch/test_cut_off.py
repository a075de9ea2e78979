"""The share of a tensor outside the range of the levels, for every method."""

from __future__ import annotations

import pytest
import torch

from model.quantizers.frame import Quantizer
from model.quantizers.registry import build_quantizer
from model.watch.cut_off import cut_off
from tests.model.quantizers.cases import Case

X = torch.tensor([[-3.0, -1.4, -1.2, -0.1, 0.0, 0.9, 1.1, 1.2, 1.4, 3.0]])


def build(case: Case) -> Quantizer:
    quantizer = build_quantizer(case.config, case.site)
    assert isinstance(quantizer, Quantizer)
    return quantizer


@pytest.mark.parametrize(
    ("method", "levels", "half_range", "below", "above"),
    [
        ("lsq", 4, True, 0.4, 0.3),  # [0, 1], and half a step of 1/3
        ("lsq", 4, False, 0.2, 0.2),  # [-1, 1], and half a step of 2/3 on both sides
        ("pact", 3, True, 0.4, 0.2),  # half a step of 1/2
        ("dorefa", 256, True, 0.4, 0.4),
        ("dorefa", 256, False, 0.3, 0.4),
    ],
)
def test_the_range_is_that_of_the_levels(
    method: str, levels: int, half_range: bool, below: float, above: float
) -> None:
    quantizer = build(Case(method, "fm", levels, half_range=half_range))
    found = cut_off(quantizer, X)
    assert found is not None
    assert found.tolist() == pytest.approx([below, above])


def test_signs_have_no_range() -> None:
    assert cut_off(build(Case("xnor", "fm", 2, half_range=False)), X) is None
