"""That the quantized weight of an evaluation is kept, and never a stale one."""

from __future__ import annotations

import copy
import dataclasses
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from model.layers.convolution import QuantConv2d
from model.quantizers.frame import Quantizer
from model.quantizers.lsq import LSQ
from model.quantizers.site import LayerSite
from tests.model.layers.convolution import conv, image
from tests.model.quantizers.cases import Case, cases, make, over, tensor
from utils.config.schema import QuantConfig, QuantizerConfig
from utils.step.average import WeightAverage


def layer_of(**fields: Any) -> QuantConv2d:
    settings = {"method": "lsq", "levels": 4, "half_range": False, **fields}
    layer = conv(QuantConfig(wt=QuantizerConfig(tag="wt", enable=True, **settings)))
    nn.init.normal_(layer.weight)  # over all levels
    return layer.eval()


def quantizer_of(layer: QuantConv2d) -> Quantizer:
    assert isinstance(layer.quant_weight, Quantizer)
    return layer.quant_weight


def evaluated(layer: QuantConv2d) -> Tensor:
    with torch.no_grad():
        return quantizer_of(layer)(layer.weight)


def computed(layer: QuantConv2d) -> Tensor:
    """With gradients nothing is kept."""
    return quantizer_of(layer)(layer.weight).detach()


