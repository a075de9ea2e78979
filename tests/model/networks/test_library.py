"""`--model torchvision:NAME` and `--model timm:NAME`: built, converted, refused, trained."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional

import main
from model import pretrained
from model.audit import audit
from model.convert import full_precision
from model.layers.quantized import QuantLayer, quantized_layers
from model.networks.build import build_network
from model.networks.library import torchvision_names
from tests import ROOT
from utils.config.resolve import read
from utils.errors import UserError

QUANTIZED = "--fm_enable --wt_enable --fm_bit 2 --wt_bit 2 --fm_half_range"
LSQ = f"cifar10,dorefa,lsq {QUANTIZED}"


def network(model: str, rest: str) -> nn.Module:
    """The network of a command line, always the same initial weights."""
    torch.manual_seed(0)
    return build_network(read(f"--model {model} --keyword {rest}".split()).model)


# Networks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size", "full"),
    [
        ("mobilenet_v3_small", 32, ("features.0.0", "classifier.3")),
        ("shufflenet_v2_x0_5", 32, ("conv1.0", "fc")),
        ("squeezenet1_1", 32, ("features.0", "classifier.1")),
        ("googlenet", 32, ("conv1.conv", "fc")),
        ("regnet_y_400mf", 32, ("stem.0", "fc")),
    ],
)
def test_a_network_of_torchvision(name: str, size: int, full: tuple[str, ...]) -> None:
    """Logits in training too, where some networks put out more; first and last layer in full precision."""
    net = network(f"torchvision:{name}", f"{LSQ} --num_classes 7 --input_size {size}")
    assert full_precision(net) == full
    assert all(parameter.requires_grad for parameter in net.parameters())
    x = torch.randn(2, 3, size, size)
    assert not audit(net, [x]).problems
    logits = net.train()(x)
    assert logits.shape == (2, 7)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


@pytest.mark.parametrize("words", ["cifar10", LSQ])
def test_names_are_those_of_torchvision(words: str) -> None:
    expected = list(torchvision.models.mobilenet_v3_small(num_classes=10).state_dict())
    names = list(network("torchvision:mobilenet_v3_small", words).state_dict())
    assert [name for name in names if ".quant_" not in name] == expected


def test_full_precision_stays_torchvisions_network() -> None:
    net = network("torchvision:resnet18", "cifar10")
    assert type(net) is torchvision.models.ResNet
    assert not any(isinstance(module, QuantLayer) for module in net.modules())


def test_attention_calls_its_layers() -> None:
    """Of torchvision's Swin, which hands their weights to a function."""
    assert full_precision(network("torchvision:swin_t", f"{LSQ} --input_size 32")) == ("features.0.0", "head")


def test_a_vision_transformer_takes_the_configured_size() -> None:
    net = network("torchvision:vit_b_32", "cifar10 --input_size 64")
    assert net.get_parameter("encoder.pos_embedding").shape == (1, 1 + 2 * 2, 768)


def test_first_and_last_layer_can_be_quantized_too() -> None:
    options = LSQ.replace("--fm_half_range", "").replace("lsq ", "lsq,first-last ", 1)
    net = network("torchvision:squeezenet1_1", options)
    assert full_precision(net) == ()
    symmetric = [
        name
        for name, layer in quantized_layers(net)
        for part, quantizer in layer.quantizers()
        if part == "quant_activation" and not quantizer.config.half_range
    ]
    assert symmetric == ["features.0"]  # images have negative values


def test_depthwise_convolutions_can_stay() -> None:
    net = network("torchvision:shufflenet_v2_x0_5", LSQ.replace("lsq ", "lsq,real_depthwise ", 1))
    layers = [(n, m) for n, m in net.named_modules() if isinstance(m, nn.Conv2d)]
    depthwise = {name for name, layer in layers if layer.groups == layer.in_channels > 1}
    assert len(depthwise) == 19
    assert set(full_precision(net)) == depthwise | {"conv1.0", "fc"}


