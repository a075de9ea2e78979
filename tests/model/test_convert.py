"""Converting other people's networks in place: what is replaced, what is left and why, and what stays as it was."""

from __future__ import annotations

import copy
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import (
    efficientnet_b0,
    mobilenet_v3_small,
)
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn
from torchvision.models.segmentation import deeplabv3_mobilenet_v3_large

from model.audit import audit
from model.calibrate import initialise_ranges
from model.convert import Left, Report, Selection, below_zero, full_precision, quantize
from model.layers.quantized import QuantLayer, QuantLinear, quantizers
from model.watch.probe import Probe
from tests import ROOT
from tests.model.foreign import config, rep_vgg, swin_transformer, vision_transformer
from utils.config.schema import ProbeConfig, QuantConfig, QuantizerConfig
from utils.errors import UserError


def images(size: int, count: int = 2) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1))


# Whole networks ------------------------------------------------------------------------------------


def timm_network(name: str, **options: Any) -> nn.Module:
    return timm.create_model(name, pretrained=False, num_classes=5, **options)


def convnext() -> nn.Module:
    """As ConvNeXt-T, with a block in each stage and a quarter as wide."""
    return ConvNeXt(
        [CNBlockConfig(24 * 2**i, 48 * 2**i if i < 3 else None, 1) for i in range(4)], num_classes=5
    )


def detector() -> nn.Module:
    return fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None,
        weights_backbone=None,
        num_classes=5,
        min_size=64,
        max_size=64,
        rpn_post_nms_top_n_train=50,
    )


def segmenter() -> nn.Module:
    return deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=5, aux_loss=True)


def logits_loss(net: nn.Module, x: Tensor) -> Tensor:
    return functional.cross_entropy(net(x), torch.arange(len(x)))


def detector_loss(net: nn.Module, x: Tensor) -> Tensor:
    targets = [{"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]), "labels": torch.tensor([1])} for _ in x]
    losses: Mapping[str, Tensor] = net(list(x), targets)
    return torch.stack(list(losses.values())).sum()


def segmenter_loss(net: nn.Module, x: Tensor) -> Tensor:
    maps: Mapping[str, Tensor] = net(x)
    target = torch.arange(len(x)).reshape(-1, 1, 1).expand(-1, *x.shape[2:])
    return functional.cross_entropy(maps["out"], target) + functional.cross_entropy(maps["aux"], target)


# Name -> builder, image size, loss, and how many layers are replaced and left.
Loss = Callable[[nn.Module, Tensor], Tensor]
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, Loss, int, int]] = {
    "MobileNetV3": (lambda: mobilenet_v3_small(num_classes=5), 64, logits_loss, 52, 2),
    "EfficientNet-B0": (lambda: efficientnet_b0(num_classes=5), 64, logits_loss, 80, 2),
    "ConvNeXt": (convnext, 32, logits_loss, 15, 2),
    "vision transformer": (vision_transformer, 32, logits_loss, 8, 2),
    "Swin transformer": (swin_transformer, 32, logits_loss, 9, 2),
    "timm's vision transformer": (lambda: timm_network("test_vit", img_size=32), 32, logits_loss, 24, 2),
    "timm's MobileNetV3": (lambda: timm_network("mobilenetv3_small_050"), 64, logits_loss, 52, 2),
    "timm's EfficientNet": (lambda: timm_network("test_efficientnet"), 64, logits_loss, 16, 2),
    "timm's ConvNeXt": (lambda: timm_network("test_convnext"), 64, logits_loss, 30, 2),
    "timm's NFNet": (lambda: timm_network("test_nfnet"), 32, logits_loss, 32, 2),
    "RepVGG": (rep_vgg, 32, logits_loss, 7, 2),
    "Faster R-CNN": (detector, 64, detector_loss, 71, 2),
    "DeepLabV3": (segmenter, 64, segmenter_loss, 70, 2),
}


@pytest.mark.parametrize(
    ("name", "bits"), [(name, 2 if number % 2 else 8) for number, name in enumerate(NETWORKS)]
)
def test_a_network_trains_at_its_bits(name: str, bits: int) -> None:
    make, size, loss, replaced, left = NETWORKS[name]
    torch.manual_seed(0)
    net = make()
    used = dict(net.named_parameters())
    before = {key: value.clone() for key, value in net.state_dict().items()}

    report = quantize(net, config(bits))

    assert (len(report.replaced), len(report.left)) == (replaced, left), report.table()
    assert {parameter for key, parameter in net.named_parameters() if key in used} == set(used.values())
    for key, value in net.state_dict().items():
        assert ".quant_" in key or torch.equal(value, before[key]), key
    x = images(size)
    initialise_ranges(net, x)
    value = loss(net.train(), x)
    assert value.isfinite()
    value.backward()
    for key, parameter in net.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), key
    found = audit(net, [x])
    assert not found.problems
    assert len(found.rows) == 2 * replaced
    assert all(row.allowed == 2**bits for row in found.rows)


