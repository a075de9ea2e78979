"""The words of tools.py about runs: compare, report."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.text import format_table
from utils.tools.options import Options, refuse_existing


def compare(options: Options) -> int:
    """Print a table of finished RUNS, the gaps against the first, and the files to look at."""
    folders = options.runs or ()
    runs = [_summary(folder) for folder in folders]
    first = runs[0]["last_top1"]
    rows = []
    for run in runs:
        top1 = run["last_top1"]
        gap = "" if run is runs[0] or None in (top1, first) else f"{top1 - first:+.2f}"
        saved = run["float_weight_bytes"] / run["weight_bytes"]
        rows.append((
            run["case"], run["network"], run["bits"], "-" if top1 is None else f"{top1:.2f}", gap,
            f"{run['weight_bytes'] / 1024:.1f}", f"{run['float_weight_bytes'] / 1024:.1f}", f"{saved:.1f}x",
            run["audit"],
        ))  # fmt: skip
    head = ("run", "network", "bits w/a", "top-1 %", "gap", "weights KiB", "float32 KiB", "smaller", "audit")
    print(format_table(head, rows))
    print("top-1: validation images, after the last epoch; weights: those of convolutions and linear layers")
    print("\nlook at:")
    for folder in folders:
        for name in ("curves.png", "metrics.csv", "audit.txt", "tensorboard"):
            if (folder / name).exists():
                print(f"  {folder / name}")
    if any((folder / "tensorboard").exists() for folder in folders):
        print(f"  tensorboard --logdir {os.path.commonpath([str(folder) for folder in folders])}")
    return 0


def report(options: Options) -> int:
    """Write a page about RUNS, finished or not: curves, quantizers, cost, configuration."""
    from utils.checkpoint import archive  # imports torch
    from utils.report.html import page
    from utils.report.html import runs as run_files

    folders = options.runs or ()
    path = options.output or (folders[0] if len(folders) == 1 else Path()) / "report.html"
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(f"--output {path}: name a file in a folder that exists")
    refuse_existing(options, path)
    archive.write_atomic(path, page.render(run_files.read(folders)).encode())
    print(
        f"{path}: {len(folders)} run{'' if len(folders) == 1 else 's'}, {path.stat().st_size / 2**20:.1f} MiB"
    )
    return 0


def _summary(folder: Path) -> dict[str, Any]:
    """The summary that a finished run wrote. Raises UserError when there is none."""
    path = folder / "summary.json"
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror}; name the folders of finished runs, such as exp/CASE"
        ) from error
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from error
    needed = {"case", "network", "bits", "last_top1", "weight_bytes", "float_weight_bytes", "audit"}
    if not isinstance(summary, dict) or not needed <= summary.keys():
        raise UserError(f"{path} is not the summary of a run")
    return summary
