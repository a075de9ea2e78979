"""What a network costs, against numbers counted by hand and known ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from model.layers.convolution import QuantConv2d
from model.layers.quantized import QuantLinear, quantizers
from model.networks.build import build_network
from model.quantizers.lsq import LSQ
from model.watch.cost import network_cost
from utils.config.resolve import read
from utils.config.schema import QuantConfig
from utils.report.cost_record import stored_bits


def quant(*options: str, keywords: str = "dorefa,lsq") -> QuantConfig:
    """The quantizers of a command line."""
    return read(["--keyword", f"digits,cbsa,{keywords}", *options]).model.quant


LOW = ("--fm_enable", "--wt_enable", "--fm_bit", "2", "--wt_level", "3")


class Small(nn.Module):
    """A convolution, a quantized one in two groups, and a quantized linear layer."""

    def __init__(self, config: QuantConfig) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.second = QuantConv2d(4, 8, 3, stride=2, padding=1, groups=2, bias=False)
        self.last = QuantLinear(8, 5)
        self.second.build_quantizers(config, "second")
        self.last.build_quantizers(config, "last")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Classify images."""
        x = self.second(self.norm(self.first(x)))
        return self.last(x.mean(dim=(2, 3)))


def test_quantizers_that_are_off_count_in_full_precision() -> None:
    """Also where another one of the same kind comes later."""
    model = Small(quant(*LOW))
    model.second.quant_weight.enabled = model.last.quant_activation.enabled = False
    layers = network_cost(model, 8).layers
    assert [(layer.weight_bits, layer.activation_bits) for layer in layers] == [(32, 32), (32, 2), (2, 32)]
    assert [quantizer.enabled for _, quantizer in quantizers(model)] == [True, False, False, True]


def test_small_network_by_hand() -> None:
    result = network_cost(Small(quant(*LOW)), 8)
    first, second, last = result.layers
    assert [layer.name for layer in result.layers] == ["first", "second", "last"]
    assert [layer.kind for layer in result.layers] == ["conv 3x3 3-4", "conv 3x3/2 4-8 g2", "linear 8-5"]
    assert [layer.output for layer in result.layers] == [(4, 8, 8), (8, 4, 4), (5,)]
    assert [layer.weights for layer in result.layers] == [4 * 3 * 9, 8 * 2 * 9, 8 * 5]
    assert first.macs == 4 * 8 * 8 * 3 * 9
    assert second.macs == 8 * 4 * 4 * 2 * 9
    assert last.macs == 8 * 5
    assert [(layer.weight_bits, layer.activation_bits) for layer in result.layers] == [
        (32, 32),
        (2, 2),
        (2, 2),
    ]
    assert first.bit_operations == 6912 * 32 * 32
    assert result.macs == 6912 + 2304 + 40
    assert result.bit_operations == 6912 * 1024 + 2304 * 4 + 40 * 4
    assert result.weight_bytes == 108 * 4 + 144 // 4 + 40 // 4
    assert result.float_weight_bytes == (108 + 144 + 40) * 4
    # Convolution with bias; norm; convolution with clip values of its input and of 8 channels; linear layer
    # with bias and clip values of its input and of 5 outputs.
    assert result.parameters == (108 + 4) + 8 + (144 + 1 + 8) + (40 + 5 + 1 + 5)
    assert result.bits == "ternary/2"


def test_table_and_totals() -> None:
    result = network_cost(Small(quant(*LOW)), 8)
    lines = result.table().splitlines()
    assert [line.split()[0] for line in lines[2:-1]] == ["first", "second", "last"]
    assert lines[2].count("full precision") == 2
    assert "lsq ternary, 3 levels, 8 gr." in lines[3]
    assert "lsq 2 bit, 4 levels, 1 gr." in lines[3]
    assert "2,304" in lines[3]
    assert lines[-1] == result.totals()
    assert "324 parameters, 9,256 MACs, 7,087,264 bit operations" in lines[-1]
    assert "weights 0.5 KiB (1.1 KiB in float32)" in lines[-1]


