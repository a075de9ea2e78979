"""What the training loop costs beside the bare step: the program's epoch against a minimal loop.

    OMP_NUM_THREADS=1 python benchmarks/loop.py [--rounds 15] [--iterations 20] [options of main.py]

Both train copies of one network on the same batches with the same optimizer. They take turns, so that what
else the machine does falls on both; a round is an epoch of each. Printed are the medians of the rounds'
processor times per iteration, and the median and the quartiles of the rounds' ratios.
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import nn
from torch.nn import functional

import main
from model import build
from utils import data, methods, optim, policy, precision, schedule, state
from utils import resolve as configuration
from utils.interrupt import Stop
from utils.loader import Batch, Delivery, Loader, Raw
from utils.parts import Parts

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
    """The least that trains."""
    network.train()
    for images, target in batches:
        loss = functional.cross_entropy(network(images.to(memory_format=layout)), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


class Kept(Loader):
    """The same batches in every epoch, which cost nothing."""

    def __init__(self, batches: list[Batch]) -> None:
        size = len(batches[0][1])
        delivery = Delivery(
            batch_size=size, train=True, seed=0, mean=(0.0,) * 3, std=(1.0,) * 3, device=torch.device("cpu")
        )
        super().__init__(size * len(batches), delivery)
        self.kept = batches

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.kept)

    def _read(self, batches: Sequence[torch.Tensor], epoch: int) -> Iterator[Raw]:
        raise NotImplementedError  # they are finished already


def seconds(work: Callable[[], object]) -> float:
    """Processor time of this process in `work`."""
    began = time.process_time()
    work()
    return time.process_time() - began


def run(rounds: int, iterations: int, line: list[str]) -> None:
    """Take turns and print the result."""
    options = ["--fake_size", "0", *line]
    size = configuration.read(line).data.batch_size
    options[1] = str(iterations * size)
    settings = configuration.read(options)
    layout, cpu = torch.channels_last, torch.device("cpu")
    batches = list(data.build(settings.data, cpu).train)
    network = build.build(settings.model).to(memory_format=layout)  # pyright: ignore[reportCallIssue]
    bare = copy.deepcopy(network)
    bare_optimizer, _ = optim.build(bare, settings.optim)
    optimizer, groups = optim.build(network, settings.optim)
    rates = schedule.Schedule(settings.schedule, settings.optim.lr, len(batches))
    parts = Parts(
        network, network, optimizer, precision.build(network, optimizer, settings.precision, cpu),
        policy.Steering((), network, optimizer, groups, settings.optim, rates),
        methods.build(settings, network, None, rates.total_steps), cpu, layout, settings,
        logging.getLogger("nobody listens"),
    )  # fmt: skip
    loader = Kept(batches)

    def epoch() -> None:
        main.train_one_epoch(parts, loader, state.RunState(), Stop(), lambda _: None)

    def bare_epoch() -> None:
        minimal(bare, bare_optimizer, batches, layout)

    epoch()  # both once, to warm caches
    bare_epoch()
    times = []
    for number in range(rounds):
        if number % 2:
            ours, theirs = seconds(epoch), seconds(bare_epoch)
        else:
            theirs, ours = seconds(bare_epoch), seconds(epoch)
        times.append((ours / iterations, theirs / iterations))
    ratios = [100 * (ours / theirs - 1) for ours, theirs in times]
    low, middle, high = statistics.quantiles(ratios, n=4)
    ours, theirs = (1000 * statistics.median(column) for column in zip(*times, strict=True))
    print(f"minimal loop {theirs:.2f} ms, the program's {ours:.2f} ms per iteration ({' '.join(line)})")
    print(f"overhead: median {middle:+.2f} %, quartiles {low:+.2f} % and {high:+.2f} %, {rounds} rounds")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Compare the training loop with a minimal one.")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--iterations", type=int, default=20)
    known, rest = parser.parse_known_args()
    run(known.rounds, known.iterations, rest or list(DEFAULT.split()))
