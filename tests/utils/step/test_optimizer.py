"""Parameter groups and the optimizer."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from utils.config.schema import OptimConfig
from utils.errors import UserError
from utils.step.optimizer import (
    ParamGroup,
    build_optimizer,
    check_optimizer,
    depthwise_weights,
    groups_table,
    idle_entries,
    parameter_groups,
)

CONFIG = OptimConfig(lr=0.1, weight_decay=1e-3)


class Quant(nn.Module):
    """Parameters of the shapes that quantizers have."""

    def __init__(self) -> None:
        super().__init__()
        self.clip_val = nn.Parameter(torch.ones(1, 1, 1, 1))
        self.group_clip = nn.Parameter(torch.ones(4, 1, 1, 1))
        self.alpha = nn.Parameter(torch.ones(()))


class Net(nn.Module):
    """A small network with one of each kind of parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, bias=False)  # one input channel, yet not depth-wise
        self.norm = nn.BatchNorm2d(8)
        self.depth = nn.Conv2d(8, 8, 3, groups=8)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2)
        self.quant_activation = Quant()
        self.classifier = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images."""
        x = self.grouped(self.depth(self.norm(self.stem(x)))).mean((2, 3))
        quant = self.quant_activation
        return self.classifier(x * quant.clip_val.sum() * quant.group_clip.sum() * quant.alpha)


BIG = {"stem.weight", "grouped.weight", "classifier.weight"}
DEPTHWISE = {"depth.weight"}
QUANT = {"quant_activation.clip_val", "quant_activation.group_clip", "quant_activation.alpha"}
SMALL = QUANT | {"norm.weight", "norm.bias", "depth.bias", "grouped.bias", "classifier.bias"}


def groups_of(model: nn.Module, config: OptimConfig) -> list[ParamGroup]:
    return parameter_groups(model.named_parameters(), config, depthwise_weights(model))


def as_sets(groups: list[ParamGroup]) -> dict[tuple[float, float], set[str]]:
    """(base rate, weight decay) -> names; fails when two groups should have been one."""
    result: dict[tuple[float, float], set[str]] = {}
    for group in groups:
        result.setdefault((group.base_lr, group.weight_decay), set()).update(group.names)
    kinds = {(group.base_lr, group.weight_decay, group.custom_lr, group.decay) for group in groups}
    assert len(kinds) == len(groups)
    return result


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {(0.1, 1e-3): BIG, (0.1, 0.0): SMALL | DEPTHWISE}),
        ({"decay_small": True}, {(0.1, 1e-3): BIG | SMALL | DEPTHWISE}),
        ({"weight_decay": 0.0}, {(0.1, 0.0): BIG | SMALL | DEPTHWISE}),
        (  # custom_decay wins over the rule for small tensors ...
            {"custom_decay_list": ("clip",), "custom_decay": 0.5},
            {
                (0.1, 1e-3): BIG,
                (0.1, 0.5): {"quant_activation.clip_val", "quant_activation.group_clip"},
                (0.1, 0.0): SMALL - {"quant_activation.clip_val", "quant_activation.group_clip"} | DEPTHWISE,
            },
        ),
        (  # ... over the one for depth-wise kernels and over the default
            {"custom_decay_list": ("depth.weight", "stem"), "custom_decay": 0.5},
            {
                (0.1, 1e-3): BIG - {"stem.weight"},
                (0.1, 0.5): {"depth.weight", "stem.weight"},
                (0.1, 0.0): SMALL,
            },
        ),
        (
            {"custom_decay_list": ("stem",), "decay_small": True},
            {(0.1, 1e-3): (BIG | SMALL | DEPTHWISE) - {"stem.weight"}, (0.1, 0.0): {"stem.weight"}},
        ),
        (
            {"custom_lr_list": ("quant_",), "custom_lr": 0.01},
            {(0.1, 1e-3): BIG, (0.1, 0.0): SMALL - QUANT | DEPTHWISE, (0.01, 0.0): QUANT},
        ),
        (  # a custom rate equal to the default makes no group of its own
            {"custom_lr_list": ("quant_",), "custom_lr": 0.1},
            {(0.1, 1e-3): BIG, (0.1, 0.0): SMALL | DEPTHWISE},
        ),
        (
            {
                "custom_lr_list": ("classifier",),
                "custom_lr": 0.3,
                "custom_decay_list": ("classifier.bias", "alpha"),
                "custom_decay": 1e-3,
            },
            {
                (0.1, 1e-3): BIG - {"classifier.weight"} | {"quant_activation.alpha"},
                (0.3, 1e-3): {"classifier.weight", "classifier.bias"},
                (0.1, 0.0): SMALL - {"classifier.bias", "quant_activation.alpha"} | DEPTHWISE,
            },
        ),
    ],
)
def test_rules(changes: dict[str, object], expected: dict[tuple[float, float], set[str]]) -> None:
    model = Net()
    groups = groups_of(model, replace(CONFIG, **changes))
    assert as_sets(groups) == expected
    listed = [parameter for group in groups for parameter in group.parameters]
    assert len(listed) == len(set(listed))
    assert set(listed) == set(model.parameters())


def test_names_belong_to_their_parameters() -> None:
    model = Net()
    parameters = dict(model.named_parameters())
    for group in groups_of(model, CONFIG):
        for name, parameter in zip(group.names, group.parameters, strict=True):
            assert parameters[name] is parameter


def test_depthwise_needs_several_groups_of_one_channel() -> None:
    assert depthwise_weights(Net()) == {"depth.weight"}
    assert depthwise_weights(nn.Conv1d(4, 8, 3, groups=4)) == {"weight"}
    assert depthwise_weights(nn.Sequential(nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(1, 4, 1))) == set()


def test_frozen_parameters_are_left_out() -> None:
    model = Net()
    model.stem.weight.requires_grad_(False)
    names = {name for group in groups_of(model, CONFIG) for name in group.names}
    assert names == (BIG | SMALL | DEPTHWISE) - {"stem.weight"}
    with pytest.raises(UserError, match="no parameter's name contains 'stem'"):
        groups_of(model, replace(CONFIG, custom_decay_list=("stem",)))


def test_an_entry_may_name_state_that_no_optimizer_changes() -> None:
    model = Net()
    model.stem.weight.requires_grad_(False)
    model.register_buffer("basis", torch.ones(2))
    config = replace(CONFIG, custom_decay_list=("stem", "depth"), custom_lr_list=("basis",), custom_lr=1.0)
    _, groups = build_optimizer(model, config)
    assert {group.base_lr for group in groups} == {CONFIG.lr}
    warnings = idle_entries(model, config)
    assert [warning.split(" has")[0] for warning in warnings] == [
        "--custom_decay_list: stem", "--custom_lr_list: basis",
    ]  # fmt: skip
    with pytest.raises(UserError, match="no parameter's name contains 'basic'; close are basis"):
        build_optimizer(model, replace(config, custom_lr_list=("basic",)))


def test_shared_parameters_are_taken_once_under_any_name() -> None:
    model = nn.ModuleDict({"one": nn.Linear(4, 4, bias=False), "two": nn.Linear(4, 4, bias=False)})
    model["two"].weight = model["one"].weight
    _, groups = build_optimizer(model, replace(CONFIG, custom_lr_list=("two",), custom_lr=0.5))
    assert [(group.names, group.base_lr) for group in groups] == [(("one.weight",), 0.5)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"custom_decay_list": ("clipval",)}, "--custom_decay_list: .*'clipval'.*clip_val"),
        ({"custom_decay_list": ("stem", "zzz")}, "--custom_decay_list: .*'zzz'$"),
        (
            {"custom_lr_list": ("quant_activations",), "custom_lr": 1.0},
            "--custom_lr_list: .*quant_activation",
        ),
        ({"custom_decay_list": ("",)}, "--custom_decay_list has an empty entry"),
    ],
)
def test_an_entry_that_matches_nothing(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        groups_of(Net(), replace(CONFIG, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "LAMB"}, "--optimizer LAMB .* SGD, ADAM"),
        ({"lr": -1.0}, "--lr -1.0"),
        ({"lr": float("nan")}, "--lr nan"),
        ({"weight_decay": -1e-4}, "--weight_decay -0.0001"),
        ({"custom_decay": -1.0, "custom_decay_list": ("stem",)}, "--custom_decay -1.0"),
        ({"momentum": 1.0}, "--momentum 1.0"),
        ({"momentum": -0.1}, "--momentum -0.1"),
        ({"nesterov": True, "momentum": 0.0}, "--nesterov needs a --momentum"),
        ({"grad_clip": 0.0}, "--grad_clip 0.0"),
        ({"iter_size": 0}, "--iter-size 0"),
        ({"custom_lr_list": ("stem",)}, "--custom_lr_list needs a positive --custom_lr"),
        ({"custom_lr_list": ("stem",), "custom_lr": -0.1}, "positive --custom_lr, not -0.1"),
    ],
)
def test_check_refuses(changes: dict[str, object], message: str) -> None:
    config = replace(CONFIG, **changes)
    with pytest.raises(UserError, match=message):
        check_optimizer(config)
    with pytest.raises(UserError, match=message):
        build_optimizer(Net(), config)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("SGD", torch.optim.SGD),
        ("sgd", torch.optim.SGD),
        ("ADAM", torch.optim.Adam),
        ("Adam", torch.optim.Adam),
    ],
)
def test_build(name: str, kind: type[torch.optim.Optimizer]) -> None:
    optimizer, groups = build_optimizer(
        Net(), replace(CONFIG, name=name, momentum=0.8, custom_lr_list=("quant_",), custom_lr=0.01)
    )
    assert isinstance(optimizer, kind)
    assert len(optimizer.param_groups) == len(groups) == 3
    for built, group in zip(optimizer.param_groups, groups, strict=True):
        assert built["lr"] == built["base_lr"] == group.base_lr
        assert built["weight_decay"] == group.weight_decay
        assert tuple(built["param_names"]) == group.names
        assert all(a is b for a, b in zip(built["params"], group.parameters, strict=True))
        assert built.get("momentum", 0.8) == 0.8
        assert built.get("nesterov", False) is False


def test_sgd_step_by_hand() -> None:
    """One Nesterov step of each group, from p, g: d = g + decay * p; p - lr * (d + momentum * d)."""
    model = Net()
    config = replace(CONFIG, nesterov=True, momentum=0.5, custom_lr_list=("quant_",), custom_lr=0.01)
    optimizer, groups = build_optimizer(model, config)
    model(torch.randn(2, 1, 7, 7, generator=torch.Generator().manual_seed(0))).square().sum().backward()
    expected = {}
    for group in groups:
        for name, parameter in zip(group.names, group.parameters, strict=True):
            assert parameter.grad is not None
            direction = parameter.grad.double() + group.weight_decay * parameter.detach().double()
            expected[name] = parameter.detach().double() - group.base_lr * 1.5 * direction
    optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach().double(), expected[name], rtol=1e-5, atol=1e-6)


def test_state_loads_with_weights_only(tmp_path: Path) -> None:
    model = Net()
    optimizer, _ = build_optimizer(model, CONFIG)
    model(torch.ones(2, 1, 7, 7)).sum().backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    other, _ = build_optimizer(Net(), CONFIG)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for saved, loaded in zip(optimizer.param_groups, other.param_groups, strict=True):
        assert saved["base_lr"] == loaded["base_lr"]
        for a, b in zip(saved["params"], loaded["params"], strict=True):
            torch.testing.assert_close(
                optimizer.state[a]["momentum_buffer"], other.state[b]["momentum_buffer"], rtol=0, atol=0
            )


def test_nothing_to_train() -> None:
    with pytest.raises(UserError, match="no trainable parameter"):
        build_optimizer(Net().requires_grad_(False), CONFIG)


def test_table() -> None:
    text = groups_table(groups_of(Net(), replace(CONFIG, custom_lr_list=("quant_",), custom_lr=0.01)))
    header, *rows, last = [re.split(r" {2,}", line) for line in text.splitlines()]
    assert header == ["group", "tensors", "elements", "lr", "decay", "rule", "parameters"]
    assert rows == [
        # 8*1*9 + 8*4*9 + 5*8
        ["0", "3", "400", "0.1", "0.001", "default", "stem.weight, grouped.weight, ... (1 more)"],
        # 8 + 8 + 8*1*9 + 8 + 8 + 5
        ["1", "6", "109", "0.1", "0", "small; depth-wise", "norm.weight, norm.bias, ... (4 more)"],
        [
            *["2", "3", "6", "0.01", "0", "small, custom_lr_list"],
            "quant_activation.clip_val, quant_activation.group_clip, ... (1 more)",
        ],
    ]
    assert last == ["sum", "12", "515"]


@pytest.mark.parametrize("options", [{}, {"nesterov": True}, {"name": "ADAM"}])
def test_a_contiguous_run_goes_on_in_channels_last(options: dict[str, Any]) -> None:
    """A momentum that lies in memory otherwise than its weight stays that of each weight."""

    def made(layout: torch.memory_format) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3, 2), nn.Flatten())
        model = model.double().to(memory_format=layout)  # pyright: ignore[reportCallIssue]
        return model, build_optimizer(model, replace(CONFIG, **options))[0]

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, layout: torch.memory_format) -> None:
        images = torch.linspace(-1, 1, 2 * 3 * 9 * 9, dtype=torch.float64).sin().reshape(2, 3, 9, 9)
        for _ in range(3):
            optimizer.zero_grad()
            model(images.contiguous(memory_format=layout)).square().sum().backward()
            optimizer.step()

    model, optimizer = made(torch.contiguous_format)
    train(model, optimizer, torch.contiguous_format)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    ends = []
    for layout in (torch.contiguous_format, torch.channels_last):
        model, optimizer = made(layout)
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(copy.deepcopy(saved[1]))
        train(model, optimizer, layout)
        ends.append(model.state_dict())
    assert ends[1]["0.weight"].is_contiguous(memory_format=torch.channels_last)
    for one, two in zip(ends[0].values(), ends[1].values(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-11)
