"""Checkpoints that an earlier version wrote are evaluated, and trained on, as it would have done (tests/recorded)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import main
from tests import ROOT
from utils.report.epoch_files import MetricsFile

RECORDED = ROOT / "tests" / "recorded"
COMMON = (
    "--epochs 12 --batch_size 128 --width_alpha 0.0625 --seed 7 --fm_enable --wt_enable --fm_bit 2 --wt_bit 2 "
    "--wakeup_epoch 1"
)
RUNS = {
    "lsq": "--keyword digits,origin,cbsa,dorefa,lsq --lr 0.2 --ema_decay 0.9 --re_init --grad_clip 1 "
           f"--policy {RECORDED / 'policy.yaml'}",
    "lq": "--keyword digits,bacs,preBN,lq --lr 0.1",
}  # fmt: skip


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(name: str, options: str) -> int:
    return main.main([*RUNS[name].split(), *COMMON.split(), *options.split()])


@pytest.mark.parametrize("name", RUNS)
def test_it_is_evaluated(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """To the digits that the log shows, but for a few images on machines that round in another way."""
    before = MetricsFile.read(RECORDED / f"{name}.csv")[10]
    levels = "--wt_level 3" if name == "lsq" else ""  # which the policy has set in epoch 6
    assert run(name, f"-e --policy none --pretrained {RECORDED / name}.pth.tar {levels}") == 0
    found = re.search(r"top-1 ([\d.]+), top-5 ([\d.]+), loss ([\d.]+)", capsys.readouterr().out)
    assert found is not None
    top1, top5, loss = map(float, found.groups())
    assert top1 == pytest.approx(before["val_top1"], abs=1) and top5 == pytest.approx(
        before["val_top5"], abs=1
    )
    assert loss == pytest.approx(before["val_loss"], rel=0.02)


@pytest.mark.parametrize("name", RUNS)
def test_it_is_trained_on(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """With its optimizer, policy, averaged weights and random state: the last epoch is the recorded one."""
    before = MetricsFile.read(RECORDED / f"{name}.csv")[11]
    assert run(name, f"--resume_file {RECORDED / name}.pth.tar --case on") == 0
    (row,) = MetricsFile.read(Path("exp/on/metrics.csv"))
    assert row["epoch"] == 12 and row["lr"] == before["lr"]
    assert row["train_loss"] == pytest.approx(before["train_loss"], rel=0.02)
    assert row["val_loss"] == pytest.approx(before["val_loss"], rel=0.1)
    said = capsys.readouterr().out
    assert "11 epochs are done" in said and "warning" not in said
    if name == "lsq":
        assert row["ema_loss"] == pytest.approx(before["ema_loss"], rel=0.1)
        assert "policy, iteration 115" not in said  # carried out before
