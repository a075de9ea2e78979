"""Bits of single layers: the first and the last one, and those of entries, in every kind of network."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model.audit import audit
from model.convert import Selection, full_precision, quantize
from model.layers.quantized import quantizers
from model.networks.build import build_network
from model.quant import QuantConfig, QuantizerConfig
from model.quantizers.frame import Quantizer
from utils.config.layer_rules import layer_rules, with_layer_bits
from utils.config.resolve import read
from utils.errors import UserError

# Network -> options, its first and its last layer; small, one of every family.
FAMILIES = {
    "resnet20": ("--keyword cifar10,origin,cbsa,lsq --width_alpha 0.125", "conv1", "fc"),
    "resnet18": (
        "--keyword imagenet,cbsa,pact,TResNetStem --width_alpha 0.125 --num_classes 5",
        "conv1.conv",
        "fc",
    ),
    "pytorch-resnet18": ("--keyword imagenet,lsq --num_classes 5", "conv1", "fc"),
    "mobilenetv1": ("--keyword cifar10,lsq --width_alpha 0.125", "stem.conv", "fc"),
    "mobilenetv2": ("--keyword cifar10,dorefa --width_alpha 0.125", "stem.conv", "fc"),
    "vgg_small": ("--keyword cifar10,lq --width_alpha 0.125", "features.0.conv", "fc"),
    "nin": ("--keyword cifar10,lsq --width_alpha 0.125", "features.0.conv", "classifier"),
    "torchvision:squeezenet1_1": ("--keyword imagenet,lsq --num_classes 5", "features.0", "classifier.1"),
    "timm:resnet10t": ("--keyword imagenet,lsq --num_classes 5", "conv1.0", "fc"),
}
NAMES = list(FAMILIES)


def network(name: str, bits: str = "") -> tuple[nn.Module, QuantConfig]:
    """A network of `FAMILIES` at 2 bits, and its configuration."""
    words = f"--model {name} {FAMILIES[name][0]} --bits 2 --input_size 32 {bits}"
    config = read(words.split()).model
    torch.manual_seed(0)
    return build_network(config), config.quant


def bits_of(model: nn.Module) -> dict[str, int]:
    return {name: quantizer.levels for name, quantizer in quantizers(model)}


def images(size: int = 32) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", NAMES)
def test_the_ends_have_their_bits_and_no_other_layer(name: str) -> None:
    _, first, last = FAMILIES[name]
    plain, _ = network(name)
    before = bits_of(plain)
    assert not any(each.startswith((f"{first}.quant", f"{last}.quant")) for each in before)
    model, quant = network(name, "--first_bit 4 --last_bit 8")
    ends = {f"{first}.quant_activation": 16, f"{first}.quant_weight": 16,
            f"{last}.quant_activation": 256, f"{last}.quant_weight": 256}  # fmt: skip
    assert bits_of(model) == before | ends
    assert set(full_precision(plain)) - set(full_precision(model)) == {first, last}
    assert not model.get_submodule(f"{first}.quant_activation").config.half_range
    only_last, _ = network(name, "--last_bit 8")
    assert bits_of(only_last) == before | {each: n for each, n in ends.items() if each.startswith(last)}
    found = audit(model, [images()], quant)
    assert not found.problems and len(found.rows) == len(before) + 4
    for key, value in plain.named_parameters():  # which are drawn as before
        assert torch.equal(model.get_parameter(key), value), key


@pytest.mark.parametrize("name", ["resnet20", "pytorch-resnet18", "nin"])
def test_the_keyword_is_as_published(name: str) -> None:
    """All bits are those of the other layers, and a ResNet's image has unsigned levels."""
    words = f"--model {name} {FAMILIES[name][0]} --bits 2 --input_size 32".replace("lsq", "lsq,first-last")
    config = read(words.split()).model
    model = build_network(config)
    assert set(bits_of(model).values()) == {4}
    first = model.get_submodule(f"{FAMILIES[name][1]}.quant_activation")
    assert first.config.half_range == ("resnet" in name)
    overridden = build_network(read(f"{words} --first_bit 8".split()).model)
    first = overridden.get_submodule(f"{FAMILIES[name][1]}.quant_activation")
    assert (first.levels, first.config.half_range, first.config.grid) == (256, False, "midtread")
    assert overridden.get_submodule(f"{FAMILIES[name][2]}.quant_activation").levels == 4
    without = build_network(read(f"{words} --first_bit 32".split()).model)
    assert full_precision(without) == (FAMILIES[name][1],)
    assert not audit(without, [images()], config.quant).problems


