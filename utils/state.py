"""What a run continues from and what it leaves behind: its weights, its state and its earlier namesakes."""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from model.quant import quantizers
from utils import checkpoint
from utils.checkpoint import CheckpointFiles, LoadReport
from utils.config import Config, to_dict
from utils.errors import UserError
from utils.schedule import Schedule

# Fields of the network that matter at its start or in the gradient only: a run may go on with others.
CHANGEABLE = {
    "re_init", "boundary", "correlate", "stable", "stable_epoch", "scale", "grad_type", "grad_scale",
    "proxquant_step", "input_size",
}  # fmt: skip


@dataclass(frozen=True)
class RunState:
    """How far a run is.

    Attributes:
        epoch: epochs done.
        best_acc: best top-1 of a validation so far, percent; -inf before the first.
        differences: options that changed since the checkpoint that the run continues from.
    """

    epoch: int = 0
    best_acc: float = -math.inf
    differences: tuple[str, ...] = ()


def load_pretrained(model: nn.Module, path: Path, config: Config) -> LoadReport:
    """Load weights into the network; quantizers that the file does not have keep their start values.

    The number of levels is the command line's, not the file's, so that a 4-bit checkpoint can start a
    2-bit network; evaluating it at other levels than it was trained for is an error. Training counts
    its iterations from zero, so that a warm-up takes place.
    """
    state = checkpoint.state_dict_of(checkpoint.read(path), source=str(path))
    own = dict(quantizers(model))
    held = set(state)
    for name, quantizer in own.items():
        levels = state.get(f"{name}.level_num")
        if not config.run.evaluate:
            state.pop(f"{name}.iteration", None)
        if not quantizer.calibrates:  # what a warm-up of the run that wrote the file has left
            state.pop(f"{name}.range_mean", None)
            clip = state.pop(f"{name}.clip", None)
            if clip is not None:
                with torch.no_grad():
                    quantizer.set_range(clip)
        trained = None if levels is None else _levels(levels, path)
        if trained is None or trained == quantizer.levels:
            continue
        del state[f"{name}.level_num"]
        if config.run.evaluate:
            raise UserError(
                f"{path}: {name} was trained with {trained} levels, the options say {quantizer.levels}: "
                f"give --{quantizer.config.tag}_level {trained} or the bits that mean it"
            )
    prefixes = tuple(f"{name}." for name in own)
    held -= set(state)
    report = checkpoint.load_weights(
        model,
        state,
        allow_missing=lambda name: name.startswith(prefixes) if prefixes else False,
        scope=config.run.unresume_scope,
        source=str(path),
    )
    # Counters that the file has and that start anew all the same are not missing.
    return dataclasses.replace(report, missing=tuple(name for name in report.missing if name not in held))


def restore(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, config: Config) -> RunState:
    """Everything of a checkpoint that training continues from."""
    payload = checkpoint.read(path)
    _check_kinds(payload, path)
    changed = differences(payload.get("config", {}), to_dict(config))
    for line in changed:
        field = line.split(" ", 1)[0]
        network = field.startswith("model.") and field.rpartition(".")[2] not in CHANGEABLE
        if network or field == "optim.name":
            raise UserError(f"{path} cannot be continued: {line}; --pretrained starts another run from it")
    state = checkpoint.state_dict_of(payload, source=str(path))
    checkpoint.load_weights(model, state, allow_missing=lambda name: False, source=str(path))
    for name, quantizer in quantizers(model):
        quantizer.set_levels(_levels(state[f"{name}.level_num"], path))
    if config.run.evaluate:
        return RunState(payload.get("epoch", 0), payload.get("best_acc", -math.inf))
    missing = [name for name in ("epoch", "optimizer", "best_acc", "random") if name not in payload]
    if missing:
        raise UserError(
            f"{path} holds no {', '.join(missing)}, so training cannot continue; use --pretrained"
        )
    # The options' hyperparameters count, as far as they differ from the checkpoint's.
    options = [
        {name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups
    ]
    try:
        optimizer.load_state_dict(payload["optimizer"])
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"{path} holds another optimizer's state ({error}); use --pretrained") from error
    for group, option in zip(optimizer.param_groups, options, strict=True):
        group.update(option)
    checkpoint.set_random_state(payload["random"])
    return RunState(payload["epoch"], payload["best_acc"], changed)


def _check_kinds(payload: dict[str, Any], path: Path) -> None:
    """Refuse a payload whose entries are not what `save` writes; published files may lack some of them."""
    kinds: dict[str, tuple[type, ...]] = {
        "epoch": (int,), "best_acc": (int, float), "optimizer": (dict,), "random": (dict,), "config": (dict,),
    }  # fmt: skip
    for name, kind in kinds.items():
        if name in payload and not isinstance(payload[name], kind):
            raise UserError(
                f"{path} is damaged: {name} is {payload[name]!r}; use --pretrained or another file"
            )
    if payload.get("epoch", 0) < 0:
        raise UserError(f"{path} is damaged: epoch is {payload['epoch']}; use --pretrained or another file")


def _levels(value: torch.Tensor, path: Path) -> int:
    """A `level_num` of a checkpoint."""
    if value.numel() != 1 or not 2 <= float(value) <= 2**16:
        raise UserError(f"{path} is damaged: a level_num is {value.tolist()}; use another file")
    return int(value)


def differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> tuple[str, ...]:
    """Fields of the configuration that changed, of those that change the training."""
    found: list[str] = []
    for name in before.keys() & now.keys() - {"run", "keywords", "origins", "warnings"}:
        old, new = before[name], now[name]
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{prefix}{name}.")
        elif old != new:
            found.append(f"{prefix}{name} was {old} and is {new} now")
    return tuple(sorted(found))


def save(
    state: RunState, model: nn.Module, optimizer: torch.optim.Optimizer, rates: Schedule,
    files: CheckpointFiles, config: Config, *, best: bool,
) -> None:  # fmt: skip
    """Write the latest checkpoint, and the best and the epoch's where they are due."""
    payload = {
        "epoch": state.epoch,
        "state_dict": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": {"step": state.epoch * rates.steps_per_epoch},
        "best_acc": state.best_acc,
        "learning_rate": rates.at(state.epoch * rates.steps_per_epoch - 1),
        "amp": {},
        "random": checkpoint.random_state(),
        "config": to_dict(config),
    }
    if best:
        checkpoint.save(files.best, payload)
    if config.run.save_freq and state.epoch % config.run.save_freq == 0:
        checkpoint.save(files.epoch(state.epoch), payload)
    # Last, because it is what a killed run continues from: then the others are there already.
    checkpoint.save(files.latest, payload)


def keep_earlier_run(folder: Path, files: CheckpointFiles) -> None:
    """Rename what an earlier run of the same case left to CASE.N, so that nothing is overwritten."""
    mine = files.existing()
    if not mine and not (folder / "metrics.csv").exists():
        return
    names = (f"{files.case}.{number}" for number in itertools.count(1))
    earlier = next(
        name for name in names
        if not folder.with_name(name).exists() and not dataclasses.replace(files, case=name).existing()
    )  # fmt: skip
    try:
        if folder.exists():
            folder.rename(folder.with_name(earlier))
        for path in mine:
            path.rename(path.with_name(earlier + path.name.removeprefix(files.case)))
    except OSError as error:
        raise UserError(
            f"cannot move the earlier run of {files.case} away: {error}; use another --case"
        ) from error
    print(f"the earlier run of the case {files.case} is kept as {earlier}")
