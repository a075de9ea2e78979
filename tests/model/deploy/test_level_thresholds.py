"""Levels of activations without even steps; those of a method of your own are compared with it before an export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from model.deploy.engines import Engine
from model.deploy.formats import GRAPH_FORMATS
from model.deploy.graph import deploy_graph
from model.deploy.level_thresholds import by_thresholds, thresholds
from model.quant import Grid, QuantConfig, QuantConv2d, QuantizerConfig
from model.quantizers.frame import Quantizer
from model.quantizers.integers import QuantizedTensor
from model.quantizers.learned_range import LearnedRange
from tests.model.deploy.networks import torch_values
from utils.errors import UserError

LEVELS = (0.0, 0.5, 0.75, 2.0)
PLACES = (0.25, 0.7, 1.0)


class Uneven(Quantizer):
    """Four uneven levels; `numbers` says which."""

    def numbers(self, x: Tensor) -> Tensor:
        return sum((x >= place).long() for place in PLACES) + torch.zeros_like(x, dtype=torch.long)

    def quantize(self, x: Tensor) -> Tensor:
        return torch.tensor(LEVELS)[self.numbers(x)]

    def encode(self, x: Tensor) -> QuantizedTensor:
        numbers = self.numbers(x)
        book, one = torch.tensor([LEVELS]), torch.ones(())
        return QuantizedTensor(codes=numbers, scale=None, numbers=numbers, codebook=book, factor=one)


class Folded(Uneven):
    """Large values get the lowest level again."""

    def numbers(self, x: Tensor) -> Tensor:
        return torch.where(x > 500, 0, super().numbers(x))


class Falling(Uneven):
    """Larger values get lower levels."""

    def numbers(self, x: Tensor) -> Tensor:
        return 3 - super().numbers(x)


class Other(Uneven):
    """Its integers are right for values below 100 alone."""

    def quantize(self, x: Tensor) -> Tensor:
        return torch.where(x > 100, 7.0, super().quantize(x))


class Wrong(Uneven):
    """Its integers are of another level everywhere."""

    def quantize(self, x: Tensor) -> Tensor:
        return super().quantize(x) + 1


class ZeroPoint(Quantizer):
    """The levels -2 .. 1, counted from 0."""

    def quantize(self, x: Tensor) -> Tensor:
        return x.round().clamp(-2, 1)

    def encode(self, x: Tensor) -> QuantizedTensor:
        numbers, one = (self.quantize(x) + 2).long(), torch.ones(1)
        book = torch.arange(-2.0, 2).reshape(1, -1)
        return QuantizedTensor(
            codes=numbers.int(), scale=one, numbers=numbers, codebook=book, factor=one, zero_point=2
        )


class Many(Quantizer):
    """40 uneven codes, more than there are comparisons for."""

    BOOK = torch.tensor([float(i * i // 8 + i) for i in range(40)])

    def numbers(self, x: Tensor) -> Tensor:
        return (x.unsqueeze(-1) >= self.BOOK[1:] - 0.3).sum(-1)

    def quantize(self, x: Tensor) -> Tensor:
        return self.BOOK[self.numbers(x)]

    def encode(self, x: Tensor) -> QuantizedTensor:
        numbers, one = self.numbers(x), torch.ones(1)
        codes = self.BOOK[numbers].int()
        return QuantizedTensor(codes=codes, scale=one, numbers=numbers, codebook=self.BOOK[None], factor=one)


class Beside(nn.Module):
    """Quantized layers beside each other, each for all values of the image."""

    def __init__(self, layers: list[QuantConv2d]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([layer(x) for layer in self.layers]).sum(0).flatten(1)


METHODS: dict[str, dict[str, Any]] = {
    **{f"APoT, signed, {n}": {"method": "apot", "levels": n} for n in (4, 8, 16, 64)},
    "APoT, 32": {"method": "apot", "levels": 32, "half_range": True},
    "N2UQ, signed, 16": {"method": "n2uq", "levels": 16},
    "N2UQ, scaled": {"method": "n2uq", "levels": 4, "half_range": True, "gamma": True},
    "N2UQ, normalised": {"method": "n2uq", "levels": 4, "adaptive": "var-mean"},
    "FATNN, groups": {"method": "fatnn", "levels": 3, "half_range": True, "quant_group": 3},
    "LSQ, signed, scaled, 16": {"method": "lsq", "levels": 16, "gamma": True},
    "LSQ, signed, 128": {"method": "lsq", "levels": 128},
}


@pytest.mark.slow
def test_each_level_is_that_of_the_method(tmp_path: Path) -> None:
    """Near and far values, zeros and large ones, in torch and in a file."""
    torch.manual_seed(0)
    layers = []
    for options in METHODS.values():
        layer = QuantConv2d(3, 2, 1)
        part = QuantizerConfig(tag="fm", enable=True, **options)
        layer.build_quantizers(QuantConfig(fm=part), "0")
        for name, value in layer.quant_activation.named_parameters():
            with torch.no_grad():
                if name == "gamma":
                    value.fill_(0.7)
                elif name.startswith(("width", "start")):
                    value.add_(torch.randn_like(value) / 20)
        layers.append(layer)
    layers += [network_of(ZeroPoint)[0], network_of(Many, levels=40)[0]]
    network = Beside(layers).eval()
    path = tmp_path / "x.onnx"
    GRAPH_FORMATS["onnx"](deploy_graph(network, (3, 8, 8)), path)
    x = torch.randn(4, 3, 8, 8) * torch.tensor([0.5, 2.0, 30.0, 1e4]).reshape(-1, 1, 1, 1)
    x[:, :, 0] = torch.tensor([0.0, -0.0, 1e-20, -1e-20, 0.1, 0.3, 1.0, -1.0])
    expected, found = (
        torch_values(network, x),
        Engine("onnxruntime", False).open(path, tensors=True)(x.numpy()),
    )
    assert len(found) == len(METHODS) + 3
    for name, value in expected.items():
        if name != "logits":
            np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def network_of(kind: type[Quantizer], half_range: bool = True, levels: int = 4) -> nn.Module:
    torch.manual_seed(0)
    layer = QuantConv2d(3, 2, 1)
    config = QuantizerConfig(tag="fm", enable=True, method="lsq", levels=levels, half_range=half_range)
    layer.build_quantizers(QuantConfig(fm=config), "0")
    own = layer.quant_activation
    assert isinstance(own, Quantizer)
    layer.quant_activation = kind(own.config, own.site)
    return nn.Sequential(layer, nn.Flatten()).eval()


def test_thresholds_are_the_places_where_levels_begin() -> None:
    network = network_of(Uneven)
    quantizer = network[0].quant_activation
    places, levels = thresholds("0", quantizer, torch.rand(2, 3, 1, 1))
    assert places.flatten().tolist() == [float(torch.tensor(place)) for place in PLACES]
    assert levels.flatten().tolist() == list(LEVELS)
    x = torch.randn(2, 3, 5, 5)
    assert torch.equal(by_thresholds(x, places, levels), quantizer(x))
    assert (
        deploy_graph(network, (3, 1, 1)).activations["0.quant_activation"].reason == "its levels are uneven"
    )


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Folded, "a larger value must never get a lower level"),
        (Falling, "a larger value must never get a lower level"),
        (Other, "it makes 7 of 1..*, where 2 follows from where its levels begin"),
        (
            Wrong,
            "the integers of lsq are not the values that it trains; mend its encode, or export --to program",
        ),
    ],
)
def test_a_method_that_thresholds_do_not_give_is_refused(kind: type[Quantizer], message: str) -> None:
    with pytest.raises(UserError, match=rf"^0.quant_activation: .*{message}"):
        deploy_graph(network_of(kind), (3, 1, 1))


class Stepped(Uneven):
    """Even levels, as its integers and its grid say; values that are not in the example are others."""

    def quantize(self, x: Tensor) -> Tensor:
        return torch.where(x > 1.2, x.round().clamp(0, 3) / 2, (x * 2).round().clamp(0, 3) / 2)

    def encode(self, x: Tensor) -> QuantizedTensor:
        numbers = (self.quantize(x) * 2).long()
        book = torch.arange(4.0).reshape(1, -1)
        return QuantizedTensor(
            codes=numbers, scale=torch.tensor(0.5), numbers=numbers, codebook=book, factor=torch.tensor(0.5)
        )

    def search_grid(self) -> Grid:
        return Grid.of(4, True)


class Signed(LearnedRange):
    """Levels on both sides of zero, and others above 5."""

    def quantize(self, x: Tensor) -> Tensor:
        value = self.grid().nearest(x, self.clip(x))
        return torch.where(x > 5, -value, value)


@pytest.mark.parametrize(("kind", "half_range"), [(Stepped, True), (Signed, False)])
def test_a_grid_that_is_not_what_a_method_quantizes_is_refused(
    kind: type[Quantizer], half_range: bool
) -> None:
    with pytest.raises(
        UserError, match=r"lsq cannot be exported: it makes .* and its search_grid and its integers"
    ):
        deploy_graph(network_of(kind, half_range), (3, 1, 1))
