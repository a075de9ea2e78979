"""Weights of torchvision's ResNets in our own ResNet: the same logits, or an error that says what to write."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from model import pretrained
from model.networks.build import build_network
from model.networks.torchvision_resnet import ORIGINAL
from utils.config.resolve import read
from utils.config.schema import Config
from utils.errors import UserError


def config_of(name: str, keywords: str) -> Config:
    """Our network's configuration."""
    return read(f"--model {name} --keyword imagenet,{keywords} --root photos".split())


@pytest.fixture(scope="module", params=["resnet18", "resnet50"])
def published(request: pytest.FixtureRequest) -> nn.Module:
    """A network of torchvision with batch statistics of its own."""
    torch.manual_seed(0)
    network = torchvision.models.get_model(request.param, weights=None).train()
    network(torch.randn(4, 3, 64, 64))
    network.name = request.param
    return network.eval()


@pytest.mark.parametrize(
    ("prefix", "word"),
    [("", "real_skip"), ("model._orig_mod.", "real_skip"), ("", "static-bn"), ("", "freeze-bn")],
)
def test_our_resnet_takes_torchvisions_weights(
    published: nn.Module, prefix: str, word: str, tmp_path: Path
) -> None:
    """Every entry loads, and the logits are the same; `real_skip` and fixed statistics change nothing of that."""
    state = {f"{prefix}{name}": value for name, value in published.state_dict().items()}
    torch.save(state, tmp_path / "a.pth")
    config = config_of(str(published.name), f"{ORIGINAL},{word}")
    network = build_network(config.model).eval()
    report = pretrained.load_pretrained(network, tmp_path / "a.pth", config)
    assert len(report.loaded) + len(report.obsolete) == len(state) and report.missing == report.unused == ()
    assert all(name.endswith(".num_batches_tracked") for name in report.obsolete)
    assert bool(report.obsolete) is (word != "real_skip")
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(network(images), published(images), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "keywords",
    [
        ORIGINAL.replace("cbsa", "cbas"),
        ORIGINAL.replace("fix_pooling,", ""),
        ORIGINAL.replace("singleconv,", ""),
        ORIGINAL.removesuffix(",fix"),
        f"{ORIGINAL},NReLU",
        f"{ORIGINAL},reverse-bn",
        "cbas",
    ],
)
def test_a_network_that_computes_something_else_is_refused(keywords: str, tmp_path: Path) -> None:
    """Many of these have parameters of the same shapes."""
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), tmp_path / "a.pth")
    config = config_of("resnet18", keywords)
    with pytest.raises(
        UserError, match=f"write --keyword imagenet,{ORIGINAL} or --model torchvision:resnet18"
    ):
        pretrained.load_pretrained(build_network(config.model), tmp_path / "a.pth", config)


def test_torchvisions_network_with_reverse_norms_takes_weights_of_such(tmp_path: Path) -> None:
    """The names are the same: a checkpoint records its norms, and bare weights are those of a library."""
    state = torchvision.models.resnet18(weights=None).state_dict()
    config = config_of("pytorch-resnet18", "reverse-bn")
    network = build_network(config.model)
    for payload in (state, {"state_dict": state, "config": {"model": {"norm": "batch"}}}):
        torch.save(payload, tmp_path / "a.pth")
        with pytest.raises(UserError, match="leave out the keyword reverse-bn"):
            pretrained.load_pretrained(network, tmp_path / "a.pth", config)
    torch.save({"state_dict": state, "config": {"model": {"norm": "reverse"}}}, tmp_path / "a.pth")
    assert len(pretrained.load_pretrained(network, tmp_path / "a.pth", config).loaded) == len(state)
