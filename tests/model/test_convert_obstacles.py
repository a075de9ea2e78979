"""What cannot be converted, what the example shows of it, and layers that are registered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations
from torchvision.ops import DeformConv2d

from model.audit import audit
from model.convert import Left, full_precision, quantize, register_layer
from model.layers import bits
from model.layers.convolution import QuantConv2d
from tests.model.foreign import config, vision_transformer

# What cannot be quantized --------------------------------------------------------------------------


class Doubled(nn.Conv2d):
    """A convolution that does more."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def replaced_forward() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.forward = lambda input: input  # pyright: ignore[reportIncompatibleMethodOverride]
    return layer


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Doubled(4, 4, 1), "is a Doubled, whose forward may not be nn.Conv2d's; see register_layer"),
        (
            lambda: nn.LazyLinear(4),
            "is a LazyLinear, which has no weights yet: run the network once before",
        ),
        (
            lambda: parametrizations.weight_norm(nn.Linear(4, 4)),
            "is parametrized, which has changed its class: quantize first, parametrize then",
        ),
        (replaced_forward, "has had its forward replaced"),
        (lambda: nn.Conv3d(4, 4, 1), "is a Conv3d, which has no quantized form"),
        (lambda: nn.ConvTranspose2d(4, 4, 1), "is a ConvTranspose2d, which has no quantized form"),
        (lambda: DeformConv2d(4, 4, 1), "is a DeformConv2d, which has no quantized form"),
        (lambda: nn.Bilinear(4, 4, 4), "is a Bilinear, which has no quantized form"),
        (lambda: nn.LSTM(4, 4), "is a LSTM, which has no quantized form"),
        (lambda: nn.GRUCell(4, 4), "is a GRUCell, which has no quantized form"),
    ],
)
def test_an_obstacle(make: Callable[[], nn.Module], reason: str) -> None:
    net = nn.Sequential(nn.Linear(4, 4), make(), nn.Linear(4, 4))
    kind = type(net[1])
    report = quantize(net, config(first_last=True))
    assert report.replaced == ("0", "2")
    assert report.left == (Left("1", reason),)
    assert type(net[1]) is kind


def test_what_was_put_in_later_is_found() -> None:
    """A recurrent layer too, whose products nobody else would see."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    quantize(net, config(first_last=True))
    net.append(nn.GRU(4, 4))
    assert full_precision(net) == ("2",)
    (problem,) = audit(net, [torch.randn(2, 3, 4)]).problems
    assert problem.startswith("2 computes in full precision")


def test_a_layer_that_is_parametrized_then_stays_quantized() -> None:
    net, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(2, 4)
    quantize(net, config(first_last=True))
    parametrizations.weight_norm(net[1])
    net(x).sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    assert not audit(net, [x]).problems


def test_a_subclass_at_the_end_is_the_last_layer() -> None:
    """The layer next to it is not the last one instead."""
    net = nn.Sequential(Doubled(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), Doubled(4, 4, 1))
    assert quantize(net, config()).replaced == ("1", "2")


class OwnAttention(nn.MultiheadAttention):
    """Whose forward may be another one."""


def test_an_attention_of_another_class() -> None:
    """Its output projection is never called, so that a quantizer there would be idle."""
    net = vision_transformer()
    attentions = [name for name, each in net.named_modules() if isinstance(each, nn.MultiheadAttention)]
    net.get_submodule(attentions[0]).__class__ = OwnAttention
    assert quantize(net, config()).left == (
        Left("conv_proj", "is the first layer"),
        Left(attentions[0], "projects its inputs by a parameter, not by a layer"),
        Left(f"{attentions[0]}.out_proj", "is used by OwnAttention without a call"),
        Left("heads.head", "is the last layer"),
    )


class Functional(nn.Module):
    """Uses a layer's weight without calling it, as nobody could know."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.second, self.last = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = functional.linear(self.first(x), self.inner.weight, self.inner.bias)
        return self.last(self.second(x))


def test_the_example_shows_what_is_not_called() -> None:
    net, x = Functional().train(), torch.randn(2, 4)
    report = quantize(net, config(), example=(x,))
    assert report.replaced == ("second",)
    assert Left("inner", "is not called as a module") in report.left
    assert net.training and not audit(net, [x]).problems


def test_without_an_example_the_audit_shows_it() -> None:
    net = Functional()
    quantize(net, config())
    assert audit(net, [torch.randn(2, 4)]).problems == (
        "inner.quant_activation was never reached",
        "inner.quant_weight was never reached",
    )


# Registered layers ---------------------------------------------------------------------------------


class Wrapper(nn.Conv2d):
    """A convolution with a norm and an activation of its own, as detection frameworks have."""

    def __init__(self, *args: Any, norm: nn.Module, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.norm, self.activation = norm, torch.relu

    def forward(self, input: Tensor) -> Tensor:
        return self.activation(self.norm(super().forward(input)))


class QuantWrapper(QuantConv2d, Wrapper):
    """The same, quantized."""

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.norm(QuantConv2d.forward(self, x)))


@pytest.fixture
def own_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the table, so that what a test registers ends with it."""
    monkeypatch.setattr(bits, "LAYERS", dict(bits.LAYERS))


def test_a_registered_layer(own_layers: None) -> None:
    net = nn.Sequential(
        Wrapper(3, 4, 3, padding=1, norm=nn.BatchNorm2d(4)), Wrapper(4, 4, 1, norm=nn.Identity())
    )
    names = [name for name, _ in net.named_parameters()]
    register_layer(Wrapper, QuantWrapper)
    assert quantize(net, config(first_last=True)).replaced == ("0", "1")
    assert [name for name, _ in net.named_parameters() if ".quant_" not in name] == names
    layer, x = net[0], torch.randn(2, 3, 6, 6)
    assert type(layer) is QuantWrapper
    padded = layer.quant_activation(functional.pad(x, (1, 1, 1, 1)))
    expected = functional.conv2d(padded, layer.quant_weight(layer.weight), layer.bias)
    torch.testing.assert_close(layer.eval()(x), layer.norm(expected).relu())


def test_a_registered_layer_on_one_image(own_layers: None) -> None:
    """Its own part of the work is done once."""
    net = Wrapper(3, 4, 3, norm=nn.Softplus())
    register_layer(Wrapper, QuantWrapper)
    quantize(net, config(first_last=True))
    x = torch.randn(1, 3, 6, 6)
    torch.testing.assert_close(net.eval()(x[0]), net(x)[0])


@pytest.mark.parametrize(
    ("kind", "quantized", "message"),
    [
        (nn.Conv2d, QuantConv2d, "Conv2d is registered already"),
        (Wrapper, QuantConv2d, "QuantConv2d: not a subclass of Wrapper and a quantized layer"),
        (Wrapper, Wrapper, "Wrapper: not a subclass of Wrapper and a quantized layer"),
    ],
)
def test_a_class_that_cannot_be_registered(
    own_layers: None, kind: type[nn.Module], quantized: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        register_layer(kind, quantized)
