"""Which layers of a network are quantized, and the report about it; see `model.convert`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn

from utils.config.checks import Checks
from utils.errors import UserError
from utils.text import closest, format_table, printable, some_names


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which layers of a network are quantized.

    A pattern is matched against the whole name of a layer, as the shell matches file names: `*` stands for any
    text, dots included, so that `backbone.*` is everything inside `backbone`. Upper and lower case differ.
    A layer that is held in several places has several names, and matches by any of them.
    The fields `first_last` and `depthwise` of the configuration decide about the first and the last layer and
    about depth-wise convolutions.

    Attributes:
        convolutions: select `nn.Conv1d` and `nn.Conv2d`.
        linears: select `nn.Linear`.
        include: patterns; a layer must match one of them.
        exclude: patterns; a layer that matches one of them stays in full precision.
        signed: patterns of layers whose input goes below zero. Their activations get symmetric levels even where
            the configuration has levels from zero up (`half_range`), which would clip every negative value to 0.

    Raises:
        UserError: patterns are a string instead of a tuple, or a value is of the wrong type.

    Example:
        >>> from torch import nn
        >>> from model.convert import Selection, quantize
        >>> from model.quant import QuantConfig, QuantizerConfig
        >>> body = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        >>> network = nn.ModuleDict({"stem": nn.Linear(4, 4), "body": body, "head": nn.Linear(4, 4)})
        >>> config = QuantConfig(wt=QuantizerConfig(tag="wt", enable=True, method="lsq", levels=4))
        >>> quantize(network, config, select=Selection(include=("body.*",), exclude=("body.1",))).replaced
        ('body.0',)
    """

    convolutions: bool = True
    linears: bool = True
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    signed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse values of the wrong type; a list of patterns becomes a tuple."""
        check = Checks(self)
        check.flags()
        for name in ("include", "exclude", "signed"):
            check.strings(name)

    def check_patterns(self, known: Sequence[str]) -> None:
        """Refuse, with a `UserError`, a pattern that matches none of the names of a network's layers."""
        for pattern in (*self.include, *self.exclude, *self.signed):
            if not matches(pattern, known):
                close = difflib.get_close_matches(pattern, known, n=3)
                hint = f"did you mean {' or '.join(close)}?" if close else "`*` stands for any text"
                raise UserError(f"no layer is called {printable(pattern)}; {hint}")


class Left(NamedTuple):
    """A layer that stays as it was, and why.

    Attributes:
        name: the name of the layer in the network.
        reason: the rest of a sentence about it.

    Example:
        >>> from model.convert import Left
        >>> name, reason = Left("conv1", "is the first layer")
        >>> print(name, reason)
        conv1 is the first layer
    """

    name: str
    reason: str


@dataclass(frozen=True)
class Report:
    """The layers of a network that were quantized, and the layers that were not.

    Attributes:
        replaced: names of the layers that became quantized ones, in the order of definition.
        left: the other layers that multiply by weights, in the order of definition.

    Example:
        >>> from model.convert import Left, Report
        >>> print(Report(replaced=("layer1", "layer2"), left=(Left("conv1", "is the first layer"),)).table())
        layer  left because it
        -----  ------------------
        conv1  is the first layer
        quantized 2 layers, left 1 as they were
    """

    replaced: tuple[str, ...]
    left: tuple[Left, ...]

    def table(self) -> str:
        """A line for each layer that was left, and a line of totals."""
        total = f"quantized {len(self.replaced)} layers, left {len(self.left)} as they were"
        rows = format_table(("layer", "left because it"), [*self.left])
        return f"{rows}\n{total}" if self.left else total


def all_names(module: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """All names of each layer under the first of them, which is the one in `layers`."""
    first = {layer: name for name, layer in layers.items()}
    found: dict[str, list[str]] = {name: [] for name in layers}
    for name, layer in module.named_modules(remove_duplicate=False):
        if layer in first:
            found[first[layer]].append(name)
    return found


def matches(pattern: str, names: Iterable[str]) -> bool:
    """Whether a pattern matches any of a layer's names."""
    return any(fnmatchcase(name, pattern) for name in names)


def close_layers(pattern: str, names: Iterable[str]) -> str:
    """The layers and groups of layers, as patterns, whose names are close to a pattern, as the end of a message.

    Example:
        >>> from model.selection import close_layers
        >>> close_layers("layer5.*", ["layer1.conv1", "layer1.conv2", "fc"])
        '; did you mean layer1.*, layer1.conv2, layer1.conv1?'
    """
    names = list(names)
    parts = [name.split(".") for name in names]
    groups = {".".join(part[:i]) + ".*" for part in parts for i in range(1, len(part))}
    return closest(pattern, {*names, *groups}) or f"; layers are {some_names(names)}"
