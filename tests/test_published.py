"""Checkpoints as earlier public implementations wrote them load with `--pretrained` and compute what theirs did."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import main
from model import pretrained
from model.networks import build
from tests import ROOT
from tests.conformance import LOGITS, fill, load_cases, relative, state_value
from utils.config.resolve import read
from utils.config.schema import Config
from utils.errors import UserError

FOLDER = ROOT / "tests" / "conformance"
CASES = {case["name"]: case for case in load_cases(FOLDER)}
TRY = "--dataset fake --fake_size 8 -b 4 -v 4"
Wrap = Callable[[dict[str, Tensor]], dict[str, Any]]

# The forms in which files were written.
FORMS: dict[str, Wrap] = {
    "bare": lambda weights: weights,
    "state_dict": lambda weights: {"epoch": 7, "state_dict": weights, "best_acc": 60.0, "amp": None},
    "model": lambda weights: {"model": weights},
    "parallel": lambda weights: {"state_dict": {f"module.{name}": value for name, value in weights.items()}},
}


def config_of(name: str, *more: str) -> Config:
    """A recorded case's options, with imitated images."""
    return read([*CASES[name]["argv"], *TRY.split(), *more])


def weights_of(name: str, counters: Callable[[float], Tensor]) -> dict[str, Tensor]:
    """A case's published state by its published names; `counters` makes the form of a counter."""
    config = config_of(name).model
    built = build.build_network(config).state_dict()  # for the tables and bases that construction gives
    weights: dict[str, Tensor] = {}
    for entry, shape in CASES[name]["parameters"].items():
        value, last = state_value(entry, shape), entry.rpartition(".")[2]
        if last == "iteration":
            weights[entry] = counters(1.0)
        elif last == "level_num":
            weights[entry] = counters(float(built[entry]))
        elif value is not None:
            weights[entry] = torch.from_numpy(np.asarray(value))
        else:
            weights[entry] = built[entry] if entry in built else torch.zeros(shape)
    return weights


@pytest.mark.parametrize(
    ("name", "form", "counters"),
    [
        ("resnet20-lsq-2bit", "bare", lambda value: torch.full((1,), value)),
        ("resnet20-fp-official", "model", lambda value: torch.tensor(value)),
        ("resnet18-lq-2bit-bacs", "state_dict", lambda value: torch.nn.Parameter(torch.tensor(value))),
        ("resnet18-bireal-1bit", "parallel", lambda value: torch.nn.Parameter(torch.full((1,), value))),
        ("resnet18-fixup", "parallel", lambda value: torch.tensor(value)),
        ("resnet18-groupnet-1bit-base5", "model", lambda value: torch.tensor(int(value))),
        ("pytorch-resnet18-nonuniform-2bit", "state_dict", lambda value: torch.full((1,), value)),
    ],
)
def test_a_published_file_computes_the_published_logits(
    name: str, form: str, counters: Callable[[float], Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "published.pth.tar"
    weights = weights_of(name, counters)
    torch.save(FORMS[form](weights), path)
    config = config_of(name, "-e")
    network = build.build_network(config.model).eval()
    report = pretrained.load_pretrained(network, path, config)
    assert (report.missing, report.unused, report.mismatched) == ((), (), ())
    tables = [entry for entry in weights if entry.endswith(("auxil", "_vector", "_index", "_multiplier"))]
    assert list(report.obsolete) == tables
    assert bool(tables) == ("lq" in name.split("-"))
    with np.load(FOLDER / f"{name}.npz") as arrays, torch.no_grad():
        logits = network(torch.from_numpy(fill(f"{name}/x", CASES[name]["xshape"])))
        assert relative(logits.numpy(), arrays["logits"]) <= LOGITS


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ("--model pytorch-resnet18 --keyword imagenet --input_size 32", 102),
        ("--model resnet20 --keyword cifar10,origin,cbsa,fix,dorefa,lsq --fm_enable --wt_enable", None),
    ],
)
def test_files_without_batch_norms_counters(options: str, count: int | None, tmp_path: Path) -> None:
    """PyTorch before 0.4.1 wrote none, as in torchvision's first official files; the report says so."""
    config = read([*options.split(), *TRY.split(), "-e"])
    weights = build.build_network(config.model).state_dict()
    kept = {name: value for name, value in weights.items() if not name.endswith("num_batches_tracked")}
    old = {name: value + 1 if value.is_floating_point() else value for name, value in kept.items()}
    assert len(old) == (count or len(old)) < len(weights)
    torch.save(old, tmp_path / "old.pth")
    network = build.build_network(config.model)
    report = pretrained.load_pretrained(network, tmp_path / "old.pth", config)
    assert set(report.missing) == weights.keys() - old.keys()
    assert "missing (bn1." in report.summary()
    loaded = network.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in old.items())


