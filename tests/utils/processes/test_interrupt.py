"""Requests to end: repeats of one, a second one, and real trainings of which every process is signalled."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import ROOT
from tests.kill import NETWORK, free_port
from tests.utils.data.helpers import write_folder
from tests.utils.processes.jobs import LIMIT, MODULE, QUIET, job_is_gone, listens, started_by
from utils.checkpoint.archive import read
from utils.processes import launch
from utils.processes.interrupt import REPEATS, REPEATS_PASSED_ON, SAVED, SIGNALS, Requests, Stop

LINE = (
    "--model tiny --keyword_file network.py --dataset imagenet --root images --num_classes 3 --input_size 8 -b 4 -v 0 "
    "--keyword imagenet,dorefa,lsq --fm_enable --wt_enable --fm_bit 2 --wt_bit 2 --epochs 1 --case run"
)
LAUNCHER = (*MODULE, "--standalone", "--nproc_per_node", "2")
CHECKPOINT = Path("weights/tiny/run-checkpoint.pth.tar")


# Parts -------------------------------------------------------------------------------------------


def test_signals_shortly_after_a_request_are_repeats_of_it() -> None:
    now = [100.0]
    requests = Requests(5, lambda: now[0])
    found = []
    for now[0] in (100, 100, 101, 104.9, 105, 106, 112):
        found.append(requests.new())
    assert found == [True, False, False, False, True, False, True]


@pytest.fixture
def signals() -> Iterator[None]:
    """What signals do is restored, also after a request, which `Stop` stays in force for."""
    numbers = SIGNALS
    former = [signal.getsignal(number) for number in numbers]
    yield
    signal.set_wakeup_fd(-1)
    for number, handler in zip(numbers, former, strict=True):
        signal.signal(number, handler)


def test_stop_restores_what_signals_did(signals: None) -> None:
    former = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with Stop() as stop:
        assert signal.getsignal(signal.SIGTERM) not in former
    assert stop.asked == ""
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == former
    assert signal.set_wakeup_fd(-1) == -1


def test_a_closed_terminal_is_a_request_but_not_under_nohup(signals: None) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Stop() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.asked == ""
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    with Stop() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.asked == "SIGHUP"


def test_stop_stays_in_force_in_a_process_that_was_asked(signals: None) -> None:
    with Stop() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked == "SIGINT"
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked == "SIGINT"
    os.kill(os.getpid(), signal.SIGTERM)  # a repeat that comes late does not end it


def test_a_thread_that_must_wait_takes_no_repeat_for_a_request() -> None:
    """The main thread keeps the interpreter's lock for longer than repeats come in."""
    program = (
        "import itertools, os, signal, subprocess, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from utils.processes.interrupt import Stop\n"
        "twice = 'import os, signal, time; os.kill({0}, 15); time.sleep(0.01); os.kill({0}, 15)'\n"
        "with Stop() as stop:\n"
        "    other = subprocess.Popen([sys.executable, '-S', '-c', twice.format(os.getpid())])\n"
        "    for _ in range(3):\n"
        "        sum(itertools.repeat(1, 10**8))\n"
        "    other.wait()\n"
        "print(stop.asked, flush=True)\n"
        "os._exit(0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=LIMIT
    )
    assert (done.returncode, done.stdout) == (0, "SIGTERM\n")


def test_the_status_is_none_of_the_others() -> None:
    assert SAVED not in (0, 1, 2, 130, 128 + signal.SIGTERM)


# Processes ---------------------------------------------------------------------------------------