def test_the_image_has_the_levels_of_two_s_complement() -> None:
    """-128 to 127 steps, all of which occur; the weight has 256 levels at most in each channel."""
    model, _ = network("resnet20", "--first_bit 8")
    quantizer = model.get_submodule("conv1.quant_activation")
    assert isinstance(quantizer, Quantizer)
    with torch.no_grad():
        quantizer.set_range(torch.tensor([2.54]))
        x = torch.linspace(-3, 3, 9_973)  # none between two levels
        found = quantizer(x.reshape(1, 1, 1, -1)).flatten()
    step = 2.54 / 127
    expected = torch.clamp(torch.round(x.double() / step), -128, 127) * step
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    assert len(found.unique()) == 256 and int((found < 0).sum()) > 0
    assert 0 in found.unique() and -found.min() > found.max()
    codes = model.conv1.quant_weight.integers(3 * torch.randn(model.conv1.weight.shape)).codes  # pyright: ignore
    assert (int(codes.min()), int(codes.max())) == (-128, 127)


@pytest.mark.parametrize(("bits", "grid"), [(7, "midrise"), (8, "midtread"), (9, "midtread")])
def test_weights_with_codes_beyond_eight_bits_have_a_level_at_zero(bits: int, grid: str) -> None:
    """Where it is layers of their own bits; --bits 8 for all is as published."""
    model, _ = network("resnet20", f"--last_bit {bits}")
    assert model.fc.quant_weight.config.grid == grid  # pyright: ignore
    assert model.get_submodule("layer1.0.conv1.0.quant_weight").config.grid == "midrise"  # pyright: ignore


# Entries ---------------------------------------------------------------------------------------------


def small(entries: list[Any], **fields: Any) -> tuple[nn.Module, QuantConfig]:
    """A ResNet-20 whose tags have 2 bits, with entries."""
    words = f"--model resnet20 {FAMILIES['resnet20'][0]} --bits 2"
    config = read(words.split()).model
    quant = with_layer_bits(config.quant, fields.get("first_bit"), fields.get("last_bit"), entries)
    return build_network(dataclasses.replace(config, quant=quant)), quant


def test_later_entries_win() -> None:
    model, quant = small(
        [
            {"name": "*", "bit": 3},
            {"name": ["layer1.*", "layer2.0.*"], "wt_bit": 4, "fm_bit": "ternary"},
            {"name": "layer1.0.conv1.0", "tag": "wt", "bit": 32},
            {"name": "layer1.0.conv2.0", "bit": 32},
            {"name": "fc", "bit": 8},
        ]
    )
    found = bits_of(model)
    assert found["layer3.0.conv1.0.quant_weight"] == found["layer3.0.conv1.0.quant_activation"] == 8
    assert [found[f"layer2.0.skip.1.quant_{part}"] for part in ("weight", "activation")] == [16, 3]
    assert "layer1.0.conv1.0.quant_weight" not in found and found["layer1.0.conv1.0.quant_activation"] == 3
    assert found["fc.quant_weight"] == found["fc.quant_activation"] == 256
    assert full_precision(model) == ("conv1", "layer1.0.conv2.0")  # a wildcard does not reach the first layer
    result = audit(model, [images()], quant)
    assert not result.problems
    assert {row.name: row.reason for row in result.layers} == {
        "conv1": "is kept so by its network",
        "layer1.0.conv2.0": "has 32 bits, --layer_bits: entry 4",
    }


