"""Compares bits of each layer that were planned or learned with the same bits everywhere, for docs/mixed.md.

    python benchmarks/mixed.py                       # glyphs, seeds 1-3: full precision and the three choices of bits
    python benchmarks/mixed.py --dataset digits

All networks of a seed start from its network in full precision and have the recipe of `benchmarks/digits.py`. Uniform
networks keep their first and last layer in full precision, as is usual, or at 8 bits, as in LSQ's paper; each plan may
take no more bytes for all weights than the uniform network beside it. Bits are also learned by
`benchmarks/learned_bits.py`, at the sizes of the networks with full precision at their ends. Finished trainings are not
repeated, except with `--fresh`.
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
from typing import TYPE_CHECKING

import digits
import recipes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROOT = digits.ROOT
sys.path.insert(0, str(ROOT))  # the project is no package

from utils.report import sensitivity_record  # noqa: E402

PAGE = ROOT / "docs" / "mixed.md"
KEYWORDS = "dorefa,lsq"
WIDTHS = (3, 2)
ENDS = {"full": "", "8": "--first_last_bit 8"}  # the first and the last layer of uniform networks
SAID = {"full": "in full precision", "8": "at 8 bits"}
CHOICES = ("uniform", "planned", "learned")  # how the bits of the layers were found
TRIED = "8,6,5,4,3,2"  # bits that a plan may choose
GOAL = {3: 0.7, 2: 1.5}  # points above the uniform network


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A finished training.

    Attributes:
        seed: of it.
        bits: of the uniform network whose size it has.
        ends: how the uniform network's first and last layer are.
        choice: how its bits were found, one of CHOICES.
        top1: percent, after the last epoch.
        bytes: of all weights.
        bit_operations: of one image.
        layers: bits of the weight of each layer.
        command: of the training.
    """

    seed: int
    bits: int
    ends: str
    choice: str
    top1: float
    bytes: int
    bit_operations: int
    layers: dict[str, int]
    command: str


def trained(setup: str, case: str, seed: int, keywords: str, options: str, fresh: bool) -> tuple[dict, str]:
    """The summary of a training and its command."""
    argv = digits.command(setup, case, seed, recipes.BLOCK, keywords, options)
    return digits.run(case, argv, fresh), shlex.join(["python", *argv[1:]])


def sensitivity(case: str, network: str, fresh: bool) -> Path:
    """The record of what the layers of a network lose."""
    path, old = ROOT / "exp" / case / sensitivity_record.FILE, f"weights/{network}/{case}-checkpoint.pth.tar"
    if fresh or not path.exists() or path.stat().st_mtime < (ROOT / old).stat().st_mtime:
        tool("sensitivity", "--old", old, "--bits", TRIED)
    return path


def tool(*words: str) -> None:
    """A job of tools.py."""
    python("tools.py", "--keyword", *words)


