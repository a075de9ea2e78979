"""A network with one-dimensional convolutions: bits of layers, a policy, oscillating weights, a plan, a packed file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor, nn

import main
import tools
from model.convert import quantize
from model.layers.convolution import QuantConv1d
from model.load import load
from model.networks import build
from utils.config.schema import ModelConfig
from utils.report import sensitivity_record

NETWORK = (
    "--dataset fake --num_classes 4 --fake_size 64 --input_size 8 -b 16 -v 16 -j 0 --lr 0.05 --seed 1 "
    "--model rows-of-pixels"
)
LAYERS = ("middle", "late")  # the first and the last layer stay in full precision
CASE = Path("weights/rows-of-pixels/rows-checkpoint.pth.tar")


class RowsOfPixels(nn.Module):
    """Reads an image as one row of pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm1d(8)
        self.middle = nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.late = nn.Conv1d(8, 8, 3, stride=2)
        self.fc = nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        """Images [N, 3, H, W] to logits [N, 4]."""
        x = self.norm(self.first(images.flatten(2))).relu()
        return self.fc(self.late(self.middle(x).relu()).relu().mean(2))


def make(config: ModelConfig) -> nn.Module:
    network = RowsOfPixels()
    if config.quant.enabled:
        quantize(network, config.quant, example=(torch.rand(2, 3, 8, 8),))
    return network


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test in a folder of its own, with the network registered."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(build, "_MODELS", dict(build._MODELS))
    build.register_model("rows-of-pixels", make)


def test_from_training_to_a_packed_file(capsys: pytest.CaptureFixture[str]) -> None:
    Path("bits.yaml").write_text(yaml.safe_dump([{"name": "middle", "bit": 8}]))
    Path("policy.yaml").write_text(yaml.safe_dump({"epoch": [{"at": [1], "name": "late", "bit": 2}]}))
    training = (
        "--keyword cifar10,lsq --bits 4 --re_init --layer_bits bits.yaml --policy policy.yaml --epochs 3 "
        "--freeze_threshold 0.5,0.01 --dampen 1e-3 --audit --case rows"
    )
    assert main.main([*NETWORK.split(), *training.split()]) == 0, capsys.readouterr().err
    network, _, _ = load(CASE)
    assert isinstance(network, RowsOfPixels)
    layers = {name: network.get_submodule(name) for name in LAYERS}
    assert all(type(layer) is QuantConv1d for layer in layers.values())
    levels = {name: layer.quant_weight.levels for name, layer in layers.items()}  # pyright: ignore[reportAttributeAccessIssue]
    assert levels == {"middle": 256, "late": 4}

    packed = f"--keyword export_packed --old {CASE} --new rows.safetensors"
    assert tools.main(packed.split()) == 0, capsys.readouterr().err
    assert tools.main(["--keyword", "import", "--old", "rows.safetensors", "--new", "again.pth.tar"]) == 0
    again, _, _ = load("again.pth.tar")
    images = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(again(images), network(images))


def test_bits_are_planned(capsys: pytest.CaptureFixture[str]) -> None:
    training = "--keyword cifar10 --epochs 1 --case rows"
    assert main.main([*NETWORK.split(), *training.split()]) == 0, capsys.readouterr().err
    measure = f"--keyword sensitivity --old {CASE} --output found.json --bits 8,2 --samples 16"
    assert tools.main(measure.split()) == 0, capsys.readouterr().err
    found = sensitivity_record.read(Path("found.json"))
    kinds = {layer.name: layer.kind for layer in found.layers}
    assert list(kinds) == ["first", *LAYERS, "fc"] and kinds["middle"].startswith("conv")

    most, least = (found.bytes_with(dict.fromkeys(kinds, bits)) for bits in (8, 2))
    plan = "--keyword plan --old found.json --new bits.yaml --budget_size"
    assert tools.main([*plan.split(), f"{(most + least) // 2}B"]) == 0, capsys.readouterr().err
    entries = yaml.safe_load(Path("bits.yaml").read_text())
    assert {entry["name"] for entry in entries} == kinds.keys()
    assert {entry["wt_bit"] for entry in entries} == {8, 2}
