"""The comparison of planned and uniform bits: its table, pictures and commands, without a training."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import yaml

import tools
from model.quant import LayerSite, QuantizerConfig, methods
from tests import ROOT
from tests.model.mixed.test_plan import record
from utils.report.sensitivity_record import FILE

sys.path.insert(0, str(ROOT / "benchmarks"))

import digits
import learned_bits
import mixed

sys.path.pop(0)


def outcome(seed: int, bits: int, ends: str, choice: str, top1: float) -> mixed.Outcome:
    return mixed.Outcome(
        seed=seed, bits=bits, ends=ends, choice=choice, top1=top1, bytes=2048 * bits, bit_operations=bits * 10**6,
        layers={f"layer{i}": bits for i in range(20)}, command="python main.py",
    )  # fmt: skip


FOUND = [
    outcome(seed, bits, ends, choice, 90 + seed + gain * (0.5 * bits - 0.4 * (ends == "8")))
    for seed in (1, 2)
    for bits in mixed.WIDTHS
    for ends in ("full", "8")
    for choice, gain in (("uniform", 0), ("planned", 1), ("learned", 0.5))
    if (ends, choice) != ("8", "learned")
]


def test_the_table() -> None:
    """Means and spans over the seeds, gains of each seed, goals where both ends are in full precision."""
    lines = mixed.table([95.0, 96.0], FOUND)
    assert lines[0] == "In full precision: 95.50 (95.00 - 96.00)."
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[4:]]
    assert [row[:4] for row in rows[:5]] == [
        ["3/3", "in full precision", choice, "6.0"] for choice in mixed.CHOICES
    ] + [["3/3", "at 8 bits", choice, "6.0"] for choice in ("uniform", "planned")]
    assert rows[0][4:] == ["91.50", "91.00 - 92.00", "", "", "", "", "3"]
    assert rows[1][4:] == ["93.00", "92.50 - 93.50", "+1.50", "+1.50 - +1.50", "+0.7", "yes", "3"]
    assert rows[2][6:10] == ["+0.75", "+0.75 - +0.75", "+0.7", "yes"]
    assert rows[4][6:10] == ["+1.10", "+1.10 - +1.10", "", ""]
    assert rows[6][6:10] == ["+1.00", "+1.00 - +1.00", "+1.5", "no"]


def test_the_pictures(tmp_path: Path) -> None:
    mixed.draw([95.0, 96.0], FOUND, tmp_path / "x.json", "title")
    for part in ("size", "bits"):
        assert (tmp_path / f"x-{part}.png").read_bytes().startswith(b"\x89PNG")


def test_the_steps_of_a_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planned networks get a real plan of the size of the uniform one beside them, and all start from one network."""
    monkeypatch.setattr(mixed, "ROOT", tmp_path)
    measured, trained = record(layers=20), {}
    names = [layer.name for layer in measured.layers]

    def run(case: str, argv: list[str], fresh: bool) -> dict[str, object]:
        """The summary of a training, without it."""
        trained[case] = " ".join(argv)
        (tmp_path / "exp" / case).mkdir(parents=True)
        size = measured.bytes_with(dict.fromkeys(names, 4 if "-3-" in case else 2)) + 8
        layers = [{"name": name, "weight_bits": 2} for name in names]
        return {
            "last_top1": 90.0,
            "network": "x",
            "layers": layers,
            "weight_bytes": size,
            "bit_operations": 1,
        }

    def python(program: str, *words: str) -> None:
        if program == "tools.py" and words[1] == "sensitivity":
            (tmp_path / "exp" / "mixed-digits-all-fp-1" / FILE).write_text(measured.as_json())
        elif program == "tools.py":
            assert tools.main(list(words)) == 0
        else:
            given = dict(zip(words[::2], words[1::2], strict=True))
            bits = learned_bits.rounded(dict.fromkeys(names, 3.0), measured, int(given["--bytes"]))
            Path(given["--new"]).write_text(learned_bits.entries(bits))

    monkeypatch.setattr(digits, "run", run)
    monkeypatch.setattr(mixed, "python", python)
    full, found, _ = mixed.of_seed("digits-all", 1, False)
    assert (full, len(found), len(trained)) == (90.0, 10, 11)
    sizes = {}
    for one in found:
        if one.choice == "uniform":
            sizes[one.bits, one.ends] = one.bytes
            continue
        file = tmp_path / one.command.rpartition("--layer_bits ")[2].split()[0]
        bits = {entry["name"]: entry["wt_bit"] for entry in yaml.safe_load(file.read_text())}
        assert list(bits) == names and measured.bytes_with(bits) <= sizes[one.bits, one.ends]
    for case, line in trained.items():
        assert ("--layer_bits" in line) == ("planned" in case or "learned" in case)
        assert ("--pretrained mixed-digits-all-fp-1-checkpoint.pth.tar" in line) == ("-fp-" not in case)
        assert ("--first_last_bit 8" in line) == ("at-8-bits-uniform" in case)


def test_learned_bits_keep_the_budget() -> None:
    """All are moved by one amount; the most that fits, within the fewest and the most bits."""
    measured = record(layers=3)
    names = [layer.name for layer in measured.layers]
    learned = dict(zip(names, (2.4, 3.7, 7.9), strict=True))
    everything = learned_bits.rounded(learned, measured, 10**9)
    assert everything == dict.fromkeys(names, learned_bits.MOST)
    budget = measured.bytes_with(dict(zip(names, (2, 4, 8), strict=True)))
    found = learned_bits.rounded(learned, measured, budget)
    assert list(found.values()) == [2, 4, 8]
    smaller = learned_bits.rounded(learned, measured, budget - 1)
    assert list(smaller.values()) == [2, 3, 8]
    with pytest.raises(SystemExit, match="2 bits everywhere take"):
        learned_bits.rounded(learned, measured, 1)


def test_the_gradient_of_bits() -> None:
    """Between two numbers of bits: the value is between their values, the gradient their difference."""
    config = QuantizerConfig(tag="wt", enable=True, method="lsq", levels=64)
    quantizer = methods()["lsq", "wt"](config, LayerSite(name="fc", channels=2, channel_dim=0, ndim=2, fan=3))
    bits, x = torch.nn.Parameter(torch.tensor(2.25)), torch.linspace(-1, 1, 6).view(2, 3)
    y = learned_bits.Between(quantizer, bits)(x)
    y.sum().backward()
    values = []
    for number in (4, 8):
        quantizer.set_levels(number)
        values.append(quantizer(x).detach())
    torch.testing.assert_close(y.detach(), 0.75 * values[0] + 0.25 * values[1])
    torch.testing.assert_close(bits.grad, (values[1] - values[0]).sum())
