"""The learning rate as a function of the step."""

from __future__ import annotations

import itertools
import math
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    ExponentialLR,
    LRScheduler,
    MultiStepLR,
    PolynomialLR,
    StepLR,
)

from tests import ROOT
from utils.config.schema import ScheduleConfig
from utils.errors import UserError
from utils.step.schedule import POLICIES, Schedule, check_schedule, learning_rate

SPE = 4  # steps per epoch

# One usable configuration per policy, all of 12 epochs.
CONFIGS = {
    "custom_step": ScheduleConfig(policy="custom_step", epochs=12, custom_step=(3, 8), decay=0.1),
    "fix_step": ScheduleConfig(policy="fix_step", epochs=12, fix_step=5, decay=0.5),
    "decay": ScheduleConfig(policy="decay", epochs=12, decay=0.9),
    "fix": ScheduleConfig(policy="fix", epochs=12),
    "poly": ScheduleConfig(policy="poly", epochs=12, custom_step=(3, 8), decay=2.0, eta_min=0.02),
    "sgdr": ScheduleConfig(policy="sgdr", epochs=12, custom_step=(3, 8), eta_min=0.02),
    "sgdr_step": ScheduleConfig(policy="sgdr_step", epochs=12, custom_step=(3, 8), decay=0.5, eta_min=0.02),
    "cos": ScheduleConfig(policy="cos", epochs=12, eta_min=0.02),
}


def half(angle: float) -> float:
    """(1 + cos) / 2, of an angle in units of pi."""
    return 0.5 + 0.5 * math.cos(math.pi * angle)


def test_every_policy_is_tested() -> None:
    assert tuple(CONFIGS) == POLICIES


@pytest.mark.parametrize(
    ("policy", "step", "expected"),
    [
        ("custom_step", 0, 0.4),
        ("custom_step", 11, 0.4),
        ("custom_step", 12, 0.04),
        ("custom_step", 31, 0.04),
        ("custom_step", 32, 0.004),
        ("custom_step", 47, 0.004),
        ("fix_step", 19, 0.4),
        ("fix_step", 20, 0.2),
        ("fix_step", 39, 0.2),
        ("fix_step", 40, 0.1),
        ("decay", 3, 0.4),
        ("decay", 4, 0.36),
        ("decay", 8, 0.324),
        ("decay", 47, 0.4 * 0.9**11),
        ("fix", 0, 0.4),
        ("fix", 47, 0.4),
        ("poly", 0, 0.4),
        ("poly", 6, 0.02 + 0.38 * 0.25),  # half of the 12 steps of the first interval
        ("poly", 11, 0.02 + 0.38 / 144),
        ("poly", 12, 0.4),
        ("poly", 17, 0.02 + 0.38 * 0.5625),  # a quarter of the 20 steps of the second
        ("poly", 40, 0.02 + 0.38 * 0.25),  # half of the 16 steps of the third
        ("sgdr", 0, 0.4),
        ("sgdr", 4, 0.02 + 0.38 * 0.75),  # cos(pi/3) = 1/2
        ("sgdr", 6, 0.02 + 0.38 * 0.5),
        ("sgdr", 8, 0.02 + 0.38 * 0.25),
        ("sgdr", 11, 0.02 + 0.38 * half(11 / 12)),
        ("sgdr", 12, 0.4),
        ("sgdr", 22, 0.21),
        ("sgdr", 32, 0.4),
        ("sgdr", 47, 0.02 + 0.38 * half(15 / 16)),
        ("sgdr_step", 0, 0.4),
        ("sgdr_step", 6, 0.21),
        ("sgdr_step", 12, 0.2),
        ("sgdr_step", 22, 0.11),
        ("sgdr_step", 32, 0.1),
        ("sgdr_step", 40, 0.06),
        ("cos", 0, 0.4),
        ("cos", 3, 0.4),
        ("cos", 16, 0.02 + 0.38 * 0.75),
        ("cos", 24, 0.21),
        ("cos", 27, 0.21),
        ("cos", 47, 0.02 + 0.38 * half(11 / 12)),
    ],
)
def test_values(policy: str, step: int, expected: float) -> None:
    assert learning_rate(CONFIGS[policy], 0.4, step, SPE) == pytest.approx(expected, rel=1e-12)


