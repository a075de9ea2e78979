"""`--bits` says what the options of the quantizers say one by one."""

from __future__ import annotations

import dataclasses
import re

import pytest

from model.networks.build import build_network
from utils.config.resolve import read
from utils.config.vocabulary import METHOD_WORDS
from utils.errors import UserError

LSQ = "--keyword cifar10,cbas,lsq"


@pytest.mark.parametrize(
    ("bits", "spelt"),
    [
        ("2", "--fm_enable --wt_enable --fm_bit 2 --wt_bit 2"),
        ("2/4", "--fm_enable --wt_enable --fm_bit 4 --wt_bit 2"),
        ("ternary", "--fm_enable --wt_enable --fm_bit 2 --fm_level 3 --wt_bit 2 --wt_level 3"),
        ("ternary/16", "--fm_enable --wt_enable --fm_bit 16 --wt_bit 2 --wt_level 3"),
        ("1/ternary", "--fm_enable --wt_enable --fm_level 3 --fm_bit 2 --wt_bit 1"),
        ("2/32", "--wt_enable --wt_bit 2"),
        ("32/8", "--fm_enable --fm_bit 8"),
    ],
)
@pytest.mark.parametrize(
    "beside", ["", "--fm_half_range --wt_grad_scale paper --policy config/policies/mixed.yaml"]
)
def test_it_is_the_same_as_the_options(bits: str, spelt: str, beside: str) -> None:
    """Alone, with options and a policy beside it, and beside the options that it replaces."""
    expected, alone = read(f"{LSQ} {beside} {spelt}".split()), read(f"{LSQ} {beside} --bits {bits}".split())
    both = read(f"{LSQ} {beside} {spelt} --bits {bits}".split())
    assert dataclasses.replace(alone, origins={}) == dataclasses.replace(expected, origins={})
    assert dataclasses.replace(both, origins={}) == dataclasses.replace(expected, origins={})
    assert {name for name, origin in alone.origins.items() if origin == "--bits"} == {
        "bits",
        *(word.removeprefix("--") for word in spelt.split() if word.startswith("--")),
    }


def test_the_last_one_counts() -> None:
    quant = read(f"{LSQ} --bits 2 --bits 4".split()).model.quant
    assert (quant.wt.levels, quant.fm.levels, quant.ot.enable) == (16, 16, False)


@pytest.mark.parametrize(
    ("line", "same"),
    [
        ("--fm_enable --wt_enable --fm_bit 2 --wt_bit 2 --bits 4", "--bits 4"),
        ("--wt_level 3 --bits 2", "--bits 2"),
        ("--fm_enable --wt_enable --fm_bit 2 --wt_bit 2 --bits 4/32", "--bits 4/32"),
        ("--bits 2 --fm_bit 4", "--bits 2/4"),
        ("--bits 2 --wt_bit 3 --wt_enable", "--bits 3/2"),
        ("--bits 2 --wt_level 3", "--bits ternary/2"),
        ("--bits 2 --wt_level 8", "--bits 3/2"),
        ("--bits ternary --wt_bit 3", "--bits 3/ternary"),
        ("--bits 2/32 --fm_enable --fm_bit 4", "--bits 2/4"),
        ("--wt_bit 3 --bits 2 --wt_bit 4", "--bits 4/2"),
        ("--fm_enable --wt_enable --fm_bit 2 --wt_bit 2 --bits 32", ""),
        ("--fm_enable --wt_level 3 --bits 32/32", ""),
        ("--bits 2 --bits 32", ""),
        ("--bits 32 --wt_enable --wt_bit 2", "--bits 2/32"),
        ("--bits Ternary/4", "--bits ternary/4"),
    ],
)
def test_what_comes_later_wins(line: str, same: str) -> None:
    assert read(f"{LSQ} {line}".split()).model == read(f"{LSQ} {same}".split()).model


def test_full_precision_that_is_asked_for_is_no_surprise() -> None:
    """A keyword that names a method, without bits, gives a warning."""
    assert not read(f"{LSQ} --fm_enable --fm_bit 2 --bits 32".split()).warnings
    assert read(LSQ.split()).warnings


@pytest.mark.parametrize(
    ("line", "message"),
    [
        *(
            (
                f"{LSQ} --bits {word}",
                f"--bits {word}: write a number from 1 to 16 or ternary, or weights/activations",
            )
            for word in ("0", "17", "-2", "1.58", "2/4/8", "2/", "two", "2,4", "\N{SUPERSCRIPT TWO}")
        ),
        ("--keyword cifar10,cbas --bits 2", "--bits: which quantizer? Add one of the keywords lsq, pact,"),
        ("--keyword cifar10,cbas,xnor --bits 2", "the keyword xnor is binary: give --bits 1, not 4 levels"),
        (
            "--keyword cifar10,cbas,dorefa,wt_bin --bits 2",
            "the keyword wt_bin needs --bits 1/2, not 4 levels",
        ),
    ],
)
def test_a_mistake(line: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        read(line.split())
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


@pytest.mark.parametrize("bits", ["1", "2", "ternary", "4", "9", "2/ternary", "32/2", "ternary/32"])
@pytest.mark.parametrize(
    "words", [*METHOD_WORDS, "dorefa,wt_bin", "xnor,wt_lsq", "lq,fm_lsq", "lq,wt_non-uniform"]
)
def test_messages_propose_bits_that_are_taken(words: str, bits: str) -> None:
    """Whatever a method takes, no message names an option that was not written, and its proposal works."""

    def network(bits: str) -> None:
        build_network(read(f"--keyword cifar10,cbas,{words} --width_alpha 0.25 --bits {bits}".split()).model)

    try:
        network(bits)
    except UserError as error:
        proposals = re.findall(r"--bits (\S+?)(?:,|$)", str(error))
        assert set(re.findall("--[a-z_]+", str(error))) == {"--bits"}
        network(proposals[-1])
