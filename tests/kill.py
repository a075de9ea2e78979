"""Ends real trainings at random moments and checks that, resumed, they end as if nothing had happened.

    python tests/kill.py 200 [--seed 0]

Each training is one process, or two over gloo, and writes checkpoints nearly all the time. It is ended at a random
moment by SIGKILL, SIGTERM or SIGINT or by a disk that becomes full, sometimes the newest checkpoint is then
damaged, and it is started again with -r until it is done. Each start must go on from the newest checkpoint that is
whole. In the end weights, optimizer, random states, sums, policy, best checkpoint, metrics and figures about quantizers
must be, bit by bit, those of a training that nobody ended.

Another way of training is one more entry of `VARIANTS`. Processes are forked from this one, which has loaded
everything, so that a start costs little.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import hashlib
import importlib
import json
import math
import os
import random
import re
import resource
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
from PIL import Image

import main
from utils.checkpoint import archive
from utils.errors import UserError
from utils.processes.interrupt import SAVED
from utils.report import epoch_files

NETWORK = """
from torch import nn
from model.layers.factory import conv, linear
from model.layers.norms import norm
from model.networks.build import register_model

def tiny(config):
    return nn.Sequential(
        conv(3, 8, 3, 2, config, full_precision=True), norm(8, config), nn.ReLU(),
        conv(8, 8, 3, 2, config), norm(8, config), nn.ReLU(), nn.Dropout(0.2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear(8, config.num_classes, config),
    )

register_model("tiny", tiny)
"""
COMMON = (
    "--model tiny --keyword_file network.py --dataset fake --keyword cifar10,dorefa,lsq --input_size 8 -b 8 -v 16 "
    "--fake_size 96 --epochs 4 --lr 0.05 --lr_policy sgdr --fm_enable --wt_enable --fm_bit 2 --wt_bit 2 --delay 0.01"
)
POLICY = """
init:
  - bit: 4
epoch:
  - {at: 1, tag: wt, bit: 3, progressive: true}
  - {at: 3, bit: 2}
iteration:
  - {at: 8, tag: fm, enable: false}
  - {at: 13, tag: fm, enable: true, boundary: 1.5}
  - {at: 15, lr: 0.02}
"""
FILES = COMMON.replace(
    "--dataset fake --keyword cifar10,",
    "--dataset imagenet --root images --num_classes 3 --keyword imagenet,",
).replace("--fake_size 96", "")


@dataclass(frozen=True)
class Variant:
    """A way of training.

    Attributes:
        line: options of main.py.
        processes: how many train together.
    """

    line: str
    processes: int = 1


VARIANTS = (
    Variant(f"{COMMON} --save_every 1 --re_init"),
    Variant(f"{COMMON} --save_every 3 --stable 20 --nesterov --keep 3 -s 2"),
    Variant(f"{COMMON} --save_every 2 --iter_size 5 --optimizer ADAM --lr 0.01"),
    Variant(f"{COMMON} --save_every 1 --wakeup 30 --fp16 --amp_dtype float16 --grad_clip 1"),
    Variant(f"{COMMON} --save_every 2 --iter_size 2 --policy policy.yaml"),
    Variant(
        f"{COMMON} --save_every 1 --ema_decay 0.9 --freeze_threshold 0.1,0.02 --freeze_momentum 0.3 --dampen 0.01"
    ),
    Variant(f"{FILES} --save_every 1 -j 1 --stable 10"),
    Variant(f"{COMMON} --save_every 1 -b 4 --sync_bn --re_init", processes=2),
    Variant(f"{COMMON} --save_every 2 -b 4 --iter_size 2 --policy policy.yaml", processes=2),
)
TIMES = ("seconds", "images_per_second", "data_wait")
MOVEMENT = ("changed", "update")
LIMIT = 8192  # bytes that a file may have on a full disk: a line of the log, but no checkpoint
MOST = 6  # ends of one training
LONGEST = 400  # seconds that a training gets, also on a machine that has much other work
PATIENCE = 30  # seconds that a process gets when another one of its run has ended, as torchrun gives it


def free_port() -> int:
    """A port that nobody listens on, and that Linux gives to no connection before it is used: those lie above."""
    while True:
        port = 15000 + secrets.randbelow(2**15 - 15000)  # `random` may have been given a seed
        with socket.socket() as found, contextlib.suppress(OSError):
            found.bind(("127.0.0.1", port))
            return port


def start(folder: Path, line: str | Sequence[str], processes: int = 1) -> list[int]:
    """Fork the processes of a training in a folder; returns their PIDs in the order of their ranks.

    All of them get the same line of options, or each its own. What each says goes into the file said0.txt and so on.
    """
    sys.stdout.flush()
    pids, port = [], free_port()
    for rank in range(processes):
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
        os.environ.update({"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in own.items()})
        pid = os.fork()
        if pid == 0:
            status = 70
            try:
                os.chdir(folder)
                said = os.open(f"said{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(said, 1), os.dup2(said, 2)
                status = main.main((line if isinstance(line, str) else line[rank]).split())
                sys.stdout.flush(), sys.stderr.flush()
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        pids.append(pid)
    return pids


def said(folder: Path, processes: int) -> list[str]:
    """What each process of the last training said."""
    return [(folder / f"said{rank}.txt").read_text() for rank in range(processes)]


def ended(pid: int) -> bool:
    """Whether a process has ended."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def statuses_of(pids: list[int]) -> list[int]:
    """Wait for the processes of a training; their exit statuses, negative for the signal that ended one.

    As torchrun does, end the others when one has failed.
    """
    wait(pids, lambda: any(ended(pid) and status_of(pid, keep=True) != 0 for pid in pids))
    for number, patience in ((signal.SIGTERM, PATIENCE), (signal.SIGKILL, math.inf)):
        for pid in pids:
            os.kill(pid, number)
        deadline = time.monotonic() + patience
        wait(pids, lambda deadline=deadline: time.monotonic() >= deadline)
    return [status_of(pid) for pid in pids]


def status_of(pid: int, *, keep: bool = False) -> int:
    """The exit status of a process that has ended, negative for the signal; to `keep` is to be able to ask again."""
    found = os.waitid(os.P_PID, pid, os.WEXITED | (os.WNOWAIT if keep else 0))
    assert found is not None
    return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status


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
        payload = archive.read(folder / "weights" / "tiny" / f"{case}-{kind}.pth.tar")
        add({name: value for name, value in payload.items() if name not in ("seconds", "waited", "config")})
    lines = [row.split(",") for row in (folder / "exp" / case / "metrics.csv").read_text().splitlines()]
    kept = [column for column, name in enumerate(lines[0]) if name not in TIMES]
    add([[row[column] for column in kept] for row in lines])
    for record in epoch_files.RecordsFile.read(folder / "exp" / case / "quantizers.jsonl"):
        shown = [{k: v for k, v in row.items() if k not in MOVEMENT} for row in record["quantizers"]]
        add(json.dumps([record["epoch"], shown]))
    return found.hexdigest()


def movements(folder: Path, case: str) -> dict[int, list[object]]:
    """What is recorded of each epoch that compares its end with its begin."""
    records = epoch_files.RecordsFile.read(folder / "exp" / case / "quantizers.jsonl")
    return {
        record["epoch"]: [row[name] for row in record["quantizers"] for name in MOVEMENT]
        for record in records
    }


def newest(folder: Path, case: str) -> tuple[int, int]:
    """Epoch and position of the newest checkpoint that is whole; (-1, 0): there is none."""
    found = [(-1, 0)]
    for path in (folder / "weights" / "tiny").glob(f"{case}-*.pth.tar"):
        try:
            payload = archive.read(path)
        except UserError:
            continue
        found.append((payload["epoch"], payload["position"]))
    return max(found)


def went_on(folder: Path, case: str, reached: tuple[int, int], *, training: bool) -> set[int]:
    """Check that the last start went on from where the run was; returns the epoch that it began in the middle of.

    Args:
        folder: where it ran.
        case: of the run.
        reached: epoch and position of the newest checkpoint before.
        training: it came as far as to say where it goes on.
    """
    text = said(folder, 1)[0]
    line = re.search(r"resumed .*: (\d+) epochs?(?: and (\d+) images? of the next)? (?:is|are) done", text)
    begun = (int(line[1]), int(line[2] or 0)) if line else (-1, 0)
    if (line or training or "starting anew" in text) and begun != reached:
        raise SystemExit(f"{case} was at {reached} and goes on from {begun}: {text[:3000]}")
    if newest(folder, case) < reached:
        raise SystemExit(f"{case} was at {reached} and has {newest(folder, case)} now: {text[-3000:]}")
    earlier = sorted((folder / "exp").glob(f"{case}.*")) + sorted((folder / "weights").glob(f"*/{case}.*"))
    if earlier and reached > (-1, 0):
        raise SystemExit(f"{case} was at {reached} and was kept as {earlier[0]}: {text[:3000]}")
    for path in earlier:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return {begun[0] + 1} if begun[1] > 0 else set()


def damage(path: Path, chance: random.Random) -> None:
    """Change a file as a broken disk does: cut it short, or change a byte of its tensors."""
    content = bytearray(path.read_bytes())
    if chance.random() < 0.5:
        del content[chance.randrange(len(content)) :]
    else:
        content[chance.randrange(len(content) // 4, len(content) // 2)] ^= 0xFF
    path.write_bytes(content)


def wait(pids: list[int], until: Callable[[], bool]) -> None:
    """Wait until something is so, or all processes have ended; kill those that do not for `LONGEST` seconds."""
    deadline = time.monotonic() + LONGEST
    while not until() and not all(map(ended, pids)):
        if time.monotonic() > deadline:
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            raise SystemExit("a training does not end")
        time.sleep(0.001)


def end(folder: Path, pids: list[int], whom: list[int], how: str, after: float, begun: Path | None) -> str:
    """End a training `after` so many seconds, counted from its start or from when it wrote the file `begun`.

    Args:
        folder: where it runs.
        pids: its processes.
        whom: those that are signalled.
        how: the signal, or `full disk`.
        after: seconds.
        begun: written when the training itself begins.

    Returns:
        What came of it.
    """
    started = time.time_ns()
    if begun is not None:
        wait(pids, lambda: begun.exists() and begun.stat().st_mtime_ns > started)
    deadline = time.monotonic() + after
    wait(pids, lambda: time.monotonic() >= deadline)
    for pid in whom:
        if how == "full disk":
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (LIMIT, LIMIT))
        else:
            os.kill(pid, signal.Signals[how])
    statuses = statuses_of(pids)
    if statuses[0] == 0:  # the others may have been ended behind their last step
        return "was done before"
    # SIGTERM and SIGINT before training has begun have their usual effect.
    expected = {
        "SIGKILL": {-signal.SIGKILL},
        "SIGTERM": {SAVED, -signal.SIGTERM},
        "SIGINT": {SAVED, 130},
        "full disk": {1, 2},
    }[how]
    if len(pids) > 1:  # another one was behind its last step, lost this one, or was ended for that
        expected |= {0, 1, SAVED, -signal.SIGTERM}
    if not set(statuses) <= expected:
        texts = "".join(text[-3000:] for text in said(folder, len(pids)))
        raise SystemExit(f"a training ended by {how} has the exit statuses {statuses}: {texts}")
    together = "" if len(pids) == 1 else " of two processes"
    return f"{how} {'in training' if begun is not None else 'at any time'}{together}"


def prepare(folder: Path) -> None:
    """Write what the trainings read."""
    (folder / "network.py").write_text(NETWORK)
    (folder / "policy.yaml").write_text(POLICY)
    draw = np.random.default_rng(0)
    for split, count in (("train", 32), ("val", 7)):
        for name in ("ant", "bee", "cat"):
            (folder / "images" / split / name).mkdir(parents=True)
            for number in range(count):
                image = Image.fromarray(draw.integers(0, 256, (12, 12, 3), dtype=np.uint8))
                image.save(folder / "images" / split / name / f"{number}.png")


def finish(folder: Path, pids: list[int]) -> None:
    """Wait for a training that nobody ends."""
    if set(statuses_of(pids)) != {0}:
        raise SystemExit("".join(said(folder, len(pids))))


def run(folder: Path, kills: int, seed: int) -> collections.Counter[str]:
    """End trainings until there were `kills` ends; returns how many of each kind."""
    chance = random.Random(seed)
    prepare(folder)
    counts: collections.Counter[str] = collections.Counter()
    whole: dict[int, tuple[str, float, float]] = {}
    moved: dict[int, dict[int, list[object]]] = {}
    number = 0
    while sum(counts.values()) - counts["damaged"] < kills:
        index = number % len(VARIANTS)
        variant = VARIANTS[index]
        if index not in whole:
            began = time.monotonic()
            finish(folder, start(folder, f"{variant.line} --case whole{index}", variant.processes))
            rows = epoch_files.MetricsFile.read(folder / "exp" / f"whole{index}" / "metrics.csv")
            training = sum(row["seconds"] for row in rows)
            whole[index] = digest(folder, f"whole{index}"), time.monotonic() - began, training
            moved[index] = movements(folder, f"whole{index}")
        expected, seconds, training = whole[index]
        case = f"run{number}"
        latest = folder / "weights" / "tiny" / f"{case}-checkpoint.pth.tar"
        reached, interrupted = (
            (-1, 0),
            set[int](),
        )  # where it is, epochs that were gone on with in their middle
        for left in range(chance.randint(1, MOST), -1, -1):
            pids = start(folder, f"{variant.line} --case {case} -r", variant.processes)
            if left == 0 or sum(counts.values()) - counts["damaged"] >= kills:
                finish(folder, pids)
                interrupted |= went_on(folder, case, reached, training=True)
                break
            how = chance.choice(["SIGKILL"] * 5 + ["SIGTERM", "SIGINT", "full disk"])
            whom = pids if chance.random() < 0.5 or how == "full disk" else [chance.choice(pids)]
            if chance.random() < 0.75:
                begun = folder / "exp" / case / "config.yaml"  # written when training begins
                came = end(folder, pids, whom, how, chance.uniform(0, 0.4 * training), begun)
            else:
                came = end(folder, pids, whom, how, chance.uniform(0, 0.6 * seconds), None)
            done = came == "was done before"
            interrupted |= went_on(folder, case, reached, training=done or " in training" in came)
            if done:
                break
            counts[came] += 1
            if latest.exists() and chance.random() < 0.15:
                counts["damaged"] += 1
                damage(latest, chance)
            reached = newest(folder, case)
        if digest(folder, case) != expected:
            raise SystemExit(f"{folder}: {case} does not end as whole{index} did")
        for epoch, figures in movements(folder, case).items():
            pairs = zip(figures, moved[index][epoch], strict=True)
            if any(one != other and (one is not None or epoch not in interrupted) for one, other in pairs):
                raise SystemExit(f"{folder}: {case} has other figures than whole{index} in epoch {epoch}")
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
        "model.audit", "model.networks.build", "model.calibrate", "model.convert", "model.watch.health",
        "model.layers.sync_norm", "utils.data.sources", "utils.processes.distributed", "utils.report.log",
        "utils.step.optimizer", "utils.step.precision", "utils.report.run_report",
        "utils.checkpoint.run_state", "utils.data.image_folder", "matplotlib.figure",
        "matplotlib.backends.backend_agg", "matplotlib.ticker",
        "torch._dynamo",  # imported by the first step of an optimizer
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
