"""Train 2-bit LSQ with and without each method of training and write the tables of `docs/results.md`.

    python benchmarks/methods.py --dataset digits
    python benchmarks/methods.py --dataset glyphs

Networks and full-precision starts are those of `benchmarks/digits.py --all`, whose finished runs are not repeated; the
recipe is that of the example configs, which has none of these methods. Each row adds the options in its column to the
plain run. Differences are to the plain run of the same seed.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import digits
import recipes

TUNE = "-b 32 --epochs 8 --lr 0.05 --weight_decay 1e-4 --re_init"  # that of the example configs


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    Attributes:
        name: for the table; empty for the plain run.
        options: added to the plain ones; {start} is the full-precision checkpoint of the seed.
        keyword: added to the plain ones.
    """

    name: str
    options: str = ""
    keyword: str = ""


PLAIN = Variant("")
VARIANTS = (
    Variant("distillation", "--distill_teacher resnet20 --distill_pretrained {start}"),
    Variant("averaged weights", "--ema_decay 0.95"),
    Variant("batch norms anew", "--bn_batches 45"),
    Variant("dampening", "--dampen 1e-3"),
    Variant("iterative freezing", "--freeze_threshold 0.2,0.05 --freeze_momentum 0.02"),
    Variant("wakeup", "--wakeup_epoch 1"),
    Variant("warmup", "--warmup 20"),
    Variant("stable", "--stable_epoch 1"),
    Variant("range: least squared error", "--re_init_range mse"),
    Variant("range: 99th percentile", "--re_init_range percentile --re_init_percentile 99"),
    Variant("extra epochs", "--extra_epoch 2 --eta_min 1e-3"),
    Variant("proxquant", "--proxquant_step 180", "proxquant"),
    Variant("quantization loss", "--quant_loss 0.1"),
    Variant("focal loss", "--focal_gamma 2"),
    Variant("label smoothing", "--label_smooth 0.1"),
    Variant("policy: 8, 4, 2 bits", "--policy config/policies/progressive.yaml --fm_bit 8 --wt_bit 8"),
    Variant(
        "policy: 3, 2 bits, step stays",
        "--policy config/policies/progressive-step.yaml --fm_bit 3 --wt_bit 3",
    ),
    Variant("policy: 4 and 2 bits", "--policy config/policies/mixed.yaml"),
    Variant(
        "policy: clip values frozen late",
        "--policy config/policies/freeze.yaml --custom_lr_list clip_val --custom_lr 0.05",
    ),
)


@dataclass(frozen=True)
class Outcome:
    """One finished run; accuracies are those after the last epoch, percent."""

    variant: str
    seed: int
    top1: float
    ema_top1: float | None
    audit: str
    command: str


def outcomes(setup: str, seeds: Sequence[int], jobs: int, fresh: bool) -> list[Outcome]:
    """Every variant from the full-precision network of each seed."""
    start = f"bench-{setup}-fp-{{seed}}"

    def whole(seed: int) -> None:
        argv = digits.command(setup, start.format(seed=seed), seed, recipes.BLOCK, "", recipes.FULL)
        digits.run(start.format(seed=seed), argv, fresh)

    def variant(job: tuple[Variant, int]) -> Outcome:
        row, seed = job
        case = f"bench-{setup}-methods-{digits.slug(row.name) or 'plain'}-{seed}"
        checkpoint = f"{start.format(seed=seed)}-checkpoint.pth.tar"
        keywords = "dorefa,lsq" + (f",{row.keyword}" if row.keyword else "")
        options = f"{TUNE} --pretrained {checkpoint} {recipes.bits(2)} {row.options.format(start=checkpoint)}"
        argv = digits.command(setup, case, seed, recipes.BLOCK, keywords, options.strip())
        summary = digits.run(case, argv, fresh)
        text = shlex.join(["python", *argv[1:]])
        return Outcome(row.name, seed, summary["last_top1"], summary["last_ema_top1"], summary["audit"], text)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(whole, seeds))
        return list(pool.map(variant, [(row, seed) for row in (PLAIN, *VARIANTS) for seed in seeds]))


def table(found: Sequence[Outcome]) -> list[str]:
    """The rows in Markdown: mean and spread over the seeds, and the difference to the seed's plain run."""
    plain = {outcome.seed: outcome.top1 for outcome in found if outcome.variant == PLAIN.name}
    lines = [
        "| 2-bit LSQ with | options | top-1 %, mean | lowest - highest "
        "| difference, points | lowest - highest | audit |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in (PLAIN, *VARIANTS):
        mine = [outcome for outcome in found if outcome.variant == row.name]
        values = {o.seed: o.ema_top1 if row.name == "averaged weights" else o.top1 for o in mine}
        tops = [value for value in values.values() if value is not None]
        gaps = [value - plain[seed] for seed, value in values.items() if value is not None]
        audit = "passed" if all(outcome.audit.startswith("passed") for outcome in mine) else "FAILED"
        options = " ".join(filter(None, [row.keyword and f"keyword {row.keyword}", f"`{row.options}`"]))
        difference = f"{statistics.mean(gaps):+.2f} | {min(gaps):+.2f} - {max(gaps):+.2f}"
        lines.append(
            f"| {row.name or 'nothing'} | {options if row.options else ''} | {statistics.mean(tops):.2f} | "
            f"{min(tops):.2f} - {max(tops):.2f} | {difference if row.name else ' | '} | {audit} |"
        )
    return lines


def main() -> int:
    """Run, then write the table and the raw figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    digits.add_arguments(parser)
    options = parser.parse_args()
    found = outcomes(f"{options.dataset}-all", options.seeds, options.jobs, options.fresh)
    lines = table(found)
    print("\n".join(lines))
    if not options.print:
        digits.write(
            f"{options.dataset}-methods", "methods", options.seeds, lines, [asdict(o) for o in found]
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
