"""Checks that a configuration makes of its own values, for programs that build one in Python."""

from __future__ import annotations

import dataclasses
import difflib
import math
import sys
from collections.abc import Mapping
from typing import Any

from utils.errors import UserError

LARGEST = sys.float_info.max


class Checks:
    """Checks of a dataclass's own values; what is wrong is a `UserError` that says what to write instead.

    NumPy's scalars become Python's: `numpy.int64(4)` is a whole number and `numpy.True_` is True. Nothing else is
    converted: 4.0 and "4" are no whole numbers, and 1 is not True.
    """

    def __init__(self, config: Any) -> None:
        self._config, self._kind = config, type(config).__name__
        for item in dataclasses.fields(config):
            value = getattr(config, item.name)
            if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
                object.__setattr__(config, item.name, value.item())  # a frozen one, too

    def error(self, name: str, problem: str) -> UserError:
        """The error about the value of a field; `problem` is the rest of a sentence about it."""
        return UserError(f"{self._kind}: {name} {shown(getattr(self._config, name))} {problem}")

    def choice(self, name: str, choices: tuple[str, ...]) -> None:
        """One of some words."""
        value = getattr(self._config, name)
        if not isinstance(value, str) or value not in choices:
            known = f"use one of {', '.join(map(repr, choices))}"
            if not isinstance(value, str):
                raise self.error(name, f"is not a word: {known}")
            folded = {choice.replace("-", "").lower(): choice for choice in choices}
            word = value.replace("_", "").replace("-", "").lower()
            close = difflib.get_close_matches(word, folded, n=1)
            raise self.error(
                name, f"is not known: {f'did you mean {folded[close[0]]!r}?' if close else known}"
            )

    def number(self, name: str, least: float, most: float) -> None:
        """A finite number in a range, ends included."""
        value = getattr(self._config, name)
        plain = isinstance(value, int | float) and not isinstance(value, bool)
        # Compared before it becomes a float, which a large integer cannot.
        if not plain or not max(least, -LARGEST) <= value <= min(most, LARGEST):
            limits = "finite" if math.isinf(most) else f"from {least:g} to {most:g}"
            raise self.error(name, f"must be a number, {limits}")

    def integer(self, name: str, least: int, most: int | None = None) -> None:
        """A whole number in a range, ends included."""
        value = getattr(self._config, name)
        plain = isinstance(value, int) and not isinstance(value, bool)
        if plain and most is None and value >= 2**63:
            raise self.error(name, "must be a whole number below 2^63")
        if not plain or value < least or (most is not None and value > most):
            limits = f"of {least} or more" if most is None else f"from {least} to {most}"
            close = _as_whole(value)
            fits = close is not None and close >= least and (most is None or close <= most)
            raise self.error(name, f"must be a whole number {limits}{f': write {close}' if fits else ''}")

    def flags(self) -> None:
        """Every field that is declared as a truth value is one."""
        for item in dataclasses.fields(self._config):
            if item.type == "bool" and not isinstance(getattr(self._config, item.name), bool):
                raise self.error(item.name, "must be True or False")

    def names(self, name: str) -> None:
        """A mapping whose keys are strings."""
        value = getattr(self._config, name)
        if not isinstance(value, Mapping):
            raise self.error(name, 'must be a mapping from names to values, such as {"name": 1}')
        for key in value:
            if not isinstance(key, str):
                raise self.error(name, f"must have names as keys, which {shown(key)} is not")

    def strings(self, name: str) -> None:
        """A tuple of strings; a list becomes one."""
        value = getattr(self._config, name)
        if isinstance(value, str):
            raise self.error(name, f"must be a tuple: write ({value!r},)")
        if not isinstance(value, tuple | list) or not all(isinstance(entry, str) for entry in value):
            raise self.error(name, 'must be a tuple of strings, such as ("layer1.*", "fc")')
        object.__setattr__(self._config, name, tuple(value))


def shown(value: object) -> str:
    """A value in a message, cut off where it is long."""
    try:
        text = repr(value)
    except Exception:  # of a class of the user's own
        text = f"of class {type(value).__name__}"
    return text if len(text) <= 100 else f"{text[:97]}..."


def unlike(value: object, kind: type) -> str:
    """How a value is not of the class `kind`, for messages; this package may be imported under two names."""
    if type(value).__name__ == kind.__name__:
        return f"of {type(value).__module__}, another copy of {kind.__module__}: import both from one package"
    return shown(value)


def _as_whole(value: object) -> int | None:
    """The whole number that "4" and 4.0 mean; None where there is none."""
    try:
        number = float(value) if isinstance(value, str | float) else math.nan
    except ValueError:
        return None
    return int(number) if number.is_integer() else None
