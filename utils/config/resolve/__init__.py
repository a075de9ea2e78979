"""From the options of a command line and its keywords to the typed configuration.

Everything is checked on the way, before anything is loaded: a mistake is a `UserError` that says what to write
instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from utils.config import keyword, policy_file, vocabulary  # noqa: F401  (vocabulary declares the keywords)
from utils.config.command_line import Given, parse
from utils.config.resolve.bits import spread_bits
from utils.config.resolve.data_and_run import (
    data_config,
    data_keyword,
    device_config,
    probe_config,
    run_config,
)
from utils.config.resolve.effects import without_effect
from utils.config.resolve.families import family_of
from utils.config.resolve.network import model_config
from utils.config.resolve.numbers import check_numbers
from utils.config.resolve.quantizers import check_gradients, quant_config
from utils.config.resolve.training import (
    loss_config,
    optim_config,
    precision_config,
    schedule_config,
    weights_config,
)  # fmt: skip
from utils.config.schema import Config, Rule

# Option -> the field that a keyword sets and the option overrides; `origins` then names the option.
FIELDS = {
    "num_classes": "model.num_classes",
    "input_size": "model.input_size",
    "channels": "model.channels",
    "label_smooth": "loss.label_smooth",
    "dataset": "data.dataset",
    "order": "block.downsample_order",
}


def read(argv: Sequence[str]) -> Config:
    """The configuration of a command line.

    Raises:
        UserError: for any mistake, naming what to write instead.
        SystemExit: for `--help`.
    """
    given = parse(argv)
    if given["keyword_file"] is not None:
        keyword.load_file(given["keyword_file"])
    return resolve(given)


def resolve(given: Given) -> Config:
    """The typed configuration of parsed options; see `read`."""
    given = spread_bits(given)
    words = data_keyword(given)
    resolution = keyword.resolve(words, family_of(given["model"]))
    fields = dict(resolution.fields)
    check_numbers(given)
    quant, quant_warnings = quant_config(given, fields)
    model, model_warnings = model_config(given, fields, quant)
    schedule, schedule_warnings = schedule_config(given)
    policy = _policy(given)
    return Config(
        model=model,
        data=data_config(given, fields, model),
        loss=loss_config(given, words, fields, model),
        optim=optim_config(given),
        weights=weights_config(given, quant),
        schedule=schedule,
        precision=precision_config(given),
        devices=device_config(given),
        run=run_config(given, fields),
        probe=probe_config(given, fields),
        policy=policy,
        keywords=words,
        origins={name: f"keyword {word}" for name, word in resolution.origins.items()}
        | {FIELDS.get(name, name): given.through.get(name, f"--{name}") for name in sorted(given.explicit)},
        warnings=(
            *resolution.warnings,
            *quant_warnings,
            *check_gradients(given, quant, policy),
            *model_warnings,
            *schedule_warnings,
            *without_effect(given, fields),
        ),
    )


def _policy(given: Given) -> tuple[Rule, ...]:
    """The rules of `--policy`, then one that switches the quantizers off for each pattern of `--full_precision`."""
    rules = () if given["policy"] in (None, "none") else policy_file.read_policy(Path(given["policy"]))
    off = {"enable": False}
    return (
        *rules,
        *(Rule(section="init", number=0, name=name, values=off) for name in given["full_precision"]),
    )