def python(*argv: str) -> None:
    """A program of this repository, on one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *argv], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{shlex.join(argv)}\nfailed:\n{done.stderr}")


def of_seed(setup: str, seed: int, fresh: bool) -> tuple[float, list[Outcome], dict[str, dict[int, float]]]:
    """Top-1 in full precision, the networks with quantizers, and the rank correlations."""
    start = f"mixed-{setup}-fp-{seed}"
    full, _ = trained(setup, start, seed, "", recipes.FULL, fresh)
    record = sensitivity(start, full["network"], fresh)
    found: list[Outcome] = []
    for bits in WIDTHS:
        tune = f"{recipes.TUNE} {recipes.bits(bits)} --pretrained {start}-checkpoint.pth.tar"
        for ends in ENDS:
            name, size = f"mixed-{setup}-{bits}-{digits.slug(SAID[ends])}", 0
            for choice in CHOICES if ends == "full" else CHOICES[:2]:
                option = ENDS[ends]
                if choice != "uniform":
                    file = layer_bits(choice, record, f"{name}-{choice}", size, seed, fresh)
                    option = f"--layer_bits {file.relative_to(ROOT)}"
                case = f"{name}-{choice}-{seed}"
                summary, command = trained(setup, case, seed, KEYWORDS, f"{tune} {option}", fresh)
                size = size or summary["weight_bytes"]
                outcome = Outcome(
                    seed=seed, bits=bits, ends=ends, choice=choice, top1=summary["last_top1"],
                    bytes=summary["weight_bytes"], bit_operations=summary["bit_operations"],
                    layers={layer["name"]: layer["weight_bits"] for layer in summary["layers"]}, command=command,
                )  # fmt: skip
                found.append(outcome)
    return full["last_top1"], found, sensitivity_record.read(record).correlations()


def layer_bits(choice: str, record: Path, name: str, size: int, seed: int, fresh: bool) -> Path:
    """The file with the bits of each layer, planned or learned, within so many bytes; other bits are another name."""
    asked = hashlib.sha256(record.read_bytes() + str(size).encode()).hexdigest()[:8]
    file = record.parent / f"{name}-{asked}.yaml"
    if choice == "planned":
        tool("plan", "--old", str(record), "--new", str(file), "--force", "--budget_size", f"{size}B")
    elif fresh or not file.exists():
        words = ("--record", str(record), "--bytes", str(size), "--seed", str(seed))
        python("benchmarks/learned_bits.py", *words, "--new", str(file))
    text = file.read_bytes()
    copy = file.with_stem(f"{file.stem}-{hashlib.sha256(text).hexdigest()[:8]}")
    copy.write_bytes(text)
    return copy


def table(full: Sequence[float], found: Sequence[Outcome]) -> list[str]:
    """A row for each number of bits, ends and choice, means over the seeds; gains are to the uniform network."""
    yardstick: Sequence[float] = ()
    lines = [
        "| size of bits w/a | first and last layer | bits | KiB | top-1 % | lowest - highest | gain, points "
        "| lowest - highest | goal | reached | million bit operations |",
        "|" + "---|" * 11,
    ]
    for bits, ends, choice in dict.fromkeys((o.bits, o.ends, o.choice) for o in found):
        mine = [o for o in found if (o.bits, o.ends, o.choice) == (bits, ends, choice)]
        cells = [f"{bits}/{bits}", SAID[ends], choice, f"{statistics.mean(o.bytes for o in mine) / 1024:.1f}"]
        top1 = [o.top1 for o in mine]
        cells += [f"{statistics.mean(top1):.2f}", f"{min(top1):.2f} - {max(top1):.2f}"]
        if choice == "uniform":
            yardstick = top1
            cells += [""] * 4
        else:
            gains = [mine - other for mine, other in zip(top1, yardstick, strict=True)]
            gain, goal = statistics.mean(gains), GOAL[bits] if ends == "full" else None
            cells += [f"{gain:+.2f}", f"{min(gains):+.2f} - {max(gains):+.2f}"]
            cells += ["", ""] if goal is None else [f"{goal:+.1f}", "yes" if gain >= goal else "no"]
        cells.append(f"{statistics.mean(o.bit_operations for o in mine) / 1e6:.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    whole = f"{statistics.mean(full):.2f} ({min(full):.2f} - {max(full):.2f})"
    return [f"In full precision: {whole}.", "", *lines]


def draw(full: Sequence[float], found: Sequence[Outcome], path: Path, title: str) -> None:
    """Accuracy over size, and the bits of each layer in the plans of the first seed, beside the file `path`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.6), dpi=120, layout="constrained")
    axes = figure.subplots()
    looks = {
        "full": ("o", "#0072b2"),
        "8": ("^", "#009e73"),
        "planned": ("s", "#d55e00"),
        "learned": ("D", "#cc79a7"),
    }
    for key in dict.fromkeys((o.choice, o.ends if o.choice == "uniform" else "") for o in found):
        choice, ends = key
        mine = [o for o in found if o.choice == choice and ends in ("", o.ends)]
        marker, colour = looks[ends or choice]
        axes.plot(
            [o.bytes / 1024 for o in mine], [o.top1 for o in mine], marker, color=colour, alpha=0.7,
            label=f"uniform, first and last layer {SAID[ends]}" if ends else choice,
        )  # fmt: skip
    axes.axhline(statistics.mean(full), color="black", linewidth=0.8, label="full precision")
    axes.set_xlabel("KiB of all weights")
    axes.set_ylabel("top-1 (%)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path.with_name(f"{path.stem}-size.png"))

    mine = [o for o in found if o.seed == found[0].seed and o.ends == "full"]
    names = list(mine[0].layers)
    figure = Figure(figsize=(0.4 * len(names) + 1.5, 6), dpi=120, layout="constrained")
    for axes, choice in zip(figure.subplots(2, sharex=True), CHOICES[1:], strict=True):
        bars(axes, [o for o in mine if o.choice == choice], choice)
    figure.suptitle(f"{title}: bits of seed {found[0].seed}")
    figure.savefig(path.with_name(f"{path.stem}-bits.png"))


def bars(axes: Axes, found: Sequence[Outcome], choice: str) -> None:
    """The bits of each layer."""
    names = list(found[0].layers)
    for number, plan in enumerate(found):
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
    axes.set_ylabel(f"bits of weight and input, {choice}")
    axes.legend(frameon=False)


def main() -> int:
    """Train, then write table, pictures and raw figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    digits.add_arguments(parser)
    parser.set_defaults(dataset="glyphs")
    options = parser.parse_args()

    setup = f"{options.dataset}-all"
    with ThreadPoolExecutor(options.jobs) as pool:
        results = list(pool.map(lambda seed: of_seed(setup, seed, options.fresh), options.seeds))
    full, found = [result[0] for result in results], [o for result in results for o in result[1]]
    lines = table(full, found)
    lines += ["", "Rank correlations over the layers, lowest and highest of the seeds:", ""]
    for name, values in results[0][2].items():
        ends = [(min(each), max(each)) for each in ([r[2][name][bits] for r in results] for bits in values)]
        said = [
            f"{low:.2f} to {high:.2f} at {bits} bits"
            if low == low
            else f"none at {bits} bits, where all are equal"
            for bits, (low, high) in zip(values, ends, strict=True)
        ]
        lines.append(f"- {name}: {', '.join(said)}")
    print("\n".join(lines))
    if options.print:
        return 0
    described = digits.commit()
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
