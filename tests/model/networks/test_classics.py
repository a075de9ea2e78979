"""MobileNets, VGG-Small and network in network: sizes, structure, gradients, and whole runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import main
from model.audit import audit
from model.layers.convolution import QuantConv2d
from model.layers.quantized import QuantLayer, quantizers
from model.layers.rprelu import RPReLU
from model.networks.build import PROJECT, build_network, models
from model.networks.mobilenet import InvertedResidual, divisible
from model.watch.cost import network_cost
from utils.config.resolve import read
from utils.config.resolve.families import CLASSICS, FAMILIES, family_of
from utils.errors import UserError

QUANTIZED = "--fm_enable --wt_enable --fm_bit 2 --wt_bit 2"
NAMES = tuple(CLASSICS)


def network(model: str, keywords: str, options: str = "") -> nn.Module:
    """The network of a command line, always the same initial weights."""
    torch.manual_seed(0)
    return build_network(read(f"--model {model} --keyword {keywords} {options}".split()).model)


def images(size: int, count: int = 4) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


# Structure -----------------------------------------------------------------------------------------

# Parameters and multiply-accumulates, counted from the papers' tables. The MobileNets' papers round them to
# 4.2 M and 569 M, and to 3.4 M and 300 M.
SIZES = {
    ("mobilenetv1", "imagenet"): (4_231_976, 568_740_352),
    ("mobilenetv2", "imagenet"): (3_504_872, 300_774_272),
    ("vgg_small", "cifar10"): (4_660_106, 607_600_640),
    ("nin", "cifar10"): (968_384, 222_486_528),
}


@pytest.mark.parametrize(("model", "keyword"), SIZES)
def test_size(model: str, keyword: str) -> None:
    found = network_cost(network(model, keyword), 224 if keyword == "imagenet" else 32)
    assert (found.parameters, found.macs) == SIZES[model, keyword]


@pytest.mark.parametrize(
    ("model", "keyword", "size", "expected"),
    [
        ("mobilenetv1", "imagenet", 64, [(32, 32), (1024, 2)]),
        ("mobilenetv1", "cifar10", 32, [(32, 32), (1024, 2)]),
        ("mobilenetv2", "imagenet", 64, [(32, 32), (1280, 2)]),
        ("mobilenetv2", "cifar10", 32, [(32, 32), (1280, 4)]),
        ("vgg_small", "imagenet", 64, [(512, 2)]),
        ("vgg_small", "cifar10", 32, [(512, 4)]),
        ("nin", "imagenet", 64, [(1024, 2)]),
        ("nin", "cifar10", 32, [(192, 8)]),
    ],
)
def test_shapes(model: str, keyword: str, size: int, expected: list[tuple[int, int]]) -> None:
    """(channels, height) after the stem and the features."""
    options = f"--num_classes 7 --input_size {size}"
    net = network(model, keyword, options).eval()
    shapes: list[tuple[int, int]] = []
    for name, module in net.named_children():
        if name in ("stem", "blocks", "features"):
            module.register_forward_hook(lambda m, i, out: shapes.append(tuple(out.shape[1:3])))
    with torch.no_grad():
        assert net(images(size, count=2)).shape == (2, 7)
    assert shapes == expected


def test_inverted_residuals_add_their_input_where_shapes_agree() -> None:
    net = network("mobilenetv2", "cifar10")
    blocks = [block for block in net.modules() if isinstance(block, InvertedResidual)]
    # The second and later block of each stage of 1, 2, 3, 4, 3, 3 and 1.
    assert [block.adds for block in blocks] == [
        False, False, True, False, True, True, False, True, True, True, False, True, True, False, True, True, False,
    ]  # fmt: skip
    block, x = blocks[2].eval(), torch.randn(2, 24, 4, 4)
    assert torch.equal(block(x), x + block.project(block.depthwise(block.expand(x))))


@pytest.mark.parametrize(
    ("channels", "expected"),
    [(8, 8), (4, 8), (11.9, 16), (16, 16), (19.9, 24), (20, 24), (24 * 0.35, 8), (44.8, 48)],
)
def test_divisible(channels: float, expected: int) -> None:
    """The nearest multiple of 8; 19.9 and 11.9 would lose more than a tenth."""
    assert divisible(channels) == expected


@pytest.mark.parametrize("model", ["mobilenetv1", "vgg_small", "nin"])
def test_a_width_without_channels_is_an_error(model: str) -> None:
    with pytest.raises(UserError, match=r"--width_alpha 0\.0001"):
        network(model, "cifar10", "--width_alpha 0.0001")


@pytest.mark.parametrize(("keyword", "size", "least"), [("cifar10", 7, 8), ("imagenet", 24, 32)])
def test_images_without_a_position_are_an_error(keyword: str, size: int, least: int) -> None:
    with pytest.raises(UserError, match=f"--input_size {size}: vgg_small needs at least {least}"):
        network("vgg_small", keyword, f"--input_size {size}")


@pytest.mark.parametrize(
    ("keyword", "kinds"),
    [
        ("NReLU", {nn.Identity}),
        ("PReLU", {nn.PReLU}),
        ("RPReLU", {RPReLU}),
        ("ReLU", {nn.ReLU}),
        ("ReLU6", {nn.ReLU6}),
        ("cifar10", {nn.ReLU, nn.ReLU6}),
    ],
)
def test_activation(keyword: str, kinds: set[type[nn.Module]]) -> None:
    """As the keyword says; ReLU without one, in MobileNetV2 ReLU6."""
    found = {
        model: {
            type(m)
            for name, m in network(model, f"cifar10,{keyword}").named_modules()
            if name.endswith(".relu")
        }
        for model in NAMES
    }
    assert set().union(*found.values()) == kinds
    assert all(len(each) == 1 for each in found.values())
    if len(kinds) == 2:
        assert [model for model in NAMES if nn.ReLU6 in found[model]] == ["mobilenetv2"]


@pytest.mark.parametrize("model", NAMES)
def test_norm(model: str) -> None:
    net = network(model, "cifar10,group-norm", "--fm_quant_group 4 --width_alpha 0.25")
    assert any(isinstance(m, nn.GroupNorm) for m in net.modules())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in net.modules())


# Quantizers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stem", ["cifar10", "imagenet"])
@pytest.mark.parametrize("model", NAMES)
def test_every_parameter_learns_and_every_level_is_allowed(model: str, stem: str) -> None:
    size = 16 if stem == "cifar10" else 64
    options = f"{QUANTIZED} --width_alpha 0.25 --num_classes 10 --input_size {size}"
    net = network(model, f"{stem},dorefa,lsq", options).train()
    x = images(size, count=8)
    functional.cross_entropy(net(x), torch.arange(8)).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), f"{name} gets a gradient of zeros"
    found = audit(net, [x])
    assert not found.problems
    assert len(found.rows) == 2 * len([m for m in net.modules() if isinstance(m, QuantLayer)]) > 0


@pytest.mark.parametrize(("words", "ends"), [("", False), ("first-last", True)])
@pytest.mark.parametrize("model", NAMES)
def test_the_first_and_the_last_layer(model: str, words: str, ends: bool) -> None:
    net = network(model, f"cifar10,dorefa,lsq,{words}", f"{QUANTIZED} --width_alpha 0.25")
    layers = [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    quantized = [isinstance(layer, QuantLayer) for layer in layers]
    assert quantized == [ends, *[True] * (len(layers) - 2), ends]
    if ends:
        first = dict(quantizers(layers[0]))["quant_activation"]
        assert not first.config.half_range  # images have negative values


@pytest.mark.parametrize(("words", "quantized"), [("", True), ("real_depthwise", False)])
@pytest.mark.parametrize("model", ["mobilenetv1", "mobilenetv2"])
def test_depthwise_convolutions(model: str, words: str, quantized: bool) -> None:
    net = network(model, f"cifar10,dorefa,lsq,{words}", f"{QUANTIZED} --width_alpha 0.25")
    layers = [m for name, m in net.named_modules() if name.endswith("depthwise.conv")]
    assert len(layers) == (13 if model == "mobilenetv1" else 17)
    assert all(layer.groups == layer.in_channels == layer.out_channels for layer in layers)
    assert {isinstance(layer, QuantLayer) for layer in layers} == {quantized}


def test_linear_bottlenecks_are_read_with_symmetric_levels() -> None:
    """Only these; every other layer reads activations, with levels from zero."""
    net = network("mobilenetv2", "cifar10,dorefa,lsq", f"{QUANTIZED} --width_alpha 0.25")
    for name, quantizer in quantizers(net):
        if name.endswith("quant_activation"):
            reads_bottleneck = ".expand." in name or name.startswith("blocks.17.")
            assert quantizer.config.half_range != reads_bottleneck, name


def test_a_method_without_symmetric_levels_says_where_it_would_need_them() -> None:
    options = "--fm_enable --fm_bit 2 --wt_enable --wt_level 3"
    with pytest.raises(UserError, match=r"blocks\.1\.expand\.conv has symmetric levels, .*ternary"):
        network("mobilenetv2", "cifar10,dorefa,non-uniform", options)


@pytest.mark.parametrize("model", NAMES)
def test_padding_after_quantizing(model: str) -> None:
    net = network(model, "cifar10,dorefa,lsq", f"{QUANTIZED} --padding_after_quant --width_alpha 0.25")
    layers = [m for m in net.modules() if isinstance(m, QuantConv2d)]
    assert layers and all(layer.padding_after_quant for layer in layers)


@pytest.mark.parametrize("model", NAMES)
def test_names_are_those_of_full_precision(model: str) -> None:
    """Weights trained in full precision load into the quantized network, and only quantizers are added."""
    full = network(model, "cifar10", "--width_alpha 0.25").state_dict()
    low = network(model, "cifar10,dorefa,lsq", f"{QUANTIZED} --width_alpha 0.25").state_dict()
    assert [name for name in low if ".quant_" not in name] == list(full)


# Registry ------------------------------------------------------------------------------------------


def test_every_network_has_a_family() -> None:
    """The configuration, which imports no network, knows them all."""
    for name in PROJECT:
        assert family_of(name) in FAMILIES, name
    assert set(CLASSICS) <= set(models())
    assert [family_of(name) for name in ("torchvision:resnet18", "timm:resnet18", "mine", "mine:resnet18")] == [
        "torchvision", "timm", "own", "own",
    ]  # fmt: skip


@pytest.mark.parametrize("model", NAMES)
def test_words_of_the_resnet_have_no_effect(model: str) -> None:
    config = read(f"--model {model} --keyword cifar10,bacs,origin,PReLU,instance-norm".split())
    assert config.warnings == tuple(
        f"the keyword {word} has no effect on this network" for word in ("bacs", "origin")
    )


def test_depthwise_words_have_no_effect_without_such_convolutions() -> None:
    for model in ("vgg_small", "nin", "resnet20"):
        (warning,) = read(f"--model {model} --keyword cifar10,real_depthwise".split()).warnings
        assert "real_depthwise has no effect" in warning


@pytest.mark.parametrize("model", ["mobilenet_v2", "mobilenetV2", "mobilenet2"])
def test_unknown_names_are_answered_with_close_ones(model: str) -> None:
    with pytest.raises(UserError, match=r"no such network; did you mean .*mobilenetv2"):
        network(model, "cifar10")


# Runs ----------------------------------------------------------------------------------------------

TINY = "--dataset fake --input_size 16 -b 8 --fake_size 16 --width_alpha 0.125 --workers 0"


@pytest.mark.parametrize("model", NAMES)
def test_dry_run(
    model: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No order of a unit is asked for; nothing is written."""
    monkeypatch.chdir(tmp_path)
    line = f"{TINY} --model {model} --keyword cifar10,dorefa,lsq {QUANTIZED} --dry_run --verbose"
    assert main.main(line.split()) == 0
    printed = capsys.readouterr().out
    assert f"name: {model}" in printed and "lsq 2 bit, 4 levels" in printed
    assert not list(tmp_path.iterdir())


def test_a_run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Full precision, then quantized from its weights, then evaluated."""
    monkeypatch.chdir(tmp_path)
    base = f"{TINY} --model mobilenetv2 --epochs 1 --lr 0.01"
    assert main.main(f"{base} --keyword cifar10 --case fp".split()) == 0
    low = f"{base} --keyword cifar10,dorefa,lsq {QUANTIZED}"
    assert main.main(f"{low} --case low --pretrained fp-checkpoint.pth.tar --re_init".split()) == 0
    assert "in full precision: stem.conv, fc\n" in capsys.readouterr().out
    assert main.main(f"{low} --case low -e -r --audit".split()) == 0
    assert "audit: passed" in capsys.readouterr().out
