"""State dicts in every form, and loading them: what fits, what is left out, what is an error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from tests.utils.checkpoint.helpers import message
from utils.checkpoint.weights import LoadReport, load_weights, state_dict_of
from utils.errors import UserError


def nothing(name: str) -> bool:
    """No name may be missing."""
    return False


# --- state dicts -----------------------------------------------------------------------------


KEYS = ["state_dict", "model", "model_state_dict", "net", "network", "params", "weights", "ema"]


@pytest.mark.parametrize("key", [None, *KEYS])
@pytest.mark.parametrize(
    "prefix", ["", "module.", "module.module.", "_orig_mod.", "module._orig_mod.module."]
)
def test_state_dict_of_accepts_every_form(key: str | None, prefix: str) -> None:
    """Bare, under any usual key, with or without the prefixes of wrappers."""
    weights = {f"{prefix}a.weight": torch.ones(2), f"{prefix}a.module.bias": torch.zeros(3)}
    state = state_dict_of(weights if key is None else {"epoch": 1, key: weights})
    assert list(state) == ["a.weight", "a.module.bias"]
    assert state["a.weight"] is weights[f"{prefix}a.weight"]


def test_a_module_that_is_called_model_is_no_wrapper() -> None:
    """Only a dict under the key counts."""
    assert list(state_dict_of({"model": torch.ones(1)})) == ["model"]


@pytest.mark.parametrize(
    ("payload", "text"),
    [
        ({}, "holds no weights"),
        ({"state_dict": {}}, "holds no weights"),
        ({"epoch": 3, "nets": {}}, "its keys: epoch, nets"),
        ({"epoch": 3, "net": {}}, "holds no weights"),
        ({"state_dict": {"w": torch.ones(1), "n": [3]}}, "the entry 'n' under state_dict is not a dense"),
        ({"w": torch.ones(1), "optimizer": {}}, "its keys: w, optimizer"),
        ({"epoch": 3, "name": "x"}, "its keys: epoch, name"),
        (
            {"epoch": 3, "generator": {"w": torch.ones(1)}},
            "has tensors in generator, which is no usual key of weights; save the network's alone: "
            "torch.save({'state_dict': checkpoint['generator']}, FILE)",
        ),
        ({"net": {"n": "x"}}, "holds no weights"),
        ({"model": {1: torch.ones(1)}}, "the entry 1 under model"),
        ({"model": {"w": torch.ones(2).to_sparse()}}, "the entry 'w' under model is not a dense real"),
        ({"model": {"w": torch.ones(2, dtype=torch.complex64)}}, "not a dense real tensor"),
        ({"w": torch.ones(1), "module.w": torch.ones(1)}, "has both 'w' and 'module.w'"),
    ],
)
def test_what_is_no_state_dict(payload: dict[str, Any], text: str) -> None:
    """One line that says what is wrong, with the source."""
    with pytest.raises(UserError) as error:
        state_dict_of(payload, source="some.pth")
    assert text in message(error) and "some.pth" in message(error)


def test_weights_are_preferred_to_averages_and_settings() -> None:
    """Keys without tensors are passed over; averages are taken only where nothing else is."""
    weights, other = {"w": torch.ones(1)}, {"w": torch.zeros(1)}
    assert state_dict_of({"ema": other, "params": {"lr": 1}, "net": weights})["w"].item() == 1
    assert state_dict_of({"params": {"lr": 1}, "ema": other})["w"].item() == 0


@pytest.mark.parametrize("inner", ["module", "state_dict", "model"])
def test_weights_under_two_keys(inner: str) -> None:
    """The outer one may have settings beside them, and the file a key without tensors."""
    payload = {"params": {"lr": 1}, "ema": {"decay": 0.9, inner: {"module.w": torch.ones(1), "n": "x"}}}
    assert list(state_dict_of(payload)) == ["w"]


def test_numbers_and_text_beside_the_tensors() -> None:
    """Text is no weight; a number is one where the network has its name."""
    entries = {"w": torch.ones(1), "steps": 3, "epoch": 7, "version": "1.0", "none": None}
    for payload in (entries, {"net": entries}):
        state = state_dict_of(payload, names=("w", "steps"))
        assert list(state) == ["w", "steps"] and state["steps"].tolist() == 3
    assert list(state_dict_of(entries)) == ["w"]
    assert list(state_dict_of({"net": entries})) == ["w", "steps", "epoch"]


@pytest.mark.parametrize(
    ("file", "loaded"),
    [
        (["model.a.w", "model.b"], ["a.w", "b"]),
        (["model._orig_mod.a.w", "model._orig_mod.b"], ["a.w", "b"]),
        (["net.encoder.a.w", "net.encoder.b"], ["a.w", "b"]),
        (["student.a.w", "student.b", "teacher.a.w", "teacher.b"], ["a.w", "b", "teacher.a.w", "teacher.b"]),
        (["a.w", "model.b"], ["a.w", "model.b"]),  # a name is the network's: no prefix is common
        (["model.x.y", "model.z"], ["model.x.y", "model.z"]),
        (["l1.b", "l2.c.w", "l3.w", "l4.w", "l5.w"], ["l1.b", "l2.c.w", "l3.w", "l4.w", "l5.w"]),
        (["model.b", "b.x", "model.b.x"], ["b", "b.x", "model.b.x"]),  # two would become one
    ],
)
def test_a_prefix_before_the_networks_names(file: list[str], loaded: list[str]) -> None:
    """That of a program which keeps the network as a part of another module."""
    payload = {"state_dict": {name: torch.ones(1) for name in file}}
    found = list(state_dict_of(payload, names=("a.w", "b")))
    assert found == (file if len(set(loaded)) < len(file) or "b.x" in loaded else loaded)
    assert list(state_dict_of(payload)) == [name.replace("_orig_mod.", "") for name in file]


# --- loading ---------------------------------------------------------------------------------


class QuantConv(nn.Conv2d):
    """A convolution with the state of a quantizer."""

    level_num: Tensor

    def __init__(self) -> None:
        """2 channels in, 4 out."""
        super().__init__(2, 4, 3)
        self.clip_val = nn.Parameter(torch.ones(4, 1, 1, 1))
        self.register_buffer("level_num", torch.tensor([4]))


class Net(nn.Module):
    """A convolution, with a quantizer or without, a norm and a linear layer."""

    def __init__(self, classes: int = 3, quantized: bool = True) -> None:
        """11 entries, 9 without the quantizer."""
        super().__init__()
        self.conv = QuantConv() if quantized else nn.Conv2d(2, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, classes)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all the state."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model: nn.Module, state: dict[str, Tensor]) -> bool:
    """Whether the model still has exactly this state."""
    return all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_state_loads_exactly() -> None:
    """Every value arrives, in place: parameters stay the objects an optimizer knows."""
    source, target = Net(), Net()
    nn.init.constant_(source.bn.weight, 0.25)
    weight = target.conv.weight
    report = load_weights(target, source.state_dict(), allow_missing=nothing, source="a.pth")
    assert report == LoadReport(loaded=tuple(source.state_dict()))
    assert report.summary() == "11 loaded"
    assert same(target, source.state_dict())
    assert target.conv.weight is weight and weight.requires_grad


def test_quantizers_may_start_from_full_precision() -> None:
    """Names that allow_missing accepts keep the model's values."""
    target = Net()
    target.state_dict()["conv.clip_val"].fill_(7.0)
    state = Net(quantized=False).state_dict()
    report = load_weights(target, state, allow_missing=lambda name: name.startswith("conv."), source="a.pth")
    assert report.missing == ("conv.clip_val", "conv.level_num")
    assert report.summary() == "9 loaded, 2 missing (conv.clip_val, conv.level_num)"
    assert torch.equal(target.state_dict()["conv.clip_val"], torch.full((4, 1, 1, 1), 7.0))


