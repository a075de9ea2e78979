"""The optimizer and its parameter groups, as ordered rules.

The rules put every trainable parameter into one group; parameters that get base rate and weight decay
from the same options share one.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from utils.config.schema import OptimConfig
from utils.errors import UserError

OPTIMIZERS = ("SGD", "ADAM")


class _Light:
    """Makes an optimizer without importing torch's compiler, which takes as long as importing torch itself.

    torch wraps this method so that the compiler leaves it alone, and the wrapper imports the compiler. A dry run
    makes an optimizer and never needs the compiler; a training imports it at its first step.
    """

    add_param_group = inspect.unwrap(Optimizer.add_param_group)


class _SGD(_Light, SGD):
    pass


class _Adam(_Light, Adam):
    pass


@dataclass(frozen=True, eq=False)
class ParamGroup:
    """Parameters with the same hyperparameters.

    Attributes:
        names: the parameters' names in the model, in the order of `parameters`.
        parameters: the trainable tensors.
        base_lr: the learning rate that the schedule multiplies.
        weight_decay: the factor of the L2 penalty's gradient.
        rules: the rules that put parameters here, each once, for the table.
        custom_lr: whether the base rate is `custom_lr`.
        decay: the option it comes from: "default" `weight_decay`, "custom_decay_list" `custom_decay`, "" none.
    """

    names: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]
    base_lr: float
    weight_decay: float
    rules: tuple[str, ...]
    custom_lr: bool = False
    decay: str = "default"

    def settings(self, config: OptimConfig) -> dict[str, float]:
        """The settings of the optimizer's group with the options `config`; the lists stay as they were."""
        decays = {"default": config.weight_decay, "custom_decay_list": config.custom_decay}
        return {
            "base_lr": config.custom_lr if self.custom_lr else config.lr,
            "weight_decay": decays.get(self.decay, 0.0),
        }


def check_optimizer(config: OptimConfig) -> None:
    """Refuse optimizer options that make no sense, as far as that shows without a model.

    Raises:
        UserError: names the option, its value and what it may be.
    """
    if config.name.upper() not in OPTIMIZERS:
        raise UserError(f"--optimizer {config.name} is not known: use one of {', '.join(OPTIMIZERS)}")
    for option, value in (
        ("lr", config.lr),
        ("weight_decay", config.weight_decay),
        ("custom_decay", config.custom_decay),
    ):
        if not 0 <= value < math.inf:
            raise UserError(f"--{option} {value} must be a number that is not negative")
    if not 0 <= config.momentum < 1:
        raise UserError(f"--momentum {config.momentum} must be at least 0 and below 1")
    if config.nesterov and config.momentum == 0:
        raise UserError("--nesterov needs a --momentum above 0")
    if config.grad_clip is not None and not 0 < config.grad_clip < math.inf:
        raise UserError(f"--grad_clip {config.grad_clip} must be positive: leave it out for no clipping")
    if config.iter_size < 1:
        raise UserError(f"--iter-size {config.iter_size} must be at least 1")
    if config.custom_lr_list and not 0 < config.custom_lr < math.inf:
        raise UserError(f"--custom_lr_list needs a positive --custom_lr, not {config.custom_lr}")


def depthwise_weights(model: nn.Module) -> frozenset[str]:
    """Name the weights of depth-wise convolutions: each group has one of several input channels.

    The weight alone does not tell: its second dimension is 1 in a convolution of a grey image too.
    """
    return frozenset(
        f"{name}.weight" if name else "weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and module.groups == module.in_channels > 1
    )


def untrained(model: nn.Module) -> list[str]:
    """Names of the state that no optimizer changes: frozen parameters and buffers."""
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    return [*frozen, *(name for name, _ in model.named_buffers())]


