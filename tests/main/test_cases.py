"""One case after another: what a run starts from, and what it leaves alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tests.main.runs import FP, LSQ, assert_same, call, checkpoint, done_in, log_of, metrics, summary
from utils.checkpoint.archive import read as read_checkpoint
from utils.checkpoint.archive import save as save_checkpoint


@pytest.fixture(scope="module")
def four_bit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a four-bit run of one epoch."""
    line = f"{LSQ} --fm_bit 4 --wt_bit 4 --case four --epochs 1"
    folder = done_in(tmp_path_factory.mktemp("four"), line)
    return folder / "weights" / "resnet20" / "four-checkpoint.pth.tar"


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


@pytest.mark.parametrize("option", ["--re_init", "--re_init_missing", "--re_init --re_init_missing"])
def test_a_second_step_keeps_what_the_first_has_learned(tmp_path: Path, option: str) -> None:
    """Activations first, then weights: with --re_init alone the clip values of activations are found anew."""
    assert call(f"{LSQ} --bits 32/2 --case first --epochs 1 --re_init --lr 0.1") == 0
    line = f"{LSQ} --case second --epochs 1 --lr 0 --pretrained first-checkpoint.pth.tar {option}"
    assert call(line) == 0
    old, new = checkpoint(tmp_path, "first")["state_dict"], checkpoint(tmp_path, "second")["state_dict"]
    of_activations = [name for name in old if name.endswith("quant_activation.clip_val")]
    same = [torch.equal(old[name], new[name]) for name in of_activations]
    kept = "missing" in option
    assert len(same) == 20 and (all(same) if kept else not any(same))
    weights = [name for name in new if name.endswith("quant_weight.clip_val")]
    assert len(weights) == 20 and not any(bool((new[name] == 1).any()) for name in weights)  # found, not 1
    log = log_of(tmp_path, "second")
    assert f"re_init: initialised {20 if kept else 40} quantizers" in log
    assert ("re_init_missing: 20 quantizers keep what they have learned" in log) is kept


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
    assert error.count("\n") == 1 and "at 16 levels, and the options say 4: write --bits 4" in error
    assert not any(tmp_path.iterdir())


def test_another_cases_checkpoint_does_not_overwrite_this_case(tmp_path: Path) -> None:
    assert call(f"{LSQ} --case src --epochs 2 --save_freq 1") == 0
    assert call(f"{LSQ} --case dst --epochs 2 --seed 2") == 0
    before = (tmp_path / "weights" / "resnet20" / "dst-checkpoint.pth.tar").read_bytes()
    source = "weights/resnet20/src-epoch1-checkpoint.pth.tar"
    assert call(f"{LSQ} --case dst --epochs 2 --resume_file {source}") == 0
    assert (tmp_path / "weights" / "resnet20" / "dst.1-checkpoint.pth.tar").read_bytes() == before


def test_unresume_scope(tmp_path: Path, lsq: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The classifier of another data set is left out and starts anew; the network is evaluated with all that it has."""
    path = lsq / "weights" / "resnet20" / "lsq-checkpoint.pth.tar"
    line = f"{LSQ} --num_classes 7 --case other --epochs 1 --lr 0 --pretrained {path}"
    assert call(line) == 2
    assert "--unresume_scope fc leaves these out" in capsys.readouterr().err
    assert call(f"{line} --unresume_scope fc") == 0
    trained = f"{line} --unresume_scope fc -e --case eval --pretrained other-checkpoint.pth.tar"
    assert call(trained) == 2
    assert "an evaluation needs the whole network" in capsys.readouterr().err
    assert call(f"{trained} --unresume_scope none") == 0
    assert f"top-1 {float(metrics(tmp_path, 'other')[0]['val_top1']):.2f}" in capsys.readouterr().out
    state, old = checkpoint(tmp_path, "other")["state_dict"], checkpoint(lsq, "lsq")["state_dict"]
    assert state["fc.weight"].shape == (7, 32)
    assert torch.equal(state["layer1.0.conv1.0.weight"], old["layer1.0.conv1.0.weight"])


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


UNTRAINED = "normalise by mean 0 and variance 1, which no training found"


@pytest.mark.parametrize("word", ["static-bn", "freeze-bn"])
def test_fixed_statistics_come_from_batch_norms(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], word: str
) -> None:
    """Of a checkpoint with batch norms, which a teacher that inherits the word takes too."""
    file = "weights/resnet20/fp-checkpoint.pth.tar"
    taught = f"--distill_teacher resnet20 --distill_pretrained {file}"
    done_in(
        tmp_path, f"{FP} --epochs 1 --case fp",
        f"{FP},{word} --pretrained {file} --epochs 1 --case fixed {taught}",
    )  # fmt: skip
    before, after = (checkpoint(tmp_path, case)["state_dict"] for case in ("fp", "fixed"))
    statistics = [name for name in after if "running_" in name]
    assert len(statistics) == 2 * 21
    assert all(torch.equal(before[name], after[name]) for name in statistics)
    log = log_of(tmp_path, "fixed")
    assert "21 obsolete" in log and UNTRAINED not in log
    for options, warns in (("", True), (f"--pretrained {file}", False)):
        capsys.readouterr()
        done_in(tmp_path, f"{FP},{word} --dry_run {options}")
        assert (UNTRAINED in capsys.readouterr().out) is warns


def test_layers_in_full_precision_are_those_of_the_training(
    tmp_path: Path, lsq: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In an evaluation; a training may resume with others, and then looks for the best one anew."""
    shutil.copytree(lsq, tmp_path, dirs_exist_ok=True)
    path = "weights/resnet20/lsq-checkpoint.pth.tar"
    payload = checkpoint(tmp_path, "lsq")
    save_checkpoint(tmp_path / path, {**payload, "best_acc": 99.0})
    for source in (f"--pretrained {path}", f"--resume_file {path}", "-r --case lsq"):
        assert call(f"{LSQ} -e {source} --full_precision layer3.*") == 2
        assert "layer3.0.conv1.0, " in (error := capsys.readouterr().err)
        assert error.endswith(": leave --full_precision out\n") and error.count("\n") == 1
    assert call(f"{LSQ} --case lsq --epochs 3 --re_init -r --full_precision layer3.*") == 0
    assert "--full_precision was none and is layer3.* now" in log_of(tmp_path, "lsq")
    assert checkpoint(tmp_path, "lsq")["best_acc"] < 99
    assert call(f"{LSQ} -e -r --case lsq --full_precision layer3.*") == 0
