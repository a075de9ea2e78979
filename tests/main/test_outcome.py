"""The program as a whole: real runs on a few small images, from the command line to the files they leave."""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
import yaml

import main
from tests.main.runs import (
    FP,
    LSQ,
    TINY,
    assert_same,
    assert_same_run,
    call,
    checkpoint,
    done_in,
    files,
    log_of,
    metrics,
    summary,
)
from utils.config.recorded import to_dict
from utils.config.resolve import read as read_config

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
    rows = [line.split(maxsplit=3) for line in lines if ".quant_" in line]
    assert len(rows) == 2 * 20  # weights and activations of the 18 convolutions in blocks and of 2 shortcuts
    assert all(
        2 <= int(seen) <= 4 and (allowed, verdict.partition(",")[0]) == ("4", "ok")
        for _, seen, allowed, verdict in rows
    )
    levels = [
        value for name, value in checkpoint(lsq, "lsq")["state_dict"].items() if name.endswith("level_num")
    ]
    assert [int(value) for value in levels] == [4] * 40


def test_tensorboard_shows_the_metrics(lsq: Path) -> None:
    """The curves are the columns of the metrics file."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(lsq / "exp" / "lsq" / "tensorboard")).Reload()
    for group, name in (("loss", "train_loss"), ("accuracy", "val_top1"), ("optimizer", "lr")):
        points = [(point.step, point.value) for point in events.Scalars(f"{group}/{name}")]
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
        layer, _, part = row["name"].rpartition(".quant_")
        tag = f"quantizers of {layer}/{part}"
        assert [image.step for image in events.Images(f"{tag} levels")] == [1, 2]
        assert events.Scalars(f"{tag} range")[1].value == pytest.approx(row["range"], rel=1e-5)
        (_, last) = events.Histograms(f"{tag} inputs")
        assert last.histogram_value.num == sum(row["histogram"]["counts"])
    assert {"weights/conv1", "weights/fc"} <= set(tags["histograms"])
    assert {"training images/as given", "training images/denormalised"} <= set(tags["images"])
    assert events.Scalars("outcome/last_top1")[0].value == pytest.approx(summary(lsq, "lsq")["last_top1"])
    options = events.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    assert b"model.quant.fm.levels" in options and b"optim.lr" in options


def test_tensorboard_opens_with_accuracy_and_loss(lsq: Path) -> None:
    """It sorts the groups, the tags' parts before the first slash, and opens two; each layer's quantizers are one."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    tags = accumulator.EventAccumulator(str(lsq / "exp" / "lsq" / "tensorboard")).Reload().Tags()
    cards = [tag for kind in ("scalars", "histograms", "images") for tag in tags[kind]]
    groups = Counter(tag.partition("/")[0] for tag in cards)
    layers = [group for group in sorted(groups) if group.startswith("quantizers of ")]
    assert sorted(groups)[:2] == ["accuracy", "loss"] and len(layers) == 20
    assert sorted(groups)[2:] == [
        "optimizer",
        "outcome",
        "performance",
        *layers,
        "training images",
        "weights",
    ]
    assert max(groups.values()) < 30


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
    """A screen that says what is trained, on what, from what, in how many bits, for how long; and leaves no file."""
    line = f"{LSQ} --lr_policy custom_step --lr_custom_step 3 --epochs 5 --wt_boundary 2 --optimizer adam --nesterov"
    assert call(f"{line} --re_init --dry_run") == 0
    done = capsys.readouterr()
    lines = done.out.splitlines()
    time = lines.pop(7)
    bits = "lsq 2 bit, 4 levels in 20 layers"
    assert lines == [
        "train     resnet20, 69,190 parameters, 10 classes, images of 16 pixels",
        "on        fake: 32 images, 8 for validation; 4 steps an epoch, each of 8 images",
        "from      random weights; clip values from the weights and a batch (--re_init)",
        f"bits      weights: {bits}; inputs: {bits}; full precision: conv1, fc",
        "size      weights 18.6 KiB, 265.6 KiB in float32; 2,578,752 MACs an image, tensors of 24.0 KiB at once",
        "sums      integers of at most 10 bits in 20 layers, the most in layer2.1.conv1.0",
        "schedule  5 epochs, adam, learning rate from epoch 0: 0.05, 3: 0.005",
        "writes    exp/default, weights/resnet20",
        "warning: --nesterov has no effect with --optimizer ADAM",
        "--verbose prints the configuration and what set it, layers, parameter groups and all rates",
        "dry run: everything checked, nothing trained",
    ]
    found = re.fullmatch(
        r"time      estimated (.+) a step, (.+) for all 20 on \w+, without reading images or .*", time
    )
    assert found and all(re.fullmatch(r"[\d.e-]+ (s|min|h|days)", duration) for duration in found.groups())
    assert files(tmp_path) == {} and not any(tmp_path.iterdir())


