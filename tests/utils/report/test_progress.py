"""Progress bars: nothing without a terminal, and what a training's bar says on one."""

from __future__ import annotations

import fcntl
import io
import os
import re
import struct
import sys
import termios
from collections.abc import Callable

import pytest
import torch

from utils.report.progress import TrainingBar, peak_memory, progress
from utils.step.meters import Waiting


@pytest.mark.parametrize("enabled", [True, False])
def test_progress_without_terminal_is_silent(
    enabled: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    bar = progress(iter("abc"), total=3, description="epoch 0", enabled=enabled)
    assert list(bar) == ["a", "b", "c"]
    assert stream.getvalue() == capsys.readouterr().out == ""


@pytest.mark.parametrize(("enabled", "shown"), [(True, True), (False, False)])
def test_progress_on_a_terminal(enabled: bool, shown: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pseudo-terminal is a real one to whoever writes to it."""
    reading, writing = os.openpty()
    fcntl.ioctl(writing, termios.TIOCSWINSZ, struct.pack("4H", 25, 80, 0, 0))  # 80 columns
    with os.fdopen(reading, "rb", buffering=0) as screen:
        with os.fdopen(writing, "w") as terminal:
            monkeypatch.setattr(sys, "stderr", terminal)
            items = list(progress(range(3), total=3, description="epoch 7", enabled=enabled))
            terminal.write("end of test\n")
        output = b""
        while b"end of test" not in output:
            output += screen.read(4096)
    assert items == [0, 1, 2]
    assert (b"epoch 7" in output) is shown


def on_a_terminal(monkeypatch: pytest.MonkeyPatch, columns: int, work: Callable[[], object]) -> str:
    """What is written to standard error by `work`, on a pseudo-terminal of this width."""
    reading, writing = os.openpty()
    fcntl.ioctl(writing, termios.TIOCSWINSZ, struct.pack("4H", 25, columns, 0, 0))
    with os.fdopen(reading, "rb", buffering=0) as screen:
        with os.fdopen(writing, "w") as terminal:
            monkeypatch.setattr(sys, "stderr", terminal)
            work()
            terminal.write("end of test\n")
        output = b""
        while b"end of test" not in output:
            output += screen.read(4096)
    return output.decode()


def bar(enabled: bool = True) -> TrainingBar:
    return TrainingBar(
        Waiting(range(4)), total=4, later=8, images=16, device=torch.device("cpu"), description="epoch 1/3",
        enabled=enabled,
    )  # fmt: skip


def test_the_bar_of_a_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images instead of batches, waiting, memory and the time that is left."""

    def work() -> None:
        shown = bar()
        shown.mininterval = 0  # draws every batch, however fast they come
        assert list(shown) == [0, 1, 2, 3]

    text = on_a_terminal(monkeypatch, 140, work)
    assert re.search(
        r"epoch 1/3:  \d+%.* 32/64 .* images/s, wait \d+%, \d+\.\d GiB, run \d\d:\d\d\]", text
    ), text


def test_the_time_left_counts_later_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of four batches in ten seconds: ten more, and eight batches of later epochs at the same rate."""

    def work() -> None:
        shown = bar()
        now = shown.start_t + 10
        monkeypatch.setattr(shown, "_time", lambda: now)
        shown.n = 2
        found.append(shown.format_dict["postfix"])
        shown.close()

    found: list[str] = []
    on_a_terminal(monkeypatch, 140, work)
    assert found[0].startswith("wait 0%, ") and found[0].endswith("run 00:50")


def test_without_a_bar_nothing_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("utils.report.progress.peak_memory", lambda device: pytest.fail("looked up"))
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    assert list(bar()) == list(bar(enabled=False)) == [0, 1, 2, 3]
    assert stream.getvalue() == ""


def test_memory_is_in_bytes() -> None:
    assert 2**26 < peak_memory(torch.device("cpu")) < 2**40
