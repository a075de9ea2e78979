"""A run's progress: saving it in a checkpoint, and resuming from it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from utils.checkpoint import archive, random_state, weights
from utils.checkpoint.case_files import CheckpointFiles
from utils.config.recorded import to_dict
from utils.config.schema import Config
from utils.config.spelling import changed
from utils.errors import TrainingError, UserError
from utils.processes import distributed
from utils.step import meters
from utils.step.schedule import Schedule
from utils.text import printable

# Fields of the network that matter only at its start or in the gradient: a resumed run may change them.
CHANGEABLE = {
    "re_init", "re_init_missing", "re_init_range", "re_init_percentile", "boundary", "correlate", "stable",
    "stable_epoch", "scale", "grad_type", "grad_scale", "grad_delta", "grad_window", "proxquant_step", "input_size",
    "progressive",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RunState:
    """How far a run is.

    Attributes:
        epoch: epochs done.
        position: images of the next epoch that all processes together have seen, in whole batches.
        sums: this process's `meters.Totals.values` of that epoch.
        seconds: how long that epoch took so far.
        waited: how much of that time training waited for images.
        best_acc: best top-1 of a validation so far, percent; -inf before the first.
        amp: `Precision.state_dict` to resume with.
        policy: `PolicyScheduler.state_dict` to resume with.
        methods: `TrainingMethods.state_dict` to resume with.
        differences: options that changed since the resumed checkpoint.
    """

    epoch: int = 0
    position: int = 0
    sums: tuple[float, ...] = meters.Totals.EMPTY
    seconds: float = 0.0
    waited: float = 0.0
    best_acc: float = -math.inf
    amp: Mapping[str, Any] = field(default_factory=dict)
    policy: Mapping[str, Any] = field(default_factory=dict)
    methods: Mapping[str, Any] = field(default_factory=dict)
    differences: tuple[str, ...] = ()


def restore(
    payload: dict[str, Any], path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, config: Config
) -> RunState:
    """Restore network, optimizer and progress from a checkpoint; `set_random` restores the random numbers."""
    _check_kinds(payload, path)
    different = differences(payload.get("config", {}), to_dict(config))
    for name, line in different.items():
        network = name.startswith("model.") and name.rpartition(".")[2] not in CHANGEABLE
        if name == "data.val_files" and not (config.run.evaluate and not config.data.val_split):
            raise UserError(
                f"{path} cannot be continued: its validation images were others; --val_split and the files in --root "
                "must be those of then, and --pretrained starts another run from it"
            )
        if network or name == "optim.name":
            raise UserError(f"{path} cannot be continued: {line}; --pretrained starts another run from it")
    state = weights.state_dict_of(payload, source=str(path))
    weights.load_weights(model, state, allow_missing=lambda name: False, source=str(path))
    if config.run.evaluate:
        return RunState(
            epoch=payload.get("epoch", 0),
            best_acc=payload.get("best_acc", -math.inf),
            methods={"average": payload.get("methods", {}).get("average", {})},
        )
    missing = [name for name in ("epoch", "optimizer", "best_acc", "random") if name not in payload]
    if missing:
        raise UserError(
            f"{path} holds no {', '.join(missing)}, so training cannot continue; use --pretrained"
        )
    # Hyperparameters of the options win over those of the checkpoint; the rate is set before each step.
    options = [
        {name: value for name, value in group.items() if name not in ("params", "lr")}
        for group in optimizer.param_groups
    ]
    try:
        optimizer.load_state_dict(payload["optimizer"])
        _check_optimizer(optimizer)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"{path} holds another optimizer's state ({error}); use --pretrained") from error
    for group, option in zip(optimizer.param_groups, options, strict=True):
        group.update(option)
    return RunState(
        epoch=payload["epoch"],
        position=payload.get("position", 0),
        sums=_own_sums(payload.get("sums", []), config.data.rank, config.data.world_size),
        seconds=payload.get("seconds", 0.0),
        waited=payload.get("waited", 0.0),
        best_acc=payload["best_acc"],
        amp=payload.get("amp", {}),
        policy=payload.get("policy", {}),
        methods=_wanted(payload.get("methods", {}), config),
        differences=tuple(dict.fromkeys(different.values())),
    )


def _check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError when a parameter's state has neither its shape nor a single element."""
    for parameter, kept in optimizer.state.items():
        for name, value in kept.items():
            if isinstance(value, torch.Tensor) and value.numel() != 1 and value.shape != parameter.shape:
                raise ValueError(f"{name} of shape {list(value.shape)} for {list(parameter.shape)}")


@contextmanager
def believing(path: Path | None) -> Iterator[None]:
    """Report errors while state is restored from `path` as damage of that file."""
    if path is None:  # nothing is restored
        yield
        return
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"{path} is damaged: it holds what this program does not write ({type(error).__name__}: "
            f"{reason:.200}); use --pretrained or another file"
        ) from error


def _wanted(methods: dict[str, Any], config: Config) -> dict[str, Any]:
    """The state of the training methods, without an average that is not continued."""
    return methods if config.weights.ema_decay > 0 else {**methods, "average": {}}


