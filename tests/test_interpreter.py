"""The interpreter of other tests, which begins with torch loaded, does what Python does."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SAYS = """
import atexit, os, sys
atexit.register(print, "at exit")
print(__name__, sys.argv, os.getcwd(), os.environ["OF_THE_TEST"], sys.stdin.read(), "json" in vars())
print("an error", file=sys.stderr)
import beside
sys.exit({"7": 7, "200": 200, "word": "a word"}.get(sys.argv[1]))
"""
WAITS = """
import os, signal, sys, time
if sys.argv[1] == "handles":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(9))
print(os.getpid(), flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("ending", ["7", "200", "word", "none"])
@pytest.mark.parametrize("how", [["says.py"], ["-W", "error", "-m", "says"], ["-u", "-c", SAYS]])
def test_a_program(how: list[str], ending: str, interpreter: str, tmp_path: Path) -> None:
    (tmp_path / "says.py").write_text(SAYS)
    (tmp_path / "beside.py").touch()
    one, other = (
        subprocess.run(
            [python, *how, ending, "two words"], cwd=tmp_path, input="given", env={**os.environ, "OF_THE_TEST": "x"},
            capture_output=True, text=True, check=False,
        )
        for python in (interpreter, sys.executable)
    )  # fmt: skip
    assert (one.returncode, one.stdout, one.stderr) == (other.returncode, other.stdout, other.stderr)


@pytest.mark.parametrize(
    ("what", "number", "status"),
    [
        ("waits", signal.SIGTERM, -signal.SIGTERM),
        ("waits", signal.SIGKILL, -signal.SIGKILL),
        ("handles", signal.SIGTERM, 9),
    ],
)
def test_a_signal(what: str, number: signal.Signals, status: int, interpreter: str, tmp_path: Path) -> None:
    """The process that was forked ends with the one that was started."""
    (tmp_path / "waits.py").write_text(WAITS)
    with subprocess.Popen([interpreter, "waits.py", what], cwd=tmp_path, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        forked = int(process.stdout.readline())
        end = os.pidfd_open(forked)
        process.send_signal(number)
        assert process.wait() == status
    assert select.select([end], [], [], 60)[0] == [end]
    os.close(end)
