"""Computing quantized inputs again in the backward pass (`--recompute`)."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

from benchmarks.speed import saved_bytes
from model.layers.convolution import QuantConv2d
from model.layers.quantized import QuantLinear, quantizers
from model.quantizers import frame
from model.quantizers.frame import Quantizer
from model.training.recompute import recompute_inputs
from tests.model.layers.convolution import conv, image
from tests.model.quantizers.cases import Case, cases, over
from utils.config.schema import QuantConfig, QuantizerConfig
from utils.errors import UserError

INPUTS = cases(tags=("fm",), groups=(None, 2))
EXTRAS = [
    next(case for case in INPUTS if case.name == name).with_fields(**fields)
    for name, fields in (
        ("lsq", {"stable": 2}),
        ("lsq", {"proxquant_step": 2}),
        ("pact", {"gamma": True, "adaptive": "var-mean", "adaptive_restore": True}),
        ("dorefa", {"grad_type": "STE-scale"}),
    )
]


def network(case: Case, **options: Any) -> nn.Sequential:
    """A convolution and a linear layer behind ReLUs, whose outputs are kept anyway."""
    wt = QuantizerConfig(tag="wt", enable=True, method="lsq", levels=4)
    config = QuantConfig(fm=case.config, wt=wt)
    linear = QuantLinear(8, 8)
    linear.build_quantizers(config, "fc")
    return nn.Sequential(
        nn.ReLU(),
        conv(config, (8, 8), padding=1, **options),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        linear,
    )


def passes(model: nn.Module, dtype: torch.dtype | None, count: int = 3) -> list[Tensor]:
    """Outputs and gradients to the input of passes whose gradients accumulate."""
    found = []
    for step in range(count):
        x = image(2, 8, 5, 5).add(step).requires_grad_()
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            y = model(x)
        y.float().square().sum().backward()
        assert x.grad is not None
        found += [y.detach(), x.grad]
    return found


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "autocast"])
@over([*INPUTS, *EXTRAS])
def test_bits_stay(case: Case, dtype: torch.dtype | None) -> None:
    """Outputs, gradients that accumulate and state, also where nothing can be computed again."""
    plain = network(case)
    other = copy.deepcopy(plain)
    for layer in other:
        if isinstance(layer, QuantConv2d | QuantLinear):
            layer.recompute = True
    for one, two in zip(passes(plain, dtype), passes(other, dtype), strict=True):
        assert torch.equal(one, two)
    for one, two in zip(plain.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(one, two)
    for one, two in zip(plain.parameters(), other.parameters(), strict=True):
        assert one.grad is not None and two.grad is not None and torch.equal(one.grad, two.grad)


@pytest.mark.parametrize("padding_after_quant", [False, True])
@over(
    [case for case in INPUTS if case.name in ("lsq", "pact", "dorefa", "xnor") and case.quant_group is None]
)
def test_no_quantized_input_is_kept(case: Case, padding_after_quant: bool) -> None:
    """What is kept beside full precision's is less than an input."""
    model = network(case, padding_after_quant=padding_after_quant)
    x = image(4, 8, 20, 20).requires_grad_()
    parameters = {value.untyped_storage().data_ptr() for value in model.parameters()}

    def kept() -> int:
        with saved_bytes(parameters) as count:
            y = model(x)
        y.sum().backward()
        return count()

    before = kept()
    recompute_inputs(model)
    full = nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), *model[2:5], nn.Linear(8, 8))
    now, size = kept(), x.numel() * 4
    assert before >= now + size
    model, parameters = full, {value.untyped_storage().data_ptr() for value in full.parameters()}
    assert now < kept() + size / 4


def relu_afterwards(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x).sum() + torch.relu_(x).sum()


def added_to(layer: nn.Module, x: Tensor) -> Tensor:
    x += layer(x)
    return x.relu_().sum()


@pytest.mark.parametrize("use", [relu_afterwards, added_to])
@pytest.mark.parametrize("name", ["xnor", "dorefa"])
@pytest.mark.parametrize("index", [1, 5], ids=["convolution", "linear"])
def test_an_input_that_changes_later_is_one_line(
    name: str, use: Callable[[nn.Module, Tensor], Tensor], index: int
) -> None:
    layer = network(next(case for case in INPUTS if case.name == name))[index]
    layer.recompute = True
    loss = use(layer, image(*((2, 8, 5, 5) if index == 1 else (2, 8))).requires_grad_() * 1)
    with pytest.raises(
        UserError, match=rf"--recompute: {layer.quant_activation.site.name}: .*in place"
    ) as error:
        loss.backward()
    assert "\n" not in str(error.value)


def test_an_output_may_change_and_a_graph_be_used_twice() -> None:
    layer = network(next(case for case in INPUTS if case.name == "xnor"))[1]
    gradients = []
    for layer.recompute in (False, True):
        x = image(2, 8, 5, 5).requires_grad_()
        before = x * 1
        before.relu_()  # before it is read
        loss = layer(before).mul_(2).relu_().sum()
        gradients += torch.autograd.grad(loss, x, retain_graph=True)
        gradients += torch.autograd.grad(loss, x)
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


def test_evaluation_keeps_nothing_either_way() -> None:
    model = network(EXTRAS[0])
    recompute_inputs(model)
    plain, x = copy.deepcopy(model), image(2, 8, 5, 5)
    plain[1].recompute = plain[5].recompute = False
    assert torch.equal(model.eval()(x), plain.eval()(x))


@pytest.mark.parametrize(
    "method, message", [("lq", "levels of lq on inputs"), ("", "no layer quantizes its input")]
)
def test_what_cannot_be_computed_again_is_an_error(method: str, message: str) -> None:
    fm = QuantizerConfig(
        tag="fm", enable=method != "", method=method or "lsq", levels=4, half_range=method == ""
    )
    with pytest.raises(UserError, match=f"--recompute: .*{message}.*leave --recompute out"):
        recompute_inputs(
            nn.Sequential(conv(QuantConfig(fm=fm, wt=dataclasses.replace(fm, tag="wt", enable=True))))
        )


def test_a_layer_that_cannot_keeps_its_input_beside_one_that_can() -> None:
    parts = [next(case for case in INPUTS if case.name == name) for name in ("lq", "lsq")]
    model = nn.Sequential(*(network(case)[1] for case in parts))
    recompute_inputs(model)
    assert [quantizer.repeats() for name, quantizer in quantizers(model) if "activation" in name] == [
        False,
        True,
    ]
    passes(model, None)


def test_in_distributed_training(tmp_path: Path) -> None:
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        plain = network(next(case for case in INPUTS if case.name == "lsq"))
        other = copy.deepcopy(plain)
        recompute_inputs(other)
        found = [passes(nn.parallel.DistributedDataParallel(model), None) for model in (plain, other)]
    finally:
        distributed.destroy_process_group()
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)
    for one, two in zip(plain.parameters(), other.parameters(), strict=True):
        assert one.grad is not None and two.grad is not None and torch.equal(one.grad, two.grad)


def test_with_generated_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    made = torch.compile(Quantizer._compute, fullgraph=True, dynamic=True, backend="aot_eager")
    monkeypatch.setattr(frame, "generated", lambda compute: made)
    plain = network(next(case for case in INPUTS if case.name == "pact"))[1]
    for _, quantizer in quantizers(plain):
        quantizer.generated = True
    other = copy.deepcopy(plain)
    other.recompute = True
    for one, two in zip(passes(plain, None, 2), passes(other, None, 2), strict=True):
        assert torch.equal(one, two)
