"""Runs programs as processes of their own that begin with torch loaded: loading it is what takes the time."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from tests import ROOT

Run = Callable[[Path, str], "subprocess.CompletedProcess[str]"]  # a program and its arguments

LIMIT = 300  # seconds that a program gets
# A line of input is a JSON list: the program, its arguments; the answer is its exit status. Its output goes to two
# files. Processes leave without taking torch down.
STARTER = f"""
import json, os, runpy, signal, sys
sys.path.insert(0, sys.argv[1])
out, err = sys.argv[2:]
import timm, torchvision
import model.audit, model.networks.build, model.calibrate, utils.data.image_folder, utils.data.sources
import utils.report.log, utils.step.optimizer
for line in sys.stdin:
    process = os.fork()
    if process == 0:
        signal.alarm({LIMIT})
        for path, number in ((out, 1), (err, 2)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.argv = json.loads(line)
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(end.code)
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
os._exit(0)
"""


@contextlib.contextmanager
def starter(folder: Path, output: Path, environment: Mapping[str, str] | None = None) -> Iterator[Run]:
    """A function that runs a Python program in a folder.

    Args:
        folder: where programs run.
        output: a folder for what they say.
        environment: of theirs; by default this process's.
    """
    out, err = output / "out", output / "err"
    command = [sys.executable, "-W", "error", "-c", STARTER, str(ROOT), str(out), str(err)]
    with subprocess.Popen(
        command, cwd=folder, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as server:
        assert server.stdin is not None and server.stdout is not None
        talk, answers = server.stdin, server.stdout

        def run(program: Path, line: str) -> subprocess.CompletedProcess[str]:
            arguments = [str(program), *line.split()]
            print(json.dumps(arguments), file=talk, flush=True)
            status = int(answers.readline())
            return subprocess.CompletedProcess(arguments, status, out.read_text(), err.read_text())

        yield run
