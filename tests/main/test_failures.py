"""Runs that fail: before they begin, at what is not finite, at the audit."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests import ROOT
from tests.main.runs import FP, LSQ, call, log_of, summary
from utils.checkpoint.archive import read as read_checkpoint
from utils.checkpoint.archive import save as save_checkpoint


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


@pytest.mark.parametrize(
    ("entry", "value", "layer"),
    [
        ("fc.weight", "nan", "fc (its weight is not finite)"),
        (
            "fc.bias",
            "-inf",
            "fc (its bias is not finite)",
        ),  # of one class: the loss of the other images is finite
        ("bn1.0.running_var", "nan", "bn1.0 (its running_var is not finite)"),
        (
            "layer2.0.conv1.0.quant_activation.clip_val",
            "nan",
            "layer2.0.conv1.0.quant_activation (its clip_val is",
        ),
    ],
)
def test_weights_that_are_not_finite(
    tmp_path: Path, lsq: Path, capsys: pytest.CaptureFixture[str], entry: str, value: str, layer: str
) -> None:
    """Evaluating them is status 1 with the layer's name and no audit; training does not begin."""
    state = read_checkpoint(lsq / "weights" / "resnet20" / "lsq-checkpoint.pth.tar")["state_dict"]
    state[entry].view(-1)[0] = float(value)
    save_checkpoint(tmp_path / "bad.pth", {"state_dict": state})
    assert call(f"{LSQ} -e --audit --case eval --pretrained bad.pth") == 1
    said, error = capsys.readouterr()
    assert error.startswith(
        "main.py: failed: logits are not finite in validation; the first layer with such an "
    )
    assert f"output is {layer}" in error and error.endswith("; give another checkpoint\n")
    assert "top-1" not in said and "audit" not in said and "failed: logits" in log_of(tmp_path, "eval")
    assert call(f"{LSQ} --case tuned --epochs 1 --pretrained bad.pth") == 2
    assert capsys.readouterr().err == (
        f"main.py: error: --pretrained bad.pth: {entry} is not finite; give another checkpoint\n"
    )
    assert not (tmp_path / "exp" / "tuned").exists()


@pytest.mark.parametrize(
    ("value", "status", "said"),
    [
        ("nan", 2, "--distill_pretrained teacher.pth: fc.weight of the teacher is not finite"),
        ("3e38", 1, "the loss is not finite in epoch 1, iteration 1; the teacher's logits are not, its first layer "
         "with such an output is fc; give another checkpoint with --distill_pretrained"),
    ],
)  # fmt: skip
def test_a_teacher_that_is_not_finite_is_blamed(
    tmp_path: Path, lsq: Path, capsys: pytest.CaptureFixture[str], value: str, status: int, said: str
) -> None:
    """And not the learning rate."""
    state = read_checkpoint(lsq / "weights" / "resnet20" / "lsq-checkpoint.pth.tar")["state_dict"]
    state = {name: tensor for name, tensor in state.items() if ".quant_" not in name}
    state["fc.weight"].fill_(float(value))
    save_checkpoint(tmp_path / "teacher.pth", {"state_dict": state})
    line = f"{LSQ} --case pupil --epochs 1 --distill_teacher resnet20 --distill_pretrained teacher.pth"
    assert call(line) == status
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and "--lr" not in error


MASKED = """
import torch
from torch import nn
from model.networks.build import register_model

class Mask(nn.Module):
    def forward(self, x):
        return torch.cat([x[:, :9], torch.full_like(x[:, 9:], -torch.inf)], dim=1)

register_model("masked", lambda config: nn.Sequential(nn.Flatten(), nn.Linear(192, 10), Mask()))
"""


def test_logits_that_are_not_finite_end_a_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Though the loss is finite, since no image is of that class."""
    (tmp_path / "mine.py").write_text(MASKED)
    line = "--dataset fake --num_classes 9 --input_size 8 -b 8 --fake_size 16 --epochs 1"
    assert call(f"{line} --model masked --keyword_file mine.py --case masked") == 1
    error = capsys.readouterr().err
    assert "logits are not finite in epoch 1, iteration 1; the first layer with such an output is 2;" in error


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
            "logits are not finite in validation; the first layer with such an output is last;",
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


def test_a_run_that_does_not_quantize_fails_the_audit(tmp_path: Path, interpreter: str) -> None:
    """Exit status 3: what was trained is not the quantized network that was asked for."""
    (tmp_path / "mine.py").write_text(SLACKER)
    argv = LSQ.replace("dorefa,lsq", "slacker") + " --keyword_file mine.py --case slack --epochs 1"
    done = subprocess.run(
        [interpreter, str(ROOT / "main.py"), *argv.split()], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 3, done.stderr
    assert summary(tmp_path, "slack")["audit"] == "FAILED: 40 of 40 quantizers"
    assert "layer1.0.conv1.0.quant_weight passes its input" in log_of(tmp_path, "slack")


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
