"""What `load_pretrained` reports of a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model.networks.build import build_network
from model.pretrained import load_pretrained
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
