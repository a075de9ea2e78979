"""Train every method on a small data set and write the table of `docs/results.md`.

    python benchmarks/digits.py                     # full precision and 2-bit LSQ, seeds 1-3
    python benchmarks/digits.py --all               # every method at 1 bit, ternary, 2, 3 and 4 bits
    python benchmarks/digits.py --starts            # two ways to find the first clip values
    python benchmarks/digits.py --dataset glyphs --all
    python benchmarks/digits.py --dataset glyphs --recipes  # the best ones for 1 and 2 bits
    python benchmarks/digits.py --dataset glyphs --steps    # those in two steps, and with other methods
    python benchmarks/digits.py --dataset glyphs --factors  # what that for 1 bit consists of, one change at a time
    python benchmarks/digits.py --dataset glyphs --below-zero  # levels for activations below zero
    python benchmarks/digits.py --dataset glyphs --peers    # quantizers of other libraries (requirement-peers.txt)

Each run is the real command line in a process of its own. A seed's networks all start from that seed's
full-precision network of the same block; all gaps are to that of the original block. Reported is the
top-1 of the validation images after the last epoch, never the best epoch. Runs with a finished summary of
the same command are not repeated, except with `--fresh`.
"""

from __future__ import annotations

import argparse
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
from typing import Any

import recipes
from recipes import BLOCK, FULL, FULL_PRECISION, NO_START, WHOLE, Method

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results.md"
NETWORK = {  # small images or a narrow network in the full tables, so that they can be repeated
    "digits-quick": "--model resnet20 --width_alpha 0.25",
    "digits-all": "--model resnet20 --width_alpha 0.25 --input_size 16",
    "glyphs-quick": "--model resnet20 --width_alpha 0.125",
    "glyphs-all": "--model resnet20 --width_alpha 0.125 --input_size 16",
}
NETWORK |= {
    f"{dataset}-{rows}": NETWORK[f"{dataset}-all"]
    for dataset in ("digits", "glyphs")
    for rows in ("starts", "agreement")
}
FONTS = "-fonts"  # ends the names of what was drawn with the fonts of --fonts
# Their networks, and so their starts, are those of --all.
SHARED = ("recipes", "steps", "factors", "peers", "below-zero")
COMMON = "-v 360 --nesterov --lr_policy sgdr"


@dataclass(frozen=True)
class Outcome:
    """One finished run."""

    method: str
    bits: str
    seed: int
    top1: float
    best: float
    audit: str
    command: str
    commit: str  # at which it was trained


def slug(text: str) -> str:
    """A method's name as part of a case."""
    text = text.lower().replace("+", "p")  # XNOR-Net++ is not XNOR-Net
    return "".join(c if c.isalnum() else "-" for c in text).strip("-")


def command(setup: str, case: str, seed: int, block: str, keywords: str, options: str) -> list[str]:
    """The command line of one run, from the repository's root."""
    words = f"{setup.partition('-')[0]},{block}" + ("," + keywords if keywords else "")
    network = NETWORK[setup.removesuffix(FONTS)]
    text = f"main.py {network} --keyword {words} --case {case} --seed {seed} {COMMON} {options}"
    return [sys.executable, *shlex.split(text)]


def run(case: str, argv: Sequence[str], fresh: bool) -> dict[str, Any]:
    """The summary of a run and its `commit`; it is started unless one of the same command is finished already."""
    folder = ROOT / "exp" / case
    stamp = folder / "command.txt"
    text = shlex.join(argv[1:])
    if fresh or not ((folder / "summary.json").exists() and stamp.exists() and stamp.read_text() == text):
        begun = commit()
        # One thread each: two runs side by side use two cores better than two threads use them.
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0 and not (folder / "summary.json").exists():  # an audit that fails has one
            raise SystemExit(f"{text}\nfailed with status {done.returncode}:\n{done.stdout}{done.stderr}")
        stamp.write_text(text)
        (folder / "commit.txt").write_text(begun)
    summary = json.loads((folder / "summary.json").read_text())
    summary["commit"] = (folder / "commit.txt").read_text() if (folder / "commit.txt").exists() else "unknown"
    print(f"{case}: {summary['last_top1']:.2f}", flush=True)
    return summary


def commit() -> str:
    """The commit of the repository; it ends in -dirty where files differ from it."""
    return subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()