def test_quantizing_finely_changes_little() -> None:
    """16-bit weights over a range that holds them all."""
    torch.manual_seed(0)
    net = mobilenet_v3_small(num_classes=5).eval()
    x = images(64)
    with torch.no_grad():
        expected = net(x)
        wt = QuantizerConfig(tag="wt", enable=True, method="lsq", levels=2**16, boundary=4.0)
        report = quantize(net, QuantConfig(wt=wt))
        assert len(report.replaced) == 52
        assert not torch.equal(net(x), expected)
        torch.testing.assert_close(net(x), expected, rtol=0, atol=0.02 * expected.abs().max().item())


# Selection -----------------------------------------------------------------------------------------


class Toy(nn.Module):
    """A layer of each kind, and a head that is defined before what runs ahead of it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding="same")
        self.head = nn.Linear(6, 4)
        self.body = nn.Sequential(
            OrderedDict(
                depthwise=nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect", groups=8),
                grouped=nn.Conv2d(8, 8, 1, groups=2),
                hidden=nn.Linear(8, 6),
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        depthwise, grouped, hidden = self.body
        x = grouped(depthwise(self.stem(x).relu()).relu()).relu()
        return self.head(hidden(x.mean(dim=(2, 3))).relu())


ALL = ("stem", "head", "body.depthwise", "body.grouped", "body.hidden")


@pytest.mark.parametrize(
    ("select", "switches", "expected"),
    [
        (Selection(), {}, ("head", "body.depthwise", "body.grouped")),
        (Selection(), {"first_last": True}, ALL),
        (Selection(), {"depthwise": False}, ("head", "body.grouped")),
        (Selection(convolutions=False), {"first_last": True}, ("head", "body.hidden")),
        (Selection(linears=False), {"first_last": True}, ("stem", "body.depthwise", "body.grouped")),
        (
            Selection(include=("body.*",)),
            {"first_last": True},
            ("body.depthwise", "body.grouped", "body.hidden"),
        ),
        (Selection(include=("body.*", "stem")), {}, ("body.depthwise", "body.grouped")),
        (Selection(exclude=("*d",)), {"first_last": True}, ("stem", "body.depthwise", "body.hidden")),
        (Selection(include=("body.*",), exclude=("*.hidden",)), {}, ("body.depthwise", "body.grouped")),
    ],
)
def test_selection(select: Selection, switches: dict[str, bool], expected: tuple[str, ...]) -> None:
    net = Toy()
    report = quantize(net, config(**switches), select=select)
    assert report.replaced == expected
    assert [left.name for left in report.left] == [name for name in ALL if name not in expected]
    assert all(isinstance(net.get_submodule(name), QuantLayer) == (name in expected) for name in ALL)
    assert full_precision(net) == tuple(left.name for left in report.left)
    assert net(images(8)).shape == (2, 4)


def test_convolutions_of_one_dimension_are_convolutions() -> None:
    """They are selected, left and watched as those of images."""
    net = nn.Sequential(nn.Conv1d(3, 8, 1), nn.Conv1d(8, 8, 3, groups=8), nn.Conv1d(8, 8, 3), nn.Linear(4, 2))
    x = torch.ones(2, 3, 8)
    select = Selection(linears=False)
    report = quantize(copy.deepcopy(net), config(first_last=True, depthwise=False), select=select)
    assert report.replaced == ("0", "2")
    assert report.left == (Left("1", "is depth-wise"), Left("3", "is a linear layer"))
    report = quantize(copy.deepcopy(net), config(first_last=True), select=Selection(convolutions=False))
    assert report.replaced == ("3",) and report.left[0] == Left("0", "is a convolution")
    assert below_zero(net, -x).keys() == {"0", "1", "2", "3"} and below_zero(net, -x)["0"] == 1


def test_the_example_shows_the_order() -> None:
    report = quantize(Toy(), config(), example=(images(8),))
    assert report.replaced == ("body.depthwise", "body.grouped", "body.hidden")
    assert report.left == (Left("stem", "is the first layer"), Left("head", "is the last layer"))


def test_reasons() -> None:
    select = Selection(include=("*e*", "body.grouped"), exclude=("*hidden",), linears=False)
    report = quantize(Toy(), config(first_last=True, depthwise=False), select=select)
    assert report.replaced == ("stem", "body.grouped")
    assert report.left == (
        Left("head", "is a linear layer"),
        Left("body.depthwise", "is depth-wise"),
        Left("body.hidden", "is excluded by *hidden"),
    )
    assert report.table().splitlines()[-4:] == [
        "head            is a linear layer",
        "body.depthwise  is depth-wise",
        "body.hidden     is excluded by *hidden",
        "quantized 2 layers, left 3 as they were",
    ]
    assert (
        quantize(Toy(), config(), select=Selection(include=("stem", "head"))).left[-1].reason
        == "is not included"
    )


@pytest.mark.parametrize(
    ("select", "message"),
    [
        (Selection(include=("body.hiden",)), "no layer is called body.hiden; did you mean body.hidden"),
        (Selection(exclude=("Head",)), "no layer is called Head; did you mean head"),
        (Selection(signed=("neck.*",)), r"no layer is called neck\.\*; `\*` stands for any text"),
    ],
)
def test_a_pattern_without_a_layer_is_an_error(select: Selection, message: str) -> None:
    net = Toy()
    with pytest.raises(UserError, match=message):
        quantize(net, config(), select=select)
    assert not any(isinstance(module, QuantLayer) for module in net.modules())


def test_a_configuration_that_quantizes_nothing_is_an_error() -> None:
    with pytest.raises(UserError, match="quantizes nothing"):
        quantize(Toy(), QuantConfig())


def test_a_network_without_layers_is_an_error() -> None:
    with pytest.raises(UserError, match="there is no layer to quantize: the network has no convolution"):
        quantize(nn.Sequential(nn.ReLU()), config())


def test_signed_layers_have_symmetric_levels() -> None:
    half = QuantConfig(fm=QuantizerConfig(tag="fm", enable=True, method="lsq", levels=4, half_range=True))
    net = Toy()
    quantize(net, half, select=Selection(signed=("body.g*",)))
    ranges = {name: quantizer.config.half_range for name, quantizer in quantizers(net)}
    assert ranges == {
        "head.quant_activation": True,
        "body.depthwise.quant_activation": True,
        "body.grouped.quant_activation": False,
    }
    x = torch.randn(2, 8, 4, 4)
    assert net.get_submodule("body.grouped.quant_activation")(x).min() == -1
    assert net.get_submodule("body.depthwise.quant_activation")(x).min() == 0


def test_how_far_inputs_go_below_zero() -> None:
    net = Toy()
    x = images(8) - 0.25
    shares = below_zero(net, x)
    assert shares == {
        "stem": pytest.approx(-x.min().item() / x.max().item()),
        **dict.fromkeys(("body.depthwise", "body.grouped", "body.hidden", "head"), 0.0),
    }
    assert all(isinstance(value, float) for value in shares.values())


# What stays as it was ------------------------------------------------------------------------------


def test_layers_stay_the_same_objects_with_their_hooks() -> None:
    net = Toy()
    layers = {name: net.get_submodule(name) for name in ALL}
    parameters = dict(net.named_parameters())
    calls: list[str] = []
    for name, layer in layers.items():
        layer.register_forward_hook(lambda m, i, out, name=name: calls.append(name))
    quantize(net, config(first_last=True))
    assert all(net.get_submodule(name) is layer for name, layer in layers.items())
    now = dict(net.named_parameters())
    assert all(now[name] is parameter for name, parameter in parameters.items())
    net(images(8))
    assert sorted(calls) == sorted(ALL)


def test_a_layer_used_twice_is_one_layer() -> None:
    shared = nn.Linear(4, 4)
    net = nn.Sequential(nn.Linear(4, 4), shared, nn.ReLU(), shared, nn.Linear(4, 4))
    assert quantize(net, config()).replaced == ("1",)
    assert net[1] is net[3]
    net(torch.randn(3, 4)).sum().backward()
    assert net[1].get_buffer("quant_weight.iteration") == 2
    assert shared.weight.grad is not None and shared.weight.grad.any()


def test_a_layer_held_in_two_places_is_selected_by_both_names() -> None:
    def twice() -> nn.ModuleDict:
        shared = nn.Linear(4, 4)
        return nn.ModuleDict({"encoder": shared, "middle": nn.Linear(4, 4), "decoder": shared})

    every = config(first_last=True)
    assert quantize(twice(), every, select=Selection(include=("decoder",))).replaced == ("encoder",)
    report = quantize(twice(), every, select=Selection(exclude=("decoder",)))
    assert report == Report(("middle",), (Left("encoder", "is excluded by decoder"),))
    net = twice()
    quantize(net, every, select=Selection(signed=("decoder",)))
    assert net["encoder"].signed_input and not net["middle"].signed_input


@pytest.mark.parametrize("training", [True, False])
def test_quantizers_take_over_the_mode(training: bool) -> None:
    net = Toy().train(training)
    quantize(net, config())
    net(images(8))
    found = [quantizer for _, quantizer in quantizers(net)]
    assert all(quantizer.training == training for quantizer in found)
    assert {int(quantizer.get_buffer("iteration")) for quantizer in found} == {int(training)}


def test_quantizers_are_where_the_layer_is() -> None:
    net = Toy().to("meta")
    quantize(net, config())
    assert {tensor.device.type for tensor in (*net.parameters(), *net.buffers())} == {"meta"}


def test_a_second_call_quantizes_what_is_left() -> None:
    net = Toy()
    quantize(net, config(2), select=Selection(include=("body.*",)))
    first = dict(quantizers(net))
    report = quantize(net, config(8, first_last=True))
    assert report.replaced == ("stem", "head", "body.hidden")
    assert report.left == (
        Left("body.depthwise", "is quantized already"),
        Left("body.grouped", "is quantized already"),
    )
    now = dict(quantizers(net))
    assert all(now[name] is quantizer for name, quantizer in first.items())
    assert {name: quantizer.levels for name, quantizer in now.items() if name.endswith("weight")} == {
        "stem.quant_weight": 256,
        "head.quant_weight": 256,
        "body.depthwise.quant_weight": 4,
        "body.grouped.quant_weight": 4,
        "body.hidden.quant_weight": 256,
    }


class ByName(nn.Module):
    """Gives its layers their input by name, as `nn.Conv2d` and `nn.Linear` take it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(input=self.body(input=self.stem(input=x)).mean(dim=(2, 3)))


