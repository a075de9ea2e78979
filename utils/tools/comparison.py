"""Finished runs side by side: those that differ in their seed alone are one row, with mean and spread."""

from __future__ import annotations

import csv
import io
import itertools
import json
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from utils.report.run_files import Run
from utils.text import format_table, printable

# Fields that say where and how a run works, not what it learns.
_ASIDE = {"data.seed", "data.rank", "data.workers", "data.val_batch_size", "devices.ids", "warnings"}
_LEARNED = {
    "run.pretrained", "run.ema_weights", "run.unresume_scope", "run.resume_file", "run.bn_batches",
}  # fmt: skip
SHOWN = 60  # characters of a field's value


def grouped(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A row for each group of finished runs, as plain JSON.

    Runs whose configurations are equal but for the seed and for what cannot change a result (the case, folders,
    ...) are a group, in the order of their first runs. A seed that a group already has starts another one: it is no
    new sample.

    Each row has `name`, `runs`, `seeds`, `network`, `bits`, `lr`, `top1` (of each run, percent, after the last epoch;
    None where it was not measured), its `mean`, `std` (of the sample; None for a single run), `lowest` and `highest`,
    `gap` (points, to the first row), `weight_bytes`, `float_weight_bytes`, `smaller`, `bit_operations`, `audit`, and
    `differs`: fields of the configuration that are not the same in all rows.
    """
    groups: dict[tuple[object, ...], list[Run]] = {}
    seen: Counter[tuple[object, ...]] = Counter()
    for run in runs:
        fields = tuple(sorted(_learned(run).items()))
        repeat = seen[fields, _seed(run)]
        seen[fields, _seed(run)] += 1
        groups.setdefault((fields, repeat), []).append(run)
    fields = [_learned(members[0]) for members in groups.values()]
    names = dict.fromkeys(name for each in fields for name in each)
    differing = [name for name in names if len({each.get(name) for each in fields}) > 1]
    rows: list[dict[str, Any]] = []
    for members, config in zip(groups.values(), fields, strict=True):
        row = _row(members, [run.label for run in runs if run not in members])
        if rows and None not in (row["mean"], rows[0]["mean"]):
            row["gap"] = row["mean"] - rows[0]["mean"]
        rows.append(row | {"differs": {name: config.get(name) for name in differing}})
    return rows


def _learned(run: Run) -> dict[str, str]:
    """The fields of a configuration that a result may depend on, without the seed."""
    # Of a file of class weights the values count, not the path.
    files = run.config.get("data.class_weight_values", "[]") != "[]"
    aside = {f"data.class_weight{'s' if files else '_values'}", *_ASIDE}
    return {
        name: value
        for name, value in run.config.items()
        if name in _LEARNED or not (name in aside or name.startswith(("run.", "probe.")))
    }


def _seed(run: Run) -> int | str | None:
    seed = run.config.get("run.seed")
    return int(seed) if seed is not None and seed.isdecimal() else seed


def _row(members: Sequence[Run], others: Sequence[str]) -> dict[str, Any]:
    summaries = [run.summary for run in members if run.summary is not None]
    top1 = [summary["last_top1"] for summary in summaries]
    known = [value for value in top1 if value is not None]
    return {
        "name": _name([run.label for run in members], others),
        "runs": [str(run.folder) for run in members],
        "seeds": [_seed(run) for run in members],
        "network": _joined(summary["network"] for summary in summaries),
        "bits": _joined(summary["bits"] for summary in summaries),
        "lr": members[0].config.get("optim.lr", ""),
        "top1": top1,
        "mean": statistics.mean(known) if known else None,
        "std": statistics.stdev(known) if len(known) > 1 else None,
        "lowest": min(known, default=None),
        "highest": max(known, default=None),
        "gap": None,
        "weight_bytes": summaries[0]["weight_bytes"],
        "float_weight_bytes": summaries[0]["float_weight_bytes"],
        "smaller": members[0].smaller,
        "bit_operations": summaries[0]["bit_operations"],
        "audit": _joined(summary["audit"] for summary in summaries),
    }  # fmt: skip


def _name(labels: Sequence[str], others: Sequence[str]) -> str:
    """`photos-*` for `photos-1` and `photos-2` if no other run's name begins so, otherwise all names."""
    same = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*labels, strict=False))
    prefix = "".join(letters[0] for letters in same)
    if len(labels) > 1 and prefix and not any(label.startswith(prefix) for label in others):
        return f"{prefix}*"
    return ", ".join(labels)


def _joined(values: Any) -> str:
    return "; ".join(dict.fromkeys(values))


def as_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a table, and below it a table of what differs."""
    several = any(len(row["runs"]) > 1 for row in rows)
    head = ("run", "network", "bits w/a", "lr", "seed", "top-1 %")
    head += ("lowest - highest",) * several
    head += ("gap", "weights KiB", "float32 KiB", "smaller", "audit")
    cells = []
    for row in rows:
        spread = f"{_number(row['lowest'], '.2f')} - {_number(row['highest'], '.2f')}"
        cells.append((
            row["name"], row["network"], row["bits"], row["lr"], " ".join(map(str, row["seeds"])),
            _mean(row),
            *([spread if row["std"] is not None else ""] if several else []),
            _number(row["gap"], "+.2f"), f"{row['weight_bytes'] / 1024:.1f}", f"{row['float_weight_bytes'] / 1024:.1f}",
            f"{row['smaller']:.1f}x" if row["smaller"] is not None else "-", row["audit"],
        ))  # fmt: skip
    mean = "mean of the seeds, " if several else ""
    text = (
        f"{_table(head, cells)}\n"
        f"top-1: {mean}validation images, after the last epoch; weights: those of convolutions and linear layers"
    )
    found = _differences(rows)
    return f"{text}\n\nwhat differs:\n{_table(('field', 'value', 'runs'), found)}" if found else text


def _mean(row: Mapping[str, Any]) -> str:
    """The mean; of how many runs, where the accuracy of some was not measured."""
    count = sum(value is not None for value in row["top1"])
    few = f" ({count} of {len(row['top1'])})" if 0 < count < len(row["top1"]) else ""
    return f"{_number(row['mean'], '.2f')}{few}" if count else "-"


def _differences(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """A line for each value of each field that differs, with the runs that have it."""
    found = []
    for name in rows[0]["differs"]:
        by_value: dict[str | None, list[str]] = {}
        for row in rows:
            by_value.setdefault(row["differs"][name], []).append(row["name"])
        for i, (value, names) in enumerate(by_value.items()):
            shown = "-" if value is None else value if len(value) <= SHOWN else f"{value[:SHOWN]}..."
            found.append(("" if i else name, shown, ", ".join(names)))
    return found


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    return format_table(head, [tuple(map(printable, row)) for row in rows])


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def as_json(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a JSON list."""
    return json.dumps(rows, indent=2, allow_nan=False) + "\n"


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as CSV: lists with spaces between their items, a column for each field that differs."""
    file = io.StringIO()
    flat = [{**row, **row["differs"]} for row in rows]
    writer = csv.DictWriter(file, [name for name in flat[0] if name != "differs"], extrasaction="ignore")
    writer.writeheader()
    for row in flat:
        lists = {name: " ".join(map(_cell, value)) for name, value in row.items() if isinstance(value, list)}
        writer.writerow(row | lists)
    return file.getvalue()


def _cell(value: object) -> str:
    return "" if value is None else str(value)
