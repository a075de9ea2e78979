"""C headers: the operators that the networks of other tests have not, and mistakes."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from model.deploy.c.engine import CRunner, compiler
from model.deploy.c.header import Memory, c_header
from model.deploy.c.operators import Tensor as Place
from model.deploy.c.operators import part_of
from model.deploy.engines import Engine
from model.deploy.graph import deploy_graph
from model.deploy.steps import Step
from tests.model.deploy.networks import Single
from utils.errors import UserError


class Operators(nn.Module):
    """Convolutions, pools and operators on elements that trained networks have."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2)
        self.norm, self.slope = nn.BatchNorm2d(6), nn.PReLU(6)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6, padding_mode="zeros", bias=False)
        self.last = nn.Linear(24, 5, bias=False)
        nn.init.normal_(self.norm.running_mean)

    def forward(self, x: Tensor) -> Tensor:
        x = self.slope(self.norm(self.first(x)))
        gate = functional.hardsigmoid(x.mean((2, 3), keepdim=True))
        x = functional.hardswish(x * gate) + functional.silu(x) - functional.leaky_relu(x, 0.3)
        x = torch.cat([x[:, 1:5:2], functional.pad(x, (1, 1, 0, 2), value=-0.5)[:, :4, 1:-1, 1:-1]], 1)[
            :, :, :3, :4
        ]
        x = self.depthwise(functional.gelu(x).clamp(-1, 2))
        one = functional.max_pool2d(x, 2, stride=1, padding=1, ceil_mode=True)
        two = functional.avg_pool2d(x, (2, 3), stride=2, padding=1)
        three = functional.avg_pool2d(x, 2, padding=1, count_include_pad=False)
        x = one.amax((2, 3)) + one.sum((2, 3)) * torch.tanh(two.mean((2, 3))) + three.amin((2, 3)).abs()
        x = torch.cat([x, two.transpose(2, 3).flatten(2)[:, :, :3].flatten(1)], 1)
        return self.last(torch.where(x > 0.1, x, x.sign() / (x.square() + 1).sqrt()))


def test_operators_are_those_of_torch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, x = Operators().eval(), torch.randn(3, 4, 7, 7)
    path = tmp_path / "x.h"
    path.write_text(c_header(deploy_graph(network, (4, 7, 7))))
    with torch.no_grad():
        expected = network(x).numpy()
    np.testing.assert_allclose(Engine("cc").open(path)(x.numpy())["logits"], expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(
        UserError, match=r"x.h: computes a batch of images of 4x7x7, and this is a batch of \d+x4x8x8$"
    ):
        CRunner(path, False)(np.zeros((1, 4, 8, 8), np.float32))
    # As strict compilers like it.
    strict = ["-std=c99", "-Wall", "-Wextra", "-Wno-unused-variable", "-pedantic", "-Werror", "-fsyntax-only"]
    done = subprocess.run(
        [*compiler(), *strict, "-x", "c", str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(2), nn.Linear(16, 2), nn.Flatten()),
            "^2: a linear layer of",
        ),
        (
            lambda: nn.Sequential(nn.ReflectionPad2d(1), nn.Flatten(), nn.Linear(108, 2)),
            "^0: padding with other values",
        ),
        (
            lambda: nn.Sequential(nn.Flatten(), nn.Linear(48, 2), nn.Softmax(1)),
            "^2: C files do not hold the operator S",
        ),
        (
            lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1)),
            "^logits of the shape 1x4x1x1 are n",
        ),
        (
            lambda: nn.Sequential(nn.Flatten(2), nn.AvgPool1d(2), nn.Flatten()),
            "^1: a pool of other data than images",
        ),
    ],
)
def test_what_cannot_be_written(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(UserError, match=f"{message}.*export --to onnx$"):
        c_header(deploy_graph(make().eval(), (3, 4, 4)))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: functional.pad(x, (-1, -1, -1, 0)).flatten(1),
        lambda x: functional.pad(x, (2, -1, -1, 1), value=0.5).flatten(1),
        lambda x: functional.avg_pool2d(x, 2, 2, ceil_mode=True).flatten(1),
        lambda x: functional.avg_pool2d(x, 3, 2, padding=1, ceil_mode=True).flatten(1),
        lambda x: x.bool().float().flatten(1) + (x > 0.5).float().flatten(1),
        lambda x: x.clamp(max=x.mean((1, 2, 3), keepdim=True)).flatten(1),
        lambda x: x.flip(2)[:, :, 1:-1:2].flatten(1),
    ],
    ids=["cut", "cut and padded", "ceil", "ceil and padded", "bool", "a computed end", "backwards"],
)
def test_single_operators(tmp_path: Path, function: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    x, path = torch.randn(2, 3, 5, 5).relu(), tmp_path / "x.h"
    path.write_text(c_header(deploy_graph(Single(function).eval(), (3, 5, 5))))
    np.testing.assert_allclose(CRunner(path, False)(x.numpy())["logits"], function(x).numpy(), rtol=1e-5)


def test_what_a_damaged_header_says(tmp_path: Path) -> None:
    """Sizes that are not those of the loops are an error of the compiler, not a crash."""
    path = tmp_path / "x.h"
    text = c_header(deploy_graph(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).eval(), (3, 2, 2)))
    path.write_text(text.replace('"classes": 3', '"classes": 2', 1))
    with pytest.raises(UserError, match=r"the compiler does not take it: .*the loops have other sizes"):
        CRunner(path, False)
    described = text.splitlines()[0].removeprefix("// lowbit: ")
    for line in ("[1]", '{"texts": 5}', described.replace('"texts": {}', '"texts": {"classes": 5}')):
        path.write_text(f"// lowbit: {line}\n")
        with pytest.raises(
            UserError, match=r"x\.h: not a header that export --to c has written, or a damaged one$"
        ):
            CRunner(path, False)


def test_places_that_are_computed() -> None:
    step = Step(operator="Slice", layer="head", inputs=("x", "start", "end"), outputs=("y",))
    with pytest.raises(
        UserError, match=r"^head: a Slice whose other inputs are computed is not written as C; export"
    ):
        part_of(step, Place("values", (1, 4)), [None, None, None])


def test_compilers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(
        UserError, match=r"^CC=no-such-compiler: no such program; name a C compiler, or unset CC$"
    ):
        compiler()
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"^no C compiler is installed: install gcc or clang"):
        compiler()


def test_memory_is_used_again() -> None:
    memory = Memory()
    first, second = memory.take(10), memory.take(5)
    memory.give(first)
    assert (first, second, memory.take(4), memory.take(6), memory.take(7)) == (0, 10, 0, 4, 15)
    assert memory.size == 22
