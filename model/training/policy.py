"""Carries out policies: changes of quantizers and training options during a run (docs/policies.md).

`utils.config.policy_file` reads the file. `initialise` carries out its section `init` on a network that was just built;
`PolicyScheduler` plans all other sections before training begins and carries them out during it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from model.convert import full_precision
from model.layers.quantized import QuantLayer, keep_full_precision, quantized_layers, quantizers, selected
from model.quantizers.frame import Quantizer
from model.selection import close_layers
from utils.config.methods import PROJECT, record_of
from utils.config.policy_file import FACTORS, FLAGS, SECTIONS, TRAINING, WORDS, check_value, is_integer
from utils.config.schema import READ_ETA_MIN, RECORDED, OptimConfig, Rule
from utils.errors import UserError
from utils.step.optimizer import ParamGroup
from utils.step.schedule import Schedule
from utils.text import some_names

OTHER_NETWORK = {"enable", "half_range", "level_num"}  # accuracies before and after do not compare


@dataclass(frozen=True, kw_only=True)
class Change:
    """One changed value, of a named quantizer or of the training."""

    when: str
    target: str
    attribute: str
    old: Any
    new: Any

    def __str__(self) -> str:
        """A line of the log."""
        old = f"{self.old:.6g}" if isinstance(self.old, float) else self.old
        return f"policy, {self.when}: {self.target}: {self.attribute} {old} -> {self.new}"


def initialise(model: nn.Module, rules: Sequence[Rule]) -> tuple[Change, ...]:
    """Carry out the quantizer entries of `init`, before weights are loaded; returns the changes.

    Raises:
        UserError: an entry selects nothing, changes nothing or does not suit a quantizer.
    """
    changes: list[Change] = []
    for rule in rules:
        if rule.section == "init" and not rule.trains:
            changes += _plan_quantizers(rule, "init", model, {})
            for _, quantizer in _select(rule, model):
                for name, value in rule.values.items():
                    _set(quantizer, name, value, rescale=False)
    return tuple(changes)


def _select(rule: Rule, model: nn.Module) -> list[tuple[str, Quantizer]]:
    """The quantizers of a rule with their names.

    Raises:
        UserError: there is none, or an index has no layer.
    """
    layers = list(quantized_layers(model))
    for number in rule.index:
        if number >= len(layers):
            raise UserError(
                f"{rule}: index {number} has no layer, the last quantized one is {len(layers) - 1}"
            )
    found = selected(rule, model)
    if not found:
        raise UserError(f"{rule}: selects no quantizer; {_meant(rule, model, dict(layers))}")
    return found


def _meant(rule: Rule, model: nn.Module, layers: Mapping[str, QuantLayer]) -> str:
    """What a rule that selects nothing may have meant."""
    full = [name for name in full_precision(model) if fnmatchcase(name, rule.name)]
    if full and not rule.index and not rule.tag:
        return (
            f"{some_names(full)} {'is' if len(full) == 1 else 'are'} in full precision anyway: leave it out"
        )
    without = dataclasses.replace(
        rule, values={}
    )  # of values that pass over layers with bits or signs of their own
    own = dict.fromkeys(name.rpartition(".")[0] for name, _ in selected(without, model))
    if own and "half_range" in rule.values and all(layers[name].own_signs for name in own):
        return f"half_range of {some_names(own)} stays: query, key and value are signed, the softmax's output is not"
    if own:
        return f"the bits of {some_names(own)} are the layer's own: write such a name out to change them"
    return (
        close_layers(rule.name, layers).removeprefix("; ") if layers else "all layers are in full precision"
    )


def _get(quantizer: Quantizer, name: str) -> Any:
    """The current value of an attribute."""
    match name:
        case "level_num":
            return quantizer.levels
        case "enable":
            return quantizer.enabled
        case "boundary":
            return float(quantizer.current_range().abs().mean())
        case _:
            return getattr(quantizer.config, name)


def _set(quantizer: Quantizer, name: str, value: Any, *, rescale: bool = True) -> tuple[nn.Parameter, ...]:
    """Set an attribute; returns the parameters whose values it changed.

    Args:
        quantizer: the quantizer.
        name: one of `ATTRIBUTES`.
        value: an accepted value.
        rescale: whether the range is a trained one, so that `progressive` keeps the step.
    """
    match name:
        case "level_num":
            return quantizer.set_levels(value, keep_step=rescale and quantizer.config.progressive)
        case "enable":
            quantizer.enabled = value
        case "boundary":
            with torch.no_grad():
                quantizer.set_range(torch.full_like(quantizer.current_range(), value))
            return tuple(quantizer.parameters(recurse=False))
        case _:
            quantizer.config = dataclasses.replace(quantizer.config, **{name: value})
    return ()


def _check_suits(rule: Rule, name: str, value: Any, where: str, quantizer: Quantizer) -> None:
    """Refuse a value that the quantizer's method does not take."""
    config = quantizer.config
    method, record, fault = config.method, record_of(config.method, config.tag), ""
    if name == "level_num":
        try:
            quantizer.check_levels(value)
        except UserError as error:
            raise UserError(f"{rule}: {error}") from error
        if config.binary_scale and value != 2:
            fault = "the keyword wt_bin is for 1 bit"
    elif name == "half_range":
        if not quantizer.half_range_changes():
            fault = f"the levels of {method} cannot change their range here"
    elif name == "grad_type":
        if not record.takes_grad_type(value) or value in record.idle_grad_types:
            triangle = value == "Triangle"
            fault = (
                "Triangle belongs to binary activations" if triangle else f"{value} does not go with {method}"
            )
    elif name == "grad_scale" and record.ignores("grad_scale"):
        fault = (
            f"{method} learns no clipping value here" if method in PROJECT else f"{method} does not read it"
        )
    elif name in ("grad_delta", "grad_window") and record.ignores(name):
        fault = f"{method} does not read it"
    elif name in record.limits and value > record.limits[name][0]:
        most, reason, _ = record.limits[name]
        fault = f"{reason}, at most {most:g}"
    elif name == "boundary" and type(quantizer).set_range is Quantizer.set_range:
        fault = f"{method} has no clipping value here"
        if method not in PROJECT:
            fault = f"{method} has no set_range, by which a policy sets it"
    if fault:
        raise UserError(f"{rule}: {where}: {name} {value}: {fault}")


