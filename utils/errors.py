"""Errors that entry points report in one line: a user's mistake, and a training that cannot continue."""

from __future__ import annotations

from utils.text import printable


class UserError(Exception):
    """Something the user wrote cannot work.

    The message is one line that says what is wrong and what to write instead. Entry points
    (`main.py`, `tools.py`) print it and exit with status 2; no traceback is shown.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(" ".join(message.split())))


class TrainingError(Exception):
    """Training cannot continue, without a mistake in the options; `main.py` exits with status 1."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(" ".join(message.split())))


class LostError(TrainingError):
    """Another process of the run ended; that one reports the reason."""
