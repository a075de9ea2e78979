"""Integers that stand for a quantized tensor."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from model.quantizers.integers import QuantizedTensor
from model.quantizers.lsq import LSQ
from model.quantizers.numbered import numbered
from tests.model.quantizers.cases import Case, cases, each_level, make, over, row_counts, tensor

ROUNDING = 2.0**-22  # of the top level: how far an engine's code times scale may be from what training sees


@over(each_level(cases(groups=(None, 2))))
def test_integers_stand_for_the_quantized_tensor(case: Case) -> None:
    quantizer = make(case).eval()
    x = tensor(case)
    found = quantizer.integers(x)
    y = quantizer(x)
    assert torch.equal(found.dequantize(), y)
    assert (found.codes.dtype, found.codes.shape) == (torch.int32, x.shape)
    assert max(row_counts(quantizer, found.codes)) <= case.levels
    assert 0 <= found.numbers.min() <= found.numbers.max() < case.levels
    low, high = int(found.codes.min()), int(found.codes.max())
    if case.config.method == "xnor":
        assert (low, high) == (-1, 1)
    elif not case.method.even:
        top = int(quantizer.search_grid().top)
        assert (0 if case.half_range else -top) <= low <= high <= top
    elif case.half_range or found.scale is None or found.offset is not None:
        assert 0 <= low <= high < case.levels
    elif case.config.grid == "midtread":
        assert -(case.levels // 2) <= low <= high <= (case.levels - 1) // 2
    else:
        assert -case.levels < low <= high < case.levels
    if found.scale is not None:
        offset = torch.zeros(1) if found.offset is None else found.offset
        engine = (found.codes - found.zero_point) * found.scale + offset
        largest = found.codebook.abs().max() * found.factor + offset.abs()
        assert ((engine - y).abs() <= ROUNDING * largest).all()


@pytest.mark.parametrize(
    "fields", [{"gamma": True}, {"adaptive": "var-mean", "adaptive_restore": True}, {"adaptive": "var-mean"}],
    ids=["gamma", "restored", "adaptive"],
)  # fmt: skip
@over(cases(groups=(None, 2)))
def test_integers_with_what_comes_on_top(case: Case, fields: dict[str, Any]) -> None:
    quantizer = make(case.with_fields(**fields)).eval()
    for dtype in (torch.float32, torch.bfloat16):
        x = tensor(case).to(dtype)
        assert torch.equal(quantizer.integers(x).dequantize().to(dtype), quantizer(x))


@over(cases(where=lambda method: method.calibrates))
def test_integers_change_nothing(case: Case) -> None:
    quantizer = make(case.with_fields(stable=1))
    quantizer(tensor(case))
    before = copy.deepcopy(quantizer.state_dict())
    quantizer.integers(tensor(case))
    assert all(torch.equal(before[name], value) for name, value in quantizer.state_dict().items())


@pytest.mark.parametrize("fields", [{}, {"adaptive": "var-mean", "adaptive_restore": True}, {"gamma": True}])
@over(each_level(cases(groups=(None, 2))))
def test_numbers_alone_are_those_of_the_integers(case: Case, fields: dict[str, Any]) -> None:
    """And so are the levels of any numbers."""
    quantizer = make(case.with_fields(**fields)).eval()
    found = quantizer.integers(tensor(case))
    numbers, level_of = numbered(quantizer, tensor(case))
    assert torch.equal(numbers.long(), found.numbers)
    assert torch.equal(level_of(numbers), found.unscaled(found.numbers))
    others = case.levels - 1 - found.numbers
    assert torch.equal(level_of(others.int()), found.unscaled(others))
    clips = (bool(case.method.range_name) and case.method.even) or case.name == "n2uq-wt"
    clips |= case.method.method in ("dorefa", "pact")
    even = clips and not case.config.binary_scale
    assert numbers.is_floating_point() == even  # without the codes


def test_a_method_that_encodes_in_its_own_way_is_asked_for_its_integers() -> None:
    quantizer = make(Case("lsq", "wt", 4, half_range=False))

    class Reversed(LSQ):
        def encode(self, x: Tensor) -> QuantizedTensor:
            return super().encode(-x)

    quantizer.__class__ = Reversed
    x = tensor(Case("lsq", "wt", 4, half_range=False))
    numbers, _ = numbered(quantizer, x)
    assert torch.equal(numbers, quantizer.integers(x).numbers)
