"""The first part of docs/classification.md, command by command as it is written."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT

NEEDED = ("main.py", "tools.py", "train.sh", "config", "model", "utils")


def steps() -> list[tuple[str, str]]:
    """Each block of the part: the file that it is to be saved as, or none for commands, and its text."""
    page = (ROOT / "docs" / "classification.md").read_text(encoding="utf-8")
    part = page[page.index("## 1. ") : page.index("## 2. ")]
    found, end = [], 0
    for block in re.finditer(r"^```sh\n(.*?)^```$", part, flags=re.MULTILINE | re.DOTALL):
        said = re.findall(r"Save this as `([^`]+)`", part[end : block.start()])
        found.append((said[-1] if said else "", block[1]))
        end = block.end()
    return found


@pytest.mark.slow
def test_the_way_of_a_newcomer(tmp_path: Path) -> None:
    """Every command ends well, and 2 bits are about as good as full precision in the end."""
    for name in NEEDED:
        source = ROOT / name
        shutil.copytree(source, tmp_path / name) if source.is_dir() else shutil.copy(source, tmp_path / name)
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in ("NPROC", "TORCHRUN", "FASTDIR", "PYTHONDONTWRITEBYTECODE")
    }
    environment = {
        **inherited,
        "PYTHON": sys.executable,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    blocks = steps()
    assert [name for name, _ in blocks if name] == ["config/config.photos.fp", "config/config.photos.2bit"]
    for name, text in blocks:
        if name:
            (tmp_path / name).write_text(text, encoding="utf-8")
            continue
        done = subprocess.run(
            ["bash", "-e", "-c", text],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{text}\n{done.stdout}{done.stderr}"
        assert "Traceback" not in done.stderr
    summaries = {
        case: json.loads((tmp_path / "exp" / case / "summary.json").read_text(encoding="utf-8"))
        for case in ("photos-fp", "photos-lsq-2bit", "photos-mse", "photos-taught", "photos-4bit")
    }
    assert summaries["photos-fp"]["last_top1"] > 90
    for case, summary in summaries.items():
        assert summary["last_top1"] > summaries["photos-fp"]["last_top1"] - 15, case
        assert summary["audit"].startswith(("passed", "full precision")), case