class Counter:
    """How often a quantizer has computed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        compute = Quantizer._compute

        def counted(*arguments: Any) -> Tensor:
            self.count += 1
            return compute(*arguments)

        monkeypatch.setattr(Quantizer, "_compute", counted)

    def during(self, call: Callable[[], object]) -> int:
        before = self.count
        call()
        return self.count - before


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Counter:
    return Counter(monkeypatch)


@over(cases(tags=("wt",)))
def test_a_weight_is_quantized_once(case: Case, counter: Counter) -> None:
    """Its second pass in evaluation computes nothing, and training computes as before."""
    quantizer, x = make(case), nn.Parameter(tensor(case))
    for _ in range(2):  # an epoch of training moves running statistics
        quantizer.train()(x)
        quantizer.eval()
        with torch.inference_mode():
            first = quantizer(x)
        with torch.no_grad():
            assert counter.during(lambda: quantizer(x)) == 0
            now = quantizer(x)
        assert torch.equal(first, quantizer(x)) and torch.equal(now, first) and now.stride() == first.stride()
    quantizer.train()
    with torch.no_grad():
        assert counter.during(lambda: quantizer(x)) == 1


def average(layer: QuantConv2d) -> None:
    found = WeightAverage(0.5)
    found.after_step({name: value + 1 for name, value in layer.state_dict().items()})
    with found.applied(layer):
        assert torch.equal(evaluated(layer), computed(layer))


def numpy_values(layer: QuantConv2d) -> None:
    layer.weight.detach().numpy()[...] *= np.float32(0.5)


def one_optimizer_step(layer: QuantConv2d) -> None:
    layer(image(1, 4, 5, 5)).sum().backward()
    torch.optim.SGD(layer.parameters(), lr=1.0, foreach=True).step()


def half_range(layer: QuantConv2d) -> None:
    quantizer = quantizer_of(layer)
    quantizer.config = dataclasses.replace(quantizer.config, half_range=True)


def one_pass(layer: QuantConv2d) -> None:
    quantizer_of(layer).train()(layer.weight)
    layer.eval()


CHANGES: dict[str, Callable[[QuantConv2d], object]] = {
    "load_state_dict": lambda layer: layer.load_state_dict(
        {name: value * 2 for name, value in layer.state_dict().items()}
    ),
    "copy_": lambda layer: layer.weight.detach().copy_(layer.weight * 0.5),
    "data in place": lambda layer: layer.weight.data.mul_(0.5),
    "data replaced": lambda layer: setattr(layer.weight, "data", layer.weight.data * 0.5),
    "parameter replaced": lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight * 0.5)),
    "numpy": numpy_values,
    "clip value": lambda layer: quantizer_of(layer).get_parameter("clip_val").data.mul_(0.5),
    "foreach": lambda layer: torch._foreach_mul_([p.detach() for p in layer.parameters()], 0.5),
    "average": average,
    "optimizer": one_optimizer_step,
    "levels": lambda layer: quantizer_of(layer).set_levels(8),
    "half range": half_range,
    "switched off": lambda layer: setattr(quantizer_of(layer), "enabled", False),
    "result in place": lambda layer: evaluated(layer).mul_(3),
    "result in NumPy": lambda layer: evaluated(layer).numpy().fill(0),
    "result's data": lambda layer: evaluated(layer).data.zero_(),
    "dtype": lambda layer: layer.to(torch.float64),
    "memory format": lambda layer: layer.to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(change: str) -> None:
    layer = layer_of(gamma=True)
    evaluated(layer)
    CHANGES[change](layer)
    now = evaluated(layer)
    assert torch.equal(now, computed(layer)) and now.dtype == layer.weight.dtype
    assert now.stride() == layer.weight.stride()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_callers_share_no_result(mode: Callable[[], Any]) -> None:
    layer = layer_of()
    with mode():
        first, second, third = (quantizer_of(layer)(layer.weight) for _ in range(3))
        expected = third.clone()
        first.zero_()
        second.numpy().fill(7)
        assert torch.equal(third, expected) and torch.equal(quantizer_of(layer)(layer.weight), expected)


class Table(LSQ):
    """Two values from attributes of any type."""

    pure = True

    def __init__(self, config: QuantizerConfig, site: LayerSite) -> None:
        super().__init__(config, site)
        self.table: Any = (-1.0, 1.0)
        self._scale: Any = (1.0,)

    def quantize(self, x: Tensor) -> Tensor:
        inner = self._scale
        scale = inner.weight.detach() if isinstance(inner, nn.Linear) else float(inner[0])
        low, high = (float(value) for value in self.table)
        return torch.where(x > 0, high, low) * scale * self.config.extra.get("scale", (1.0,))[0]


def table(extra: dict[str, Any] | None = None) -> tuple[QuantConv2d, Table]:
    layer = layer_of()
    known = quantizer_of(layer)
    made = Table(dataclasses.replace(known.config, extra=extra or {}), known.site).eval()
    layer.quant_weight = made
    return layer, made


def test_plain_attributes_are_compared(counter: Counter) -> None:
    layer, quantizer = table({"scale": (2.0,)})
    assert evaluated(layer).max() == 2
    assert counter.during(lambda: evaluated(layer)) == 0
    quantizer._scale = (3.0,)
    assert evaluated(layer).max() == 6
    quantizer.table = (-1.0, 5.0)
    assert evaluated(layer).max() == 30
    for kind in (torch.tensor, np.array, list):  # from a plain value to one that is compared by element
        quantizer.table = kind([-1.0, 4.0])
        assert evaluated(layer).max() == 24
        quantizer.table = (-1.0, 5.0)
        assert evaluated(layer).max() == 30


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_a_change_within_an_attribute_is_seen(kind: Callable[[list[float]], Any]) -> None:
    """Where one can be changed, nothing is kept."""
    scale = [2.0]
    layer, quantizer = table({"scale": scale})
    assert evaluated(layer).max() == 2
    scale[0] = 3.0
    assert evaluated(layer).max() == 3
    for name, index in (("table", 1), ("_scale", 0)):
        layer, quantizer = table()
        values = kind([-1.0, 1.0] if name == "table" else [1.0])
        setattr(quantizer, name, values)
        assert evaluated(layer).max() == 1
        values[index] = 5.0
        assert evaluated(layer).max() == 5


def test_a_change_within_a_module_is_seen() -> None:
    layer, quantizer = table()
    inner = nn.Linear(1, 1)
    quantizer._scale = inner
    before = evaluated(layer)
    with torch.no_grad():
        inner.weight.mul_(2)
    assert torch.equal(evaluated(layer), before * 2)


def test_the_end_of_a_warm_up_is_seen() -> None:
    layer = layer_of(stable=1)
    assert torch.equal(evaluated(layer), layer.weight)
    quantizer_of(layer).iteration.add_(1)
    assert len(evaluated(layer)[0].unique()) <= 4


@pytest.mark.parametrize("method", ["lq", "fatnn"])
def test_running_statistics_are_seen(method: str) -> None:
    levels = {"lq": 4, "fatnn": 3}[method]
    layer = layer_of(method=method, levels=levels, closed_form=method == "fatnn")
    before = evaluated(layer)
    one_pass(layer)
    assert not torch.equal(evaluated(layer), before)
    assert torch.equal(evaluated(layer), computed(layer))


def pickled(layer: QuantConv2d) -> QuantConv2d:
    file = io.BytesIO()
    torch.save(layer, file)
    assert len(file.getvalue()) < 30_000  # not the kept one
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_keeps_its_own(copied: Callable[[QuantConv2d], QuantConv2d], counter: Counter) -> None:
    layer = layer_of()
    before = evaluated(layer)
    other = copied(layer)
    other.weight.data.mul_(0.5)
    assert torch.equal(evaluated(other), computed(other))
    assert not torch.equal(evaluated(other), before)
    assert counter.during(lambda: evaluated(layer)) == 0
    assert torch.equal(evaluated(layer), before)


@pytest.mark.parametrize("fields", [{}, {"stable": 2}, {"proxquant_step": 2}])
def test_a_module_pickled_by_an_earlier_version_works(fields: dict[str, Any]) -> None:
    layer = layer_of(**fields)
    expected = evaluated(layer)
    earlier = copy.deepcopy(layer)
    for name in ("kept", "calibrating", "blending"):
        delattr(quantizer_of(earlier), name)
    for copied in (copy.deepcopy, pickled):
        found = copied(earlier)
        assert torch.equal(evaluated(found), expected) and torch.equal(evaluated(found), expected)
        for again in (layer.train(), found.train()):
            again(image(1, 4, 5, 5)).sum().backward()
        assert torch.equal(evaluated(found.eval()), evaluated(layer.eval()))
        layer = layer_of(**fields)


def test_training_frees_it() -> None:
    layer = layer_of()
    evaluated(layer)
    layer.train()
    assert quantizer_of(layer).kept._result is None


def test_a_class_that_does_not_say_so_computes_each_time() -> None:
    """It may draw random numbers; a subclass of a method that is kept is another one."""

    class Noisy(LSQ):
        def quantize(self, x: Tensor) -> Tensor:
            return super().quantize(x) + torch.rand_like(x)

    layer = layer_of()
    known = quantizer_of(layer)
    layer.quant_weight = Noisy(known.config, known.site).eval()
    assert not torch.equal(evaluated(layer), evaluated(layer))


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:FutureWarning", "ignore::torch.jit.TracerWarning")
def test_what_traces_or_watches_sees_the_quantizer(counter: Counter) -> None:
    layer, x = layer_of(), image(1, 4, 5, 5)
    seen: list[Tensor] = []
    expected = layer(x).detach()
    with torch.no_grad():
        layer(x)
        exported = torch.export.export(layer, (x,)).module()
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        traced = torch.jit.trace(layer, x)
        layer.weight.mul_(0.5)
        for found in (exported, compiled, traced):
            if found is not exported:  # which has weights of its own
                assert torch.equal(found(x), layer(x))
        exported.load_state_dict(layer.state_dict())
        assert torch.equal(exported(x), layer(x)) and not torch.equal(layer(x), expected)
        quantizer_of(layer).register_forward_hook(lambda module, inputs, output: seen.append(output))
        layer(x)
        assert len(seen) == 1
        with FlopCounterMode(display=False):
            assert counter.during(lambda: evaluated(layer)) == 1
