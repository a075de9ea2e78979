"""start_on_terminate.sh with real processes: what it waits for, the order of runs, failures, signals."""

from __future__ import annotations

import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import ROOT

LIMIT = 900  # seconds, also on a machine that has much other work
# A run: notes that it began; ends with the next of its --statuses, the last one for every further run.
STUB = """\
import argparse, pathlib, sys
parser = argparse.ArgumentParser()
parser.add_argument("--case")
parser.add_argument("--statuses", default="0")
options = parser.parse_args()
log = pathlib.Path("log")
with log.open("a") as file:
    print(options.case, file=file)
runs = log.read_text().split().count(options.case)
statuses = [int(status) for status in options.statuses.split(",")]
sys.exit(statuses[min(runs, len(statuses)) - 1])
"""
# In place of the check of main.py's options, which the stub does not have.
CHECK_STUB = """\
import sys
if "--misspelt" in sys.argv:
    sys.exit("train.sh: warning: before\\nmain.py: error: unknown option --misspelt")
"""
# A run that goes on until a signal arrives, then ends in its own way, with status 7.
BLOCKING_STUB = """\
import os, pathlib, signal, sys
signals = {signal.SIGINT, signal.SIGTERM}
signal.pthread_sigmask(signal.SIG_BLOCK, signals)
print("ready", flush=True)
name = signal.Signals(signal.sigwait(signals)).name
group = "own-group" if os.getpgrp() == os.getpid() else "launcher's-group"
pathlib.Path("log").write_text(f"{name} {group}")
sys.exit(7)
"""
WAITING = ["-c", "import sys; sys.stdin.read()"]  # a process that lasts until its input is closed
# As WAITING, but the main thread ends at once: the process looks like a zombie while a thread lives on.
THREAD_LIVES_ON = """\
import ctypes, os, sys, threading
def last():
    sys.stdin.read()
    os._exit(0)
threading.Thread(target=last).start()
print("ready", flush=True)
ctypes.CDLL(None).syscall({"x86_64": 60, "aarch64": 93}[os.uname().machine], 0)
"""
# Runs a command that the terminal on its standard input controls. Ctrl-C drops no output that nobody has read yet.
ON_A_TERMINAL = """\
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
settings = termios.tcgetattr(0)
settings[3] |= termios.NOFLSH
termios.tcsetattr(0, termios.TCSANOW, settings)
os.execvp(sys.argv[1], sys.argv[1:])
"""
NOT_A_PID = "99999999"  # above the largest number that Linux gives a process


class Queue:
    """A repository with both launchers and stub trainings, and the processes that a test starts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[subprocess.Popen[str]] = []
        folder.mkdir()
        for name in ("train.sh", "start_on_terminate.sh"):
            shutil.copy(ROOT / name, folder)
        (folder / "main.py").write_text(STUB)
        (folder / "blocking.py").write_text(BLOCKING_STUB)
        (folder / "utils" / "processes").mkdir(parents=True)
        (folder / "utils" / "processes" / "start.py").write_text(CHECK_STUB)

    def config(self, case: str, statuses: str = "0", script: str = "main.py") -> str:
        """Writes the config of one run and returns its path."""
        (self.folder / case).write_text(f"case={case}\nscript={script}\noptions='--statuses {statuses}'\n")
        return case

    @property
    def runs(self) -> list[str]:
        """The cases of the runs so far, in order."""
        log = self.folder / "log"
        return log.read_text().split() if log.exists() else []

    def predecessor(self, *arguments: str) -> subprocess.Popen[str]:
        """Starts the Python process that is waited for."""
        process = subprocess.Popen(
            [sys.executable, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.started.append(process)
        return process

    def environment(self, **variables: str) -> dict[str, str]:
        settings = {"PYTHON": sys.executable, "POLL_SECONDS": "0.02", "REPORT_SECONDS": "0", **variables}
        return {**{key: value for key, value in os.environ.items() if key != "NPROC"}, **settings}

    def start(self, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        """Starts start_on_terminate.sh."""
        process = subprocess.Popen(
            ["bash", "start_on_terminate.sh", *arguments],
            cwd=self.folder,
            env=self.environment(**variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.started.append(process)
        return process

    def run(self, *arguments: str, **variables: str) -> tuple[int, str, str]:
        """Runs start_on_terminate.sh to its end: exit status, output, errors."""
        process = self.start(*arguments, **variables)
        output, errors = process.communicate(timeout=LIMIT)
        return process.returncode, output, errors

    def identity(self, pid: int) -> str:
        status, output, errors = self.run("--identity", str(pid))
        assert (status, errors) == (0, "")
        return output.strip()


def read_until(process: subprocess.Popen[str], text: str, times: int = 1) -> None:
    """Reads the process's output until a text has come in that many lines."""
    assert process.stdout is not None
    while times:
        line = process.stdout.readline()
        assert line, f"the output ended before {text!r}"
        times -= text in line