@pytest.mark.parametrize(
    ("source", "target", "parts"),
    [
        (Net(quantized=False), Net(), ["2 missing (conv.clip_val [4, 1, 1, 1], conv.level_num [1])"]),
        (Net(), Net(quantized=False), ["2 unused (conv.clip_val [4, 1, 1, 1], conv.level_num [1])"]),
        (
            Net(classes=10),
            Net(),
            ["2 of another shape (fc.weight: [10, 4] in the file, [3, 4] in the network, fc.bias: [10] in"],
        ),
        (nn.Linear(4, 3), Net(), ["10 missing (", ", ...); 2 unused (weight [3, 4], bias [3])"]),
    ],
)
def test_what_does_not_fit_is_an_error_and_copies_nothing(
    source: nn.Module, target: nn.Module, parts: list[str]
) -> None:
    """Names, shapes and advice in one line; the model keeps every value, also of the names that fit."""
    before = snapshot(target)
    with pytest.raises(UserError) as error:
        load_weights(target, source.state_dict(), allow_missing=nothing, source="a.pth")
    text = message(error)
    assert text.startswith("a.pth does not fit the network: ")
    for part in [*parts, "--model, --width_alpha, --keyword"]:
        assert part in text
    assert "--unresume_scope" not in text  # of a teacher or a resumed run
    assert same(target, before)


