"""The measurement of speed: what it counts, and that it measures two checkouts."""

from __future__ import annotations

import re
import sys

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
    line = "--batch 2 --rounds 1 --methods LSQ --recompute --parts saved --against"
    assert main([*line.split(), str(ROOT)]) == 0
    found = re.findall(r"^\| (LSQ[^|]*|full precision) \|(.*)\|$", capsys.readouterr().out, re.MULTILINE)
    rows = [(name, [cell.strip() for cell in cells.split("|")]) for name, cells in found]
    assert [name for name, _ in rows] == ["full precision", "LSQ", "LSQ, recomputed"]
    for _, (megabytes, ratio, *other) in rows:
        assert other == [megabytes, ratio, "1.00 (1.00-1.00)"]
    full, quantized, recomputed = (float(cells[0]) for _, cells in rows)
    assert 0 < full < recomputed < quantized


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_of_a_step_holds_what_it_saves(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--batch", "16", "--rounds", "1", "--methods", "DoReFa", "--parts", "saved", "peak"]) == 0
    rows = re.findall(r"^\| (?:DoReFa|full precision) \|(.*)\|$", capsys.readouterr().out, re.MULTILINE)
    saved, peak = ([float(row.split("|")[0]) for row in part] for part in (rows[:2], rows[2:]))
    assert peak[0] > saved[0] and peak[1] > saved[1]
