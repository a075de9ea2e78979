"""Measures what quantization-aware training costs: time and memory beside full precision, and beside another checkout.

    python benchmarks/speed.py
    python benchmarks/speed.py --against ../before
    python benchmarks/speed.py --network resnet18 --batch 4 --methods LSQ PACT --parts step
    python benchmarks/speed.py --how kernels --parts step

Parts: `quantizers`, forward and backward of a quantizer alone, beside a ReLU of the same tensor; `step`, a whole SGD
step; `evaluation`, a forward pass of the network; `saved`, the bytes that a step keeps for its backward pass; `peak`,
the most memory that the process takes in a step beyond what it has before it (Linux). All but the first are beside the
same network in full precision. The quantizers of torch, and of Brevitas and torchao where they are installed
(`requirement-peers.txt`), take the places of ours in the same network: at 2 bits and more, in networks of convolutions.

`--recompute` measures each method also with quantized inputs computed again in the backward pass.

`--how kernels` lets `torch.compile` make the quantizers' kernels (main.py's `--kernels compiled`), `--how network`
compiles whole networks, the one in full precision too (`--compile default`). The first call, which compiles, has a
column of its own.

Everything takes turns: a round runs each once, in changing order, and a ratio is of two times of one round. Times are
those of the processor, in one thread, which other work on the machine disturbs least. Printed are the median and the
quartiles of the ratios. Each checkout works in a process of its own, which runs what it is asked for.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FULL = "full precision"
METHODS = {
    "LSQ": "dorefa,lsq",
    "LSQ mid-tread": "dorefa,lsq --wt_grid midtread --wt_grad_scale paper",
    "PACT": "pact",
    "DoReFa": "dorefa",
    "LQ-Nets": "lq",
    "FATNN": "dorefa,non-uniform --fm_level 3 --wt_level 3",
    "XNOR": "xnor --fm_bit 1 --wt_bit 1 --fm_grad_type STE",
    "XNOR++, Triangle": "xnor,gamma --fm_bit 1 --wt_bit 1 --fm_grad_type Triangle",
}
NETWORKS = {  # options, image size, classes
    "resnet20": ("--model resnet20 --width_alpha 0.25 --keyword cifar10,origin,cbsa", 32, 10),
    "resnet18": ("--model resnet18 --keyword imagenet,origin,cbsa", 224, 1000),
    "mobilenet_v3_small": ("--model torchvision:mobilenet_v3_small --keyword imagenet", 224, 1000),
    "resnet50": ("--model resnet50 --keyword imagenet,origin,cbsa", 224, 1000),
}
PARTS = {"quantizers": "a ReLU", "step": FULL, "evaluation": FULL, "saved": FULL, "peak": FULL}
BYTES = {"saved", "peak"}
AGAIN = ", recomputed"
CHANGES = {"LQ-Nets"}  # with each pass, so that nothing can be computed again
Work = Callable[[], object]


@dataclass(frozen=True)
class Setup:
    """What is measured: a network of `NETWORKS`, images in a batch, the default number of bits, what is compiled."""

    network: str
    batch: int
    bits: int
    how: str = "eager"


@contextmanager
def saved_bytes(without: set[int]) -> Iterator[Callable[[], int]]:
    """Counts the bytes of the storages that autograd saves inside; each once, and none at an address of `without`."""
    from torch.autograd.graph import saved_tensors_hooks

    found: dict[int, int] = {}

    def pack(value: Any) -> Any:
        storage = value.untyped_storage()
        if storage.data_ptr() not in without:
            found[storage.data_ptr()] = storage.nbytes()
        return value

    with saved_tensors_hooks(pack, lambda value: value):
        yield lambda: sum(found.values())


def memory(name: str) -> int:
    """Bytes of this process in memory: `VmRSS`, now; `VmHWM`, the most since it was reset."""
    line = re.search(rf"^{name}:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert line is not None
    return int(line[1]) * 1024


class Bench:
    """The work of one checkout by names: a part and a row."""

    def __init__(self, setup: Setup) -> None:
        import torch

        with suppress(ImportError):  # a checkout from before main.py did so
            from utils.processes.memory import keep_freed_memory

            keep_freed_memory()
        torch.set_num_threads(1)
        self.setup, self.made = setup, dict[str, dict[str, Work]]()
        _, size, classes = NETWORKS[setup.network]
        self.images = torch.randn(setup.batch, 3, size, size, generator=torch.Generator().manual_seed(0))
        self.target = torch.randint(classes, (setup.batch,), generator=torch.Generator().manual_seed(0))

    def network(self, row: str) -> Any:
        """The network of a row of `METHODS`, or in full precision."""
        import torch

        from model.networks import build
        from utils.config.resolve import read

        line = NETWORKS[self.setup.network][0]
        if row != FULL:
            words, _, options = METHODS[row.removesuffix(AGAIN)].partition(" ")
            bits = "" if "bit" in options else f"--fm_bit {self.setup.bits} --wt_bit {self.setup.bits}"
            line += f",{words} --fm_enable --wt_enable {bits} {options}"
        torch.manual_seed(0)
        model = build.build_network(read(line.split()).model)
        if row.endswith(AGAIN):
            from model.training.recompute import recompute_inputs

            recompute_inputs(model)
        return model

    def works(self, row: str) -> dict[str, Work]:
        """What can be measured of a row, by the names of parts."""
        if row in self.made:
            return self.made[row]
        import peers  # beside this file, which tests import from elsewhere
        import torch
        from torch.nn import functional

        if row in peers.PEERS:
            model = self.network("LSQ")
            theirs = peers.swapped(model, row, self.setup.bits)
        else:
            model, theirs = self.compiled(self.network(row)), None
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
        parameters = {value.untyped_storage().data_ptr() for value in (*model.parameters(), self.images)}

        def step() -> None:
            optimizer.zero_grad()
            functional.cross_entropy(model.train()(self.images), self.target).backward()
            optimizer.step()

        def evaluation() -> None:
            with torch.no_grad():
                model.eval()(self.images)

        def saved() -> int:
            with saved_bytes(parameters) as count:
                loss = functional.cross_entropy(model.train()(self.images), self.target)
            loss.backward()
            return count()

        def peak() -> int:
            optimizer.zero_grad()
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)  # what was freed before is no part of it
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
            before = memory("VmRSS")
            step()
            return memory("VmHWM") - before

        found: dict[str, Work] = {"step": step, "evaluation": evaluation, "saved": saved, "peak": peak}
        for tag, part in (("fm", "activation"), ("wt", "weight")):
            quantizer = torch.nn.ReLU()
            if theirs is not None:
                quantizer = theirs
            elif row != FULL:
                from model.quant import quantized_layers

                quantizer = getattr(next(quantized_layers(model))[1], f"quant_{part}")
            found[f"quantizers, {tag}"] = self.alone(quantizer, self.hidden(tag))
        self.made[row] = found
        return found

    def compiled(self, model: Any) -> Any:
        """The network, compiled as was asked."""
        if self.setup.how == "eager":
            return model
        from model.quant import quantizers
        from utils.step import compiled

        if self.setup.how == "network":
            return compiled.compiled(model, "default")
        compiled.allow_many_graphs()
        for _, quantizer in quantizers(model):
            quantizer.generated = True
        return model

    def hidden(self, tag: str) -> Any:
        """A tensor of the shape that the first quantized layer quantizes."""
        import torch

        channels = {"resnet20": 16, "mobilenet_v3_small": 16}.get(self.setup.network, 64)
        side = self.images.shape[2] // (1 if self.setup.network == "resnet20" else 4)
        kernel = 1 if self.setup.network == "resnet50" else 3
        shape = (
            (self.setup.batch, channels, side, side) if tag == "fm" else (channels, channels, kernel, kernel)
        )
        return torch.randn(shape, generator=torch.Generator().manual_seed(0))

    @staticmethod
    def alone(quantizer: Any, x: Any) -> Work:
        """Forward and backward of a quantizer."""
        import torch

        x, arriving = x.clone().requires_grad_(), torch.randn_like(x)
        repeats = max(200_000 // x.numel(), 1)  # short ones several times

        def work() -> None:
            for _ in range(repeats):
                x.grad = None
                quantizer(x).backward(arriving)

        return work


def serve(folder: str, setup: Setup, pipe: Connection) -> None:
    """Answer pairs of a part and a row with the processor's seconds, or with a number of bytes; None ends it."""
    sys.path.insert(0, folder)
    bench = Bench(setup)
    while (asked := pipe.recv()) is not None:
        part, row = asked
        work = bench.works(row)[part]
        started = time.process_time()
        found = work()
        pipe.send(found if part in BYTES else time.process_time() - started)


