"""The configuration that a checkpoint holds: of its network, and of an evaluation of it.

Modules that import torch are imported where a file is read: other runs check their options first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from utils.config import keyword
from utils.config.command_line import Given
from utils.config.layer_bits import PARTS, SINGLE_LAYERS
from utils.config.recorded import from_dict
from utils.config.resolve import resolve as resolve_options
from utils.config.resolve.bits import spread_bits
from utils.config.resolve.layers import layer_options
from utils.config.schema import RECORDED, TAGS, Config, DataConfig, ModelConfig, Rule
from utils.errors import UserError

LIBRARIES = ("torchvision", "timm")  # words that --pretrained takes beside files


def config_of(payload: Mapping[str, Any], source: str, own_file: str | None = None) -> Config:
    """The configuration in a checkpoint, its policy being what builds the network in the state that was saved.

    `own_file` is the `--keyword_file` of the training; it is run unless that is done.

    Raises:
        UserError: it holds none, or one that is damaged; or it was trained with a keyword file that is not loaded.
    """
    if not isinstance(payload.get("config"), Mapping):
        raise UserError(
            f"{source} holds no configuration, so that its network is not known: name a checkpoint that main.py has "
            "written; main.py -e --pretrained takes others, with --model and the options of the network"
        )
    config = from_dict(payload["config"], source)
    if own_file is not None and own_file not in keyword.loaded_files():
        keyword.load_file(own_file)
    own = config.run.keyword_file
    if own is not None and Path(own).name not in {Path(path).name for path in keyword.loaded_files()}:
        raise UserError(
            f"{source} was trained with --keyword_file {own}, whose code runs only where you name it: give that file "
            "as --keyword_file, in Python as own_file="
        )
    return dataclasses.replace(config, policy=(*_first(config.policy), *_state_rules(payload)))


def _first(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    return tuple(rule for rule in rules if rule.section == "init" and not rule.trains)


def _state_rules(payload: Mapping[str, Any]) -> tuple[Rule, ...]:
    """Entries that set what a policy had changed when the checkpoint was written, and the numbers of levels."""
    from utils.checkpoint import weights

    policy = payload.get("policy")
    changed = policy.get("quantizers", {}) if isinstance(policy, Mapping) else {}
    values: dict[str, dict[str, Any]] = {name: dict(one) for name, one in changed.items()}
    for name, tensor in weights.state_dict_of(payload).items():
        where, _, last = name.rpartition(".")
        if last == "level_num" and tensor.numel() == 1:
            values.setdefault(where, {})["level_num"] = int(tensor)
    return tuple(
        Rule(section="init", number=RECORDED, name=layer, tag=PARTS[part], values=one)
        for layer, _, part, one in ((*name.rpartition("."), one) for name, one in values.items())
        if part in PARTS
    )


def resolve(given: Given) -> Config:
    """The configuration of a command line; that of an evaluation begins with what the checkpoint holds.

    Where neither `--model` nor `--keyword` says which network it is, the checkpoint of `--pretrained` does, and other
    options replace single values of it.

    Raises:
        UserError: as `utils.config.resolve.resolve` and `config_of`.
    """
    if not given["evaluate"]:
        return resolve_options(given)
    name = given["pretrained"]
    if given["resume"] or given["resume_file"] is not None:
        config = resolve_options(given)
        classes = _classes_of_run(config)
        if classes is not None or name is None or name in LIBRARIES:
            return dataclasses.replace(config, data=dataclasses.replace(config.data, classes=classes or ()))
    if name is None or name in LIBRARIES:
        return resolve_options(given)
    from utils.checkpoint import archive, case_files, weights

    path = case_files.find_pretrained(name, Path(given["weights_dir"]), given["model"])
    if path is None:
        return resolve_options(given)
    payload = archive.load_archive(path, mapped=True)
    classes = weights.class_names_of(payload)
    if given.explicit & {"model", "keyword"} or not isinstance(payload.get("config"), Mapping):
        config = resolve_options(given)
        if config.data.val_split and isinstance(payload.get("config"), Mapping):
            files = from_dict(payload["config"], str(path)).data.val_files
            config = dataclasses.replace(config, data=dataclasses.replace(config.data, val_files=files))
    else:
        config = _evaluation(spread_bits(given), payload, path)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, classes=classes))


def _classes_of_run(config: Config) -> tuple[str, ...] | None:
    """The classes in the checkpoint that `-e` takes with `-r` or `--resume_file`, empty where it holds none.

    None: there is no such checkpoint.
    """
    from utils.checkpoint import archive, case_files, weights

    run = config.run
    if run.resume_file is not None:
        payload = archive.load_archive(run.resume_file, mapped=True) if run.resume_file.is_file() else {}
    else:
        payload = case_files.CheckpointFiles(run.weights_dir, config.model.name, run.case).newest().payload
    return weights.class_names_of(payload) if payload else None


def _evaluation(given: Given, payload: Mapping[str, Any], path: Path) -> Config:
    """The configuration of an evaluation of a checkpoint's network."""
    recorded = config_of(payload, str(path))
    model = _replaced(recorded.model, given)
    old = recorded.data
    options: dict[str, Any] = {
        "model": model.name,
        "dataset": old.dataset,
        "num_classes": model.num_classes,
        "input_size": model.input_size,
        "channels": model.channels,
    }
    if old.root is not None and "dataset" not in given.explicit:
        options["root"] = str(old.root)
    written = {name: given[name] for name in given.explicit if not _is_of_network(name)}
    now = resolve_options(Given(options | written, given.replaced, given.through))
    rules = recorded.policy
    # Numbers of levels that options give are compared with the file's, and so are other bits of single layers.
    numbers = given.explicit & {f"{tag}_{name}" for tag in TAGS for name in ("bit", "level")}
    if numbers or any(
        getattr(model.quant, name) != getattr(recorded.model.quant, name) for name in SINGLE_LAYERS
    ):
        rules = tuple(rule for rule in rules if "level_num" not in rule.values)
    return dataclasses.replace(
        now,
        model=model,
        data=_data(now.data, old, payload, given),
        policy=now.policy or rules,
        keywords=recorded.keywords,
    )


