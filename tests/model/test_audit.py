"""The audit passes what quantizes and catches what does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from model.audit import audit, unexplained
from model.convert import build_quantizers, full_precision, quantize
from model.layers.convolution import QuantConv2d
from model.layers.quantized import QuantLayer, QuantLinear, keep_full_precision, quantizers
from model.networks.build import build_network
from model.quantizers.frame import Quantizer
from model.watch.cost import network_cost
from utils.config.resolve import read
from utils.config.schema import QuantConfig, QuantizerConfig

LOW = ("--fm_enable", "--wt_enable", "--fm_bit", "2", "--wt_bit", "2")
ONE = ("--fm_enable", "--wt_enable", "--fm_bit", "1", "--wt_bit", "1")


def network(keywords: str = "dorefa,lsq", options: tuple[str, ...] = LOW) -> nn.Module:
    torch.manual_seed(0)
    argv = ["--model", "resnet20", "--keyword", f"digits,cbsa,origin,{keywords}", "--width_alpha", "0.0625"]
    return build_network(read([*argv, *options]).model)


def batches(count: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 3, 12, 12, generator=generator) for _ in range(count)]


@pytest.mark.parametrize(
    ("keywords", "options"),
    [
        ("dorefa", LOW),
        ("dorefa", (*LOW, "--wt_level", "3")),
        ("dorefa,wt_bin", ONE),
        ("pact", LOW),
        ("dorefa,lsq", LOW),
        ("dorefa,lsq,wt_gamma", LOW),
        ("dorefa,lsq", (*LOW, "--fm_quant_group", "4", "--wt_quant_group", "1")),
        ("dorefa,lsq", (*LOW, "--wt_adaptive", "var-mean", "--wt_adaptive_restore")),
        ("dorefa,lsq", (*LOW, "--fm_adaptive", "var", "--fm_adaptive_restore")),
        ("dorefa,lsq", (*LOW, "--ot_enable", "--ot_bit", "3")),
        ("lq", LOW),
        ("xnor", ONE),
        ("xnor,gamma", ONE),
        ("xnor", (*ONE, "--fm_custom", "channel")),
        ("xnor", (*ONE, "--fm_custom", "resolution")),
        ("dorefa,non-uniform", (*LOW, "--wt_level", "3", "--wt_scale", "5")),
    ],
)
def test_real_quantizers_pass(keywords: str, options: tuple[str, ...]) -> None:
    net = network(keywords, options)
    result = audit(net, batches())
    assert result.problems == ()
    assert [row.name for row in result.rows] == [name for name, _ in quantizers(net)]
    assert result.verdict.startswith(f"passed: {len(result.rows)} quantizers within their levels")
    weights = [row for row in result.rows if row.name.endswith("quant_weight")]
    assert len(weights) == 20  # 18 convolutions and 2 shortcuts
    assert all(2 <= row.seen <= row.allowed and row.changed for row in weights)


def test_levels_are_counted() -> None:
    """Weights spread over [-1, 1] take every level of a 2-bit DoReFa quantizer."""
    net = network("dorefa")
    with torch.no_grad():
        net.get_submodule("layer3.0.conv2.0").weight.copy_(
            torch.linspace(-2, 2, 16 * 16 * 9).view(16, 16, 3, 3)
        )
    rows = {row.name: row for row in audit(net, batches()).rows}
    row = rows["layer3.0.conv2.0.quant_weight"]
    assert (row.seen, row.allowed) == (2, 4)  # a channel spans a sixteenth of the range: two levels at most
    tensor = network("dorefa", (*LOW, "--wt_quant_group", "1"))
    tensor.load_state_dict(net.state_dict())
    rows = {row.name: row for row in audit(tensor, batches()).rows}
    assert rows["layer3.0.conv2.0.quant_weight"].seen == 4


class PassThrough(Quantizer):
    """Forgets to quantize."""

    def quantize(self, x: Tensor) -> Tensor:
        """Nothing."""
        return x


class TooFine(Quantizer):
    """Five levels, whatever is allowed."""

    def quantize(self, x: Tensor) -> Tensor:
        """Round to 0 .. 4."""
        return (x.abs() * 4).round().clamp(0, 4)


class Drifting(Quantizer):
    """Two levels in a batch, others in the next."""

    def quantize(self, x: Tensor) -> Tensor:
        """The signs times the largest magnitude."""
        return torch.where(x < 0, -1.0, 1.0) * x.abs().max()


def replace(net: nn.Module, layer: str, part: str, kind: type[Quantizer]) -> str:
    """Put a quantizer of `kind` in place of one of the network's; returns its name."""
    found = net.get_submodule(layer)
    assert isinstance(found, QuantLayer)
    old = getattr(found, part)
    assert isinstance(old, Quantizer)
    setattr(found, part, kind(old.config, old.site))
    return f"{layer}.{part}"


