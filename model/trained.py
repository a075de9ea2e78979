"""Whether a network that is evaluated or resumed is the one that a checkpoint was trained as."""

from __future__ import annotations

import dataclasses
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from model.layers.bits import single_settings
from model.layers.quantized import quantizers, selected
from utils.checkpoint.run_state import CHANGEABLE
from utils.config.layer_bits import PARTS, SINGLE_LAYERS, LayerBits
from utils.config.recorded import to_dict
from utils.config.schema import TAGS, Config, QuantConfig, Rule
from utils.config.spelling import changed, word_of
from utils.errors import UserError
from utils.text import some_names

FULL, TERNARY = "32", "ternary"  # words of --bits
SWITCHED = ("enable", "half_range")  # what policies set and a checkpoint's tensors do not hold
# Fields of quantizers that tensors of a checkpoint decide, or that matter while training alone.
OF_TRAINING = CHANGEABLE | {"levels", "enable", "tag", "ratio", "custom_update", "extra"}
# Norms whose evaluation is the same.
SAME_NORMS = {"batch", "static", "frozen"}

Values = dict[tuple[str, str], Any]  # (quantizer, attribute) -> value


def check_as_trained(
    payload: Mapping[str, Any], state: Mapping[str, Tensor], model: nn.Module, config: Config, source: str
) -> None:
    """Refuse to evaluate a checkpoint as another network than it was trained as, where the weights would fit.

    Args:
        payload: the checkpoint.
        state: its weights under the network's names.
        model: the network.
        config: of the evaluation.
        source: names the checkpoint in messages.

    Raises:
        UserError: it has other quantizers, at other bits or switched off, or was trained with other options that
            decide what the network computes.
    """
    recorded = payload.get("config")
    network = recorded.get("model") if isinstance(recorded, Mapping) else None
    if not isinstance(network, Mapping) or not isinstance(network.get("quant"), Mapping):
        network = {}  # of another program
    try:
        _check_single_layers(network.get("quant", {}), model, config.model.quant, source)
        _check_quantizers(state, model, config, network, source)
        if network:
            _check_switched(payload, model, config, source)
            _check_fields(network, config, source)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{source} is damaged: its config is not what this program writes ({type(error).__name__}); use "
            "another file"
        ) from error


def switched(rules: Iterable[Rule], state: Mapping[str, Any], model: nn.Module) -> Values:
    """The quantizers that are off, and those whose range is another one, by a policy's rules and its state.

    Args:
        rules: of `--policy` and `--full_precision`; those of `init` count.
        state: a `PolicyScheduler.state_dict()`, which has what later rules have set; may be empty.
        model: the network.
    """
    found: Values = {}
    for rule in rules:
        if rule.section == "init" and not rule.trains:
            for name, _ in selected(rule, model):
                found |= {(name, each): rule.values[each] for each in SWITCHED if each in rule.values}
    later = state.get("quantizers", {})
    for name, values in later.items() if isinstance(later, Mapping) else ():
        found |= {(name, each): values[each] for each in SWITCHED if each in values}
    return {key: value for key, value in found.items() if (key[1], value) != ("enable", True)}


def recorded_rules(payload: Mapping[str, Any]) -> tuple[Rule, ...]:
    """The rules of the policy that a checkpoint was trained with."""
    config = payload.get("config")
    entries = config.get("policy") if isinstance(config, Mapping) else None
    found = []
    for entry in entries if isinstance(entries, list) else ():
        try:
            lists = {name: tuple(entry[name]) for name in ("at", "index") if name in entry}
            found.append(Rule(**{**entry, **lists}))
        except TypeError:  # of another version
            continue
    return tuple(rule for rule in found if rule.values)


