"""Training steps under `torch.use_deterministic_algorithms`."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model.layers.quantized import QuantLinear
from model.quant import methods
from tests.model.layers.convolution import conv, image
from utils.config.schema import QuantConfig, QuantizerConfig

LEVELS = {"lsq": 4, "dorefa": 4, "pact": 4, "lq": 4, "fatnn": 3, "xnor": 2}


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Operators without a deterministic form are errors, and memory that nothing has written is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def network(method: str) -> nn.Sequential:
    known = methods()
    settings: dict[str, Any] = {"enable": True, "method": method, "levels": LEVELS[method]}
    fm = QuantizerConfig(tag="fm", half_range=method != "xnor", **settings)
    wt = QuantizerConfig(tag="wt", **settings) if (method, "wt") in known else QuantizerConfig(tag="wt")
    config = QuantConfig(fm=fm, wt=wt)
    linear = QuantLinear(8, 5)
    linear.build_quantizers(config, "fc")
    return nn.Sequential(
        conv(config, (4, 8), padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
        conv(config, (8, 8), padding=1, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        linear,
    )


def steps(model: nn.Module, count: int = 2) -> list[Tensor]:
    """The state and the gradients after steps of SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    target = torch.tensor([0, 1, 2, 3])
    for _ in range(count):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(image(4, 4, 9, 9)), target).backward()
        optimizer.step()
    return [*model.state_dict().values(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("method", LEVELS)
def test_a_step_is_the_same(method: str, request: pytest.FixtureRequest) -> None:
    model = network(method)
    other = copy.deepcopy(model)
    expected = steps(model)
    request.getfixturevalue("deterministic")
    for one, two in zip(expected, steps(other), strict=True):
        assert torch.equal(one, two) and one.isfinite().all()