def test_an_input_given_by_name(tmp_path: Path) -> None:
    """To quantized layers, and to all that watches them."""
    net, x = ByName(), images(8)
    expected = below_zero(ByName(), x).keys()
    assert expected == {"stem", "body", "head"}
    report = quantize(net, config(first_last=True), example=(x,))
    assert report.replaced == ("stem", "body", "head")
    initialise_ranges(net, x)
    probe = Probe(net, ProbeConfig(enable=True, iterations=(0,)), tmp_path, steps=1, images=len(x))
    probe.begin(0)
    net(x).sum().backward()
    probe.end()
    with np.load(tmp_path / "iteration-000000.npz") as arrays:
        assert np.array_equal(arrays["stem.input"], x[:1].numpy())
    assert not audit(net, [x, x[:0]]).problems


def test_a_single_layer() -> None:
    layer = nn.Linear(4, 3)
    assert quantize(layer, config(first_last=True)).replaced == ("",)
    assert isinstance(layer, QuantLinear)
    assert len(layer(torch.randn(50, 4)).unique()) > 1


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(4, 6, 3, stride=2, padding=1), (0, 4, 8, 8)),
        (nn.Conv2d(4, 6, 3, padding="same"), (0, 4, 8, 8)),
        (nn.Linear(4, 6), (0, 4)),
        (nn.Linear(4, 6), (2, 0, 4)),
    ],
)
def test_an_empty_batch_passes(layer: nn.Conv2d | nn.Linear, shape: tuple[int, ...]) -> None:
    """As detectors give their heads when nothing was found; the weights' gradient is zero, not missing."""
    x = torch.empty(shape)
    expected = layer(x).shape
    quantize(layer, config(first_last=True))
    out = layer(x)
    assert out.shape == expected
    out.sum().backward()
    assert layer.weight.grad is not None and not layer.weight.grad.any()


