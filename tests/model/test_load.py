"""A network from its checkpoint alone: what `load` gives is what `main.py -e` evaluates, bit by bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import main
from model.load import data_of, load, load_trained
from model.networks import build
from tests import ROOT
from tests.main.runs import FP, LSQ, call, done_in
from utils.checkpoint import archive
from utils.config.recorded import from_dict, to_dict
from utils.config.schema import Config
from utils.data.sources import open_data
from utils.data.transform import ImageTransform
from utils.errors import UserError
from utils.step import meters

RECORDED = ROOT / "tests" / "recorded"
POLICY = """
init: [{name: layer1*, tag: fm, bit: 3}]
epoch: [{at: 1, name: layer2*, tag: wt, level_num: 3}, {at: 1, name: layer3.0*, enable: false}]
"""
OWN = """
from torch import nn
from model.networks.build import register_model
register_model("own-net", lambda config: nn.Sequential(
    nn.Flatten(), nn.Linear(3 * config.input_size**2, config.num_classes)))
"""
CASES = {
    "policy": f"{LSQ} --policy policy.yaml --epochs 2 --ema_decay 0.5",
    "stable": f"{LSQ} --stable 3 --epochs 1 --wt_quant_group 1 --padding_after_quant",
    "grey": f"{FP} --channels 1 --epochs 1 --input_size 16x20 --fp16",
    "torchvision": "--dataset fake --num_classes 3 --input_size 32 -b 8 --fake_size 16 --model torchvision:resnet18 "
    "--keyword dorefa,lsq --bits 2/4 --epochs 1",
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of each case."""
    folder = tmp_path_factory.mktemp("load")
    (folder / "policy.yaml").write_text(POLICY)
    return done_in(folder, *(f"{line} --case {case}" for case, line in CASES.items()))


def file_of(folder: Path, case: str) -> Path:
    (path,) = folder.glob(f"weights/*/{case}-checkpoint.pth.tar")
    return path


@pytest.fixture
def logits(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[Tensor]]:
    """Runs `main.py` with options and returns the logits of its validation, a tensor for each batch."""
    found: list[Tensor] = []
    update = meters.Totals.update

    def keep(self: meters.Totals, loss: Tensor, output: Tensor, target: Tensor) -> None:
        found.append(output)
        update(self, loss, output, target)

    def run(line: str) -> list[Tensor]:
        found.clear()
        with monkeypatch.context() as patch:
            patch.setattr(meters.Totals, "update", keep)
            assert call(line) == 0
        return list(found)

    return run


@pytest.mark.parametrize(
    ("case", "averaged"),
    [
        *((case, False) for case in (*CASES, "recorded/lsq", "recorded/lq")),
        ("policy", True),
        ("recorded/lsq", True),
    ],
)
def test_it_is_what_is_evaluated(
    trained: Path, case: str, averaged: bool, logits: Callable[[str], list[Tensor]], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """From the file alone, without an option."""
    monkeypatch.chdir(tmp_path)
    path = RECORDED / f"{case.partition('/')[2]}.pth.tar" if "/" in case else file_of(trained, case)
    found = logits(f"-e --pretrained {path} {'--ema_weights' if averaged else ''}")
    one = load_trained(path, ema_weights=averaged)
    data = dataclasses.replace(one.config.data, rank=0, world_size=1)
    loaders = open_data(data)
    assert loaders.val is not None and not one.network.training
    with torch.no_grad():
        expected = [one.network(images) for images, _ in loaders.val]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    capsys.readouterr()


def test_options_replace_single_values(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained)
    path = file_of(trained, "policy")
    line = f"-e --pretrained {path}"
    config = main.resolve(main.parse(line.split()))
    saved = from_dict(archive.read(path)["config"], "x")
    assert config.model == saved.model and config.data.dataset == "fake" and config.data.batch_size == 8
    changed = main.resolve(main.parse(f"{line} --input_size 20 --wt_grad_type STE -b 4".split()))
    assert changed.model.input_size == changed.data.input_size == 20 and changed.data.val_batch_size == 4
    assert changed.model.quant.wt.grad_type == "STE"
    assert dataclasses.replace(changed.model, input_size=16, quant=saved.model.quant) == saved.model
    whole = main.resolve(main.parse(f"{line} {FP}".split()))
    assert not whole.model.quant.enabled


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            "--fm_bit 4",
            "at 8 levels, and the options say 16: write --bits 2 with the --policy that it was trained with",
        ),
        ("--bits 3", "at 4 levels, and the options say 8: write --bits 2 with the --policy"),
        ("--width_alpha 0.25", "does not fit the network"),
        ("--channels 1", "was trained with --channels 3 and does not fit a network of --channels 1"),
        ("--num_classes 7", "does not fit the network"),
        ("--dataset digits", "does not fit"),
    ],
)
def test_options_that_do_not_fit_are_an_error(
    trained: Path, options: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    case = "torchvision" if "digits" in options else "policy"
    assert call(f"-e --pretrained {file_of(trained, case)} {options}") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and (text in error or "digits has 10 classes" in error), error


def saved(path: Path, **changes: Any) -> Path:
    """A small checkpoint of a network with random weights."""
    config = Config()
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, width_alpha=0.125))
    payload = {
        "state_dict": build.build_network(config.model).state_dict(),
        "config": to_dict(config),
        "classes": list("0123456789"),
        "images": ImageTransform(size=32, mean=(0.5,) * 3, std=(0.5,) * 3).to_dict(),
    } | changes
    archive.save(path, {name: value for name, value in payload.items() if value is not None})
    return path


