"""What starting the program costs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests import ROOT

LINE = (
    "--dataset fake --fake_size 16 -b 8 --input_size 16 --model resnet20 --width_alpha 0.25 --epochs 1 "
    "--keyword cifar10,origin,cbsa,lsq --bits 2 --dry_run"
)


def test_a_dry_run_does_not_import_the_compiler(tmp_path: Path) -> None:
    """It builds, counts, looks and measures a pass, without the seconds that torch's compiler takes to import."""
    code = (
        f"import sys, main; assert main.main({LINE.split()!r}) == 0; sys.exit('torch._dynamo' in sys.modules)"
    )
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "dry run: everything checked" in done.stdout
