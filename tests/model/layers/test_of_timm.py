"""The quantized forms of timm's own layers: the same as theirs in full precision, and with quantized tensors."""

from __future__ import annotations

import sys

import pytest
import timm.layers
import torch
from torch import Tensor, nn

from model.convert import below_zero, called, full_precision, quantize
from model.layers import bits
from model.layers.called import SWIN
from model.layers.of_timm import QuantConv2dSame, QuantTimmLinear
from model.quant import QuantConfig, QuantizerConfig, quantizers
from model.selection import Selection
from utils.errors import UserError

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


@pytest.mark.parametrize(
    "name", ["beit_base_patch16_224", "eva02_tiny_patch14_224", "swinv2_tiny_window8_256"]
)
def test_attentions_call_their_layer(name: str) -> None:
    """`qkv` is quantized, gets a gradient, and its bias is still added: without quantizers the result is the same."""
    torch.manual_seed(0)
    small = {"depths": (1, 1), "num_heads": (1, 2)} if "swin" in name else {"depth": 1, "num_heads": 2}
    network = timm.create_model(
        name,
        num_classes=4,
        img_size=32,
        embed_dim=16,
        **small,
        **({"patch_size": 4} if "swin" in name else {}),
    ).eval()
    for parameter in network.parameters():  # its biases start at zero
        nn.init.normal_(parameter, std=0.1)
    x = torch.randn(2, 3, 32, 32)
    full = network(x)
    before = dict(network.state_dict())
    seen, attention = (
        below_zero(network, x),
        next(m for m in network.modules() if hasattr(m, "qkv_bias_separate")),
    )
    assert any(place.endswith("qkv") for place in seen) and not attention.qkv_bias_separate
    report = quantize(network, config(half_range=False), example=(x,))
    attentions = [name for name in report.replaced if name.endswith("qkv")]
    assert attentions and not any(left.name.endswith("qkv") for left in report.left)
    network.train()(x).sum().backward()
    for place in attentions:
        layer = network.get_submodule(place)
        assert layer.weight.grad is not None and layer.weight.grad.abs().sum() > 0
    assert {*attentions} <= {*called(network, x)[1]}
    for _, quantizer in quantizers(network):
        quantizer.enabled = False
    torch.testing.assert_close(network.eval()(x), full, rtol=1e-4, atol=1e-5)
    assert set(before) <= set(network.state_dict())


def test_a_refused_conversion_leaves_attentions_as_they_were() -> None:
    network = timm.create_model(
        "beit_base_patch16_224", num_classes=4, img_size=32, embed_dim=16, depth=1, num_heads=2
    )
    with pytest.raises(UserError, match="no layer"):
        quantize(network, config(), select=Selection(include=("nothing",)))
    assert not network.blocks[0].attn.qkv_bias_separate


def test_timm_is_not_imported_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that does not use timm does not wait for it."""
    assert timm.layers.Linear in bits.forms()
    monkeypatch.delitem(sys.modules, "timm.layers")
    monkeypatch.delitem(sys.modules, SWIN, raising=False)
    assert set(bits.forms()) == set(bits.LAYERS) and timm.layers.Linear not in bits.LAYERS
