"""The text of a dry run: a screen that a person reads, then, with `--verbose`, everything that was checked."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import yaml

from utils.config.image_size import size_text
from utils.config.recorded import to_dict
from utils.config.schema import Config, DistillConfig
from utils.report import curves
from utils.report.accumulator_record import Accumulator, accumulator_remark, accumulator_table
from utils.report.cost_record import Cost
from utils.report.run_report import dataset_name
from utils.step.schedule import Schedule
from utils.text import counted, printable, some_names

LISTED = 6  # changes of the learning rate on the first screen


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run before its first step.

    Attributes:
        config: the configuration.
        cost: of the network.
        full_precision: names of the layers without quantizers.
        images: numbers of training and validation images.
        start: the weights that it starts from, in words.
        step_images: images that a process has in a step; 0 in an evaluation.
        time: the duration of a step and of the run, in words.
        classes: how classes of different sizes are evened out, in words; empty where they are not.
        measured: whether the pass that `time` is estimated from succeeded, where there was one.
        rates: the learning rates.
        policy: the changes of a policy, a line each; empty without one.
        groups: the optimizer's parameter groups, as a table.
        warnings: all warnings.
        folder: of the log.
        checkpoints: where they go.
        peak_bytes: the largest sum of tensors alive at once while one image runs, at their bits.
        accumulators: the integer sums of its layers in the worst case, with the weights and ranges that it starts from.
    """

    config: Config
    cost: Cost
    full_precision: tuple[str, ...]
    images: tuple[int, int]
    start: str
    step_images: int
    time: str
    classes: str
    measured: bool
    rates: Schedule
    policy: str
    groups: str
    warnings: tuple[str, ...]
    folder: Path
    checkpoints: Path
    peak_bytes: int
    accumulators: tuple[Accumulator, ...] = ()


def text(plan: Plan) -> str:
    """The text of `--dry_run`, or of the keyword `lr-test`, whose rates are also drawn into a file."""
    config = plan.config
    if config.run.lr_test:
        return _rates_of_all_epochs(plan)
    parts = [_screen(plan)]
    if config.run.verbose:
        values = {k: v for k, v in to_dict(config).items() if k not in ("origins", "warnings")}
        origins = "\n".join(f"{name}: {origin}" for name, origin in config.origins.items())
        parts += [
            yaml.safe_dump(values, sort_keys=False),
            f"set by:\n{origins}\n",
            f"{plan.cost.table()}\n",
            *([f"{accumulator_table(plan.accumulators)}\n"] if plan.accumulators else []),
            f"parameter groups:\n{plan.groups}\n",
            *([f"policy:\n{plan.policy}\n"] if plan.policy else []),
            f"learning rate at the epochs where it changes: {_listed(plan.rates.changes())}",
        ]
    else:
        parts.append(
            "--verbose prints the configuration and what set it, layers, parameter groups and all rates"
        )
    checked = "everything checked" if plan.measured else "checked but for the pass that fails"
    return "\n".join([*parts, f"dry run: {checked}, nothing trained"])


def duration(seconds: float) -> str:
    """A duration in words, rounded to two digits: `0.25 s`, `12 min`, `3.5 h`, `2.1 days`."""
    units = (("s", 1, 100), ("min", 60, 6000), ("h", 3600, 172_800), ("days", 86_400, math.inf))
    unit, length = next((unit, length) for unit, length, limit in units if seconds < limit)
    return f"{float(f'{seconds / length:.2g}'):g} {unit}"