def outcomes(
    setup: str, methods: Sequence[Method], seeds: Sequence[int], jobs: int, fresh: bool, common: str = ""
) -> list[Outcome]:
    """Full precision first, then every method from it, for each seed; all with the `common` options."""
    blocks = dict.fromkeys((BLOCK, *(m.block for m in methods)))
    found: list[Outcome] = []
    with ThreadPoolExecutor(jobs) as pool:

        def outcome(m: Method, seed: int, case: str, options: str) -> Outcome:
            options = f"{options} {m.options}".format(teacher=f"{full_case(BLOCK, seed)}-checkpoint.pth.tar")
            argv = command(setup, case, seed, m.block, m.keywords, f"{options} {common}".rstrip())
            summary = run(case, argv, fresh)
            text = shlex.join(["python", *argv[1:]])
            return Outcome(
                m.name, m.bits, seed, summary["last_top1"], summary["best_top1"], summary["audit"], text,
                summary["commit"],
            )  # fmt: skip

        def whole(job: tuple[str, int]) -> Outcome:
            block, seed = job
            return outcome(WHOLE[block], seed, full_case(block, seed), FULL)

        def full_case(block: str, seed: int) -> str:
            return f"bench-{setup}-{recipes.CASES[block]}-{seed}"

        def tuned_case(m: Method, seed: int) -> str:
            return f"bench-{setup}-{slug(m.name)}-{slug(m.bits)}-{seed}"

        found += pool.map(whole, [(block, seed) for block in blocks for seed in seeds])

        def tuned(job: tuple[Method, int]) -> Outcome:
            m, seed = job
            if m.start == NO_START:
                return outcome(m, seed, tuned_case(m, seed), m.recipe)
            start = tuned_case(by_name[m.start], seed) if m.start else full_case(m.block, seed)
            return outcome(
                m, seed, tuned_case(m, seed), f"{m.recipe} --pretrained {start}-checkpoint.pth.tar"
            )

        by_name = {m.name: m for m in methods}
        starts = {m.start for m in methods}
        for last in (False, True):  # rows that others start from come first
            found += pool.map(
                tuned, [(m, seed) for m in methods if (m.name not in starts) is last for seed in seeds]
            )
    return found


def table(found: Sequence[Outcome], methods: Sequence[Method]) -> list[str]:
    """The rows in Markdown: mean and spread over the seeds, the gap to the seed's own full precision."""
    full = {o.seed: o.top1 for o in found if o.method == FULL_PRECISION.name}
    lines = [
        "| method | bits w/a | top-1 %, mean | lowest - highest | gap, points | target | reached | audit |",
        "|---|---|---|---|---|---|---|---|",
        f"| full precision | 32/32 | {statistics.mean(full.values()):.2f} | "
        f"{min(full.values()):.2f} - {max(full.values()):.2f} | | | | |",
    ]
    for whole in (WHOLE[block] for block in WHOLE if block != BLOCK):
        tops = [o.top1 for o in found if o.method == whole.name]
        if tops:
            lines.append(
                f"| {whole.name} | 32/32 | {statistics.mean(tops):.2f} | "
                f"{min(tops):.2f} - {max(tops):.2f} | | | | |"
            )
    for m in methods:
        mine = [o for o in found if (o.method, o.bits) == (m.name, m.bits)]
        values = [o.top1 for o in mine]
        gap = statistics.mean(o.top1 - full[o.seed] for o in mine)
        reached = "|" if m.most is None else f"{-m.most:+.1f} | {'yes' if gap >= -m.most else 'no'}"
        audit = "passed" if all(o.audit.startswith("passed") for o in mine) else "FAILED"
        lines.append(
            f"| {m.name} | {m.bits} | {statistics.mean(values):.2f} | "
            f"{min(values):.2f} - {max(values):.2f} | "
            f"{gap:+.2f} | {reached} | {audit} |"
        )
    return lines


