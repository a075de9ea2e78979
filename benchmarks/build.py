"""Measures how long building takes: quantized ResNet-50s, and a dry run of every config.

    python benchmarks/build.py               # build a quantized resnet50, 10 times each method
    python benchmarks/build.py --configs     # and dry-run every config, each in a process of its own
    python benchmarks/build.py --kinds       # or one of each kind, and what answers before torch is imported

Prints median, lowest and highest seconds and the median of the processor's seconds, beside the goal: 1 s for a
network, 4 s for a dry run, 1 s for help and mistakes. A dry run takes imitated images in place of data that has to
be downloaded, and it loads no weights; its batch and image size are the config's.
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

BUILD_GOAL, DRY_RUN_GOAL, ANSWER_GOAL = 1.0, 4.0, 1.0  # seconds
KINDS = (
    "config.lsq.finetune.digits.2bit.resnet20",
    "config.lsq.finetune.cifar100.2bit.resnet20",
    "config.lsq.finetune.imagenet.2bit.resnet18",
    "config.lq.train-scratch.imagenet.3bit.resnet50",
    "config.groupnet.train-scratch.imagenet.1bit.resnet18",
    "config.fatnn.finetune.dali.ternary.resnet18",
)
ANSWERS = {"--help": 0, "--list_keywords": 0, "--keyword cifar10,origin,cbsa,NRelU": 2, "--wd -1": 2}
"""What is answered before torch is imported, and its exit status."""
METHODS = ("dorefa", "pact", "dorefa,lsq", "lq", "dorefa,fm_non-uniform,wt_lsq", "xnor")


def line(name: str, times: Sequence[tuple[float, float]], goal: float) -> str:
    """One row of the table, from pairs of seconds: elapsed, and of processor time."""
    seconds = [passed for passed, _ in times]
    middle = statistics.median(seconds)
    verdict = "ok" if max(seconds) < goal else "TOO SLOW" if middle >= goal else "too slow at times"
    busy = statistics.median(processor for _, processor in times)
    return f"{name:<60} {middle:7.2f} {min(seconds):7.2f} {max(seconds):7.2f} {busy:9.2f}   < {goal:g}  {verdict}"


def build_networks(repeats: int) -> list[str]:
    """Rows for a quantized resnet50 of each method."""
    from model.networks import build
    from utils.config.resolve import read

    rows = []
    for method in METHODS:
        bits = 1 if method == "xnor" else 2
        options = f"--fm_enable --wt_enable --fm_bit {bits} --wt_bit {bits}"
        config = read(f"--model resnet50 --keyword imagenet,origin,cbsa,fix,{method} {options}".split()).model
        times = []
        for _ in range(repeats):
            started, busy = time.perf_counter(), time.process_time()
            build.build_network(config)
            times.append((time.perf_counter() - started, time.process_time() - busy))
        rows.append(line(f"build resnet50 {method}", times, BUILD_GOAL))
    return rows


def timed(command: Sequence[str], repeats: int, status: int = 0) -> list[tuple[float, float]]:
    """The seconds of each cold run of a program: elapsed, and of processor time.

    Raises:
        RuntimeError: when it does not end with `status`.
    """
    times = []
    for _ in range(repeats):
        started, before = time.perf_counter(), os.times()
        done = subprocess.run(
            command, env={**os.environ, "PYTHON": sys.executable}, cwd=ROOT, capture_output=True, text=True, check=False
        )  # fmt: skip
        passed, after = time.perf_counter() - started, os.times()
        if done.returncode != status:
            raise RuntimeError(f"{' '.join(command)}: {done.returncode}: {done.stderr.strip()}")
        busy = after.children_user + after.children_system - before.children_user - before.children_system
        times.append((passed, busy))
    return times


def dry_run(name: str, repeats: int) -> str:
    """The row of a config's dry run."""
    data = [] if ".digits." in name else ["--dataset", "fake"]
    command = ["bash", "train.sh", f"config/{name}", *data, "--pretrained", "none", "--dry_run"]
    return line(name, timed(command, repeats), DRY_RUN_GOAL)


def answer(options: str, status: int, repeats: int) -> str:
    """The row of a command line that is answered at once."""
    times = timed([sys.executable, "main.py", *options.split()], repeats, status)
    return line(f"main.py {options}", times, ANSWER_GOAL)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 when a goal is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--configs", nargs="*", metavar="NAME", help="configs to dry-run, with none: all")
    parser.add_argument("--kinds", action="store_true", help="dry-run one config of each kind")
    parser.add_argument("--repeats", type=int, default=10, help="of each network; a dry run takes a third")
    arguments = parser.parse_args(argv)
    few = max(arguments.repeats // 3, 1)
    print(f"{'what':<60} {'median':>7} {'lowest':>7} {'highest':>7} {'processor':>9}   goal, seconds")
    rows = build_networks(arguments.repeats)
    print("\n".join(rows), flush=True)
    names = list(KINDS) if arguments.kinds else []
    if arguments.configs is not None:
        names += arguments.configs or sorted(
            path.name for path in (ROOT / "config").iterdir() if path.is_file()
        )
    for name in names:
        rows.append(dry_run(name, few))
        print(rows[-1], flush=True)
    for options, status in ANSWERS.items() if arguments.kinds else ():
        rows.append(answer(options, status, few))
        print(rows[-1], flush=True)
    return 1 if any("TOO SLOW" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