@pytest.mark.parametrize("part", ["quant_activation", "quant_weight"])
@pytest.mark.parametrize(
    ("kind", "problem"), [(PassThrough, "passes its input"), (TooFine, "shows 5 values where 4 are allowed")]
)
def test_a_broken_quantizer_is_caught(kind: type[Quantizer], problem: str, part: str) -> None:
    net = network()
    with torch.no_grad():
        net.get_submodule("layer2.1.conv2.0").weight.normal_()
    name = replace(net, "layer2.1.conv2.0", part, kind)
    result = audit(net, batches())
    assert result.problems == (f"{name} {problem}",)
    assert result.verdict == f"FAILED: 1 of {len(result.rows)} quantizers"
    [row] = [line for line in result.table().splitlines() if problem in line]
    assert row.split()[0] == name


def test_levels_that_change_between_batches_are_caught() -> None:
    net = network(options=(*LOW, "--fm_level", "2"))
    name = replace(net, "layer1.0.conv1.0", "quant_activation", Drifting)
    assert audit(net, batches(1)).problems == ()
    assert audit(net, batches(3)).problems == (f"{name} shows 3 values where 2 are allowed",)


def test_a_quantizer_that_is_never_reached_is_caught() -> None:
    net = network()
    spare = network().get_submodule("layer1.0")
    net.add_module("spare", spare)
    problems = audit(net, batches()).problems
    assert problems == tuple(f"spare.{name} was never reached" for name, _ in quantizers(spare))
    assert audit(net, []).verdict.startswith("FAILED")


def test_a_warm_up_that_is_not_over_is_caught() -> None:
    """Activations and weights still pass through unquantized."""
    problems = audit(network(options=(*LOW, "--stable", "5")), batches()).problems
    assert problems
    assert all("passes its input: the warm-up" in problem for problem in problems)


def test_many_bits_do_not_hide_a_pass_through() -> None:
    """A weight group of 36 values has fewer than the 2^16 levels that it may have."""
    bits = ("--fm_enable", "--wt_enable", "--fm_bit", "16", "--wt_bit", "16")
    assert audit(network(options=bits), batches()).problems == ()
    assert len(audit(network(options=(*bits, "--stable", "5")), batches()).problems) == 40
    net = network(options=bits)
    name, quantizer = next((n, q) for n, q in quantizers(net) if n.endswith("weight"))
    quantizer.quantize = lambda x: x
    assert audit(net, batches()).problems == (f"{name} puts out values that are not those of its levels",)


def test_a_quantizer_that_is_not_there_is_caught() -> None:
    net = network()
    layer = net.get_submodule("layer1.0.conv1.0")
    layer.quant_weight = nn.Identity()
    config = read(["--keyword", "digits,cbsa,dorefa,lsq", *LOW]).model.quant
    assert audit(net, batches(), config).problems == ("layer1.0.conv1.0.quant_weight was never reached",)


# What the layers multiply -----------------------------------------------------------------------


class WeightIgnored(QuantConv2d):
    """Calls its quantizers and multiplies by the weight itself."""

    def forward(self, x: Tensor) -> Tensor:
        self.quant_weight(self.weight)
        return self.quant_output(self._conv_forward(self.quant_activation(x), self.weight, self.bias))


class InputIgnored(QuantConv2d):
    """Calls its quantizers and multiplies the input itself."""

    def forward(self, x: Tensor) -> Tensor:
        self.quant_activation(x)
        return self.quant_output(self._conv_forward(x, self.quant_weight(self.weight), self.bias))


class BothIgnored(QuantConv2d):
    """Multiplies what it would without quantizers."""

    def forward(self, x: Tensor) -> Tensor:
        super().forward(x)
        return self._conv_forward(x, self.weight, self.bias)


class Corrected(QuantConv2d):
    """Adds what quantizing took away."""

    def forward(self, x: Tensor) -> Tensor:
        full = self._conv_forward(x, self.weight, self.bias)
        return super().forward(x) + 0.5 * full


class OutputIgnored(QuantConv2d):
    """Its quantizers see all, but what leaves is not the last one's."""

    def forward(self, x: Tensor) -> Tensor:
        y = self._conv_forward(self.quant_activation(x), self.quant_weight(self.weight), self.bias)
        self.quant_output(y)
        return y


