"""Files of an earlier implementation, whose MobileNets and VGG-Small have other names: loaded and written.

`earlier_names.json` has its command line, names and shapes for one network of each kind.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import tools
from model.networks.build import build_network
from model.pretrained import load_pretrained
from utils.checkpoint import archive
from utils.checkpoint.earlier_names import NETWORKS, earlier_layers, from_earlier, with_layers
from utils.config.resolve import read
from utils.config.schema import Config

RECORDED = json.loads(Path(__file__).with_name("earlier_names.json").read_text("utf-8"))
TABLES = (
    "auxil",
    "codec_vector",
    "codec_index",
    "thrs_multiplier",
)  # of LQ-Nets, computed from the basis here


def config_of(name: str) -> Config:
    return read([*RECORDED[name]["argv"], "--dataset", "fake"])


def file_of(name: str, path: Path) -> dict[str, Tensor]:
    """A file with the recorded names and shapes, and random values."""
    generator, state = torch.Generator().manual_seed(0), {}
    for entry, shape in RECORDED[name]["parameters"]:
        counter = entry.endswith(("iteration", "level_num", "num_batches_tracked", "codec_index"))
        values = torch.rand(shape, generator=generator) + 0.5
        state[entry] = torch.full(shape, 4) if counter else values
    torch.save({"state_dict": state, "epoch": 3}, path)
    return state


@pytest.mark.parametrize("name", RECORDED)
def test_a_file_is_loaded_whole_and_written_with_its_names(name: str, tmp_path: Path) -> None:
    config, path = config_of(name), tmp_path / "earlier.pth.tar"
    theirs, network = file_of(name, path), build_network(config.model)
    report = load_pretrained(network, path, config)
    assert report.unused == report.mismatched == () and all("num_batches" in one for one in report.missing)
    obsolete = [entry for entry in theirs if entry.startswith("bn7.") or entry.endswith(TABLES)]
    under_ours = from_earlier(dict.fromkeys(obsolete), config.model.name, network.state_dict())
    assert sorted(report.obsolete) == sorted(under_ours)
    layers = earlier_layers(config.model.name, network.state_dict())
    written = with_layers(network.state_dict(), layers)
    assert sorted(written) == sorted({*theirs} - {*obsolete})
    assert len(set(layers.values())) == len(layers)
    for entry, value in written.items():
        if not entry.endswith(("iteration", "level_num")):  # training counts from zero
            assert torch.equal(value, theirs[entry].to(value.dtype)), entry

    ours = tmp_path / "ours.pth.tar"
    recorded = {"model": {"name": config.model.name}}
    torch.save({"state_dict": network.state_dict(), "config": recorded}, ours)
    new = tmp_path / "new.pth.tar"
    assert tools.main(f"--keyword save --earlier_names --old {ours} --new {new}".split()) == 0
    saved = archive.read(new)["state_dict"]
    assert saved.keys() == written.keys() and all(torch.equal(saved[key], written[key]) for key in saved)


@pytest.mark.parametrize("model", NETWORKS)
@pytest.mark.parametrize("stem", ["cifar10", "imagenet"])
def test_every_layer_has_an_earlier_name(model: str, stem: str) -> None:
    """With both stems, there and back; a state that has our names already stays."""
    network = build_network(read(f"--model {model} --keyword {stem} --dataset fake".split()).model)
    own = network.state_dict()
    layers = earlier_layers(model, own)
    assert {name.rpartition(".")[0] for name in own} == set(layers)
    back = from_earlier(with_layers(own, layers), model, own)
    assert list(back) == list(own)
    assert list(from_earlier(own, model, own)) == list(own)
    assert earlier_layers("resnet18", own) == {}


@pytest.mark.parametrize(
    ("payload", "said"),
    [
        (
            {"config": {"model": {"name": "resnet20"}}},
            "is of resnet20, and only mobilenetv1, mobilenetv2, vgg_small",
        ),
        ({}, "is of a network that it does not name"),
    ],
)
def test_other_networks_have_no_earlier_names(
    payload: dict[str, object], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = tmp_path / "old.pth.tar", tmp_path / "new.pth.tar"
    torch.save({"state_dict": {"fc.weight": torch.zeros(2, 2)}} | payload, old)
    assert tools.main(f"--keyword save --earlier_names --old {old} --new {new}".split()) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not new.exists()