def test_counters_of_batches_are_not_needed() -> None:
    """Norms with fixed statistics take those of batch norms; a counter without such a norm is still an error."""
    source, target = nn.Sequential(nn.BatchNorm2d(3)), nn.Sequential(FrozenBatchNorm2d(3))
    nn.init.uniform_(source[0].running_mean), nn.init.uniform_(source[0].running_var)
    report = load_weights(target, source.state_dict(), allow_missing=nothing, source="a.pth")
    assert (len(report.loaded), report.obsolete, report.unused) == (4, ("0.num_batches_tracked",), ())
    assert torch.equal(target[0].running_var, source[0].running_var)
    bare = FrozenBatchNorm2d(3)  # without a name of its own
    assert load_weights(bare, source[0].state_dict(), allow_missing=nothing, source="a.pth").obsolete == (
        "num_batches_tracked",
    )
    with pytest.raises(UserError, match=r"1 unused \(1.num_batches_tracked"):
        load_weights(
            target, source.state_dict() | {"1.num_batches_tracked": torch.tensor(3)}, allow_missing=nothing,
            source="a.pth",
        )  # fmt: skip


def test_at_most_five_names_are_listed() -> None:
    """The rest is counted."""
    with pytest.raises(UserError) as error:
        load_weights(Net(), nn.Conv2d(1, 1, 1).state_dict(), allow_missing=nothing, source="a.pth")
    assert "10 missing (" in message(error)
    assert message(error).count("conv.") + message(error).count("bn.") == 5


def test_scope_skips_on_both_sides() -> None:
    """Another class count and another quantizer, both left out on request and reported."""
    source, target = Net(classes=10, quantized=False), Net()
    before = snapshot(target)
    scope = ("fc", "*.clip_val", "conv.level_num")
    report = load_weights(target, source.state_dict(), allow_missing=nothing, scope=scope, source="a.pth")
    assert report.skipped == ("conv.clip_val", "conv.level_num", "fc.weight", "fc.bias")
    assert report.missing == report.unused == report.mismatched == ()
    assert torch.equal(target.fc.weight, before["fc.weight"])
    assert torch.equal(target.conv.weight, source.conv.weight)


@pytest.mark.parametrize(
    ("scope", "text"),
    [
        ("conv.clip_vall", "did you mean conv.clip_val"),
        ("fcc", "did you mean fc"),
        ("zzz", "no name in a.pth"),
        ("clip", "write '*clip*' for the 1 that contain it (conv.clip_val)"),
        ("f", "write '*f*' for the 2 that contain it (fc.weight, fc.bias)"),
        ("weight", "write '*weight*' for the 3"),
    ],
)
def test_a_scope_that_matches_nothing_is_an_error(scope: str, text: str) -> None:
    """A misspelt name would silently load what was to be left out."""
    target = Net()
    before = snapshot(target)
    with pytest.raises(UserError) as error:
        load_weights(target, Net().state_dict(), allow_missing=nothing, scope=("fc", scope), source="a.pth")
    assert text in message(error) and f"--unresume_scope '{scope}'" in message(error)
    assert same(target, before)


@pytest.mark.parametrize(
    ("classes", "kwargs", "text"),
    [
        (10, {}, "; --unresume_scope fc leaves these out, to train them anew"),
        (10, {"whole": True}, "; --unresume_scope NAME skips"),
        (3, {}, "; --unresume_scope NAME skips"),
    ],
)
def test_the_advice_names_the_layers_of_another_shape(
    classes: int, kwargs: dict[str, bool], text: str
) -> None:
    state = Net(classes=classes, quantized=classes != 3).state_dict()
    with pytest.raises(UserError) as error:
        load_weights(Net(), state, allow_missing=nothing, scope=(), source="a.pth", **kwargs)
    assert text in message(error)