def _check_quantizers(
    state: Mapping[str, Tensor], model: nn.Module, config: Config, network: Mapping[str, Any], source: str
) -> None:
    """Refuse a network that has other quantizers than the checkpoint, or at other bits."""
    theirs: dict[str, dict[str, int]] = {tag: {} for tag in TAGS}
    present = set()
    for key in state:
        layer, _, last = key.rpartition(".")
        for part, tag in PARTS.items():
            if layer == part or layer.endswith(f".{part}"):
                present.add(tag)
                if last == "level_num":
                    theirs[tag][layer] = levels_of(state[key], source)
    ours = {name: (one.config.tag, one.levels) for name, one in quantizers(model)}
    used = {tag for tag, _ in ours.values()}
    asked = " and ".join(
        dict.fromkeys(config.origins.get(f"{tag}_enable", f"--{tag}_enable") for tag in TAGS if tag in used)
    )
    known = bool(network)
    if used and not present:
        if known:
            raise UserError(
                f"{source} was trained in full precision: leave {asked} out, or write --bits 32 behind a config"
            )
        return
    word = _bits(theirs)
    if present and not used:
        method = (
            next((_method_word(network, tag) for tag in ("wt", "fm", "ot") if tag in present), "")
            or "of its method"
        )
        raise UserError(
            f"{source} has quantizers, and the options ask for full precision: add the keyword {method} and "
            f"{_as_options(word, theirs)}"
        )
    wrong = [name for name, (tag, levels) in ours.items() if theirs[tag].get(name, levels) != levels]
    missing = [TAGS[tag] for tag in TAGS if tag in used - present and (known or any(theirs.values()))]
    further = [TAGS[tag] for tag in TAGS if tag in present - used]
    if not (wrong or missing or further):
        return
    policy = any(rule.section == "init" and "level_num" in rule.values for rule in config.policy)
    mixed = any(len(set(levels.values())) > 1 for levels in theirs.values())
    behind = " with the --policy that it was trained with" if mixed else " without --policy" if policy else ""
    if wrong:
        tag, levels = ours[wrong[0]]
        what = f"{wrong[0]} at {theirs[tag][wrong[0]]} levels, and the options say {levels}"
    else:
        what = f"{missing[0]}s in full precision" if missing else f"quantized {further[0]}s, too"
    raise UserError(f"{source} was trained with {what}: write {_as_options(word, theirs)}{behind}")


def levels_of(value: Tensor, source: str) -> int:
    """A `level_num` of a checkpoint."""
    if value.numel() != 1 or not 2 <= float(value) <= 2**16:
        raise UserError(f"{source} is damaged: a level_num is {value.tolist()}; use another file")
    return int(value)


def _method_word(network: Mapping[str, Any], tag: str) -> str:
    """The keyword of the method that a recorded network's quantizers of a tag have; empty where it is not known."""
    part = network.get("quant", {}).get(tag, {})
    return word_of(f"model.quant.{tag}.method", part.get("method"))


def _bits(levels: Mapping[str, Mapping[str, int]]) -> str:
    """The value for `--bits` that means the levels of weights and inputs; empty where there is none."""
    words = []
    for tag in ("wt", "fm"):
        most = _most(levels[tag])
        word = FULL if most is None else TERNARY if most == 3 else str(most.bit_length() - 1)
        if most is not None and most != 3 and most & (most - 1):
            return ""
        words.append(word)
    return "/".join(dict.fromkeys(words))


def _most(levels: Mapping[str, int]) -> int | None:
    """The number of levels that most quantizers have."""
    return Counter(levels.values()).most_common(1)[0][0] if levels else None


def _as_options(word: str, levels: Mapping[str, Mapping[str, int]]) -> str:
    """The options that mean the levels of a checkpoint."""
    parts = [f"--bits {word}"] if word and word != FULL else []
    tags = ("ot",) if parts else ("fm", "wt", "ot")
    parts += [f"--{tag}_enable --{tag}_level {_most(levels[tag])}" for tag in tags if levels[tag]]
    return " ".join(parts) or "the options that it was trained with"


