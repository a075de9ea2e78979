"""How long building takes: quantized ResNet-50s, and a dry run of every config.

    python benchmarks/build.py               # build a quantized resnet50, 10 times each method
    python benchmarks/build.py --configs     # and dry-run every config, each in a process of its own

Prints median, lowest and highest seconds beside the goal: 1 s for a network, 4 s for a dry run. A dry run takes
imitated images instead of the data and starts from no weights; its batch and image size are the config's.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the project is no package

BUILD_GOAL, DRY_RUN_GOAL = 1.0, 4.0  # seconds
METHODS = ("dorefa", "pact", "dorefa,lsq", "lq", "dorefa,fm_non-uniform,wt_lsq", "xnor")


def line(name: str, seconds: Sequence[float], goal: float) -> str:
    """One row of the table."""
    middle = statistics.median(seconds)
    verdict = "ok" if max(seconds) < goal else "TOO SLOW" if middle >= goal else "too slow at times"
    return f"{name:<60} {middle:7.2f} {min(seconds):7.2f} {max(seconds):7.2f}   < {goal:g}  {verdict}"


def build_networks(repeats: int) -> list[str]:
    """Rows for a quantized resnet50 of each method."""
    from model import build
    from utils.config import read

    rows = []
    for method in METHODS:
        bits = 1 if method == "xnor" else 2
        options = f"--fm_enable --wt_enable --fm_bit {bits} --wt_bit {bits}"
        config = read(f"--model resnet50 --keyword imagenet,origin,cbsa,fix,{method} {options}".split()).model
        seconds = []
        for _ in range(repeats):
            started = time.perf_counter()
            build.build(config)
            seconds.append(time.perf_counter() - started)
        rows.append(line(f"build resnet50 {method}", seconds, BUILD_GOAL))
    return rows


def dry_run(config: Path, repeats: int) -> str:
    """The row of a config's dry run from a cold start.

    Raises:
        RuntimeError: when it fails.
    """
    command = [
        "bash",
        str(ROOT / "train.sh"),
        str(config),
        "--dataset",
        "fake",
        "--pretrained",
        "none",
        "--dry_run",
    ]
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        done = subprocess.run(
            command, env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True, check=False
        )
        seconds.append(time.perf_counter() - started)
        if done.returncode:
            raise RuntimeError(f"{config.name}: {done.stderr.strip()}")
    return line(config.name, seconds, DRY_RUN_GOAL)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 when a goal is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--configs", nargs="*", metavar="NAME", help="configs to dry-run, with none: all")
    parser.add_argument("--repeats", type=int, default=10, help="of each network; a dry run takes a third")
    arguments = parser.parse_args(argv)
    print(f"{'what':<60} {'median':>7} {'lowest':>7} {'highest':>7}   goal, seconds")
    rows = build_networks(arguments.repeats)
    print("\n".join(rows), flush=True)
    if arguments.configs is not None:
        names = arguments.configs or sorted(path.name for path in (ROOT / "config").iterdir())
        for name in names:
            rows.append(dry_run(ROOT / "config" / name, max(arguments.repeats // 3, 1)))
            print(rows[-1], flush=True)
    return 1 if any("TOO SLOW" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