@pytest.mark.parametrize(
    ("scope", "skipped"),
    [
        ("fc", ["fc.weight", "fc.bias"]),
        ("fc.*", ["fc.weight", "fc.bias"]),
        ("conv1.weight", ["conv1.weight"]),
        ("*conv1.weight", ["conv1.weight", "layer1.conv1.weight"]),
        ("layer1", ["layer1.conv1.weight", "layer1.fc.weight", "layer1.fc.bias", "layer1.fc10.weight"]),
        ("layer?.fc", ["layer1.fc.weight", "layer1.fc.bias"]),
        ("*.fc", ["layer1.fc.weight", "layer1.fc.bias"]),
    ],
)
def test_a_scope_is_a_whole_name_or_a_pattern(scope: str, skipped: list[str]) -> None:
    """Not a part of a name: gates called `fc` inside blocks and other layers' `conv1.weight` load."""
    model = nn.Module()
    model.conv1, model.fc = nn.Conv2d(1, 1, 1, bias=False), nn.Linear(1, 2)
    model.layer1 = nn.Module()
    model.layer1.conv1, model.layer1.fc = nn.Conv2d(1, 1, 1, bias=False), nn.Linear(1, 1)
    model.layer1.fc10 = nn.Linear(1, 1, bias=False)
    report = load_weights(model, snapshot(model), allow_missing=nothing, scope=(scope,), source="a.pth")
    assert list(report.skipped) == skipped
    assert f"{len(skipped)} skipped ({', '.join(skipped)})" in report.summary()


def test_a_whole_network_skips_nothing_of_its_own() -> None:
    """An evaluation with a random last layer would count for nothing; what only the file has may be left out."""
    state = {**Net().state_dict(), "aux.weight": torch.ones(1)}
    target = Net()
    before = snapshot(target)
    with pytest.raises(UserError) as error:
        load_weights(target, state, allow_missing=nothing, scope=("aux", "fc"), whole=True, source="a.pth")
    assert "leaves out fc.weight, fc.bias; write --unresume_scope none" in message(error)
    assert same(target, before)
    report = load_weights(target, state, allow_missing=nothing, scope=("aux",), whole=True, source="a.pth")
    assert report.skipped == ("aux.weight",) and len(report.loaded) == 11


def test_loading_nothing_is_an_error() -> None:
    """All skipped: hardly what was meant."""
    state = nn.Linear(1, 1).state_dict()
    with pytest.raises(
        UserError, match=r"nothing of a\.pth would be loaded: 0 loaded, 2 skipped \(weight, bias"
    ):
        load_weights(nn.Linear(1, 1), state, allow_missing=nothing, scope=("weight", "bias"), source="a.pth")


def test_published_files_load_by_value() -> None:
    """Counters as float parameters, one-element tensors of another rank, tables that are not needed."""

    class Quantizer(nn.Module):
        obsolete = frozenset({"auxil", "codec_vector", "codec_index", "thrs_multiplier"})
        level_num: Tensor
        steps: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.clip_val = nn.Parameter(torch.zeros(1, 1, 1, 1))
            self.basis = nn.Parameter(torch.zeros(2, 1))
            self.register_buffer("level_num", torch.tensor([2]))
            self.register_buffer("steps", torch.tensor(0))

    published = {
        "clip_val": torch.tensor([2.5]),
        "basis": torch.tensor([[0.5], [1.0]], dtype=torch.float64),
        "level_num": nn.Parameter(torch.tensor(16.0)),
        "steps": torch.tensor([[3.0]]),
        "auxil": torch.zeros(7),
        "codec_vector": torch.zeros(4, 2),
        "codec_index": torch.zeros(4),
        "deep.er.thrs_multiplier": torch.zeros(3, 4),
    }
    model = Quantizer()
    report = load_weights(model, published, allow_missing=nothing, source="a.pth")
    assert model.clip_val.tolist() == [[[[2.5]]]]
    assert model.basis.tolist() == [[0.5], [1.0]] and model.basis.dtype == torch.float32
    assert model.level_num.tolist() == [16] and model.level_num.dtype == torch.int64
    assert model.steps.item() == 3
    assert report.obsolete == ("auxil", "codec_vector", "codec_index", "deep.er.thrs_multiplier")
    assert report.summary().startswith("4 loaded, 4 obsolete (auxil, ")


def test_a_table_that_the_model_has_is_loaded() -> None:
    """Obsolete names are only passed over where nothing is called so."""
    model = nn.Module()
    model.register_buffer("auxil", torch.zeros(2))
    report = load_weights(model, {"auxil": torch.ones(2)}, allow_missing=nothing, source="a.pth")
    assert report.loaded == ("auxil",) and report.obsolete == ()
    assert model.state_dict()["auxil"].tolist() == [1, 1]


def test_equal_element_counts_are_not_enough() -> None:
    """Only one-element tensors change their rank."""
    model = nn.Module()
    model.register_buffer("x", torch.zeros(2, 1))
    with pytest.raises(UserError, match=r"x: \[2\] in the file, \[2, 1\] in the network"):
        load_weights(model, {"x": torch.ones(2)}, allow_missing=nothing, source="a.pth")