def idle_entries(model: nn.Module, config: OptimConfig) -> tuple[str, ...]:
    """Warn of list entries that match only what the optimizer does not train, such as LQ-Nets' `basis`."""
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    lists = {"custom_decay_list": config.custom_decay_list, "custom_lr_list": config.custom_lr_list}
    return tuple(
        f"--{option}: {entry} has no effect, what has this name is not trained by the optimizer"
        for option, entries in lists.items()
        for entry in entries
        if not _contains(trained, [entry])
    )


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    config: OptimConfig,
    depthwise: Collection[str] = (),
    untrained: Collection[str] = (),
) -> list[ParamGroup]:
    """Sort the trainable parameters into groups.

    Weight decay, the first rule that holds:

    1. `custom_decay` where the name contains an entry of `custom_decay_list`.
    2. 0 for small tensors, unless `decay_small`: those with at most one dimension larger than 1
       (biases, norms, clip values of quantizers, be they of shape [C], [1, 1, 1, 1] or [G, 1, 1, 1])
       and depth-wise kernels.
    3. `weight_decay`.

    Base rate: `custom_lr` where the name contains an entry of `custom_lr_list`, else `lr`.

    Args:
        named_parameters: as of `nn.Module.named_parameters`. A parameter with several names is taken once,
            under the first; an entry of a list may be part of any of them.
        config: the optimizer's options.
        depthwise: names of depth-wise kernels, see `depthwise_weights`.
        untrained: names of state that no optimizer changes; an entry of a list may match these alone,
            see `idle_entries`.

    Returns:
        The groups in the order in which the model first needs them.

    Raises:
        UserError: an option makes no sense, or an entry of a list is in no parameter's name.
    """
    check_optimizer(config)
    aliases: dict[nn.Parameter, list[str]] = {}
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            aliases.setdefault(parameter, []).append(name)
    every_name = [*(name for names in aliases.values() for name in names), *untrained]
    _check_entries("custom_decay_list", config.custom_decay_list, every_name)
    _check_entries("custom_lr_list", config.custom_lr_list, every_name)

    # Groups of different rules stay apart even at the same values: a policy may change one of them.
    members: dict[tuple[float, float, bool, str], list[nn.Parameter]] = {}
    rules: dict[tuple[float, float, bool, str], dict[str, None]] = {}  # the inner one is an ordered set
    for parameter, names in aliases.items():
        weight_decay, kind = _weight_decay(parameter, names, config, depthwise)
        custom = _contains(names, config.custom_lr_list)
        base_lr, rule = (config.custom_lr, f"{kind}, custom_lr_list") if custom else (config.lr, kind)
        key = (base_lr, weight_decay, custom, "" if kind in ("small", "depth-wise") else kind)
        members.setdefault(key, []).append(parameter)
        rules.setdefault(key, {})[rule] = None
    return [
        ParamGroup(
            names=tuple(aliases[parameter][0] for parameter in parameters),
            parameters=tuple(parameters),
            base_lr=key[0],
            weight_decay=key[1],
            rules=tuple(rules[key]),
            custom_lr=key[2],
            decay=key[3],
        )
        for key, parameters in members.items()
    ]


def groups_table(groups: Sequence[ParamGroup]) -> str:
    """Give the groups as an aligned text table, one line each and one for the sum."""
    rows = [("group", "tensors", "elements", "lr", "decay", "rule", "parameters")]
    for index, group in enumerate(groups):
        more = f", ... ({len(group.names) - 2} more)" if len(group.names) > 2 else ""
        rows.append(
            (
                str(index),
                str(len(group.parameters)),
                f"{_elements([group]):,}",
                f"{group.base_lr:g}",
                f"{group.weight_decay:g}",
                "; ".join(group.rules),
                ", ".join(group.names[:2]) + more,
            )
        )
    tensors = sum(len(group.parameters) for group in groups)
    rows.append(("sum", str(tensors), f"{_elements(groups):,}", "", "", "", ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if 0 < column < 5 else cell.ljust(width)  # numbers to the right
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def build_optimizer(model: nn.Module, config: OptimConfig) -> tuple[Optimizer, list[ParamGroup]]:
    """Make the optimizer of a model.

    Each group of the optimizer carries `base_lr`, which `utils.step.schedule.Schedule.apply` multiplies,
    and torch's own `param_names`. Both are plain values, so that a state dict loads with
    `weights_only=True`.

    Args:
        model: the model, on its device.
        config: the optimizer's options. Adam takes torch's default betas, not `momentum`.

    Returns:
        The optimizer and its groups, in the same order.

    Raises:
        UserError: see `parameter_groups`; or no parameter is trainable.
    """
    groups = parameter_groups(
        model.named_parameters(remove_duplicate=False), config, depthwise_weights(model), untrained(model)
    )
    if not groups:
        raise UserError("the model has no trainable parameter: there is nothing to train")
    settings = [
        {
            "params": list(zip(group.names, group.parameters, strict=True)),
            "lr": group.base_lr,
            "base_lr": group.base_lr,
            "weight_decay": group.weight_decay,
        }
        for group in groups
    ]
    if config.name.upper() == "SGD":
        return _SGD(settings, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov), groups
    return _Adam(settings, lr=config.lr), groups


def _weight_decay(
    parameter: Tensor, names: list[str], config: OptimConfig, depthwise: Collection[str]
) -> tuple[float, str]:
    """Give a parameter's weight decay and the rule that says so."""
    if _contains(names, config.custom_decay_list):
        return config.custom_decay, "custom_decay_list"
    if not config.decay_small:
        if sum(size > 1 for size in parameter.shape) <= 1:
            return 0.0, "small"
        if any(name in depthwise for name in names):
            return 0.0, "depth-wise"
    return config.weight_decay, "default"


def _contains(names: Iterable[str], entries: Iterable[str]) -> bool:
    """Tell whether one of the names contains one of the entries."""
    return any(entry in name for entry in entries for name in names)


def _check_entries(option: str, entries: Iterable[str], names: list[str]) -> None:
    """Refuse an entry of a list that is empty or in no name."""
    for entry in entries:
        if not entry:
            raise UserError(f"--{option} has an empty entry, which would match every parameter: leave it out")
        if not _contains(names, [entry]):
            # An entry is mostly a part of a name, so parts are compared as well as whole names.
            parts = dict.fromkeys(part for name in names for part in (name, *name.split(".")))
            close = get_close_matches(entry, parts, n=3, cutoff=0.5)
            hint = f"; close are {', '.join(close)}" if close else ""
            raise UserError(f"--{option}: no parameter's name contains '{entry}'{hint}")


def _elements(groups: Iterable[ParamGroup]) -> int:
    """Count the numbers in all tensors of the groups."""
    return sum(parameter.numel() for group in groups for parameter in group.parameters)