@pytest.mark.parametrize(
    ("options", "bits", "weight_bytes"),
    [
        ((), "32/32", (144 + 40) * 4),
        (("--wt_enable", "--wt_bit", "4"), "4/32", (144 + 40) // 2),
        (("--fm_enable", "--fm_bit", "8"), "32/8", (144 + 40) * 4),
        (("--fm_enable", "--wt_enable", "--fm_bit", "4", "--wt_bit", "1"), "1/4", (144 + 40) // 8),
        (("--wt_enable", "--wt_level", "5"), "3/32", (144 + 40) * 3 // 8),
        (("--wt_enable", "--wt_level", "3"), "ternary/32", (144 + 40) // 4),
        (("--fm_enable", "--fm_level", "3", "--wt_enable", "--wt_bit", "2"), "2/ternary", (144 + 40) // 4),
    ],
)
def test_bits_and_weight_bytes(options: tuple[str, ...], bits: str, weight_bytes: int) -> None:
    result = network_cost(Small(quant(*options)), 8)
    assert result.bits == bits
    assert result.weight_bytes == 108 * 4 + weight_bytes


def test_weight_bytes_are_rounded_up_per_layer() -> None:
    layer = QuantConv2d(3, 1, 1, bias=False)
    layer.build_quantizers(quant("--wt_enable", "--wt_bit", "3"), "layer")
    assert network_cost(layer, 2).weight_bytes == 2  # 9 bits


def test_mixed_bits_are_listed() -> None:
    net = Small(quant(*LOW))
    net.last.build_quantizers(quant("--fm_enable", "--wt_enable", "--wt_bit", "4"), "last")
    assert network_cost(net, 8).bits == "ternary-4/2-8"
    net.last.build_quantizers(quant("--fm_enable", "--wt_enable", "--wt_bit", "2", "--fm_level", "3"), "last")
    assert network_cost(net, 8).bits == "ternary-2/ternary-2"
    assert "ternary, 3 levels, 1 gr." in network_cost(net, 8).table()


@pytest.mark.parametrize(
    ("layer", "size", "macs"),
    [
        (nn.Conv2d(3, 6, 3, groups=3), 8, 6 * 6 * 6 * 9),
        (nn.Conv2d(3, 5, 1), 4, 5 * 16 * 3),
        (nn.Conv2d(3, 2, (1, 3)), 5, 2 * 5 * 3 * 3 * 3),
        (nn.Conv2d(3, 2, 3, dilation=2), 9, 2 * 5 * 5 * 27),
        (nn.Conv2d(3, 2, 3, stride=2, padding=1), 7, 2 * 4 * 4 * 27),
        (nn.Linear(6, 4), 6, 3 * 6 * 6 * 4),
    ],
)
def test_macs_of_a_layer(layer: nn.Module, size: int, macs: int) -> None:
    """Every output value takes one product per input it sees."""
    assert network_cost(layer, size).macs == macs


@pytest.mark.parametrize(
    ("levels", "bits"),
    [(2, 1), (3, 2), (4, 2), (5, 3), (8, 3), (9, 4), (16, 4), (255, 8), (256, 8), (257, 9)],
)
def test_stored_bits(levels: int, bits: int) -> None:
    assert stored_bits(levels) == bits


ORIGINAL = "imagenet,cbsa,origin,fix_pooling,singleconv,fix"  # the network of arXiv 1512.03385


@pytest.mark.parametrize(
    ("model", "parameters", "macs", "small"),
    [("resnet18", 11_689_512, 1_814_073_344, 10_600), ("resnet50", 25_557_032, 4_089_184_256, 54_120)],
)
def test_known_networks(model: str, parameters: int, macs: int, small: int) -> None:
    """`small` parameters are norms and the 1,000 biases of `fc`."""
    result = network_cost(build_network(read(["--model", model, "--keyword", ORIGINAL]).model), 224)
    assert result.parameters == parameters
    assert result.macs == macs
    assert result.bit_operations == macs * 1024
    assert result.bits == "32/32"
    assert result.float_weight_bytes == result.weight_bytes == 4 * (parameters - small)


@pytest.mark.parametrize(
    ("weight", "bits"), [(("--wt_bit", "2"), 2), (("--wt_level", "3"), 2), (("--wt_bit", "1"), 1)]
)
def test_quantized_resnet18(weight: tuple[str, ...], bits: int) -> None:
    """First and last layer stay in full precision: 7x7x3x64 and 512x1000 weights."""
    argv = [
        "--model",
        "resnet18",
        "--keyword",
        f"{ORIGINAL},dorefa",
        "--fm_enable",
        "--wt_enable",
        "--fm_bit",
        "2",
    ]
    result = network_cost(build_network(read([*argv, *weight]).model), 64)
    outer = 7 * 7 * 3 * 64 + 512 * 1000
    inner = 11_689_512 - 9_600 - 1_000 - outer  # without the norms' 2 * 4,800 and the bias of `fc`
    assert result.float_weight_bytes == 4 * (outer + inner)
    assert result.weight_bytes == 4 * outer + inner * bits // 8
    assert result.bits == ("ternary/2" if "3" in weight else f"{bits}/2")


def test_branches_multiply_the_blocks() -> None:
    argv = ["--model", "resnet20", "--keyword", "digits,cbsa,origin", "--width_alpha", "0.0625"]

    def blocks(*options: str) -> int:
        layers = network_cost(build_network(read([*argv, *options]).model), 32).layers
        return sum(layer.macs for layer in layers if ".conv" in layer.name)

    assert blocks("--base", "3") == 3 * blocks()


@pytest.mark.parametrize("training", [True, False])
def test_counting_leaves_the_network_alone(training: bool) -> None:
    net = Small(quant(*LOW, "--stable", "3")).train(training)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    network_cost(net, 8)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(module.training == training for module in net.modules())
    assert all(not module._forward_hooks for module in net.modules())


def test_a_failing_network_is_left_alone_too() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 5), nn.Conv2d(4, 4, 5)).train()
    with pytest.raises(RuntimeError):
        network_cost(net, 8)
    assert all(module.training and not module._forward_hooks for module in net.modules())


def test_one_quantizer_of_each_kind_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every option has been tried then; all are as they were afterwards, one that is off included."""
    line = "--model resnet20 --width_alpha 0.25 --keyword cifar10,origin,cbsa,dorefa,lsq"
    net = build_network(read(f"{line} --fm_enable --wt_enable --fm_bit 2 --wt_bit 3".split()).model)
    found = [quantizer for _, quantizer in quantizers(net)]
    found[-1].enabled = False
    worked: list[str] = []
    quantize = LSQ.quantize

    def note(self: LSQ, x: torch.Tensor) -> torch.Tensor:
        worked.append(self.config.tag)
        return quantize(self, x)

    monkeypatch.setattr(LSQ, "quantize", note)
    first = network_cost(net, 32)
    assert sorted(worked) == ["fm", "wt"]
    assert [quantizer.enabled for quantizer in found] == [True] * (len(found) - 1) + [False]
    assert network_cost(net, 32) == first
