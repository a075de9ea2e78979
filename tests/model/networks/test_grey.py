"""Networks for grey images (`--channels 1`), and weights for colours that they start from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model.networks.build import build_network
from model.pretrained import load_pretrained
from model.watch.trial import run_once
from utils.checkpoint import archive
from utils.config.image_size import sides
from utils.config.resolve import read
from utils.config.schema import Config
from utils.errors import UserError

NETWORKS = {
    "resnet18": "--keyword imagenet,cbas,origin --width_alpha 0.125 --input_size 64",
    "resnet20": "--keyword cifar10,cbas,TResNetStem --width_alpha 0.125",  # space-to-depth
    "pytorch-resnet18": "--keyword imagenet --input_size 64",
    "mobilenetv1": "--keyword imagenet --width_alpha 0.25 --input_size 64",
    "mobilenetv2": "--keyword cifar10 --width_alpha 0.25",
    "vgg_small": "--keyword cifar10 --width_alpha 0.125",
    "nin": "--keyword cifar10 --width_alpha 0.25",
    "torchvision:squeezenet1_1": "--keyword imagenet --input_size 64",
    "timm:test_vit": "--keyword imagenet --input_size 64",
    "timm:tresnet_m": "--keyword cifar10 --input_size 64",  # space-to-depth with the colours innermost
}


def config_of(name: str, *options: str) -> Config:
    return read(f"--model {name} {NETWORKS[name]} --dataset fake --num_classes 5".split() + list(options))


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_for_colours_compute_the_same(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    coloured = build_network(config_of(name).model)
    path, config = tmp_path / "colours.pth.tar", config_of(name, "--channels", "1")
    archive.save(path, {"state_dict": coloured.state_dict()})
    network = build_network(config.model)
    assert run_once(network, config).macs < run_once(coloured, config_of(name)).macs
    report = load_pretrained(network, path, config)
    assert len(report.summed) == 1 and f"1 summed over the colours ({report.summed[0]})" in report.summary()
    images = torch.rand(2, 1, *sides(config.model.input_size))
    with torch.no_grad():
        expected = coloured.eval()(images.expand(-1, 3, -1, -1))
        torch.testing.assert_close(network.eval()(images), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--channels 2", "--channels 2: write 3 for colours, or 1 for grey images"),
        ("--channels 1 --mean 0.5,0.5,0.5 --std 0.2,0.2,0.2", "--mean: give one number with --channels 1"),
        ("--mean 0.5 --std 0.2", "--mean: give three numbers, .*, or add --channels 1"),
        ("--channels 1 --mean 120 --std 60", "--mean: 120 is not of images in .* divide it by 255"),
    ],
)
def test_mistakes(options: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(options.split())
