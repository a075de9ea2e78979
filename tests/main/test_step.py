"""The arithmetic of a step against NumPy, and what the loop costs."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import main
from model.networks import build
from model.training import finite, policy, training_methods, validation
from model.training.training_state import TrainingState
from tests.main.runs import LSQ
from utils.checkpoint import run_state
from utils.config.resolve import read as read_config
from utils.config.schema import Config
from utils.data import sources, tensor_loader
from utils.processes.interrupt import Stop
from utils.step import precision, schedule
from utils.step.optimizer import build_optimizer

# The arithmetic of a step ------------------------------------------------------------------------


class Linear(nn.Module):
    """A linear classifier: no batch statistics, so that batches can be split."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(3 * 8 * 8, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits."""
        return self.fc(x.flatten(1))


def epoch_of(line: str) -> tuple[Linear, dict[str, float], Config]:
    """Train a linear classifier for one epoch by the program's own loop."""
    config = read_config(
        f"--dataset fake --num_classes 10 --input_size 8 --lr_policy fix -v 0 {line}".split()
    )
    model = Linear()
    loader = sources.open_data(config.data).train
    optimizer, groups = build_optimizer(model, config.optim)
    rates = schedule.Schedule(
        config.schedule, config.optim.lr, math.ceil(len(loader) / config.optim.iter_size)
    )
    parts = TrainingState(
        model, model, model, optimizer, precision.Precision(model, optimizer, config.precision, torch.device("cpu")),
        policy.PolicyScheduler((), model, optimizer, groups, config.optim, rates),
        training_methods.build_training_methods(config, model, None, rates.total_steps),
        torch.device("cpu"), torch.channels_last, config, logging.getLogger("nobody listens"),
    )  # fmt: skip
    start = run_state.RunState()
    reached, stopped = main.train_one_epoch(
        parts, loader, start, Stop(), lambda _: pytest.fail("not asked to save")
    )
    assert not stopped and reached.position == len(loader) * config.data.batch_size
    return model, validation.train_row(parts, reached), config


@pytest.mark.parametrize("line", ["--mixup_enable", "--cutmix_enable", "--aa", "--rand_augment 9"])
def test_augmentation_reaches_training(line: str) -> None:
    """The network sees other images, mixed ones with shares of classes; how often it waits is measured."""
    plain, _, _ = epoch_of("--fake_size 32 -b 8")
    augmented, row, config = epoch_of(f"--fake_size 32 -b 8 {line}")
    assert not torch.equal(plain.fc.weight, augmented.fc.weight)
    assert math.isfinite(row["train_loss"])
    assert 0 < row["data_wait"] < 100
    shapes = {target.shape for _, target in sources.open_data(config.data).train}
    assert shapes == {torch.Size([8, 10] if "enable" in line else [8])}


def batches_of(config: Config) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The first epoch's images [n, 192] and one-hot classes [n, 10] in float64."""
    for images, target in sources.open_data(config.data).train:
        yield images.flatten(1).double().numpy(), np.eye(10)[target.numpy()]


