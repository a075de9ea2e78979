"""Shell configs as the earlier public implementation's users have them, run with their data and length replaced."""

from __future__ import annotations

import dataclasses
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import main
from tests import ROOT
from utils.config import command_line, options
from utils.config.resolve import read

# What someone who tries a config without its data and its GPUs writes behind it.
TRY = "--dataset fake --epochs 1 --fake_size 8 -b 4 -v 4 --input_size 64"


@dataclasses.dataclass(frozen=True)
class Old:
    """One config.

    Attributes:
        keyword: its list of words.
        options: appended to `options`, a line each.
        model: the network.
        dataset: the data set that it was written for.
        base: the number of branches.
        epochs: the length of its schedule.
        warnings: a part of each warning that a shortened run gives, besides the one about the missing GPU.
    """

    keyword: str
    options: tuple[str, ...] = ()
    model: str = "resnet18"
    dataset: str = "imagenet"
    base: int = 1
    epochs: int = 90
    warnings: tuple[str, ...] = ()

    def text(self, case: str) -> str:
        """The file: settings behind a space, remarks, and options line by line."""
        settings = {
            "dataset": f"'{self.dataset}'", "root": f"$FASTDIR/data/{self.dataset}", "model": f"'{self.model}'",
            "base": self.base, "epochs": self.epochs, "train_batch": 256, "val_batch": 50, "case": f"'{case}'",
            "keyword": f"'{self.keyword}'", "pretrained": "'none'",
        }  # fmt: skip
        lines = ["#!/bin/bash", "# a remark", *(f" {name}={value}" for name, value in settings.items())]
        lines += ["#case='switched off'", "", ' options="$options -j4 -g0"']
        lines += [f' options="$options {line}"' for line in self.options]
        return "\n".join(lines) + "\n"


TWO_BITS = "--fm_bit 2 --fm_enable --wt_bit 2 --wt_enable"
ONE_BIT = "--fm_bit 1 --fm_enable --wt_bit 1 --wt_enable --padding_after_quant"
OFFICIAL = "imagenet,origin,cbsa,fix_pooling,singleconv,fix"
BEYOND = "falls away, since --epochs 1 replaces"

