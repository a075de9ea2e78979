"""The measurement of speed: what it counts, and that it measures two checkouts."""

from __future__ import annotations

import re

import pytest
import torch

from benchmarks.speed import main, saved_bytes
from tests import ROOT


def test_a_storage_counts_once_and_not_where_it_is_left_out() -> None:
    x, weight = torch.randn(8, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    with saved_bytes({weight.untyped_storage().data_ptr()}) as count:
        (x @ weight).relu().square().sum()
    assert count() == 4 * (x.numel() + 8 * 4)  # the ReLU's output serves the square, too


@pytest.mark.slow
def test_two_checkouts_are_measured(capsys: pytest.CaptureFixture[str]) -> None:
    line = "--batch 2 --rounds 1 --methods LSQ --parts saved --against"
    assert main([*line.split(), str(ROOT)]) == 0
    rows = re.findall(r"^\| (LSQ|full precision) \|(.*)\|$", capsys.readouterr().out, re.MULTILINE)
    assert [name for name, _ in rows] == ["full precision", "LSQ"]
    megabytes, ratio, *other = (cell.strip() for cell in rows[-1][1].split("|"))
    assert other == [megabytes, ratio, "1.00 (1.00-1.00)"]
    assert 0 < float(rows[-2][1].split("|")[0]) < float(megabytes)