def test_groups_of_layers() -> None:
    """Without an entry a weight has a range for each output channel, an input one range."""
    model, quant = small(
        [
            {"name": "*", "wt_quant_group": 1},
            {"name": "layer1.*", "quant_group": -1},
            {"name": "layer2.0.*", "bit": 3, "fm_quant_group": 2},
            {"name": "layer2.0.conv2.0", "wt_quant_group": 0},
            {"name": "fc", "bit": 8},
        ],
        last_bit=4,
    )
    shapes = {name: tuple(one.clip_val.shape) for name, one in quantizers(model)}  # pyright: ignore
    channels = model.get_submodule("layer1.0.conv1.0").out_channels
    assert shapes["layer1.0.conv1.0.quant_weight"] == (channels, 1, 1, 1)
    assert shapes["layer1.0.conv1.0.quant_activation"] == (1, channels, 1, 1)
    assert shapes["layer2.0.conv1.0.quant_weight"] == (1, 1, 1, 1)
    assert shapes["layer2.0.conv1.0.quant_activation"] == (1, 2, 1, 1)
    assert shapes["layer2.0.conv2.0.quant_weight"] == (2 * channels, 1, 1, 1)
    assert shapes["layer3.0.conv1.0.quant_weight"] == (1, 1, 1, 1)
    assert shapes["layer3.0.conv1.0.quant_activation"] == (1,)
    assert shapes["fc.quant_weight"] == (10, 1)  # which a wildcard does not reach
    assert not audit(model, [images()], quant).problems


@pytest.mark.parametrize(
    ("options", "entry", "words"),
    [
        ("lsq --bits 2", {"name": "layer1.*", "wt_quant_group": 3}, r"entry 1: layer1\.0\.conv1\.0: .* not divide"),
        ("lsq --bits 2", {"name": "fc", "quant_group": 1}, "entry 1: fc is in full precision: give it bits too"),
        ("lsq --bits 2", {"ot_quant_group": 1}, "ot_quant_group: outputs are not quantized: add --ot_enable"),
        ("dorefa --bits 2", {"quant_group": 1}, "has no groups of weights: leave quant_group out"),
    ],
)  # fmt: skip
def test_groups_that_cannot_be(options: str, entry: dict[str, Any], words: str) -> None:
    config = read(f"--model resnet20 --keyword cifar10,cbsa,{options} --width_alpha 0.125".split()).model
    quant = with_layer_bits(config.quant, None, None, [entry])
    with pytest.raises(UserError, match=words):
        build_network(dataclasses.replace(config, quant=quant))


def test_groups_for_a_layer_that_is_quantized_already() -> None:
    network = linears()
    quantize(network, config(), layer_bits=[{"name": "1", "wt_quant_group": 2}])
    assert network[1].quant_weight.groups == 2 and network[2].quant_weight.groups == 4  # pyright: ignore
    for entry in ({"name": "1", "wt_quant_group": 1}, {"name": "2", "wt_quant_group": 2}):
        with pytest.raises(UserError, match=r"[12] is quantized already: leave it out"):
            quantize(network, config(), last_bit=8, layer_bits=[entry])
    quantize(network, config(), last_bit=8, layer_bits=[{"name": "1", "wt_quant_group": 2}])
    with pytest.raises(UserError, match="0 is in full precision: give it bits too, or leave it out"):
        quantize(network, config(), layer_bits=[{"name": "0", "wt_quant_group": 2}])


