"""The audit passes what quantizes and catches what does not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from model.audit import audit
from model.build import build
from model.quant import Quantizer, QuantLayer, quantizers
from utils.config import QuantizerConfig
from utils.resolve import read

LOW = ("--fm_enable", "--wt_enable", "--fm_bit", "2", "--wt_bit", "2")
ONE = ("--fm_enable", "--wt_enable", "--fm_bit", "1", "--wt_bit", "1")


def network(keywords: str = "dorefa,lsq", options: tuple[str, ...] = LOW) -> nn.Module:
    torch.manual_seed(0)
    argv = ["--model", "resnet20", "--keyword", f"digits,cbsa,origin,{keywords}", "--width_alpha", "0.0625"]
    return build(read([*argv, *options]).model)


def batches(count: int = 2) -> list[Tensor]:
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


def test_full_precision_has_nothing_to_audit() -> None:
    result = audit(network("cbsa", ()), batches())
    assert result.rows == ()
    assert result.problems == ()
    assert result.verdict == "full precision, nothing to audit"


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
