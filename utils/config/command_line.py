"""The command line: the parser built from the options' records, and the values given."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

from utils.config.image_size import input_size
from utils.config.option import Option, floats, integer, integers, keywords, words
from utils.config.options import GROUPS, OPTIONS
from utils.errors import UserError
from utils.text import closest


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are `UserError`s."""

    def error(self, message: str) -> NoReturn:
        raise UserError(_in_words(message))


def _in_words(message: str) -> str:
    """A message of argparse with what to write instead."""
    match = re.fullmatch(r"argument (\S+): (.*)", message)
    option = OPTIONS.get(match[1].rpartition("--")[2]) if match else None
    if match is None or option is None:
        return message
    name, said = f"--{option.name}", match[2]
    if said.startswith("expected "):
        return f"{name} needs a value: {option.help}"
    if said.startswith("ignored explicit argument"):
        return f"{name} takes no value: write {name} alone, or leave it out"
    value = re.match(r"invalid (?:\w+ value|choice): (['\"])(.*?)\1", said)
    if value is None:
        return f"{name}: {said}"
    if option.choices:
        close = closest(value[2], option.choices) or f"; write one of {', '.join(option.choices)}"
        return f"{name} {value[2]} is not known{close}"
    kind = {int: "a whole number", integer: "a whole number", float: "a number"}.get(
        option.kind, "another value"
    )
    return f"{name} {value[2]}: write {kind}: {option.help}"


def _stray(word: str, argv: Sequence[str]) -> str:
    """What a word that belongs to no option may have been meant for."""
    spellings = {spelling: one for one in OPTIONS.values() for spelling in (*one.aliases, f"--{one.name}")}
    option, values = None, list[str]()
    for each in argv:
        found = spellings.get(each.partition("=")[0])
        takes = option is not None and not (option.kind is bool or option.undoes)
        if found is None and each == word and len(values) >= takes:
            break
        values = [*values, each] if found is None else ["="] * ("=" in each)
        option = found or option
    if option is None:
        return "python main.py --help lists the options"
    name = f"--{option.name}"
    if option.kind is bool or option.undoes:
        return f"{name} takes no value, leave {word} out"
    if option.kind is input_size:
        return f"{name} takes one value, write {name} {'x'.join([*values, word])}"
    return f"{name} takes one value, with commas and without spaces where it is a list"


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="main.py", usage="python main.py [options]", allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Train image classifiers with low-bit weights and activations.",
        epilog="Usually: bash train.sh config/config.NAME [options]. Guide: docs/classification.md",
    )  # fmt: skip
    for title, group in GROUPS.items():
        section = parser.add_argument_group(title)
        for option in group:
            spellings = [*option.aliases, f"--{option.name}"]
            if option.undoes:
                section.add_argument(
                    *spellings, dest=option.name, action=_Undo, const=option.undoes, nargs=0, help=option.help
                )
                continue
            if option.kind is bool:
                section.add_argument(
                    *spellings, dest=option.name, action=_Flag, nargs=0, default=None, help=option.help
                )
                continue
            default = "" if option.default in (None, ()) else f" [{option.default}]"
            section.add_argument(
                *spellings, dest=option.name, action=_Last, const=option, type=option.kind, default=None,
                metavar=_metavar(option),
                choices=option.choices or None, nargs="+" if option.many else None,
                help=(option.help + default).replace("%", "%%"),
            )  # fmt: skip
    return parser


def _metavar(option: Option) -> str:
    if option.choices:
        return "{" + ",".join(option.choices) + "}"
    names = {
        int: "N",
        integer: "N",
        input_size: "N|HxW",
        float: "X",
        words: "WORDS",
        keywords: "WORDS",
        integers: "N,N",
        floats: "X,X",
    }
    return names.get(option.kind, option.name.upper())


_BARE = re.compile(r"--\w+")
_NEGATIVE = re.compile(r"-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.IGNORECASE)


def _canonical(argument: str) -> str:
    """Turn `--iter-size=2` into `--iter_size=2`; other arguments stay unchanged."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def _joined(arguments: Iterable[str]) -> list[str]:
    """Turn `--name -1.` into `--name=-1.`: argparse does not take every negative number as a value."""
    joined: list[str] = []
    for argument in arguments:
        if joined and _NEGATIVE.fullmatch(argument) and _BARE.fullmatch(joined[-1]):
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


class _Last(argparse.Action):
    """Stores the last of several values, and keeps the earlier ones in the namespace's `replaced`.

    `const` is the `Option`. With `many`, all its words become one tuple.
    """

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        option: Any = self.const
        if option.many:
            values = tuple(value for word in values for value in word)
        if values in option.unset:
            values = None
        before = getattr(namespace, self.dest)
        if before is not None:
            namespace.replaced.setdefault(self.dest, []).append(before)
        _write(namespace, self.dest, values)


class _Flag(argparse.Action):
    """A flag."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        _write(namespace, self.dest, True)


def _write(namespace: Any, name: str, value: Any) -> None:
    """Set a value and put its name behind all others: `Given.explicit` has the order of the command line."""
    delattr(namespace, name)
    setattr(namespace, name, value)


class _Undo(argparse.Action):
    """A flag that unsets the one named `const`."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        setattr(namespace, self.dest, True)
        setattr(namespace, str(self.const), None)


class Given(dict[str, Any]):
    """The values of all options by name.

    Attributes:
        explicit: the names that were written, each where it stands last on the command line.
        replaced: name -> the values that a later one on the same command line has replaced, in order; mostly
            those of a config, which comes before the user's options.
        through: name -> the option that was written instead and set it.
    """

    def __init__(
        self,
        written: dict[str, Any],
        replaced: Mapping[str, Sequence[Any]] | None = None,
        through: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__({name: option.default for name, option in OPTIONS.items()} | written)
        self.explicit = written.keys()
        self.replaced = dict(replaced or {})
        self.through = dict(through or {})


def parse(argv: Sequence[str]) -> Given:
    """The options of a command line.

    Raises:
        UserError: for an unknown option (with close names) or a value that does not fit.
        SystemExit: for `--help`.
    """
    start = argparse.Namespace(replaced={})
    known, unknown = _parser().parse_known_args(_joined(map(_canonical, argv)), start)
    if unknown:
        spellings = [f"--{name}" for name in OPTIONS] + [a for o in OPTIONS.values() for a in o.aliases]
        first = unknown[0].partition("=")[0]
        if not first.startswith("-"):
            raise UserError(f"{unknown[0]!r} is no option: {_stray(unknown[0], list(map(_canonical, argv)))}")
        close = difflib.get_close_matches(first, spellings, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "python main.py --help lists the options"
        if re.match("--.*(warm|wake)", first):  # never --warmup_epoch, which is the closest and takes no step
            hint = "the learning-rate warm-up is --wakeup_epoch, in epochs, or --wakeup, in iterations"
        raise UserError(f"unknown option {unknown[0]}: {hint}")
    written = {name: value for name, value in vars(known).items() if name in OPTIONS and value is not None}
    return Given(written, known.replaced)
