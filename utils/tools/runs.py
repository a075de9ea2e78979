"""The words of tools.py about runs: compare, report."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from utils.errors import UserError
from utils.report import run_files
from utils.tools import comparison
from utils.tools.options import Options, refuse_existing

_FORMATS = {".csv": comparison.as_csv, ".json": comparison.as_json}


def compare(options: Options) -> int:
    """Print a table of finished RUNS: seeds as mean and spread, gaps to the first, what differs, files to look at."""
    folders = _trained(options.runs or ())
    output = options.output
    if output is not None:
        if output.suffix not in _FORMATS:
            raise UserError(f"--output {output}: end the file's name in {' or '.join(_FORMATS)}")
        _check_output(options, output)
    found = run_files.read(folders)
    runs = [run for run in found if run.summary is not None]
    for run in found:
        if run.summary is None:
            print(
                f"left out, not finished: {run.folder} ({run.done} of {run.planned} epochs)", file=sys.stderr
            )
    if not runs:
        raise UserError(f"{folders[0]} is not finished; compare needs finished runs, report takes others too")
    rows = comparison.grouped(runs)
    print(comparison.as_text(rows))
    if output is not None:
        from utils.checkpoint import archive  # imports torch

        archive.write_atomic(output, _FORMATS[output.suffix](rows).encode())
        print(f"\nwritten: {output}")
    print("\nlook at:")
    paths = [run.folder for run in runs]
    for path in paths:
        for name in ("curves.png", "metrics.csv", "audit.txt", "tensorboard"):
            if (path / name).exists():
                print(f"  {path / name}")
    if any((path / "tensorboard").exists() for path in paths):
        if len({path.is_absolute() for path in paths}) > 1:
            paths = [path.absolute() for path in paths]
        print(f"  tensorboard --logdir {os.path.commonpath(paths) or '.'}")
    return 0


def report(options: Options) -> int:
    """Write a page about RUNS, finished or not: curves, quantizers, cost, configuration."""
    from utils.checkpoint import archive  # imports torch
    from utils.report.html import page

    folders = _trained(options.runs or ())
    path = options.output or (folders[0] if len(folders) == 1 else Path()) / "report.html"
    if path.suffix.lower() not in (".html", ".htm") and not path.is_dir():
        raise UserError(f"--output {path}: the report is a page, write {path.with_suffix('.html')}")
    _check_output(options, path)
    archive.write_atomic(path, page.render(run_files.read(folders)).encode())
    print(
        f"{path}: {len(folders)} run{'' if len(folders) == 1 else 's'}, {path.stat().st_size / 2**20:.1f} MiB"
    )
    return 0


def _trained(folders: Sequence[Path]) -> list[Path]:
    """The folders without those of evaluations and the like, which are named on standard error."""
    trained = run_files.trained(folders)
    left = [folder for folder in folders if folder not in trained]
    if left:
        print(f"left out, nothing was trained there: {', '.join(map(str, left))}", file=sys.stderr)
    return trained


def _check_output(options: Options, path: Path) -> None:
    """Refuse, before any work, a file that cannot be written."""
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(f"--output {path}: name a file in a folder that exists")
    refuse_existing(options, path)
