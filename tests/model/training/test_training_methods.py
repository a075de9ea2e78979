"""The methods of training in whole runs: what they leave behind, how they go on, what is refused."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import main
from tests.main.runs import done_in
from tests.utils.checkpoint.malicious import Malicious
from utils.checkpoint.archive import read as read_checkpoint
from utils.config.resolve import read

TINY = "--dataset fake --width_alpha 0.125 --input_size 16 -b 8 --fake_size 32 --lr 0.05 --lr_policy sgdr"
FP = f"{TINY} --keyword cifar10,cbas,origin"
LSQ = (
    f"{TINY} --keyword cifar10,cbas,origin,dorefa,lsq --fm_enable --wt_enable --fm_bit 2 --wt_bit 2 --re_init"
)
TEACHER = "--distill_teacher resnet20 --distill_pretrained teacher-checkpoint.pth.tar"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoint of a full-precision network."""
    return done_in(tmp_path_factory.mktemp("teacher"), f"{FP} --epochs 1 --case teacher")


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs write below the current folder."""
    monkeypatch.chdir(tmp_path)


def have(teacher: Path) -> str:
    """Options of a distillation from the teacher in another folder."""
    path = teacher / "weights" / "resnet20" / "teacher-checkpoint.pth.tar"
    return TEACHER.replace("teacher-checkpoint.pth.tar", str(path))


def run(line: str, case: str) -> None:
    assert main.main([*line.split(), "--case", case]) == 0


def payload(case: str, kind: str = "checkpoint") -> dict[str, Any]:
    return read_checkpoint(Path("weights/resnet20") / f"{case}-{kind}.pth.tar")


def rows(case: str) -> list[dict[str, float]]:
    with (Path("exp") / case / "metrics.csv").open(encoding="utf-8", newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def everything(value: Any) -> list[Any]:
    """The tensors and numbers of a checkpoint's part, in order."""
    if isinstance(value, dict):
        return [part for name in sorted(value) for part in (name, *everything(value[name]))]
    return [value.tolist() if isinstance(value, torch.Tensor) else value]


def test_all_of_them_continue_exactly(teacher: Path) -> None:
    """A run that goes on from the middle ends with the bits of the one that was not stopped."""
    line = (
        f"{LSQ} {have(teacher)} --epochs 4 --ema_decay 0.9 --freeze_threshold 0.2,0.05 --freeze_momentum 0.3 "
        "--dampen 0.01 --quant_loss 0.1 --focal_gamma 1.5 --bn_batches 1"
    )
    run(f"{line} -s 2", "whole")
    run(f"{line} --resume_file weights/resnet20/whole-epoch2-checkpoint.pth.tar", "rest")
    whole, rest = payload("whole"), payload("rest")
    for part in ("state_dict", "optimizer", "methods"):
        assert everything(whole[part]) == everything(rest[part]), part
    assert whole["methods"]["average"]["steps"] == 16
    assert rows("whole")[3]["frozen"] == rows("rest")[-1]["frozen"] > 0
    assert rows("whole")[3]["ema_loss"] == rows("rest")[-1]["ema_loss"]


def test_averaged_weights_are_evaluated_and_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    """`--ema_weights` loads what the run has evaluated beside its network, and -r evaluates both."""
    run(f"{LSQ} --epochs 2 --ema_decay 0.9", "ema")
    last = rows("ema")[-1]
    assert last["ema_loss"] != last["val_loss"]
    for options, name in (("", "val"), ("--ema_weights", "ema")):
        line = f"{LSQ} -e --pretrained ema-checkpoint.pth.tar {options}".replace("--re_init", "")
        run(line, "evaluation")
        assert f"loss {last[f'{name}_loss']:.4f}" in capsys.readouterr().out
    run(f"{LSQ} -e -r".replace("--re_init", ""), "ema")
    said = capsys.readouterr().out
    assert f"loss {last['val_loss']:.4f}\n" in said
    assert "averaged weights: top-1" in said and f"loss {last['ema_loss']:.4f}\n" in said


def test_an_average_that_is_not_continued_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    """A resumed run without `--ema_decay` validates no average of long ago."""
    run(f"{LSQ} --epochs 1 --ema_decay 0.9", "ema")
    run(f"{LSQ} --epochs 2 -r", "ema")
    first, second = rows("ema")
    assert first["ema_loss"] == first["ema_loss"] and second["ema_loss"] != second["ema_loss"]  # nan
    assert payload("ema")["methods"]["average"] == {}
    assert "--ema_decay was 0.9 and is 0.0 now" in capsys.readouterr().out


