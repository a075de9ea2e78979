"""Train every method on a small data set and write the table of `docs/results.md`.

    python benchmarks/digits.py                     # full precision and 2-bit LSQ, seeds 1-3
    python benchmarks/digits.py --all               # every method at 1 bit, ternary, 2, 3 and 4 bits
    python benchmarks/digits.py --starts            # two ways to find the first clip values
    python benchmarks/digits.py --dataset glyphs --all
    python benchmarks/digits.py --dataset glyphs --recipes  # the best ones for 1 and 2 bits
    python benchmarks/digits.py --dataset glyphs --steps    # that for 2 bits with other methods
    python benchmarks/digits.py --dataset glyphs --factors  # what that for 1 bit consists of, one change at a time
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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results.md"
BLOCK = "origin,cbsa,fix_pooling,singleconv,fix"  # the original ResNet
# Signs of activations behind a ReLU would all be +1; Bi-Real Net's block has no ReLU, a skip around every
# convolution and shortcuts in full precision. Without quantizers it is a linear network, a start for the binary
# ones but no yardstick.
BINARY_BLOCK = "NReLU,cbsa,fix_pooling,singleconv,real_skip"
REACT_BLOCK = (
    "RPReLU,cbsa,fix_pooling,singleconv,real_skip"  # the same with ReActNet's activation, not linear
)

FULL = "-b 64 --epochs 30 --lr 0.1 --weight_decay 5e-4 --label_smooth 0.1 --wakeup_epoch 1"
# With norms the loss does not depend on the size of a weight, and its gradient is large where the weight is small:
# without warm-up and clipping the first steps move binary weights so far from zero that their signs never change again.
# Weights that oscillate up to the last step spoil the norms' running statistics, which are therefore re-estimated.
TUNE = (
    "-b 32 --epochs 10 --lr 0.05 --weight_decay 1e-4 --label_smooth 0.1 --wakeup_epoch 1 --grad_clip 1 "
    "--bn_batches 20 --re_init"
)
BOTH = "--fm_enable --wt_enable"
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
NO_START = "random weights"  # of a row that starts from no other network
FONTS = "-fonts"  # ends the names of what was drawn with the fonts of --fonts
SHARED = ("recipes", "steps", "factors", "peers")  # their networks, and so their starts, are those of --all
COMMON = "-v 360 --nesterov --lr_policy sgdr"


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        name: for the table.
        bits: weights/activations, for the table.
        keywords: of the method.
        options: of the command line.
        block: the keywords of the network's blocks.
        most: the largest gap to full precision, in points, that counts as reached; a target, not a claim. None: a row
            for comparison.
        recipe: of the training, to which `options` are added; {teacher} is the full-precision checkpoint of the seed.
        start: the row, of this set, whose networks it starts from; empty: the full-precision ones of its block;
            `NO_START`: none.
    """

    name: str
    bits: str
    keywords: str
    options: str
    most: float | None
    block: str = BLOCK
    recipe: str = TUNE
    start: str = ""


def bits(count: int) -> str:
    """The options for weights and activations of `count` bits."""
    return f"{BOTH} --fm_bit {count} --wt_bit {count}"


