"""Runs on grey images (`--channels 1`) beside those on colours."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from model.networks.build import build_network
from tests.main.runs import FP, LSQ, call, log_of
from utils.checkpoint import archive
from utils.config.resolve import read


def test_runs_on_grey_images_and_on_colours(lsq: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = Path("weights/resnet20")
    weights.mkdir(parents=True)
    os.symlink(lsq / weights / "lsq-checkpoint.pth.tar", weights / "colours.pth.tar")
    archive.save(weights / "full.pth.tar", {"state_dict": build_network(read(FP.split()).model).state_dict()})

    grey = f"{LSQ} --re_init --channels 1"
    assert call(f"{grey} --epochs 1 --case grey --tensorboard") == 0
    assert call(f"{grey} --epochs 2 --case grey --tensorboard -r") == 0
    assert call(f"{grey} --case grey -e -r") == 0
    assert call(f"{grey} --case begun --epochs 1 --pretrained colours.pth.tar") == 0
    assert "1 summed over the colours (conv1.weight)" in log_of(Path(), "begun")

    for line, message in (
        (f"{LSQ} -r --case grey --epochs 2", "cannot be continued: --channels was 1 and is 3 now"),
        (f"{LSQ} -e -r --case grey", "cannot be continued: --channels was 1 and is 3 now"),
        (
            f"{LSQ} --pretrained grey-checkpoint.pth.tar",
            "does not fit a network of --channels 3: write --channels 1, or --unresume_scope conv1 to train that layer",
        ),
        (f"{LSQ} -e --pretrained grey-checkpoint.pth.tar", "of --channels 3: write --channels 1\n"),
        (f"{grey} -e --pretrained colours.pth.tar", "was trained with --channels 3 and does not fit"),
        (
            f"{FP} --channels 1 --distill_teacher resnet20 --distill_pretrained full.pth.tar",
            "full.pth.tar was trained with --channels 3 and does not fit",
        ),
    ):
        capsys.readouterr()
        assert call(line) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
