"""Bits under a budget: the best of all choices, and budgets that are no use."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

import tools
from model.convert import quantize
from model.deploy.graph import deploy_graph
from model.deploy.onnx_qdq import integer_layers
from model.mixed.integer_bits import integer_bits
from model.mixed.plan import best, of_bits
from model.quant import QuantConfig, QuantizerConfig
from utils.report.sensitivity_record import Change, LayerSensitivity, Sensitivity

BITS = (8, 4, 2)


def record(seed: int = 0, layers: int = 5) -> Sensitivity:
    """Layers of random sizes, that lose more with fewer bits."""
    draw = random.Random(seed)

    def layer(number: int) -> LayerSensitivity:
        losses = dict(zip(BITS, sorted(draw.uniform(-0.1, 1) for _ in BITS), strict=True))
        return LayerSensitivity(
            name=f"layer{number}", kind="conv", weights=draw.randrange(1, 2000), macs=draw.randrange(1, 10**6),
            trace=draw.random(),
            changes={b: Change(loss=x, weight_loss=x, top1=-x, estimate=x) for b, x in losses.items()},
        )  # fmt: skip

    return Sensitivity(
        checkpoint="x.pth.tar", images=4, loss=1.0, top1=90.0, layers=tuple(map(layer, range(layers))),
        other_bytes=draw.randrange(100), other_macs=draw.randrange(100),
    )  # fmt: skip


@pytest.mark.parametrize("size", [True, False])
@pytest.mark.parametrize("seed", range(8))
def test_no_other_choice_within_the_budget_loses_less(seed: int, size: bool) -> None:
    found = record(seed)
    names = [layer.name for layer in found.layers]
    plans = [
        of_bits(found, dict(zip(names, bits, strict=True)))
        for bits in itertools.product(BITS, repeat=len(names))
    ]
    costs = [plan.bytes if size else plan.bit_operations for plan in plans]
    for share in (0.0, 0.2, 0.5, 0.9):
        budget = int(min(costs) + share * (max(costs) - min(costs)))
        chosen = best(found, budget, size=size)
        assert (chosen.bytes if size else chosen.bit_operations) <= budget
        least = min(plan.loss for plan, cost in zip(plans, costs, strict=True) if cost <= budget)
        assert chosen.loss == pytest.approx(least, abs=1e-5)


def test_a_loss_that_falls_or_rises_with_more_bits_is_noise() -> None:
    changes = {8: 0.2, 4: -0.1, 2: 0.3}
    layer = LayerSensitivity(
        name="a", kind="conv", weights=1, macs=1, trace=0.0,
        changes={b: Change(loss=x, weight_loss=x, top1=0.0, estimate=0.0) for b, x in changes.items()},
    )  # fmt: skip
    assert [layer.loss_at(bits) for bits in BITS] == [0.2, 0.2, 0.3]


@pytest.fixture
def found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sensitivity:
    """A record, and its file `found.json` in the current folder."""
    monkeypatch.chdir(tmp_path)
    Path("found.json").write_text((made := record()).as_json())
    return made


def test_bits_for_an_engine(found: Sensitivity, capsys: pytest.CaptureFixture[str]) -> None:
    """8 bits on both sides overflow 16-bit sums of two products: nobody chooses them, unless they are asked for."""
    least, half, most = (found.bytes_with({layer.name: bits for layer in found.layers}) for bits in (2, 4, 8))
    words = ["--keyword", "plan", "--old", "found.json", "--new", "bits.yaml", "--force"]
    for arguments, message in (
        (["--engine", "onnxruntim"], "write one of onnxruntime, openvino; did you mean onnxruntime?"),
        (
            ["--engine", "openvino", "--bits", "8,4"],
            "does not multiply 8 by 8 bits as integers, but in float",
        ),
        (["--bits", "6,4"], "6 bits are not measured in found.json, but 8, 4, 2"),
        (["--bits", "8,4", "--engine", "qonnx"], "--engine qonnx: write one of"),
    ):
        assert tools.main([*words, "--budget_size", f"{half}B", *arguments]) == 2
        assert message in capsys.readouterr().err
    assert not Path("bits.yaml").exists()

    budget = f"{(half + most) // 2}B"
    assert tools.main([*words, "--budget_size", budget]) == 0
    assert 8 in {entry["wt_bit"] for entry in yaml.safe_load(Path("bits.yaml").read_text())}
    for engine in ("onnxruntime", "openvino"):
        assert tools.main([*words, "--budget_size", budget, "--engine", engine]) == 2
        assert "needs no plan: 4 bits everywhere take" in capsys.readouterr().err
    assert tools.main([*words, "--budget_size", f"{(least + half) // 2}B", "--engine", "openvino"]) == 0
    assert {entry["wt_bit"] for entry in yaml.safe_load(Path("bits.yaml").read_text())} == {4, 2}
    assert tools.main([*words, "--budget_size", f"{(least + most) // 2}B", "--bits", "8,2"]) == 0
    assert {entry["wt_bit"] for entry in yaml.safe_load(Path("bits.yaml").read_text())} == {8, 2}


@pytest.mark.parametrize(("bits", "integer"), [(1, 1), (2, 1), (4, 1), (7, 1), (8, 0)])
def test_integer_bits_are_those_of_an_exported_layer(bits: int, integer: int) -> None:
    """By the network's own file: how many layers in it multiply integers."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten())
    parts = {
        tag: QuantizerConfig(tag=tag, enable=True, method="lsq", levels=4, half_range=tag == "fm")
        for tag in ("fm", "wt")
    }
    quantize(network, QuantConfig(**parts, first_last=True), layer_bits=[{"name": "2", "bit": bits}])  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        layer = network[2]
        layer.weight.copy_(
            torch.linspace(-1, 1, layer.weight.numel()).reshape(layer.weight.shape)
        )  # all codes
        layer.quant_weight.set_range(torch.ones_like(layer.quant_weight.current_range()))  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    assert integer_layers(deploy_graph(network, (4, 8, 8))) == 1 + integer
    assert integer_bits((bits,)) == (bits,) * integer


