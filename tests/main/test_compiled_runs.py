"""Runs with `--compile` or `--kernels compiled`: they go on bit by bit where they stopped; mistakes are one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import ROOT
from tests.kill import COMMON, NETWORK
from tests.main.runs import assert_same, metrics
from utils.checkpoint import archive
from utils.config.resolve import read
from utils.errors import UserError
from utils.processes.interrupt import SAVED

STOPPED = """
import os, signal
from torch.optim.optimizer import register_optimizer_step_post_hook

steps = iter(range(int(os.environ.get("STOP_AFTER", 10**6)) - 1))
register_optimizer_step_post_hook(
    lambda *_: next(steps, None) is None and os.kill(os.getpid(), signal.SIGTERM)
)
"""
BRANCHING = """
import torch
from torch import nn
from model.networks.build import register_model

class Branching(nn.Sequential):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else super().forward(-x)

register_model("branching", lambda config: Branching(nn.Flatten(), nn.Linear(192, config.num_classes)))
"""


def run(
    folder: Path, line: str, python: str = sys.executable, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [python, str(ROOT / "main.py"), *line.replace("--delay 0.01", "").split()], cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("how", ["--compile default", "--kernels compiled --stable 8"])
def test_a_resumed_run_has_the_same_bits(how: str, tmp_path: Path, interpreter: str) -> None:
    """It was stopped within an epoch, and a warm-up; also with dropout and a last batch of its own shape.

    Validation has the loss that an evaluation has uncompiled.
    """
    (tmp_path / "network.py").write_text(NETWORK + STOPPED)
    same = f"{COMMON} --fake_size 92 -v 23"  # each shape is compiled once, whatever the number of processes
    line = f"{same} {how} --lr_policy fix --epochs 2"
    for options, stop, status in (("whole", "1000", 0), ("parts", "5", SAVED), ("parts -r", "1000", 0)):
        done = run(tmp_path, f"{line} --case {options}", interpreter, STOP_AFTER=stop)
        assert done.returncode == status, done.stderr
        assert ("2 quantizers run in kernels" in done.stdout) == ("--kernels" in how)
    whole, parts = (
        archive.read(tmp_path / "weights" / "tiny" / f"{case}-checkpoint.pth.tar")
        for case in ("whole", "parts")
    )
    assert_same(whole["state_dict"], parts["state_dict"])
    done = run(tmp_path, f"{same} -e --pretrained whole-checkpoint.pth.tar", interpreter)
    assert done.returncode == 0, done.stderr
    loss = float(done.stdout.split("loss ")[-1].split()[0])
    assert float(metrics(tmp_path, "whole")[-1]["val_loss"]) == pytest.approx(loss, abs=2e-4)


@pytest.mark.slow
def test_two_processes_compile_to_the_weights_that_they_have_uncompiled(
    tmp_path: Path, interpreter: str
) -> None:
    (tmp_path / "network.py").write_text(NETWORK.replace("nn.Dropout(0.2)", "nn.Identity()"))
    launcher = "-m utils.processes.launch --standalone --nproc_per_node 2"
    weights = []
    for case, how in (("plain", ""), ("compiled", "--compile default")):
        line = f"{COMMON} --fake_size 32 -v 0 --lr_policy fix --epochs 1 --case {case} {how}".replace(
            "--delay 0.01", ""
        )
        done = subprocess.run(
            [interpreter, *launcher.split(), str(ROOT / "main.py"), *line.split()], cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        weights.append(
            archive.read(tmp_path / "weights" / "tiny" / f"{case}-checkpoint.pth.tar")["state_dict"]
        )
    plain, compiled = weights
    assert plain.keys() == compiled.keys()
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_mistakes(tmp_path: Path, interpreter: str) -> None:
    (tmp_path / "network.py").write_text(NETWORK)
    done = run(tmp_path, f"{COMMON} --compile default", CXX="no-such-compiler", PATH="/nonexistent")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "install g++" in done.stderr, done.stderr
    with pytest.raises(UserError, match="leave --compile or the probe out"):
        read(["--compile", "default", "--probe_list", "conv1"])
    for options, message in (
        (["--compile", "default", "--kernels", "compiled"], "leave --kernels out"),
        (["--compile", "reduce-overhead", "--iter_size", "2"], "write --compile default"),
    ):
        with pytest.raises(UserError, match=message):
            read(options)
    (tmp_path / "network.py").write_text(BRANCHING)
    line = "--model branching --keyword_file network.py --dataset fake --keyword cifar10 --input_size 8 -b 8"
    done = run(tmp_path, f"{line} --fake_size 16 --epochs 1 --compile default", interpreter)
    assert done.returncode == 1 and "cannot compile this network as one graph" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
