"""The texts of a run: what it is, log lines during it, files and a picture at its end."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from logging import Logger
from pathlib import Path
from typing import Any

import torch
import yaml

from utils.checkpoint.case_files import CheckpointFiles
from utils.checkpoint.run_state import RunState
from utils.config.recorded import to_dict
from utils.config.schema import Config, QuantizerConfig
from utils.errors import UserError
from utils.report import curves, epoch_files
from utils.report.accumulator_record import accumulator_remark
from utils.report.audit_record import Audit
from utils.report.cost_record import Cost
from utils.step import optimizer
from utils.step.optimizer import ParamGroup
from utils.step.schedule import rate_text


def dump_yaml(config: Config) -> str:
    """The configuration as YAML."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def dataset_name(config: Config) -> str:
    """The data set in words; that of images of the user's own is called imagenet, whichever they are."""
    name = config.data.dataset
    return "a folder of images" if name == "imagenet" else name


def announce(
    config: Config, cost: Cost, device: torch.device, groups: Sequence[ParamGroup],
    quantizers: Iterable[tuple[str, QuantizerConfig]], full_precision: Sequence[str], logger: Logger,
) -> None:  # fmt: skip
    """Log what is about to be trained or evaluated.

    Args:
        config: the run's.
        cost: of the network.
        device: of this process.
        groups: the optimizer's.
        quantizers: the network's, each with its options.
        full_precision: names of the layers without quantizers.
        logger: takes the lines.
    """
    logger.info("%s, %s, keywords %s", config.model.name, dataset_name(config), ",".join(config.keywords))
    if config.data.world_size > 1:
        logger.info("%d processes, this one on %s", config.data.world_size, device)
    logger.info("%s", cost.totals())
    if cost.note:
        logger.info("%s", cost.note)
    if config.model.quant.enabled:
        logger.info("in full precision: %s", ", ".join(full_precision) or "no layer")
    logger.debug("%s", optimizer.groups_table(groups))
    for name, options in quantizers:
        logger.debug("%s: %s", name, options)


def epoch_line(row: dict[str, float], last: int, best: float) -> str:
    """The log line of an epoch."""
    text = f"epoch {row['epoch']:.0f}/{last}: loss {row['train_loss']:.4f}, top-1 {row['train_top1']:.2f}"
    if "val_top1" in row:
        so_far = f"best {best:.2f}" if math.isfinite(best) else "no best yet: not all quantizers are on"
        text += f"; validation: loss {row['val_loss']:.4f}, top-1 {row['val_top1']:.2f} ({so_far})"
    if "ema_top1" in row:
        text += f"; averaged weights: top-1 {row['ema_top1']:.2f}"
    if "frozen" in row:
        text += f"; frozen {row['frozen']:.2f} %"
    text += f"; {rate_text(row['lr'])}, {row['images_per_second']:.0f} images/s, data wait {row['data_wait']:.1f} %"
    return f"{text}, {row['seconds']:.1f} s"


def finish(
    config: Config, cost: Cost, found: Audit, state: RunState, folder: Path, files: CheckpointFiles,
    logger: Logger,
) -> dict[str, Any]:  # fmt: skip
    """Write the run's summary and picture, and log their names; returns the summary."""
    metrics = folder / "metrics.csv"  # not there when a finished run was resumed under another case
    rows = epoch_files.MetricsFile.read(metrics) if metrics.exists() else []
    curves.draw_curves(
        rows, folder / "curves.png", f"{config.run.case} ({config.model.name}, {cost.bits} bits)"
    )
    write_text(folder / "audit.txt", f"{found.table()}\n{found.verdict}\n")
    result = {
        "case": config.run.case,
        "network": config.model.name,
        "dataset": config.data.dataset,
        "bits": cost.bits,
        "epochs": state.epoch,
        "best_top1": state.best_acc if math.isfinite(state.best_acc) else None,
        "last_top1": rows[-1]["val_top1"] if rows and math.isfinite(rows[-1]["val_top1"]) else None,
        "last_ema_top1": rows[-1]["ema_top1"] if rows and math.isfinite(rows[-1]["ema_top1"]) else None,
        "weight_bytes": cost.weight_bytes,
        "float_weight_bytes": cost.float_weight_bytes,
        "macs": cost.macs,
        "bit_operations": cost.bit_operations,
        "parameters": cost.parameters,
        "audit": found.verdict,
        "seed": config.run.seed,
        "layers": [asdict(layer) | {"bit_operations": layer.bit_operations} for layer in cost.layers],
        "quantizers": [asdict(row) | {"problem": row.problem, "note": row.note} for row in found.rows],
        "accumulators": [
            asdict(row) | {"bits": row.bits, "seen_bits": row.seen_bits} for row in found.accumulators
        ],
    }
    write_text(folder / "summary.json", json.dumps(result, indent=2) + "\n")
    logger.info("audit: %s", found.verdict)
    for problem in found.problems:
        logger.error("audit: %s", problem)
    if found.warning:
        logger.warning("audit: warning: %s", found.warning)
    if found.remark:
        logger.info("audit: %s", found.remark)
    if found.accumulators:
        logger.info("integer sums: %s", accumulator_remark(found.accumulators))
    best = f"best top-1 {state.best_acc:.2f}; " if math.isfinite(state.best_acc) else ""
    logger.info("%scheckpoints %s", best, ", ".join(map(str, files.existing())))
    written = (
        "metrics.csv", "curves.png", "config.yaml", "audit.txt", "summary.json", "quantizers.jsonl", "log.txt",
    )  # fmt: skip
    logger.info("look at: %s", ", ".join(str(folder / name) for name in written if (folder / name).exists()))
    if config.run.tensorboard:
        logger.info("TensorBoard: tensorboard --logdir %s", folder / "tensorboard")
    logger.info("report: python tools.py --keyword report %s", folder)
    return result


def write_text(path: Path, text: str) -> None:
    """Write a small file of a run."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode("utf-8", "surrogateescape"))  # names of files may be any bytes
    except OSError as error:
        raise UserError(
            f"cannot write {path} ({error.strerror}): choose another folder with --log_dir"
        ) from error


def hyperparameters(config: Config) -> dict[str, object]:
    """The options that a run's outcome depends on, as one dictionary with dotted names."""
    options: dict[str, object] = {"case": config.run.case, "keyword": ",".join(config.keywords)}
    for part in ("model", "data", "optim", "schedule", "precision"):
        options |= _flat(to_dict(getattr(config, part)), f"{part}.")
    return options


def _flat(values: Mapping[str, Any], prefix: str) -> dict[str, object]:
    """Nested dictionaries as one, with dotted names."""
    flat: dict[str, object] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat
