"""Preparations for a run: one process per GPU, and the checks of options that need no torch.

`python -m utils.processes.start OPTIONS` makes these checks alone, with main.py's message and exit status.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from utils.config.resolve import read
from utils.config.schema import Config, DeviceConfig
from utils.errors import UserError
from utils.processes import launch
from utils.step import schedule


def process_per_gpu(config: DeviceConfig, arguments: list[str] | None) -> None:
    """Become the launcher of one process per GPU, when several are asked for and no launcher started this one.

    Args:
        config: the GPUs and processes.
        arguments: the program's command line, its path first; None: another program called this one.

    Raises:
        UserError: the environment says that this process is the only one, or another program called.
    """
    if len(config.ids) < 2:
        return
    several = f"--device_ids {' '.join(map(str, config.ids))}: several GPUs take a process each"
    if "WORLD_SIZE" in os.environ or config.distributed:
        if os.environ.get("WORLD_SIZE", str(config.world_size)) == "1":
            raise UserError(f"{several}, and this is to be the only one: unset the variable WORLD_SIZE, and "
                            "leave out --distributed, or name one GPU")  # fmt: skip
        return
    if arguments is None:
        raise UserError(f"{several}; start main.py by itself")
    options = ["--standalone", "--nproc_per_node", str(len(config.ids))]
    sys.stdout.flush()
    command = [sys.executable, "-m", launch.__name__, *options, *arguments]
    os.execve(sys.executable, command, with_project(os.environ))


def with_project(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment in which `python -m` finds the project's modules from any folder."""
    levels = launch.__name__.count(".") + 1
    paths = (str(Path(launch.__file__).resolve().parents[levels - 1]), environment.get("PYTHONPATH", ""))
    return {**environment, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def check_options(config: Config) -> None:
    """Raise `UserError` for options that the configuration takes and the run does not."""
    settings = config.run
    schedule.check_schedule(config.schedule, config.optim.lr)
    check_folder(settings.log_dir / settings.case, "log_dir")
    if not settings.evaluate:
        check_folder(settings.weights_dir / config.model.name, "weights_dir")


def check_folder(folder: Path, option: str) -> None:
    """Raise `UserError` for a folder that cannot be made or written."""
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not there.is_dir():
        raise UserError(f"--{option}: {there} is not a folder; choose another --{option}")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"--{option}: {there} cannot be written; choose another --{option}")


def main(arguments: Sequence[str]) -> int:
    """Check a command line of main.py; returns the exit status: 0, or 2 for a user's mistake."""
    try:
        check_options(read(arguments))
    except UserError as error:
        print(f"main.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