NAME = "resnet20-lsq-2bit"


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A published 2-bit ResNet-20, in the current folder."""
    monkeypatch.chdir(tmp_path)
    weights = weights_of(NAME, lambda value: torch.nn.Parameter(torch.full((1,), value)))
    torch.save(FORMS["parallel"](weights), "published.pth.tar")
    return tmp_path / "published.pth.tar"


def run(*more: str) -> int:
    """The program with the case's options and the published file; later options win."""
    return main.main([*CASES[NAME]["argv"], *TRY.split(), "--pretrained", "published.pth.tar", *more])


def test_it_evaluates_and_trains_on(published: Path, capsys: pytest.CaptureFixture[str]) -> None:
    count = len(CASES[NAME]["parameters"])
    assert run("-e", "--audit") == 0
    text = capsys.readouterr().out
    assert f"pretrained published.pth.tar: {count} loaded\n" in text
    assert "audit: passed" in text
    assert run("--epochs", "1", "--lr", "0.001") == 0
    assert "audit: passed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda w: w, ("--width_alpha", "0.25"), "of another shape (conv1.weight: [8, 3, 3, 3] in the file"),
        (lambda w: {**w, "extra.weight": torch.ones(2)}, (), "1 unused (extra.weight [2])"),
        (lambda w: {k: v for k, v in w.items() if k != "fc.bias"}, (), "1 missing (fc.bias [10])"),
        (lambda w: w, ("-e", "--fm_bit", "3"), "at 4 levels, and the options say 8: write --bits"),
    ],
)
def test_what_does_not_fit_is_one_line(
    published: Path, change: Wrap, options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(FORMS["parallel"](change(weights_of(NAME, lambda value: torch.full((1,), value)))), published)
    assert run(*options) == 2
    done = capsys.readouterr()
    assert message in done.err
    assert done.err.count("\n") == 1
    assert done.out == ""
    assert list(published.parent.iterdir()) == [published]


@pytest.mark.parametrize(
    ("method", "learned"),
    [
        ("dorefa,lsq", "clip_val"),
        ("pact", "quant_activation.clip_val"),
        ("lq", "basis"),
        ("dorefa,non-uniform --fm_level 3 --wt_level 3", "alpha1"),
        ("dorefa,non-uniform,closed_form --fm_level 3 --wt_level 3", "quant_activation.output_scale"),
        ("xnor,gamma --fm_bit 1 --wt_bit 1", "gamma"),
    ],
)
def test_what_quantizers_learn_is_needed_to_evaluate(method: str, learned: str, tmp_path: Path) -> None:
    """A training may start without it; counters are never needed."""
    line = f"--model resnet20 --width_alpha 0.125 --fm_enable --fm_bit 2 --wt_enable --wt_bit 2 {TRY}"
    line += f" --keyword cifar10,origin,cbsa,fix,{method}"
    weights = build.build_network(read(line.split()).model).state_dict()
    counters = ("iteration", "level_num")
    whole = {name: value for name, value in weights.items() if not name.endswith(counters)}
    part = {name: value for name, value in whole.items() if not name.endswith(learned)}
    torch.save(whole, tmp_path / "whole.pth")
    torch.save(part, tmp_path / "part.pth")

    def load(file: str, *more: str) -> set[str]:
        config = read([*line.split(), *more])
        return set(
            pretrained.load_pretrained(build.build_network(config.model), tmp_path / file, config).missing
        )

    counted = weights.keys() - whole.keys()
    lost = whole.keys() - part.keys()
    assert len(lost) >= 18
    assert load("whole.pth", "-e") == counted
    assert load("part.pth") == counted | lost
    with pytest.raises(UserError, match=rf"{len(lost)} missing \(layer1.0.conv1.0.*{learned} "):
        load("part.pth", "-e")
    scope = ("--unresume_scope", f"*.{learned}")
    assert load("part.pth", *scope) == counted
    with pytest.raises(UserError, match="an evaluation needs the whole network"):
        load("whole.pth", "-e", *scope)


def test_the_range_of_a_warm_up_is_needed_to_evaluate(tmp_path: Path) -> None:
    line = f"--model resnet20 --width_alpha 0.125 --fm_enable --fm_bit 2 {TRY} --stable 4"
    config = read(f"{line} --keyword cifar10,origin,cbsa,fix,dorefa -e".split())
    weights = build.build_network(config.model).state_dict()
    part = {name: value for name, value in weights.items() if not name.endswith("quant_activation.clip")}
    torch.save(part, tmp_path / "part.pth")
    with pytest.raises(UserError, match=rf"{len(weights) - len(part)} missing .*quant_activation.clip "):
        pretrained.load_pretrained(build.build_network(config.model), tmp_path / "part.pth", config)


@pytest.mark.parametrize("own", [False, True])
def test_a_published_closed_form(own: bool, tmp_path: Path) -> None:
    """Its scale of activations is called `basis` there, beside a table, and weights have none."""
    line = f"--model resnet20 --width_alpha 0.125 {TRY} --fm_enable --fm_level 3 --wt_enable --wt_level 3"
    config = read(f"{line} --keyword cifar10,origin,cbsa,fix,dorefa,non-uniform,closed_form -e".split())
    trained = build.build_network(config.model).eval()
    file: dict[str, Tensor] = {}
    for name, value in trained.state_dict().items():
        place, _, last = name.rpartition(".")
        if last == "output_scale" and place.endswith("quant_activation"):
            value.uniform_(0.5, 1.5)
        if last != "output_scale" or own:
            file[name] = value
        elif place.endswith("quant_activation"):
            file |= {f"{place}.basis": value, f"{place}.auxil": torch.zeros(1)}
    torch.save({"state_dict": file}, tmp_path / "f.pth.tar")
    network = build.build_network(config.model).eval()
    report = pretrained.load_pretrained(network, tmp_path / "f.pth.tar", config)
    assert len(report.obsolete) == (0 if own else 20)
    assert all(name.endswith("quant_weight.output_scale") for name in report.missing)
    assert len(report.missing) == (0 if own else 20)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(network(images), trained(images))


def test_the_scope_passes_what_does_not_fit(published: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = {**weights_of(NAME, lambda value: torch.full((1,), value)), "extra.weight": torch.ones(2)}
    weights["fc.weight"], weights["fc.bias"] = torch.zeros(100, 32), torch.zeros(100)
    torch.save(FORMS["parallel"](weights), published)
    assert run("--epochs", "1", "--unresume_scope", "fc,extra") == 0
    assert "3 skipped (fc.weight, fc.bias, extra.weight)" in capsys.readouterr().out
    assert run("-e", "--case", "evaluated", "--unresume_scope", "fc,extra") == 2
    assert "leaves out fc.weight, fc.bias; write" in capsys.readouterr().err