FULL_PRECISION = Method("full precision", "32/32", "", "", None)
WHOLE = {  # the full-precision network of each block
    BLOCK: FULL_PRECISION,
    BINARY_BLOCK: replace(FULL_PRECISION, name="full precision, block without ReLU", block=BINARY_BLOCK),
    REACT_BLOCK: replace(FULL_PRECISION, name="full precision, block with RPReLU", block=REACT_BLOCK),
}
CASES = {BLOCK: "fp", BINARY_BLOCK: "fp-binary-block", REACT_BLOCK: "fp-react-block"}
TERNARY = f"{BOTH} --fm_bit 2 --fm_level 3 --wt_bit 2 --wt_level 3"
LIMIT = {1: 3.0, 2: 0.6, 3: 0.3, 4: 0.3}
CENTRED = "--wt_adaptive var-mean"  # DoReFa-Net's weights per channel: one range for all is too coarse for three levels
QUICK = (Method("LSQ", "2/2", "dorefa,lsq", bits(2), LIMIT[2]),)
ALL = (
    *(Method("LSQ", f"{b}/{b}", "dorefa,lsq", bits(b), LIMIT[b]) for b in (4, 3, 2)),
    Method("LSQ", "ternary", "dorefa,lsq", TERNARY, 1.0),
    Method("LSQ", "1/1", "dorefa,lsq", f"{bits(1)} --wt_grad_scale paper", LIMIT[1]),
    *(Method("LSQ, mid-tread weights", f"{b}/{b}", "dorefa,lsq", f"{bits(b)} --wt_grid midtread", LIMIT[b])
      for b in (4, 3, 2)),
    *(Method("PACT", f"{b}/{b}", "pact", bits(b), LIMIT[b]) for b in (4, 3, 2)),
    Method("PACT, centred weights", "ternary", "pact", f"{TERNARY} {CENTRED}", 1.0),
    Method("PACT", "ternary", "pact", TERNARY, None),
    Method("PACT, binary weights", "1/1", "pact,wt_bin", bits(1), LIMIT[1]),
    *(Method("DoReFa-Net, clip 1", f"{b}/{b}", "dorefa", bits(b), None) for b in (4, 3, 2)),
    *(Method("DoReFa-Net, clip 3", f"{b}/{b}", "dorefa", f"{bits(b)} --fm_boundary 3", LIMIT[b])
      for b in (4, 3, 2)),
    Method("DoReFa-Net, clip 3, centred weights", "ternary", "dorefa", f"{TERNARY} --fm_boundary 3 {CENTRED}", 1.0),
    Method("DoReFa-Net, clip 3", "ternary", "dorefa", f"{TERNARY} --fm_boundary 3", None),
    Method("DoReFa-Net, clip 3", "1/1", "dorefa,wt_bin", f"{bits(1)} --fm_boundary 3", LIMIT[1]),
    *(Method("LQ-Nets", f"{b}/{b}", "lq", bits(b), LIMIT[b]) for b in (4, 3, 2, 1)),
    Method("FATNN, LSQ weights", "2/2", "dorefa,fm_non-uniform,wt_lsq", bits(2), LIMIT[2]),
    Method("FATNN", "ternary", "dorefa,non-uniform", TERNARY, 1.0),
    Method("XNOR-Net", "1/1", "xnor", f"{bits(1)} --fm_grad_type STE", LIMIT[1], BINARY_BLOCK),
    Method("XNOR-Net++", "1/1", "xnor,gamma", f"{bits(1)} --fm_grad_type STE", LIMIT[1], BINARY_BLOCK),
    Method("Bi-Real gradient", "1/1", "xnor", f"{bits(1)} --fm_grad_type Triangle", LIMIT[1], BINARY_BLOCK),
)  # fmt: skip

# Initial clip values: by the paper's formula and, in the second row of each pair, at the least squared error.
STARTS = tuple(
    replace(m, name=f"{m.name}{where}", options=f"{m.options}{option}")
    for m in ALL
    if m.name == "LSQ" or (m.name, m.bits) == ("PACT, binary weights", "1/1")
    for where, option in (("", ""), (", least squared error", " --re_init_range mse"))
)

# Quantizers of other libraries, see peer_methods.py: all with the same recipe, and ranges that start alike.
PEERS = tuple(
    Method(name, f"{b}/{b}", words, f"{bits(b)} --keyword_file benchmarks/peer_methods.py", None)
    for b in (2, 3, 4)
    for name, words in (
        ("LSQ", "dorefa,lsq"),  # of this project
        ("LSQ as lsq-net computes it", "lsq-net"),
        ("Brevitas, learned scales", "brevitas"),
        ("torchao, range learning", "torchao"),
    )
)

# A teacher's outputs in place of smoothed labels, no clipping of gradients, and statistics of norms from a whole epoch.
TAUGHT = "--distill_teacher resnet20 --distill_pretrained {teacher}"
TAUGHT_BINARY = f"{TAUGHT} --distill_keyword glyphs,{BLOCK}"
STEPS = "-b 32 --epochs 10 --wakeup_epoch 1 --bn_batches 96 --re_init"
SGD = "--lr 0.05 --weight_decay 1e-4"
ADAM = "--optimizer ADAM --lr 0.005 --weight_decay 0"
ONE = f"{bits(1)} --fm_grad_type Triangle"
REACTNET = Method("ReActNet", "1/1", "reactnet", ONE, None, REACT_BLOCK, f"{STEPS} {ADAM} {TAUGHT_BINARY}")
FIRST_STEP = replace(
    REACTNET,
    name="ReActNet, its first step",
    bits="32/1",
    options="--fm_enable --fm_bit 1 --fm_grad_type Triangle",
)
TWO = Method("LSQ, taught", "2/2", "dorefa,lsq", bits(2), None, recipe=f"{STEPS} {SGD} {TAUGHT}")
TWO_FIRST_STEP = replace(
    TWO, name="LSQ, taught, its first step", bits="32/2", options="--fm_enable --fm_bit 2"
)


def second_step(name: str, keywords: str, first: Method = TWO_FIRST_STEP) -> Method:
    """The row of 2-bit weights and activations that starts from a first step."""
    return replace(TWO, name=f"{name}, two steps", keywords=keywords, start=first.name)