def close_input(process: subprocess.Popen[str]) -> None:
    """Lets a waiting process end without collecting it, so that it stays as a zombie."""
    assert process.stdin is not None
    process.stdin.close()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[Queue]:
    queue = Queue(tmp_path / "a repository")
    yield queue
    for process in queue.started:
        process.kill()
        with process:  # closes its pipes and waits for it
            pass


def test_starts_when_the_process_has_ended_and_not_before(queue: Queue) -> None:
    before = queue.predecessor(*WAITING)
    process = queue.start(str(before.pid), queue.config("a"), queue.config("b"))
    read_until(process, f"waiting for process {before.pid}", times=3)
    assert queue.runs == []
    close_input(before)  # a zombie now: it has ended all the same
    output, errors = process.communicate(timeout=LIMIT)
    assert (process.returncode, errors) == (0, "")
    assert queue.runs == ["a", "b"]
    events = [line.split(" ", 2)[2] for line in output.splitlines() if "waiting for" not in line]
    assert events[0].startswith(f"process {before.pid} has ended after 0:")
    assert events[1] == "start a (run 1 of at most 1)"
    assert events[2].startswith("end a: status 0 after 0:")
    assert events[3] == "start b (run 1 of at most 1)"
    assert events[4].startswith("end b: status 0 after 0:")
    assert len(events) == 5


@pytest.mark.skipif(shutil.which("ps") is None, reason="ps is not installed")
def test_starts_when_the_process_has_ended_without_proc(queue: Queue) -> None:
    script = queue.folder / "start_on_terminate.sh"
    script.write_text(script.read_text().replace("/proc/", "/no-such-folder/"))
    before = queue.predecessor(*WAITING)
    process = queue.start(str(before.pid), queue.config("a"))
    read_until(process, f"waiting for process {before.pid}", times=3)
    assert queue.runs == []
    identity = queue.identity(before.pid)
    assert identity.split()[-1].isdigit()  # the year
    close_input(before)
    _, errors = process.communicate(timeout=LIMIT)
    assert (process.returncode, errors, queue.runs) == (0, "", ["a"])
    assert "not running" in queue.run(identity, "a")[1]


def test_status_line_on_a_terminal(queue: Queue) -> None:
    before = queue.predecessor(*WAITING)
    terminal, inside = os.openpty()
    process = subprocess.Popen(
        ["bash", "start_on_terminate.sh", str(before.pid), queue.config("a")],
        cwd=queue.folder,
        env=queue.environment(COLUMNS="40"),
        stdin=inside,
        stdout=inside,
        stderr=inside,
    )
    os.close(inside)
    with open(terminal, "rb", buffering=0) as output:
        seen = b""
        while seen.count(b"\r\x1b[K0:00:") < 3:  # the line is written over, not repeated
            seen += output.read(100)
        assert b"\n" not in seen
        close_input(before)
        while b"end a: status 0" not in seen:
            seen += output.read(100)
        assert process.wait(timeout=LIMIT) == 0
    line = seen.split(b"\r\x1b[K")[1].decode()
    assert f"waiting for process {before.pid}" in line
    assert len(line) <= 39