def _screen(plan: Plan) -> str:
    """What will be trained, on what, from what, for how long; and the warnings."""
    config, cost = plan.config, plan.cost
    data, model, evaluate = config.data, config.model, config.run.evaluate
    train, val = plan.images
    dataset = dataset_name(config)
    where = "" if data.root is None else f" in {data.root}"
    processes = f" for each of {data.world_size} processes" if data.world_size > 1 else ""
    steps = plan.rates.steps_per_epoch
    batches = f"; {counted(steps, 'step')} an epoch, each of {counted(plan.step_images, 'image')}{processes}"
    rows = [
        (
            "evaluate" if evaluate else "train",
            f"{model.name}, {cost.parameters:,} parameters, {model.num_classes} classes, "
            f"{'grey ' * (model.channels == 1)}images of {size_text(model.input_size)} pixels",
        ),
        (
            "on",
            f"{dataset}{where}: {counted(train, 'image')}, {val:,} for validation{'' if evaluate else batches}",
        ),
        *([("classes", plan.classes)] if plan.classes else []),
        ("from", plan.start),
        *([("taught by", _teacher(config.loss.distill))] if config.loss.distill and not evaluate else []),
        ("bits", _bits(plan)),
        (
            "size",
            f"weights {cost.weight_bytes / 1024:,.1f} KiB, {cost.float_weight_bytes / 1024:,.1f} KiB in float32; "
            f"{cost.macs:,} MACs an image, tensors of {plan.peak_bytes / 1024:,.1f} KiB at once",
        ),
        *([("sums", f"integers of {accumulator_remark(plan.accumulators)}")] if plan.accumulators else []),
        *([] if evaluate else [("schedule", _schedule(plan))]),
        *([("policy", _changes(plan))] if _changes(plan) else []),
        ("time", plan.time),
        ("writes", f"{plan.folder}" if evaluate else f"{plan.folder}, {plan.checkpoints}"),
    ]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name.ljust(width)}  {said}" for name, said in rows]
    if cost.is_mixed:
        lines += ["", plan.cost.bits_table(), ""]
    return "\n".join([*lines, *(f"warning: {warning}" for warning in plan.warnings)])


def _changes(plan: Plan) -> str:
    """How many changes a policy makes before and during training; those of `--full_precision` are seen in the bits."""
    lines = plan.policy.splitlines()
    later = sum(not line.startswith("policy, init: ") for line in lines)
    first = len(lines) - later if any(rule.number for rule in plan.config.policy) else 0
    counts = ((first, "before training"), (later, "on the way"))
    return ", ".join(f"{counted(count, 'change')} {when}" for count, when in counts if count)


def _teacher(distill: DistillConfig) -> str:
    """The teacher and where its weights are from."""
    return f"{distill.teacher.name}, {printable(str(distill.pretrained))}"


def _bits(plan: Plan) -> str:
    """The quantizers of weights, inputs and outputs, each kind with the number of its layers."""
    layers = plan.cost.layers
    kinds = (
        ("weights", [layer.weight for layer in layers]),
        ("inputs", [layer.activation for layer in layers]),
        ("outputs", [layer.result for layer in layers]),
        ("factors of attention's products", [each.kind for each in plan.cost.matmuls]),
    )
    said = [
        f"{name}: " + ", ".join(f"{kind} in {count} layers" for kind, count in counted.items())
        for name, words in kinds
        if (counted := Counter(word.rpartition(",")[0] for word in words if word))
    ]
    if not said:
        return "full precision"
    return "; ".join([*said, f"full precision: {some_names(plan.full_precision) or 'no layer'}"])


def _schedule(plan: Plan) -> str:
    """Epochs, optimizer, warm-ups and learning rates."""
    config, rates = plan.config, plan.rates
    changes = rates.changes()
    more = f", ... ({len(changes) - LISTED} more)" if len(changes) > LISTED else ""
    wakeup = (
        f"; learning-rate warm-up over {counted(rates.wakeup_steps, 'step')}" if rates.wakeup_steps else ""
    )
    skipped = (
        f"; no optimizer step in the first {rates.skipped_steps:,} of {rates.total_steps:,} (--warmup)"
        if rates.skipped_steps
        else ""
    )
    epochs = config.schedule.all_epochs
    listed = f"learning rate from epoch {_listed(changes[:LISTED])}{more}"
    return f"{counted(epochs, 'epoch')}, {config.optim.name}, {listed}{wakeup}{skipped}"


def _listed(changes: Iterable[tuple[int, float]]) -> str:
    return ", ".join(f"{epoch}: {rate:.6g}" for epoch, rate in changes)


def _rates_of_all_epochs(plan: Plan) -> str:
    """A table of the learning rate at the first step of each epoch; the rates of all steps are drawn."""
    config, rates = plan.config, plan.rates
    firsts = map(rates.first_taken, range(config.schedule.all_epochs))
    lines = [
        f"{epoch:5d}  {f'{rate:.8g}' if math.isfinite(rate) else 'no optimizer step (--warmup)'}"
        for epoch, rate in enumerate(firsts)
    ]
    path = plan.folder / "schedule.png"
    curves.draw_schedule(rates, path, f"{config.run.case}: --lr_policy {config.schedule.policy}")
    return "\n".join(["epoch  learning rate at its first step", *lines, f"drawn: {path}"])