def test_wildcards_leave_the_bits_of_the_ends() -> None:
    model, _ = small([{"name": "*", "bit": 4}], first_bit=8, last_bit=8)
    levels = bits_of(model)
    assert {
        levels.pop(f"{end}.quant_{part}") for end in ("conv1", "fc") for part in ("weight", "activation")
    } == {256}
    assert set(levels.values()) == {16}
    model, _ = small([{"name": "fc", "tag": "wt", "bit": 4}, {"name": "*", "bit": 3}], last_bit=8)
    assert bits_of(model)["fc.quant_weight"] == 16 and bits_of(model)["fc.quant_activation"] == 256


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([{"name": "layer5.*", "bit": 4}], "entry 1: no layer is called layer5.*; did you mean layer3.*"),
        ([{"name": ["layer1.*", "fcc"], "bit": 4}], "no layer is called fcc; did you mean fc?"),
        ([{"name": "f*", "bit": 4}], "f* selects no quantized layer, only fc: write such a name out"),
        ([{"name": "fc\n", "bit": 4}], r"no layer is called fc\n; did you mean fc?"),
        ([{"name": "layer1.*", "ot_bit": 4}], "entry 1: ot_bit: outputs are not quantized: add --ot_enable"),
    ],
)
def test_entries_that_fit_nothing(entries: list[Any], words: str) -> None:
    with pytest.raises(UserError) as error:
        small(entries)
    assert words in str(error.value)


def test_bits_that_a_method_does_not_have() -> None:
    words = "--model nin --keyword cifar10,non-uniform --bits ternary --width_alpha 0.125"
    config = read(words.split()).model
    quant = with_layer_bits(
        config.quant, None, None, [{"name": "features.1", "bit": 4}, {"name": "*2*", "bit": 3}]
    )
    with pytest.raises(UserError, match=r"entry 1: no layer is called features\.1"):
        build_network(dataclasses.replace(config, quant=quant))
    quant = dataclasses.replace(quant, layer_bits=layer_rules([{"name": "features.1.conv", "bit": 4}]))
    with pytest.raises(
        UserError, match=r"entry 1: features\.1\.conv: FATNN has no 16 levels for activations"
    ):
        build_network(dataclasses.replace(config, quant=quant))


# Any network -----------------------------------------------------------------------------------------