def test_dry_run_of_a_small_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A step has the images that there are; a run that goes on has the remaining steps."""
    with contextlib.chdir(tmp_path):
        line = f"{FP} --fake_size 6 -b 8 --iter_size 2 --case small"
        assert call(f"{line} --epochs 1 --dry_run") == 0
        first = capsys.readouterr().out
        assert call(f"{line} --epochs 1") == 0
        capsys.readouterr()
        assert call(f"{line} --epochs 3 -r --dry_run") == 0
        resumed = capsys.readouterr().out
    assert "; 1 step an epoch, each of 6 images" in first and "schedule  1 epoch, " in first
    assert " for all 1 on " in first
    assert ", 1 epoch is done\n" in resumed and " for the remaining 2 on " in resumed


def test_dry_run_of_a_pass_that_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> float:
        raise RuntimeError("out of memory\nby far")

    monkeypatch.setattr("model.training.planned._seconds_of_an_image", full)
    with contextlib.chdir(tmp_path):
        assert call(f"{FP} --dry_run") == 0
    out = capsys.readouterr().out
    assert "time      not known\n" in out and "warning: a step fails on cpu: out of memory\n" in out
    assert "everything checked" not in out and out.endswith(
        "checked but for the pass that fails, nothing trained\n"
    )


def test_dry_run_of_an_evaluation(lsq: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the whole validation set, with what the checkpoint gives."""
    with contextlib.chdir(lsq):
        assert call(f"{LSQ} -e --case other --pretrained lsq-checkpoint.pth.tar --dry_run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("evaluate  resnet20, ")
    assert lines[2].startswith("from      weights/resnet20/lsq-checkpoint.pth.tar: 248 loaded")
    assert lines[5].startswith("sums      integers of at most ")
    assert re.match(r"time      estimated .+ for 8 images on \w+, without reading images", lines[6])
    assert lines[7] == "writes    exp/other"
    assert call(f"{LSQ} -e --dry_run") == 0
    assert "\nwarning: no checkpoint is given, so this evaluates random weights\n" in capsys.readouterr().out


def test_dry_run_of_a_resumed_run(lsq: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It has the warnings that the run has, and says how classes are evened out."""
    changed = "--case lsq -r --epochs 3 --balanced_sampler --full_precision layer3.*"
    with contextlib.chdir(lsq):
        assert call(f"{LSQ} --re_init {changed} --dry_run") == 0
    said = capsys.readouterr().out
    for option in ("balanced_sampler was off", "full_precision was none", "epochs was 2"):
        assert f"\nwarning: --{option} and is " in said
    assert "\nclasses   drawn equally often (--balanced_sampler)\n" in said and "\npolicy " not in said
    assert "lsq-checkpoint.pth.tar, 2 epochs are done\n" in said
    assert call(f"{LSQ} --case new -r --dry_run") == 0
    assert "random weights (--resume: no checkpoint of the case new yet)\n" in capsys.readouterr().out


def test_dry_run_with_all_details(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prints layers, parameter groups, rates and totals, the origin of each field once, and leaves no file."""
    line = f"{LSQ} --lr_policy custom_step --lr_custom_step 3 --epochs 5"
    line += " --custom_decay_list clip_val --custom_decay 0.5"
    assert call(f"{line} --dry_run --verbose") == 0
    text = capsys.readouterr().out
    assert text.count("quant.fm.method: keyword lsq") == 1
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
    """Of a checkpoint, at the accuracy and loss of its epoch; the log and the files about classes are written."""
    shutil.copytree(lsq, tmp_path, dirs_exist_ok=True)
    before = files(tmp_path)
    path = tmp_path / "weights" / "resnet20" / "lsq-checkpoint.pth.tar"
    assert call(f"{LSQ} -e {source.format(path)}") == 0
    row = {name: float(value) for name, value in metrics(lsq, "lsq")[-1].items()}
    expected = f"top-1 {row['val_top1']:.2f}, top-5 {row['val_top5']:.2f}, loss {row['val_loss']:.4f}"
    assert expected in capsys.readouterr().out
    changed = {name for name, content in files(tmp_path).items() if content != before.get(name)}
    written = ("log.txt", "classes.csv", "confusion.csv", "calibration.csv", "predictions.csv", "predictions.jsonl",
               "examples.json", "pictures.json", "mistakes.png")  # fmt: skip
    assert changed == {f"exp/{source.split()[-1]}/{name}" for name in written}
    assert before.keys() <= files(tmp_path).keys()


def test_evaluation_with_audit(lsq: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every quantizer is listed, and passes."""
    path = lsq / "weights" / "resnet20" / "lsq-checkpoint.pth.tar"
    assert call(f"{LSQ} -e --audit --pretrained {path}") == 0
    text = capsys.readouterr().out
    assert "layer3.2.conv2.0.quant_weight" in text and "audit: passed: 40 quantizers" in text


# Runs that differ --------------------------------------------------------------------------------


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


def test_the_best_network_is_a_quantized_one(tmp_path: Path) -> None:
    """Epochs of the warm-up do not count, however good the unquantized network is."""
    assert call(f"{LSQ} --case best --epochs 3 --stable_epoch 2") == 0
    assert checkpoint(tmp_path, "best", "model_best")["epoch"] >= 2


def test_the_digits(tmp_path: Path) -> None:
    """The data set without options: real images, real labels, above chance after one epoch."""
    line = (
        "--width_alpha 0.125 --input_size 8 -b 32 --lr 0.1 --epochs 1 --lr_policy sgdr --keyword cbsa,origin"
    )
    assert call(f"{line} --case real") == 0
    assert summary(tmp_path, "real")["best_top1"] > 25


def test_iteration_lines_show_the_rate_of_their_step(tmp_path: Path) -> None:
    """Not that of the step before, and not that of a group with a rate of its own."""
    line = LSQ.replace("--lr_policy sgdr", "--lr_policy custom_step --lr_custom_step 1 --lr_decay 0.1")
    assert call(f"{line} --case rates --epochs 2 --report_freq 1 --custom_lr_list conv1 --custom_lr 0.7") == 0
    found = re.findall(r"epoch (\d), \d/4: .*, lr ([\d.e-]+)", log_of(tmp_path, "rates"))
    assert found == [("1", "0.05")] * 3 + [("2", "0.005")] * 3


def test_no_best_epoch_is_said_so(tmp_path: Path) -> None:
    """While quantizers warm up there is none."""
    assert call(f"{LSQ} --case none --epochs 3 --stable_epoch 2") == 0
    first, _, last = re.findall(r"epoch \d/3: .*\((.*)\)", log_of(tmp_path, "none"))
    assert first == "no best yet: not all quantizers are on" and last.startswith("best ")


@pytest.mark.parametrize(
    ("option", "policy"),
    [
        ("--full_precision layer3.2.*,layer1.0.conv1.0", ""),
        ("--policy p.yaml", "init: [{name: 'layer3.2.*', enable: false}, {index: 0, enable: false}]"),
    ],
)
def test_chosen_layers_in_full_precision(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, policy: str
) -> None:
    """By the option or by a policy: right in dry run, sizes, best checkpoint, audit and evaluation."""
    (tmp_path / "p.yaml").write_text(policy)
    kept = {"layer1.0.conv1.0", "layer3.2.conv1.0", "layer3.2.conv2.0"}
    line = f"{LSQ} {option} --epochs 1"
    best = "weights/resnet20/run-model_best.pth.tar"
    done_in(tmp_path, f"{line} --dry_run")
    table = {row.split()[0]: row for row in capsys.readouterr().out.splitlines() if "conv " in row}
    done_in(tmp_path, f"{line} --case run", f"{line} -e --audit --pretrained {best}")
    assert all(("lsq" not in table[name]) == (name in {*kept, "conv1"}) for name in table)
    record = summary(tmp_path, "run")
    assert {layer["name"] for layer in record["layers"] if layer["weight_bits"] == 32} == {
        *kept,
        "conv1",
        "fc",
    }
    assert record["best_top1"] is not None and record["bits"] == "2/2"
    assert record["audit"] == "passed: 34 quantizers within their levels, 6 switched off on purpose"
    rows = (tmp_path / "exp/run/quantizers.jsonl").read_text()
    assert "layer3.1.conv1.0" in rows and "layer3.2" not in rows
    assert "6 switched off on purpose" in capsys.readouterr().out


def test_a_pattern_of_no_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.chdir(tmp_path):
        assert call(f"{LSQ} --full_precision layer9.*") == 2
        assert call(f"{LSQ} --full_precision layr3.*") == 2
        assert call(f"{LSQ} --full_precision zzz") == 2
        assert call(f"{LSQ} --full_precision fc") == 2
        assert call(f"{FP} --full_precision layer1.*") == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 5 and all("selects no quantizer; " in each for each in said)
    assert "--full_precision layer9.*: " in said[0] and "did you mean layer3.*, " in said[1]
    assert "layers are layer1.0.conv1.0, " in said[2]
    assert said[3].endswith("; fc is in full precision anyway: leave it out")
    assert said[4].endswith("... are in full precision anyway: leave it out")
    assert not any(tmp_path.iterdir())
