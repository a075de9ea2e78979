"""A run with bits by layer: its dry run, its training, its resumption, and its evaluation without the file."""

from __future__ import annotations

from pathlib import Path

import pytest

import main

TINY = (
    "--dataset fake --width_alpha 0.125 --input_size 16 -b 8 -v 8 --fake_size 16 --lr 0.05 --keyword cifar10,cbas,lsq "
    "--bits 2 --case mixed --first_last_bit 8"
)
CHECKPOINT = "weights/resnet20/mixed-checkpoint.pth.tar"


def test_the_checkpoint_holds_the_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    file = Path("bits.yaml")
    file.write_text("- {name: layer1.*, wt_bit: 3, fm_bit: ternary, wt_quant_group: 1}\n", encoding="utf-8")
    with_file = [*TINY.split(), "--layer_bits", str(file)]

    assert main.main([*with_file, "--epochs", "1", "--dry_run", "--verbose"]) == 0
    said = capsys.readouterr().out
    assert "lsq 3 bit, 8 levels, 1 gr." in said
    assert main.main([*with_file, "--epochs", "1", "--dry_run"]) == 0
    said = capsys.readouterr().out
    rows = [line.split() for line in said.splitlines()]
    head = [
        "layer",
        "weights",
        "MACs",
        "weight",
        "bits",
        "input",
        "bits",
        "KiB",
        "input",
        "KiB",
        "bit",
        "operations",
    ]
    bits = {
        row[0]: row[3:5]
        for row in rows
        if row and row[0].startswith(("conv1", "fc", "layer")) and row != head
    }
    assert (bits.pop("conv1"), bits.pop("fc")) == (["8", "8"], ["8", "8"])
    assert {tuple(each) for name, each in bits.items() if name.startswith("layer1.")} == {("3", "ternary")}
    assert {tuple(each) for name, each in bits.items() if not name.startswith("layer1.")} == {("2", "2")}
    table = {
        row[0]: int(row[-1].replace(",", "")) for row in rows if row and row[0] in {*bits, "conv1", "fc"}
    }
    assert f"{sum(table.values()):,} bit operations" in said  # the totals
    assert not Path("weights").exists()

    assert main.main([*with_file, "--epochs", "1"]) == 0
    assert main.main([*with_file, "--epochs", "2", "-r"]) == 0
    capsys.readouterr()
    assert main.main([*TINY.split(), "--epochs", "3", "-r"]) == 2
    assert "--layer_bits was 1 entries and is none now" in capsys.readouterr().err
    own = Path("per-channel.yaml")
    own.write_text("- {name: layer1.*, wt_bit: 3, fm_bit: ternary}\n", encoding="utf-8")
    assert main.main([*TINY.split(), "--epochs", "3", "-r", "--layer_bits", str(own)]) == 2
    assert "--layer_bits has other entries now" in capsys.readouterr().err
    evaluate = ["-e", "--pretrained", CHECKPOINT, "--layer_bits", str(file)]
    for entries, status in (
        (
            "- {name: layer1.*, bit: 3, quant_group: 1}\n- {name: [layer1.*, fc], tag: fm, bit: ternary}\n"
            "- {name: fc, bit: 8}",
            0,
        ),
        ("- {name: layer1.*, wt_bit: 3, fm_bit: ternary}", 2),
        ("- {name: layer1.*, wt_bit: 3}", 2),
    ):
        file.write_text(entries, encoding="utf-8")
        assert main.main(evaluate) == status
    assert "--layer_bits has other entries now" in capsys.readouterr().err
    file.unlink()
    assert main.main(["-e", "--pretrained", CHECKPOINT, "--audit"]) == 0
    seen = {
        line.split()[0]: line.split()[2] for line in capsys.readouterr().out.splitlines() if ".quant_" in line
    }
    assert (seen["layer1.0.conv1.0.quant_weight"], seen["layer1.0.conv1.0.quant_activation"]) == ("8", "3")
    assert (seen["fc.quant_weight"], seen["layer3.0.conv1.0.quant_weight"]) == ("256", "4")
    assert main.main(["-e", "--pretrained", CHECKPOINT, "--last_bit", "4"]) == 2
    assert "--last_bit was 8 and is 4 now" in capsys.readouterr().err


@pytest.mark.parametrize("file", ["", "- {name: layer2.*, bit: 3}"])
def test_the_options_of_the_training_evaluate_what_a_policy_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], file: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("policy.yaml").write_text("init: [{name: layer1.*, bit: 4}]\n", encoding="utf-8")
    Path("bits.yaml").write_text(file, encoding="utf-8")
    own = ["--layer_bits", "bits.yaml"] if file else []
    assert main.main([*TINY.split(), *own, "--policy", "policy.yaml", "--epochs", "1"]) == 0
    evaluate = ["-e", "--pretrained", CHECKPOINT]
    for options in (
        own,
        ["--first_bit", "8", *own],
        ["--first_last_bit", "8"],
        ["--fp16", "--opt_level", "O1"],
    ):
        assert main.main([*evaluate, *options]) == 0
    capsys.readouterr()
    for option, words in (("--last_bit 32", "8 and is none now"), ("--last_bit 4", "8 and is 4 now")):
        assert main.main([*evaluate, *option.split()]) == 2
        assert f"--last_bit was {words}" in capsys.readouterr().err
