"""Ends real trainings at random moments and checks that, resumed, they end as if nothing had happened.

    python tests/kill.py 200 [--seed 0]

Each training is a process of its own that writes checkpoints nearly all the time. It is ended at a random
moment by SIGKILL, SIGTERM or SIGINT or by a disk that becomes full, sometimes the newest checkpoint is then
damaged, and it is started again with -r until it is done. Weights, optimizer, random states, sums, best
checkpoint and metrics must then be, bit by bit, those of a training that nobody ended.

Processes are forked from this one, which has loaded everything, so that a start costs little.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import importlib
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["OMP_NUM_THREADS"] = "1"

import torch

import main
from utils import checkpoint, log
from utils.interrupt import SAVED

NETWORK = """
from torch import nn
from model import layer
from model.build import register_model

def tiny(config):
    return nn.Sequential(
        layer.conv(3, 8, 3, 2, config, full_precision=True), layer.norm(8, config), nn.ReLU(),
        layer.conv(8, 8, 3, 2, config), layer.norm(8, config), nn.ReLU(), nn.Dropout(0.2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), layer.linear(8, config.num_classes, config),
    )

register_model("tiny", tiny)
"""
COMMON = (
    "--model tiny --keyword_file network.py --dataset fake --keyword cifar10,dorefa,lsq --input_size 8 -b 8 -v 16 "
    "--fake_size 96 --epochs 4 --lr 0.05 --lr_policy sgdr --fm_enable --wt_enable --fm_bit 2 --wt_bit 2 --delay 0.01"
)
VARIANTS = (
    f"{COMMON} --save_every 1 --re_init",
    f"{COMMON} --save_every 3 --stable 20 --nesterov --keep 3 -s 2",
    f"{COMMON} --save_every 2 --iter_size 5 --optimizer ADAM --lr 0.01",
    f"{COMMON} --save_every 1 --wakeup 30 --fp16 --amp_dtype float16 --grad_clip 1",
)
TIMES = ("seconds", "images_per_second", "data_wait")
LIMIT = 8192  # bytes that a file may have on a full disk: a line of the log, but no checkpoint


def start(folder: Path, line: str, said_in: str = "said.txt") -> int:
    """Fork a process that trains in a folder; returns its PID."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        status = 70
        try:
            os.chdir(folder)
            said = os.open(said_in, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(said, 1), os.dup2(said, 2)
            status = main.main(line.split())
            sys.stdout.flush(), sys.stderr.flush()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return pid


def status_of(pid: int) -> int:
    """Wait for a process; its exit status, negative for the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def digest(folder: Path, case: str) -> str:
    """A hash of all that a run has come to, times excepted."""
    found = hashlib.sha256()

    def add(value: object) -> None:
        if isinstance(value, torch.Tensor):
            found.update(f"{value.dtype}{tuple(value.shape)}".encode())
            found.update(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for name in value:
                found.update(str(name).encode())
                add(value[name])
        elif isinstance(value, list | tuple):
            for item in value:
                add(item)
        else:
            found.update(repr(value).encode())

    for kind in ("checkpoint", "model_best"):
        payload = checkpoint.read(folder / "weights" / "tiny" / f"{case}-{kind}.pth.tar")
        add({name: value for name, value in payload.items() if name not in ("seconds", "waited", "config")})
    lines = [row.split(",") for row in (folder / "exp" / case / "metrics.csv").read_text().splitlines()]
    kept = [column for column, name in enumerate(lines[0]) if name not in TIMES]
    add([[row[column] for column in kept] for row in lines])
    return found.hexdigest()


def damage(path: Path, chance: random.Random) -> None:
    """Change a file as a broken disk does: cut it short, or change a byte of its tensors."""
    content = bytearray(path.read_bytes())
    if chance.random() < 0.5:
        del content[chance.randrange(len(content)) :]
    else:
        content[chance.randrange(len(content) // 4, len(content) // 2)] ^= 0xFF
    path.write_bytes(content)


def wait(pid: int, until: Callable[[], bool]) -> None:
    """Wait until something is so, or the process has ended."""
    while not until() and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(0.001)


def end(folder: Path, pid: int, how: str, after: float, begun: Path | None) -> str:
    """End a process `after` so many seconds, counted from its start or from when it wrote the file `begun`.

    Returns what came of it.
    """
    started = time.time_ns()
    if begun is not None:
        wait(pid, lambda: begun.exists() and begun.stat().st_mtime_ns > started)
    deadline = time.monotonic() + after
    wait(pid, lambda: time.monotonic() >= deadline)
    if how == "full disk":
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (LIMIT, LIMIT))
    else:
        os.kill(pid, signal.Signals[how])
    status = status_of(pid)
    if status == 0:
        return "was done before"
    # SIGTERM and SIGINT before training has begun have their usual effect.
    expected = {
        "SIGKILL": (-signal.SIGKILL,),
        "SIGTERM": (SAVED, -signal.SIGTERM),
        "SIGINT": (SAVED, 130),
        "full disk": (1, 2),
    }
    if status not in expected[how]:
        said = (folder / "said.txt").read_text()[-3000:]
        raise SystemExit(f"a process ended by {how} has the exit status {status}: {said}")
    when = "in training" if begun is not None else "at any time"
    return f"{how} {when}"


def run(folder: Path, kills: int, seed: int) -> collections.Counter[str]:
    """End processes until there were `kills` ends; returns how many of each kind."""
    chance = random.Random(seed)
    (folder / "network.py").write_text(NETWORK)
    counts: collections.Counter[str] = collections.Counter()
    whole: dict[int, tuple[str, float, float]] = {}
    number = 0
    while sum(counts.values()) - counts["damaged"] < kills:
        variant = number % len(VARIANTS)
        if variant not in whole:
            began = time.monotonic()
            if status_of(start(folder, f"{VARIANTS[variant]} --case whole{variant}")) != 0:
                raise SystemExit((folder / "said.txt").read_text())
            rows = log.MetricsFile.read(folder / "exp" / f"whole{variant}" / "metrics.csv")
            training = sum(row["seconds"] for row in rows)
            whole[variant] = digest(folder, f"whole{variant}"), time.monotonic() - began, training
        expected, seconds, training = whole[variant]
        case = f"run{number}"
        latest = folder / "weights" / "tiny" / f"{case}-checkpoint.pth.tar"
        while True:
            pid = start(folder, f"{VARIANTS[variant]} --case {case} -r")
            if sum(counts.values()) - counts["damaged"] < kills:
                how = chance.choice(["SIGKILL"] * 5 + ["SIGTERM", "SIGINT", "full disk"])
                if chance.random() < 0.75:
                    begun = folder / "exp" / case / "config.yaml"  # written when training begins
                    came = end(folder, pid, how, chance.uniform(0, 0.4 * training), begun)
                else:
                    came = end(folder, pid, how, chance.uniform(0, 0.6 * seconds), None)
                if came == "was done before":
                    break
                counts[came] += 1
                if latest.exists() and chance.random() < 0.15:
                    counts["damaged"] += 1
                    damage(latest, chance)
            elif status_of(pid) != 0:
                raise SystemExit((folder / "said.txt").read_text())
            else:
                break
        if digest(folder, case) != expected:
            raise SystemExit(f"{folder}: {case} does not end as whole{variant} did")
        if list(latest.parent.glob("*.tmp")) or list(latest.parent.glob(".*.tmp")):
            raise SystemExit(f"{latest.parent}: a temporary file was left")
        number += 1
        shutil.rmtree(folder / "exp" / case)
        for path in latest.parent.glob(f"{case}-*"):
            path.unlink()
        print(f"{case}: the same bits; so far {dict(counts)}", flush=True)
    return counts


def load_everything() -> None:
    """Import what a training imports, so that forked processes need not."""
    for name in (
        "model.audit", "model.build", "model.calibrate", "model.convert", "model.health", "model.sync_norm",
        "utils.data", "utils.distributed", "utils.log", "utils.optim", "utils.precision", "utils.report",
        "utils.state", "matplotlib.figure", "matplotlib.backends.backend_agg", "matplotlib.ticker",
    ):  # fmt: skip
        importlib.import_module(name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="End trainings at random moments and compare their ends.")
    parser.add_argument("kills", type=int)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    load_everything()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        found = run(Path(name), options.kills, options.seed)
    damaged = found.pop("damaged", 0)
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(found.items()) if count)
    print(
        f"{sum(found.values())} ends ({kinds}), {damaged} newest checkpoints damaged: all trainings ended with "
        f"the same bits; {time.monotonic() - began:.0f} s"
    )