def _own_sums(of_ranks: list[list[float]], rank: int, world_size: int) -> tuple[float, ...]:
    """This process's part of the sums; when the number of processes differs, the first one takes them all."""
    if len(of_ranks) == world_size:
        return tuple(of_ranks[rank])
    return tuple(map(sum, zip(*of_ranks, strict=True))) if rank == 0 and of_ranks else meters.Totals.EMPTY


def set_random(payload: dict[str, Any], rank: int) -> None:
    """Restore this process's random numbers; a process that is new keeps its own."""
    states = [payload["random"], *payload.get("random_of_others", [])]
    if rank < len(states):
        random_state.set_random_state(states[rank])


def first_batch(position: int, images: int, passes: int, batches: int) -> int:
    """The batch of an epoch to resume at, after `position` images of it.

    With the batches of the run that saved, this is the next one. With others it follows the last whole group of
    `passes` batches of `images`, so that no image is left out and some are seen twice.
    """
    batch = min(position // images, batches)
    return batch if batch == batches else batch - batch % passes


def next_step(state: RunState, config: Config, steps_per_epoch: int, batches: int) -> int:
    """The next step of the optimizer (from 0) after a state; `batches` is the length of an epoch now."""
    passes = config.optim.iter_size
    first = first_batch(state.position, config.data.batch_size * config.data.world_size, passes, batches)
    return state.epoch * steps_per_epoch + first // passes


def sums_until(sums: tuple[float, ...], position: int, first: int) -> tuple[float, ...]:
    """The sums over `position` images of an epoch, which resumes at image `first` of it.

    Images that are seen again count once: the sums are reduced to the share of those before `first`.
    """
    return sums if first >= position else tuple(value * first / position for value in sums)


def _check_kinds(payload: dict[str, Any], path: Path) -> None:
    """Refuse a payload whose entries are not what `save` writes; published files may lack some of them."""
    kinds: dict[str, tuple[type, ...]] = {
        "epoch": (int,), "best_acc": (int, float), "optimizer": (dict,), "random": (dict,), "config": (dict,),
        "position": (int,), "sums": (list,), "seconds": (int, float), "waited": (int, float),
        "amp": (dict,), "policy": (dict,), "methods": (dict,), "random_of_others": (list,),
        "launchers": (list,), "classes": (list,), "max_value": (int, type(None)),
        "images": (dict, type(None)),
    }  # fmt: skip
    for name, kind in kinds.items():
        if name in payload and (not isinstance(payload[name], kind) or isinstance(payload[name], bool)):
            raise _damaged(path, name, payload[name])
    for name in ("epoch", "position", "seconds", "waited"):
        if not 0 <= payload.get(name, 0) < math.inf:
            raise _damaged(path, name, payload[name])
    if math.isnan(payload.get("best_acc", 0)):
        raise _damaged(path, "best_acc", payload["best_acc"])
    rows = payload.get("sums", [])
    for row in rows:
        if not isinstance(row, list) or len(row) != len(meters.Totals.EMPTY):
            raise _damaged(path, "sums", rows)
        # The loss of a step that half precision skipped may be infinite.
        if not all(isinstance(value, float | int) for value in row) or not all(map(math.isfinite, row[1:])):
            raise _damaged(path, "sums", rows)
    _check_place(payload, path)


def _damaged(path: Path, name: str, value: object) -> UserError:
    """The error for an entry that `save` does not write."""
    return UserError(f"{path} is damaged: {name} is {value!r:.200}; use --pretrained or another file")


def _check_place(payload: dict[str, Any], path: Path) -> None:
    """Refuse an epoch and a position that contradict the step of the schedule or the length of the run."""
    config, scheduler = payload.get("config"), payload.get("scheduler")
    if config is None or not isinstance(scheduler, dict) or "step" not in scheduler:
        return  # of another program
    try:
        together = config["data"]["batch_size"] * config["data"]["world_size"]
        epochs = config["schedule"]["epochs"] + config["schedule"]["extra_epoch"]
        step, epoch = scheduler["step"], payload["epoch"]
        within = math.ceil(payload.get("position", 0) // together / config["optim"]["iter_size"])
        per_epoch = (step - within) / max(epoch, 1)
        fits = per_epoch >= 1 and per_epoch == int(per_epoch) if epoch else per_epoch == 0
    except (KeyError, TypeError, ArithmeticError) as error:
        raise _damaged(path, "scheduler or config", scheduler) from error
    if not fits or epoch > epochs or (epoch and within > per_epoch):
        place = (epoch, payload.get("position", 0), step)
        raise _damaged(path, "(epoch, position, scheduler's step)", place)


def schedule_change(payload: dict[str, Any], state: RunState, config: Config, steps_per_epoch: int) -> str:
    """Warn when the schedule resumes at a different step than the checkpoint's; empty otherwise."""
    scheduler = payload.get("scheduler")
    before = scheduler.get("step") if isinstance(scheduler, dict) else None
    now = _step(state, config, steps_per_epoch)
    if before in (None, now):
        return ""
    return (
        f"the schedule was at step {before} and goes on from step {now}: batches, processes or the number of "
        "images have changed"
    )


def _step(state: RunState, config: Config, steps_per_epoch: int) -> int:
    """The number of optimizer steps taken before a state."""
    batch = state.position // (config.data.batch_size * config.data.world_size)
    return state.epoch * steps_per_epoch + math.ceil(batch / config.optim.iter_size)


# Parts of the configuration about where and how often, not about the training itself.
_ELSEWHERE = {"keywords", "origins", "warnings", "data.rank", "devices.ids", "devices.distributed",
              "devices.world_size", "devices.rank"}  # fmt: skip
_OF_A_RUN = {"run.bn_batches"}  # of `run`, which else says how it starts, or how often it writes


def differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """The fields of the configuration that changed, of those that affect the training, and how in a user's words."""
    found: dict[str, str] = {}
    # Of two files of class weights the values count, not the paths.
    files = all(side.get("class_weight_values") for side in (before, now))
    for name in sorted(before.keys() & now.keys()):
        old, new, field = before[name], now[name], f"{prefix}{name}"
        aside = field in _ELSEWHERE or (prefix == "run." and field not in _OF_A_RUN)
        if aside or name == ("class_weights" if files else "class_weight_values"):
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            found |= differences(old, new, f"{field}.")
        elif old != new:
            found[field] = printable(changed(field, old, new))
    return found


@dataclass(frozen=True, kw_only=True)
class Output:
    """Where a run's checkpoints go, and how.

    Attributes:
        files: the checkpoint files of the case.
        writer: writes them beside the training.
        launchers: the torchrun of each machine of the run, see `utils.processes.distributed.launchers`.
    """

    files: CheckpointFiles
    writer: archive.Writer
    launchers: Sequence[str]


def save(
    state: RunState, config: Config, output: Output, *, state_dict: Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer, amp: Mapping[str, Any], rates: Schedule, best: bool = False,
    classes: Sequence[str] = (), max_value: int | None = None, images: Mapping[str, Any] | None = None,
) -> None:  # fmt: skip
    """Start writing the latest checkpoint, and the best and the epoch's where they are due.

    All processes take part; the first one writes. The contents are fixed when this returns; they are on
    the disk for certain when the writer's next job starts, or after its `wait`.

    Args:
        state: how far the run is.
        config: the run's.
        output: where the files go.
        state_dict: the network's state, with float32 weights.
        optimizer: of the weights.
        amp: `Precision.state_dict`.
        rates: the learning rates.
        best: whether no validation was better.
        classes: names of the classes; empty where they have none.
        max_value: the value of 16-bit images that becomes white; None without such images.
        images: how an image becomes the network's input, `ImageTransform.to_dict`.

    Raises:
        TrainingError: weights are not finite, and nothing is written; or the disk refused the last job.
    """
    _refuse_nonfinite(state_dict, state)
    of_ranks = distributed.gathered((list(state.sums), random_state.random_state()))
    if config.data.rank != 0:
        return
    step = _step(state, config, rates.steps_per_epoch)
    payload = {
        "epoch": state.epoch,
        "position": state.position,
        "sums": [sums for sums, _ in of_ranks],
        "seconds": state.seconds,
        "waited": state.waited,
        "state_dict": dict(state_dict),
        "optimizer": optimizer.state_dict(),
        "scheduler": {"step": step},
        "best_acc": state.best_acc,
        "learning_rate": rates.at(max(step - 1, 0)),
        "amp": dict(amp),
        "policy": dict(state.policy),
        "methods": dict(state.methods),
        "random": of_ranks[0][1],
        "random_of_others": [random for _, random in of_ranks[1:]],
        "config": to_dict(config),
        "launchers": list(output.launchers),
        "classes": list(classes),
        "max_value": max_value,
        "images": images,
    }
    kept = config.run.save_freq and state.position == 0 and state.epoch % config.run.save_freq == 0
    output.writer.start(
        partial(
            _write, output.files, archive.snapshot(payload), keep=config.run.keep, best=best,
            epoch=state.epoch if kept else None,
        )
    )  # fmt: skip


def _write(
    files: CheckpointFiles, payload: dict[str, Any], *, keep: int, best: bool, epoch: int | None
) -> None:
    """Write a payload to all files that are due."""
    try:
        data = archive.serialise(payload)
        if best:
            archive.write_atomic(files.best, data)
        if epoch is not None:
            archive.write_atomic(files.epoch(epoch), data)
        # Last, because a killed run resumes from it: then the others are there already.
        files.write_latest(data, keep)
    except (UserError, OSError) as error:  # the options were right when the run began
        raise TrainingError(f"{error}; the checkpoints before are whole, -r goes on from them") from error


def _refuse_nonfinite(tensors: Mapping[str, torch.Tensor], state: RunState) -> None:
    """Raise `TrainingError` rather than replace a good checkpoint by weights that are not finite."""
    bad = weights.nonfinite(tensors.items())
    if bad:
        raise TrainingError(
            f"{bad[0]} is not finite after {state.epoch} epochs and {state.position} images, which is not saved; "
            "try a lower --lr, --grad_clip or --re_init"
        )
