"""Small networks to export, and what torch computes in each of their quantizers."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from model.deploy.graph import DeployGraph, deploy_graph
from model.quant import QuantConfig, QuantConv2d, quantizers
from tests.model.quantizers.cases import Case, cases, make


class Parallel(nn.Module):
    """A convolution for each case, all of them on the same input; their means are the logits."""

    def __init__(self, found: Sequence[Case], pairs: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 1)
        self.branches = nn.ModuleList()
        for case in found:
            layer = QuantConv2d(8, 8, 3, padding=1)
            parts = {case.tag: case.config}
            layer.build_quantizers(QuantConfig(**parts), str(case))
            attribute = {"fm": "quant_activation", "wt": "quant_weight", "ot": "quant_output"}[case.tag]
            setattr(layer, attribute, make(case))
            self.branches.append(nn.Sequential(layer, nn.BatchNorm2d(8), nn.ReLU()))
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight)  # some are negative
                nn.init.normal_(module.bias)
                nn.init.normal_(module.running_mean)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return torch.cat([branch(x).mean(dim=(2, 3)) for branch in self.branches], dim=1)


def images(count: int, channels: int = 3, size: int = 6) -> Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(1))


def torch_values(network: nn.Module, x: Tensor) -> dict[str, np.ndarray]:
    """The logits and the output of each quantizer of activations, in evaluation mode."""
    found: dict[str, np.ndarray] = {}

    def keep(name: str, _module: nn.Module, _input: tuple[Tensor, ...], output: Tensor) -> None:
        found[name] = output.numpy()

    hooks = [
        module.register_forward_hook(partial(keep, name))
        for name, module in quantizers(network)
        if module.config.tag != "wt"
    ]
    with torch.no_grad():
        found["logits"] = network.eval()(x).numpy()
    for hook in hooks:
        hook.remove()
    return found


def all_cases() -> list[Case]:
    """Each method on activations, weights and outputs that can be exported."""
    return cases(tags=("fm", "wt"))


@functools.cache
def exported_methods() -> tuple[Parallel, DeployGraph]:
    """A network with all methods, and its graph; made once, since torch's exporter takes seconds."""
    network = Parallel(all_cases()).eval()
    return network, deploy_graph(network, (3, 6, 6))
