"""`--layer_bits` files as rules, and the options for the first and the last layer."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from utils.config.layer_bits import LayerBits
from utils.config.layer_rules import layer_rules, plain_entries, read_layer_bits
from utils.config.recorded import from_dict, to_dict
from utils.config.resolve import read
from utils.config.schema import Config, QuantConfig
from utils.errors import UserError

NETWORK = ["--keyword", "cifar10,cbsa,lsq"]
ENTRIES = [
    {"name": "layer1.*", "bit": 4},
    {"name": ["layer2.*", "fc"], "wt_bit": 3, "fm_bit": "ternary"},
    {"tag": "wt", "bit": 32, "quant_group": 1},
    {"name": "fc", "fm_quant_group": -4, "wt_quant_group": 0},
]
RULES = (
    LayerBits(names=("layer1.*",), bits={"": 4}, number=1),
    LayerBits(names=("layer2.*", "fc"), bits={"wt": 3, "fm": "ternary"}, number=2),
    LayerBits(names=("*",), bits={"wt": 32}, groups={"wt": 1}, number=3),
    LayerBits(names=("fc",), bits={}, groups={"fm": -4, "wt": 0}, number=4),
)
YAML = """
- name: layer1.*
  bit: 4
- name: [layer2.*, fc]
  wt_bit: 3
  fm_bit: ternary
- tag: wt
  bit: 32
  quant_group: 1
- {name: fc, fm_quant_group: -4, wt_quant_group: 0}
"""


@pytest.mark.parametrize(
    "text",
    [YAML, "init:" + YAML, json.dumps(ENTRIES), json.dumps({"init": ENTRIES}, indent="\t")],
    ids=["yaml", "as a policy", "json", "json with tabs"],
)
def test_a_file_in_every_form(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bits"
    path.write_text(text, encoding="utf-8")
    assert read_layer_bits(path) == RULES
    config = read([*NETWORK, "--bits", "2", "--layer_bits", str(path)])
    assert config.model.quant.layer_bits == RULES
    assert from_dict(to_dict(config), "x") == config  # as a checkpoint holds it, without the file


def test_rules_as_entries_and_back() -> None:
    assert layer_rules(ENTRIES) == layer_rules(RULES) == layer_rules(plain_entries(RULES)) == RULES


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "write a list of entries"),
        ("fc: 4", "write a list of entries"),
        ("[]", "write a list of entries"),
        ("- [", "is no YAML"),
        ("\x00", "is no YAML"),
        ("- fc", "entry 1: write names with values"),
        ("- {name: fc, bits: 4}", "entry 1: 'bits' is not known; did you mean"),
        ("- {name: fc, method: lsq}", "entry 1: method: all layers have the method that --keyword names"),
        ("- {name: fc}", "entry 1: sets no bits"),
        (
            "- {name: fc, bit: 4}\n- {name: fc, bit: 0}",
            "entry 2: bit 0 must be a number of bits from 1 to 16",
        ),
        ("- {name: fc, bit: 17}", "bit 17 must be"),
        ("- {name: fc, bit: -1}", "bit -1 must be"),
        ("- {name: fc, bit: 2.5}", "bit 2.5 must be"),
        ("- {name: fc, bit: true}", "bit True must be"),
        ("- {name: fc, wt_bit: four}", "wt_bit 'four' must be"),
        ("- {name: fc, bit: }", "bit None must be"),
        ("- {name: fc, bit: 4, fm_bit: 4}", "bit and fm_bit contradict"),
        ("- {name: fc, tag: wt, fm_bit: 4}", "tag belongs to bit"),
        (
            "- {name: fc, tag: wt, bit: 4, wt_quant_group: 1}",
            "tag belongs to quant_group, not to wt_quant_group",
        ),
        ("- {name: fc, quant_group: 1, fm_quant_group: 1}", "quant_group and fm_quant_group contradict"),
        ("- {name: fc, quant_group: 1.5}", "quant_group 1.5 must be a number of groups"),
        ("- {name: fc, wt_quant_group: true}", "wt_quant_group True must be a number of groups"),
        ("- {name: fc, wt_quant_group: 99999999999999999999}", "must be a number of groups"),
        ("- {name: fc, wt_quant_groups: 1}", "'wt_quant_groups' is not known; did you mean wt_quant_group"),
        ("- {name: fc, tag: weights, bit: 4}", "tag 'weights' must be one of fm, wt, ot"),
        ("- {name: fc, tag: [wt], bit: 4}", "entry 1: tag ['wt'] must be one of fm, wt, ot"),
        ('[{"tag": {}, "bit": 4}]', "entry 1: tag {} must be one of fm, wt, ot"),
        ("- {name: 3, bit: 4}", "name must be a pattern"),
        ("- {name: [fc, 3], bit: 4}", "name must be a pattern"),
        ("- {name: '', bit: 4}", "name must be a pattern"),
        ("- name: fc\n  bit: 4\n  bit: 3", "'bit' is written twice in one mapping: keep one of them"),
        ('[{"name": "fc", "bit": 4, "bit": 3}]', "'bit' is written twice in one mapping"),
        ("init: [{name: fc, bit: 4}]\ninit: [{name: fc, bit: 3}]", "'init' is written twice in one mapping"),
        ('- {name: fc, "\\e[31m\\n": 4}', r"entry 1: '\x1b[31m\n' is not known"),
    ],
)
def test_a_file_with_a_mistake(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "bits.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="--layer_bits") as error:
        read([*NETWORK, "--bits", "2", "--layer_bits", str(path)])
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe- \x00")
    for name, words in (("none.yaml", "No such file"), ("", "Is a directory"), ("bytes", "not a text file")):
        with pytest.raises(UserError, match=f"cannot be read .*{words}"):
            read([*NETWORK, "--bits", "2", "--layer_bits", str(tmp_path / name)])


def test_a_merged_mapping_may_be_replaced_in_part(tmp_path: Path) -> None:
    path = tmp_path / "bits.yaml"
    path.write_text(
        "- &first {name: fc, wt_bit: 4, fm_bit: 4}\n- {<<: *first, fm_bit: 3}\n", encoding="utf-8"
    )
    assert [rule.bits for rule in read_layer_bits(path)] == [{"wt": 4, "fm": 4}, {"wt": 4, "fm": 3}]


@pytest.mark.parametrize("option", ["--layer_bits", "--policy"])
def test_a_pipe_is_no_file(tmp_path: Path, option: str) -> None:
    """Reading one that nobody writes to would never end."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(
        UserError, match=f"{option} .*pipe: is a pipe or a device: write its text into a file"
    ):
        read([*NETWORK, "--bits", "2", option, str(tmp_path / "pipe")])


