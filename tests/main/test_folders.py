"""Runs on folders of images: how often these are listed, and what they may lack."""

from __future__ import annotations

import csv
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import tools
from model.load import data_of, load_trained
from tests.main.runs import assert_same_run, call, checkpoint, done_in, metrics, summary
from tests.utils.data.helpers import CLASSES, write_folder
from tests.utils.data.shards.helpers import make
from tests.utils.processes.lines import together
from utils.report.run_files import read
from utils.tools.comparison import grouped

NETWORK = "--model resnet20 --width_alpha 0.125 --keyword imagenet,cbas,origin --input_size 32"
FOLDER = f"{NETWORK} --dataset imagenet --root images --num_classes 3 -b 4 -j 0"
BITS = "--fm_enable --wt_enable --fm_bit 2 --wt_bit 2"
QUANTIZED = f"{FOLDER} --keyword imagenet,cbas,origin,dorefa,lsq {BITS} --stable_epoch 1"


def test_class_folders_are_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "images", train=2, val=1)
    listed: Counter[str] = Counter()
    scandir = os.scandir

    def counted(path: Any = ".") -> Any:
        listed[os.fspath(path)] += 1
        return scandir(path)

    monkeypatch.setattr(os, "scandir", counted)
    assert call(f"{FOLDER} --dry_run") == 0
    found = {
        f"{part}/{name}": listed[f"images/{part}/{name}"] for part in ("train", "val") for name in CLASSES
    }
    assert found == dict.fromkeys(found, 1)


