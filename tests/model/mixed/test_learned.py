"""Bits that a training learns: their gradient, rounding within a budget, the word of tools.py, and its mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

import main
import tools
from model.mixed import fractional
from model.mixed.fractional import Between, cost
from model.mixed.learned import rounded
from model.quant import LayerSite, QuantizerConfig, methods
from tests.model.mixed.test_plan import record
from utils.report import sensitivity_record

ENDS = (2, 8)
NETWORK = "--model vgg_small --width_alpha 0.0625 --input_size 8"


@pytest.mark.parametrize("number", [2.25, 7.5, 8.0])
def test_the_gradient_of_bits(number: float) -> None:
    """Between two numbers of bits: the value is between their values, the gradient their difference."""
    config = QuantizerConfig(tag="wt", enable=True, method="lsq", levels=64)
    quantizer = methods()["lsq", "wt"](config, LayerSite(name="fc", channels=2, channel_dim=0, ndim=2, fan=3))
    bits, x = torch.nn.Parameter(torch.tensor(number)), torch.linspace(-1, 1, 6).view(2, 3)
    y = Between(quantizer, bits, 8)(x)
    y.sum().backward()
    fewer, values = min(int(number), 7), []
    for levels in (2**fewer, 2 ** (fewer + 1)):
        quantizer.set_levels(levels)
        values.append(quantizer(x).detach())
    share = number - fewer
    torch.testing.assert_close(y.detach(), (1 - share) * values[0] + share * values[1])
    torch.testing.assert_close(bits.grad, (values[1] - values[0]).sum())


@pytest.mark.parametrize("size", [True, False])
def test_costs_of_whole_bits_are_those_of_the_record(size: bool) -> None:
    measured = record(layers=3)
    numbers = {layer.name: bits for layer, bits in zip(measured.layers, (2, 4, 8), strict=True)}
    found = cost(measured, {name: torch.tensor(float(bits)) for name, bits in numbers.items()}, size=size)
    expected = measured.bytes_with(numbers) if size else measured.bit_operations_with(numbers)
    assert float(found) == pytest.approx(expected, abs=len(numbers))  # bytes are whole for each layer


@pytest.mark.parametrize("size", [True, False])
def test_rounding_keeps_the_budget(size: bool) -> None:
    """All are moved by one amount; the most that fits, within the fewest and the most bits."""
    measured = record(layers=3)
    names = [layer.name for layer in measured.layers]
    spent = measured.bytes_with if size else measured.bit_operations_with
    learned = dict(zip(names, (2.4, 3.7, 7.9), strict=True))
    assert rounded(learned, measured, 10**12, size=size, ends=ENDS) == dict.fromkeys(names, 8)
    budget = spent(dict(zip(names, (2, 4, 8), strict=True)))
    assert list(rounded(learned, measured, budget, size=size, ends=ENDS).values()) == [2, 4, 8]
    assert list(rounded(learned, measured, budget - 1, size=size, ends=ENDS).values()) == [2, 3, 8]
    least = dict.fromkeys(names, 2)
    assert rounded(learned, measured, spent(least), size=size, ends=ENDS) == least


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a network in full precision and its record."""
    folder = tmp_path_factory.mktemp("learned")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        line = f"{NETWORK} --keyword digits,cba -b 8 --epochs 2 --lr 0.05 --case fp --workers 0"
        assert main.main(line.split()) == 0
        words = "--keyword sensitivity --old weights/vgg_small/fp-checkpoint.pth.tar --bits 8,2 --samples 32"
        assert tools.main(words.split()) == 0
    return folder


@pytest.mark.parametrize("budget", ["--budget_size 8KiB", "--budget_bops 4M"])
def test_the_word(
    budget: str,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The file keeps the budget, has an entry for each layer, and is trained as it is; the same call gives the same."""
    monkeypatch.chdir(trained)
    found = sensitivity_record.read(Path("exp/fp/sensitivity.json"))
    bits = []
    for name in ("a.yaml", "b.yaml")[: 1 + ("size" in budget)]:
        words = (
            f"--keyword learn-bits --old exp/fp/sensitivity.json {budget} --epochs 2 --new {tmp_path / name}"
        )
        assert tools.main(words.split()) == 0
        entries = yaml.safe_load((tmp_path / name).read_text())
        bits.append({entry["name"]: entry["wt_bit"] for entry in entries})
        assert all(entry["wt_bit"] == entry["fm_bit"] for entry in entries)
    assert bits[0] == bits[-1] and list(bits[0]) == [layer.name for layer in found.layers]
    assert len({*bits[0].values()}) > 1
    if "size" in budget:
        assert found.bytes_with(bits[0]) <= 8 * 1024 < found.bytes_with(dict.fromkeys(bits[0], 8))
    else:
        assert (
            found.bit_operations_with(bits[0]) <= 4e6 < found.bit_operations_with(dict.fromkeys(bits[0], 8))
        )
    assert "million bit operations" in capsys.readouterr().out
    line = f"{NETWORK} --keyword digits,cba,dorefa,lsq --fm_enable --wt_enable"
    options = f"--fm_bit 2 --wt_bit 2 --layer_bits {tmp_path / 'a.yaml'} --pretrained fp-checkpoint.pth.tar --dry_run"
    assert main.main([*line.split(), *options.split()]) == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--budget_size 1KiB", "--budget_size 1KiB is too small: 2 bits everywhere take"),
        ("--budget_size 1GiB", "--budget_size 1GiB needs no plan: 8 bits everywhere take"),
        ("", "needs one budget: --budget_size 96KiB, or --budget_bops 0.5G"),
        ("--budget_size 8", "--budget_size 8: "),
        (
            "--budget_size 8KiB --epochs 1",
            "--epochs 1: 179 batches are too few for bits to change; write at least 2",
        ),
        ("--budget_size 8KiB --samples 3", "--samples means nothing to the word learn-bits"),
    ],
)
def test_mistakes(
    words: str, said: str, trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(trained)
    line = f"--keyword learn-bits --old exp/fp/sensitivity.json --new x.yaml {words}"
    assert tools.main(line.split()) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not Path("x.yaml").exists()


def test_a_loss_that_is_not_finite(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(trained)
    monkeypatch.setattr(fractional, "PENALTY", float("nan"))
    line = "--keyword learn-bits --old exp/fp/sensitivity.json --new x.yaml --budget_size 8KiB"
    assert tools.main(line.split()) == 2
    error = capsys.readouterr().err
    assert (
        "the loss is not finite in epoch 1: its training's rate, --lr 0.05" in error
        and not Path("x.yaml").exists()
    )


def test_records_that_do_not_fit(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A record of another network, of a checkpoint that is gone, or with one number of bits."""
    monkeypatch.chdir(trained)
    text = json.loads(Path("exp/fp/sensitivity.json").read_text())
    renamed = json.loads(json.dumps(text))
    renamed["layers"][3]["name"] = "elsewhere"
    one = json.loads(json.dumps(text))
    for layer in one["layers"]:
        del layer["changes"]["8"]
    for number, (changed, said) in enumerate(
        (
            (renamed, "has other layers than its record ("),
            (text | {"checkpoint": "gone.pth.tar"}, "gone.pth.tar"),
            (one, "has one number of bits: measure more"),
        )
    ):
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps(changed))
        line = f"--keyword learn-bits --old {path} --new {tmp_path / 'x.yaml'} --budget_size 8KiB"
        assert tools.main(line.split()) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1, error
    assert not (tmp_path / "x.yaml").exists()
