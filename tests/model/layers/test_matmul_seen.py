"""What is seen of attention's products: their cost, what the audit finds, and networks that are refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import timm
import torch
from torch import nn

from model.audit import audit
from model.convert import quantize
from model.layers.matmul import QuantMatmul
from model.layers.quantized import QuantLayer
from model.quant import QuantConfig, QuantizerConfig
from model.selection import Selection
from model.watch.cost import network_cost
from tests.model.foreign import OwnAttention, Turned, config, product_config, timm_vit
from utils.config.layer_bits import PARTS
from utils.errors import UserError


def test_the_cost_of_the_products() -> None:
    """Of 6 x 6 x 4 products for each of 2 heads and both of them, of 2 bits each."""
    net, x = nn.Sequential(nn.Flatten(2), Turned(), OwnAttention("plain", heads=2)), torch.zeros(1, 8, 2, 3)
    before = network_cost(net, (2, 3), 8)
    quantize(net, dataclasses.replace(product_config(), first_last=False), example=(x,))
    found = network_cost(net, (2, 3), 8)
    assert [(one.macs, one.bits) for one in found.matmuls] == [(6 * 6 * 4 * 2, 2)] * 2
    assert (found.macs, before.matmuls) == (before.macs, ())
    assert found.table().splitlines()[-1] == (
        "beside the total, 2 products of attention with both factors quantized: lsq 2 bit, 4 levels, 1 gr.; 576 MACs, "
        "2,304 bit operations"
    )


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("products", [False, True])
def test_an_operator_that_torch_compiles(products: bool) -> None:
    net, x = nn.Sequential(OwnAttention("flex")), torch.randn(2, 6, 4)
    with pytest.raises(
        UserError, match=r"^the network calls flex_attention, .* call torch\.nn\.functional\.scaled_dot"
    ):
        quantize(net, config(attention_matmul=products, first_last=True), example=(x,))
    with pytest.raises(UserError, match=r"^the network calls flex_attention, "):
        network_cost(nn.Sequential(nn.Flatten(2), Turned(), OwnAttention("flex")), (2, 3), 4)


def test_the_audit_sees_a_factor_that_is_not_quantized() -> None:
    net, x = timm_vit(), torch.randn(2, 3, 32, 32)
    wanted = config(attention_matmul=True)
    quantize(net, wanted, example=(x,))
    product = net.get_submodule("blocks.0.attn.matmuls.query_key")
    product.forward = lambda left, right, scale: left @ product.quant_right(right)  # pyright: ignore
    assert any("query_key" in line and "quant_left" in line for line in audit(net, [x], wanted).problems)
    product.quant_left = nn.Identity()
    assert any("query_key.quant_left" in line for line in audit(net, [x], wanted).problems)


def test_the_audit_sees_products_that_are_not_quantized() -> None:
    """In a network that was quantized without them, and outside of the layers; not where the selection left them."""
    x, wanted = torch.randn(2, 6, 4), product_config()
    net = nn.Sequential(OwnAttention("plain"))
    quantize(net, dataclasses.replace(wanted, attention_matmul=False), example=(x,))
    assert any("0 multiplies two activations" in line for line in audit(net, [x], wanted).problems)
    net = nn.Sequential(nn.Linear(4, 4))
    quantize(net, dataclasses.replace(wanted, attention_matmul=False), example=(x,))
    assert any("has no attention" in line for line in audit(net, [x], wanted).problems)
    net = nn.Sequential(OwnAttention("plain"), OwnAttention("products"))
    quantize(net, wanted, example=(x,), select=Selection(exclude=("1*",)))
    left = [line for line in audit(net, [x], wanted).problems if "two activations" in line]
    assert left == []
    net[0].kind = "products"
    assert any("0 multiplies two activations" in line for line in audit(net, [x], wanted).problems)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 4)), "the network has no attention: leave the word out"),
        (lambda: nn.Sequential(OwnAttention("products")), r"0 \(OwnAttention\): multiplies act"),
        (lambda: nn.Sequential(OwnAttention("two")), r"0 \(OwnAttention\): multiplies"),
        (lambda: nn.Sequential(OwnAttention("three dimensions")), r"0 \(OwnAttention\): multiplies"),
        (lambda: timm.create_model("cait_xxs24_224", img_size=32), r"blocks\.0\.attn, .*TalkingHeadAttn"),
    ],
)
def test_what_is_refused(make: Callable[[], nn.Module], message: str) -> None:
    """By the names of the modules; the network is as it was."""
    net = make()
    x = torch.randn(2, 6, 4) if isinstance(net, nn.Sequential) else torch.randn(1, 3, 32, 32)
    kinds = [type(module) for module in net.modules()]
    with pytest.raises(UserError, match=f"^attention-matmul: {message}"):
        quantize(net, config(attention_matmul=True, first_last=True), example=(x,))
    assert [type(module) for module in net.modules()] == kinds


def test_configurations_that_are_refused() -> None:
    fm = QuantizerConfig(tag="fm", enable=True, method="xnor", levels=2)
    with pytest.raises(UserError, match=r"^attention-matmul: xnor has no levels that start at zero"):
        quantize(timm_vit(), QuantConfig(fm=fm, attention_matmul=True), example=(torch.randn(1, 3, 32, 32),))
    with pytest.raises(UserError, match=r"^attention-matmul: .* give quantize an example"):
        quantize(timm_vit(), config(attention_matmul=True))
    wt = QuantizerConfig(tag="wt", enable=True, method="lsq", levels=4)
    with pytest.raises(UserError, match=r"^attention-matmul: fm quantizes the factors: enable it"):
        quantize(timm_vit(), QuantConfig(wt=wt, attention_matmul=True))


def test_options_name_the_quantizers_of_layers_and_products() -> None:
    assert {**QuantLayer.parts, **QuantMatmul.parts} == PARTS
