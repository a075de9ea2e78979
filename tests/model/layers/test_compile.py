"""Compilation of quantized layers into one graph, and that nothing in them waits for the device."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from model.networks import build
from model.quantizers import frame
from model.quantizers.frame import Quantizer
from model.quantizers.pact import PACT
from model.quantizers.registry import methods
from tests.model.layers.convolution import conv, image
from tests.model.quantizers.cases import SHAPES, Case, backward, cases, over
from utils.config.resolve import read
from utils.config.schema import QuantConfig, QuantizerConfig

# What is compiled beside each class of quantizers: entry, tag, fields.
EXTRAS: list[tuple[str, str, dict[str, Any]]] = [
    *((name, "fm", {"stable": 2}) for name in ("dorefa", "lsq", "lq")),
    ("lsq", "fm", {"quant_group": 2, "gamma": True, "grad_scale": "scale-element"}),
    ("lsq", "fm", {"adaptive": "var-mean", "adaptive_restore": True, "proxquant_step": 5}),
    ("lsq", "wt", {"stable": 2, "adaptive": "var-mean", "gamma": True, "grad_scale": "fan-scale"}),
    ("lsq", "ot", {"quant_group": 4}),
    ("pact", "fm", {"grad_type": "STE-scale", "grad_scale": "element-scale"}),
    ("lq", "fm", {"custom_update": True, "quant_group": 2}),
    ("lq-wt", "wt", {"adaptive": "mean-var", "adaptive_restore": True}),
    ("fatnn", "fm", {"closed_form": True, "stable": 2}),
]


def one_of_each_class() -> list[Case]:
    """A case for each class of quantizers and each of its ranges and fields."""
    found: dict[object, Case] = {}
    for case in cases():
        fields = {name: value for name, value in case.method.fields.items() if name != "grad_type"}
        key = (methods()[case.method.method, case.tag], case.half_range, *fields.items())
        found.setdefault(key, case)
    return list(found.values())


def one_of_each_method() -> list[Case]:
    """A case for each class of quantizers, of whatever range."""
    found: dict[object, Case] = {}
    for case in cases():
        found.setdefault((methods()[case.method.method, case.tag], case.tag), case)
    return list(found.values())


def test_one_of_each_class_leaves_no_range_out() -> None:
    """A range that is never compiled may be compiled into another function unnoticed."""

    def ranges(found: Sequence[Case]) -> set[object]:
        return {(methods()[case.method.method, case.tag], case.half_range) for case in found}

    assert ranges(one_of_each_class()) == ranges(cases())


def one_of_each_name() -> list[Case]:
    """A case for each method: what all quantizers share, such as a warm-up, is theirs on either side."""
    found: dict[str, Case] = {}
    for case in one_of_each_method():
        found.setdefault(case.method.method, case)
    return list(found.values())


def layer_config(case: Case) -> QuantConfig:
    return dataclasses.replace(QuantConfig(), **{case.tag: case.config})


LAYERS = [
    *one_of_each_class(),
    *(case.with_fields(adaptive="mean-var", stable=1) for case in one_of_each_name()),
    *(
        next(case for case in cases(tags=(tag,)) if case.name == name).with_fields(**fields)
        for name, tag, fields in EXTRAS
    ),
]


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled_equals_eager(config: QuantConfig, backend: str, forwards: int) -> None:
    layer = conv(config, (8, 8), padding=1)
    reference = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)  # fused kernels round otherwise
    for step in range(forwards):
        if step == 2:  # where a new epoch notices that the warm-up is over
            layer.train()
            reference.train()
        x = image(2, 8, 5, 5) + step
        y, gx = backward(compiled, x)
        expected_y, expected_gx = backward(reference, x)
        close(y, expected_y)
        close(gx, expected_gx)
    for mine, other in zip(layer.state_dict().values(), reference.state_dict().values(), strict=True):
        close(mine, other)
    for mine, other in zip(layer.parameters(), reference.parameters(), strict=True):
        close(mine.grad, other.grad)


@over(LAYERS)
def test_compiles_into_one_graph(case: Case, fresh_compiler: None) -> None:
    compiled_equals_eager(layer_config(case), "aot_eager", forwards=3 if case.config.stable else 1)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@over([*one_of_each_method(), *LAYERS[-3:]])
def test_generated_kernels_compute_the_same(
    case: Case, fresh_compiler: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In two shapes, of which the second needs no graph of its own."""
    made, calls = torch.compile(Quantizer._compute, fullgraph=True, dynamic=True, backend="aot_eager"), 0

    def counted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        return made(*arguments)

    monkeypatch.setattr(frame, "generated", lambda _: counted)
    layer = conv(layer_config(case), (8, 8), padding=1)
    reference = copy.deepcopy(layer)
    for _, quantizer in layer.quantizers():
        quantizer.generated = True
    for step, size in enumerate((5, 7)):
        x = image(2, 8, size, size) + step
        for found, expected in zip(backward(layer, x), backward(reference, x), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert calls == 2
    torch.testing.assert_close(layer.state_dict(), reference.state_dict())
    for mine, other in zip(layer.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-5)


# Each class of quantizers is compiled above; here three kinds are together: with a blend, with a table, with signs.
BLOCKS = {
    "dorefa,lsq,proxquant": "--fm_bit 2 --wt_bit 2 --ot_bit 4 --wt_grid midtread",
    "lq": "--fm_bit 2 --wt_bit 2 --ot_bit 2 --wt_adaptive mean-var",
    "xnor,gamma": "--fm_grad_type Triangle --fm_custom channel",
}


@pytest.mark.parametrize("words", BLOCKS)
def test_a_residual_block_compiles_into_one_graph(words: str, fresh_compiler: None) -> None:
    """With inputs, weights and outputs quantized, a stride and a shortcut of its own."""
    enable = " ".join(f"--{tag}_enable" for tag in SHAPES)
    line = f"--model resnet20 --width_alpha 0.125 --keyword cifar10,origin,cbsa,fix,{words} {enable} {BLOCKS[words]}"
    torch.manual_seed(0)
    block = build.build_network(read(line.split()).model).get_submodule("layer2.0")
    reference = copy.deepcopy(block)
    # The graph's own backward pass is that of each quantizer, above; that of a whole block is slow to make.
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    x = image(2, 8, 8, 8)
    for found, expected in zip(backward(compiled, x), backward(reference, x), strict=True):
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(block.state_dict(), reference.state_dict())


def test_a_method_may_ask_its_parent_about_padding(fresh_compiler: None) -> None:
    """In a compiled graph too the answer is the parent's."""

    class Asking(PACT):
        def zero_to_zero(self) -> bool:
            return super().zero_to_zero()

    config = QuantizerConfig(tag="fm", enable=True, method="pact", levels=4, half_range=False)
    layer = conv(QuantConfig(fm=config), (8, 8), padding=1)
    assert isinstance(layer.quant_activation, PACT)
    layer.quant_activation.__class__ = Asking
    x = image(2, 8, 5, 5)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning:torch", "ignore:torch.searchsorted.*non-contiguous")
@over(
    [
        case
        for case in LAYERS
        if case.config.proxquant_step or case.config.closed_form or case.config.custom_update
    ]
)
def test_compiles_with_the_default_backend(case: Case, fresh_compiler: None) -> None:
    compiled_equals_eager(layer_config(case), "inductor", forwards=3)


def test_fake_tensors_show_a_host_synchronisation() -> None:
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        torch.rand(1).item()


@over([*LAYERS, *(case.with_fields(stable=1, gamma=True) for case in one_of_each_class())])
def test_forward_and_backward_never_wait_for_values(case: Case) -> None:
    """Fake tensors have no values: whatever reads one raises."""
    with FakeTensorMode():
        layer = conv(layer_config(case), (8, 8), padding=1)
        for mode in (True, False):
            y = layer.train(mode)(torch.randn(2, 8, 5, 5, requires_grad=True))
            assert tuple(y.shape) == (2, 8, 5, 5)
            y.sum().backward()
