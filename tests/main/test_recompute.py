"""Runs with `--recompute` compute the same bits; mistakes are one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.main.runs import FP, LSQ, assert_same, call, checkpoint, done_in
from utils.config.resolve import read
from utils.errors import UserError


def test_a_run_has_the_same_bits(tmp_path: Path) -> None:
    """Also in half precision, where gradients accumulate, and where a run is resumed with it."""
    line = f"{LSQ} --fp16 --iter_size 2 --stable 3 --lr_policy fix --epochs"
    done_in(
        tmp_path, f"{line} 2 --case whole", f"{line} 1 --case parts", f"{line} 2 --case parts -r --recompute"
    )
    whole, parts = checkpoint(tmp_path, "whole"), checkpoint(tmp_path, "parts")
    assert_same(whole["state_dict"], parts["state_dict"])


@pytest.mark.parametrize(
    "line, message", [(FP, "no layer quantizes its input"), (LSQ.replace("dorefa,lsq", "lq"), "lq")]
)
def test_nothing_is_written_where_nothing_can_be_computed_again(
    line: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(f"{line} --epochs 1 --case none --recompute") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and "leave --recompute out" in error
    assert not list(tmp_path.iterdir())


def test_a_compiled_network_decides_by_itself() -> None:
    with pytest.raises(UserError, match="leave --recompute out"):
        read(f"{LSQ} --compile default --recompute".split())
    assert read(f"{LSQ} --kernels compiled --recompute".split()).precision.recompute
