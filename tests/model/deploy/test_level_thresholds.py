"""Thresholds of methods with uneven levels: those of your own are compared with the method before they are exported."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from model.deploy.graph import deploy_graph
from model.deploy.level_thresholds import by_thresholds, thresholds
from model.quant import Grid, QuantConfig, QuantConv2d, QuantizerConfig
from model.quantizers.frame import Quantizer
from model.quantizers.integers import QuantizedTensor
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


def network_of(kind: type[Quantizer]) -> nn.Module:
    torch.manual_seed(0)
    layer = QuantConv2d(3, 2, 1)
    config = QuantizerConfig(tag="fm", enable=True, method="lsq", levels=4, half_range=True)
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
        (
            Folded,
            "it makes 0 of 5..*, where 2 follows from where its levels begin; a larger value must never get",
        ),
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


def test_a_grid_that_is_not_what_a_method_quantizes_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"lsq cannot be exported: it makes .* and its search_grid and its integers"
    ):
        deploy_graph(network_of(Stepped), (3, 1, 1))