CONFIGS = {
    "full-precision": Old(
        OFFICIAL,
        ("--lr 0.1 --wd 1e-4 --nesterov", "--lr_policy custom_step --lr_custom_step 30,60,80 --lr_decay 0.1"),
        warnings=(f"30,60,80 {BEYOND} 90",),
    ),
    "dali-bottlenecks": Old(
        OFFICIAL,
        ("--verbose --tensorboard --decay_small", "--lr_policy sgdr --lr_custom_step 8,24 --eta_min 1e-6"),
        model="resnet50", dataset="dali", epochs=56, warnings=(f"8,24 {BEYOND} 56",),
    ),
    "lsq": Old(
        f"{OFFICIAL},dorefa,lsq",
        (
            "--fm_bit 2 --fm_enable --fm_quant_group 1 --wt_bit 2 --wt_enable --wt_quant_group 1",
            "--wt_adaptive var-mean --wt_grad_type STE-scale --grad_clip 5 --lr_policy poly --lr_decay 1",
        ),
        warnings=("--wt_grad_type STE-scale has no effect with lsq",),
    ),
    "no data set's keyword": Old("origin,cbsa,fix,dorefa,lsq", (TWO_BITS,), dataset="dali"),
    "spaces in the list": Old("imagenet, origin, cbas, dorefa, lsq", (TWO_BITS,)),
    "dashes": Old("imagenet,origin,cbas,dorefa,lsq", ("--fm-bit 2 --fm-enable --iter-size 2 --lr-policy cos",)),
    "quoted lists": Old(
        "imagenet,origin,cbas,pact",
        (TWO_BITS, "--custom_decay_list 'clip_val,bn' --custom_decay 1e-4 --lr_custom_step '30,60'"),
        warnings=(f"30,60 {BEYOND} 90",),
    ),
    "steps beyond its own epochs": Old(
        "imagenet,origin,cbas,pact", (TWO_BITS, "--fm_boundary 8 --lr_custom_step 30,60,95"),
        warnings=(f"30,60,95 {BEYOND} 90",),
    ),
    "warm-ups": Old(
        "imagenet,origin,cbas,dorefa,lsq",
        (TWO_BITS, "--stable 500 --fm_correlate 1.0 --wt_correlate 0.6 --warmup_epoch 2 --wakeup_epoch 3"),
        warnings=("--stable: the shortened run of 2 iterations takes 1 of 500", "--warmup: the shortened run",
                  "--wakeup_epoch: the shortened run of 2 iterations takes 1 of 6"),
    ),
    "stable for epochs": Old(
        "imagenet,origin,cbas,dorefa,lsq", (TWO_BITS, "--stable_epoch 1 --extra_epoch 2 --lr_policy decay")
    ),
    "dorefa": Old(
        "imagenet,origin,bacs,preBN,dorefa",
        (TWO_BITS, "--fm_boundary 1.0 --wt_boundary 1.0 --lr_policy fix_step --lr_fix_step 30"),
        warnings=("--wt_boundary has no effect with dorefa",),
    ),
    "lq": Old(
        "imagenet,origin,bacs,preBN,custom-update,lq",
        (TWO_BITS, "--wt_adaptive mean-var --custom_lr_list basis --custom_lr 1e-3"),
        warnings=("--custom_lr_list: basis has no effect",),
    ),
    "fatnn": Old(
        f"{OFFICIAL},real_skip,dorefa,non-uniform",
        (
            "--fm_bit 2 --fm_level 3 --fm_enable --fm_scale 1.0",
            "--wt_bit 2 --wt_level 3 --wt_enable --wt_scale 1.0 --wt_quant_group 1 --wt_adaptive var-mean",
        ),
    ),
    "torchvision's": Old(
        "imagenet,dorefa,fm_non-uniform,wt_lsq", (TWO_BITS, "--fm_scale 3.0 --wt_quant_group 1"),
        model="pytorch-resnet18",
    ),
    "first and last": Old(
        "imagenet,dorefa,first-last", (TWO_BITS,),
        model="pytorch-resnet18", warnings=("conv1 reads the images with levels that start at zero: ",),
    ),
    "xnor": Old(
        "imagenet,NReLU,fix_pooling,origin,cbsa,singleconv,real_skip,xnor",
        (ONE_BIT, "--fm_grad_type STE --optimizer ADAM --lr 1e-3 --wd 0 --nesterov"),
        warnings=("--nesterov has no effect with --optimizer ADAM",),
    ),
    "bireal": Old(
        "imagenet,NReLU,fix_pooling,cbsa,singleconv,real_skip,xnor",
        (ONE_BIT, "--fm_grad_type Triangle --fm_custom none --optimizer Adam --lr 1e-3"),
        dataset="dali",
    ),
    "group-net": Old(
        "imagenet,cabs,fix,group-net,singleconv,xnor",
        (ONE_BIT, "--wt_quant_group 1 --lr_policy sgdr_step --lr_custom_step 10,20 --width_alpha 0.25"),
        base=5, warnings=(f"10,20 {BEYOND} 90",),
    ),
    "fixup": Old(
        "imagenet,origin,cbsa,fix,fixup,bias,singleconv,label-smooth",
        ("--custom_lr_list fixup_bias,fixup_scale --custom_lr 0.01",),
    ),
    "weights only": Old(
        "imagenet,origin,cbas,dorefa,lsq", ("--fm_bit 32 --wt_enable --wt_bit 2",),
        warnings=("--fm_bit has no effect without --fm_enable",),
    ),
    "idle numbers": Old(
        "imagenet,origin,cbas,dorefa,lsq,debug",
        (TWO_BITS, "--fm_ratio 0.9 --custom_lr 0.01 --custom_decay 0.0 --momentum 0.9"),
        warnings=(
            "--custom_lr has no effect", "--custom_decay has no effect", "--fm_ratio has no effect",
        ),
    ),
    "output levels": Old(
        f"{OFFICIAL},dorefa,lsq,ot_lsq", (TWO_BITS, "--ot_enable --ot_bit 8 --ot_half_range")
    ),
    "group-norm": Old("imagenet,origin,cbas,group-norm,dorefa", (TWO_BITS, "--fm_quant_group 4")),
    "space to depth": Old(
        "imagenet,origin,cbsa,fix,TResNetStem,ReShapeResolution,dorefa,lsq", (TWO_BITS, "--order cb"),
        warnings=("the levels of 3 of 19 activation quantizers start at zero",),  # it leaves an activation out
    ),
    "prone": Old("imagenet,origin,cbsa,fix,prone,no_prone_downsample,dorefa,lsq", (TWO_BITS,)),
    "cifar": Old(
        "cifar100,origin,cbsa,fix,dorefa,lsq",
        (TWO_BITS, "--width_alpha 0.25 --lr_custom_step 60,120,160 --lr_decay 0.2"),
        model="resnet20", dataset="cifar100", epochs=200, warnings=(f"60,120,160 {BEYOND} 200",),
    ),
    "bit as a number with a point": Old(
        "imagenet,origin,cbas,dorefa,lsq",
        ("--fm_bit 2.0 --fm_enable --wt_bit 2. --wt_enable --report_freq 20.0", "--policy none --fm_custom none"),
    ),
    "words that set nothing": Old(
        "imagenet,dorefa,lsq,save,raw,mean,pretrain", (TWO_BITS, "-e"), model="pytorch-resnet50",
        warnings=tuple(f"the keyword {word} has no effect" for word in ("save", "raw", "mean", "pretrain")),
    ),
    "a word of another method": Old(
        "imagenet,origin,preBN,bacs,custom-update,debug,dorefa", (TWO_BITS, "--fp16 --opt_level O1"),
        warnings=("custom-update has no effect on fm", "custom-update has no effect on wt"),
    ),
    "an order without its keyword": Old(
        "cifar100,origin,cbsa,fix,dorefa,lsq", (TWO_BITS, "--order c --width_alpha 0.25"), model="resnet20",
        dataset="cifar100", warnings=("--order has no effect without the keyword ReShapeResolution",),
    ),
    "options that are gone": Old(
        "imagenet,origin,cbas,dorefa,lsq,proxquant",
        (TWO_BITS, "--fm_separator 0.38 --wt_separator 0.38 --block_alpha 1.0 --se_reduction 16 --ps 5"),
        warnings=(
            "--fm_separator has no effect here", "--wt_separator has no effect here",
            "--block_alpha has no effect here", "--se_reduction has no effect here",
        ),
    ),
    "evaluated and continued": Old(
        "imagenet,dorefa,fm_non-uniform,wt_lsq", (TWO_BITS, "-e -r"), model="pytorch-resnet18"
    ),
    "mobilenet": Old(
        "imagenet,origin,cbas", ("--decay_small --lr_policy sgdr --lr_custom_step 120 --eta_min 1e-6",),
        model="mobilenetv1", epochs=120,
        warnings=("origin has no effect", f"120 {BEYOND} 120"),
    ),
    "none with a capital": Old("imagenet,origin,cbas", ("--pretrained None",)),
    "evaluation": Old("imagenet,origin,cbas,dorefa,lsq", ("-e", TWO_BITS, "--stable 100")),
    "to be continued": Old("imagenet,origin,cbas", ("-r -s 10 --report_freq 200 --no_decay_small",)),
}  # fmt: skip