def changed(**fields: Any) -> dict[str, Any]:
    """A configuration with another network."""
    config = to_dict(Config())
    return config | {"model": config["model"] | fields}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"config": None},
            "x.pth holds no configuration, so that its network is not known: name a checkpoint",
        ),
        ({"classes": ["a", "b"]}, "x.pth is damaged: it has the names of 2 classes, and its network has 10"),
        ({"images": {"mean": [0.5]}}, "x.pth is damaged: its images are described as"),
        (
            {"images": ImageTransform(size=32, mean=(0.5,), std=(0.5,)).to_dict()},
            "x.pth is damaged: its images have 1 channels, and its network takes 3",
        ),
        ({"config": changed(shape="round")}, "has shape, which this version does not know"),
        ({"config": changed(num_classes="ten")}, "x.pth, model, num_classes is damaged: it is 'ten'"),
        (
            {"config": changed(block={"order": "abc"})},
            "model, block is damaged: BlockConfig: order 'abc' must",
        ),
        ({"config": changed(name="gone")}, "--model gone: no such network"),
        ({"config": 3}, "holds no configuration"),
        ({"state_dict": {"conv1.weight": torch.ones(1)}}, "x.pth does not fit the network"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line(tmp_path: Path, changes: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError) as caught:
        load(saved(tmp_path / "x.pth", **changes))
    assert text in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_of_ones_own_must_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code runs only then."""
    monkeypatch.chdir(tmp_path)
    Path("own_net.py").write_text(OWN)
    line = "--dataset fake --num_classes 3 --input_size 8 -b 8 --fake_size 16 --model own-net --epochs 1 --case own"
    assert call(f"{line} --keyword_file own_net.py") == 0
    path = file_of(tmp_path, "own")
    network, _, _ = load(path)  # here it has been run
    assert network(torch.zeros(1, 3, 8, 8)).shape == (1, 3)
    payload = archive.read(path)
    payload["config"]["run"]["keyword_file"] = "elsewhere/other.py"
    archive.save(path, payload)
    with pytest.raises(
        UserError, match=r"trained with --keyword_file elsewhere/other.py, whose code runs only"
    ):
        load(path)
    with pytest.raises(UserError, match=r"--keyword_file gone/other.py: no such file"):
        load(path, own_file="gone/other.py")
    assert call(f"-e --pretrained {path}") == 2
    Path("other.py").write_text("")
    assert load(path, own_file="other.py")[0](torch.zeros(1, 3, 8, 8)).shape == (1, 3)


def test_images_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    """Its normalisation, and its classes: a part of them keeps its numbers, other names and orders are refused."""
    classes = [f"class{i}" for i in range(10)]
    config = Config()
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, width_alpha=0.125),
        data=dataclasses.replace(config.data, dataset="imagenet", mean=None, workers=0),
    )
    folder = load_trained(saved(tmp_path / "x.pth", config=to_dict(config), classes=classes))

    def images(names: list[str]) -> Path:
        root = tmp_path / "-".join(names[:2])
        for name in names:
            (root / "val" / name).mkdir(parents=True)
            Image.new("RGB", (8, 8), "white").save(root / "val" / name / "x.png")
        return root

    val = data_of(folder, images(classes[3:5])).val
    assert val is not None
    ((found, target),) = list(val)
    assert target.tolist() == [3, 4] and found.unique().tolist() == pytest.approx([1.0])  # (1 - 0.5) / 0.5
    for names, message in (
        (
            [f"a{name}" for name in classes],
            "trained with other classes: class 0 was 'class0' and is 'aclass0'",
        ),
        ([*classes[:2], "other"], "has classes that the checkpoint was not trained with: other"),
    ):
        with pytest.raises(UserError, match=message):
            data_of(folder, images(names))
    digits = load_trained(saved(tmp_path / "digits.pth"))
    with pytest.raises(UserError, match="--root photos has no effect with the data set digits"):
        data_of(digits, Path("photos"))
