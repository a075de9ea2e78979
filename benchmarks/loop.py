"""Measures the overhead of the training loop: the program's epoch against a minimal loop.

    OMP_NUM_THREADS=1 python benchmarks/loop.py [--rounds 40] [--iterations 10] [options of main.py]

Both train copies of one network on the same batches with the same optimizer. They take turns, so that
other load on the machine falls on both; a round is a short epoch of each, and the order alternates. Printed are the
medians of the rounds' times per iteration, of the processor and of the clock, and the median and the quartiles of
the rounds' differences and ratios. On a busy machine the processor's times are more reliable.
"""

from __future__ import annotations

import argparse
import copy
import logging
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import nn
from torch.nn import functional

import main
from model.networks import build
from model.training import policy, training_methods
from model.training.training_state import TrainingState
from utils.checkpoint import run_state
from utils.config import resolve
from utils.data import sources
from utils.data.loader import Batch, Delivery, Loader, Raw
from utils.processes.interrupt import Stop
from utils.step import precision, schedule
from utils.step.optimizer import build_optimizer

DEFAULT = (
    "--dataset fake --keyword cifar10,cbsa,origin,dorefa,lsq --width_alpha 0.25 -b 64 -v 0 "
    "--fm_enable --wt_enable --fm_bit 2 --wt_bit 2"
)


def minimal(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: list[Batch],
    layout: torch.memory_format,
) -> None:
    """A minimal training loop."""
    network.train()
    for images, target in batches:
        loss = functional.cross_entropy(network(images.to(memory_format=layout)), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


class Kept(Loader):
    """A loader with the same batches in every epoch, at no cost."""

    def __init__(self, batches: list[Batch]) -> None:
        size = len(batches[0][1])
        delivery = Delivery(
            batch_size=size, train=True, seed=0, mean=(0.0,) * 3, std=(1.0,) * 3, device=torch.device("cpu")
        )
        super().__init__(torch.cat([target for _, target in batches]), delivery)
        self.kept = batches

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.kept)

    def _read(self, batches: Sequence[torch.Tensor], epoch: int) -> Iterator[Raw]:
        raise NotImplementedError  # they are finished already


class Times(NamedTuple):
    """Seconds of this process's processor time and of the clock."""

    processor: float
    clock: float


def times_of(work: Callable[[], object]) -> Times:
    """The times that `work` takes."""
    processor, clock = time.process_time(), time.perf_counter()
    work()
    return Times(time.process_time() - processor, time.perf_counter() - clock)


def show(name: str, ours: Sequence[float], theirs: Sequence[float]) -> None:
    """Print the results of the rounds, from seconds per iteration of each loop."""
    differences = [1000 * (a - b) for a, b in zip(ours, theirs, strict=True)]
    ratios = [100 * (a / b - 1) for a, b in zip(ours, theirs, strict=True)]
    print(f"{name}: minimal loop {1000 * statistics.median(theirs):.2f} ms an iteration; the program's takes")
    for values, unit in ((differences, "ms"), (ratios, "%")):
        low, middle, high = statistics.quantiles(values, n=4)
        print(f"  {middle:+.2f} {unit} more (quartiles {low:+.2f} and {high:+.2f})")


def run(rounds: int, iterations: int, line: list[str]) -> None:
    """Take turns and print the result."""
    options = ["--fake_size", "0", *line]
    size = resolve.read(line).data.batch_size
    options[1] = str(iterations * size)
    settings = resolve.read(options)
    layout, cpu = torch.channels_last, torch.device("cpu")
    batches = list(sources.open_data(settings.data, cpu).train)
    network = build.build_network(settings.model).to(memory_format=layout)  # pyright: ignore[reportCallIssue]
    bare = copy.deepcopy(network)
    bare_optimizer, _ = build_optimizer(bare, settings.optim)
    optimizer, groups = build_optimizer(network, settings.optim)
    rates = schedule.Schedule(settings.schedule, settings.optim.lr, len(batches))
    training = TrainingState(
        network, network, network, optimizer, precision.Precision(network, optimizer, settings.precision, cpu),
        policy.PolicyScheduler((), network, optimizer, groups, settings.optim, rates),
        training_methods.build_training_methods(settings, network, None, rates.total_steps), cpu, layout, settings,
        logging.getLogger("nobody listens"),
    )  # fmt: skip
    loader = Kept(batches)

    def epoch() -> None:
        main.train_one_epoch(training, loader, run_state.RunState(), Stop(), lambda _: None)

    def bare_epoch() -> None:
        minimal(bare, bare_optimizer, batches, layout)

    epoch()  # both once, to warm caches
    bare_epoch()
    ours, theirs = list[Times](), list[Times]()
    for number in range(rounds):
        for measured, work in ((ours, epoch), (theirs, bare_epoch))[:: 1 if number % 2 else -1]:
            measured.append(times_of(work))
    print(f"{rounds} rounds of {iterations} iterations: {' '.join(line)}")
    for kind in Times._fields:
        show(kind, *([getattr(one, kind) / iterations for one in side] for side in (ours, theirs)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Compare the training loop with a minimal one.")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--iterations", type=int, default=10)
    known, rest = parser.parse_known_args()
    run(known.rounds, known.iterations, rest or list(DEFAULT.split()))
