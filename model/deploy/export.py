"""The words of tools.py that take a network out of its checkpoint: export, and import back.

torch and engines are imported where they are used, so that `--help` and mistakes answer at once.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from utils.errors import UserError
from utils.text import closest
from utils.tools.options import Options, given_path, refuse_existing

if TYPE_CHECKING:
    from model.load import Trained


def _program(trained: Trained, path: Path, options: Options) -> None:
    """A program of `torch.export`."""
    from model.deploy import program

    program.write(trained, path)


Write = Callable[["Trained", Path, Options], None]
"""Writes a network to a path, which does not exist yet; files beside it with the same stem belong to it."""

FORMATS: dict[str, Write] = {
    "program": _program,
}
"""What `--to` takes: name -> the function that writes it."""


def export(options: Options) -> int:
    """Write the network of --old to --new, in the format that --to names."""
    from model.load import load_trained
    from utils.text import printable

    name, new = options.to or "", given_path(options.new)
    if name not in FORMATS:
        raise UserError(f"--to {name}: write one of {', '.join(FORMATS)}{closest(name, FORMATS)}")
    refuse_existing(options, new)
    check_folder_of(new)
    trained = load_trained(given_path(options.old), ema_weights=options.ema_weights)
    replace_with(new, lambda path: FORMATS[name](trained, path, options), options)
    size = sum(file.stat().st_size for file in ([new] if new.is_file() else new.rglob("*")) if file.is_file())
    print(printable(f"{new}: {name}, {size:,} bytes"))
    return 0


def check_folder_of(path: Path) -> None:
    """Refuse, before any work, a file in a folder that is not there."""
    if not path.parent.is_dir():
        raise UserError(f"--new {path}: name a file in a folder that exists")


def replace_with(new: Path, write: Callable[[Path], None], options: Options) -> None:
    """Let `write` make a file or a folder, with more files beside it if it likes, and move all of it to `new`.

    It writes into a temporary folder, so that a failure leaves everything as it was.

    Raises:
        UserError: one of the other files exists, without --force; or the disk refuses.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=f".{new.name}.", dir=new.parent) as folder:
            write(Path(folder) / new.name)
            made = sorted(
                Path(folder).iterdir(), key=lambda path: path.name == new.name
            )  # the named one last
            refuse_existing(options, *(new.parent / path.name for path in made))
            for path in made:
                target = new.parent / path.name
                if target.is_dir() and not target.is_symlink():
                    shutil.move(target, Path(folder) / f"{path.name}.old")
                os.replace(path, target)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"{new}: cannot be written ({reason}); choose another folder or free some space"
        ) from error