def torch_curve(policy: str) -> list[float]:
    """The rates of every step of CONFIGS[policy] by torch's own schedulers: the independent table."""
    config, lr = CONFIGS[policy], 0.4
    borders = (0, *config.custom_step, 12)

    def curve(
        make: Callable[[Optimizer], LRScheduler], steps: int, repeat: int, peak: float = lr
    ) -> list[float]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=peak)
        scheduler, rates = make(optimizer), []
        for _ in range(steps):
            rates += [optimizer.param_groups[0]["lr"]] * repeat
            optimizer.step()
            scheduler.step()
        return rates

    def intervals(make: Callable[[Optimizer, int], LRScheduler], fall: float = 1.0) -> list[float]:
        """Each interval of its own, a step at a time, between eta_min and its peak."""
        rates: list[float] = []
        for number, (begin, end) in enumerate(itertools.pairwise(borders)):
            steps = (end - begin) * SPE
            rates += curve(lambda o, steps=steps: make(o, steps), steps, 1, lr * fall**number)
        return rates

    match policy:
        case "custom_step":
            return curve(lambda o: MultiStepLR(o, list(config.custom_step), config.decay), 12, SPE)
        case "fix_step":
            return curve(lambda o: StepLR(o, config.fix_step, config.decay), 12, SPE)
        case "decay":
            return curve(lambda o: ExponentialLR(o, config.decay), 12, SPE)
        case "fix":
            return curve(lambda o: ConstantLR(o, 1.0), 12, SPE)
        case "cos":
            return curve(lambda o: CosineAnnealingLR(o, 12, config.eta_min), 12, SPE)
        case "sgdr" | "sgdr_step":
            fall = config.decay if policy == "sgdr_step" else 1.0
            return intervals(lambda o, steps: CosineAnnealingLR(o, steps, config.eta_min), fall)
        case "poly":  # torch's ends at zero: mixed with eta_min
            above = intervals(lambda o, steps: PolynomialLR(o, steps, config.decay))
            return [config.eta_min + rate * (lr - config.eta_min) / lr for rate in above]
        case unknown:
            raise ValueError(f"{unknown}: say here what torch's scheduler of it is")


@pytest.mark.parametrize("policy", POLICIES)
def test_whole_runs_are_those_of_torch(policy: str) -> None:
    """Every step of 12 epochs; restarts are at exactly the peak."""
    expected = torch_curve(policy)
    assert len(expected) == 12 * SPE
    found = [learning_rate(CONFIGS[policy], 0.4, step, SPE) for step in range(12 * SPE)]
    assert found == pytest.approx(expected, rel=1e-9)


def test_cos_equals_torch() -> None:
    """The scheduler of torch, stepped once per epoch, is the independent answer for a whole run."""
    config = ScheduleConfig(policy="cos", epochs=9, eta_min=0.01)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=9, eta_min=0.01)
    for epoch in range(9):
        assert learning_rate(config, 0.3, epoch * SPE, SPE) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("lr", [0.1, 0.3, 0.7, 1.1])
@pytest.mark.parametrize("eta_min", [0.0, 1e-5, 0.03, 0.09])
@pytest.mark.parametrize("policy", ["sgdr", "poly"])
def test_restarts_return_exactly_to_the_peak(policy: str, lr: float, eta_min: float) -> None:
    config = ScheduleConfig(policy=policy, epochs=20, custom_step=(3, 7, 13), eta_min=eta_min, decay=0.9)
    for epoch in (0, 3, 7, 13):
        assert learning_rate(config, lr, epoch * SPE, SPE) == lr
        assert learning_rate(config, lr, epoch * SPE + 1, SPE) < lr


def test_sgdr_falls_within_each_interval() -> None:
    rates = [learning_rate(CONFIGS["sgdr"], 0.4, step, SPE) for step in range(48)]
    rises = [step for step in range(1, 48) if rates[step] > rates[step - 1]]
    assert rises == [12, 32]
    assert min(rates) > 0.02


def test_sgdr_step_never_falls_below_eta_min() -> None:
    config = ScheduleConfig(policy="sgdr_step", epochs=9, custom_step=(3, 6), decay=0.01, eta_min=0.02)
    rates = [learning_rate(config, 0.4, step, SPE) for step in range(36)]
    assert rates[12:] == pytest.approx([0.02] * 24)  # both later peaks would be lower than eta_min


def test_an_entry_at_the_end_changes_nothing() -> None:
    for policy in ("custom_step", "poly", "sgdr", "sgdr_step"):
        config = ScheduleConfig(policy=policy, epochs=6, custom_step=(2,), extra_epoch=2)
        ending = ScheduleConfig(policy=policy, epochs=6, custom_step=(2, 6), extra_epoch=2)
        check_schedule(ending, 0.1)
        for step in range(8 * SPE):
            assert learning_rate(ending, 0.1, step, SPE) == learning_rate(config, 0.1, step, SPE)