# The first and the last layer ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "first", "last"),
    [
        ("--bits 2", None, None),
        ("--bits 2 --first_bit 8", 8, None),
        ("--bits 2 --last_bit ternary", None, "ternary"),
        ("--first_last_bit 8 --bits 2", 8, 8),
        ("--bits 2 --first_last_bit 8 --last_bit 4", 8, 4),
        ("--bits 2 --last_bit 4 --first_last_bit 8", 8, 8),
        ("--bits 2 --first_last_bit 8 --first_bit 32", None, 8),  # as without it
        ("--bits 2 --first_last_bit 8 --first_last_bit 32", None, None),
        ("--first_last_bit 8 --bits 32", None, None),  # behind a config: full precision
    ],
)
def test_what_comes_later_wins(line: str, first: int | str | None, last: int | str | None) -> None:
    quant = read([*NETWORK, *line.split()]).model.quant
    assert (quant.first_bit, quant.last_bit, quant.first_last) == (first, last, False)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ("--first_bit 8", ["first_bit"]),
        ("--bits 2 --first_last_bit 8 --layer_bits FILE", ["first_last_bit", "layer_bits"]),
        ("--bits 2 --last_bit 32", []),
    ],
)
def test_full_precision_behind_a_config_leaves_its_bits_out(
    tmp_path: Path, options: str, names: list[str]
) -> None:
    path = tmp_path / "bits.yaml"
    path.write_text(YAML, encoding="utf-8")
    config = read([*NETWORK, *options.replace("FILE", str(path)).split(), "--bits", "32"])
    assert config.warnings == tuple(f"--{name} has no effect with --bits 32" for name in names)
    assert not config.model.quant.enabled and config.model.quant.layer_bits == ()


