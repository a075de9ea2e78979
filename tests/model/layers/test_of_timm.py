"""The quantized forms of timm's own layers: the same as theirs in full precision, and with quantized tensors."""

from __future__ import annotations

import sys

import pytest
import timm.layers
import torch
from torch import Tensor, nn

from model.convert import full_precision, quantize
from model.layers import bits
from model.layers.of_timm import QuantConv2dSame, QuantTimmLinear
from model.quant import QuantConfig, QuantizerConfig

WT = QuantizerConfig(tag="wt", enable=True, method="lsq", levels=4)


def config(method: str = "lsq", *, half_range: bool = True, after: bool = False) -> QuantConfig:
    fm = QuantizerConfig(tag="fm", enable=True, method=method, levels=4, half_range=half_range)
    return QuantConfig(fm=fm, wt=WT, first_last=True, padding_after_quant=after)


def quantized(layer: nn.Module, settings: QuantConfig) -> nn.Module:
    network = nn.Sequential(layer)
    assert quantize(network, settings).replaced == ("0",) and not full_precision(network)
    return network[0]


@pytest.mark.parametrize("size", [(7, 8), (8, 7), (9, 9), (3, 12)])
@pytest.mark.parametrize(
    ("kernel", "stride", "dilation", "groups"), [(3, 2, 1, 1), (5, 2, 1, 4), (3, 1, 2, 2)]
)
@pytest.mark.parametrize(
    ("half_range", "after"), [(True, False), (False, False), (False, True)], ids=["zero", "first", "after"]
)
def test_same_padding(
    size: tuple[int, int], kernel: int, stride: int, dilation: int, groups: int, half_range: bool, after: bool
) -> None:
    """The layer's own convolution of quantized tensors; symmetric levels have no zero, so that padding matters."""
    torch.manual_seed(0)
    theirs = timm.layers.Conv2dSame(4, 8, kernel, stride=stride, dilation=dilation, groups=groups)
    x, expected = (
        torch.randn(2, 4, *size),
        nn.Conv2d(4, 8, kernel, stride=stride, dilation=dilation, groups=groups),
    )
    full = theirs(x)
    layer = quantized(theirs, config(half_range=half_range, after=after))
    assert type(layer) is QuantConv2dSame and isinstance(layer, timm.layers.Conv2dSame)
    expected.load_state_dict({"weight": layer.quant_weight(layer.weight), "bias": layer.bias})

    def padded(values: Tensor) -> Tensor:
        return timm.layers.padding.pad_same(values, [kernel] * 2, [stride] * 2, [dilation] * 2)

    quantize_input = layer.quant_activation
    given = padded(quantize_input(x)) if after else quantize_input(padded(x))
    y = layer(x)
    assert torch.equal(y, expected(given)) and y.shape == full.shape
    layer.quant_activation = layer.quant_weight = nn.Identity()
    assert torch.equal(layer(x), full)
    assert layer(x[:0]).shape == (0, *full.shape[1:])


def test_linear() -> None:
    theirs = timm.layers.Linear(6, 4)
    x = torch.rand(3, 6)
    layer = quantized(theirs, config())
    assert type(layer) is QuantTimmLinear
    expected = nn.functional.linear(layer.quant_activation(x), layer.quant_weight(layer.weight), layer.bias)
    assert torch.equal(layer(x), expected)


def test_timm_is_not_imported_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that does not use timm does not wait for it."""
    assert timm.layers.Linear in bits.forms()
    monkeypatch.delitem(sys.modules, "timm.layers")
    assert set(bits.forms()) == set(bits.LAYERS) and timm.layers.Linear not in bits.LAYERS