LSQ_TWO_STEPS = second_step("LSQ, taught", "dorefa,lsq")
RECIPES = (
    FIRST_STEP,
    replace(REACTNET, name="ReActNet, two steps", start=FIRST_STEP.name),
    Method("LSQ", "2/2", "dorefa,lsq", bits(2), None),
    TWO,
    TWO_FIRST_STEP,
    LSQ_TWO_STEPS,
)
N2UQ_FIRST_STEP = replace(TWO_FIRST_STEP, name="N2UQ, taught, its first step", keywords="n2uq")


TWO_STEPS = (  # the recipe for 2 bits with other methods, and one step of as many epochs as both have
    TWO_FIRST_STEP,
    N2UQ_FIRST_STEP,
    replace(TWO, name="LSQ, taught, 20 epochs", options=f"{bits(2)} --epochs 20"),
    LSQ_TWO_STEPS,
    second_step("LSQ, EWGS weights", "dorefa,lsq,wt_ewgs"),
    second_step("LSQ, StableQAT weights", "dorefa,lsq,wt_stableqat"),
    second_step("N2UQ, LSQ weights", "dorefa,fm_n2uq,wt_lsq", N2UQ_FIRST_STEP),
    second_step("N2UQ, StableQAT weights", "dorefa,fm_n2uq,wt_stableqat", N2UQ_FIRST_STEP),
)
FACTORS = (  # of the binary recipe, one at a time
    Method("XNOR-Net", "1/1", "xnor", f"{bits(1)} --fm_grad_type STE", None, BINARY_BLOCK),
    REACTNET,
    replace(REACTNET, name="ReActNet, untaught", recipe=f"{STEPS} {ADAM} --label_smooth 0.1"),
    replace(REACTNET, name="ReActNet, SGD", recipe=f"{STEPS} {SGD} {TAUGHT_BINARY}"),
    replace(REACTNET, name="ReActNet, thresholds of 0", keywords="xnor"),
    replace(REACTNET, name="ReActNet, no activation", block=BINARY_BLOCK),
    replace(REACTNET, name="ReActNet, weight decay 1e-4", options=f"{ONE} --weight_decay 1e-4"),
    replace(REACTNET, name="ReActNet, random weights at the start", start=NO_START),
    replace(REACTNET, name="ReActNet, 20 epochs", options=f"{ONE} --epochs 20"),
)


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
    """The summary of a run, started unless one of the same command is finished already."""
    folder = ROOT / "exp" / case
    stamp = folder / "command.txt"
    text = shlex.join(argv[1:])
    if fresh or not ((folder / "summary.json").exists() and stamp.exists() and stamp.read_text() == text):
        # One thread each: two runs side by side use two cores better than two threads use them.
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0 and not (folder / "summary.json").exists():  # an audit that fails has one
            raise SystemExit(f"{text}\nfailed with status {done.returncode}:\n{done.stdout}{done.stderr}")
        stamp.write_text(text)
    summary = json.loads((folder / "summary.json").read_text())
    print(f"{case}: {summary['last_top1']:.2f}", flush=True)
    return summary


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
                m.name, m.bits, seed, summary["last_top1"], summary["best_top1"], summary["audit"], text
            )

        def whole(job: tuple[str, int]) -> Outcome:
            block, seed = job
            return outcome(WHOLE[block], seed, full_case(block, seed), FULL)

        def full_case(block: str, seed: int) -> str:
            return f"bench-{setup}-{CASES[block]}-{seed}"

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
    for whole in (WHOLE[BINARY_BLOCK], WHOLE[REACT_BLOCK]):
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
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    raw = {"commit": described.stdout.strip(), "runs": runs}
    path = RESULTS.parent / "results" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(raw, indent=1) + "\n")
    arguments = shlex.join(sys.argv[1:])
    head = [
        f"`python benchmarks/{script}.py{' ' + arguments if arguments else ''}`, commit {raw['commit']}, "
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
        ("steps", "the recipe for 2 bits with other methods"),
        ("factors", "what the recipe for 1 bit consists of, one change at a time"),
        ("peers", "quantizers of other libraries"),
    ):
        sets.add_argument(
            f"--{chosen}", action="store_const", dest="rows", const=chosen, default="quick", help=what
        )
    add_arguments(parser)
    parser.add_argument("--fonts", help="folder of fonts to draw the glyphs with: a second set")
    options = parser.parse_args()

    methods = {
        "quick": QUICK, "all": ALL, "starts": STARTS, "recipes": RECIPES, "steps": TWO_STEPS,
        "factors": FACTORS, "peers": PEERS,
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
