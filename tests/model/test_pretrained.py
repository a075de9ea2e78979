"""What `load_pretrained` reports of a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model.networks.build import build_network
from model.pretrained import load_pretrained
from utils.config.recorded import to_dict
from utils.config.resolve import read


@pytest.mark.parametrize(
    ("scope", "named"),
    [("fc", False), ("fc.weight,fc.bias", False), ("fc.bias", True), ("conv1,layer1", True)],
)
def test_class_names_count_unless_the_whole_last_layer_is_skipped(
    scope: str, named: bool, tmp_path: Path
) -> None:
    """Other layers may have as many outputs as there are classes, here 64."""
    line = "--dataset fake --num_classes 64 --model resnet20 --keyword cifar10,cbas,origin"
    config = read(f"{line} --unresume_scope {scope}".split())
    network = build_network(config.model)
    classes = [f"class {i}" for i in range(64)]
    torch.save({"state_dict": network.state_dict(), "classes": classes}, tmp_path / "a.pth")
    report = load_pretrained(network, tmp_path / "a.pth", config)
    assert any(value.shape[0] == 64 for value in network.layer1.parameters())
    assert list(report.classes) == (classes if named else [])


@pytest.mark.parametrize(("words", "warned"), [("reverse-bn", True), ("ReLU", False)])
def test_weights_of_an_unknown_norm(words: str, warned: bool, tmp_path: Path) -> None:
    """A file of another program may be of `reverse-bn` or not; one of this project says which."""
    config = read(f"--dataset fake --width_alpha 0.125 --keyword cifar10,cbas,origin,{words}".split())
    network = build_network(config.model)
    payload = {"state_dict": network.state_dict()}
    for kept, said in ((payload, warned), ({**payload, "config": to_dict(config)}, False)):
        torch.save(kept, tmp_path / "a.pth")
        report = load_pretrained(network, tmp_path / "a.pth", config)
        assert ("does not say with which norm it was trained" in report.warning) == said