def handles(pid: int, number: signal.Signals) -> bool:
    """Whether a process is there and has a handler for a signal."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return False
    caught = next(line.split()[1] for line in lines if line.startswith("SigCgt:"))
    return bool(int(caught, 16) >> (number - 1) & 1)


class Job:
    """A training of images in files, and all that it starts."""

    def __init__(self, folder: Path, options: str, *launcher: str) -> None:
        write_folder(folder / "images", 12, 2)
        (folder / "network.py").write_text(NETWORK)
        scripts = [str(ROOT / word) if word.endswith(".py") else word for word in (*launcher, "main.py")]
        self.folder = folder
        with (folder / "said").open("w") as output, (folder / "errors").open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, *scripts, *LINE.split(), *options.split()],
                cwd=folder, env={**os.environ, **QUIET}, stdout=output, stderr=errors,
            )  # fmt: skip
        self.pid = self.process.pid

    def wait(self, until: Callable[[], bool]) -> None:
        """Wait until something is so."""
        deadline = time.monotonic() + LIMIT
        while not until():
            assert self.process.poll() is None, self.texts()
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def texts(self) -> tuple[str, str]:
        """Output and errors so far."""
        return (self.folder / "said").read_text(), (self.folder / "errors").read_text()

    def wait_for_a_save(self) -> None:
        """Wait until the run has written a checkpoint, so that signals are a question."""
        self.wait((self.folder / CHECKPOINT).exists)

    def trainings(self) -> list[int]:
        """The processes that train and have begun to."""
        found = started_by(self.pid) - (
            {self.pid} if "utils.processes.launch" in self.process.args[2] else set()
        )  # type: ignore[index]
        return [pid for pid in found if handles(pid, signal.SIGTERM)]

    def ended(self) -> tuple[int, str, str]:
        """Status, output and errors."""
        status = self.process.wait(timeout=LIMIT)
        return status, *self.texts()


def send(pids: set[int], number: signal.Signals) -> None:
    for pid in sorted(pids, reverse=True):  # the launcher last, so that what it passes on comes late
        os.kill(pid, number)


# What a signal does is the same for both; a launcher is what passes one on a second time.
@pytest.mark.parametrize(("launcher", "number"), [((), signal.SIGTERM), (LAUNCHER, signal.SIGINT)])
def test_a_signal_to_every_process_is_one_request(
    tmp_path: Path, launcher: tuple[str, ...], number: signal.Signals
) -> None:
    """As batch systems and terminals send it: also to the processes that read images, which the last step needs."""
    job = Job(tmp_path, "--save_every 1 --delay 2 -j 1 --epochs 20", *launcher)
    job.wait_for_a_save()
    everyone = started_by(job.pid)
    assert len(everyone) > 2 * (1 + len(launcher) // 2)  # with those that read images
    send(everyone, number)
    status, said, errors = job.ended()
    assert errors == ""
    assert status == SAVED
    assert f"{number.name}: ends after this step" in said and "asked to end by" in said
    assert read(tmp_path / CHECKPOINT)["position"] > 0
    job_is_gone(everyone)


def test_an_interrupt_ends_a_process_that_waits_for_others(tmp_path: Path) -> None:
    (tmp_path / "network.py").write_text(NETWORK)
    write_folder(tmp_path / "images", 12, 2)
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "main.py"), *LINE.split(), "--distributed", "--world_size", "2", "--rank", "0"],
        cwd=tmp_path, env={**os.environ, **QUIET, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
    )  # fmt: skip
    deadline = time.monotonic() + LIMIT
    while not listens(port):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=LIMIT) == -signal.SIGINT


def test_processes_that_read_images_end_with_a_training_that_is_killed(tmp_path: Path) -> None:
    job = Job(tmp_path, "--save_every 1 --delay 2 -j 2 --epochs 20")
    job.wait_for_a_save()
    everyone = started_by(job.pid)
    assert len(everyone) > 3
    job.process.kill()
    assert job.ended()[0] == -signal.SIGKILL
    job_is_gone(everyone)


@pytest.mark.parametrize("launcher", [(), LAUNCHER])
def test_a_second_request_ends_at_once(tmp_path: Path, launcher: tuple[str, ...]) -> None:
    """The first one is answered after the step, which here takes long; a launcher ends all its processes."""
    job = Job(tmp_path, "--delay 100 -j 0", *launcher)
    job.wait(lambda: len(job.trainings()) == (2 if launcher else 1))
    everyone = started_by(job.pid)
    job.process.terminate()
    job.process.terminate()  # a repeat
    job.wait(lambda: "ends after this step" in job.texts()[0])  # it may take longer than repeats come in
    end_by_signals(job.process)
    status, said, errors = job.ended()
    # The last signal may meet a process that has taken its handler down already; to a shell both are 143.
    assert status in (128 + signal.SIGTERM, -signal.SIGTERM) and errors == ""
    assert said.count("SIGTERM: ends after this step, saved; a second signal ends at once") == 1
    job_is_gone(everyone)


def end_by_signals(process: subprocess.Popen[Any]) -> None:
    """Signal a process until it has ended: at some time a signal is no repeat any more."""
    deadline = time.monotonic() + LIMIT
    while process.poll() is None:
        assert time.monotonic() < deadline
        process.terminate()
        time.sleep(0.1)


def test_output_that_nobody_reads_delays_no_second_request(tmp_path: Path) -> None:
    (tmp_path / "network.py").write_text(NETWORK)
    write_folder(tmp_path / "images", 12, 2)
    reading, writing = os.pipe()
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "main.py"), *LINE.split(), "--delay", "100", "-j", "0"],
        cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=writing,
    )  # fmt: skip
    deadline = time.monotonic() + LIMIT
    while not handles(process.pid, signal.SIGTERM):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.set_blocking(writing, False)
    for size in (4096, 1):
        with pytest.raises(BlockingIOError):
            while True:
                os.write(writing, bytes(size))
    os.set_blocking(writing, True)
    try:
        end_by_signals(process)
    finally:
        process.kill()
        os.close(reading), os.close(writing)
    assert process.wait() == 128 + signal.SIGTERM


def test_a_launchers_process_waits_for_the_launcher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What the launcher passes on comes to it twice; a launcher of torch's own cannot say which is which."""
    monkeypatch.delenv(launch.STATUS_FOLDER, raising=False)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert (launch.stop(print)._repeats, launch.stop(print)._at_once) == (REPEATS, None)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert (launch.stop(print)._repeats, launch.stop(print)._at_once) == (REPEATS_PASSED_ON, None)
    monkeypatch.setenv(launch.STATUS_FOLDER, str(tmp_path))
    at_once = launch.stop(print)._at_once
    assert at_once is not None and not at_once()
    (tmp_path / launch.AT_ONCE).touch()
    assert at_once()
    assert launch._left_status(str(tmp_path), 7) == 7


