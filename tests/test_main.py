"""The program as a whole: real runs on a few small images, from the command line to the files they leave."""

from __future__ import annotations

import ast
import csv
import itertools
import json
import logging
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import main
from model.networks import build
from model.training import finite, policy, training_methods, validation
from model.training.training_state import TrainingState
from utils.checkpoint import run_state
from utils.checkpoint.archive import read as read_checkpoint
from utils.checkpoint.archive import save as save_checkpoint
from utils.config.resolve import read as read_config
from utils.config.schema import Config, to_dict
from utils.data import sources, tensor_loader
from utils.processes.interrupt import SAVED, Stop
from utils.step import precision, schedule
from utils.step.optimizer import build_optimizer

ROOT = Path(__file__).resolve().parent.parent
TINY = "--dataset fake --width_alpha 0.125 --input_size 16 -b 8 --fake_size 32 --lr 0.05 --lr_policy sgdr"
FP = f"{TINY} --keyword cifar10,cbas,origin"
LSQ = f"{TINY} --keyword cifar10,cbas,origin,dorefa,lsq --fm_enable --wt_enable --fm_bit 2 --wt_bit 2"
TIMES = {"seconds", "images_per_second", "data_wait"}  # columns that no two runs share


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs write below the current folder."""
    monkeypatch.chdir(tmp_path)


def call(line: str) -> int:
    """Run the program in this process and folder; returns its exit status."""
    return main.main(line.split())


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def checkpoint(folder: Path, case: str, kind: str = "checkpoint") -> dict[str, Any]:
    """A checkpoint of a case, by default the latest."""
    return read_checkpoint(folder / "weights" / "resnet20" / f"{case}-{kind}.pth.tar")


def metrics(folder: Path, case: str) -> list[dict[str, str]]:
    """The rows of a run's metrics file, as they are written."""
    with (folder / "exp" / case / "metrics.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def summary(folder: Path, case: str) -> dict[str, Any]:
    """What a run says of itself."""
    return json.loads((folder / "exp" / case / "summary.json").read_text(encoding="utf-8"))


def log_of(folder: Path, case: str) -> str:
    """The log of a case."""
    return (folder / "exp" / case / "log.txt").read_text(encoding="utf-8")


def assert_same(one: Any, two: Any, where: str = "") -> None:
    """Nested containers are equal, tensors bit by bit."""
    if isinstance(one, Tensor):
        assert one.dtype == two.dtype and torch.equal(one, two), where
    elif isinstance(one, dict):
        assert one.keys() == two.keys(), where
        for name in one:
            assert_same(one[name], two[name], f"{where}.{name}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(two), where
        for i, (a, b) in enumerate(zip(one, two, strict=True)):
            assert_same(a, b, f"{where}[{i}]")
    else:
        assert one == two, where


def assert_same_run(one: tuple[Path, str], two: tuple[Path, str]) -> None:
    """Two runs ended with the same bits and wrote the same metrics but for the times."""
    first, second = checkpoint(*one), checkpoint(*two)
    for name in (
        "state_dict",
        "optimizer",
        "epoch",
        "best_acc",
        "learning_rate",
        "scheduler",
        "random",
        "sums",
    ):
        assert_same(first[name], second[name], name)
    rows, others = metrics(*one), metrics(*two)
    assert [{k: v for k, v in row.items() if k not in TIMES} for row in rows] == [
        {k: v for k, v in row.items() if k not in TIMES} for row in others
    ]


@pytest.fixture(scope="module")
def lsq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a two-bit run of two epochs, case `lsq`."""
    folder = tmp_path_factory.mktemp("lsq")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert call(f"{LSQ} --case lsq --epochs 2 --re_init --tensorboard --verbose -s 1") == 0
    return folder


@pytest.fixture(scope="module")
def four_bit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a four-bit run of one epoch."""
    folder = tmp_path_factory.mktemp("four")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert call(f"{LSQ} --fm_bit 4 --wt_bit 4 --case four --epochs 1") == 0
    return folder / "weights" / "resnet20" / "four-checkpoint.pth.tar"


# What a run leaves -------------------------------------------------------------------------------


def test_files_of_a_run(lsq: Path) -> None:
    """All of them, and no other."""
    found = {name for name in files(lsq) if "tfevents" not in name}
    assert found == {
        *(
            f"exp/lsq/{name}"
            for name in (
                "metrics.csv",
                "quantizers.jsonl",
                "curves.png",
                "config.yaml",
                "summary.json",
                "audit.txt",
                "log.txt",
            )
        ),
        *(
            f"weights/resnet20/lsq-{name}.pth.tar"
            for name in (
                "checkpoint",
                "backup1-checkpoint",
                "model_best",
                "epoch1-checkpoint",
                "epoch2-checkpoint",
            )
        ),
    }
    assert len(list((lsq / "exp" / "lsq" / "tensorboard").glob("*tfevents*"))) == 1
    assert files(lsq)["exp/lsq/curves.png"].startswith(b"\x89PNG")


def test_what_the_files_say(lsq: Path) -> None:
    """The metrics, the configuration, the summary and the log agree with each other."""
    rows = metrics(lsq, "lsq")
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert tuple(rows[0]) == main.METRICS
    methods = {"ema_loss", "ema_top1", "ema_top5", "frozen"}  # that this run does not have
    for row in rows:
        assert {name for name, value in row.items() if not math.isfinite(float(value))} == methods
    assert float(rows[0]["lr"]) == 0.05
    assert [float(row["train_top1"]) * 32 % 100 for row in rows] == [0, 0]  # of 32 images
    assert [float(row["val_top1"]) * 8 % 100 for row in rows] == [0, 0]  # of 8 images

    written = yaml.safe_load((lsq / "exp" / "lsq" / "config.yaml").read_text(encoding="utf-8"))
    config = read_config(f"{LSQ} --case lsq --epochs 2 --re_init --tensorboard --verbose -s 1".split())
    assert written == to_dict(config)
    assert checkpoint(lsq, "lsq")["config"] == to_dict(config)

    said = summary(lsq, "lsq")
    best = max(float(row["val_top1"]) for row in rows)
    assert (said["epochs"], said["best_top1"], said["last_top1"]) == (2, best, float(rows[-1]["val_top1"]))
    assert checkpoint(lsq, "lsq")["best_acc"] == best
    assert "passed: " in said["audit"] and said["weight_bytes"] < said["float_weight_bytes"]

    log = log_of(lsq, "lsq")
    for text in (
        "epoch 1/2: loss",
        "epoch 2/2: loss",
        "re_init: initialised 40 quantizers",
        "audit: passed",
        "metrics.csv",
        "small    bn1.0.weight",
    ):
        assert text in log


def test_best_and_kept_checkpoints(lsq: Path) -> None:
    """The best one is of the first epoch with the best accuracy; kept ones are of their epochs."""
    accuracy = [float(row["val_top1"]) for row in metrics(lsq, "lsq")]
    assert checkpoint(lsq, "lsq", "model_best")["epoch"] == accuracy.index(max(accuracy)) + 1
    assert checkpoint(lsq, "lsq", "epoch1-checkpoint")["epoch"] == 1
    assert_same(checkpoint(lsq, "lsq", "epoch2-checkpoint"), checkpoint(lsq, "lsq"))


def test_the_network_is_quantized(lsq: Path) -> None:
    """Every quantizer of the audit shows 2 to 4 values, in the file as in the checkpoint."""
    lines = (lsq / "exp" / "lsq" / "audit.txt").read_text(encoding="utf-8").splitlines()
    rows = [line.split() for line in lines if ".quant_" in line]
    assert len(rows) == 2 * 20  # weights and activations of the 18 convolutions in blocks and of 2 shortcuts
    assert all(
        2 <= int(seen) <= 4 and (allowed, verdict) == ("4", "ok") for _, seen, allowed, verdict in rows
    )
    levels = [
        value for name, value in checkpoint(lsq, "lsq")["state_dict"].items() if name.endswith("level_num")
    ]
    assert [int(value) for value in levels] == [4] * 40


def test_tensorboard_shows_the_metrics(lsq: Path) -> None:
    """The curves are the columns of the metrics file."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(lsq / "exp" / "lsq" / "tensorboard")).Reload()
    for name in ("train_loss", "val_top1", "lr"):
        points = [(point.step, point.value) for point in events.Scalars(name)]
        expected = [(int(row["epoch"]), pytest.approx(float(row[name]))) for row in metrics(lsq, "lsq")]
        assert points == expected


def test_tensorboard_shows_the_network(lsq: Path) -> None:
    """Images, weights, levels and ranges of every quantizer, and the options with what came of them."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = lsq / "exp" / "lsq"
    events = accumulator.EventAccumulator(
        str(folder / "tensorboard"), size_guidance={"images": 0, "histograms": 0}
    ).Reload()
    tags = events.Tags()
    records = [
        json.loads(line) for line in (folder / "quantizers.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [record["epoch"] for record in records] == [1, 2]
    for row in records[1]["quantizers"]:
        name = row["name"]
        assert [image.step for image in events.Images(f"levels/{name}")] == [1, 2]
        assert events.Scalars(f"health/{name}/range")[1].value == pytest.approx(row["range"], rel=1e-5)
        (_, last) = events.Histograms(f"inputs/{name}")
        assert last.histogram_value.num == sum(row["histogram"]["counts"])
    assert {"weights/conv1", "weights/fc"} <= set(tags["histograms"])
    assert {"images/as given", "images/denormalised"} <= set(tags["images"])
    assert events.Scalars("outcome/last_top1")[0].value == pytest.approx(summary(lsq, "lsq")["last_top1"])
    options = events.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    assert b"model.quant.fm.levels" in options and b"optim.lr" in options


def test_two_runs_are_the_same_run(tmp_path: Path, lsq: Path) -> None:
    """The seed decides everything; without extra files asked for none are written."""
    assert call(f"{LSQ} --case again --epochs 2 --re_init") == 0
    assert_same_run((lsq, "lsq"), (tmp_path, "again"))
    first, second = (
        folder / "exp" / case / "quantizers.jsonl" for folder, case in ((lsq, "lsq"), (tmp_path, "again"))
    )
    assert first.read_bytes() == second.read_bytes()
    assert {path.name for path in (tmp_path / "weights" / "resnet20").iterdir()} == {
        "again-checkpoint.pth.tar",
        "again-backup1-checkpoint.pth.tar",
        "again-model_best.pth.tar",
    }
    assert not (tmp_path / "exp" / "again" / "tensorboard").exists()


# What writes nothing -----------------------------------------------------------------------------


def test_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prints layers, parameter groups, rates and totals, and leaves no file."""
    line = f"{LSQ} --lr_policy custom_step --lr_custom_step 3 --epochs 5"
    line += " --custom_decay_list clip_val --custom_decay 0.5"
    assert call(f"{line} --dry_run") == 0
    text = capsys.readouterr().out
    for expected in (
        "layer1.0.conv1.0",
        "conv 3x3/2 8-16",
        "linear 32-10",
        "full precision",
        "lsq 2 bit, 4 levels",  # the layers
        "total: ",
        " MACs",
        " bit operations",
        "KiB",  # the totals
        "parameter groups:",
        "custom_decay_list",
        "small",
        "clip_val",  # the groups
        "0: 0.05, 3: 0.005",  # the rates
        "levels: 4",
        "quant.fm.method: keyword lsq",
        "fm_bit: --fm_bit",  # the configuration and where it is from
        "nothing trained",
    ):
        assert expected in text
    assert files(tmp_path) == {} and not any(tmp_path.iterdir())


def test_lr_test(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prints the rate of every epoch, draws those of all steps into a file and leaves no other."""
    line = f"{FP},lr-test --lr 0.4 --epochs 4 --extra_epoch 1"
    assert call(f"{line} --lr_policy fix_step --lr_fix_step 2 --lr_decay 0.5") == 0
    rows = [row.split() for row in capsys.readouterr().out.splitlines()[1:-1]]
    assert [(int(epoch), float(rate)) for epoch, rate in rows] == [
        (0, 0.4),
        (1, 0.4),
        (2, 0.2),
        (3, 0.2),
        (4, 0.2),
    ]
    assert set(files(tmp_path)) == {"exp/default/schedule.png"}
    assert files(tmp_path)["exp/default/schedule.png"].startswith(b"\x89PNG")


# Evaluation --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source", ["--pretrained {} --case eval", "--resume_file {} --case eval", "-r --case lsq"]
)
def test_evaluation(tmp_path: Path, lsq: Path, capsys: pytest.CaptureFixture[str], source: str) -> None:
    """Of a checkpoint, at the accuracy and loss of its epoch; nothing but the log is written."""
    shutil.copytree(lsq, tmp_path, dirs_exist_ok=True)
    before = files(tmp_path)
    path = tmp_path / "weights" / "resnet20" / "lsq-checkpoint.pth.tar"
    assert call(f"{LSQ} -e {source.format(path)}") == 0
    row = {name: float(value) for name, value in metrics(lsq, "lsq")[-1].items()}
    expected = f"top-1 {row['val_top1']:.2f}, top-5 {row['val_top5']:.2f}, loss {row['val_loss']:.4f}"
    assert expected in capsys.readouterr().out
    changed = {name for name, content in files(tmp_path).items() if content != before.get(name)}
    assert changed == {f"exp/{source.split()[-1]}/log.txt"}
    assert before.keys() <= files(tmp_path).keys()


def test_evaluation_with_audit(lsq: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every quantizer is listed, and passes."""
    path = lsq / "weights" / "resnet20" / "lsq-checkpoint.pth.tar"
    assert call(f"{LSQ} -e --audit --pretrained {path}") == 0
    text = capsys.readouterr().out
    assert "layer3.2.conv2.0.quant_weight" in text and "audit: passed: 40 quantizers" in text


# One case after another --------------------------------------------------------------------------


def test_an_earlier_run_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As CASE.1, then CASE.2; nothing of them changes, even when the logs of the first are gone."""
    line = f"{FP} --case mine --epochs 1 -s 1"
    assert call(f"{line} --seed 1") == 0
    first = checkpoint(tmp_path, "mine")
    assert call(f"{line} --seed 2") == 0
    assert "the earlier run of the case mine is kept as mine.1" in capsys.readouterr().out
    assert_same(checkpoint(tmp_path, "mine.1"), first)
    assert_same(checkpoint(tmp_path, "mine.1", "epoch1-checkpoint"), first)
    assert summary(tmp_path, "mine.1")["seed"] == 1 and summary(tmp_path, "mine")["seed"] == 2

    shutil.rmtree(tmp_path / "exp")
    second = checkpoint(tmp_path, "mine")
    assert call(f"{line} --seed 3") == 0
    assert_same(checkpoint(tmp_path, "mine.1"), first)
    assert_same(checkpoint(tmp_path, "mine.2"), second)
    assert summary(tmp_path, "mine")["seed"] == 3


def test_full_precision_to_two_bits(tmp_path: Path) -> None:
    """The weights are the checkpoint's, only quantizers are new; a bare name is found among the weights."""
    assert call(f"{FP} --case fp --epochs 1") == 0
    assert call(f"{LSQ} --case low --epochs 1 --lr 0 --pretrained fp-checkpoint.pth.tar --re_init") == 0
    fp, low = checkpoint(tmp_path, "fp")["state_dict"], checkpoint(tmp_path, "low")["state_dict"]
    for name, value in fp.items():
        if "running" not in name and "num_batches" not in name:  # statistics follow the quantized activations
            assert torch.equal(low[name], value), name
    assert all(".quant_" in name for name in low.keys() - fp.keys())
    log = log_of(tmp_path, "low")
    assert f"{len(fp)} loaded" in log and f"{len(low) - len(fp)} missing" in log


def test_four_bits_to_two_bits(tmp_path: Path, four_bit: Path) -> None:
    """The options' number of levels holds, not the checkpoint's; learned clip values are the checkpoint's."""
    assert call(f"{LSQ} --case two --epochs 1 --lr 0 --pretrained {four_bit}") == 0
    state, old = checkpoint(tmp_path, "two")["state_dict"], read_checkpoint(four_bit)["state_dict"]
    for name, value in state.items():
        if name.endswith("level_num"):
            assert (int(value), int(old[name])) == (4, 16)
        elif name.endswith("clip_val"):
            assert torch.equal(value, old[name])
    table = (tmp_path / "exp" / "two" / "audit.txt").read_text(encoding="utf-8")
    rows = [line.split() for line in table.splitlines() if ".quant_" in line]
    assert "passed: 40 quantizers" in table and {row[2] for row in rows} == {"4"}


def test_a_quantized_start_warms_up_again(tmp_path: Path, four_bit: Path) -> None:
    """A new run counts its own iterations: it collects the ranges, and they become the clip values."""
    assert call(f"{LSQ} --case two --epochs 1 --lr 0 --stable 2 --pretrained {four_bit}") == 0
    state = checkpoint(tmp_path, "two")["state_dict"]
    assert {int(value) for name, value in state.items() if name.endswith("iteration")} == {4}
    for name, value in state.items():
        if name.endswith("range_mean"):
            assert bool((value > 0).all())
            assert torch.equal(value, state[name.replace("range_mean", "clip_val")])


@pytest.mark.parametrize("source", ["--pretrained", "--resume_file"])
def test_evaluating_at_other_bits_is_an_error(
    tmp_path: Path, four_bit: Path, capsys: pytest.CaptureFixture[str], source: str
) -> None:
    """The network was trained for others."""
    assert call(f"{LSQ} -e {source} {four_bit}") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "16" in error and "4" in error and "level" in error
    assert not any(tmp_path.iterdir())


# Resume ------------------------------------------------------------------------------------------


def test_resume_without_a_checkpoint_starts_anew(tmp_path: Path) -> None:
    """And says so; what an unfinished run left is moved away."""
    (tmp_path / "exp" / "mine").mkdir(parents=True)
    (tmp_path / "exp" / "mine" / "metrics.csv").write_text("epoch\n", encoding="utf-8")
    assert call(f"{FP} --case mine --epochs 1 -r") == 0
    assert "no checkpoint of the case mine yet, starting anew" in log_of(tmp_path, "mine")
    assert (tmp_path / "exp" / "mine.1" / "metrics.csv").read_text(encoding="utf-8") == "epoch\n"
    assert len(metrics(tmp_path, "mine")) == 1


def interrupt(folder: Path, line: str, number: signal.Signals) -> subprocess.CompletedProcess[str]:
    """Start a process, signal it when it has logged the end of its first epoch, and wait for it."""
    process = subprocess.Popen(
        [sys.executable, "-W", "error", str(ROOT / "main.py"), *line.split()],
        cwd=folder,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A shell starts its background jobs, and so these tests, with the signal ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    said = []
    for text in process.stdout:
        said.append(text)
        if text.startswith("epoch 1/"):
            while not list(
                folder.glob("weights/*/ended-checkpoint.pth.tar")
            ):  # written in a thread of its own
                time.sleep(0.01)
            process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    return subprocess.CompletedProcess(process.args, process.returncode, "".join(said), errors)


@pytest.mark.parametrize(
    ("number", "line"),
    [
        # Killed while the quantizers still collect their ranges, which ends within the second epoch.
        (signal.SIGKILL, f"{LSQ} --stable 6 --nesterov --wd 1e-3 --wakeup 5"),
        (signal.SIGINT, f"{FP} --iter_size 3 --grad_clip 1 --lr_policy cos"),
    ],
)
def test_a_run_that_was_ended_goes_on_exactly(tmp_path: Path, number: signal.Signals, line: str) -> None:
    """A run that is ended in its second epoch and continued with -r is, bit by bit, one that was not."""
    assert call(f"{line} --case whole --epochs 3") == 0
    done = interrupt(tmp_path, f"{line} --case ended --epochs 3 --delay 0.3", number)
    if number == signal.SIGKILL:
        assert (done.returncode, done.stderr) == (-signal.SIGKILL, "")
    else:
        assert (done.returncode, done.stderr) == (SAVED, "")
        assert checkpoint(tmp_path, "ended")["position"] > 0
    assert len(metrics(tmp_path, "ended")) == 1 and checkpoint(tmp_path, "ended")["epoch"] == 1
    assert call(f"{line} --case ended --epochs 3 -r") == 0
    assert_same_run((tmp_path, "whole"), (tmp_path, "ended"))
    assert re.search(r"1 epochs( and \d+ images of the next)? are done", log_of(tmp_path, "ended"))
    assert "warning" not in log_of(tmp_path, "ended")


def test_resume_file(tmp_path: Path) -> None:
    """Any kept checkpoint can be continued under another name; its metrics begin with the next epoch."""
    line = f"{TINY} --keyword digits,bacs,preBN,pact,ot_lsq --optimizer ADAM --lr 1e-3 --epochs 3"
    line += " --fm_enable --wt_enable --ot_enable --fm_bit 3 --wt_bit 3 --ot_bit 6"
    assert call(f"{line} --case whole -s 1") == 0
    path = tmp_path / "weights" / "resnet20" / "whole-epoch1-checkpoint.pth.tar"
    assert call(f"{line} --case part --resume_file {path}") == 0
    one, two = checkpoint(tmp_path, "whole"), checkpoint(tmp_path, "part")
    for name in ("state_dict", "optimizer", "random", "best_acc"):
        assert_same(one[name], two[name], name)
    assert [row["epoch"] for row in metrics(tmp_path, "part")] == ["2", "3"]


def test_resuming_a_finished_run(tmp_path: Path, lsq: Path) -> None:
    """Trains nothing, succeeds and changes no weight, so that one line serves every restart."""
    shutil.copytree(lsq, tmp_path, dirs_exist_ok=True)
    assert call(f"{LSQ} --case lsq --epochs 2 --re_init -r") == 0
    assert_same_run((lsq, "lsq"), (tmp_path, "lsq"))
    assert summary(tmp_path, "lsq") == summary(lsq, "lsq")


def test_changed_options_of_a_resumed_run(tmp_path: Path, lsq: Path) -> None:
    """Those of the training hold from there on and are logged; more epochs go on."""
    shutil.copytree(lsq, tmp_path, dirs_exist_ok=True)
    assert call(f"{LSQ} --case lsq --epochs 3 --wd 0.5 -r") == 0
    log = log_of(tmp_path, "lsq")
    assert (
        "optim.weight_decay was 0.0001 and is 0.5 now" in log and "schedule.epochs was 2 and is 3 now" in log
    )
    assert {group["weight_decay"] for group in checkpoint(tmp_path, "lsq")["optimizer"]["param_groups"]} == {
        0,
        0.5,
    }
    assert [row["epoch"] for row in metrics(tmp_path, "lsq")] == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--fm_bit 3", "model.quant.fm.levels was 4 and is 8 now"),
        ("--keyword cifar10,cabs,origin,dorefa,lsq", "model.block.order was cbas and is cabs now"),
        ("--fm_half_range", "model.quant.fm.half_range was True and is False now"),
        ("--optimizer ADAM", "optim.name was SGD and is ADAM now"),
    ],
)
def test_another_network_cannot_be_resumed(
    tmp_path: Path, lsq: Path, capsys: pytest.CaptureFixture[str], change: str, message: str
) -> None:
    """Even where the shapes would fit."""
    path = lsq / "weights" / "resnet20" / "lsq-checkpoint.pth.tar"
    assert call(f"{LSQ} --epochs 3 --resume_file {path} {change}") == 2
    assert message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


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
        model, model, optimizer, precision.build_precision(model, optimizer, config.precision, torch.device("cpu")),
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
        model, model, optimizer, precision.build_precision(model, optimizer, config.precision, cpu),
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


# Runs that differ --------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit status 1 and one line; no checkpoint of the broken weights is written."""
    assert call(f"{FP} --lr 1e30 --epochs 2 --report_freq 1") == 1
    error = capsys.readouterr().err
    assert error.startswith("main.py: failed: the loss is not finite in epoch 1, iteration ")
    assert error.count("\n") == 1
    assert not list((tmp_path / "weights").rglob("*.tar"))


RUINS = """
import torch
from torch import nn
from model.networks.build import register_model

class Ruin(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, count):
        ctx.count = count
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * (float("nan") if ctx.count == 6 else 1), None

class Net(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fc = nn.Linear(192, 10)
        self.count = 0

    def forward(self, x):
        self.count += self.training
        return Ruin.apply(self.fc(x.flatten(1)), self.count)

register_model("ruins", Net)
"""


def test_a_gradient_that_is_not_finite_ends_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Though the loss is finite: before the step, named in the log; the last checkpoint is one from before."""
    (tmp_path / "mine.py").write_text(RUINS)
    line = "--dataset fake --num_classes 10 --input_size 8 -b 8 --fake_size 32 --epochs 3 --save_every 1"
    assert call(f"{line} --model ruins --keyword_file mine.py --case ruined") == 1
    error = capsys.readouterr().err
    assert error == (
        "main.py: failed: the gradient of fc.weight is not finite in epoch 2, iteration 2, though the loss is; "
        "checkpoints hold the weights before it; try a lower --lr, --grad_clip or --re_init\n"
    )
    assert error.partition("failed: ")[2].strip() in log_of(tmp_path, "ruined")
    saved = read_checkpoint(tmp_path / "weights" / "ruins" / "ruined-checkpoint.pth.tar")
    assert saved["epoch"] == 1 and saved["position"] == 8
    assert all(bool(value.isfinite().all()) for value in saved["state_dict"].values())


AFTER = """
import torch
from torch import nn
from model.networks.build import register_model

class Last(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how = how
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x):
        if self.training and self.how == "state":
            self.seen.fill_(torch.inf)
        return x / 0.0 if not self.training and self.how == "output" else x

def net(config):
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    net.add_module("last", Last("HOW"))
    return net

register_model("after-HOW", net)
"""


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (
            "output",
            "the validation loss is not finite after epoch 1; the first layer with such an output is last;",
        ),
        (
            "state",
            "last.seen is not finite after epoch 1; no layer has such an output for the images looked at",
        ),
    ],
)
def test_what_is_not_finite_after_an_epoch_is_named(
    how: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text(AFTER.replace("HOW", how))
    line = "--dataset fake --num_classes 10 --input_size 8 -b 8 --fake_size 16 --epochs 1"
    assert call(f"{line} --model after-{how} --keyword_file mine.py --case after") == 1
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not list((tmp_path / "weights").rglob("*.tar"))


class Malice:
    """Makes a file when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch stolen",)


@pytest.mark.parametrize(
    "how", ["--pretrained {}", "--resume_file {}", "-e --pretrained {}", "-r --case evil"]
)
def test_a_malicious_checkpoint_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    """Nothing of it runs; -r passes it over and says so."""
    path = tmp_path / "weights" / "resnet20" / "evil-checkpoint.pth.tar"
    path.parent.mkdir(parents=True)
    torch.save({"epoch": 1, "state_dict": {"w": torch.ones(1)}, "malice": Malice()}, path)
    status = call(f"{FP} --epochs 1 {how.format(path)}")
    shown = capsys.readouterr()
    assert "refused, because it holds" in shown.out + shown.err
    assert status == (0 if how.startswith("-r") else 2)
    assert not (tmp_path / "stolen").exists()


def test_no_code_of_ours_runs_what_a_file_says() -> None:
    """Every `torch.load` is of weights only, and text is neither evaluated nor given to a shell."""
    forbidden = {
        "eval", "exec", "os.system", "os.popen", "pickle.load", "pickle.loads", "pickle.Unpickler", "np.load",
        "numpy.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load",
    }  # fmt: skip
    loads = 0
    paths = [
        *ROOT.glob("*.py"),
        *(path for part in ("model", "utils", "benchmarks") for path in (ROOT / part).rglob("*.py")),
    ]
    assert ROOT / "utils" / "report" / "html" / "runs.py" in paths
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            options = {word.arg: ast.unparse(word.value) for word in node.keywords}
            assert name not in forbidden, path
            assert "shell" not in options, path
            if name == "torch.load":
                loads += 1
                assert options.get("weights_only") == "True", path
    assert loads > 0


def test_no_validation(tmp_path: Path) -> None:
    """No best checkpoint and no accuracy, but all the rest; epochs after the schedule are trained too."""
    assert call(f"{FP} --case blind -v 0 --epochs 1 --extra_epoch 1") == 0
    assert {path.name for path in (tmp_path / "weights" / "resnet20").iterdir()} == {
        "blind-checkpoint.pth.tar",
        "blind-backup1-checkpoint.pth.tar",
    }
    rows = metrics(tmp_path, "blind")
    assert [(row["epoch"], row["val_top1"], row["val_loss"]) for row in rows] == [
        ("1", "nan", "nan"),
        ("2", "nan", "nan"),
    ]
    said = summary(tmp_path, "blind")
    assert (said["best_top1"], said["last_top1"], said["epochs"]) == (None, None, 2)
    log = log_of(tmp_path, "blind")
    assert "model_best" not in log and "inf" not in log and "nan" not in log


@pytest.mark.parametrize("words", ["dorefa", "pact", "dorefa,lsq"])
@pytest.mark.parametrize("stable", ["--stable 4", "--stable_epoch 1"])
def test_a_warm_up_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, stable: str) -> None:
    """After it the network quantizes with the ranges it collected, and its checkpoint evaluates as it did."""
    line = (
        f"{TINY} --keyword cifar10,cbas,origin,{words} --fm_enable --wt_enable --fm_bit 2 --wt_bit 2 {stable}"
    )
    assert call(f"{line} --case warm --epochs 2") == 0
    assert summary(tmp_path, "warm")["audit"] == "passed: 40 quantizers within their levels"
    state = checkpoint(tmp_path, "warm")["state_dict"]
    ranges = [value for name, value in state.items() if name.endswith("quant_activation.range_mean")]
    assert len(ranges) == 20 and all(bool((value > 0).all()) for value in ranges)
    assert {int(value) for name, value in state.items() if name.endswith("iteration")} == {8}
    capsys.readouterr()
    assert call(f"{line} -e --pretrained warm-checkpoint.pth.tar --case eval") == 0
    assert f"loss {float(metrics(tmp_path, 'warm')[-1]['val_loss']):.4f}" in capsys.readouterr().out


def test_a_warm_up_longer_than_the_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(f"{LSQ} --case warm --epochs 1 --stable 5") == 2
    assert "a warm-up of 5 iterations is the whole run of 4" in capsys.readouterr().err
    assert call(f"{LSQ} --case warm --epochs 1 --warmup 4") == 2
    assert not (tmp_path / "weights").exists()


SLACKER = """
from model.quant import Quantizer, register
from utils.config.keyword import Keyword
from utils.config.keyword import register as declare

@register("slacker", "fm", "wt")
class Slacker(Quantizer):
    def quantize(self, x):
        return x

declare(Keyword(name="slacker", group="mine", help="forgets to quantize",
                sets={"quant.fm.method": "slacker", "quant.wt.method": "slacker"}))
"""


def test_a_run_that_does_not_quantize_fails_the_audit(tmp_path: Path) -> None:
    """Exit status 3: what was trained is not the quantized network that was asked for."""
    (tmp_path / "mine.py").write_text(SLACKER)
    argv = LSQ.replace("dorefa,lsq", "slacker") + " --keyword_file mine.py --case slack --epochs 1"
    done = subprocess.run(
        [sys.executable, str(ROOT / "main.py"), *argv.split()], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 3, done.stderr
    assert summary(tmp_path, "slack")["audit"] == "FAILED: 40 of 40 quantizers"
    assert "layer1.0.conv1.0.quant_weight passes its input" in log_of(tmp_path, "slack")


def test_the_best_network_is_a_quantized_one(tmp_path: Path) -> None:
    """Epochs of the warm-up do not count, however good the unquantized network is."""
    assert call(f"{LSQ} --case best --epochs 3 --stable_epoch 2") == 0
    assert checkpoint(tmp_path, "best", "model_best")["epoch"] >= 2


def test_another_cases_checkpoint_does_not_overwrite_this_case(tmp_path: Path) -> None:
    assert call(f"{LSQ} --case src --epochs 2 --save_freq 1") == 0
    assert call(f"{LSQ} --case dst --epochs 2 --seed 2") == 0
    before = (tmp_path / "weights" / "resnet20" / "dst-checkpoint.pth.tar").read_bytes()
    source = "weights/resnet20/src-epoch1-checkpoint.pth.tar"
    assert call(f"{LSQ} --case dst --epochs 2 --resume_file {source}") == 0
    assert (tmp_path / "weights" / "resnet20" / "dst.1-checkpoint.pth.tar").read_bytes() == before


STEERED = {"done": {"epoch": 1, "iteration": 7}, "quantizers": {}, "options": {}, "rates": []}
CLIP = "layer1.0.conv1.0.quant_weight"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("config", 5), ("config", {"data": 5}),
        ("epoch", "x"), ("epoch", -3), ("epoch", True), ("epoch", 10**9),
        ("position", 10**9), ("position", 8), ("position", False),
        ("scheduler", {"step": 3}), ("scheduler", {"step": "x"}),
        ("best_acc", "q"), ("best_acc", math.nan), ("seconds", "a"), ("seconds", math.nan), ("waited", -1.0),
        ("sums", [["a"] * 4]), ("sums", [[1.0, math.inf, 1.0, 1.0]]), ("sums", [[1.0]]), ("sums", [1]),
        ("random", []), ("random", {"python": [1]}),
        ("optimizer", 5), ("optimizer", {"state": {}, "param_groups": "x"}),
        ("amp", 5), ("amp", {"x": 1}), ("amp", {"scale": "a"}),
        ("amp", {"scale": 0.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 9,
                 "_growth_tracker": 0}),
        ("policy", {"done": 1}), ("policy", {**STEERED, "done": {"epoch": True, "iteration": 0}}),
        ("policy", {**STEERED, "quantizers": {"nope": {"enable": False}}}),
        ("policy", {**STEERED, "quantizers": {CLIP: {"method": "dorefa"}}}),
        ("policy", {**STEERED, "quantizers": {CLIP: {"enable": "no"}}}),
        ("policy", {**STEERED, "options": {"name": "ADAM"}}), ("policy", {**STEERED, "options": {"lr": "x"}}),
        ("policy", {**STEERED, "rates": [[0, -1.0]]}), ("policy", {**STEERED, "rates": 7}),
        ("methods", {"average": 5}), ("methods", {"average": {"steps": 1, "weights": {"fc.weight": 5}}}),
        ("methods", {"freezing": {"layer1.0.conv1.0": 5}}),
    ],
)  # fmt: skip
def test_a_checkpoint_with_a_wrong_entry_is_refused(
    tmp_path: Path, lsq: Path, capsys: pytest.CaptureFixture[str], name: str, value: object
) -> None:
    path = tmp_path / "bad.pth.tar"
    whole = read_checkpoint(lsq / "weights" / "resnet20" / "lsq-checkpoint.pth.tar")
    assert name in whole
    save_checkpoint(path, {**whole, name: value})
    line = f"{LSQ} --case bad --epochs 3 --fp16 --amp_dtype float16 --ema_decay 0.9 --freeze_threshold 0.1"
    assert call(f"{line} --resume_file {path}") == 2
    error = capsys.readouterr().err
    assert error.startswith("main.py: error: ") and error.count("\n") == 1
    assert str(path) in error or name == "random"
    assert not list(tmp_path.rglob("bad-*.tar"))


def test_a_loss_that_half_precision_skipped_is_no_damage(tmp_path: Path, lsq: Path) -> None:
    path = tmp_path / "skipped.pth.tar"
    whole = read_checkpoint(lsq / "weights" / "resnet20" / "lsq-checkpoint.pth.tar")
    save_checkpoint(path, {**whole, "sums": [[math.inf, 1.0, 1.0, 1.0]]})
    assert call(f"{LSQ} --case skipped --epochs 3 --resume_file {path}") == 0


def test_a_momentum_of_another_shape_is_refused(
    tmp_path: Path, lsq: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.pth.tar"
    whole = read_checkpoint(lsq / "weights" / "resnet20" / "lsq-checkpoint.pth.tar")
    whole["optimizer"]["state"][0]["momentum_buffer"] = torch.zeros(7)
    save_checkpoint(path, whole)
    assert call(f"{LSQ} --case bad --epochs 3 --resume_file {path}") == 2
    assert "holds another optimizer's state (momentum_buffer of shape [7] for" in capsys.readouterr().err


def test_a_schedule_that_goes_on_at_another_step_is_said(
    tmp_path: Path, lsq: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """More images make longer epochs: with the same options the rates would move silently."""
    path = lsq / "weights" / "resnet20" / "lsq-checkpoint.pth.tar"
    assert call(f"{LSQ.replace('size 32', 'size 48')} --case more --epochs 3 --resume_file {path}") == 0
    assert "the schedule was at step 8 and goes on from step 12" in log_of(tmp_path, "more")


def test_names_from_files_show_no_control_characters(
    tmp_path: Path, lsq: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "odd.pth.tar"
    state = read_checkpoint(lsq / "weights" / "resnet20" / "lsq-checkpoint.pth.tar")["state_dict"]
    save_checkpoint(path, {"state_dict": {**state, "a\x1b[2J\r\nb": torch.ones(1)}})
    assert call(f"{LSQ} --case odd --epochs 1 --pretrained {path}") == 2
    error = capsys.readouterr().err
    assert r"a\x1b[2J" in error and "\x1b" not in error


def test_going_on_needs_no_pretrained_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the run began with may have moved since; at the first start it must be there."""
    line = f"{FP} --case mine --pretrained start.pth.tar"
    assert call(f"{line} --epochs 1 -r") == 2
    assert "--pretrained start.pth.tar: no such file" in capsys.readouterr().err
    assert call(f"{FP} --case start --epochs 1") == 0
    start = tmp_path / "weights" / "resnet20" / "start-checkpoint.pth.tar"
    start.rename(tmp_path / "start.pth.tar")
    assert call(f"{line} --epochs 1 -r") == 0
    (tmp_path / "start.pth.tar").unlink()
    assert call(f"{line} --epochs 2 -r") == 0
    assert "1 epochs are done" in log_of(tmp_path, "mine")


def test_checkpoints_that_cannot_be_written_end_the_run_before_it_begins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the rights of the folder say otherwise."""
    assert call(f"{FP} --case mine --epochs 1 --weights_dir /proc/nothing") == 2
    said, error = capsys.readouterr()
    assert "--weights_dir: /proc/nothing/resnet20 cannot be written" in error and "epoch" not in said
    assert not (tmp_path / "exp").exists()


@pytest.mark.parametrize("options", ["", "--distributed --world_size 1 --rank 0"])
def test_several_gpus_in_one_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: str
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if not options:
        monkeypatch.setenv("WORLD_SIZE", "1")
    assert call(f"{FP} -g 0 1 {options}") == 2
    assert "--device_ids 0 1: several GPUs take a process each, and this" in capsys.readouterr().err


def test_unresume_scope(tmp_path: Path, lsq: Path) -> None:
    """The classifier of another data set is left out and starts anew."""
    path = lsq / "weights" / "resnet20" / "lsq-checkpoint.pth.tar"
    line = f"{LSQ} --num_classes 7 --case other --epochs 1 --lr 0 --pretrained {path}"
    assert call(line) == 2
    assert call(f"{line} --unresume_scope fc") == 0
    state, old = checkpoint(tmp_path, "other")["state_dict"], checkpoint(lsq, "lsq")["state_dict"]
    assert state["fc.weight"].shape == (7, 32)
    assert torch.equal(state["layer1.0.conv1.0.weight"], old["layer1.0.conv1.0.weight"])


def test_the_digits(tmp_path: Path) -> None:
    """The data set without options: real images, real labels, above chance after one epoch."""
    line = (
        "--width_alpha 0.125 --input_size 8 -b 32 --lr 0.1 --epochs 1 --lr_policy sgdr --keyword cbsa,origin"
    )
    assert call(f"{line} --case real") == 0
    assert summary(tmp_path, "real")["best_top1"] > 25


def test_evaluation_keeps_learned_ranges(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--re_init` is for the start of a training: a training's config evaluates what it has trained."""
    line = f"{LSQ} --re_init --epochs 1"
    assert call(f"{line} --case a") == 0
    trained = metrics(tmp_path, "a")[0]["val_loss"]
    capsys.readouterr()
    assert call(f"{line} --case b -e --pretrained a-checkpoint.pth.tar") == 0
    assert f"loss {float(trained):.4f}" in capsys.readouterr().out


def test_going_back_within_a_case(tmp_path: Path) -> None:
    """What was further is kept under another name, so that -r goes on with the new branch, however far it is."""
    assert call(f"{FP} --case mine --epochs 3 -s 1") == 0
    old = checkpoint(tmp_path, "mine")
    first = tmp_path / "weights" / "resnet20" / "mine-epoch1-checkpoint.pth.tar"
    assert call(f"{FP} --case mine --epochs 2 -s 1 --resume_file {first}") == 0
    assert checkpoint(tmp_path, "mine")["epoch"] == 2
    assert_same(checkpoint(tmp_path, "mine.1"), old)
    assert call(f"{FP} --case mine --epochs 3 -s 1 -r") == 0
    assert "2 epochs are done" in log_of(tmp_path, "mine")
