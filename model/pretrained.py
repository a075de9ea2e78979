"""Weights of a checkpoint for a network that starts from them or is evaluated (`--pretrained`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from model.layers.quantized import quantized_weights, quantizers
from model.networks.grey import grey_state
from model.networks.published import published_weights
from model.networks.torchvision_resnet import from_torchvision
from model.quantizers.fixed import FixedWeight
from model.quantizers.frame import Quantizer
from model.quantizers.integers import QuantizedTensor
from model.trained import check_as_trained, levels_of
from utils.checkpoint import archive, weights
from utils.checkpoint.earlier_names import from_earlier
from utils.checkpoint.weights import LoadReport
from utils.config.schema import Config, ModelConfig
from utils.errors import UserError
from utils.processes import distributed


def load_pretrained(model: nn.Module, path: Path | str, config: Config) -> LoadReport:
    """Load weights into the network; quantizers that the file does not have keep their start values.

    For an evaluation the file must have everything that quantizers learn. The number of levels comes from the
    command line and not from the file, so that a 4-bit checkpoint can start a 2-bit network; an evaluation with
    another number of levels than that of the training is an error, and so is leaving out parts of the network.
    Training counts its iterations from zero, so that a warm-up takes place. A training on grey images may start from
    weights for colours, see `model.networks.grey`.

    Args:
        model: the network; its weights and quantizers change in place.
        path: the checkpoint, or the library whose published weights they are: `torchvision` or `timm`.
        config: `run.evaluate`, `run.ema_weights` and `run.unresume_scope` are read.

    Raises:
        UserError: the file is damaged, lacks something, or was trained with other levels than it is evaluated with;
            or a training would start from a value that is not finite.
    """
    if isinstance(path, str):
        folder = config.run.weights_dir / config.model.name
        source, path = path, Path(path)
        # One process fetches them and gives them to the others, which may be on machines without a network.
        payload = distributed.broadcast(lambda: published_weights(source, config.model, folder))
    else:
        payload = archive.read(path)
    return load_payload(model, payload, path, config)


def load_payload(model: nn.Module, payload: Mapping[str, Any], path: Path, config: Config) -> LoadReport:
    """As `load_pretrained`, of a file that was read already."""
    if FIXED in payload:
        _fix_weights(model, payload[FIXED], path, config)
    state = network_state(payload, model, config.model, str(path))
    if config.run.ema_weights:
        state |= _averaged(payload, path)
    summed: tuple[str, ...] = ()
    if not config.run.evaluate:
        state, summed = grey_state(state, model, config.model)
    own = dict(quantizers(model))
    for name, quantizer in own.items():
        for theirs, ours in quantizer.published.items():
            if f"{name}.{theirs}" in state:
                state[f"{name}.{ours}"] = state.pop(f"{name}.{theirs}")
    if config.run.evaluate:
        check_as_trained(payload, state, model, config, str(path))
    held = set(state)
    for name, quantizer in own.items():
        levels = state.get(f"{name}.level_num")
        trained = None if levels is None else levels_of(levels, str(path))
        own_counters = {f"{name}.level_num": quantizer.level_num}
        if not config.run.evaluate:
            own_counters[f"{name}.iteration"] = quantizer.iteration
        state.update({key: value for key, value in own_counters.items() if key in state})
        if not quantizer.calibrates:  # left in the file by a warm-up of the run that wrote it
            state.pop(f"{name}.range_mean", None)
            clip = state.pop(f"{name}.clip", None)
            if clip is not None:
                with torch.no_grad():
                    quantizer.set_range(clip)
        present = {part for part in quantizer.state_dict() if f"{name}.{part}" in state}
        if trained is not None and (trained != quantizer.levels or quantizer.of_another_method(present)):
            prefix = f"{name}."
            theirs = {
                key.removeprefix(prefix): state.pop(key) for key in list(state) if key.startswith(prefix)
            }
            state.update({prefix + key: value for key, value in quantizer.adapted(theirs).items()})
    needed: set[str] = set()
    if config.run.evaluate:
        needed = {f"{name}.{part}" for name, one in own.items() if one.enabled for part in one.learned()}
    prefixes = tuple(f"{name}." for name in own)
    held -= set(state)
    report = weights.load_weights(
        model,
        state,
        allow_missing=lambda name: name.startswith(prefixes) and name not in needed,
        scope=config.run.unresume_scope,
        whole=config.run.evaluate,
        source=str(path),
    )
    if not config.run.evaluate:  # an evaluation names the layer where it shows
        loaded = model.state_dict()
        weights.check_finite(((name, loaded[name]) for name in report.loaded), f"--pretrained {path}")
    head = _last_layer(model, config.model.num_classes)
    return dataclasses.replace(
        report,
        source=str(path),
        summed=tuple(name for name in summed if name in report.loaded),
        # Counters that start at zero although the file has them are not missing.
        missing=tuple(name for name in report.missing if name not in held),
        classes=() if head and head <= set(report.skipped) else weights.class_names_of(payload),
        max_value=weights.max_value_of(payload),
        warning=_unknown_norm(payload, config.model, str(path)),
    )


def _unknown_norm(payload: Mapping[str, Any], config: ModelConfig, source: str) -> str:
    """A warning where nothing says whether weights for `reverse-bn` were trained with it; empty otherwise."""
    recorded = payload.get("config")
    if config.norm != "reverse" or (
        isinstance(recorded, Mapping) and isinstance(recorded.get("model"), Mapping)
    ):
        return ""
    return (
        f"{source} does not say with which norm it was trained: with reverse-bn weights of a plain batch norm compute "
        "something else; leave reverse-bn out unless it was trained with it"
    )


FIXED = "quantized_weights"  # the entry of a checkpoint from a packed file: layer -> integers of its weight


def stored_of(entry: Mapping[str, Any]) -> QuantizedTensor:
    """A quantized weight from an entry of `FIXED`: numbers, int32 of its shape, and what gives them a meaning."""
    numbers = entry["numbers"]
    rows = entry.get("rows")
    codes = numbers * entry["code_step"] + entry["first_code"]
    if "codes" in entry:  # at uneven distances
        codes = torch.tensor(entry["codes"], dtype=torch.int32)[numbers.long()]
    return QuantizedTensor(
        codes=codes,
        scale=entry.get("scale"),
        numbers=numbers.long(),
        codebook=entry["codebook"],
        factor=entry["factor"],
        zero_point=entry["zero_point"],
        offset=entry.get("offset"),
        rows=None if rows is None else rows.long(),
        deviation=entry.get("deviation"),
        mean=entry.get("mean"),
        gamma=entry.get("gamma"),
    )


def _fix_weights(model: nn.Module, fixed: Mapping[str, Any], path: Path, config: Config) -> None:
    """Take the quantizers of the weights away whose values a checkpoint has quantized already."""
    if not config.run.evaluate:
        raise UserError(
            f"{path} comes from a packed file and has quantized weights alone, which cannot be trained: give the "
            "checkpoint that was exported"
        )
    layers = {name: layer for name, layer, _ in quantized_weights(model)}
    for name, entry in fixed.items():
        if name not in layers:
            raise UserError(f"{path} does not fit the network: {name} has no quantized weight there")
        quantizer = layers[name].quant_weight
        assert isinstance(quantizer, Quantizer)  # quantized_weights says so
        layers[name].quant_weight = FixedWeight(quantizer, stored_of(entry))
        layers[name].weight_is_whole = True


def _last_layer(model: nn.Module, classes: int) -> set[str]:
    """The names of the parameters of the layer that tells the classes apart: the last with an output for each."""
    found: set[str] = set()
    for name, module in model.named_modules():
        own = dict(module.named_parameters(prefix=name, recurse=False))
        if any(one.ndim > 1 and one.shape[0] == classes for one in own.values()):
            found = set(own)
    return found


def network_state(
    payload: Mapping[str, Any], network: nn.Module, config: ModelConfig, source: str
) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint under the network's names, see `state_dict_of` and the libraries' ones."""
    own = network.state_dict()
    state = from_earlier(weights.state_dict_of(payload, source=source, names=own), config.name, own)
    return from_torchvision(state, network, config, source, reverse=_may_be_reverse(payload))


def _may_be_reverse(payload: Mapping[str, Any]) -> bool:
    """Whether the weights may be of a network with `reverse-bn`.

    A checkpoint of this project says so; libraries publish bare weights, and of other checkpoints nothing is known.
    """
    recorded = payload.get("config")
    network = recorded.get("model") if isinstance(recorded, Mapping) else None
    norm = network.get("norm", "reverse") if isinstance(network, Mapping) else "reverse"
    return weights.wrapper_of(payload) is not None and norm == "reverse"


def _averaged(payload: Mapping[str, Any], path: Path) -> dict[str, torch.Tensor]:
    """The averaged weights of a checkpoint."""
    methods = payload.get("methods", {})
    average = methods.get("average", {}) if isinstance(methods, dict) else {}
    if not average:
        raise UserError(f"--ema_weights: {path} has none; it was trained without --ema_decay")
    return dict(average["weights"])
