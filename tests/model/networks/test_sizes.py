"""Networks of images that are not square."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from model.networks.build import build_network
from model.watch.cost import network_cost
from model.watch.trial import run_once
from utils.config.resolve import read
from utils.errors import UserError

NETWORKS = {
    "resnet18": "--keyword imagenet,cbas,origin --width_alpha 0.125 --num_classes 7",
    "resnet20": "--keyword cifar100,cbas,prone --width_alpha 0.125",
    "pytorch-resnet18": "--keyword imagenet",
    "mobilenetv1": "--keyword imagenet --width_alpha 0.25",
    "mobilenetv2": "--keyword cifar10 --width_alpha 0.25",
    "vgg_small": "--keyword cifar10 --width_alpha 0.125",
    "nin": "--keyword imagenet --width_alpha 0.25",
    "torchvision:mobilenet_v3_small": "--keyword imagenet",
    "timm:vit_tiny_patch16_224": "--keyword imagenet",
}


@pytest.mark.parametrize("name", NETWORKS)
def test_images_that_are_not_square(name: str) -> None:
    config = read(f"--model {name} {NETWORKS[name]} --input_size 64x96".split())
    network = build_network(config.model).eval()
    shapes: list[torch.Size] = []

    def see(module: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        shapes.append(inputs[0].shape)

    first = next(module for module in network.modules() if isinstance(module, nn.Conv2d))
    first.register_forward_hook(see)
    cost = run_once(network, config)
    assert shapes[0][2:] == (64, 96)
    assert cost == network_cost(network, (64, 96))
    assert network(torch.zeros(2, 3, 64, 96)).shape == (2, config.model.num_classes)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("vgg_small", "32x7", "--input_size 32x7: vgg_small needs at least 8"),
        ("torchvision:vit_b_16", "64x96", "--input_size 64x96: torchvision:vit_b_16 cannot .*square"),
        ("resnet20", "32x30", "--input_size 32x30: resnet20 cannot take images of this size"),
    ],
)
def test_sizes_that_a_network_does_not_take_are_named(name: str, size: str, message: str) -> None:
    config = read(f"--model {name} --keyword cifar10,cbas,origin --input_size {size}".split())
    with pytest.raises(UserError, match=message):
        run_once(build_network(config.model), config)