def test_a_detector_that_finds_nothing() -> None:
    net = detector().eval()
    quantize(net, config())
    head = net.get_submodule("roi_heads.box_head")
    assert isinstance(head.get_submodule("fc6"), QuantLinear)
    assert head(torch.empty(0, 256, 7, 7)).shape == (0, 1024)


# The page ------------------------------------------------------------------------------------------


def test_the_example_of_the_page_runs_as_written(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "detectron2.md").read_text(encoding="utf-8")
    code, _ = re.findall(r"^```python\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE)
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    exec(compile(code, "docs/detectron2.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "rpn.head.cls_logits" in printed and "is excluded by rpn.head.cls_logits" in printed
    assert "audit: " not in printed and "passed" in printed
    assert len(names["report"].replaced) == 68


def test_the_pages_way_to_an_engine_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "detectron2.md").read_text(encoding="utf-8")
    _, code = re.findall(r"^```python\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    images = np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)
    names: dict[str, Any] = {"network": network, "images": images}
    exec(compile(code, "docs/detectron2.md", "exec"), names)
    with torch.no_grad():
        np.testing.assert_allclose(names["logits"], network(torch.from_numpy(images)), rtol=1e-4, atol=1e-5)


def test_the_other_examples_of_the_page_are_python() -> None:
    page = (ROOT / "docs" / "detectron2.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```py\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) == 2
    for code in blocks:
        compile(code, "docs/detectron2.md", "exec")