@pytest.fixture(scope="module")
def only_val(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoint of a 2-bit run, and images of which only `val/` is left."""
    root = tmp_path_factory.mktemp("only-val")
    write_folder(root / "images", train=4, val=2)
    done_in(root, f"{QUANTIZED} --case whole --epochs 3")
    shutil.rmtree(root / "images" / "train")
    return root


@pytest.mark.parametrize("dataset", ["imagenet", "dali"])
def test_an_evaluation_needs_no_training_images(
    only_val: Path, dataset: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if dataset == "dali":
        pytest.importorskip("nvidia.dali", reason="NVIDIA's DALI is not installed")
    monkeypatch.chdir(only_val)
    assert call(f"{QUANTIZED} --case whole --dataset {dataset} -e -r --audit") == 0
    last = metrics(only_val, "whole")[-1]
    assert f"\ntop-1 {float(last['val_top1']):.2f}, " in capsys.readouterr().out


def test_a_policy_and_a_warm_up_in_epochs_go_with_an_evaluation_without_training_images(
    only_val: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(only_val)
    Path("policy.yaml").write_text("iteration:\n  - at: [5]\n    lr: 0.01\n", encoding="utf-8")
    assert call(f"{QUANTIZED} --case whole -e -r --policy policy.yaml") == 0
    assert "--stable_epoch: without training images an epoch has no length" in capsys.readouterr().out


@pytest.mark.parametrize("options", ["", "-e --bn_batches 2"])
def test_training_images_are_missed_where_they_are_needed(
    only_val: Path, options: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(only_val)
    assert call(f"{QUANTIZED} --case other {options}") == 2
    assert "images/train is missing: " in capsys.readouterr().err
    assert not Path("exp/other").exists()


@pytest.mark.parametrize("dataset", ["imagenet", "shards", "dali"])
def test_images_that_are_not_square_are_trained_resumed_and_evaluated(tmp_path: Path, dataset: str) -> None:
    if dataset == "dali":
        pytest.importorskip("nvidia.dali", reason="NVIDIA's DALI is not installed")
    write_folder(tmp_path / "images", train=4, val=2)
    wide = f"{QUANTIZED} --dataset {dataset} --input_size 32x64 --balanced_sampler"
    if dataset == "shards":
        make(tmp_path / "images", tmp_path / "shards")
        wide += " --root shards"
    done_in(tmp_path, f"{wide} --case one --epochs 3", f"{wide} --case two --epochs 3 --save_every 1")
    backup = tmp_path / "weights" / "resnet20" / "two-backup1-checkpoint.pth.tar"
    backup.replace(backup.with_name("two-checkpoint.pth.tar"))  # as if it had been interrupted
    done_in(tmp_path, f"{wide} --case two --epochs 3 -r", f"{wide} --case two -e -r")
    assert_same_run((tmp_path, "one"), (tmp_path, "two"))
    first, *_ = summary(tmp_path, "two")["layers"]
    assert (first["name"], first["output"]) == ("conv1", [8, 16, 32])
    if dataset == "shards":  # other images may lie in a folder
        trained = load_trained(tmp_path / "weights" / "resnet20" / "two-checkpoint.pth.tar")
        for root in ("images", "shards"):
            loader = data_of(trained, tmp_path / root).val
            assert loader is not None and loader.samples == 6


def test_class_weights_act_on_the_labels_and_are_logged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_folder(tmp_path / "images", train=4, val=2)
    for number in (1, 2, 3):
        (tmp_path / "images" / "train" / "cat" / f"{number}.jpg").unlink()
    (tmp_path / "equal.csv").write_text("class,weight\nant,3\nbee,3\ncat,3\n", encoding="utf-8")
    (tmp_path / "other.csv").write_text("class,weight\nant,3\nbee,3\ndog,3\n", encoding="utf-8")
    line = f"{FOLDER} --epochs 1 --lr 0.01"
    weighted = f"{line} --case weighted --class_weights balanced --label_smooth 0.1"
    done_in(tmp_path, f"{line} --case plain", f"{line} --case equal --class_weights equal.csv", weighted)
    assert "class weights: ant 0.75, bee 0.75, cat 3\n" in capsys.readouterr().out
    assert_same_run((tmp_path, "plain"), (tmp_path, "equal"))
    assert metrics(tmp_path, "weighted")[0]["train_loss"] != metrics(tmp_path, "plain")[0]["train_loss"]
    assert call(f"{line} --case other --class_weights other.csv") == 2
    assert "--class_weights other.csv: there is no class 'dog'" in capsys.readouterr().err
    assert not Path("exp/other").exists()
    # The file's values count, wherever it lies: for a resumed run and for a comparison.
    again = f"{line} --case equal --epochs 2 -r --class_weights"
    shutil.copy("equal.csv", "moved.csv")
    done_in(tmp_path, f"{again} moved.csv --dry_run")
    assert "class_weights" not in capsys.readouterr().out.partition("warning: ")[2]
    (tmp_path / "equal.csv").write_text("class,weight\nant,3\nbee,3\ncat,9\n", encoding="utf-8")
    done_in(tmp_path, f"{again} equal.csv --dry_run", f"{line} --case edited --class_weights equal.csv")
    said = capsys.readouterr().out
    assert "warning: --class_weights: the file has other weights now" in said
    assert (
        "classes   weights in the loss: ant 0.8182, bee 0.8182, cat 2.455 (--class_weights equal.csv)" in said
    )
    rows = grouped(read([tmp_path / "exp" / case for case in ("equal", "edited")]))
    assert [row["differs"] for row in rows] == [
        {"data.class_weight_values": value} for value in ("[3.0, 3.0, 3.0]", "[3.0, 3.0, 9.0]")
    ]


# Numbers of classes, and validation images, that follow from the folders ---------------------------


UNCOUNTED = FOLDER.replace("--num_classes 3 ", "")


def test_the_number_of_classes_follows_from_the_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the network, its records and a teacher; one that is given and does not fit is an error."""
    write_folder(tmp_path / "images", train=4, val=2)
    assert call(f"{UNCOUNTED} --dry_run") == 0
    assert ", 3 classes, images of 32 pixels" in capsys.readouterr().out
    assert call(f"{UNCOUNTED} --dry_run --verbose") == 0
    assert "model.num_classes: the class folders" in capsys.readouterr().out
    done_in(
        tmp_path,
        f"{UNCOUNTED} --case counted --epochs 1 --mixup_enable",
        f"{FOLDER} --case given --epochs 1 --mixup_enable",
    )
    assert_same_run((tmp_path, "counted"), (tmp_path, "given"))
    assert checkpoint(tmp_path, "counted")["config"]["model"]["num_classes"] == 3
    taught = (
        "--distill_teacher resnet20 --distill_pretrained counted-checkpoint.pth.tar --case taught --epochs 1"
    )
    done_in(tmp_path, f"{UNCOUNTED} {taught}", f"{UNCOUNTED} --case counted -r --epochs 2")
    capsys.readouterr()
    assert call(f"{FOLDER} --num_classes 4") == 2
    assert "images has 3 classes, not 4: write --num_classes 3" in capsys.readouterr().err
    assert call("-e --pretrained counted-checkpoint.pth.tar --model resnet20") == 2
    assert call("-e --pretrained weights/resnet20/counted-checkpoint.pth.tar -j 0") == 0


SPLIT = f"{UNCOUNTED} --val_split 0.25"


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images of which there are 8 a class in `train/` alone, and a run on them, case `split`."""
    root = tmp_path_factory.mktemp("split")
    write_folder(root / "images", train=8, val=1)
    shutil.rmtree(root / "images" / "val")
    return done_in(root, f"{SPLIT} --case split --epochs 1")


def validated(folder: Path, case: str) -> list[str]:
    """The images that an evaluation has predicted."""
    with (folder / "exp" / case / "predictions.csv").open(newline="") as file:
        return [row["image"] for row in csv.DictReader(file)]


def test_a_folder_is_split(
    split: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Evaluations, resumed runs, verify and other seeds use the same validation images, which the run holds."""
    shutil.copytree(split, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    file = "weights/resnet20/split-checkpoint.pth.tar"
    assert call(f"{SPLIT} --dry_run") == 0
    assert ": 18 images, 6 for validation;" in capsys.readouterr().out
    digest = checkpoint(tmp_path, "split")["config"]["data"]["val_files"]
    assert digest and digest in (tmp_path / "exp" / "split" / "config.yaml").read_text()
    top1 = float(metrics(tmp_path, "split")[-1]["val_top1"])
    evaluations = (
        f"-e --case bare --pretrained {file} -j 0",
        f"{SPLIT} -e --case whole --pretrained {file}",
        f"{SPLIT} -e -r --case split",
        f"-e --case elsewhere --pretrained {file} --root moved -j 0",
    )
    for line in evaluations:
        if "moved" in line:
            Path("images/train").rename("moved")  # class folders directly in the root
        assert call(line) == 0
        assert f"\ntop-1 {top1:.2f}, " in capsys.readouterr().out
    Path("moved").rename("images/train")
    names = validated(tmp_path, "bare")
    assert len(names) == 6 and names == validated(tmp_path, "whole") == validated(tmp_path, "split")
    done_in(tmp_path, f"{SPLIT} --case other --epochs 1 --seed 7", f"{SPLIT} --case split -r --epochs 2")
    assert checkpoint(tmp_path, "other")["config"]["data"]["val_files"] == digest
    assert tools.main(f"--keyword export --to packed --old {file} --new x.safetensors".split()) == 0
    capsys.readouterr()
    assert tools.main(f"--keyword verify x.safetensors --old {file}".split()) == 0
    assert "on 6 images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ("-e --pretrained {}", "--val_split: images has other images than in the training"),
        (f"{SPLIT} -e --pretrained {{}}", "--val_split: images has other images than in the training"),
        (f"{SPLIT} --case split -r --epochs 2", "its validation images were others"),
        (f"{SPLIT} --case split -e -r", "its validation images were others"),
        (f"{UNCOUNTED} --val_split 0.5 --case split -r --epochs 2", "its validation images were others"),
    ],
)
def test_a_changed_folder_is_noticed(
    split: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    options: str, text: str,
) -> None:  # fmt: skip
    shutil.copytree(split, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    if "0.5" not in options:
        for name in CLASSES:
            for i in range(8, 16):
                shutil.copy(f"images/train/{name}/0.jpg", f"images/train/{name}/{i}.jpg")
    assert call(options.format("weights/resnet20/split-checkpoint.pth.tar")) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and text in err, err


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (f"{UNCOUNTED} --val_split 1", "--val_split 1.0: must be at least 0 and less than 1"),
        (f"{UNCOUNTED} --val_split nan", "--val_split nan: must be"),
        (f"{SPLIT} -v 0", "--val_split and --val_batch_size 0"),
        (f"{SPLIT}", "images has validation images of its own, in val/"),
        ("--dataset digits --val_split 0.1", "--val_split 0.1 has no effect with the data set digits"),
    ],
)
def test_mistakes_of_a_split(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, text: str
) -> None:
    write_folder(tmp_path / "images", train=2, val=1)
    assert call(f"{line} --dry_run") == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and text in err, err


def test_several_processes_split_alike(split: Path, tmp_path: Path, interpreter: str) -> None:
    """Each image is validated once, those that one process validates."""
    shutil.copytree(split, tmp_path, dirs_exist_ok=True)
    (tmp_path / "network.py").touch()
    line = f"{SPLIT} --epochs 1 -v 1 --case two"
    done = together(interpreter, tmp_path, {"two": {"world": 2, "line": line}})
    assert done["two"]["status"] == [0, 0], done
    found = checkpoint(tmp_path, "two")["config"]["data"]["val_files"]
    assert found == checkpoint(split, "split")["config"]["data"]["val_files"]
    assert float(metrics(tmp_path, "two")[-1]["val_top1"]) * 6 % 100 == pytest.approx(0, abs=1e-6)