def _check_switched(payload: Mapping[str, Any], model: nn.Module, config: Config, source: str) -> None:
    """Refuse quantizers that are on or off, or signed or unsigned, by another policy than in the training."""
    if not isinstance(payload["config"].get("policy"), list):
        return
    rules, state = recorded_rules(payload), payload.get("policy", {})
    before = switched(rules, state if isinstance(state, Mapping) else {}, model)
    now = switched(config.policy, {}, model)
    if before == now:
        return
    different = {
        name for name, each in before.keys() | now.keys() if before.get((name, each)) != now.get((name, each))
    }
    layers = dict.fromkeys(name.rpartition(".")[0] for name, _ in quantizers(model) if name in different)
    named, ours = _patterns(rules), _patterns(config.policy)
    policy = any(rule.number for rule in config.policy)
    if switched([rule for rule in rules if not rule.number], {}, model) == before:
        parts = [
            f"leave {'--full_precision' if ours else ''}{' and ' * (bool(ours) and policy)}{'--policy' * policy} out"
        ]
        if named:
            parts = [
                f"write --full_precision {shlex.quote(','.join(named))}",
                *["leave --policy out"] * policy,
            ]
    elif switched(rules, {}, model) == before:
        also = f" and --full_precision {shlex.quote(','.join(named))}" * bool(named)
        also = also or " and leave --full_precision out" * bool(ours)
        parts = [f"give the --policy that it was trained with{also}"]
    else:
        parts = ["give a --policy whose entries of init set what was in force when it was saved"]
    raise UserError(
        f"{source} was trained with other quantizers switched off than the options say, those of "
        f"{some_names(layers)}: {' and '.join(parts)}"
    )


def _patterns(rules: Sequence[Rule]) -> list[str]:
    """The patterns of `--full_precision`."""
    return [rule.name for rule in rules if rule.section == "init" and rule.number == 0]


def _check_fields(network: Mapping[str, Any], config: Config, source: str) -> None:
    """Refuse options and keywords that make another network of the same weights."""
    now: dict[str, Any] = to_dict(config.model)
    quant, recorded = now["quant"], network.get("quant", {})
    pairs = [
        (f"model.quant.{tag}.", recorded.get(tag, {}), quant[tag]) for tag in TAGS if quant[tag]["enable"]
    ]
    if config.model.quant.enabled:
        pairs.append(("model.quant.", recorded, quant))
    if network.get("name") == config.model.name:
        pairs += [(f"model.{part}.", network.get(part, {}), now[part]) for part in ("block", "stem")]
        pairs.append(
            ("model.", {each: network.get(each) for each in ("norm", "activation") if each in network}, now)
        )
    for prefix, before, values in pairs:
        for name in before.keys() & values.keys():
            old, new = before[name], values[name]
            alike = name == "norm" and {old, new} <= SAME_NORMS
            idle = name in OF_TRAINING or name in TAGS or name in ("zero_init", "fixup", *SINGLE_LAYERS)
            if old != new and not (alike or idle):
                raise _other_network(prefix + name, old, new, source)


def _check_single_layers(
    recorded: Mapping[str, Any], model: nn.Module, quant: QuantConfig, source: str
) -> None:
    """Refuse other bits of single layers, where both networks quantize: other numbers of levels follow from them."""
    now: dict[str, Any] = to_dict(quant)
    if not all(any(each.get(tag, {}).get("enable") for tag in TAGS) for each in (recorded, now)):
        return
    for name in SINGLE_LAYERS:
        if name not in recorded or recorded[name] == now[name]:
            continue
        if name == "layer_bits":
            rules = tuple(LayerBits(**{**rule, "names": tuple(rule["names"])}) for rule in recorded[name])
            if single_settings(model, dataclasses.replace(quant, layer_bits=rules)) == single_settings(
                model, quant
            ):
                continue
        raise _other_network(f"model.quant.{name}", recorded[name], now[name], source)


def _other_network(field: str, before: Any, now: Any, source: str) -> UserError:
    return UserError(
        f"{source} was trained as another network: {changed(field, before, now)}; evaluate it with the options that "
        "trained it"
    )


def network_changed(payload: Mapping[str, Any], model: nn.Module, config: Config) -> bool:
    """Whether a resumed network has other quantizers switched off than when its checkpoint was saved."""
    state = payload.get("policy", {})
    return switched(recorded_rules(payload), state, model) != switched(config.policy, state, model)
