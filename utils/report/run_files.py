"""Reads and checks the files in the folder of a run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from utils.errors import UserError
from utils.report import confusion, verified
from utils.report.confusion import Confusion
from utils.report.epoch_files import MetricsFile, RecordsFile
from utils.report.verified import Verified

LARGEST = 1e300  # larger numbers count as damage
NUMBER = (int, float, type(None))  # None: it was not finite, or there is none
NUMBERS = "numbers"  # a list of such
_SUMMARY = {
    "case": str, "network": str, "dataset": str, "bits": str, "epochs": int, "best_top1": NUMBER, "last_top1": NUMBER,
    "weight_bytes": int, "float_weight_bytes": int, "macs": int, "bit_operations": int, "audit": str,
}  # fmt: skip
_LAYER = {
    "name": str, "kind": str, "output": list, "weights": int, "macs": int, "weight": str, "activation": str,
    "weight_bits": int, "activation_bits": int, "bit_operations": int,
}  # fmt: skip
_AUDIT = {"name": str, "allowed": int, "seen": int, "problem": str, "note": str}
_QUANTIZER = {
    "name": str, "tag": str, "method": str, "levels": int, "bits": int, "used": (int, type(None)), "range": NUMBER,
    "clipped": NUMBER, "positions": NUMBERS, "basis": NUMBERS, "changed": NUMBER, "update": NUMBER, "histogram": dict,
}  # fmt: skip
_HISTOGRAM = {"edges": NUMBERS, "counts": NUMBERS}


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run, finished or not.

    Attributes:
        folder: where it was read from.
        label: its name on the page, different for each run.
        config: dotted name of a field of its configuration -> the value as text.
        planned: epochs that it was to train.
        metrics: a row per epoch, as `MetricsFile.read`.
        epochs: the records of its quantizers, of `HealthRow.record`; empty in full precision.
        summary: the file `summary.json`; None as long as the run has not ended.
        confusion: what an evaluation of the same case has written; None without one.
        verified: its exported files beside its checkpoint; None where `verify` has not compared any.
    """

    folder: Path
    label: str
    config: Mapping[str, str]
    planned: int
    metrics: Sequence[Mapping[str, float]]
    epochs: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Any] | None
    confusion: Confusion | None = None
    verified: Verified | None = None

    @property
    def done(self) -> int:
        """Epochs that are done."""
        return int(self.metrics[-1]["epoch"]) if self.metrics else 0

    @property
    def smaller(self) -> float | None:
        """How many times smaller its weights are than in float32; None before the end, or if they have no size."""
        if self.summary is None or self.summary["weight_bytes"] <= 0:
            return None
        return self.summary["float_weight_bytes"] / self.summary["weight_bytes"]

    @property
    def quantizers(self) -> Sequence[Mapping[str, Any]]:
        """The quantizers after the last epoch."""
        return self.epochs[-1]["quantizers"] if self.epochs else ()

    @property
    def layers(self) -> Sequence[Mapping[str, Any]]:
        """The cost of each layer; empty before the end."""
        return self.summary["layers"] if self.summary else ()

    @property
    def audit(self) -> Sequence[Mapping[str, Any]]:
        """The audit's rows; empty before the end."""
        return self.summary["quantizers"] if self.summary else ()


def read(folders: Sequence[Path]) -> list[Run]:
    """Read the runs in these folders.

    Raises:
        UserError: a folder is not that of a run, a file in it is damaged, or one is named twice.
    """
    paths = [folder.resolve() for folder in folders]
    for i, path in enumerate(paths):
        if path in paths[:i]:
            raise UserError(f"{folders[i]} is named twice")
    names = [path.name for path in paths]
    labels = [
        path.name if names.count(path.name) == 1 else str(folder)
        for folder, path in zip(folders, paths, strict=True)
    ]
    return [_read(folder, label) for folder, label in zip(folders, labels, strict=True)]


def trained(folders: Sequence[Path]) -> list[Path]:
    """Those of `folders` in which a training was started; all of them if there is none.

    Evaluations and pages are left out, so that `exp/*` can be named. A folder that does not exist stays: `read`
    refuses it.
    """
    files = ("config.yaml", "summary.json")
    found = [
        folder for folder in folders if not folder.exists() or any((folder / file).exists() for file in files)
    ]
    return found or list(folders)


def _read(folder: Path, label: str) -> Run:
    config = _config(folder)
    schedule = config.get("schedule")
    schedule = schedule if isinstance(schedule, dict) else {}
    planned = [schedule.get(name, 0) for name in ("epochs", "extra_epoch")]
    if not all(_fits(number, int) for number in planned):
        raise UserError(f"{folder / 'config.yaml'} is not the configuration of a run")
    metrics, records = folder / "metrics.csv", folder / "quantizers.jsonl"
    rows = MetricsFile.read(metrics) if metrics.exists() else []
    if not all(row.get("epoch", math.nan).is_integer() for row in rows):
        raise UserError(f"{metrics} is not a metrics file: its column epoch is missing or damaged")
    epochs = RecordsFile.read(records) if records.exists() else []
    for record in epochs:
        for quantizer in _list(records, record, "quantizers"):
            _check(records, quantizer, _QUANTIZER)
            _check(records, quantizer["histogram"], _HISTOGRAM)
    summary = _summary(folder / "summary.json")
    if summary is not None and rows and summary["epochs"] != rows[-1]["epoch"]:
        summary = None  # of an earlier end: the run was resumed
    return Run(
        folder=folder,
        label=label,
        config=_flat(config),
        planned=sum(planned),
        metrics=rows,
        epochs=epochs,
        summary=summary,
        confusion=confusion.read(folder),
        verified=verified.read(folder),
    )


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.yaml"
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; name the folders of runs, such as exp/CASE") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} is not the configuration of a run")
    return config


def _summary(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    _check(path, summary, _SUMMARY)
    summary = {"layers": [], "quantizers": []} | summary  # early versions did not write them
    for name, fields in (("layers", _LAYER), ("quantizers", _AUDIT)):
        for entry in _list(path, summary, name):
            _check(path, entry, fields)
    return summary


def _list(path: Path, record: Mapping[str, Any], name: str) -> list[Any]:
    value = record.get(name)
    if not isinstance(value, list):
        raise UserError(f"{path} has no list of {name}: train the run again, or leave it out")
    return value


def _check(path: Path, entry: Any, fields: Mapping[str, Any]) -> None:
    """Refuse an entry that lacks a field or has one of another type."""
    if not isinstance(entry, dict):
        raise UserError(f"{path} is damaged: it has {str(entry)[:40]!r} where an entry should be")
    for name, kind in fields.items():
        if name not in entry or not _fits(entry[name], kind):
            raise UserError(f"{path} is damaged: {name} is missing or not what it should be")


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a type of `_SUMMARY` and the like; numbers must be finite."""
    if kind is NUMBERS:
        return isinstance(value, list) and all(_fits(item, NUMBER) for item in value)
    return (
        isinstance(value, kind)
        and not isinstance(value, bool)  # which Python counts among the whole numbers
        and not (isinstance(value, int | float) and not abs(value) < LARGEST)
    )


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested fields with dotted names, and their values as text."""
    flat: dict[str, str] = {}
    for name, value in config.items():
        if isinstance(value, dict) and value and name != "origins":
            flat |= _flat(value, f"{prefix}{name}.")
        elif name != "origins":  # who set a field; only the fields are compared
            flat[prefix + str(name)] = value if isinstance(value, str) else json.dumps(value, default=str)
    return flat