class Toy(nn.Module):
    """Its head is defined before what runs ahead of it."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 4)
        self.stem = nn.Conv2d(3, 8, 3)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.body = nn.Conv2d(8, 8, 3)
        self.lstm = nn.LSTM(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.depthwise(self.stem(x).relu()).relu()).relu()
        return self.head(self.lstm(x.mean(dim=(2, 3)))[0])


def config(**fields: Any) -> QuantConfig:
    parts = {
        tag: QuantizerConfig(tag=tag, enable=True, method="lsq", levels=4, half_range=tag == "fm")
        for tag in ("fm", "wt")
    }
    return QuantConfig(**parts, depthwise=False, **fields)


def test_quantize_takes_the_bits_of_layers() -> None:
    toy = Toy()
    report = quantize(
        toy, config(), example=(images(12),), first_bit=8, last_bit=4,
        layer_bits=[{"name": "depthwise", "wt_bit": 3, "fm_bit": 32}, {"name": "body", "wt_bit": 2, "fm_bit": 8}],
    )  # fmt: skip
    assert report.replaced == ("head", "stem", "depthwise", "body")
    assert bits_of(toy) == {
        "head.quant_activation": 16, "head.quant_weight": 16, "stem.quant_activation": 256, "stem.quant_weight": 256,
        "depthwise.quant_weight": 8, "body.quant_activation": 256, "body.quant_weight": 4,
    }  # fmt: skip
    assert toy.stem.quant_activation.config.grid == "midtread"  # pyright: ignore
    found = audit(toy, [images(12)], config())
    assert [row.name for row in found.layers] == ["lstm"] and not [row for row in found.rows if row.problem]
    with pytest.raises(UserError, match="entry 1: lstm is a LSTM, which has no quantized form: leave it out"):
        quantize(Toy(), config(), layer_bits=[{"name": "lstm", "bit": 4}])
    with pytest.raises(UserError, match="no layer is called nothing"):
        quantize(Toy(), config(), layer_bits=[{"name": "nothing", "bit": 4}])
    with pytest.raises(UserError, match="QuantConfig: first_bit 99 must be"):
        quantize(Toy(), config(), first_bit=99)
    with pytest.raises(UserError, match=r"--layer_bits none\.yaml: cannot be read"):
        quantize(Toy(), config(), layer_bits="none.yaml")


def linears() -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))


def test_a_mistake_leaves_the_network_as_it_was() -> None:
    """So that another call, with the mistake mended, quantizes it."""
    xnor = {
        tag: QuantizerConfig(tag=tag, enable=True, method="xnor", levels=2, half_range=tag == "fm")
        for tag in ("fm", "wt")
    }
    network = linears()
    quantize(network[1:2], config(first_last=True))
    levels, before = bits_of(network), [dict(vars(each)) for each in network.modules()]
    kinds = [type(each) for each in network.modules()]
    for quant, mistake in (
        (config(), {"layer_bits": [{"name": "zzz", "bit": 4}]}),
        (config(), {"layer_bits": [{"name": "3", "bit": 4}, {"name": "1", "bit": 4}]}),
        (QuantConfig(**xnor), {"first_bit": 8}),  # which the method does not have
        (QuantConfig(**xnor), {"layer_bits": [{"name": "2", "bit": 1}, {"name": "3", "bit": 2}]}),
    ):
        with pytest.raises(UserError):
            quantize(network, quant, **mistake)
        assert [type(each) for each in network.modules()] == kinds
        assert [list(vars(each)) for each in network.modules()] == [list(each) for each in before]
    assert bits_of(network) == levels
    assert quantize(network, config(), last_bit=8).replaced == ("2", "3")
    assert bits_of(network)["2.quant_weight"] == 4 and bits_of(network)["3.quant_weight"] == 256


@pytest.mark.parametrize(
    ("select", "bits", "words"),
    [
        ({"exclude": ("0",)}, {"first_bit": 8}, "--first_bit 8: 0 is excluded by 0: leave it out"),
        ({"include": ("1",)}, {"last_bit": 8}, "--last_bit 8: 3 is not included: leave it out"),
        ({"linears": False}, {"last_bit": 8}, "--last_bit 8: 3 is a linear layer: leave it out"),
        (
            {"exclude": ("2",)},
            {"layer_bits": [{"name": "*", "bit": 4}, {"name": "2", "bit": 3}]},
            "--layer_bits: entry 2: 2 is excluded by 2: leave it out",
        ),
        (
            {"exclude": ("1", "2")},
            {"layer_bits": [{"name": "[12]", "bit": 4}]},
            r"\[12\] selects no layer that can get bits: 1 is excluded by 1: leave it out",
        ),
        (
            {"exclude": ("2",)},
            {"layer_bits": [{"name": "[23]", "bit": 4}]},
            r"\[23\] selects no quantized layer, only 3: write such a name out to give the layer bits",
        ),
    ],
)
def test_bits_for_a_layer_that_is_not_selected(
    select: dict[str, Any], bits: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        quantize(linears(), config(), select=Selection(**select), **bits)
    full = {each: 32 if each != "layer_bits" else [{"name": "2", "bit": 32}] for each in bits}
    quantize(linears(), config(), select=Selection(**select | {"linears": True}), **full)


def test_bits_for_a_layer_that_is_quantized_already() -> None:
    network = linears()
    quantize(network, config(), first_bit=8)
    assert quantize(network, config(), first_bit=8, last_bit=4).replaced == ("3",)
    for bits in (
        {"first_bit": 4},
        {"layer_bits": [{"name": "0", "bit": 4}]},
        {"layer_bits": [{"name": "1", "bit": 4}]},
    ):
        with pytest.raises(UserError, match=r"[01] is quantized already: leave it out"):
            quantize(network, config(), **bits)


def test_full_precision_for_a_layer_that_has_it_anyway() -> None:
    network = linears()
    report = quantize(network, config(), layer_bits=[{"name": "*", "bit": 4}, {"name": "3", "bit": 32}])
    assert report.replaced == ("1", "2") and set(bits_of(network).values()) == {16}


def test_an_example_that_calls_no_layer() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(UserError, match="with example the network calls no layer with weights"):
        quantize(Unused(), config(), example=(torch.zeros(1, 4),))