# Defaults that the earlier parser had, and forms that it took: what is written, and the warning if there is one.
# The networks have the words imagenet,origin,cbas,dorefa,lsq and 2 bits.
LEGAL = {
    "--probe_index 0 1 2": "", "--probe_list ''": "", "--save_freq -1": "", "-s -1": "", "--order none": "",
    "--opt_level O0": "", "--opt_level O1": "--opt_level has no effect without --fp16", "--stem_kernel 1": "",
    **{f"--{tag}_quant_group 0": "" for tag in ("fm", "wt")},
    **{f"--{tag}_level {value}": "" for tag in ("fm", "wt") for value in (-1, 0)},
    "--world_size 1 --rank 0": "", "--device-ids 0": "", "--policy none": "", "--base 1 --width_alpha 1.0": "",
    "--resume_file checkpoint.pth.tar": "--resume_file has no effect here", "--pretrained ''": "",
    "--resume_file checkpoint.pth.tar -r": "", "--weights_dir ./weights/ --log_dir exp": "",
    "--distill_teacher ''": "",
    "--distill_loss_alpha 0.1": "--distill_loss_alpha has no effect without --distill_teacher",
    "--distill_loss_temperature 5": "--distill_loss_temperature has no effect without --distill_teacher",
    "--distill_loss_type soft": "--distill_loss_type has no effect without --distill_teacher",
    "--focal_alpha -1": "", "--focal_alpha -1.": "", "--focal_gamma 2 --focal_alpha -1e0": "",
    "--custom_lr_list clip_val": "--custom_lr_list without --custom_lr: it is 1e-05",
    "--custom_decay_list clip_val": "--custom_decay_list without --custom_decay: it is 0.02",
    "--custom_lr_list '' --custom_decay_list ''": "",
    "--wakeup_lr 0.01": "--wakeup_lr has no effect here", "--repvgg_block ''": "",
    "--repvgg_block a": "--repvgg_block has no effect here", "--fm_correlate -1.": "--fm_correlate has no effect",
    "--fm_adaptive none --fm_grad_type none --fm_grad_scale none --fm_custom none": "",
    "--delay 0 --extra_epoch 0 --stable 0 --wakeup 0 --momentum 0.9 --report_freq 20.0": "",
}  # fmt: skip


