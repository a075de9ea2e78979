"""Compares bits of each layer that a plan chose with the same bits everywhere, and writes the table of docs/mixed.md.

    python benchmarks/mixed.py                       # glyphs, seeds 1-3: full precision, uniform and planned bits
    python benchmarks/mixed.py --ends full           # without uniform networks of 8 bits at their ends
    python benchmarks/mixed.py --dataset digits --quick      # images of 8 pixels

All networks of a seed start from its network in full precision and have the recipe of `benchmarks/digits.py`. Uniform
networks keep their first and last layer in full precision, as is usual, or at 8 bits, as in LSQ's paper; each plan may
take no more bytes for all weights than the uniform network beside it. Finished trainings are not repeated, except with
`--fresh`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import digits

ROOT = digits.ROOT
sys.path.insert(0, str(ROOT))  # the project is no package

from utils.report import sensitivity_record  # noqa: E402

PAGE = ROOT / "docs" / "mixed.md"
KEYWORDS = "dorefa,lsq"
WIDTHS = (3, 2)
ENDS = {"full": "", "8": "--first_last_bit 8"}  # the first and the last layer of uniform networks
SAID = {"full": "in full precision", "8": "at 8 bits"}
TRIED = "8,6,5,4,3,2"  # bits that a plan may choose
GOAL = {3: 0.7, 2: 1.5}  # points above the uniform network


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A finished training.

    Attributes:
        seed: of it.
        bits: of the uniform network whose size it has.
        ends: how the uniform network's first and last layer are.
        planned: whether a plan chose its bits.
        top1: percent, after the last epoch.
        bytes: of all weights.
        bit_operations: of one image.
        layers: bits of the weight of each layer.
        command: of the training.
    """

    seed: int
    bits: int
    ends: str
    planned: bool
    top1: float
    bytes: int
    bit_operations: int
    layers: dict[str, int]
    command: str


def trained(setup: str, case: str, seed: int, keywords: str, options: str, fresh: bool) -> tuple[dict, str]:
    """The summary of a training and its command."""
    argv = digits.command(setup, case, seed, digits.BLOCK, keywords, options)
    return digits.run(case, argv, fresh), shlex.join(["python", *argv[1:]])


def sensitivity(case: str, network: str, fresh: bool) -> Path:
    """The record of what the layers of a network lose."""
    path, old = ROOT / "exp" / case / sensitivity_record.FILE, f"weights/{network}/{case}-checkpoint.pth.tar"
    if fresh or not path.exists() or path.stat().st_mtime < (ROOT / old).stat().st_mtime:
        tool("sensitivity", "--old", old, "--bits", TRIED)
    return path


