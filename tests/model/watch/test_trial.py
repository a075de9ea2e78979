"""What shows only beside the network: signs that are all the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from model.networks.build import build_network
from model.watch import trial
from utils.config.command_line import parse
from utils.config.resolve import resolve

BINARY = "--dataset fake --fm_enable --wt_enable --fm_bit 1 --wt_bit 1 --width_alpha 0.25 --input_size 16"


@pytest.mark.parametrize(
    ("line", "first", "count"),
    [
        ("--model resnet20 --keyword cifar10,xnor,origin,cbsa", "layer1.0.conv1.0", 20),
        ("--model nin --keyword cifar10,xnor,gamma", "features.1.conv", 7),
        ("--model resnet20 --keyword cifar10,xnor,origin,cbsa --fm_adaptive var", "layer1.0.conv1.0", 20),
    ],
)
def test_signs_behind_a_relu_are_warned_of(line: str, first: str, count: int) -> None:
    config = resolve(parse(f"{BINARY} {line}".split()))
    network = build_network(config.model)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    (warning,) = trial.constant_signs(network, config)
    assert warning.startswith(
        f"the inputs of {count} of {count} binary layers, the first is {first}, never go"
    )
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert network.training


@pytest.mark.parametrize(
    "line",
    [
        "--model resnet20 --keyword cifar10,xnor,NReLU,cbsa",
        "--model nin --keyword cifar10,xnor,PReLU",
        "--model resnet20 --keyword cifar10,xnor,origin,cbsa --fm_adaptive var-mean",
        "--model resnet20 --keyword cifar10,dorefa,origin,cbsa",
    ],
)
def test_other_inputs_of_binary_layers_are_not(line: str) -> None:
    config = resolve(parse(f"{BINARY} {line}".split()))
    assert trial.constant_signs(build_network(config.model), config) == ()


def test_norms_are_those_of_training() -> None:
    """Running means far below what there is would make all inputs positive."""
    config = resolve(parse(f"{BINARY} --model resnet20 --keyword cifar10,xnor,NReLU,cbsa".split()))
    network = build_network(config.model)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.fill_(-100)
    assert trial.constant_signs(network, config) == ()