@pytest.mark.parametrize("policy", POLICIES)
def test_order_of_calls_does_not_matter(policy: str) -> None:
    schedule = Schedule(CONFIGS[policy], 0.4, SPE)
    forward = [schedule.at(step) for step in range(schedule.total_steps)]
    shuffled = list(range(schedule.total_steps))
    random.Random(0).shuffle(shuffled)
    assert {step: schedule.at(step) for step in shuffled} == dict(enumerate(forward))


@pytest.mark.parametrize("policy", POLICIES)
def test_extra_epochs_keep_the_last_rate(policy: str) -> None:
    schedule = Schedule(replace(CONFIGS[policy], extra_epoch=3), 0.4, SPE)
    last = learning_rate(CONFIGS[policy], 0.4, 47, SPE)
    assert schedule.total_steps == 60
    assert [schedule.at(step) for step in range(47, 60)] == [last] * 13


@pytest.mark.parametrize(
    ("wakeup", "wakeup_epoch", "steps"),
    [(5, 0, 5), (0, 2, 8), (5, 2, 8), (9, 2, 9), (1, 0, 1)],
)
@pytest.mark.parametrize("policy", POLICIES)
def test_wakeup_is_a_line_from_zero(policy: str, wakeup: int, wakeup_epoch: int, steps: int) -> None:
    config = replace(CONFIGS[policy], wakeup=wakeup, wakeup_epoch=wakeup_epoch)
    for step in range(20):
        expected = learning_rate(CONFIGS[policy], 0.4, step, SPE) * min((step + 1) / steps, 1)
        assert learning_rate(config, 0.4, step, SPE) == pytest.approx(expected, rel=1e-12)
    assert learning_rate(config, 0.4, steps, SPE) == learning_rate(CONFIGS[policy], 0.4, steps, SPE)


@pytest.mark.parametrize(
    ("warmup", "warmup_epoch", "skipped"), [(0, 0, 0), (3, 0, 3), (0, 2, 8), (9, 2, 9), (3, 2, 8)]
)
def test_warmup_takes_no_step(warmup: int, warmup_epoch: int, skipped: int) -> None:
    schedule = Schedule(ScheduleConfig(warmup=warmup, warmup_epoch=warmup_epoch), 0.1, SPE)
    assert [schedule.skip_update(step) for step in range(40)] == [True] * skipped + [False] * (40 - skipped)


def test_no_rate_is_that_of_a_step_that_is_not_taken() -> None:
    """Each epoch has the rate of its first step that is taken."""
    config = ScheduleConfig(policy="decay", epochs=4, decay=0.5, wakeup=2 * SPE, warmup=SPE + 1)
    schedule = Schedule(config, 0.8, SPE)
    assert [math.isnan(schedule.taken(step)) for step in range(3 * SPE)] == [True] * (SPE + 1) + [False] * (
        2 * SPE - 1
    )
    assert [schedule.first_taken(epoch) for epoch in (1, 2, 3)] == [
        schedule.at(s) for s in (SPE + 1, 2 * SPE, 3 * SPE)
    ]
    assert math.isnan(schedule.first_taken(0))
    assert [epoch for epoch, _ in schedule.changes()] == [1, 2, 3]


def test_changes() -> None:
    steps = Schedule(ScheduleConfig(epochs=12, custom_step=(3, 8), extra_epoch=2), 0.4, SPE).changes()
    assert [epoch for epoch, _ in steps] == [0, 3, 8]
    assert [rate for _, rate in steps] == pytest.approx([0.4, 0.04, 0.004])
    assert Schedule(ScheduleConfig(policy="fix", epochs=5), 0.2, SPE).changes() == [(0, 0.2)]
    assert [epoch for epoch, _ in Schedule(CONFIGS["sgdr"], 0.4, SPE).changes()] == list(range(12))
    assert Schedule(ScheduleConfig(epochs=0), 0.2, SPE).changes() == []
    woken = Schedule(ScheduleConfig(policy="fix", epochs=5, wakeup=2 * SPE), 0.8, SPE).changes()
    assert woken == [(0, pytest.approx(0.1)), (1, pytest.approx(0.5)), (2, 0.8)]


@pytest.mark.parametrize("policy", POLICIES)
def test_apply_keeps_the_ratio_of_custom_rates(policy: str) -> None:
    schedule = Schedule(replace(CONFIGS[policy], wakeup=3, extra_epoch=1), 0.4, SPE)
    base = [0.4, 0.004, 1.2]
    optimizer = torch.optim.SGD(
        [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr, "base_lr": lr} for lr in base], lr=0.4
    )
    for step in range(schedule.total_steps):
        schedule.apply(optimizer, step)
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates[0] == schedule.at(step)
        assert rates[1] / rates[0] == pytest.approx(0.01)
        assert rates[2] / rates[0] == pytest.approx(3.0)
        assert [group["base_lr"] for group in optimizer.param_groups] == base


