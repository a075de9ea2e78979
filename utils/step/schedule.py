"""The learning rate as a pure function of the step.

A policy is a multiplier on a base rate, so that one schedule drives every parameter group: a group
with its own base rate keeps its ratio to the others at every step. Nothing here counts steps or
holds state, so a resumed run has the rates of an uninterrupted one.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING

from utils.config.schema import READ_ETA_MIN, ScheduleConfig
from utils.errors import UserError

if TYPE_CHECKING:  # `check_schedule` runs before torch is loaded
    from torch.optim import Optimizer

POLICIES = ("custom_step", "fix_step", "decay", "fix", "poly", "sgdr", "sgdr_step", "cos")

_READ_CUSTOM_STEP = {"custom_step", "poly", "sgdr", "sgdr_step"}
_READ_FACTOR = {"custom_step", "fix_step", "decay", "sgdr_step"}  # `lr_decay` as a factor


def learning_rate(config: ScheduleConfig, lr: float, step: int, steps_per_epoch: int) -> float:
    """Give the learning rate of one step.

    With `e` the epoch, `t` the steps since the interval's start, `T` the interval's steps and `i` its
    index (intervals lie between 0, the entries of `lr_custom_step` and `epochs`):

    - `custom_step`: `lr * lr_decay^i`
    - `fix_step`: `lr * lr_decay^(e // lr_fix_step)`
    - `decay`: `lr * lr_decay^e`
    - `fix`: `lr`
    - `poly`: `eta_min + (lr - eta_min) * (1 - t/T)^lr_decay`
    - `sgdr`: `eta_min + (lr - eta_min) * (1 + cos(pi * t/T)) / 2`; each interval begins at exactly `lr`
    - `sgdr_step`: as `sgdr` with the peak `lr * lr_decay^i` (not below `eta_min`) instead of `lr`
    - `cos`: as `sgdr` with `e / epochs` for `t/T`; the epoch after the last would have `eta_min`

    Steps after the end of `epochs` (`extra_epoch`) keep the rate of the last step before it. During the
    wakeup, the first `N = max(wakeup, wakeup_epoch * steps_per_epoch)` steps, the policy's rate is
    multiplied by `(step + 1) / N`: a line from zero, just before the first step, to the policy's rate at
    step `N - 1`.

    Args:
        config: the schedule.
        lr: the base rate; `config.eta_min` is an absolute rate next to this one.
        step: iterations since the start of training, from 0.
        steps_per_epoch: iterations of one epoch.
    """
    return lr * _factor(config, _floor(config, lr), step, steps_per_epoch)


@dataclass(frozen=True)
class Schedule:
    """The rates of a whole run.

    Args:
        config: the schedule, as accepted by `check_schedule`.
        lr: the base rate of the groups without a rate of their own, at the start.
        steps_per_epoch: iterations of one epoch, at least 1.
        later: other base rates, each with the iteration from which it holds, in order.
    """

    config: ScheduleConfig
    lr: float
    steps_per_epoch: int
    later: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        """Refuse an empty epoch."""
        if self.steps_per_epoch < 1:
            raise UserError("the training set gives no batch: use a smaller --batch_size or more images")

    @property
    def total_steps(self) -> int:
        """The iterations of the run, `extra_epoch` included."""
        return self.config.all_epochs * self.steps_per_epoch

    def base(self, step: int) -> float:
        """Give the base rate at an iteration counted from 0."""
        return next((lr for begin, lr in reversed(self.later) if begin <= step), self.lr)

    def at(self, step: int) -> float:
        """Give the rate of a group without a rate of its own at an iteration counted from 0."""
        return learning_rate(self.config, self.base(step), step, self.steps_per_epoch)

    def factor(self, step: int) -> float:
        """Give the rate divided by the base rate; defined for a base rate of 0 as well."""
        return _factor(self.config, _floor(self.config, self.base(step)), step, self.steps_per_epoch)

    @property
    def wakeup_steps(self) -> int:
        """The iterations of the learning-rate warm-up."""
        return _wakeup_steps(self.config, self.steps_per_epoch)

    @property
    def skipped_steps(self) -> int:
        """The iterations of the warmup, which takes no optimizer step."""
        return max(self.config.warmup, self.config.warmup_epoch * self.steps_per_epoch)

    def skip_update(self, step: int) -> bool:
        """Tell whether this iteration belongs to the warmup, which takes no optimizer step."""
        return step < self.skipped_steps

    def taken(self, step: int) -> float:
        """Give the rate of an iteration's optimizer step; NaN where none is taken."""
        return math.nan if self.skip_update(step) else self.at(step)

    def first_taken(self, epoch: int) -> float:
        """Give the rate of the first optimizer step that an epoch takes, from 0; NaN where it takes none."""
        begin = epoch * self.steps_per_epoch
        return self.taken(min(max(begin, self.skipped_steps), begin + self.steps_per_epoch - 1))

    def changes(self) -> list[tuple[int, float]]:
        """List `(epoch, rate)` for each epoch whose first step has a different rate than the previous one's."""
        changes: list[tuple[int, float]] = []
        for epoch in range(self.config.all_epochs):
            rate = self.first_taken(epoch)
            if math.isfinite(rate) and (not changes or rate != changes[-1][1]):
                changes.append((epoch, rate))
        return changes

    def apply(self, optimizer: Optimizer, step: int) -> None:
        """Set the rate of every group of `optimizer` to its `base_lr` times `factor(step)`."""
        factor = self.factor(step)
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor


