"""The largest sum of tensors alive at once, beside that of the exported graph, and by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from model.convert import quantize
from model.deploy.graph import DeployGraph, deploy_graph
from model.deploy.nodes import node_key
from model.layers.quantized import quantizers
from model.networks.build import build_network
from model.quant import QuantConfig, QuantizerConfig
from model.watch.peak import peak_bytes
from utils.config.resolve import read

VIEWS = ("Reshape", "Flatten", "Identity", "Pad")


class Residual(nn.Module):
    """A stem, a block whose skip stays alive beside it, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.one, self.two = nn.Conv2d(8, 32, 3, padding=1), nn.Conv2d(32, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits."""
        x = functional.relu(self.stem(x))
        x = x + self.two(functional.relu(self.one(x)))
        return self.head(x.mean((2, 3)))


def residual(levels: int) -> nn.Module:
    torch.manual_seed(0)
    network = Residual().eval()
    parts = {
        tag: QuantizerConfig(tag=tag, enable=True, method="lsq", levels=levels, half_range=tag == "fm")
        for tag in ("fm", "wt")
    }
    quantize(network, QuantConfig(**parts))  # pyright: ignore[reportArgumentType]
    return network


def peak_of(graph: DeployGraph) -> int:
    """Bytes of the nodes' inputs and outputs that are alive at once, one node after the other."""
    model = graph.model.graph
    sizes = {
        value.name: 4 * math.prod(dim.dim_value or 1 for dim in value.type.tensor_type.shape.dim)
        for value in (*model.input, *model.output, *model.value_info)
    }
    fixed, same = {tensor.name for tensor in model.initializer}, dict[str, str]()
    steps = [{model.input[0].name}]
    for node in model.node:
        if node.op_type in ("Constant", "Weight"):
            fixed.update(node.output)
        if node.op_type == "Activation":
            bits = math.ceil(math.log2(graph.activations[node_key(node)].levels))
            sizes[node.output[0]] = math.ceil(sizes[node.input[0]] / 4 * bits / 8)
        if node.op_type in VIEWS:
            same[node.output[0]] = same.get(node.input[0], node.input[0])
        steps.append({same.get(name, name) for name in (*node.input, *node.output) if name} - fixed)
    steps.append({model.output[0].name})
    found = 0
    for i in range(len(steps)):
        made = set().union(*steps[: i + 1])
        found = max(found, sum(sizes[name] for name in made & set().union(*steps[i:])))
    return found


@pytest.mark.parametrize("levels", [4, 16, 256])
def test_a_network_of_low_bits(levels: int) -> None:
    """At the second convolution: its input at its bits, its output, and the skip."""
    network, bits = residual(levels), levels.bit_length() - 1
    before = {name: quantizer.enabled for name, quantizer in quantizers(network)}
    found = peak_bytes(network, 10)
    assert found == peak_of(deploy_graph(network, (3, 10, 10)))
    # Behind the first convolution: its output, that of the ReLU and the skip, in float; or that, codes and result.
    assert found == 100 * 4 * (8 + 32 + 32) > 100 * (4 * (8 + 32) + 32 * bits / 8)
    assert {name: quantizer.enabled for name, quantizer in quantizers(network)} == before
    assert torch.equal(network(torch.ones(1, 3, 10, 10)), network(torch.ones(1, 3, 10, 10)))


def test_codes_take_their_bits() -> None:
    """Where codes are what is alive at once: a layer behind another, whose output has bits too."""
    parts = {
        tag: QuantizerConfig(tag=tag, enable=True, method="lsq", levels=4, half_range=tag != "wt")
        for tag in ("fm", "wt", "ot")
    }
    network = nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 64), nn.Flatten())
    quantize(network, QuantConfig(**parts, first_last=True))  # pyright: ignore[reportArgumentType]

    class Images(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = network

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x.flatten(1))

    # The first sum of 64 floats and its codes; the second one reads the codes of these codes, and its sum is as long.
    assert peak_bytes(Images(), (2, 4), 1) == 64 * 4 + 64 * 2 // 8


@pytest.mark.parametrize(
    "line", ["resnet20 --keyword cifar10,origin,cbsa --width_alpha 0.25", "nin --keyword cifar10"]
)
def test_a_network_in_full_precision(line: str) -> None:
    torch.manual_seed(0)
    network = build_network(read(f"--model {line} --input_size 32".split()).model).eval()
    assert peak_bytes(network, 32) == peak_of(deploy_graph(network, (3, 32, 32)))