class Unfolded(QuantConv2d):
    """The same convolution as a matrix product, padded by hand."""

    def forward(self, x: Tensor) -> Tensor:
        x = functional.pad(self.quant_activation(x), (1, 1, 1, 1))
        columns = functional.unfold(x, 3).mT
        y = columns @ self.quant_weight(self.weight).flatten(1).T
        return self.quant_output(y.mT.unflatten(2, (x.shape[2] - 2, x.shape[3] - 2)))


THREE = ("--ot_enable", "--ot_bit", "3")


def with_layer(kind: type[QuantConv2d]) -> tuple[nn.Module, str]:
    """A network of which one convolution is of this class, and its name."""
    net, name = network(options=(*LOW, *THREE)), "layer2.1.conv2.0"
    net.get_submodule(name).__class__ = kind
    return net, name


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        (WeightIgnored, "multiplies values that quant_weight did not put out"),
        (InputIgnored, "multiplies values that quant_activation did not put out"),
        (BothIgnored, "multiplies values that quant_activation and quant_weight did not put out"),
        (Corrected, "multiplies values that quant_activation and quant_weight did not put out"),
        (OutputIgnored, "puts out values that quant_output did not"),
    ],
)
def test_a_layer_that_ignores_its_quantizers_is_caught(kind: type[QuantConv2d], problem: str) -> None:
    net, name = with_layer(kind)
    result = audit(net, batches())
    assert result.problems == (f"{name} {problem}",)
    assert result.verdict == "FAILED: 1 layer"
    assert [line.split()[0] for line in result.table().splitlines() if problem in line] == [name]


def test_a_layer_without_a_product_is_caught() -> None:
    net = nn.Sequential(nn.Identity(), QuantConv2d(3, 3, 1))
    build_quantizers(net, read(["--keyword", "digits,cbsa,dorefa,lsq", *LOW]).model.quant)

    class Elementwise(QuantConv2d):
        def forward(self, x: Tensor) -> Tensor:
            return self.quant_activation(x) * self.quant_weight(self.weight).sum(dim=(1, 2, 3)).reshape(
                -1, 1, 1
            )

    net[1].__class__ = Elementwise
    assert audit(net, batches()).problems == (
        "1 has no convolution and no matrix product that could be looked at",
    )


def test_a_layer_of_ones_own_that_multiplies_what_is_quantized_passes() -> None:
    net, _ = with_layer(Unfolded)
    assert not audit(net, batches()).problems


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_autocast_rounds_passes(dtype: torch.dtype) -> None:
    net = network("lq")
    with torch.autocast("cpu", dtype=dtype):
        assert not audit(net, batches()).problems


@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular", "replicate"])
@pytest.mark.parametrize("padding", [1, (2, 1), "same"])
@pytest.mark.parametrize("after", [False, True])
def test_any_padding_passes(after: bool, padding: Any, mode: str) -> None:
    net = nn.Sequential(
        QuantConv2d(3, 4, (5, 3), padding=padding, padding_mode=mode, padding_after_quant=after),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        QuantLinear(16, 16),
        QuantLinear(16, 5),
    )
    build_quantizers(net, read(["--keyword", "digits,cbsa,dorefa,lsq", *LOW]).model.quant)
    result = audit(net, batches())
    assert (len(result.rows), result.problems) == (6, ())


def test_a_layer_that_was_never_quantized_is_caught() -> None:
    """Put in behind the back of `build`, or forgotten by it."""
    net = network()
    block = net.get_submodule("layer2.1.conv2")
    block[0] = nn.Conv2d(8, 8, 3, padding=1, bias=False)
    names = [name for name, _ in quantizers(net)]
    net.add_module("tail", nn.Linear(10, 10))
    result = audit(net, batches())
    message = "computes in full precision, and no model.quant.keep_full_precision(layer, reason) says that it should"
    assert result.problems == (f"layer2.1.conv2.0 {message}", f"tail {message}")
    assert [row.name for row in result.rows] == names
    assert result.verdict == "FAILED: 2 layers"
    assert unexplained(net) == tuple(f"{problem}; the audit fails" for problem in result.problems)
    keep_full_precision(net.get_submodule("tail"), "is new")
    keep_full_precision(block[0], "is the most important one")
    result = audit(net, batches())
    assert result.problems == unexplained(net) == ()
    assert "full precision: it is the most important one" in result.table()