def rate_text(rate: float) -> str:
    """A learning rate in a line of the log; NaN stands for an optimizer step that is not taken."""
    return f"lr {rate:.3g}" if math.isfinite(rate) else "no optimizer step (--warmup)"


def check_schedule(config: ScheduleConfig, lr: float) -> None:
    """Refuse a schedule that makes no sense.

    Only options that the policy reads are checked against each other.

    Args:
        config: the schedule.
        lr: the base rate, finite and not negative.

    Raises:
        UserError: names the option, its value and what it may be.
    """
    if config.policy not in POLICIES:
        close = get_close_matches(config.policy, POLICIES, n=1)
        hint = f"did you mean {close[0]}?" if close else f"use one of {', '.join(POLICIES)}"
        raise UserError(f"--lr_policy {config.policy} is not known: {hint}")
    for option, value in (
        ("epochs", config.epochs),
        ("extra_epoch", config.extra_epoch),
        ("wakeup", config.wakeup),
        ("wakeup_epoch", config.wakeup_epoch),
        ("warmup", config.warmup),
        ("warmup_epoch", config.warmup_epoch),
        ("lr", lr),
        ("eta_min", config.eta_min),
    ):
        if not 0 <= value < math.inf:
            raise UserError(f"--{option} {value} must be a number that is not negative")
    if config.policy in READ_ETA_MIN and config.eta_min > lr:
        raise UserError(
            f"--eta_min {config.eta_min} is above --lr {lr}: it is the lowest rate of the schedule"
        )
    if config.policy in _READ_FACTOR and not 0 < config.decay <= 1:
        raise UserError(
            f"--lr_decay {config.decay} must be above 0 and at most 1: the rate is multiplied by it"
        )
    if config.policy == "poly" and not 0 < config.decay < math.inf:
        raise UserError(f"--lr_decay {config.decay} must be positive: it is the power of --lr_policy poly")
    if config.policy == "fix_step" and config.fix_step < 1:
        raise UserError(f"--lr_fix_step {config.fix_step} must be at least 1 epoch")
    if config.policy in _READ_CUSTOM_STEP:
        _check_custom_step(config)


def _check_custom_step(config: ScheduleConfig) -> None:
    """Refuse entries of `lr_custom_step` that cannot bound intervals."""
    written = "--lr_custom_step " + ",".join(map(str, config.custom_step))
    previous = 0
    for entry in config.custom_step:
        if entry < 1:
            raise UserError(f"{written}: {entry} must be at least 1 epoch")
        if entry <= previous:
            raise UserError(f"{written}: {entry} follows {previous}, write the epochs in increasing order")
        if entry > config.epochs:
            raise UserError(f"{written}: {entry} is beyond --epochs {config.epochs}")
        previous = entry


def _floor(config: ScheduleConfig, lr: float) -> float:
    """Give `eta_min` as a multiple of the base rate."""
    return config.eta_min / lr if lr > 0 else 0.0


def _wakeup_steps(config: ScheduleConfig, steps_per_epoch: int) -> int:
    """The iterations of the learning-rate warm-up: the longer of its two options."""
    return max(config.wakeup, config.wakeup_epoch * steps_per_epoch)


def _factor(config: ScheduleConfig, floor: float, step: int, steps_per_epoch: int) -> float:
    """Give the multiplier on a base rate, the wakeup included; at least `floor` where a policy has one."""
    wakeup_steps = _wakeup_steps(config, steps_per_epoch)
    ramp = (step + 1) / wakeup_steps if step < wakeup_steps else 1.0
    last = max(config.epochs * steps_per_epoch - 1, 0)
    return ramp * _policy_factor(config, floor, min(step, last), steps_per_epoch)


def _policy_factor(config: ScheduleConfig, floor: float, step: int, steps_per_epoch: int) -> float:
    """Give the policy's multiplier for a step before the end of `epochs`."""
    epoch = step // steps_per_epoch
    interval = bisect_right(config.custom_step, epoch)
    match config.policy:
        case "custom_step":
            return config.decay**interval
        case "fix_step":
            return config.decay ** (epoch // config.fix_step)
        case "decay":
            return config.decay**epoch
        case "fix":
            return 1.0
        case "poly":
            done = _progress(config, interval, step, steps_per_epoch)
            return _between(floor, 1.0, (1.0 - done) ** config.decay)
        case "sgdr":
            done = _progress(config, interval, step, steps_per_epoch)
            return _between(floor, 1.0, _half_cosine(done))
        case "sgdr_step":
            done = _progress(config, interval, step, steps_per_epoch)
            return _between(floor, max(config.decay**interval, floor), _half_cosine(done))
        case "cos":
            return _between(floor, 1.0, _half_cosine(epoch / max(config.epochs, 1)))
        case unknown:
            raise ValueError(f"unknown policy {unknown}")


def _progress(config: ScheduleConfig, interval: int, step: int, steps_per_epoch: int) -> float:
    """Give the part of the interval between two entries of `lr_custom_step` that is done, in [0, 1)."""
    begin = (0, *config.custom_step)[interval] * steps_per_epoch
    end = (*config.custom_step, config.epochs)[interval] * steps_per_epoch
    return (step - begin) / max(end - begin, 1)  # a run of no epochs has an empty interval


def _half_cosine(done: float) -> float:
    """Fall from 1 at 0 to 0 at 1 along half a cosine."""
    return (1.0 + math.cos(math.pi * done)) / 2.0


def _between(floor: float, peak: float, height: float) -> float:
    """Mix so that a height of 1 is exactly `peak` and a height of 0 exactly `floor`."""
    return peak * height + floor * (1.0 - height)