def train(
    config: Path, *arguments: str, modes: tuple[str, ...] = (), python: str = sys.executable
) -> subprocess.CompletedProcess[str]:
    """Run train.sh on a config."""
    inherited = {
        name: value for name, value in os.environ.items() if name not in ("NPROC", "TORCHRUN", "FASTDIR")
    }
    return subprocess.run(
        ["bash", str(ROOT / "train.sh"), *modes, str(config), *arguments],
        env={**inherited, "PYTHON": python, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )  # fmt: skip


@pytest.fixture
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs write below the current folder."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("in_a_folder_of_its_own")
@pytest.mark.parametrize("name", CONFIGS)
def test_an_old_config(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A dry run takes it, and its warnings are those expected."""
    config = tmp_path / "config.old"
    config.write_text(CONFIGS[name].text("old"), encoding="utf-8")
    printed = train(config, *TRY.split(), "--dry_run", modes=("--print",))
    assert (printed.returncode, printed.stderr) == (0, "")
    status = main.main(shlex.split(printed.stdout)[2:])
    done = capsys.readouterr()
    assert (status, done.err) == (0, "")
    lines = done.out.splitlines()
    found = [line for line in lines if line.startswith("warning: ") and "no GPU is available" not in line]
    evaluates = any("-e" in options.split() for options in CONFIGS[name].options)
    expected = (
        *CONFIGS[name].warnings,
        *(["no checkpoint is given"] if evaluates else []),
    )  # that of the test has none
    assert len(found) == len(expected), found
    assert all(part in line for part, line in zip(expected, found, strict=True))
    assert lines[-1] == "dry run: everything checked, nothing trained"
    assert list(tmp_path.iterdir()) == [config]


@pytest.mark.usefixtures("in_a_folder_of_its_own")
@pytest.mark.parametrize("written", LEGAL)
def test_a_legal_form_of_an_old_option(written: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It runs and changes nothing that its warning does not say."""
    line = f"--model resnet20 --keyword imagenet,origin,cbas,dorefa,lsq {TWO_BITS} {TRY} --dry_run"
    assert main.main([*line.split(), *shlex.split(written)]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = [one for one in lines if one.startswith("warning: ") and "no GPU is available" not in one]
    assert len(found) == bool(LEGAL[written])
    assert all(LEGAL[written] in one for one in found)


@pytest.mark.parametrize(
    ("written", "taken"),
    [
        ("--probe_index 0 1 2", {"probe_index": (0, 1, 2)}),
        ("--probe_index 0,1 2", {"probe_index": (0, 1, 2)}),
        ("--fm_level 3 --fm_level -1", {"fm_level": None}),
        ("--save_freq -1", {"save_freq": 0}),
        ("--focal_alpha -1.", {"focal_alpha": 1.0}),
        ("--focal_alpha -0.5", {"focal_alpha": -0.5}),
        ("--distill_loss_type soft", {"distill_loss_type": "kl"}),
        ("--probe_list ''", {"probe_list": ()}),
        ("--order none", {"order": None}),
    ],
)
def test_what_a_legal_form_means(written: str, taken: dict[str, object]) -> None:
    """Values that mean "not given" are not given, and take earlier ones back."""
    given = command_line.parse(shlex.split(written))
    assert {name: given[name] for name in taken} == taken
    defaults = {name: options.OPTIONS[name].default for name in taken}
    assert given.explicit == {name for name in taken if taken[name] != defaults[name] or "soft" in written}


@pytest.mark.usefixtures("in_a_folder_of_its_own")
def test_a_checkpoint_of_the_older_defaults_name_is_taken(tmp_path: Path) -> None:
    """When it is there."""
    line = "--keyword cifar10,cbas --resume_file checkpoint.pth.tar"
    assert read(line.split()).run.resume_file is None
    (tmp_path / "checkpoint.pth.tar").touch()
    assert read(line.split()).run.resume_file == Path("checkpoint.pth.tar")


@pytest.mark.usefixtures("in_a_folder_of_its_own")
def test_warm_ups_of_a_shortened_run_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Half of the run is left to the optimizer and to the quantizers, as the audit sees."""
    options = f"{TWO_BITS} --stable 500 --warmup 100 --width_alpha 0.125 --input_size 16"
    line = f"--epochs 9 --keyword cifar10,origin,cbas,dorefa,lsq {options} --dataset fake --fake_size 8 -b 4"
    assert main.main([*line.split(), "--epochs", "1"]) == 0
    assert "passed: 40 quantizers" in capsys.readouterr().out
    assert main.main(line.replace("--epochs 9", "--epochs 1").split()) == 2
    assert "--stable: a warm-up of 500 iterations is the whole run of 2" in capsys.readouterr().err


def test_a_missing_checkpoint_stays_an_error(tmp_path: Path, interpreter: str) -> None:
    """The line says to write `--pretrained none`, and with it the config runs."""
    config = tmp_path / "config.old"
    text = CONFIGS["cifar"].text("old").replace("pretrained='none'", "pretrained='weights/fp.pth.tar'")
    config.write_text(text, encoding="utf-8")
    where = [*TRY.split(), "--log_dir", str(tmp_path / "exp"), "--weights_dir", str(tmp_path / "weights")]
    done = train(config, *where, python=interpreter)
    assert done.returncode == 2
    assert done.stderr.startswith("main.py: error: --pretrained weights/fp.pth.tar: no such file")
    assert "write 'none' to start without" in done.stderr
    done = train(config, *where, "--pretrained", "none", python=interpreter)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "weights" / "resnet20" / "old-checkpoint.pth.tar").exists()
