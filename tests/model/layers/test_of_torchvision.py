"""torchvision's Swin attention that calls its layers: the same as torchvision's in full precision, and quantized."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2

from model.audit import audit
from model.convert import below_zero, quantize
from model.layers.called import call_layers
from model.quant import QuantConfig, QuantizerConfig
from model.selection import Left
from tests.model.foreign import config, swin_transformer


@pytest.mark.parametrize("kind", [ShiftedWindowAttention, ShiftedWindowAttentionV2])
@pytest.mark.parametrize(
    ("size", "window", "shift"),
    [
        ((8, 8), [4, 4], [0, 0]),
        ((8, 12), [4, 4], [2, 2]),
        ((7, 9), [4, 2], [2, 1]),  # padded
        ((4, 8), [4, 4], [2, 2]),  # rolled along one side alone
        ((3, 3), [4, 4], [2, 2]),  # one window
    ],
)
@pytest.mark.parametrize("bias", [True, False])
def test_it_computes_what_torchvision_does(
    kind: type[ShiftedWindowAttention], size: tuple[int, int], window: list[int], shift: list[int], bias: bool
) -> None:
    """Gradients too; the same elements are dropped; the bias of Swin V2's key is none, whatever it holds."""
    torch.manual_seed(0)
    theirs = kind(8, window, shift, 2, qkv_bias=bias, attention_dropout=0.3, dropout=0.3)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.5)
    theirs.double()
    ours = copy.deepcopy(theirs)
    call_layers(ours)
    assert type(ours) is not kind and list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, *size, 8, dtype=torch.float64)
    for training in (True, False):
        results = []
        for module in (theirs, ours):
            torch.manual_seed(1)
            module.zero_grad()
            y = module.train(training)(x)
            y.square().sum().backward()
            results.append([y, *(parameter.grad for parameter in module.parameters())])
        for expected, found in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("v2", [False, True])
def test_swin_is_quantized(v2: bool) -> None:
    """All but the ends; of V2 the layers too that compute the bias of positions from a table."""
    torch.manual_seed(0)
    net, x = swin_transformer(v2=v2), torch.randn(2, 3, 32, 32)
    full = net.eval()(x)
    assert below_zero(net, x)["features.1.0.attn.qkv"] > 0.5  # behind a layer norm
    assert type(net.get_submodule("features.1.0.attn.qkv")) is nn.Linear
    report = quantize(net, config(), example=(x,))
    assert not [left for left in report.left if left.name not in ("features.0.0", "head")]
    assert "features.1.0.attn.qkv" in report.replaced
    assert not audit(net, [x], config()).problems
    net.train()(x).sum().backward()
    grad = net.get_parameter("features.1.0.attn.qkv.weight").grad
    assert grad is not None and grad.any()
    assert not torch.allclose(net.eval()(x), full)


class OwnAttention(ShiftedWindowAttention):
    """Whose forward may be another one."""


def test_an_attention_of_another_class() -> None:
    net = swin_transformer()
    net.get_submodule("features.1.0.attn").__class__ = OwnAttention
    wt = QuantizerConfig(tag="wt", enable=True, method="lsq", levels=4)
    report = quantize(net, QuantConfig(wt=wt))
    assert [left for left in report.left if ".attn." in left.name] == [
        Left(f"features.1.0.attn.{name}", "is used by OwnAttention without a call")
        for name in ("qkv", "proj")
    ]