@pytest.mark.parametrize("moment", ["waiting", "running"])
def test_control_c_on_a_terminal(queue: Queue, moment: str) -> None:
    before = queue.predecessor(*WAITING)
    pid = str(before.pid) if moment == "waiting" else NOT_A_PID
    terminal, inside = os.openpty()
    command = [
        "bash",
        "start_on_terminate.sh",
        pid,
        queue.config("a", script="blocking.py"),
        queue.config("b"),
    ]
    process = subprocess.Popen(
        [sys.executable, "-c", ON_A_TERMINAL, *command],
        cwd=queue.folder,
        env=queue.environment(POLL_SECONDS="1000"),
        stdin=inside,
        stdout=inside,
        stderr=inside,
        start_new_session=True,
    )
    with open(terminal, "r+b", buffering=0) as keyboard:
        seen = b""
        while {"waiting": b"waiting for process", "running": b"ready"}[moment] not in seen:
            seen += keyboard.read(100)
        keyboard.write(b"\x03")
        while b"stopped by SIGINT" not in seen:
            seen += keyboard.read(100)
        assert process.wait(timeout=LIMIT) == 130
    os.close(inside)
    # In a group of its own the run is not reached by the terminal, only by what is passed on.
    assert queue.runs == {"waiting": [], "running": ["SIGINT", "own-group"]}[moment]


def test_zombie_with_a_thread_has_not_ended(queue: Queue) -> None:
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        pytest.skip("needs the number of a system call of Linux")
    before = queue.predecessor("-c", THREAD_LIVES_ON)
    read_until(before, "ready")
    process = queue.start(str(before.pid), queue.config("a"))
    read_until(process, "waiting for process", times=3)
    state = Path(f"/proc/{before.pid}/stat").read_text().rpartition(") ")[2].split()[0]
    assert (state, queue.runs) == ("Z", [])
    close_input(before)
    process.communicate(timeout=LIMIT)
    assert (process.returncode, queue.runs) == (0, ["a"])


def test_process_that_is_not_running(queue: Queue) -> None:
    status, output, errors = queue.run(NOT_A_PID, queue.config("a"))
    assert (status, errors, queue.runs) == (0, "", ["a"])
    assert f"process {NOT_A_PID} is not running; starting at once" in output


def test_reused_pid_is_another_process(queue: Queue) -> None:
    running = queue.predecessor(*WAITING)
    identity = queue.identity(running.pid)
    pid, started = identity.split(":")
    earlier = f"{pid}:{int(started) - 1}"  # the process that had this number before
    status, output, errors = queue.run(earlier, queue.config("a"))
    assert (status, errors, queue.runs) == (0, "", ["a"])
    assert f"process {earlier} is not running; starting at once" in output
    assert running.poll() is None

    process = queue.start(identity, queue.config("b"))
    read_until(process, f"waiting for process {identity}", times=2)
    assert queue.runs == ["a"]
    close_input(running)
    process.communicate(timeout=LIMIT)
    assert (process.returncode, queue.runs) == (0, ["a", "b"])


def test_name_of_the_process_may_hold_anything(queue: Queue) -> None:
    name = "S 1) Z 0 (x"
    interpreter = queue.folder / name
    interpreter.write_text(f"#!{shutil.which('bash')}\nread -r\n")
    interpreter.chmod(0o755)
    before = subprocess.Popen([str(interpreter)], stdin=subprocess.PIPE, text=True)
    queue.started.append(before)
    process = queue.start(str(before.pid), queue.config("a"))
    read_until(process, f"waiting for process {before.pid}", times=2)
    assert queue.runs == []
    close_input(before)
    process.communicate(timeout=LIMIT)
    assert (process.returncode, queue.runs) == (0, ["a"])