def test_averaging_changes_no_training() -> None:
    """The network beside the average is the one without it."""
    run(f"{LSQ} --epochs 2", "plain")
    run(f"{LSQ} --epochs 2 --ema_decay 0.9 --bn_batches 0", "ema")
    assert everything(payload("plain")["state_dict"]) == everything(payload("ema")["state_dict"])


def test_distillation_learns_without_labels(teacher: Path) -> None:
    """With the teacher alone the network comes near to it, whatever the labels are."""
    line = f"{FP} {have(teacher)} --epochs 6 --distill_loss_alpha 1 --lr 0.1"
    run(line, "pupil")
    losses = [row["train_loss"] for row in rows("pupil")]
    assert losses[-1] < 0.5 * losses[0]


def test_the_teacher_is_the_same_network_in_full_precision(teacher: Path) -> None:
    """Without keywords of its own it has the network's, without the quantizers'."""
    config = read(f"{LSQ} {have(teacher)}".split())
    assert config.loss.distill is not None
    theirs = config.loss.distill.teacher
    assert theirs.block == config.model.block and theirs.width_alpha == config.model.width_alpha
    assert not theirs.quant.enabled
    other = read(
        f"{LSQ} {have(teacher)} --distill_keyword cifar10,cbsa --distill_width_alpha 0.5".split()
    ).loss.distill
    assert other is not None and other.teacher.block.order == "cbsa" and other.teacher.width_alpha == 0.5


def test_freezing_goes_on_where_a_policy_turns_weights_off() -> None:
    """A resumed run finds the layers that are off, and ends as the one that was not stopped."""
    Path("off.yaml").write_text(
        "epoch:\n  - {at: 1, tag: wt, enable: false}\n  - {at: 3, tag: wt, enable: true}\n"
    )
    line = f"{LSQ} --epochs 4 --freeze_threshold 0.05 --freeze_momentum 0.3 --policy off.yaml"
    run(f"{line} -s 2", "whole")
    run(f"{line} --resume_file weights/resnet20/whole-epoch2-checkpoint.pth.tar", "rest")
    assert everything(payload("whole")["state_dict"]) == everything(payload("rest")["state_dict"])
    assert [row["frozen"] > 0 for row in rows("whole")][:3] == [True, False, False]


def test_evaluating_needs_no_teacher(teacher: Path) -> None:
    line = f"{FP} -e --pretrained none --distill_teacher resnet20 --distill_pretrained gone.pth"
    assert main.main(line.split()) == 0