def _data(now: DataConfig, old: DataConfig, payload: Mapping[str, Any], given: Given) -> DataConfig:
    """The data of an evaluation: options that are not given are those of the training."""
    from utils.checkpoint import weights

    images = payload.get("images")
    if isinstance(images, Mapping) and images.get("channels") == now.channels:
        mean, std = (tuple(images.get(name) or ()) or None for name in ("mean", "std"))
    else:
        mean, std = (old.mean, old.std) if old.channels == now.channels else (None, None)
    fields = {
        "mean": mean,
        "std": std,
        "batch_size": old.batch_size,
        "val_batch_size": old.val_batch_size or old.batch_size,
        "ignore_orientation": old.ignore_orientation,
        "max_value": weights.max_value_of(payload),
        "fake_size": old.fake_size,
        "val_split": old.val_split,
        "val_files": old.val_files if "val_split" not in given.explicit else "",
    }
    if given["batch_size"] != old.batch_size and "batch_size" in given.explicit:
        fields["val_batch_size"] = given["batch_size"]
    return dataclasses.replace(
        now, **{name: value for name, value in fields.items() if name not in given.explicit}
    )


# Options of a network that replace a field of the checkpoint's: option -> field.
_OF_MODEL = {"num_classes", "input_size", "channels", "width_alpha", "base"}
_OF_QUANT = {"padding_after_quant", "stable", "stable_epoch"}
_OF_QUANTIZER: dict[str, Callable[[Any], tuple[str, Any]]] = {
    "bit": lambda value: ("levels", 2**value),
    "level": lambda value: ("levels", value),
    "enable": lambda value: ("enable", bool(value)),
    **{
        name: lambda value, name=name: (name, value)
        for name in (
            "quant_group", "boundary", "scale", "ratio", "correlate", "adaptive", "adaptive_restore", "grad_type",
            "grad_scale", "grad_delta", "grad_window", "grid", "custom",
        )
    },
}  # fmt: skip


def _is_of_network(option: str) -> bool:
    named = {"bits", *SINGLE_LAYERS} | _OF_MODEL | _OF_QUANT
    return option in named or option[:3] in ("fm_", "wt_", "ot_")


def _replaced(model: ModelConfig, given: Given) -> ModelConfig:
    """A checkpoint's network with the fields that options replace."""
    quant = model.quant
    for tag in TAGS:
        one = getattr(quant, tag)
        values = {name: given[name] for name in _OF_QUANT - {"padding_after_quant"} if name in given.explicit}
        for name, field_of in _OF_QUANTIZER.items():
            if f"{tag}_{name}" in given.explicit:
                field, value = field_of(given[f"{tag}_{name}"])
                values[field] = value
        if f"{tag}_half_range" in given.explicit:
            values["half_range"] = tag != "fm"
        if values:
            quant = dataclasses.replace(quant, **{tag: dataclasses.replace(one, **values)})
    if given.explicit & {*SINGLE_LAYERS}:
        parts = {tag: getattr(quant, tag) for tag in TAGS}
        fields = {"first_bit": None, "last_bit": None, "layer_bits": ()}
        fields = {name: fields[name] for name in given.explicit & {*SINGLE_LAYERS}}
        found = layer_options(given, parts, first_last=quant.first_last)
        quant = dataclasses.replace(quant, **(fields | found))
    if "padding_after_quant" in given.explicit:
        quant = dataclasses.replace(quant, padding_after_quant=True)
    fields = {name: given[name] for name in _OF_MODEL if name in given.explicit}
    return dataclasses.replace(model, quant=quant, **fields)
