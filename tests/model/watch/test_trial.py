"""What shows only beside the network: signs that are all the same, and inputs outside the range of the levels."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

from model.layers import factory
from model.networks import build
from model.networks.build import build_network
from model.watch import trial
from utils.config.command_line import parse
from utils.config.resolve import resolve
from utils.config.schema import Config, ModelConfig

SMALL = "--dataset fake --fm_enable --wt_enable --input_size 16"
BINARY = f"{SMALL} --fm_bit 1 --wt_bit 1 --width_alpha 0.25"
TWO = f"{SMALL} --fm_bit 2 --wt_bit 2"
RESNET = f"{TWO} --width_alpha 0.25 --model resnet20 --keyword cifar10,lsq"
GREY = (0.5,) * 3


def look(
    network: nn.Module, config: Config, images: Tensor | None = None, *, ranges: bool = False
) -> tuple[tuple[str, ...], str]:
    """The warnings and the note; the data set has `images`, and reading it is an error where there are none."""

    def real() -> Tensor:
        assert images is not None
        return images

    noise = trial.noise_images(config, GREY, GREY)
    return trial.unsuitable_inputs(network, noise, config, real, ranges=ranges)


def warnings_of(line: str, images: Tensor | None = None) -> tuple[str, ...]:
    torch.manual_seed(0)
    config = resolve(parse(line.split()))
    return look(build_network(config.model), config, images)[0]


# Signs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "first", "count"),
    [
        ("--model resnet20 --keyword cifar10,xnor,origin,cbsa", "layer1.0.conv1.0", 20),
        ("--model nin --keyword cifar10,xnor,gamma", "features.1.conv", 7),
        ("--model resnet20 --keyword cifar10,xnor,origin,cbsa --fm_adaptive var", "layer1.0.conv1.0", 20),
    ],
)
def test_signs_behind_a_relu_are_warned_of(line: str, first: str, count: int) -> None:
    config = resolve(parse(f"{BINARY} {line}".split()))
    network = build_network(config.model)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    ((warning,), _) = look(network, config)
    assert warning.startswith(
        f"the inputs of {count} of {count} binary layers, the first is {first}, never go"
    )
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert network.training


def test_thresholds_that_nothing_is_below() -> None:
    """ReActNet's start at zero; behind a ReLU every sign is +1."""
    line = f"{BINARY} --model resnet20 --keyword cifar10,origin,cbsa,reactnet"
    (warning,) = warnings_of(line)
    assert "never go below their thresholds: " in warning and "; give --re_init, or choose" in warning
    assert warnings_of(f"{line},RPReLU") == ()


@pytest.mark.parametrize(
    "line",
    [
        "--model resnet20 --keyword cifar10,xnor,NReLU,cbsa",
        "--model nin --keyword cifar10,xnor,PReLU",
        "--model resnet20 --keyword cifar10,xnor,origin,cbsa --fm_adaptive var-mean",
        "--model resnet20 --keyword cifar10,dorefa,origin,cbsa",
    ],
)
def test_other_inputs_of_binary_layers_are_not(line: str) -> None:
    assert warnings_of(f"{BINARY} {line}") == ()


def test_norms_are_those_of_training() -> None:
    """Running means far below what there is would make all inputs positive."""
    config = resolve(parse(f"{BINARY} --model resnet20 --keyword cifar10,xnor,NReLU,cbsa".split()))
    network = build_network(config.model)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.fill_(-100)
    assert look(network, config) == ((), "")


# Inputs below zero ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "least", "total"),
    [
        (f"{RESNET},origin,cbsa,NReLU", 20, 20),
        (f"{RESNET},origin,cbsa,PReLU", 16, 20),
        (f"{RESNET},origin,cbsa,LReLU", 14, 20),
        (f"{RESNET},origin,bcas,preBN", 20, 20),
        (f"{RESNET},origin,cabs", 18, 20),
        (f"{TWO} --model nin --keyword cifar10,lq,NReLU", 5, 7),
        (f"{TWO} --model vgg_small --width_alpha 0.25 --keyword cifar10,pact,PReLU", 3, 5),
        (f"{TWO} --model torchvision:mobilenet_v3_small --keyword cifar10,dorefa --input_size 32", 30, 52),
        (f"{RESNET},origin,cbsa --fm_adaptive var-mean", 20, 20),
    ],
)
def test_inputs_below_zero_are_warned_of(line: str, least: int, total: int) -> None:
    """In every network, but not behind a maximum of many; the option that is proposed ends it."""
    size = resolve(parse(line.split())).model.input_size
    images = torch.randn(8, 3, size, size, generator=torch.Generator().manual_seed(1))
    (warning,) = warnings_of(line, images)
    counts = re.match(r"the levels of (\d+) of (\d+) activation quantizers start at zero", warning)
    assert counts and int(counts[1]) >= least and int(counts[2]) == total, warning
    learned = "the keyword lsqplus, which learns the lowest level"
    assert f"; give {learned}, or with more than 2 bits --fm_half_range (signed levels)" in warning
    (of_three_bits,) = warnings_of(line.replace("_bit 2", "_bit 3"), images)
    assert "; give --fm_half_range (signed levels)" in of_three_bits and of_three_bits.endswith(
        f", or {learned}"
    )
    assert warnings_of(f"{line} --fm_half_range") == ()


def test_an_offset_that_is_not_found_yet_is_warned_of() -> None:
    (warning,) = warnings_of(f"{RESNET}plus,origin,cbsa,LReLU", torch.randn(8, 3, 16, 16))
    assert warning.endswith("cut off until the offset is learned; give --re_init, which finds it")
    assert warnings_of(f"{RESNET}plus,origin,cbsa,LReLU --re_init", torch.randn(8, 3, 16, 16)) == ()


