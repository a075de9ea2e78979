"""The quantized forms of timm's own layers: the same as theirs in full precision, and with quantized tensors."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import timm.layers
import torch
from torch import Tensor, nn

from model import pretrained
from model.audit import audit
from model.calibrate import initialise_ranges
from model.convert import below_zero, called, full_precision, quantize
from model.deploy import packed
from model.deploy.graph import deploy_graph
from model.deploy.onnx_qdq import qdq_model
from model.layers import bits
from model.layers.called import SWIN
from model.layers.of_timm import QuantConv2dSame, QuantTimmLinear
from model.load import Trained
from model.quant import QuantConfig, QuantizerConfig, quantizers
from model.selection import Left, Selection
from model.training.oscillation import Freezing, dampening
from model.watch.accumulators import accumulators
from model.watch.health import Health
from model.watch.probe import Probe
from utils.config.resolve import read
from utils.config.schema import Config, ProbeConfig
from utils.data.transform import ImageTransform
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


STANDARDISED = [
    timm.layers.StdConv2d, timm.layers.StdConv2dSame, timm.layers.ScaledStdConv2d, timm.layers.ScaledStdConv2dSame,
]  # fmt: skip


def standardised(layer: nn.Module) -> np.ndarray:
    """The weight that timm's layer multiplies by, in float64: arXiv 1903.10520 and 2101.08692."""
    weight = layer.weight.detach().double().numpy()
    mean, variance = (f(weight, axis=(1, 2, 3), keepdims=True) for f in (np.mean, np.var))
    gain = layer.gain.detach().double().numpy() * weight[0].size ** -0.5 if hasattr(layer, "gain") else 1
    return (weight - mean) / np.sqrt(variance + 1e-6) * gain


@pytest.mark.parametrize("kind", STANDARDISED)
@pytest.mark.parametrize("stride", [1, 2])
def test_standardised_weights(kind: type[nn.Conv2d], stride: int, tmp_path: Path) -> None:
    """The standardised weight is quantized, wherever a weight is looked at; gradients reach the parameters."""
    torch.manual_seed(0)
    theirs, x = kind(4, 8, 3, stride=stride), torch.randn(2, 4, 7, 8)
    full = theirs(x)
    layer = quantized(theirs, config(half_range=False))
    weight = layer.full_weight()
    np.testing.assert_allclose(weight.detach().numpy(), standardised(layer), rtol=1e-4, atol=1e-6)
    network = nn.Sequential(layer)
    for _, quantizer in quantizers(network):
        quantizer.enabled = False
    torch.testing.assert_close(layer(x), full, rtol=1e-4, atol=1e-5)
    for _, quantizer in quantizers(network):
        quantizer.enabled = True
    initialise_ranges(network, x)
    # LSQ's first clip value of a channel: 2 * mean |w| / sqrt(highest) of the steps from 0 up
    clip = layer.quant_weight.current_range().flatten().detach().numpy()
    ratio = clip / np.abs(standardised(layer)).mean((1, 2, 3))
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-4)
    assert not audit(network, [x]).problems
    probe = Probe(network, ProbeConfig(enable=True, iterations=(0,)), tmp_path, steps=1, images=2)
    probe.begin(0)
    network(x).square().sum().backward()
    probe.end()
    assert all(parameter.grad is not None for parameter in layer.parameters())
    w, q = standardised(layer), layer.quant_weight(weight).detach().double().numpy()
    inside = np.abs(w) <= clip.reshape(-1, 1, 1, 1)
    assert float(dampening(network).detach()) == pytest.approx(float(((q - w) ** 2 * inside).sum()), rel=1e-3)
    with np.load(tmp_path / "iteration-000000.npz") as seen:
        np.testing.assert_allclose(seen["0.weight"], w, rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(seen["0.quantized_weight"], q)
        np.testing.assert_allclose(seen["0.weight.gradient"], seen["0.quantized_weight.gradient"] * inside)
    numbers = Health(network).report(x)
    assert {row.name for row in numbers} == {"0.quant_activation", "0.quant_weight"}
    assert len(accumulators(network)) == 1
    with pytest.raises(UserError, match="--freeze_threshold: 0 computes its weight"):
        Freezing(network, [0.1], 0.1, 5)


@pytest.mark.parametrize("kind", STANDARDISED[1:3])
def test_standardised_weights_leave(kind: type[nn.Conv2d], tmp_path: Path) -> None:
    """As a graph, whose weights are the quantized ones, and packed, where these are standardised no more."""
    torch.manual_seed(0)
    network = nn.Sequential(kind(3, 8, 3, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    x = torch.randn(2, 3, 7, 8)
    quantize(network, config(half_range=False))
    initialise_ranges(network, x)
    with torch.no_grad():
        expected = network.eval()(x)
    graph = deploy_graph(network, (3, 7, 8))
    layer = network[0]
    values = graph.weights["0.quant_weight"].values()
    np.testing.assert_allclose(values, layer.quant_weight(layer.full_weight()).detach(), rtol=1e-6)
    session = onnxruntime.InferenceSession(qdq_model(graph).SerializeToString())
    np.testing.assert_allclose(session.run(None, {"input": x.numpy()})[0], expected, atol=1e-4)
    images = ImageTransform(size=8, mean=(0.5,) * 3, std=(0.25,) * 3)
    trained = Trained(network=network, transform=images, classes=(), config=Config(), source=Path("x"))
    packed.write(trained, tmp_path / "x.safetensors")
    found = packed.read_checkpoint(tmp_path / "x.safetensors")
    network.load_state_dict(found["state_dict"], strict=False)
    pretrained._fix_weights(
        network, found["quantized_weights"], tmp_path, read(["--keyword", "cifar10", "-e"])
    )
    with torch.no_grad():
        torch.testing.assert_close(network(x), expected)


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


def test_mixed_kernels_are_named() -> None:
    """timm's `CondConv2d` stays in full precision, without an example of what runs too."""
    network = nn.Sequential(nn.Conv2d(3, 4, 1), timm.layers.CondConv2d(4, 4, 3), nn.Conv2d(4, 4, 1))
    report = quantize(network, config())
    assert report.left == (Left("1", "is a CondConv2d, which has no quantized form"),)
    assert full_precision(network) == ("1",)