class Checkout:
    """A process that measures one checkout."""

    def __init__(self, folder: Path, setup: Setup) -> None:
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(str(folder), setup, theirs), daemon=True)
        self.process.start()
        theirs.close()  # so that the end of the process is noticed

    def measure(self, part: str, row: str) -> float:
        """Run one; see `serve`."""
        self.pipe.send((part, row))
        return self.pipe.recv()

    def close(self) -> None:
        """End the process."""
        self.pipe.send(None)
        self.process.join()


def spread(ratios: list[float]) -> str:
    """The median and the quartiles."""
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def measure(
    checkouts: dict[str, Checkout], part: str, rows: list[str], rounds: int, *, compiles: bool
) -> Iterator[str]:
    """The lines of a part's table; where something `compiles`, with the first call."""
    jobs = [(name, row) for row in rows for name in checkouts]
    first = {job: checkouts[job[0]].measure(part, job[1]) for job in jobs}  # to compile, and to warm caches
    if part == "saved":
        rounds = 1
    times: dict[tuple[str, str], list[float]] = {job: [] for job in jobs}
    for number in range(rounds):
        turn = number * 7 % len(jobs)
        for name, row in (jobs[turn:] + jobs[:turn])[:: 1 if number % 2 else -1]:
            times[name, row].append(checkouts[name].measure(part, row))
    unit, scale = ("MB", 1e-6) if part in BYTES else ("ms", 1e3)
    base = PARTS[part.partition(",")[0]]
    columns = [f"{name}, {unit} | {name} / {base}" + f" | first, {unit}" * compiles for name in checkouts]
    ours, *others = checkouts
    columns += [f"{other} / {ours}" for other in others]
    yield f"| {part} | {' | '.join(columns)} |"
    yield "|---" * (1 + (2 + compiles) * len(checkouts) + len(others)) + "|"
    for row in rows:
        cells = []
        for name in checkouts:
            ratios = [a / b for a, b in zip(times[name, row], times[name, FULL], strict=True)]
            cells += [f"{statistics.median(times[name, row]) * scale:.2f}", spread(ratios)]
            cells += [f"{first[name, row] * scale:.0f}"] * compiles
        for other in others:
            cells.append(spread([a / b for a, b in zip(times[other, row], times[ours, row], strict=True)]))
        yield f"| {base if row == FULL else row} | {' | '.join(cells)} |"