def test_the_keyword_and_the_options() -> None:
    """The options say the bits of their layer, 32 too; the keyword says that of the other one."""
    config = read(["--keyword", "cifar10,cbsa,lsq,first-last", "--bits", "2", "--first_bit", "32"])
    assert (config.model.quant.first_bit, config.model.quant.last_bit) == (32, None)
    line = "--bits 2 --first_bit 8 --fm_first_signed"
    config = read(["--keyword", "cifar10,cbsa,lsq,first-last", *line.split()])
    assert config.warnings == (
        "--fm_first_signed has no effect with --first_bit, whose levels are signed anyway",
    )
    line = "--bits 2 --first_last_bit 32 --fm_first_signed"
    config = read(["--keyword", "cifar10,cbsa,lsq,first-last", *line.split()])
    assert config.warnings == (
        "--fm_first_signed has no effect with --first_last_bit 32, which keeps the first layer in full precision",
    )


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--keyword cifar10,cbsa,lsq --first_bit 8", "--first_bit 8: nothing is quantized: add --bits 2"),
        ("--keyword cifar10,cbsa --first_last_bit 8", "--first_last_bit 8: nothing is quantized"),
        ("--keyword cifar10,cbsa,lsq --layer_bits x.yaml", "--layer_bits x.yaml: nothing is quantized"),
        (
            "--keyword cifar10,cbsa,lsq --bits 32 --first_bit 8",
            "--first_bit 8: nothing is quantized with --bits 32: write the bits of the other layers as --bits",
        ),
        (
            "--keyword cifar10,cbsa,lsq --bits 32 --first_last_bit 8",
            "--first_last_bit 8: nothing is quantized",
        ),
        ("--keyword cifar10,cbsa,lsq --bits 32 --layer_bits x.yaml", "or leave --layer_bits out"),
        ("--keyword cifar10,cbsa,lsq --bits 2 --last_bit 17", "'17' is not a number of bits from 1 to 16"),
        ("--keyword cifar10,cbsa,lsq --bits 2 --last_bit 0", "'0' is not a number of bits"),
        ("--keyword cifar10,cbsa,lsq --bits 2 --last_bit -8", "'-8' is not a number of bits"),
        ("--keyword cifar10,cbsa,lsq --bits 2 --last_bit 2.5", "'2.5' is not a number of bits"),
        ("--keyword cifar10,cbsa,xnor --bits 1 --first_bit 8", "--first_bit 8: xnor has no 256 levels"),
        (
            "--keyword cifar10,cbsa,non-uniform --bits ternary --first_last_bit 8",
            "--first_last_bit 8: FATNN has no 256 levels for activations: give ternary, or 32",
        ),
        (
            "--keyword cifar10,cbsa,lq --bits 2 --last_bit ternary",
            "lq has no 3 levels for activations: give 2",
        ),
    ],
)
def test_bits_that_cannot_be(line: str, words: str) -> None:
    with pytest.raises(UserError) as error:
        read(line.split())
    assert words in str(error.value)


@pytest.mark.parametrize("fields", [{"first_bit": 0}, {"last_bit": "8"}, {"layer_bits": [{"bit": 4}]}])
def test_a_configuration_with_wrong_bits(fields: dict[str, object]) -> None:
    with pytest.raises(UserError, match=f"QuantConfig: {next(iter(fields))}"):
        QuantConfig(**fields)  # pyright: ignore[reportArgumentType]


def test_configurations_are_keys_of_mappings() -> None:
    one, same = (QuantConfig(layer_bits=layer_rules(ENTRIES)) for _ in range(2))
    assert {one: 1}[same] == 1 and hash(Config()) == hash(Config())
    other = QuantConfig(layer_bits=layer_rules([{"name": "layer1.*", "bit": 3}]))
    assert len({one, same, other}) == 2


def test_entries_without_groups_are_written_as_before() -> None:
    """Checkpoints of earlier versions compare equal, and earlier versions read the new ones."""
    written = to_dict(QuantConfig(layer_bits=layer_rules([{"name": "fc", "bit": 4}])))["layer_bits"]
    assert written == [{"names": ["fc"], "bits": {"": 4}, "number": 1}]


def test_old_configurations_have_no_bits_of_their_own() -> None:
    plain = to_dict(Config())
    for name in ("first_bit", "last_bit", "layer_bits"):
        del plain["model"]["quant"][name]
    assert from_dict(plain, "x") == Config()
