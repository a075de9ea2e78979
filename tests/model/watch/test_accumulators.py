"""The bits of integer sums, against sums of the deploy format's integers computed in NumPy."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from torch import nn

from model.audit import audit
from model.convert import quantize
from model.quant import QuantConfig, QuantizerConfig
from model.selection import Selection
from model.watch.accumulators import accumulators
from utils.report.accumulator_record import Accumulator, accumulator_remark, sum_bits

METHODS = {  # name -> method, and further fields, of weights and of inputs
    "lsq": ({"method": "lsq"}, {"method": "lsq"}),
    "lsq-midtread": ({"method": "lsq", "grid": "midtread"}, {"method": "lsq"}),
    "dorefa": ({"method": "dorefa"}, {"method": "dorefa"}),
    "pact": ({"method": "pact"}, {"method": "pact"}),
    "lsqplus": ({"method": "lsqplus"}, {"method": "lsqplus"}),
}
REST = 0.3  # of a step: what an offset is below the level nearest to zero


def network(weight: dict[str, str], entering: dict[str, str], levels: int, *, signed: bool) -> nn.Sequential:
    torch.manual_seed(levels)
    layers = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3, padding=1, groups=2),
        nn.ReLU(), nn.Flatten(), nn.Linear(96, 5),
    )  # fmt: skip
    config = QuantConfig(
        fm=QuantizerConfig(tag="fm", enable=True, levels=levels, half_range=not signed, **entering),  # pyright: ignore[reportArgumentType]
        wt=QuantizerConfig(tag="wt", enable=True, levels=levels, **weight),  # pyright: ignore[reportArgumentType]
        first_last=True, padding_after_quant=not signed,
    )  # fmt: skip
    quantize(layers, config)
    with torch.no_grad():
        for layer in (layers[0], layers[2], layers[5]):
            if entering["method"] == "lsqplus":
                layer.quant_activation.offset.copy_(
                    layer.quant_activation.clip_val * -(1 + REST) / (levels - 1)
                )
    return layers.eval()


def sums_of(layer: nn.Module, x: torch.Tensor) -> np.ndarray:
    """The layer's output without its bias, over the distances of the codes of weight and input: [N, out, ...]."""
    with torch.no_grad():
        codes = layer.quant_weight.integers(layer.weight)
        scale = layer.quant_activation.integers(x).scale * codes.scale.reshape(-1)
        bias, layer.bias.data = layer.bias.detach().clone(), torch.zeros_like(layer.bias)
        output = layer(x)
        if layer.quant_activation.integers(x).offset is not None:
            # Each place that has a code is REST of a step below the level of that code.
            first = isinstance(layer, nn.Conv2d) and not layer.padding_after_quant
            places = nn.functional.pad(torch.ones_like(x), (1, 1, 1, 1) if first else (0, 0), value=1.0)
            weight = layer.quant_weight(layer.weight)
            if isinstance(layer, nn.Conv2d):
                rest = nn.functional.conv2d(
                    places, weight, None, layer.stride, 0 if first else 1, 1, layer.groups
                )
            else:
                rest = nn.functional.linear(places, weight)
            output += REST * layer.quant_activation.integers(x).scale * rest
        layer.bias.data = bias
    return (output / scale.reshape(1, -1, *[1] * (output.ndim - 2))).double().numpy()


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("levels", [2, 4, 16])
@pytest.mark.parametrize("method", METHODS)
def test_sums_of_images_and_the_worst_case(method: str, levels: int, signed: bool) -> None:
    if "midtread" in method and levels == 2:
        levels = 3
    model = network(*METHODS[method], levels, signed=signed)
    images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    rows = audit(model, [images]).accumulators
    assert [(row.name, row.products) for row in rows] == [("0", 27), ("2", 18), ("5", 96)]
    for row, worst in zip(rows, accumulators(model), strict=True):
        assert (worst.lowest, worst.highest, worst.seen) == (row.lowest, row.highest, None)
        place = int(row.name)
        with torch.no_grad():
            found = sums_of(model[place], model[:place](images))
        assert np.abs(found - np.round(found)).max() < 1e-3
        assert row.seen == (round(found.min()), round(found.max()))
        assert row.lowest <= row.seen[0] <= row.seen[1] <= row.highest
        assert row.bits >= (row.seen_bits or 0)