def main(argv: list[str] | None = None) -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", choices=NETWORKS, default="resnet20")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--bits", type=int, default=2, help="of the methods that take any number")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--how", choices=("eager", "kernels", "network"), default="eager")
    parser.add_argument(
        "--recompute", action="store_true", help="each method with quantized inputs recomputed, too"
    )
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="another checkout of the repository")
    options = parser.parse_args(argv)
    setup = Setup(options.network, options.batch, options.bits, options.how)
    folders = {"this": ROOT} | ({"other": options.against.resolve()} if options.against else {})
    import peers
    import torch

    commits = [f"{name} {commit(folder)}" for name, folder in folders.items()]
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}; {', '.join(commits)}")
    others = peers.installed() if options.how == "eager" else {}
    print(", ".join(f"{name}: {version}" for name, version in others.items()))
    checkouts = {name: Checkout(folder, setup) for name, folder in folders.items()}
    try:
        for part in options.parts:
            for table in ("quantizers, fm", "quantizers, wt") if part == "quantizers" else (part,):
                again = [m + AGAIN for m in options.methods if options.recompute and m not in CHANGES]
                again = [] if part in ("quantizers", "evaluation") else again
                rows = [FULL, *options.methods, *again, *(others if table != "quantizers, wt" else ())]
                print()
                for line in measure(checkouts, table, rows, options.rounds, compiles=options.how != "eager"):
                    print(line, flush=True)
    finally:
        for checkout in checkouts.values():
            checkout.close()
    return 0


def commit(folder: Path) -> str:
    """The commit of a checkout."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