def _plan_quantizers(
    rule: Rule, when: str, model: nn.Module, values: dict[tuple[str, str], Any]
) -> list[Change]:
    """Plan a rule's changes, from attributes as in `values` or, where missing, as now; updates `values`."""
    changes: list[Change] = []
    for where, quantizer in _select(rule, model):
        for name, new in rule.values.items():
            _check_suits(rule, name, new, where, quantizer)
            old = values.get((where, name), _get(quantizer, name))
            values[where, name] = new
            if name == "boundary" and when != "init":
                old = "what is learned"
            if old != new:
                changes.append(Change(when=when, target=where, attribute=name, old=old, new=new))
        if (
            "grad_window" in rule.values
            and values.get((where, "grad_type"), quantizer.config.grad_type) == "none"
        ):
            raise UserError(
                f"{rule}: {where}: grad_window has no effect while grad_type is none: set grad_type, too, or name the "
                "tag with signs of another type"
            )
    if not changes and rule.number != RECORDED:
        said = ", ".join(f"{name} {value}" for name, value in rule.values.items())
        raise UserError(f"{rule} changes nothing at {when}: {said} is what the quantizers have already")
    return changes


class PolicyScheduler:
    """Carries out a policy during training; its state is part of a checkpoint.

    Args:
        rules: of the policy file; without any it does nothing.
        model: the network, after `initialise`.
        optimizer: of its parameters.
        groups: the optimizer's groups, in its order.
        optim: the options of the optimizer.
        rates: the learning rates.
        shortened: the command line has shortened the run, so entries beyond its end are dropped with a warning.

    Attributes:
        log: called with a line for each change.
        warnings: one for each dropped entry.
        optim: the current options of the optimizer.
        rates: the learning rates, with the base rates set so far.
        planned_rates: the same with all base rates that the policy will set.
        plan: all changes to come, in order.

    Raises:
        UserError: an entry selects nothing, changes nothing, lies beyond the run or does not suit what it selects.
    """

    def __init__(
        self, rules: Sequence[Rule], model: nn.Module, optimizer: Optimizer, groups: Sequence[ParamGroup],
        optim: OptimConfig, rates: Schedule, *, shortened: bool = False,
    ) -> None:  # fmt: skip
        self.optim, self.rates = optim, rates
        self.log: Callable[[str], object] = lambda line: None
        self.warnings: tuple[str, ...] = ()
        self._shortened = shortened
        self._rules, self._model = rules, model
        self._optimizer, self._groups = optimizer, groups
        self._done = {"epoch": -1, "iteration": -1}
        self._attributes: dict[str, dict[str, Any]] = {}
        self._options: dict[str, Any] = {}
        self.plan, self.planned_rates = self._planned()
        for rule in rules:
            if rule.section == "init" and rule.trains:
                self._set_options(rule.values, 0)
        self._note_kept_off()

    def _planned(self) -> tuple[tuple[Change, ...], Schedule]:
        """Plan all changes in order, without making any; returns them and the planned rates."""
        per_epoch, total = self.rates.steps_per_epoch, self.rates.total_steps
        limits = {"epoch": total // per_epoch, "iteration": total}
        events: list[tuple[int, int, int, Rule]] = []
        for rule in self._rules:
            for at in rule.at or (0,):
                if rule.section != "init" and at >= limits[rule.section]:
                    beyond = f"{rule}: at {at} is beyond the run of {limits[rule.section]} {rule.section}s"
                    if not self._shortened:
                        raise UserError(beyond)
                    self.warnings += (beyond,)
                    continue
                step = at * per_epoch if rule.section == "epoch" else at
                events.append((step, SECTIONS.index(rule.section), at, rule))
        values: dict[tuple[str, str], Any] = {}
        optim, rates, changes = self.optim, self.rates, list[Change]()
        self._events = sorted(events, key=lambda event: event[:2])
        for step, section, at, rule in self._events:
            when = "init" if section == 0 else f"{rule.section} {at}"
            if rule.trains:
                self._check_options(rule)
                made = _option_changes(when, optim, rule.values)
                if not made:
                    raise UserError(
                        f"{rule} changes nothing at {when}: the training has these values already"
                    )
                optim = dataclasses.replace(optim, **rule.values)
                rates = _with_base(rates, step, optim.lr)
                changes += made
            elif section > 0:
                changes += _plan_quantizers(rule, when, self._model, values)
        return tuple(changes), rates

    def _check_options(self, rule: Rule) -> None:
        """Refuse options that this training does not use."""
        config = self.rates.config
        for name, value in rule.values.items():
            if name == "custom_lr" and not any(group.custom_lr for group in self._groups):
                raise UserError(f"{rule}: custom_lr has no parameters; name them with --custom_lr_list")
            if name == "custom_decay" and not any(g.decay == "custom_decay_list" for g in self._groups):
                raise UserError(f"{rule}: custom_decay has no parameters; name them with --custom_decay_list")
            if name == "momentum" and "momentum" not in self._optimizer.param_groups[0]:
                raise UserError(f"{rule}: momentum belongs to --optimizer SGD")
            if name == "momentum" and value == 0 and self.optim.nesterov:
                raise UserError(f"{rule}: momentum 0: --nesterov needs a momentum above 0")
            if name == "lr" and config.policy in READ_ETA_MIN and value < config.eta_min:
                raise UserError(f"{rule}: lr {value} is below --eta_min {config.eta_min}")

    def _note_kept_off(self) -> None:
        """Record on each quantizer that is off when the run ends that it is so on purpose."""
        at_end = {name: quantizer.enabled for name, quantizer in quantizers(self._model)}
        for _, _, at, rule in self._events:
            if rule.section != "init" and at > self._done[rule.section] and "enable" in rule.values:
                at_end |= {name: rule.values["enable"] for name, _ in _select(rule, self._model)}
        for name, quantizer in quantizers(self._model):
            vars(quantizer).pop("full_precision_reason", None)  # of the policy before a resumed run's state
            if not at_end[name]:
                keep_full_precision(quantizer, "is switched off by --policy or --full_precision")

    @property
    def disables(self) -> bool:
        """Whether a quantizer is or will be turned off, so that a pass may not use its parameters."""
        planned = any(change.attribute == "enable" for change in self.plan)
        return planned or not all(quantizer.enabled for _, quantizer in quantizers(self._model))

    def describe(self, initial: Sequence[Change] = ()) -> str:
        """The plan as text for the dry run, with every layer it selects; empty without a policy."""
        return "\n".join(str(change) for change in (*initial, *self.plan))

    def advance(self, epoch: int, step: int) -> bool:
        """Carry out the changes due before optimizer step `step` (from 0) of the run, in `epoch` (from 0).

        Returns whether the network is a different one now, so that the best accuracy so far does not compare.
        """
        other = False
        for section, now in (("epoch", epoch), ("iteration", step)):
            due = sorted(
                ((at, rule) for rule in self._rules for at in rule.at
                 if rule.section == section and self._done[section] < at <= now),
                key=lambda event: event[0],
            )  # fmt: skip
            for at, rule in due:
                other |= self._carry_out(rule, f"{section} {at}", step)
            self._done[section] = max(self._done[section], now)
        return other

    def _carry_out(self, rule: Rule, when: str, step: int) -> bool:
        """Carry out and log a rule before a step; returns whether the network is a different one now."""
        if rule.trains:
            for change in _option_changes(when, self.optim, rule.values):
                self.log(str(change))
            self._set_options(rule.values, step)
            return False
        other = False
        for where, quantizer in _select(rule, self._model):
            for name, new in rule.values.items():
                old = _get(quantizer, name)
                if old == new:
                    continue
                for parameter in _set(quantizer, name, new):  # its momentum belongs to the old range
                    self._optimizer.state.pop(parameter, None)
                self.log(str(Change(when=when, target=where, attribute=name, old=old, new=new)))
                if name not in ("level_num", "boundary"):  # these are saved with the weights
                    self._attributes.setdefault(where, {})[name] = new
                other |= name in OTHER_NETWORK
        return other

    def _set_options(self, values: Mapping[str, Any], step: int) -> None:
        """Set training options from a step on, also in the optimizer's groups."""
        self._options |= values
        self.optim = dataclasses.replace(self.optim, **values)
        self.rates = _with_base(self.rates, step, self.optim.lr)
        for group, settings in zip(self._optimizer.param_groups, self._groups, strict=True):
            group.update(settings.settings(self.optim))
            if "momentum" in values:
                group["momentum"] = self.optim.momentum

    def state_dict(self) -> dict[str, Any]:
        """The state for a resumed run, beside weights and optimizer, as plain values."""
        attributes = {name: dict(values) for name, values in self._attributes.items()}
        return {
            "done": dict(self._done),
            "quantizers": attributes,
            "options": dict(self._options),
            "rates": [list(change) for change in self.rates.later],
        }

    def load_state_dict(self, state: Mapping[str, Any], step: int) -> None:
        """Continue from a `state_dict()`, without repeating changes; an empty one is a fresh start.

        Args:
            state: a `state_dict()`.
            step: the next iteration. A resumed run may have fewer iterations per epoch than before, so rates that
                were in force hold from this step on at the latest.

        Raises:
            UserError: it has a value that a policy cannot set.
            KeyError, TypeError, ValueError, AttributeError: it is no such state, or of a different network.
        """
        if not state:
            return
        where, later = "the checkpoint's policy", tuple((step, lr) for step, lr in state.get("rates", []))
        done = {section: state["done"][section] for section in self._done}
        if not all(map(is_integer, (*done.values(), *(step for step, _ in later)))):
            raise ValueError(f"{where} was carried out until {done}")
        own = dict(quantizers(self._model))
        settings = [(own[name], values) for name, values in state["quantizers"].items()]
        for known, values in (
            *(((*FLAGS, *WORDS, *FACTORS), values) for _, values in settings),
            (TRAINING, state["options"]),
            *((("lr",), {"lr": lr}) for _, lr in later),
        ):
            for name, value in values.items():
                if name not in known:
                    raise ValueError(f"{where} sets {name}")
                check_value(where, name, value)
        self._done = done
        for quantizer, values in settings:
            for name, value in values.items():
                _set(quantizer, name, value)
        self._attributes = {name: dict(values) for name, values in state["quantizers"].items()}
        later = tuple((min(begin, step), lr) for begin, lr in later)
        self.rates = dataclasses.replace(self.rates, later=later)
        # From step 0 where the checkpoint does not say from which step.
        self._set_options(state["options"], later[-1][0] if later else 0)
        self._note_kept_off()


def _with_base(rates: Schedule, step: int, lr: float) -> Schedule:
    """The rates with a different base rate from a step on."""
    if rates.base(step) == lr:
        return rates
    return dataclasses.replace(rates, later=(*rates.later, (step, lr)))


def _option_changes(when: str, optim: OptimConfig, values: Mapping[str, Any]) -> list[Change]:
    """The training options that `values` change."""
    return [
        Change(when=when, target="training", attribute=name, old=getattr(optim, name), new=value)
        for name, value in values.items()
        if getattr(optim, name) != value
    ]
