"""Batch norms' statistics, computed anew."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import main
from model.layers.batch_statistics import reestimate
from model.networks import build
from tests.kill import COMMON, NETWORK
from utils.config.resolve import read

LINE = (
    COMMON.replace(" --delay 0.01", "")
    .replace(" --keyword_file network.py", "")
    .replace("epochs 4", "epochs 2")
)


@pytest.fixture(autouse=True)
def network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The small network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(build, "_MODELS", dict(build._MODELS))
    exec(NETWORK, {})


def test_statistics_are_those_of_the_batches() -> None:
    """Plain means over all batches; nothing else of the network moves."""
    model = build.build_network(read(LINE.split()).model)
    batches = [torch.randn(16, 3, 8, 8) for _ in range(3)]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert reestimate(model, batches) == len(norms) == 2
    stem = [model.get_submodule("0")(images) for images in batches]
    means = torch.stack([x.mean(dim=(0, 2, 3)) for x in stem]).mean(dim=0)
    variances = torch.stack([x.var(dim=(0, 2, 3)) for x in stem]).mean(dim=0)
    torch.testing.assert_close(norms[0].running_mean, means)
    torch.testing.assert_close(norms[0].running_var, variances)
    after = model.state_dict()
    changed = {name.rpartition(".")[2] for name in before if not before[name].equal(after[name])}
    assert changed == {"running_mean", "running_var"}
    assert all(norm.momentum == 0.1 for norm in norms) and all(m.training for m in model.modules())


def test_stale_statistics_are_repaired() -> None:
    """Behind weights of another scale, evaluation agrees with training again."""
    model = build.build_network(read(LINE.split()).model)
    images = torch.randn(64, 3, 8, 8)
    with torch.no_grad():
        model.get_parameter("0.weight").mul_(30)
    norm = model.get_submodule("1")
    stem = model.get_submodule("0")(images)

    def spread() -> float:
        model.eval()
        return float(norm(stem).detach().std())

    assert spread() > 5
    reestimate(model, [images])
    assert spread() == pytest.approx(1, abs=0.05)


def test_the_option_changes_statistics_alone(capsys: pytest.CaptureFixture[str]) -> None:
    """Training takes the same steps with and without it; a negative number is refused."""
    for case, options in (("plain", ""), ("anew", "--bn_batches 4")):
        assert main.answer([*LINE.split(), "-j", "0", "--case", case, *options.split()]) == 0
    plain, anew = (
        torch.load(f"weights/tiny/{case}-checkpoint.pth.tar", weights_only=True)["state_dict"]
        for case in ("plain", "anew")
    )
    different = {name.rpartition(".")[2] for name in plain if not plain[name].equal(anew[name])}
    assert different == {"running_mean", "running_var"}
    assert main.answer([*LINE.split(), "--bn_batches", "-1"]) == 2
    assert "--bn_batches -1" in capsys.readouterr().err
