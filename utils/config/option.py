"""The record of an option, and the kinds of values that options take."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")
FOLDER = "folder"


def words(text: str) -> tuple[str, ...]:
    """Comma-separated words; spaces around them and empty ones are dropped."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def integer(text: str) -> int:
    """An integer, which may be written as 2.0."""
    number = float(text)
    if not number.is_integer():
        raise ValueError(text)
    return int(number)


def integers(text: str) -> tuple[int, ...]:
    """Comma-separated integers."""
    return _all(int, text, "whole numbers with commas between, like 2,4")


def floats(text: str) -> tuple[float, ...]:
    """Comma-separated numbers."""
    return _all(float, text, "numbers with commas between, like 0.5,0.25")


def _all(kind: Callable[[str], T], text: str, what: str) -> tuple[T, ...]:
    try:
        return tuple(kind(word) for word in words(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}") from error


def loss_type(text: str) -> str:
    """A distillation loss; soft is an older name of kl."""
    return "kl" if text == "soft" else text


def dataset(text: str) -> str:
    """A data set; folder is a second name of imagenet, any folder of images by class."""
    return "imagenet" if text == FOLDER else text


def keywords(text: str) -> tuple[str, ...]:
    """Comma-separated keywords; folder is a second name of imagenet, as for the data set."""
    return tuple("imagenet" if word == FOLDER else word for word in words(text))


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option.

    Attributes:
        name: with underscores; `--name` on the command line.
        kind: converts the text; `bool` is a flag that takes no value.
        default: the value when it is not given; `None`: derived, as the help says.
        help: one line, with the unit.
        aliases: other spellings, with their dashes.
        choices: the only values.
        many: takes several values.
        undoes: a flag that this one unsets when it comes later.
        unset: values that count as not given; configs of an earlier implementation write such defaults out.
    """

    name: str
    kind: Callable[[str], Any]
    default: Any
    help: str
    aliases: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    many: bool = False
    undoes: str = ""
    unset: tuple[Any, ...] = ()


def option(name: str, kind: Callable[[str], Any], default: Any, help: str, **rest: Any) -> Option:
    """Make an `Option`, with its first four fields by position."""
    return Option(name=name, kind=kind, default=default, help=help, **rest)
