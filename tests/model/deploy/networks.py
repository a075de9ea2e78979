"""Small networks to export, and what torch computes in each of their quantizers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from model.deploy.graph import DeployGraph, deploy_graph
from model.quant import QuantConfig, QuantConv2d, QuantizerConfig, QuantLinear, quantizers
from tests.model.quantizers.cases import Case, cases, make

PARTS = {"fm": "quant_activation", "wt": "quant_weight", "ot": "quant_output"}


class Parallel(nn.Module):
    """Branches of quantized convolutions for pairs of cases, and a quantized linear layer on the means of all channels.

    Behind each convolution come a norm and ReLU, so that an engine can compute the first of several with integers from
    end to end. The branches `after` pad behind their quantizers.
    """

    def __init__(self, found: Sequence[Sequence[Case]], depth: int, after: Sequence[int] = ()) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 1)
        self.branches = nn.ModuleList()
        for i, together in enumerate(found):
            layers = []
            for _ in range(depth):
                layer = QuantConv2d(8, 8, 3, padding=1, padding_after_quant=i in after)
                layer.build_quantizers(QuantConfig(**{case.tag: case.config for case in together}), "conv")
                nn.init.normal_(layer.weight, std=0.7)  # so that all levels occur
                for case in together:
                    setattr(layer, PARTS[case.tag], make(case))
                layers += [layer, nn.BatchNorm2d(8), nn.ReLU()]
            self.branches.append(nn.Sequential(*layers))
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight)  # some are negative
                nn.init.normal_(module.bias)
                nn.init.normal_(module.running_mean)
        self.fc = QuantLinear(8 * len(found), 10)
        parts = {
            tag: QuantizerConfig(tag=tag, enable=True, method="lsq", levels=4, half_range=tag == "fm")
            for tag in ("fm", "wt")
        }
        self.fc.build_quantizers(QuantConfig(**parts), "fc")

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.fc(torch.cat([branch(x).mean(dim=(2, 3)) for branch in self.branches], dim=1))


class Geometry(nn.Module):
    """Strides, paddings, groups, pools, sums and a gate, all from 6 to 3 pixels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.parts = nn.ModuleList(
            [
                nn.Conv2d(8, 8, 3, stride=2, padding=1),
                nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8),
                nn.Sequential(
                    nn.Conv2d(8, 16, 3, padding=2, dilation=2, groups=8), nn.Conv2d(16, 8, 1, stride=2)
                ),
                nn.Conv2d(8, 8, (3, 5), stride=2, padding=(1, 2)),
                nn.Sequential(nn.MaxPool2d(3, 2, 1), nn.Conv2d(8, 8, 3, padding=1, groups=2)),
                nn.Sequential(nn.MaxPool2d(3, 2, ceil_mode=True), nn.PReLU(8), nn.Conv2d(8, 8, 1)),
                nn.Sequential(nn.AvgPool2d(3, 2, 1), nn.Hardswish(), nn.Conv2d(8, 8, 1)),
                nn.Sequential(nn.AvgPool2d(2, 2), nn.ReLU6(), nn.Conv2d(8, 8, 3, padding=1)),
            ]
        )
        self.norm = nn.BatchNorm2d(8)
        self.fc = nn.Linear(16 * 9, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        first, second, third, *others = [part(x) for part in self.parts]
        x = self.norm(first + second * torch.sigmoid(third.mean(dim=(2, 3), keepdim=True)))
        x = torch.cat([x, sum(others[1:], others[0])], dim=1)
        return self.fc(x.flatten(1))


class Single(nn.Module):
    """One function of the image."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


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


def pairs() -> list[tuple[Case, Case]]:
    """Each method for activations that can be exported beside one for weights, so that all of both occur."""
    weights = cases(tags=("wt",))
    return [(case, weights[i % len(weights)]) for i, case in enumerate(cases(tags=("fm",)))]


def widths() -> list[tuple[Case, Case]]:
    """Each number of bits that engines have a form for, on both sides; even and odd, with and without a sign."""
    return [
        (Case("lsq", "fm", levels, half), Case("lsq", "wt", levels, False))
        for levels, half in (
            (2, True),
            (3, True),
            (3, False),
            (4, True),
            (8, False),
            (16, True),
            (255, True),
            (256, False),
        )
    ] + [
        (Case("lsq", "fm", 256, True), Case("lsq-midtread", "wt", 256, False)),
        (Case("lsq", "fm", 4, True), Case("lsq", "wt", 128, False)),
        (Case("lsq", "fm", 4, True), Case("lsq-midtread", "wt", 256, False)),
    ]


def options() -> list[tuple[Case, ...]]:
    """What comes on top of a method: a learned scale, normalisation, groups, another place of the padding."""
    fm, wt = Case("lsq", "fm", 4, True), Case("lsq", "wt", 4, False)
    restored = {"adaptive": "var-mean", "adaptive_restore": True}
    plus = Case("lsqplus", "fm", 4, True)
    return [
        (plus, wt),  # the branches AFTER
        (plus, Case("lq", "wt", 4, True)),
        (plus, wt, Case("lsqplus", "ot", 4, True)),
        (plus.with_fields(gamma=True), wt),
        (plus, Case("lq", "wt", 4, True)),
        (plus,),
        (fm.with_fields(gamma=True), wt.with_fields(gamma=True)),
        (fm.with_fields(adaptive="var-mean"), wt.with_fields(adaptive="var-mean")),
        (fm.with_fields(**restored), wt),
        (fm, wt.with_fields(**restored)),
        (dataclasses.replace(fm, quant_group=2), dataclasses.replace(wt, quant_group=2)),
        (Case("lq", "fm", 4, True, 2), Case("lq", "wt", 4, True).with_fields(gamma=True)),
        (fm, wt, Case("lsq", "ot", 4, True)),
        (fm,),
        (wt,),
    ]


AFTER = (0, 1)  # of `options`


@functools.cache
def exported(kind: str) -> tuple[Parallel, DeployGraph]:
    """A network of `pairs`, `widths` or `options`, and its graph; made once, since torch's exporter takes seconds."""
    found = {"methods": pairs, "widths": widths, "options": options}[kind]()
    network = Parallel(found, 2 if kind == "widths" else 1, AFTER if kind == "options" else ())
    return network.eval(), deploy_graph(network, (3, 6, 6))
