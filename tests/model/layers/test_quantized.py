"""The quantized layers: what they pad, quantize and add, in which order and precision."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from model.layers.convolution import QuantConv1d, QuantConv2d
from model.layers.quantized import QuantLinear, quantizers
from model.quantizers.registry import methods
from tests import oracle
from tests.model.layers.convolution import conv, image
from tests.oracle import Array, Groups
from utils.config.schema import QuantConfig, QuantizerConfig

LSQ = {"enable": True, "method": "lsq", "levels": 4}
BOTH = QuantConfig(fm=QuantizerConfig(tag="fm", half_range=True, **LSQ), wt=QuantizerConfig(tag="wt", **LSQ))
FULL_RANGE = dataclasses.replace(BOTH, fm=QuantizerConfig(tag="fm", **LSQ))


CONVOLUTIONS: dict[str, tuple[dict[str, Any], tuple[int, int, int, int], str]] = {
    # options, pads left, right, top, bottom, mode of functional.pad
    "plain": ({}, (0, 0, 0, 0), "constant"),
    "number": ({"padding": 2}, (2, 2, 2, 2), "constant"),
    "tuple": ({"padding": (1, 2)}, (2, 2, 1, 1), "constant"),
    "valid": ({"padding": "valid"}, (0, 0, 0, 0), "constant"),
    "same": ({"padding": "same"}, (1, 1, 1, 1), "constant"),
    "same, even kernel": ({"kernel": (2, 4), "padding": "same"}, (1, 2, 0, 1), "constant"),
    "same, dilated": ({"kernel": (2, 3), "padding": "same", "dilation": (3, 2)}, (2, 2, 1, 2), "constant"),
    "stride": ({"padding": 1, "stride": (2, 3)}, (1, 1, 1, 1), "constant"),
    "dilation": ({"padding": 2, "dilation": 2}, (2, 2, 2, 2), "constant"),
    "no bias": ({"padding": 1, "bias": False}, (1, 1, 1, 1), "constant"),
    "groups": ({"padding": 1, "channels": (4, 6), "groups": 2}, (1, 1, 1, 1), "constant"),
    "depth-wise": ({"padding": 1, "channels": (4, 8), "groups": 4}, (1, 1, 1, 1), "constant"),
    "reflect": ({"padding": (2, 1), "padding_mode": "reflect"}, (1, 1, 2, 2), "reflect"),
    "replicate": ({"padding": 1, "padding_mode": "replicate"}, (1, 1, 1, 1), "replicate"),
    "circular": ({"padding": 1, "padding_mode": "circular"}, (1, 1, 1, 1), "circular"),
    "reflect, same": ({"padding": "same", "padding_mode": "reflect"}, (1, 1, 1, 1), "reflect"),
}
RANGES = {
    "half": BOTH,
    "full": FULL_RANGE,
    "grouped": dataclasses.replace(
        FULL_RANGE,
        fm=QuantizerConfig(tag="fm", quant_group=2, **LSQ),
        ot=QuantizerConfig(tag="ot", quant_group=-2, **LSQ),
    ),
    "adaptive": dataclasses.replace(
        BOTH, fm=QuantizerConfig(tag="fm", half_range=True, adaptive="var-mean", **LSQ)
    ),
    "STE-scale": QuantConfig(
        fm=QuantizerConfig(
            tag="fm", enable=True, method="pact", levels=4, half_range=True, grad_type="STE-scale"
        )
    ),
    "element-scale": dataclasses.replace(
        BOTH, fm=QuantizerConfig(tag="fm", half_range=True, grad_scale="scale-element", **LSQ)
    ),
    "weight": dataclasses.replace(BOTH, fm=QuantizerConfig(tag="fm")),
}


@pytest.mark.parametrize("method", sorted({name for name, _ in methods()}))
@pytest.mark.parametrize(
    "options",
    [{}, {"padding": 2, "stride": 2, "bias": False}, {"padding": 2, "dilation": 2, "groups": 4}],
    ids=["plain", "stride", "depth-wise"],
)
def test_one_dimension_is_that_of_images_one_pixel_high(method: str, options: dict[str, Any]) -> None:
    levels = 2 if method in ("xnor", "reactnet") else 3 if method == "fatnn" else 4
    parts = {
        tag: QuantizerConfig(tag=tag, enable=True, method=method, levels=levels, half_range=half)
        for tag, half in (("fm", levels != 2), ("wt", False))
    }
    torch.manual_seed(0)
    line, wanted = QuantConv1d(4, 8, 3, **options), QuantConv2d(4, 8, (1, 3), **in_two_dimensions(options))
    for layer in (line, wanted):
        layer.build_quantizers(QuantConfig(**parts), "conv1")
    state = {
        name: value.reshape(wanted.state_dict()[name].shape) for name, value in line.state_dict().items()
    }
    wanted.load_state_dict(state)
    x = image(3, 4, 9).requires_grad_()
    y = x.detach()[:, :, None].requires_grad_()
    found, expected = line(x), wanted(y)
    torch.testing.assert_close(found, expected[:, :, 0], rtol=1e-6, atol=1e-6)
    g = image(*found.shape)
    found.backward(g)
    expected.backward(g[:, :, None])
    assert x.grad is not None and y.grad is not None
    torch.testing.assert_close(x.grad, y.grad[:, :, 0], rtol=1e-5, atol=1e-6)
    others = dict(wanted.named_parameters())
    for name, parameter in line.named_parameters():
        assert (parameter.grad is None) == (others[name].grad is None), name
        if parameter.grad is not None:
            other = others[name].grad.reshape(parameter.shape)
            torch.testing.assert_close(parameter.grad, other, rtol=1e-4, atol=1e-5)
    line.eval()
    torch.testing.assert_close(line(x[0]), line(x)[0])  # one of them, without the dimension of several


def in_two_dimensions(options: dict[str, Any]) -> dict[str, Any]:
    """The options of a convolution over the last of two dimensions."""
    first = {"padding": 0, "stride": 1, "dilation": 1}
    return {name: (first[name], value) if name in first else value for name, value in options.items()}


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("config", RANGES.values(), ids=RANGES)
@pytest.mark.parametrize(("options", "pads", "mode"), CONVOLUTIONS.values(), ids=CONVOLUTIONS)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_convolution_pads_and_quantizes_in_order(
    options: dict[str, Any], pads: tuple[int, int, int, int], mode: str, config: QuantConfig, after: bool
) -> None:
    layer = conv(config, padding_after_quant=after, **options)
    x = image(2, 4, 7, 8).requires_grad_()
    other = copy.deepcopy(layer)
    xr = x.detach().clone().requires_grad_()
    padded = other.quant_activation(functional.pad(xr, pads, mode)) if not after else functional.pad(
        other.quant_activation(xr), pads, mode
    )  # fmt: skip
    weight = other.quant_weight(other.weight)
    expected = other.quant_output(
        functional.conv2d(padded, weight, other.bias, other.stride, 0, other.dilation, other.groups)
    )
    y = layer(x)
    torch.testing.assert_close(y, expected)
    gy = image(*y.shape)
    y.backward(gy)
    expected.backward(gy)
    torch.testing.assert_close(x.grad, xr.grad)
    for mine, reference in zip(layer.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, reference.grad)


@pytest.mark.parametrize(("after", "border"), [(False, True), (True, False)])
@pytest.mark.parametrize("method", ["lsq", "xnor", "dorefa", "pact", "lq"])
def test_padded_positions_take_a_level_or_exact_zero(method: str, after: bool, border: bool) -> None:
    """A full range of two levels has no zero: a 1x1 kernel of ones shows what the padding became."""
    config = QuantConfig(fm=QuantizerConfig(tag="fm", enable=True, method=method, levels=2))
    layer = QuantConv2d(4, 1, 1, padding=1, bias=False, padding_after_quant=after)
    layer.build_quantizers(config, "conv1")
    nn.init.ones_(layer.weight)
    level = layer.eval().quant_activation(torch.zeros(1, 4, 1, 1))[0, 0, 0, 0].item()
    assert abs(level) > 0.5
    y = layer(image(2, 4, 5, 5))
    edge = torch.cat([y[:, :, 0].flatten(), y[:, :, -1].flatten(), y[..., 0].flatten(), y[..., -1].flatten()])
    torch.testing.assert_close(edge, torch.full_like(edge, 4 * level if border else 0.0))


def test_binary_padding_is_plus_one() -> None:
    layer = QuantConv2d(4, 1, 1, padding=1, bias=False)
    layer.build_quantizers(
        QuantConfig(fm=QuantizerConfig(tag="fm", enable=True, method="xnor", levels=2)), "conv1"
    )
    nn.init.ones_(layer.weight)
    assert layer(image(1, 4, 3, 3))[0, 0, 0].tolist() == [4.0] * 5


@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 6)])
@pytest.mark.parametrize("groups", [None, 2, 6])
def test_linear(shape: tuple[int, ...], groups: int | None) -> None:
    fm = QuantizerConfig(tag="fm", half_range=True, quant_group=groups, **LSQ)
    config = QuantConfig(fm=fm, wt=QuantizerConfig(tag="wt", **LSQ), ot=QuantizerConfig(tag="ot", **LSQ))
    layer = QuantLinear(6, 4)
    layer.build_quantizers(config, "classifier")
    activation, weight = (layer.get_parameter(f"quant_{part}.clip_val") for part in ("activation", "weight"))
    assert tuple(activation.shape) == ((1,) if groups is None else (1, groups))
    assert tuple(weight.shape) == (4, 1)
    nn.init.uniform_(activation, 0.5, 1.5)
    x = image(*shape)
    y = layer(x)
    assert y.shape == (*shape[:-1], 4)

    def double(value: Tensor) -> Array:
        return value.detach().double().numpy()

    axis = len(shape) - 1
    count = groups or 1
    quantized = oracle.uniform_round(
        double(x), Groups(count, axis).spread(double(activation).ravel(), double(x)), 4, True
    )
    weights = oracle.uniform_round(double(layer.weight), double(weight), 4, False)
    output = oracle.uniform_round(quantized @ weights.T + double(layer.bias), np.ones(1), 4, False)
    np.testing.assert_allclose(double(y), output, atol=1e-5)
    y.sum().backward()
    assert activation.grad is not None
    assert activation.grad.shape == activation.shape


@pytest.mark.parametrize("fields", [{}, {"adaptive": "mean-var"}, {"quant_group": 2}], ids=str)
def test_one_sample_without_a_batch(fields: dict[str, Any]) -> None:
    """As the base classes take it; channels and samples are told apart all the same."""
    config = QuantConfig(
        fm=QuantizerConfig(tag="fm", enable=True, method="lsq", levels=4, half_range=True, **fields),
        wt=QuantizerConfig(tag="wt", enable=True, method="lsq", levels=4),
        ot=QuantizerConfig(tag="ot", enable=True, method="lsq", levels=8, **fields),
    )
    for layer, x in ((QuantConv2d(4, 6, 3), torch.randn(4, 5, 7)), (QuantLinear(4, 6), torch.randn(4))):
        layer.build_quantizers(config, "layer")
        assert torch.equal(layer(x), layer(x.unsqueeze(0)).squeeze(0))


@pytest.mark.parametrize("layer", [QuantConv2d(4, 6, 3), QuantLinear(4, 6)], ids=["conv", "linear"])
def test_identity_quantizers_own_nothing(layer: QuantConv2d | QuantLinear) -> None:
    layer.build_quantizers(QuantConfig(), "layer")
    assert layer.state_dict().keys() == {"weight", "bias"}
    assert list(layer.quantizers()) == []
    x = image(2, 4, 5, 5) if isinstance(layer, QuantConv2d) else image(2, 4)
    plain = functional.conv2d if isinstance(layer, QuantConv2d) else functional.linear
    assert torch.equal(layer(x), plain(x, layer.weight, layer.bias))


def test_layers_list_their_quantizers() -> None:
    network = nn.Sequential(conv(BOTH), nn.ReLU(), conv(QuantConfig(), (6, 2)))
    assert [part for part, _ in conv(BOTH).quantizers()] == ["quant_activation", "quant_weight"]
    assert [name for name, _ in quantizers(network)] == ["0.quant_activation", "0.quant_weight"]


def test_convolution_under_autocast_computes_in_the_lower_precision() -> None:
    layer = conv(BOTH, padding=1)
    other = copy.deepcopy(layer)
    x = image(2, 4, 7, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        expected = functional.conv2d(
            other.quant_activation(x), other.quant_weight(other.weight), other.bias, padding=1
        )
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected)
    y.float().sum().backward()
    assert all(
        parameter.grad is not None and parameter.grad.isfinite().all() for parameter in layer.parameters()
    )
