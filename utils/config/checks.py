"""Checks that a configuration makes of its own values, for programs that build one in Python."""

from __future__ import annotations

import dataclasses
import difflib
import math
from typing import Any

from utils.errors import UserError


class Checks:
    """Checks of a dataclass's own values; what is wrong is a `UserError` that says what to write instead."""

    def __init__(self, config: Any) -> None:
        self._config, self._kind = config, type(config).__name__

    def choice(self, name: str, choices: tuple[str, ...]) -> None:
        """One of some words."""
        value = getattr(self._config, name)
        if value not in choices:
            close = difflib.get_close_matches(str(value), choices, n=1)
            folded = str(value).replace("_", "").replace("-", "").lower()
            close = close or [choice for choice in choices if choice.replace("-", "").lower() == folded]
            hint = f"did you mean {close[0]!r}?" if close else f"use one of {', '.join(map(repr, choices))}"
            raise UserError(f"{self._kind}: {name} {value!r} is not known: {hint}")

    def number(self, name: str, least: float, most: float) -> None:
        """A finite number in a range, ends included."""
        value = getattr(self._config, name)
        plain = isinstance(value, int | float) and not isinstance(value, bool)
        if not plain or not math.isfinite(value) or not least <= value <= most:
            limits = "finite" if math.isinf(most) else f"from {least:g} to {most:g}"
            raise UserError(f"{self._kind}: {name} {value!r} must be a number, {limits}")

    def integer(self, name: str, least: int, most: int | None = None) -> None:
        """A whole number in a range, ends included."""
        value = getattr(self._config, name)
        plain = isinstance(value, int) and not isinstance(value, bool)
        if not plain or value < least or (most is not None and value > most):
            limits = f"of {least} or more" if most is None else f"from {least} to {most}"
            raise UserError(f"{self._kind}: {name} {value!r} must be a whole number {limits}")

    def flags(self) -> None:
        """Every field that is declared as a truth value is one."""
        for item in dataclasses.fields(self._config):
            value = getattr(self._config, item.name)
            if item.type == "bool" and not isinstance(value, bool):
                raise UserError(f"{self._kind}: {item.name} {value!r} must be True or False")
