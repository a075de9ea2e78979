"""Signals that ask a training to end: the first is a question that the loop answers, the second ends at once."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

SAVED = (
    75  # exit status of a run that was asked to end, has saved its state and goes on with -r (EX_TEMPFAIL)
)


class Stop:
    """Remembers the first SIGTERM or SIGINT while it is open as a context; a second one has its usual effect.

    Attributes:
        asked: the name of the signal that came, empty before.
    """

    def __init__(self) -> None:
        self.asked = ""
        self._former: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._former[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, former in self._former.items():
            signal.signal(number, former)

    def _remember(self, number: int, _: FrameType | None) -> None:
        self.asked = signal.Signals(number).name
        for each in self._former:
            signal.signal(each, signal.SIG_DFL)