# Mistakes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "rest", "message"),
    [
        (
            "torchvision:mobilenet_v3_smal",
            "cifar10",
            "no such network; did you mean torchvision:mobilenet_v3_small",
        ),
        ("torchvision:", "cifar10", "no such network; the documentation of torchvision lists them"),
        ("mobilenet_v3_small", "cifar10", "no such network; did you mean torchvision:mobilenet_v3_small"),
        ("torchvision:fasterrcnn_resnet50_fpn", "cifar10", "does not classify images; .* docs/detectron2.md"),
        ("torchvision:quantized_resnet18", "cifar10", "does not classify images|no such network"),
        (
            "torchvision:resnet18",
            "cifar10 --width_alpha 0.5",
            r"--width_alpha 0\.5: torchvision:resnet18 has one width",
        ),
        ("torchvision:resnet18", "cifar10 --base 2", "--base 2: torchvision:resnet18 has no branches"),
        (
            "torchvision:alexnet",
            "cifar10",
            "--input_size 32: torchvision:alexnet cannot take images of this size",
        ),
        (
            "torchvision:vit_b_32",
            "cifar10 --input_size 40",
            "--input_size 40: .* cannot take images of this size",
        ),
        ("torchvision:inception_v3", "cifar10", r"cannot take images of this size \(.*\); its own is 299$"),
        ("torchvision:vit_b_32", "cifar10 --input_size 40", "; its own is 224$"),
        ("torchvison:resnet18", "cifar10", "no such network; did you mean torchvision:resnet18"),
        (
            "torchvision:resnet18",
            "cifar10,lsq,attention-matmul --bits 2",
            "^attention-matmul: the network has no attention: leave the word out$",
        ),
        (
            "resnet20",
            "cifar10,lsq,origin,cbsa,attention-matmul --bits 2",
            "^attention-matmul: --model resnet20 has no attention",
        ),
        (
            "timm:test_vit",
            "cifar10,xnor,attention-matmul --bits 1",
            "^attention-matmul: xnor has no levels that start at zero",
        ),
    ],
)
def test_a_mistake(model: str, rest: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        network(model, rest)


def test_without_timm(tmp_path: Path) -> None:
    """It is optional: one line, and nothing written."""
    code = """
import sys
sys.modules["timm"] = None  # importing it is an ImportError
import main
sys.exit(main.main("--model timm:vit_tiny_patch16_224 --keyword cifar10 --dataset fake".split()))
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "--model timm:vit_tiny_patch16_224 needs the package timm" in done.stderr
    assert done.stderr.endswith("pip install timm\n") and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_torchvision_has_the_networks_of_the_other_tests() -> None:
    """And no others than classifiers."""
    names = torchvision_names()
    assert {"mobilenet_v3_small", "vit_b_32", "swin_t"} <= set(names)
    assert not any("rcnn" in name or "deeplab" in name or "quantized" in name for name in names)


@pytest.mark.parametrize("source", ["torchvision", "timm"])
def test_words_of_networks_of_this_project_have_no_effect(source: str) -> None:
    words = ("cbas", "origin", "PReLU", "group-norm", "preBN")
    config = read(f"--model {source}:resnet18 --keyword cifar10,{','.join(words)}".split())
    assert config.warnings == tuple(f"the keyword {word} has no effect on this network" for word in words)


def test_weights_of_auxiliary_classifiers_are_passed_over(tmp_path: Path) -> None:
    """The networks have none, official files do."""
    weights = torchvision.models.googlenet(num_classes=10, init_weights=False).state_dict()
    torch.save(weights, tmp_path / "official.pth")
    line = "--model torchvision:googlenet --keyword cifar10 -e"
    net = network("torchvision:googlenet", "cifar10")
    with pytest.raises(UserError, match="20 unused"):
        pretrained.load_pretrained(net, tmp_path / "official.pth", read(line.split()))
    report = pretrained.load_pretrained(
        net, tmp_path / "official.pth", read(f"{line} --unresume_scope aux*".split())
    )
    assert len(report.skipped) == 20 and len(report.loaded) == len(weights) - 20


# timm ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("test_vit", {"patch_embed.proj", "head"}),
        ("efficientnet_lite0", {"conv_stem", "classifier"}),
        ("convnext_atto", {"stem.0", "head.fc"}),
        ("mobilenetv3_small_050", {"conv_stem", "classifier"}),
        ("tf_mobilenetv3_small_minimal_100", {"conv_stem", "classifier"}),
        ("ghostnet_050", {"conv_stem", "classifier"}),
    ],
)
def test_a_network_of_timm(name: str, left: set[str]) -> None:
    net = network(f"timm:{name}", f"{LSQ} --num_classes 7 --input_size 64")
    full = full_precision(net)
    assert {*full} == left
    x = torch.randn(2, 3, 64, 64)
    assert not audit(net, [x]).problems
    logits = net.train()(x)
    assert logits.shape == (2, 7)
    functional.cross_entropy(logits, torch.arange(2)).backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet81", "no such network; did you mean timm:resnet"),
        (
            "vit_tiny_patch16_224.augreg_in2k",
            "no such pretrained tag; did you mean timm:vit_tiny_patch16_224.aug",
        ),
        ("hf_hub:timm/vit_tiny_patch16_224", "no such network"),
        ("../resnet18", "no such network"),
        ("crossvit_tiny_240", "--input_size 64: .* cannot take images of this size .*; its own is 240$"),
        (
            "efficientnet_cc_b0_4e --fm_enable --wt_enable",
            r"blocks\.\d\.\d\.conv_pw is a CondConv2d, which mixes its kernels .*: choose another network$",
        ),
    ],
)
def test_a_name_that_is_none_of_timms(name: str, message: str) -> None:
    """Names that would fetch weights are refused too."""
    model, *options = name.split(" ", 1)
    with pytest.raises(UserError, match=message):
        network(f"timm:{model}", " ".join(["cifar10,lsq --input_size 64", *options]))


# Runs ----------------------------------------------------------------------------------------------

TINY = "--dataset fake -b 8 --fake_size 16 --workers 0"


@pytest.mark.parametrize(
    "model",
    [
        "torchvision:mobilenet_v3_small",
        "torchvision:squeezenet1_1",
        "timm:test_vit",
    ],
)
def test_dry_run(
    model: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No order of a unit is asked for; nothing is written."""
    monkeypatch.chdir(tmp_path)
    assert main.main(f"{TINY} --model {model} --keyword {LSQ} --dry_run --verbose".split()) == 0
    printed = capsys.readouterr().out
    assert f"name: {model}" in printed and "lsq 2 bit, 4 levels" in printed
    assert not list(tmp_path.iterdir())


def test_a_dry_run_proposes_signed_inputs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those behind layer norms go below zero, as the images show."""
    monkeypatch.chdir(tmp_path)
    line = (
        f"{TINY} --model timm:test_vit --input_size 32 --keyword cifar10,dorefa,lsq --fm_enable --wt_enable"
    )
    assert main.main(f"{line} --fm_bit 2 --wt_bit 2 --dry_run".split()) == 0
    printed = capsys.readouterr()
    said = printed.out + printed.err
    assert "blocks.0.attn.qkv" in said and "--fm_half_range (signed levels)" in said


@pytest.mark.parametrize(
    ("model", "word", "full"),
    [
        ("torchvision:squeezenet1_1", "", "features.0, classifier.1"),
        ("timm:test_vit --input_size 64", "attention-matmul,", "patch_embed.proj, head"),
    ],
)
def test_a_run(
    model: str, word: str, full: str, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Trained and audited, then evaluated from its checkpoint."""
    monkeypatch.chdir(tmp_path)
    line = f"{TINY} --model {model} --keyword {word}{LSQ} --epochs 1 --lr 0.01 --re_init"
    assert main.main(line.split()) == 0
    printed = capsys.readouterr().out
    assert f"in full precision: {full}\n" in printed and "audit: passed" in printed
    assert main.main(f"{line} -e -r --audit".split()) == 0
    assert "audit: passed" in capsys.readouterr().out


def test_what_a_mistake_looks_like(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line, exit status 2, nothing written."""
    monkeypatch.chdir(tmp_path)
    assert main.main(["--dataset", "fake", "--model", "torchvision:resnet19", "--keyword", "cifar10"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_other_networks_do_not_wait_for_the_packages() -> None:
    """No package that others need, and not torch's compiler, is imported up to the optimizer."""
    code = """
import sys
from model.networks.build import build_network
from model.watch.cost import network_cost
from utils.config.resolve import read
from utils.data.sources import open_data
from utils.step.optimizer import build_optimizer

config = read("--keyword cifar10,origin,cbsa,dorefa,lsq --dataset fake --fm_enable --wt_enable".split())
network = build_network(config.model)
network_cost(network, config.model.input_size)
open_data(config.data)
build_optimizer(network, config.optim)
heavy = {"torch._dynamo", "torchvision", "timm", "sklearn", "scipy", "matplotlib", "nvidia.dali"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
