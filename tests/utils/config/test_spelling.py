"""Fields of the configuration are called in messages as a user writes them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from utils.checkpoint.run_state import differences
from utils.config import keyword, vocabulary  # noqa: F401
from utils.config.options import OPTIONS
from utils.config.recorded import to_dict
from utils.config.resolve import read
from utils.config.schema import Config, DistillConfig, LossConfig
from utils.config.spelling import changed

# Those that have no word: derived from others, or values that no keyword sets.
WORDLESS = {
    "data.train",
    "data.classes",
    "data.class_weight_values",
    "data.count_classes",
    "data.val_files",
    "model.norm",
    "model.block.skip",
    "model.stem.space_to_depth",
}


def fields(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All fields with their dotted names."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from fields(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def test_every_field_has_an_option_or_a_keyword() -> None:
    """A message names one that exists."""
    config = to_dict(Config(loss=LossConfig(distill=DistillConfig())))
    count = 0
    for name, value in fields(config):
        tag = re.match(r"model\.quant\.(fm|wt|ot)\.(tag|method|custom|gamma|binary_scale)", name)
        if (
            name in WORDLESS
            or tag
            or name.split(".")[0] in ("run", "devices", "keywords", "origins", "warnings")
        ):
            continue
        now = not value if isinstance(value, bool) else value
        said, count = changed(name, value, now), count + 1
        if name in ("policy", "data.world_size"):
            continue
        option, words = re.match(r"--(\w+) (?:was|has)", said), re.findall(r"with(?:out)? (\S+)", said)
        assert option and option[1] in OPTIONS, said
        assert option[1] != "keyword" or (words and set(words) <= keyword.registry().keys()), said
    assert count > 100


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        ("--balanced_sampler", "", "--balanced_sampler was on and is off now"),
        ("--fm_half_range", "", "--fm_half_range was on and is off now"),
        ("--wt_half_range", "", "--wt_half_range was on and is off now"),
        ("--bits ternary", "--bits 2", "--fm_level was 3 and is 4 now, --wt_level was 3 and is 4 now"),
        ("--bits 1", "--bits 2", "--fm_bit was 1 and is 2 now, --wt_bit was 1 and is 2 now"),
        ("--lr_custom_step 2,4", "--lr_custom_step 3", "--lr_custom_step was 2,4 and is 3 now"),
        ("--keyword cifar10,cbas,lsq,preBN", "", "--keyword was with preBN and is without preBN now"),
        (
            "--full_precision layer1.*,layer3.*",
            "--policy config/policies/mixed.yaml",
            "--full_precision was layer1.*,layer3.* and is none now, --policy was none and is 2 entries now",
        ),
        ("--input_size 96x160", "--input_size 96", "--input_size was 96x160 and is 96 now"),
        ("--mean 0.5,0.5,0.5 --std 0.5,0.5,0.5", "", "--mean was 0.5,0.5,0.5 and is none now"),
        ("--bn_batches 20 --save_every 5", "--save_every 6", "--bn_batches was 20 and is 0 now"),
        (
            "--distill_teacher resnet20 --distill_pretrained a.pth",
            "",
            "--distill_teacher was resnet20 and is none now",
        ),
        (
            "--distill_teacher resnet20 --distill_pretrained a.pth --distill_keyword cifar10,cbsa",
            "--distill_teacher resnet20 --distill_pretrained a.pth --distill_keyword cifar10,cbas",
            "--distill_keyword has other words now",
        ),
    ],
)
def test_what_has_changed(before: str, now: str, said: str) -> None:
    """Each change once, also where two fields hold it."""
    line = "--keyword cifar10,cbas,lsq --bits 4 "
    found = differences(*(to_dict(read((line + each).split())) for each in (before, now)))
    lines = list(dict.fromkeys(found.values()))
    assert ", ".join(lines).startswith(said) and len(lines) == len(set(lines))
    # How often files are written is no change of the training.
    assert len(lines) == 1 or "--bn_batches" not in said
