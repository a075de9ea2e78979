"""Parts of docs/classification.md: the first, command by command as it is written, and those for weights and one bit.

The latter train for an epoch on small images.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torchvision
import yaml

from tests import ROOT
from tests.utils.data.helpers import CLASSES, write_folder

NEEDED = ("main.py", "tools.py", "train.sh", "start_on_terminate.sh", "config", "model", "utils")


def steps(number: int) -> list[tuple[str, str]]:
    """Each block of a part: the file that it is to be saved as, or none for commands, and its text."""
    page = (ROOT / "docs" / "classification.md").read_text(encoding="utf-8")
    part = page[page.index(f"## {number}. ") :].partition("\n## ")[0]
    found, end = [], 0
    for block in re.finditer(r"^```(?:ba)?sh\n(.*?)^```$", part, flags=re.MULTILINE | re.DOTALL):
        said = re.findall(r"[Ss]ave this as `([^`]+)`", part[end : block.start()])
        found.append((said[-1] if said else "", block[1]))
        end = block.end()
    return found


def copy_project(folder: Path, interpreter: str) -> dict[str, str]:
    """Copy the project into a folder; returns the environment of commands there, whose `python` is the interpreter."""
    for name in NEEDED:
        source = ROOT / name
        shutil.copytree(source, folder / name) if source.is_dir() else shutil.copy(source, folder / name)
    left_out = ("NPROC", "TORCHRUN", "FASTDIR", "PYTHONDONTWRITEBYTECODE")
    return {name: value for name, value in os.environ.items() if name not in left_out} | {
        "PYTHON": interpreter,
        "PATH": f"{Path(interpreter).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }


def shell(text: str, folder: Path, environment: dict[str, str]) -> str:
    """Run commands, which must end well; returns what they say."""
    done = subprocess.run(
        ["bash", "-e", "-c", text], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{text}\n{done.stdout}{done.stderr}"
    assert "Traceback" not in done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_way_of_a_newcomer(tmp_path: Path, interpreter: str) -> None:
    """Every command ends well, and 2 bits are about as good as full precision.

    The remedies are tried for an epoch, without processes that read images.
    """
    environment = copy_project(tmp_path, interpreter)
    blocks = steps(1)
    assert [name for name, _ in blocks if name] == ["config/config.photos.fp", "config/config.photos.2bit"]
    for name, text in blocks:
        if name:
            (tmp_path / name).write_text(text, encoding="utf-8")
        else:
            remedy = r"(2bit --case photos-(?:mse|taught|4bit))"
            shell(re.sub(remedy, r"\1 --epochs 1 --wakeup_epoch 0 -j 0", text), tmp_path, environment)
    summaries = {
        case: json.loads((tmp_path / "exp" / case / "summary.json").read_text(encoding="utf-8"))
        for case in ("photos-fp", "photos-lsq-2bit", "photos-mse", "photos-taught", "photos-4bit")
    }
    assert summaries["photos-fp"]["last_top1"] > 90
    assert summaries["photos-lsq-2bit"]["last_top1"] > summaries["photos-fp"]["last_top1"] - 15
    for case, summary in summaries.items():
        assert summary["audit"].startswith(("passed", "full precision")), case


def small(text: str) -> str:
    """Commands whose trainings are short ones of small images; a dry run is one already."""
    return re.sub(
        r"(bash train\.sh \S+)",
        r"\1 --epochs 1 --wakeup_epoch 0 -b 8 -j 0 --input_size 32 --width_alpha 0.25",
        text,
    )


@pytest.mark.slow
def test_one_bit(tmp_path: Path, interpreter: str) -> None:
    environment = copy_project(tmp_path, interpreter)
    write_folder(tmp_path / "data" / "photos", 4, 2)
    [(_, text)] = steps(12)
    shell(small(text.replace("/my/photos", "data/photos")), tmp_path, environment)
    for case in ("folder-lsq-1bit-resnet18", "folder-xnor-1bit-resnet18"):
        summary = json.loads((tmp_path / "exp" / case / "summary.json").read_text(encoding="utf-8"))
        assert summary["audit"].startswith("passed"), case


@pytest.mark.slow
def test_from_imagenet_weights(tmp_path: Path, interpreter: str) -> None:
    """The libraries' weights are in the cache, as after a download."""
    environment = copy_project(tmp_path, interpreter) | {"TORCH_HOME": str(tmp_path / "torch")}
    write_folder(tmp_path / "data" / "pets", 4, 2)
    for number in range(len(CLASSES), 8):
        for split in ("train", "val"):
            folder = tmp_path / "data" / "pets" / split
            shutil.copytree(folder / CLASSES[0], folder / f"pet{number}")
    weights = tmp_path / "torch" / "hub" / "checkpoints"
    weights.mkdir(parents=True)
    state = torchvision.models.resnet18(weights=None).state_dict()
    torch.save(state, weights / Path(torchvision.models.ResNet18_Weights.DEFAULT.url).name)
    said = ""
    for name, text in steps(13):
        if name:
            (tmp_path / name).write_text(text, encoding="utf-8")
        else:
            said += shell(small(text).replace(" --width_alpha 0.25", ""), tmp_path, environment)
    assert "120 loaded, 2 skipped (fc.weight, fc.bias)" in said
    summary = json.loads((tmp_path / "exp" / "pets-lsq-2bit" / "summary.json").read_text(encoding="utf-8"))
    assert summary["audit"].startswith("passed")


@pytest.mark.slow
def test_sweeps(tmp_path: Path, interpreter: str) -> None:
    """Those of docs/tracking.md, with fewer images: a run for each pair of values, in a loop and in a queue."""
    environment = copy_project(tmp_path, interpreter) | {"POLL_SECONDS": "1"}
    page = (ROOT / "docs" / "tracking.md").read_text(encoding="utf-8").partition("\n## Sweeps")[2]
    loop, queue = re.findall(r"^```sh\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    with subprocess.Popen(["true"]) as ended:
        pid = ended.pid
    said = shell(loop.replace("--seed $seed", "--seed $seed --fake_size 64"), tmp_path, environment)
    seeds = queue.replace("in 1 2;", "in 1;").replace("4711", str(pid))
    shell(seeds.replace("--seed $seed", "--seed $seed --fake_size 64"), tmp_path, environment)
    found = {
        path.parent.name: yaml.safe_load(path.with_name("config.yaml").read_text(encoding="utf-8"))
        for path in (tmp_path / "exp").glob("*/summary.json")
    }
    pairs = [(lr, seed) for lr in ("0.1", "0.02") for seed in (1, 2)]
    names = {f"sweep-lr{lr}-seed{seed}": (float(lr), seed) for lr, seed in pairs}
    names |= {f"queue-lr{lr}-seed1": (float(lr), 1) for lr in ("0.1", "0.02")}
    assert {name: (run["optim"]["lr"], run["run"]["seed"]) for name, run in found.items()} == names
    assert len(re.findall(r"^sweep-", said, flags=re.MULTILINE)) == 2, said  # a row for two seeds