@pytest.mark.parametrize("keywords", ["dorefa", "pact", "dorefa,lsq", "lq"])
def test_what_is_not_finite_fails(keywords: str) -> None:
    images = batches(2)
    images[1][0, 0, 0, 0] = torch.nan
    found = [row.problem for row in audit(network(keywords), images).rows if "activation" in row.name]
    assert set(found) == {"puts out values that are not finite"}


def test_layers_in_full_precision_are_listed() -> None:
    result = audit(network("dorefa,lsq,real_skip"), batches())
    assert result.problems == ()
    assert {row.name: row.reason for row in result.layers} == {
        "conv1": "is kept so by its network",
        "layer2.0.skip.1": "is kept so by its network",
        "layer3.0.skip.1": "is kept so by its network",
        "fc": "is the last layer",
    }
    lines = [line.split(maxsplit=1) for line in result.table().splitlines()]
    assert ["fc", "full precision: it is the last layer"] in lines


def test_full_precision_has_nothing_to_audit() -> None:
    result = audit(network("cbsa", ()), batches())
    assert result.rows == ()
    assert result.problems == ()
    assert result.verdict == "full precision, nothing to audit"
    assert unexplained(network("cbsa", ())) == ()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("keywords", "options"), [("dorefa,lsq", (*LOW, "--stable", "2")), ("lq", LOW)])
def test_auditing_leaves_the_network_alone(keywords: str, options: tuple[str, ...], training: bool) -> None:
    net = network(keywords, options).train(training)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    audit(net, batches())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(module.training == training and not module._forward_hooks for module in net.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in net.parameters())


def test_a_batch_that_fails_leaves_the_network_alone() -> None:
    net = network().train()
    with pytest.raises(RuntimeError):
        audit(net, [torch.zeros(1, 4, 8, 8)])
    assert all(module.training and not module._forward_hooks for module in net.modules())


def test_allowed_levels_follow_the_quantizer() -> None:
    """Levels lowered later are what is allowed, not the configured ones."""
    net = network()
    config: list[QuantizerConfig] = []
    for _, quantizer in quantizers(net):
        quantizer.set_levels(3)
        config.append(quantizer.config)
    result = audit(net, batches())
    assert {row.allowed for row in result.rows} == {3}
    assert {part.levels for part in config} == {4}
    assert result.problems == ()


def test_a_network_that_nobody_quantized_fails_where_its_configuration_quantizes() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2))
    config = QuantConfig(wt=QuantizerConfig(tag="wt", enable=True, method="lsq", levels=4))
    found = audit(network, [torch.rand(2, 3, 8, 8)], config)
    assert found.problems == ("the network has no quantizer, though its configuration enables some",)
    assert audit(network, [torch.rand(2, 3, 8, 8)]).problems == ()


def test_cut_off_inputs_are_remarked_on() -> None:
    """Three quarters of the pixels lie below zero, where the first layer's levels start; the audit still passes."""
    net = network("lsq,first-last")
    images = torch.rand(4, 3, 12, 12, generator=torch.Generator().manual_seed(1)) * 0.5 + 0.01
    images[:3] *= -1
    result = audit(net, [images[:2], images[2:]])
    (row,) = (row for row in result.rows if row.name == "conv1.quant_activation")
    assert (row.below, row.above) == (pytest.approx(0.75), 0)
    assert row.note == "ok, cuts off 75 % below its range"
    assert "conv1.quant_activation 75 % below its range" in result.remark
    assert "ok, cuts off 75 % below its range" in result.table()
    cutting = sum(row.below > 0.1 for row in result.rows)
    assert result.verdict.endswith(f", {cutting} of them cutting off the lower part of their input")
    for option in (["--fm_first_signed"], ["--first_bit", "8"]):
        signed = audit(network("lsq,first-last", (*LOW, *option)), [images])
        assert {row.name: row.note for row in signed.rows}["conv1.quant_activation"] == "ok"
        assert signed.warning == ""


@pytest.mark.parametrize("words", ["lsq,first-last", "lsq,first-last,TResNetStem"])
def test_pixels_below_zero_are_counted(words: str) -> None:
    """Of the images alone, without the padding, however few they are; no other layer reads them."""
    images = torch.rand(4, 3, 12, 12, generator=torch.Generator().manual_seed(1)) + 0.01
    images[:, 0, :3] *= -1  # one row in twelve
    found = audit(network(words), [images[:3], images[3:]])
    assert {row.name for row in found.rows if row.pixels} == {
        "conv1.conv.quant_activation" if "Stem" in words else "conv1.quant_activation"
    }
    assert [row.pixels for row in found.rows if row.pixels] == [pytest.approx(1 / 12)]
    assert "makes 8 % of the images' values 0" in found.warning and "--first_bit 8" in found.warning
    assert found.warning in found.table() and not found.problems
    assert audit(network(words), [images.abs()]).warning == ""