@pytest.mark.parametrize(
    ("arguments", "statuses", "expected_status", "expected_runs"),
    [
        (["a", "b"], {"a": "9"}, 9, "a"),
        (["a", "b"], {"b": "9"}, 9, "a b"),
        (["a", "2", "b"], {"a": "9"}, 9, "a a a"),
        (["a", "2", "b"], {"a": "9,4,0"}, 0, "a a a b"),
        (["a", "2", "b"], {"a": "9,0"}, 0, "a a b"),
        (["a", "0", "b", "1"], {"b": "5,6"}, 6, "a b b"),
        (["a", "010"], {"a": "1,1,1,1,1,1,1,1,1,1,0"}, 0, " ".join("a" * 11)),
        (["a", "2", "b"], {"a": "2"}, 2, "a"),
        (["a", "5", "b"], {"a": "9,2,0"}, 2, "a a"),
        (["a", "1", "b"], {"a": "137,0"}, 0, "a a b"),
        (["a", "2", "b"], {"a": "3,0"}, 3, "a"),  # a failed audit
        (["a", "2", "b"], {"a": "75,0"}, 75, "a"),  # asked to end
        (["a", "2", "b"], {"a": "1,130,0"}, 130, "a a"),
        (["--keep-going", "a", "2", "b"], {"a": "143,0"}, 143, "a b"),
        (["a", "b", "a"], {}, 0, "a b a"),
        (["--keep-going", "a", "b", "c"], {"a": "9"}, 9, "a b c"),
        (["--keep-going", "a", "1", "b", "c"], {"a": "9", "b": "4"}, 4, "a a b c"),
        (["--keep-going", "a", "1", "b", "1"], {"a": "2", "b": "4,0"}, 2, "a b b"),
    ],
)
def test_failures(
    queue: Queue, arguments: list[str], statuses: dict[str, str], expected_status: int, expected_runs: str
) -> None:
    for case in "abc":
        queue.config(case, statuses.get(case, "0"))
    first = 1 if arguments[0] == "--keep-going" else 0
    status, output, errors = queue.run(*arguments[:first], NOT_A_PID, *arguments[first:])
    assert (status, queue.runs, errors) == (expected_status, expected_runs.split(), "")
    left_out = "b" in arguments and "b" not in queue.runs
    assert ("not started: b" in output) == left_out
    assert ("was asked to end, so it is not retried" in output) == (status in (75, 130, 143))


def test_options_of_each_run(queue: Queue) -> None:
    """They follow those of the config, unchanged; a retry has them too."""
    queue.config("a", "7"), queue.config("b")
    first, second = (
        ["--", "--case", "*", "--statuses=0", "--"],
        ["--", "--case", "s2", "--statuses=9,0", "--"],
    )
    status, output, errors = queue.run(NOT_A_PID, "a", *first, "a", "1", *second, "b", "--", "--case", "s3")
    assert (status, errors, queue.runs) == (0, "", ["*", "s2", "s2", "s3"])
    assert "start a --case s2 --statuses=9,0 (run 2 of at most 2)" in output
    status, output, errors = queue.run(NOT_A_PID, "a", "b", "--", "--case", "s3")
    assert (status, errors) == (7, "") and "not started: b --case s3\n" in output


def test_options_are_logged_as_a_shell_reads_them(queue: Queue) -> None:
    status, output, _ = queue.run(NOT_A_PID, queue.config("a"), "--", "--case", "layer1.* fc")
    assert (status, queue.runs) == (0, ["layer1.*", "fc"])
    assert "start a --case 'layer1.* fc' (run 1 of at most 1)" in output