def softmax_gradient(
    weight: np.ndarray, bias: np.ndarray, x: np.ndarray, t: np.ndarray
) -> tuple[float, np.ndarray, np.ndarray]:
    """Mean cross-entropy of a batch against targets [n, 10] and its gradient, in NumPy."""
    logits = x @ weight.T + bias
    logits -= logits.max(axis=1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    error = (np.exp(log_p) - t) / len(x)
    return float(-(t * log_p).sum(axis=1).mean()), error.T @ x, error.sum(axis=0)


def test_iter_size_is_a_larger_batch() -> None:
    """Four passes of 8 images make the step of one pass of 32."""
    split, row, _ = epoch_of("--fake_size 128 -b 8 --iter_size 4 --momentum 0.9 --wd 1e-2 --lr 0.05")
    whole, expected, _ = epoch_of("--fake_size 128 -b 32 --momentum 0.9 --wd 1e-2 --lr 0.05")
    assert torch.allclose(split.fc.weight, whole.fc.weight, rtol=0, atol=1e-6)
    assert torch.allclose(split.fc.bias, whole.fc.bias, rtol=0, atol=1e-6)
    assert row["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("line", "groups"),
    [
        ("--fake_size 40 -b 8 --iter_size 2", [2, 2, 1]),  # the last group of the epoch is shorter
        ("--fake_size 24 -b 8 --iter_size 8", [3]),
        ("--fake_size 32 -b 8 --grad_clip 0.01", [1, 1, 1, 1]),
        ("--fake_size 32 -b 8 --iter_size 2 --grad_clip 0.01", [2, 2]),
        ("--fake_size 32 -b 8 --keyword label-smooth", [1, 1, 1, 1]),
        ("--fake_size 32 -b 8 --label_smooth 0.3", [1, 1, 1, 1]),
        ("--fake_size 32 -b 8 --warmup 2", [1, 1, 1, 1]),
        ("--fake_size 32 -b 8 --wakeup 8", [1, 1, 1, 1]),
    ],
)
def test_steps_are_those_of_numpy(line: str, groups: list[int]) -> None:
    """Mean gradients of groups, clipped to the norm, labels smoothed, skipped steps and the rising rate."""
    line = f"{line} --momentum 0 --wd 0 --lr 0.1"
    # `fake` without a data set's keyword takes any other word.
    model, row, config = epoch_of(line)
    start = Linear()
    weight, bias = (p.detach().double().numpy().copy() for p in (start.fc.weight, start.fc.bias))
    smooth, clip, sched = config.loss.label_smooth, config.optim.grad_clip, config.schedule
    assert smooth == (0.1 if "label-smooth" in line else 0.3 if "label_smooth" in line else 0)
    batches = batches_of(config)
    losses = []
    for step, count in enumerate(groups):
        gradients = []
        for _ in range(count):
            x, t = next(batches)
            loss, *gradient = softmax_gradient(weight, bias, x, (1 - smooth) * t + smooth / 10)
            losses.append(loss)
            gradients.append(gradient)
        g_weight, g_bias = (np.mean(part, axis=0) for part in zip(*gradients, strict=True))
        norm = math.sqrt((g_weight**2).sum() + (g_bias**2).sum())
        factor = 1.0 if clip is None or norm <= clip else clip / norm
        rate = 0.1 * min(1.0, (step + 1) / sched.wakeup if sched.wakeup else 1.0)
        if step >= sched.warmup:
            weight, bias = weight - rate * factor * g_weight, bias - rate * factor * g_bias
    assert next(batches, None) is None
    np.testing.assert_allclose(model.fc.weight.detach().numpy(), weight, rtol=0, atol=1e-6)
    np.testing.assert_allclose(model.fc.bias.detach().numpy(), bias, rtol=0, atol=1e-6)
    assert row["train_loss"] == pytest.approx(np.mean(losses), rel=1e-5)


# What the loop costs ------------------------------------------------------------------------------


class Reads(TorchDispatchMode):
    """Counts the calls that bring a number to the host, for which a GPU would be waited for."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count and go on."""
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device_between_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports, and on the CPU the checks that cost nothing there, read numbers; nothing else does."""
    reads: list[int] = []
    mode = Reads()

    class Loader(tensor_loader.TensorLoader):
        def _read(self, batches: Any, epoch: int) -> Any:
            for batch in super()._read(batches, epoch):
                reads.append(mode.count)
                yield batch

    config = read_config(f"{LSQ} --lr 0.1 --iter_size 2 --grad_clip 1 --fake_size 96 --report_freq 6".split())
    cpu = torch.device("cpu")
    model = build.build_network(config.model)
    optimizer, groups = build_optimizer(model, config.optim)
    rates = schedule.Schedule(config.schedule, 0.1, 6)
    parts = TrainingState(
        model, model, model, optimizer, precision.Precision(model, optimizer, config.precision, cpu),
        policy.PolicyScheduler((), model, optimizer, groups, config.optim, rates),
        training_methods.build_training_methods(config, model, None, rates.total_steps), cpu,
        torch.channels_last, config,
        logging.getLogger("nobody"),
    )  # fmt: skip
    for name in ("check_loss", "check_gradients"):
        monkeypatch.setattr(finite, name, lambda *_: None)
    to_list = Tensor.tolist  # which reads by itself

    def counted(tensor: Tensor) -> Any:
        mode.count += 1
        return to_list(tensor)

    monkeypatch.setattr(Tensor, "tolist", counted)
    loader = sources.open_data(config.data).train
    loader.__class__ = Loader
    main.train_one_epoch(
        parts, loader, run_state.RunState(), Stop(), lambda _: None
    )  # the optimizer makes its state
    reads.clear()
    with mode:
        main.train_one_epoch(parts, loader, run_state.RunState(epoch=1), Stop(), lambda _: None)
    of_data = reads[1] - reads[0]  # computing the images reads their numbers
    waits = [after - before - of_data for before, after in itertools.pairwise(reads)]
    assert [wait > 0 for wait in waits] == [number == 5 for number in range(11)], waits
