"""APoT: what its codes are good for."""

from __future__ import annotations

import pytest
import torch

from model.quantizers.apot import MOST_BITS, APoT, sums_of_powers
from model.quantizers.site import LayerSite
from utils.config.schema import QuantizerConfig


@pytest.mark.parametrize("half_range", [True, False])
@pytest.mark.parametrize("bits", range(2, MOST_BITS + 1))
def test_a_product_with_a_code_is_as_many_shifts_as_there_are_terms(bits: int, half_range: bool) -> None:
    """One for every two bits, and one for an odd bit; a sign takes a bit, and no shift."""
    config = QuantizerConfig(tag="fm", enable=True, method="apot", levels=2**bits, half_range=half_range)
    quantizer = APoT(config, LayerSite(name="layer", channels=1, channel_dim=1, ndim=2, fan=1))
    codes = quantizer.integers(torch.linspace(-2, 2, 20_001).reshape(-1, 1)).codes.unique().tolist()
    value_bits = bits if half_range else bits - 1
    assert {abs(code) for code in codes} == set(sums_of_powers(value_bits))
    terms = value_bits // 2 + value_bits % 2
    for code in codes:
        shifts = [place for place in range(code.bit_length() + 1) if abs(code) >> place & 1]
        assert len(shifts) <= terms
        assert sum(5 << place for place in shifts) * (-1 if code < 0 else 1) == 5 * code