def test_options_of_all_runs_are_checked_before_the_waiting(queue: Queue) -> None:
    """Those of the command line and those in configs, by the program's own check, with its own message."""
    shutil.rmtree(queue.folder / "utils")
    (queue.folder / "utils").symlink_to(ROOT / "utils")
    (queue.folder / "a").write_text("case=a\nkeyword=cifar10,cbas,lsq\noptions='--bits 2'\n")
    (queue.folder / "b").write_text("case=b\noptions='--epochz 3'\n")
    for arguments, message in (
        (["a", "b"], "b: main.py: error: unknown option --epochz: did you mean --epochs"),
        (["a", "a", "--", "--bits", "two"], "a --bits two: main.py: error: --bits two: write a number"),
        (
            ["a", "--", "--lr_policy", "fixx", "--", "a"],
            "a --lr_policy fixx: main.py: error: --lr_policy fixx",
        ),
    ):
        status, output, errors = queue.run(NOT_A_PID, *arguments)
        assert (status, output, queue.runs, errors.count("\n")) == (2, "", [], 1)
        assert errors.startswith(f"start_on_terminate.sh: error: {message}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_while_waiting(queue: Queue, number: signal.Signals) -> None:
    before = queue.predecessor(*WAITING)
    process = queue.start(str(before.pid), queue.config("a"), queue.config("b"), POLL_SECONDS="1000")
    read_until(process, "waiting for process")
    process.send_signal(number)
    output, errors = process.communicate(timeout=LIMIT)  # at once, not after the interval
    assert (process.returncode, errors, queue.runs) == (128 + number, "", [])
    assert f"stopped by {number.name}; not started: a b" in output
    assert before.poll() is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_while_running(queue: Queue, number: signal.Signals) -> None:
    process = queue.start(NOT_A_PID, queue.config("a", script="blocking.py"), "3", queue.config("b"))
    read_until(process, "ready")
    process.send_signal(number)
    output, errors = process.communicate(timeout=LIMIT)
    assert (process.returncode, errors) == (128 + number, "")
    assert queue.runs == [number.name, "own-group"]
    assert "end a: status 7" in output
    assert f"stopped by {number.name}; not started: b" in output


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        ([], {}, "write: bash start_on_terminate.sh PID"),
        (["1"], {}, "write: bash start_on_terminate.sh PID"),
        (["x", "good"], {}, "'x' is no process"),
        (["-1", "good"], {}, "'-1' is no process"),
        (["0", "good"], {}, "'0' is no process"),
        (["12:", "good"], {}, "'12:' is no process"),
        (["1x", "good"], {}, "'1x' is no process"),
        (["1", "god"], {}, "no config 'god'"),
        (["1", "good", "god"], {}, "no config 'god'"),
        (["1", "good", "-1"], {}, "'-1' stands where the config belongs"),
        (["1", "--bits", "2"], {}, "'--bits' stands where the config belongs"),
        (["1", "good", "--bits", "2"], {}, "write the options of a run behind --: good -- --bits 2"),
        (["1", "good", "3", "--case", "a b"], {}, "behind --: good -- --case 'a b'"),
        (["1", "good", "--", "--lr", ""], {}, "an option of good is empty; leave it out"),
        (["1", "good", "--", "--misspelt"], {}, "good --misspelt: main.py: error: unknown option --misspelt"),
        (["1", "good", "1", "broken"], {}, "not valid shell, correct it: broken: line"),
        (["1", "."], {}, "'.' is a directory"),
        (["1", ""], {}, "no config given"),
        (["1", "3", "good"], {}, "no config before the number '3'"),
        (["1", "good", "1", "2"], {}, "no config before the number '2'"),
        (["1", "--", "--lr", "1"], {}, "no config before --"),
        (["1", "good", "--"], {}, "no options after --"),
        (["1", "good", "--", "--", "good"], {}, "no options after --"),
        (["1", "good", "--", "--lr", "1", "--", "--lr", "2"], {}, "'--lr' stands where the config belongs"),
        (
            ["1", "good", "--", "--lr", "1", "config/config.a"],
            {},
            "the config 'config/config.a' is among the options",
        ),
        (["1", "good", "9999999"], {}, "'9999999' retries are too many"),
        (["1", "good"], {"POLL_SECONDS": "0.0"}, "POLL_SECONDS is '0.0'"),
        (["1", "good"], {"POLL_SECONDS": "often"}, "POLL_SECONDS is 'often'"),
        (["1", "good"], {"REPORT_SECONDS": "-1"}, "REPORT_SECONDS is '-1'"),
        (["--identity"], {}, "write: bash start_on_terminate.sh --identity PID"),
        (["--identity", "x"], {}, "write: bash start_on_terminate.sh --identity PID"),
        (["--identity", NOT_A_PID], {}, f"process {NOT_A_PID} is not running"),
    ],
)
def test_mistakes(queue: Queue, arguments: list[str], variables: dict[str, str], message: str) -> None:
    queue.config("good")
    (queue.folder / "broken").write_text("if\n")
    # A process that has ended, in place of number 1: nothing but the mistake keeps the queue from starting.
    arguments = [NOT_A_PID if argument == "1" else argument for argument in arguments[:1]] + arguments[1:]
    status, output, errors = queue.run(*arguments, **variables)
    assert (status, output, queue.runs) == (2, "", [])
    assert errors.startswith(("start_on_terminate.sh: error: ", "train.sh: error: "))
    assert message in errors
    assert errors.count("\n") == 1


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help(queue: Queue, flag: str) -> None:
    status, output, errors = queue.run(flag)
    assert (status, errors) == (0, "")
    assert output.startswith("Usage: bash start_on_terminate.sh")


def test_valid_bash() -> None:
    subprocess.run(["bash", "-n", str(ROOT / "start_on_terminate.sh")], check=True)


def test_shellcheck() -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    shellcheck = shutil.which("shellcheck", path=path)
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(
        [shellcheck, str(ROOT / "start_on_terminate.sh")], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")