def test_the_worst_case_is_that_of_all_inputs() -> None:
    """Every input of three values with four levels, signed and unsigned."""
    for signed in (False, True):
        layer = nn.Linear(3, 2, bias=False)
        with torch.no_grad():
            layer.weight.copy_(torch.tensor([[1.0, -1.0, 0.3], [0.4, 0.2, -0.9]]))
        model = nn.Sequential(layer)
        parts = {
            tag: QuantizerConfig(tag=tag, enable=True, method="lsq", levels=4, half_range=half)
            for tag, half in (("wt", False), ("fm", not signed))
        }
        quantize(model, QuantConfig(first_last=True, **parts))  # pyright: ignore[reportArgumentType]
        weight = model[0].quant_weight.integers(layer.weight).codes.numpy()
        codes = (-3, -1, 1, 3) if signed else range(4)
        every = np.array(list(itertools.product(codes, repeat=3))) @ weight.T
        (row,) = accumulators(model)
        assert (row.lowest, row.highest) == (every.min(), every.max())
        assert row.bits == sum_bits(int(every.min()), int(every.max()))


def test_layers_without_integer_sums_are_left_out() -> None:
    parts = {
        tag: QuantizerConfig(tag=tag, enable=True, method="lq", levels=4, half_range=tag == "fm")
        for tag in ("wt", "fm")
    }
    uneven = nn.Sequential(nn.Linear(3, 2))
    quantize(uneven, QuantConfig(first_last=True, **parts))  # pyright: ignore[reportArgumentType]
    weights_alone = network(*METHODS["lsq"], 4, signed=False)
    for layer in (weights_alone[0], weights_alone[2], weights_alone[5]):
        layer.quant_activation.enabled = False
    by_channel = nn.Sequential(nn.Conv2d(4, 2, 1))
    grouped = QuantConfig(
        fm=QuantizerConfig(tag="fm", enable=True, method="lsq", levels=4, quant_group=4),
        wt=QuantizerConfig(tag="wt", enable=True, method="lsq", levels=4), first_last=True,
    )  # fmt: skip
    quantize(by_channel, grouped, select=Selection())
    for model in (uneven, weights_alone, by_channel):
        assert accumulators(model) == ()
    assert accumulator_remark(()) == ""
    assert " bits in 3 layers, the most in 5" in accumulator_remark(
        accumulators(network(*METHODS["lsq"], 4, signed=False))
    )
    row = Accumulator(name="x", products=9, lowest=-(2**15), highest=2**15 - 1)
    rows = (
        row,
        dataclasses.replace(row, name="a", highest=2**15),
        dataclasses.replace(row, name="b", lowest=-(2**20)),
    )
    assert accumulator_remark(rows[:1]) == "at most 16 bits in 1 layer, the most in x"
    assert (
        accumulator_remark(rows)
        == "at most 21 bits in 3 layers, the most in b; above 16 bits in 2 layers: a, b"
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
@pytest.mark.parametrize("part", ["quant_activation", "quant_weight"])
def test_a_range_that_is_no_number_is_the_audits_to_report(part: str, value: float) -> None:
    model = network(*METHODS["lsq"], 4, signed=False)
    with torch.no_grad():
        getattr(model[2], part).clip_val.fill_(value)
    assert audit(model, [torch.randn(2, 3, 8, 8)]).problems or value == 0


@pytest.mark.parametrize(
    ("lowest", "highest", "bits"), [(0, 1, 2), (-1, 0, 1), (-2, 1, 2), (0, 255, 9), (-32769, 32767, 17)]
)
def test_bits_in_twos_complement(lowest: int, highest: int, bits: int) -> None:
    assert sum_bits(lowest, highest) == bits
