"""Signals that ask a training to end: after the first the loop saves and ends, a later one ends it at once."""

from __future__ import annotations

import contextlib
import math
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

# Exit status of a run that was asked to end and has saved its state; -r resumes it (EX_TEMPFAIL).
SAVED = 75
# Seconds in which signals are repeats of the first: `timeout`, for one, signals its child and then the child's group.
REPEATS = 0.5
# The same for a process under a launcher, which passes on its own signals, too.
REPEATS_PASSED_ON = 5.0
# Seconds after a signal in which a process of several may wait for the others; torchrun kills it after 30.
UNANSWERED = 20.0
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
PROBE = signal.SIGURG  # asks whether the main thread runs Python's handlers; ignored by default


@contextlib.contextmanager
def ends_at_once() -> Iterator[None]:
    """Let SIGINT end the process by default, for a wait in C++ in which no Python handler is called."""
    former = signal.getsignal(signal.SIGINT)
    if not callable(former):  # ignored, as in a shell's background jobs
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, former)


def heeded() -> tuple[signal.Signals, ...]:
    """The signals that ask to end: SIGHUP, of a terminal that closes, is none under `nohup`."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return tuple(number for number in SIGNALS if not (ignored and number == signal.SIGHUP))


class Requests:
    """Tells a new request to end from a repeated one.

    One request often arrives several times: a batch system signals every process of a job, the launcher passes
    on its signals, and a terminal's Ctrl-C reaches every process started from it.

    Args:
        repeats: seconds after a request in which signals are repeats of it.
        clock: the time in seconds.
    """

    def __init__(self, repeats: float = REPEATS, clock: Callable[[], float] = time.monotonic) -> None:
        self._repeats, self._clock = repeats, clock
        self._last: float | None = None

    def new(self) -> bool:
        """Whether a signal that comes now is a request of its own."""
        now = self._clock()
        if self._last is not None and now < self._last + self._repeats:
            return False
        self._last = now
        return True


class Stop:
    """Remembers SIGTERM, SIGINT or SIGHUP while it is open as a context; a second request ends the process at once.

    After a request it stays in force until the process ends, because repeats of the signal may come until then. With
    `others`, the first one too ends a process whose main thread waits in C++ for longer than `UNANSWERED`: the other
    processes of the run may never come.

    Args:
        say: called with a line when the first signal comes, in a thread of its own, which may block.
        repeats: seconds after the first signal in which others are repeats of it.
        at_once: returns whether a signal now ends the process, whatever came before; None: unknown.
        others: whether this process may have to wait for others of its run.

    Attributes:
        asked: the name of the signal that came, empty before.
    """

    def __init__(
        self, say: Callable[[str], object] = lambda line: None, *, repeats: float = REPEATS,
        at_once: Callable[[], bool] | None = None, others: bool = False,
    ) -> None:  # fmt: skip
        self.asked = ""
        self._others, self._agreed, self._answers = others, False, 0
        self._say, self._repeats, self._at_once = say, repeats, at_once
        self._former: dict[int, Any] = {}
        self._former_fd = -1
        self._pipe = (-1, -1)

    def __enter__(self) -> Stop:
        # Python's handlers run in the main thread, which may be in a long computation or wait for another process.
        # The number of a signal is in the pipe at once, and a thread that reads it can end the process.
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        self._former_fd = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        for number in heeded():
            self._former[number] = signal.signal(number, self._remember)
        if self._others:
            self._former[PROBE] = signal.signal(PROBE, self._answer)
        threading.Thread(target=self._watch, name="signals", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.asked:
            return
        for number, former in self._former.items():
            signal.signal(number, former)
        signal.set_wakeup_fd(self._former_fd)
        os.close(self._pipe[1])  # which ends the thread

    def _remember(self, number: int, _: FrameType | None) -> None:
        self.asked = self.asked or signal.Signals(number).name

    def _answer(self, *_: object) -> None:
        self._answers += 1

    def agree(self, everyone: bool) -> bool:
        """Take note of what all processes have answered to the question whether to end; returns it.

        Once they end together, one may wait for as long as another one writes.
        """
        self._agreed |= everyone
        return everyone

    def _end_if_waiting(self, number: int) -> None:
        """End the process when its main thread answers no signal and does nothing for `UNANSWERED` seconds.

        Python's handlers are called while it sleeps or reads, but not in C++; there it computes, or waits for others.
        """
        thread = threading.main_thread().ident
        assert thread is not None
        clock = time.pthread_getcpuclockid(thread)
        answers, used, since = -1, -math.inf, time.monotonic()
        while not self._agreed:
            signal.pthread_kill(thread, PROBE)
            time.sleep(UNANSWERED / 20)
            now = time.clock_gettime(clock)
            if self._answers != answers or now - used > UNANSWERED / 100:  # a signal takes some time, too
                answers, used, since = self._answers, now, time.monotonic()
            elif time.monotonic() >= since + UNANSWERED:
                text = f"{signal.Signals(number).name}: the other processes do not come, ends now, unsaved\n"
                telling = threading.Thread(target=os.write, args=(2, text.encode()), daemon=True)
                telling.start()
                telling.join(timeout=1)  # nobody may be reading
                os._exit(128 + number)

    def _watch(self) -> None:
        asked = False
        while numbers := os.read(self._pipe[0], 64):
            requests = [number for number in numbers if number in SIGNALS]
            if not requests:
                continue
            if asked:
                os._exit(128 + requests[0])
            asked = True
            self._end_if_at_once(requests[0])
            # Blocked output must not keep this thread from reading the second signal.
            name = signal.Signals(requests[0]).name
            threading.Thread(target=self._tell, args=(name,), name="signal", daemon=True).start()
            if self._others:
                threading.Thread(target=self._end_if_waiting, args=requests[:1], daemon=True).start()
            self._pass_over_repeats()
        os.close(self._pipe[0])

    def _end_if_at_once(self, number: int) -> None:
        if self._at_once is not None and self._at_once():
            os._exit(128 + number)

    def _pass_over_repeats(self) -> None:
        """Ignore repeats of a request for as long as there may be some.

        The time counts from this call, because this thread may have had to wait for the main one: ignoring a second
        request is better than ending a run unsaved for a repeat.
        """
        waiting = select.poll()
        waiting.register(self._pipe[0], select.POLLIN)
        deadline = time.monotonic() + self._repeats
        while waiting.poll(1000 * max(0.0, deadline - time.monotonic())):
            numbers = os.read(self._pipe[0], 64)
            if not numbers:
                return
            for number in numbers:
                if number in SIGNALS:
                    self._end_if_at_once(number)

    def _tell(self, name: str) -> None:
        soon = self._at_once is not None or self._repeats <= REPEATS
        second = "a second signal" if soon else f"a signal after {self._repeats:g} seconds"
        with contextlib.suppress(OSError):  # a full disk takes no log
            self._say(f"{name}: ends after this step, saved; {second} ends at once")
