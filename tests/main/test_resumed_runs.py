"""Runs that are resumed: exactly, with other options, and from files that are refused."""

from __future__ import annotations

import ast
import math
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import ROOT
from tests.main.runs import (
    FP,
    LSQ,
    TINY,
    assert_same,
    assert_same_run,
    call,
    checkpoint,
    log_of,
    metrics,
    summary,
)
from utils.checkpoint.archive import read as read_checkpoint
from utils.checkpoint.archive import save as save_checkpoint
from utils.processes.interrupt import SAVED


def test_resume_without_a_checkpoint_starts_anew(tmp_path: Path) -> None:
    """And says so; what an unfinished run left is moved away."""
    (tmp_path / "exp" / "mine").mkdir(parents=True)
    (tmp_path / "exp" / "mine" / "metrics.csv").write_text("epoch\n", encoding="utf-8")
    assert call(f"{FP} --case mine --epochs 1 -r") == 0
    assert "no checkpoint of the case mine yet, starting anew" in log_of(tmp_path, "mine")
    assert (tmp_path / "exp" / "mine.1" / "metrics.csv").read_text(encoding="utf-8") == "epoch\n"
    assert len(metrics(tmp_path, "mine")) == 1


def interrupt(
    python: str, folder: Path, line: str, number: signal.Signals
) -> subprocess.CompletedProcess[str]:
    """Start a process, signal it when it has logged the end of its first epoch, and wait for it."""
    process = subprocess.Popen(
        [python, "-W", "error", str(ROOT / "main.py"), *line.split()],
        cwd=folder,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    last = threading.Timer(400, process.kill)  # also on a machine that has much other work
    last.start()
    said = []
    for text in process.stdout:
        said.append(text)
        if text.startswith("epoch 1/"):
            written = folder / "weights" / "resnet20" / "ended-checkpoint.pth.tar"  # in a thread of its own
            while not written.exists() and process.poll() is None:
                time.sleep(0.01)
            process.send_signal(number)
    _, errors = process.communicate()
    last.cancel()
    return subprocess.CompletedProcess(process.args, process.returncode, "".join(said), errors)


@pytest.mark.parametrize(
    ("number", "line"),
    [
        # Killed while the quantizers still collect their ranges, which ends within the second epoch.
        (signal.SIGKILL, f"{LSQ} --stable 6 --nesterov --wd 1e-3 --wakeup 5"),
        (signal.SIGINT, f"{FP} --iter_size 3 --grad_clip 1 --lr_policy cos"),
        (signal.SIGHUP, f"{FP} --lr_policy fix"),  # the terminal was closed
    ],
)
def test_a_run_that_was_ended_goes_on_exactly(
    tmp_path: Path, number: signal.Signals, line: str, interpreter: str
) -> None:
    """A run that is ended in its second epoch and continued with -r is, bit by bit, one that was not."""
    assert call(f"{line} --case whole --epochs 3") == 0
    done = interrupt(interpreter, tmp_path, f"{line} --case ended --epochs 3 --delay 0.3", number)
    if number == signal.SIGKILL:
        assert (done.returncode, done.stderr) == (-signal.SIGKILL, "")
    else:
        assert (done.returncode, done.stderr) == (SAVED, "")
        assert checkpoint(tmp_path, "ended")["position"] > 0
    assert len(metrics(tmp_path, "ended")) == 1 and checkpoint(tmp_path, "ended")["epoch"] == 1
    assert call(f"{line} --case ended --epochs 3 -r") == 0
    assert_same_run((tmp_path, "whole"), (tmp_path, "ended"))
    assert re.search(r"1 epoch( is| and \d+ images of the next are) done", log_of(tmp_path, "ended"))
    assert "warning" not in log_of(tmp_path, "ended")


@pytest.mark.parametrize(
    "methods",
    [
        "pact,ot_lsq --ot_enable --ot_bit 6 --fm_bit 3 --wt_bit 3",
        "dorefa,fm_n2uq,wt_apot,ot_lsqplus --ot_enable --ot_bit 6 --fm_bit 3 --wt_bit 3 --re_init",
        "RPReLU,reactnet --fm_bit 1 --wt_bit 1 --fm_grad_type Triangle --re_init",
    ],
)
def test_resume_file(tmp_path: Path, methods: str) -> None:
    """Any kept checkpoint can be continued under another name; its metrics begin with the next epoch."""
    line = f"{TINY} --optimizer ADAM --lr 1e-3 --epochs 3 --fm_enable --wt_enable"
    line += f" --keyword digits,bacs,preBN,{methods}"
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
    assert call(f"{LSQ} --case lsq --epochs 2 --re_init -r --bn_batches 3") == 0
    assert "--bn_batches was 0 and is 3 now" in log_of(tmp_path, "lsq")
    assert_same_run((lsq, "lsq"), (tmp_path, "lsq"))
    assert summary(tmp_path, "lsq") == summary(lsq, "lsq")
    config = Path("exp") / "lsq" / "config.yaml"
    assert (tmp_path / config).read_bytes() == (lsq / config).read_bytes()  # what it was trained with


def test_ways_of_finding_ranges_may_change(tmp_path: Path, lsq: Path) -> None:
    """They matter at the start only, as `--re_init` itself."""
    shutil.copytree(lsq, tmp_path, dirs_exist_ok=True)
    assert call(f"{LSQ} --case lsq --epochs 3 --re_init --re_init_range mse -r") == 0
    assert (
        call(f"{LSQ} --case lsq --epochs 4 --re_init --re_init_range percentile --re_init_percentile 90 -r")
        == 0
    )


def test_changed_options_of_a_resumed_run(tmp_path: Path, lsq: Path) -> None:
    """Those of the training hold from there on and are logged; more epochs go on."""
    shutil.copytree(lsq, tmp_path, dirs_exist_ok=True)
    assert call(f"{LSQ} --case lsq --epochs 3 --wd 0.5 -r") == 0
    log = log_of(tmp_path, "lsq")
    assert "--weight_decay was 0.0001 and is 0.5 now" in log and "--epochs was 2 and is 3 now" in log
    assert {group["weight_decay"] for group in checkpoint(tmp_path, "lsq")["optimizer"]["param_groups"]} == {
        0,
        0.5,
    }
    assert [row["epoch"] for row in metrics(tmp_path, "lsq")] == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--fm_bit 3", "--fm_bit was 2 and is 3 now"),
        ("--keyword cifar10,cabs,origin,dorefa,lsq", "--keyword was with cbas and is with cabs now"),
        ("--fm_half_range", "--fm_half_range was off and is on now"),
        ("--optimizer ADAM", "--optimizer was SGD and is ADAM now"),
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


# Files that are refused, and other starts --------------------------------------------------------


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
        "eval", "exec", "os.system", "os.popen", "pickle.load", "pickle.loads", "pickle.Unpickler",
        "yaml.load", "yaml.unsafe_load", "yaml.full_load",
    }  # fmt: skip
    loads = 0
    paths = [
        *ROOT.glob("*.py"),
        *(path for part in ("model", "utils", "benchmarks") for path in (ROOT / part).rglob("*.py")),
    ]
    assert ROOT / "utils" / "report" / "html" / "page.py" in paths
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            options = {word.arg: ast.unparse(word.value) for word in node.keywords}
            assert name not in forbidden, path
            assert "shell" not in options, path
            if name in ("np.load", "numpy.load"):
                assert options.get("allow_pickle") == "False", path
            if name == "torch.load":
                loads += 1
                assert options.get("weights_only") == "True", path
    assert loads > 0


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
    assert "1 epoch is done" in log_of(tmp_path, "mine")