def test_the_file_and_the_mistakes(found: Sensitivity, capsys: pytest.CaptureFixture[str]) -> None:
    most, least = (found.bytes_with({layer.name: bits for layer in found.layers}) for bits in (8, 2))
    words = ["--keyword", "plan", "--old", "found.json"]
    for arguments, message in (
        (["--new", "bits.yaml"], "needs one budget: --budget_size 96KiB, or --budget_bops 0.5G"),
        (["--new", "bits.yaml", "--budget_size", "1KiB", "--budget_bops", "1G"], "needs one budget"),
        (["--new", "bits.yaml", "--budget_size", f"{least - 1}B"], "is too small: 2 bits everywhere take"),
        (["--new", "bits.yaml", "--budget_size", f"{most}B"], "needs no plan: 8 bits everywhere take"),
        (["--new", "bits.yaml", "--budget_size", "12"], "write a number with its unit, such as 96KiB"),
        (["--new", "bits.yaml", "--budget_size", f"{'9' * 400}B"], "write a number with its unit, such as"),
        (["--new", "bits.yaml", "--budget_bops", "1e99G"], "write a number with its unit, such as 0.5G"),
        (["--new", "bits.yaml", "--budget_size", "-1KiB"], "expected one argument"),
        (["--new", "bits.yaml", "--budget_bops", "fast"], "write a number with its unit, such as 0.5G"),
        (["--new", "bits.txt", "--budget_size", "1KiB"], "name a .yaml or .json file in a folder"),
        (["--new", "none/bits.yaml", "--budget_size", "1KiB"], "name a .yaml or .json file in a folder"),
    ):
        assert tools.main([*words, *arguments]) == 2
        assert message in capsys.readouterr().err
    assert [path.name for path in Path().iterdir()] == ["found.json"]

    for name in ("bits.yaml", "bits.json"):
        budget = f"{(least + most) // 2}B"
        assert tools.main([*words, "--new", name, "--budget-size", budget]) == 0
        entries = yaml.safe_load(Path(name).read_text())
        assert [entry["name"] for entry in entries] == [layer.name for layer in found.layers]
        assert all(entry["wt_bit"] == entry["fm_bit"] in BITS for entry in entries)
        bits = {entry["name"]: entry["wt_bit"] for entry in entries}
        assert found.bytes_with(bits) <= (least + most) // 2
    assert tools.main([*words, "--new", "bits.json", "--budget_bops", "1G"]) == 2
    assert "--force writes over it" in capsys.readouterr().err

    assert tools.main([*words, "--new", "found.json", "--budget_bops", "1G", "--force"]) == 2
    assert "--new found.json is --old" in capsys.readouterr().err

    damaged = json.loads(found.as_json())
    for change in (
        lambda it: it.update(format=0), lambda it: it.update(layers=[]), lambda it: it.pop("loss"),
        lambda it: it["layers"].append(it["layers"][0]), lambda it: it["layers"][0].update(name="layer*"),
        lambda it: [layer["changes"].update({"20": layer["changes"]["2"]}) for layer in it["layers"]],
        lambda it: it["layers"][0].update(macs=10**400), lambda it: it.update(loss=10**400),
        lambda it: it["layers"][0]["changes"].pop("2"), lambda it: it["layers"][0].update(weights="many"),
    ):  # fmt: skip
        content = json.loads(json.dumps(damaged))
        change(content)
        Path("damaged.json").write_text(json.dumps(content))
        arguments = ["--old", "damaged.json", "--new", "new.yaml", "--budget_size", "1KiB"]
        assert tools.main(["--keyword", "plan", *arguments]) == 2
        assert "damaged: measure again" in capsys.readouterr().err