def test_the_images_of_the_data_set_tell() -> None:
    """Noise shows where inputs may lie below zero, the images whether they do, and how many."""

    def make(config: ModelConfig) -> nn.Module:
        first = nn.Conv2d(3, 4, 1, bias=False)
        nn.init.constant_(first.weight, 0.5)
        layers = (first, nn.LeakyReLU(), factory.conv(4, 8, 3, 1, config), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 10))

    build.register_model("positive-first-layer", make)
    line = f"{TWO} --model positive-first-layer --keyword cifar10,lsq"
    images = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(1)) + 0.01
    assert warnings_of(line, images) == ()
    images[:2] *= -1
    (warning,) = warnings_of(line, images)
    assert "the levels of 1 of 1 activation quantizers start at zero" in warning
    assert "25 % of their values" in warning


def test_all_layers_are_named_when_asked() -> None:
    images = torch.randn(8, 3, 16, 16)
    (few,) = warnings_of(f"{RESNET},origin,cbsa,NReLU", images)
    (all_of_them,) = warnings_of(f"{RESNET},origin,cbsa,NReLU --verbose", images)
    assert "layer3.2.conv2.0" not in few and "layer3.2.conv2.0" in all_of_them


@pytest.mark.parametrize(
    "line",
    [
        f"{RESNET},origin,cbsa",
        f"{RESNET},origin,bacs,preBN",
        f"{TWO} --model nin --keyword cifar10,lsq,first-last",
        f"{TWO} --model mobilenetv2 --width_alpha 0.25 --keyword cifar10,pact,first-last",
        f"{TWO} --model torchvision:resnet18 --keyword cifar10,lq --input_size 32",
        f"{TWO} --model torchvision:squeezenet1_1 --keyword cifar10,lsq,first-last --input_size 32",
        f"{BINARY} --model resnet20 --keyword cifar10,xnor,NReLU,first-last,cbsa",
        f"{RESNET},origin,cbsa,NReLU --wt_enable".replace("--fm_enable", "").replace("--fm_bit 2", ""),
    ],
)
def test_inputs_that_suit_the_levels_are_not(line: str) -> None:
    """And no image is read."""
    assert warnings_of(line) == ()


# Images below zero ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "layer"),
    [
        (f"{RESNET},first-last,origin,cbsa", "conv1"),
        (f"{RESNET},first-last,origin,cbsa,TResNetStem", "conv1.conv"),
        (f"{TWO} --model pytorch-resnet18 --keyword cifar10,dorefa,first-last --input_size 32", "conv1"),
    ],
)
def test_images_below_zero_are_warned_of(line: str, layer: str) -> None:
    """The share is that of the data set's own images; the option that is proposed ends it."""
    size = resolve(parse(line.split())).model.input_size
    images = torch.rand(4, 3, size, size, generator=torch.Generator().manual_seed(1)) + 0.01
    images[:3] *= -1
    assert warnings_of(line, images) == (
        f"{layer} reads the images with levels that start at zero: 75 % of their values are below zero and are cut "
        "off; give --first_bit 8, or --fm_first_signed for the bits of the others (signed levels)",
    )
    assert warnings_of(line, images.abs()) == ()  # images in [0, 1], with --mean 0,0,0
    assert warnings_of(f"{line} --fm_first_signed") == ()
    assert warnings_of(f"{line} --first_bit 8") == ()
    assert warnings_of(f"{line} --fm_half_range") == ()


def test_a_network_of_a_users_own_that_quantizes_its_first_layer() -> None:
    """There `--fm_first_signed` does nothing."""

    def make(config: ModelConfig) -> nn.Module:
        layers = (factory.conv(3, 8, 3, 1, config), nn.ReLU(), factory.conv(8, 8, 3, 2, config), nn.ReLU())
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), factory.linear(8, 10, config))

    name = "all-of-it-quantized"
    build.register_model(name, make)
    (warning,) = warnings_of(f"{TWO} --model {name} --keyword cifar10,lsq", -torch.rand(2, 3, 16, 16))
    assert warning.startswith("0 reads the images") and warning.endswith(
        "give --fm_half_range (signed levels)"
    )


# Inputs beyond the range ---------------------------------------------------------------------------


def note_of(line: str, *, ranges: bool) -> str:
    torch.manual_seed(0)
    config = resolve(parse(line.split()))
    warnings, note = look(build_network(config.model), config, ranges=ranges)
    assert warnings == ()
    return note


@pytest.mark.parametrize(
    ("options", "end"),
    [
        ("dorefa", "; --re_init --re_init_range mse or a larger --fm_boundary would widen it"),
        ("lsq", "; --re_init or a larger --fm_boundary would widen it"),
        ("lsq --re_init", "; --re_init_range mse would widen it"),
        ("lsq --fm_half_range", "; --re_init or a larger --fm_boundary would widen it"),
    ],
)
def test_narrow_ranges_are_noted(options: str, end: str) -> None:
    note = note_of(f"{RESNET.replace('lsq', '')}origin,cbsa,{options} --fm_boundary 0.1", ranges=True)
    assert note.startswith("20 of 20 activation quantizers start with a range that cuts off ")
    assert note.endswith(end)


@pytest.mark.parametrize(
    ("options", "ranges"),
    [
        ("--fm_boundary 0.1", False),  # they are initialised later
        ("--fm_boundary 0.1 --stable 10", True),  # likewise
        ("--fm_boundary 20", True),
    ],
)
def test_other_ranges_are_not(options: str, ranges: bool) -> None:
    assert note_of(f"{RESNET},origin,cbsa {options}", ranges=ranges) == ""