@pytest.mark.parametrize("policy", POLICIES)
def test_a_rate_of_zero(policy: str) -> None:
    schedule = Schedule(replace(CONFIGS[policy], eta_min=0.0), 0.0, SPE)
    one = Schedule(replace(CONFIGS[policy], eta_min=0.0), 1.0, SPE)
    for step in range(schedule.total_steps):
        assert schedule.at(step) == 0.0
        assert schedule.factor(step) == one.at(step)


@pytest.mark.parametrize("policy", POLICIES)
def test_no_epochs(policy: str) -> None:
    config = ScheduleConfig(policy=policy, epochs=0, extra_epoch=1)
    check_schedule(config, 0.1)
    assert learning_rate(config, 0.1, 2, SPE) == 0.1


def test_an_epoch_without_steps_is_refused() -> None:
    with pytest.raises(UserError, match="--batch_size"):
        Schedule(ScheduleConfig(), 0.1, 0)


def test_checking_does_not_load_torch() -> None:
    """Options are checked, and wrong ones refused, before anything slow is imported."""
    code = "import sys, utils.step.schedule; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("policy", POLICIES)
def test_check_accepts(policy: str) -> None:
    check_schedule(CONFIGS[policy], 0.4)
    check_schedule(ScheduleConfig(policy=policy), 0.1)


def test_check_passes_over_what_the_policy_does_not_read() -> None:
    check_schedule(ScheduleConfig(policy="cos", epochs=5, custom_step=(30, 10), decay=9.0, fix_step=0), 0.1)
    check_schedule(ScheduleConfig(policy="fix", eta_min=0.5), 0.1)


@pytest.mark.parametrize(
    ("config", "lr", "message"),
    [
        (ScheduleConfig(policy="sgrd"), 0.1, "--lr_policy sgrd .* did you mean sgdr?"),
        (ScheduleConfig(policy="custom-step"), 0.1, "did you mean custom_step?"),
        (ScheduleConfig(policy="?"), 0.1, "use one of custom_step, .*, cos"),
        (ScheduleConfig(epochs=-1), 0.1, "--epochs -1"),
        (ScheduleConfig(extra_epoch=-1), 0.1, "--extra_epoch -1"),
        (ScheduleConfig(wakeup=-1), 0.1, "--wakeup -1"),
        (ScheduleConfig(wakeup_epoch=-2), 0.1, "--wakeup_epoch -2"),
        (ScheduleConfig(warmup=-1), 0.1, "--warmup -1"),
        (ScheduleConfig(warmup_epoch=-1), 0.1, "--warmup_epoch -1"),
        (ScheduleConfig(), -0.1, "--lr -0.1"),
        (ScheduleConfig(), math.nan, "--lr nan"),
        (ScheduleConfig(), math.inf, "--lr inf"),
        (ScheduleConfig(policy="cos", eta_min=-1e-3), 0.1, "--eta_min -0.001"),
        (ScheduleConfig(policy="cos", eta_min=0.2), 0.1, "--eta_min 0.2 is above --lr 0.1"),
        (ScheduleConfig(policy="poly", eta_min=0.2), 0.1, "--eta_min 0.2 is above --lr 0.1"),
        (ScheduleConfig(custom_step=(3, 11)), 0.1, "--lr_custom_step 3,11: 11 is beyond --epochs 10"),
        (ScheduleConfig(policy="sgdr", custom_step=(11,)), 0.1, "11 is beyond --epochs 10"),
        (ScheduleConfig(custom_step=(5, 3)), 0.1, "--lr_custom_step 5,3: 3 follows 5"),
        (ScheduleConfig(policy="poly", custom_step=(3, 3)), 0.1, "3 follows 3"),
        (ScheduleConfig(policy="sgdr_step", custom_step=(0, 3)), 0.1, "--lr_custom_step 0,3: 0 must"),
        (ScheduleConfig(custom_step=(-2,)), 0.1, "-2 must be at least 1"),
        (ScheduleConfig(policy="fix_step", fix_step=0), 0.1, "--lr_fix_step 0"),
        (ScheduleConfig(decay=0.0), 0.1, "--lr_decay 0.0"),
        (ScheduleConfig(policy="decay", decay=10.0), 0.1, "--lr_decay 10.0 must be above 0 and at most 1"),
        (ScheduleConfig(policy="poly", decay=-1.0), 0.1, "--lr_decay -1.0 must be positive"),
    ],
)
def test_check_refuses(config: ScheduleConfig, lr: float, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_schedule(config, lr)