def draw(found: Sequence[Outcome], methods: Sequence[Method], path: Path, title: str) -> None:
    """Each run's gap to its seed's full precision as a dot, the mean as a line."""
    from matplotlib.figure import Figure

    full = {o.seed: o.top1 for o in found if o.method == FULL_PRECISION.name}
    figure = Figure(figsize=(8, 0.34 * len(methods) + 1.6), dpi=120, layout="constrained")
    axes = figure.subplots()
    for row, m in enumerate(methods):
        gaps = [o.top1 - full[o.seed] for o in found if (o.method, o.bits) == (m.name, m.bits)]
        axes.plot(gaps, [row] * len(gaps), "o", color="#0072b2", alpha=0.6)
        axes.plot(statistics.mean(gaps), row, "|", color="#d55e00", markersize=16, markeredgewidth=3)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(methods)), [f"{m.name} {m.bits}" for m in methods])
    axes.invert_yaxis()
    axes.set_xlabel("top-1 minus full precision, points (dots: seeds, bar: mean)")
    axes.set_title(title)
    axes.grid(axis="x", alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def section(text: str, name: str, lines: Sequence[str]) -> str:
    """`text` with the part between the markers of `name` replaced, or appended where there is none."""
    start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    body = "\n".join([start, *lines, end])
    if start not in text:
        return f"{text.rstrip()}\n\n{body}\n"
    return text[: text.index(start)] + body + text[text.index(end) + len(end) :]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of every benchmark of trainings."""
    parser.add_argument("--dataset", choices=("digits", "glyphs"), default="digits")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each")
    parser.add_argument("--fresh", action="store_true", help="repeat runs that are finished already")
    parser.add_argument("--print", action="store_true", help="print the table and write nothing to docs/")


def write(
    name: str, script: str, seeds: Sequence[int], lines: Sequence[str], runs: Sequence[dict[str, Any]]
) -> None:
    """Write a table and the command that made it to docs/results.md, and its runs to docs/results/NAME.json."""
    raw = {"commit": commit(), "runs": runs}
    path = RESULTS.parent / "results" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(raw, indent=1) + "\n")
    arguments = shlex.join(sys.argv[1:])
    trained = dict.fromkeys(run["commit"] for run in runs if "commit" in run)
    head = [
        f"`python benchmarks/{script}.py{' ' + arguments if arguments else ''}`, commit {raw['commit']}, "
        f"{'runs of ' + ', '.join(trained) + ', ' if trained and list(trained) != [raw['commit']] else ''}"
        f"seeds {', '.join(map(str, seeds))}; every run's command and figures: "
        f"[results/{name}.json](results/{name}.json).", "",
    ]  # fmt: skip
    RESULTS.write_text(section(RESULTS.read_text(encoding="utf-8"), name, [*head, *lines]))


def main() -> int:
    """Run, then write the table, the plot and the raw figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sets = parser.add_mutually_exclusive_group()
    for chosen, what in (
        ("all", "every method instead of 2-bit LSQ alone"),
        ("starts", "two ways to find the first clip values"),
        ("recipes", "the best ones for 1 and 2 bits"),
        ("steps", "the recipes in two steps, and with other methods"),
        ("factors", "what the recipe for 1 bit consists of, one change at a time"),
        ("below-zero", "levels for activations below zero"),
        ("peers", "quantizers of other libraries"),
    ):
        sets.add_argument(
            f"--{chosen}", action="store_const", dest="rows", const=chosen, default="quick", help=what
        )
    add_arguments(parser)
    parser.add_argument("--fonts", help="folder of fonts to draw the glyphs with: a second set")
    options = parser.parse_args()

    methods = {
        "quick": recipes.QUICK, "all": recipes.ALL, "starts": recipes.STARTS, "recipes": recipes.RECIPES,
        "steps": recipes.TWO_STEPS, "factors": recipes.FACTORS, "below-zero": recipes.BELOW_ZERO,
        "peers": recipes.PEERS,
    }[options.rows]  # fmt: skip
    ending, common = (FONTS, f"--fonts {shlex.quote(options.fonts)}") if options.fonts else ("", "")
    name = f"{options.dataset}-{options.rows}{ending}"
    setup = f"{options.dataset}-all{ending}" if options.rows in SHARED else name
    found = outcomes(setup, methods, options.seeds, options.jobs, options.fresh, common)
    lines = table(found, methods)
    print("\n".join(lines))
    if options.print:
        return 0
    picture = RESULTS.parent / "results" / f"{name}.png"
    lines += ["", f"![gaps](results/{name}.png)"]
    write(name, "digits", options.seeds, lines, [asdict(outcome) for outcome in found])
    draw(found, methods, picture, f"{options.dataset}, {len(options.seeds)} seeds")
    return 0


if __name__ == "__main__":
    sys.exit(main())