def test_the_launcher_says_which_signal_is_the_second_one(tmp_path: Path) -> None:
    """Before it passes it on; otherwise it would wait, and kill."""
    (tmp_path / "worker.py").write_text(
        "import os, pathlib, signal, sys, time\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from utils.processes import launch\n"
        "at_once = launch.stop(print)._at_once\n"
        "def heard(number, _):\n"
        "    with open('heard', 'a') as file:\n"
        "        file.write(f'{at_once()} ')\n"
        "    if at_once():\n"
        "        os._exit(9)\n"
        "signal.signal(signal.SIGTERM, heard)\n"
        "pathlib.Path('begun').touch()\n"
        "while True:\n"
        "    time.sleep(100)\n"
    )
    process = subprocess.Popen(
        [sys.executable, *MODULE, "--standalone", "--nproc_per_node", "1", "worker.py"],
        cwd=tmp_path,
        env={**os.environ, **QUIET},
    )
    deadline = time.monotonic() + LIMIT
    while not (tmp_path / "begun").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.terminate()
    while not (tmp_path / "heard").exists() or (tmp_path / "heard").read_text() != "False ":
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    end_by_signals(process)
    assert process.wait() == 128 + signal.SIGTERM
    assert (tmp_path / "heard").read_text() == "False True "


def test_an_interrupt_before_training_is_one_line(tmp_path: Path) -> None:
    """Also in an import that would swallow it."""
    (tmp_path / "words.py").write_text(
        "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\nexcept BaseException:\n    pass\n"
    )
    done = subprocess.run(
        [sys.executable, str(ROOT / "main.py"), "--keyword_file", "words.py", "--list_keywords"],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=LIMIT,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "main.py: interrupted\n")