@pytest.mark.parametrize(("boundary", "cut"), [("0.01", True), ("50", False)])
def test_inputs_above_the_range_are_remarked_on(boundary: str, cut: bool) -> None:
    """Of activations and outputs; the range of weights is their own."""
    options = (
        *LOW,
        "--fm_boundary",
        boundary,
        "--ot_enable",
        "--ot_boundary",
        f"{boundary}e-3",
        "--wt_boundary",
        "0.01",
    )
    result = audit(network("lsq", options), batches())
    found = {row.name for row in result.rows if row.cut_off}
    assert ({f"layer1.0.conv1.0.quant_{part}" for part in ("activation", "output")} <= found) is cut
    assert not any(name.endswith("quant_weight") for name in found)
    assert (result.remark != "") is cut


class Table(nn.Module):
    """Mixes kernels of a parameter by its input and convolves with the mixture, as CondConv does."""

    def __init__(self, standardised: bool = False) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(2, 4 * 4 * 9))
        self.standardised = standardised

    def forward(self, x: Tensor) -> Tensor:
        if self.standardised:
            kernel = self.table[0] - self.table[0].mean()
            return functional.conv2d(x, kernel.reshape(4, 4, 3, 3), padding=1)
        kernel = x.mean(dim=(0, 2, 3))[None, :2] @ self.table
        return functional.conv2d(x, kernel.reshape(4, 4, 3, 3), padding=1)


@pytest.mark.parametrize("standardised", [False, True])
def test_a_module_of_any_class_that_multiplies_by_its_parameters_is_seen(standardised: bool) -> None:
    """By the operators that run: in the audit, in the sizes, and as left where the network is converted."""
    config = read(["--keyword", "digits,cbsa,dorefa,lsq", *LOW]).model.quant
    layers = (nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), Table(standardised), nn.Conv2d(4, 2, 3))
    torch.manual_seed(0)
    net = nn.Sequential(*layers)
    report = quantize(net, config)  # without an example, nothing has run yet
    assert report.replaced == ("1",)
    problem = "2 multiplies by 2.table (288 weights) in full precision, and no "
    assert [line[: len(problem)] for line in audit(net, batches(), config).problems] == [problem]
    row = network_cost(net, 12).layers[2]
    assert (row.name, row.kind, row.weights, row.weight_bits) == ("2", "Table 2x144", 288, 32)
    assert row.macs == (8 * 8 * 4 * 4 * 9 if standardised else 2 * 144)

    fresh = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), Table(standardised), nn.Conv2d(4, 2, 3))
    report = quantize(fresh, config, example=(torch.rand(1, 3, 12, 12),))
    assert [left.name for left in report.left] == ["0", "2", "3"]
    assert report.left[1].reason == "is a Table, which has no quantized form"
    assert full_precision(fresh) == ("0", "2", "3")
    found = audit(fresh, batches(), config)
    assert not found.problems and "is a Table" in found.table()


def test_copies_that_autocast_keeps_hide_no_parameter() -> None:
    """The end of a run counts and audits under one autocast."""
    config = read(["--keyword", "digits,cbsa,dorefa,lsq", *LOW]).model.quant
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), Table(), nn.Conv2d(4, 2, 3))
    quantize(net, config)
    with torch.autocast("cpu", torch.bfloat16):
        assert [layer.name for layer in network_cost(net, 12).layers] == ["0", "1", "2", "3"]
        net(batches(1)[0])  # with gradients, so that casts are kept
        assert any("multiplies by 2.table" in line for line in audit(net, batches(), config).problems)


def test_a_module_of_ones_own_that_quantizes_its_parameter_passes() -> None:
    """A weight that a quantizer put out is no parameter any more; turned off, it is one."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 3))
            layer = QuantLinear(3, 5)
            layer.build_quantizers(read(["--keyword", "digits,cbsa,dorefa,lsq", *LOW]).model.quant, "own")
            self.quantizer = layer.quant_weight

        def forward(self, x: Tensor) -> Tensor:
            return x.mean(dim=(2, 3)) @ self.quantizer(self.weight).T

    net = nn.Sequential(Own())
    assert not audit(net, batches()).problems
    net[0].quantizer.enabled = False
    assert any("multiplies by 0.weight" in line for line in audit(net, batches()).problems)