def tool(*words: str) -> None:
    """A job of tools.py."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, "tools.py", "--keyword", *words]
    done = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{shlex.join(argv[1:])}\nfailed:\n{done.stderr}")


def of_seed(
    setup: str, seed: int, wanted: Sequence[str], fresh: bool
) -> tuple[float, list[Outcome], dict[str, dict[int, float]]]:
    """Top-1 in full precision, the uniform and the planned networks, and the rank correlations."""
    start = f"mixed-{setup}-fp-{seed}"
    full, _ = trained(setup, start, seed, "", digits.FULL, fresh)
    record = sensitivity(start, full["network"], fresh)
    found = []
    for bits in WIDTHS:
        for ends in wanted:
            name, option = f"mixed-{setup}-{bits}-{digits.slug(SAID[ends])}", ENDS[ends]
            tune = f"{digits.TUNE} {digits.bits(bits)} --pretrained {start}-checkpoint.pth.tar"
            uniform = outcome(
                setup, f"{name}-uniform-{seed}", seed, f"{tune} {option}", bits, ends, False, fresh
            )
            file = ROOT / "exp" / start / f"{name}.yaml"
            words = ("plan", "--old", str(record), "--new", str(file), "--force")
            tool(*words, "--budget_size", f"{uniform.bytes}B")
            file = file.rename(file.with_stem(f"{name}-{hashlib.sha256(file.read_bytes()).hexdigest()[:8]}"))
            option = f"--layer_bits {file.relative_to(ROOT)}"  # another plan is another command
            planned = outcome(
                setup, f"{name}-planned-{seed}", seed, f"{tune} {option}", bits, ends, True, fresh
            )
            found += [uniform, planned]
    return full["last_top1"], found, sensitivity_record.read(record).correlations()


def outcome(
    setup: str, case: str, seed: int, options: str, bits: int, ends: str, planned: bool, fresh: bool
) -> Outcome:
    """A network with quantizers."""
    summary, command = trained(setup, case, seed, KEYWORDS, options, fresh)
    layers = {layer["name"]: layer["weight_bits"] for layer in summary["layers"]}
    return Outcome(
        seed=seed, bits=bits, ends=ends, planned=planned, top1=summary["last_top1"], bytes=summary["weight_bytes"],
        bit_operations=summary["bit_operations"], layers=layers, command=command,
    )  # fmt: skip


def table(full: Sequence[float], found: Sequence[Outcome]) -> list[str]:
    """A row for each uniform network and its plan, means over the seeds."""
    lines = [
        "| bits w/a | first and last layer | KiB | top-1 %, uniform | lowest - highest | top-1 %, planned "
        "| lowest - highest | gain, points | lowest - highest | goal | reached | million bit operations: uniform "
        "| planned |",
        "|" + "---|" * 13,
    ]
    for bits in WIDTHS:
        for ends in dict.fromkeys(o.ends for o in found):
            mine = [o for o in found if (o.bits, o.ends) == (bits, ends)]
            uniform, planned = ([o for o in mine if o.planned is one] for one in (False, True))
            gains = [b.top1 - a.top1 for a, b in zip(uniform, planned, strict=True)]
            cells = [f"{bits}/{bits}", SAID[ends], f"{uniform[0].bytes / 1024:.1f}"]
            for values in ([o.top1 for o in uniform], [o.top1 for o in planned], gains):
                sign = "+" if values is gains else ""
                cells += [
                    f"{statistics.mean(values):{sign}.2f}",
                    f"{min(values):{sign}.2f} - {max(values):{sign}.2f}",
                ]
            goal = "" if ENDS[ends] else f"{GOAL[bits]:+.1f}"
            reached = "" if ENDS[ends] else ("yes" if statistics.mean(gains) >= GOAL[bits] else "no")
            operations = [
                f"{statistics.mean(o.bit_operations for o in each) / 1e6:.0f}" for each in (uniform, planned)
            ]
            lines.append(f"| {' | '.join([*cells, goal, reached, *operations])} |")
    whole = f"{statistics.mean(full):.2f} ({min(full):.2f} - {max(full):.2f})"
    return [f"In full precision: {whole}.", "", *lines]


def draw(full: Sequence[float], found: Sequence[Outcome], path: Path, title: str) -> None:
    """Accuracy over size, and the bits of each layer in the plans of the first seed, beside the file `path`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.6), dpi=120, layout="constrained")
    axes = figure.subplots()
    looks = {"full": ("o", "#0072b2"), "8": ("^", "#009e73")}
    for planned in (False, True):
        for ends in dict.fromkeys(o.ends for o in found):
            mine = [o for o in found if (o.planned, o.ends) == (planned, ends)]
            marker, colour = ("s", "#d55e00") if planned else looks[ends]
            label = "planned" if planned else f"uniform, first and last layer {SAID[ends]}"
            shown = None if planned and ends != found[0].ends else label
            axes.plot(
                [o.bytes / 1024 for o in mine],
                [o.top1 for o in mine],
                marker,
                color=colour,
                alpha=0.7,
                label=shown,
            )
    axes.axhline(statistics.mean(full), color="black", linewidth=0.8, label="full precision")
    axes.set_xlabel("KiB of all weights")
    axes.set_ylabel("top-1 (%)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path.with_name(f"{path.stem}-size.png"))

    plans = [o for o in found if o.planned and o.seed == found[0].seed and not ENDS[o.ends]]
    names = list(plans[0].layers)
    figure = Figure(figsize=(0.4 * len(names) + 1.5, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    for number, plan in enumerate(plans):
        places = [place + 0.4 * number - 0.2 for place in range(len(names))]
        values = [plan.layers[name] for name in names]
        axes.bar(
            places,
            values,
            0.4,
            label=f"at the size of {plan.bits} bits everywhere else",
            color=("#0072b2", "#d55e00")[number],
        )
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right")
    axes.set_ylabel("bits of weight and input")
    axes.set_title(f"{title}: plans of seed {plans[0].seed}")
    axes.legend(frameon=False)
    figure.savefig(path.with_name(f"{path.stem}-bits.png"))


def main() -> int:
    """Train, then write table, pictures and raw figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    digits.add_arguments(parser)
    parser.set_defaults(dataset="glyphs")
    parser.add_argument(
        "--ends", choices=tuple(ENDS), nargs="+", default=list(ENDS), help="of uniform networks"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="small images or a narrow network, as the quick table of digits.py",
    )
    options = parser.parse_args()

    setup = f"{options.dataset}-{'quick' if options.quick else 'all'}"
    with ThreadPoolExecutor(options.jobs) as pool:
        results = list(
            pool.map(lambda seed: of_seed(setup, seed, options.ends, options.fresh), options.seeds)
        )
    full, found = [result[0] for result in results], [o for result in results for o in result[1]]
    lines = table(full, found)
    lines += ["", "Rank correlations over the layers, lowest and highest of the seeds:", ""]
    for name, values in results[0][2].items():
        ends = [(min(each), max(each)) for each in ([r[2][name][bits] for r in results] for bits in values)]
        said = [
            f"{low:.2f} to {high:.2f} at {bits} bits" for bits, (low, high) in zip(values, ends, strict=True)
        ]
        lines.append(f"- {name}: {', '.join(said)}")
    print("\n".join(lines))
    if options.print:
        return 0
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    raw = {"commit": described, "full_precision": full, "runs": [asdict(o) for o in found]}
    name = f"mixed-{options.dataset}"
    path = PAGE.parent / "results" / f"{name}.json"
    path.write_text(json.dumps(raw, indent=1) + "\n")
    draw(full, found, path, f"{options.dataset}, {len(options.seeds)} seeds")
    arguments = shlex.join(["python", "benchmarks/mixed.py", *sys.argv[1:]])
    seeds = ", ".join(map(str, options.seeds))
    head = [f"`{arguments}`, {options.dataset}, commit {described}, seeds {seeds}; every run: "
            f"[results/{name}.json](results/{name}.json).", ""]  # fmt: skip
    pictures = [
        "",
        f"![accuracy over size](results/{name}-size.png)",
        "",
        f"![bits of each layer](results/{name}-bits.png)",
    ]
    PAGE.write_text(digits.section(PAGE.read_text("utf-8"), name, [*head, *lines, *pictures]), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