def test_code_in_a_teachers_file_is_refused_and_not_run(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = torch.load(teacher / "weights" / "resnet20" / "teacher-checkpoint.pth.tar", weights_only=True)
    path, trace = tmp_path / "evil.pth.tar", tmp_path / "trace"
    torch.save({**whole, "x": Malicious(f"touch {trace}")}, path)
    line = f"{LSQ} --distill_teacher resnet20 --distill_pretrained {path} --case pupil"
    assert main.main(line.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"main.py: error: {path}: refused, because it holds ") and error.count("\n") == 1
    assert not trace.exists()
    torch.load(path, weights_only=False)  # it would have
    assert trace.exists()


def test_a_teacher_of_one_width_takes_it() -> None:
    """The network's width is not the teacher's where that has none."""
    distill = read(f"{LSQ} {TEACHER} --distill_teacher torchvision:resnet18".split()).loss.distill
    assert distill is not None and distill.teacher.width_alpha == 1


def test_another_teacher_does_not_go_on(teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The teacher is part of what a resumed run must find again."""
    run(f"{LSQ} {have(teacher)} --epochs 2 -s 1", "pupil")
    run(f"{FP} --epochs 1 --seed 1", "another")
    line = f"{LSQ} {TEACHER.replace('teacher-checkpoint', 'another-checkpoint')} --epochs 3 -r --case pupil"
    assert main.main(line.split()) == 2
    assert "learned from other weights" in capsys.readouterr().err


def test_dampened_weights_are_nearer_to_their_levels() -> None:
    """The effect in a network: the quantization error of its weights shrinks."""
    errors = {}
    for case, options in (("plain", ""), ("dampened", "--dampen 1"), ("pulled", "--quant_loss 30")):
        run(f"{LSQ} --epochs 3 {options}", case)
        state = payload(case)["state_dict"]
        total = 0.0
        for name in state:
            if name.endswith("quant_weight.clip_val"):
                weight, clip = state[name.replace("quant_weight.clip_val", "weight")], state[name].abs()
                level = (2 * torch.round(3 * ((weight / clip).clamp(-1, 1) + 1) / 2) / 3 - 1) * clip
                total += float(((weight - level) ** 2).sum() / (weight**2).sum())
        errors[case] = total
    assert errors["dampened"] < 0.8 * errors["plain"] and errors["pulled"] < 0.8 * errors["plain"]


def test_what_is_recorded() -> None:
    """The configuration of a run says which methods it had."""
    run(f"{LSQ} --epochs 1 --focal_gamma 2 --freeze_threshold 0.04,0.01", "said")
    said = yaml.safe_load(Path("exp/said/config.yaml").read_text(encoding="utf-8"))
    assert said["loss"]["focal_gamma"] == 2 and said["weights"]["freeze_threshold"] == [0.04, 0.01]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--ema_decay 1", "--ema_decay 1.0: must be at least 0 and less than 1"),
        ("--ema_weights", "--ema_weights needs a checkpoint that has them: give --pretrained"),
        ("--freeze_threshold 2", "--freeze_threshold: give one number between 0 and 1, or two"),
        ("--freeze_threshold 0.1,0.1,0.1", "--freeze_threshold: give one number between 0 and 1, or two"),
        ("--freeze_threshold 0.1 --freeze_momentum 0", "--freeze_momentum 0.0: must be between 0 and 1"),
        ("--focal_gamma -1", "--focal_gamma -1.0: must be a number that is not negative"),
        ("--focal_alpha 0", "--focal_alpha 0.0: must be a number greater than 0"),
        ("--dampen nan", "--dampen nan: must be a number that is not negative"),
        ("--quant_loss inf", "--quant_loss inf: must be a number that is not negative"),
        ("--distill_width_alpha 0.5", "--distill_width_alpha needs a teacher: give --distill_teacher"),
        ("--distill_teacher resnet20", "--distill_teacher needs its weights: give --distill_pretrained"),
        (f"{TEACHER} --distill_loss_alpha 1.5", "--distill_loss_alpha 1.5: must be above 0 and at most 1"),
        (
            f"{TEACHER} --distill_loss_temperature 0",
            "--distill_loss_temperature 0.0: must be a number greater",
        ),
        (
            f"{TEACHER} --distill_keyword nrelu",
            "--distill_teacher resnet20: --keyword: unknown keyword 'nrelu', did you mean NReLU",
        ),
        (
            f"{TEACHER} --distill_keyword cifar100,cbas",
            "--distill_teacher resnet20 has 100 classes, the network 10",
        ),
        (
            f"{TEACHER} --distill_keyword cifar10,cbas,dorefa,lsq",
            "a teacher is in full precision; leave dorefa, lsq",
        ),
        (TEACHER, "--distill_pretrained teacher-checkpoint.pth.tar"),
        ("--re_init_range median", "--re_init_range"),
        ("--re_init_range percentile --re_init_percentile 0", "--re_init_percentile 0.0: must be above 0"),
        (
            "--wt_adaptive var-mean --dampen 1",
            "--dampen 1.0: --wt_adaptive var-mean leaves the levels at another",
        ),
        (
            "--wt_adaptive mean --wt_adaptive_restore --freeze_threshold 0.1",
            "--freeze_threshold 0.1: frozen weights would move",
        ),
    ],
)
def test_mistakes(options: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line that says what to write instead; nothing is written."""
    assert main.main(f"{LSQ} {options}".split()) == 2
    said = capsys.readouterr().err
    assert said.startswith("main.py: error: ") and said.count("\n") == 1 and message in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--dampen 1", "--quant_loss 1", "--freeze_threshold 0.1"])
@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ("dorefa", "the levels of dorefa are of another scale"),
        ("", "no weight is quantized; add --wt_enable"),
    ],
)
def test_penalties_need_levels_of_the_weights_own_scale(
    option: str, keywords: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = f"{TINY} --keyword cifar10,cbas,origin,{keywords} {'--wt_enable' if keywords else ''} {option}"
    assert main.main(line.split()) == 2
    assert message in capsys.readouterr().err


def test_a_teacher_that_does_not_exist(teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"{LSQ} {have(teacher)} --distill_teacher resnet21"
    assert main.main(line.split()) == 2
    said = capsys.readouterr().err
    assert "--distill_teacher: --model resnet21: no such network" in said and said.count("\n") == 1


def test_a_teacher_of_another_width(teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(f"{LSQ} {have(teacher)} --distill_width_alpha 0.25".split()) == 2
    said = capsys.readouterr().err
    assert "--distill_pretrained" in said and said.count("\n") == 1
