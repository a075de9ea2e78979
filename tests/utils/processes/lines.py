"""Small trainings of several processes: their command lines, and running them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests import ROOT
from tests.kill import NETWORK

LINE = (
    "--model tiny --keyword_file network.py --dataset fake --keyword cifar10,dorefa,lsq --input_size 8 -v 7 "
    "--fake_size 100 --epochs 3 --lr 0.05 --lr_policy sgdr --fm_enable --wt_enable --fm_bit 2 --wt_bit 2 "
    "--sync_bn --stable 5 -s 1"
)
FILES = LINE.replace(
    "--dataset fake --keyword cifar10,", "--root images --num_classes 3 --keyword imagenet,"
).replace("--fake_size 100 --epochs 3", "--epochs 1")  # 72 images for training and 15 for validation

NO_DROPOUT = NETWORK.replace("nn.Dropout(0.2),", "")  # of which each process draws its own


def together(python: str, folder: Path, runs: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """What came of each run, and under `folder` where they ran; network.py is there already."""
    process = subprocess.run(
        [python, "-W", "error", str(ROOT / "tests" / "together.py")], cwd=folder, text=True,
        input=json.dumps(list(runs.values())), capture_output=True, check=False, timeout=1200,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    return {**dict(zip(runs, json.loads(process.stdout), strict=True)), "folder": folder}
