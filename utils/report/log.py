"""The log of a run: to the console, above a progress bar, and to a file."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from utils.errors import TrainingError, UserError

_LOGGER = logging.getLogger("train")


class _Console(logging.Handler):
    """Write messages to standard output, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "to_file_only", False):  # the end of a run is reported on standard error
            return
        encoding = sys.stdout.encoding or "utf-8"
        tqdm.write(self.format(record).encode(encoding, "backslashreplace").decode(encoding))
        sys.stdout.flush()


class _File(logging.FileHandler):
    """Append messages to a file; one that cannot be written ends the run instead of being lost."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exception()
        if isinstance(error, OSError):
            raise OSError(error.errno, f"{error.strerror}: {self.baseFilename}") from error
        super().handleError(record)


def silent(rank: int) -> logging.Logger:
    """The logger `train` of process `rank`, which is not the first of its run.

    The first one logs for all. This one shows only what it alone knows: records with `of_each_process`.
    """
    close()
    console = _Console()
    console.setFormatter(logging.Formatter(f"process {rank}: %(message)s"))
    console.addFilter(lambda record: getattr(record, "of_each_process", False))
    _LOGGER.addHandler(console)
    _LOGGER.setLevel(logging.WARNING)
    _LOGGER.propagate = False
    return _LOGGER


def setup(log_file: Path | None, verbose: bool) -> logging.Logger:
    """Direct the logger `train` to standard output and, with times, to the end of a file.

    A second call replaces what the first one set up.

    Args:
        log_file: the file to append to, its folder made when missing; None for no file.
        verbose: show debug messages too.

    Raises:
        UserError: the file cannot be written.
    """
    close()
    handlers: list[logging.Handler] = [_Console()]
    if log_file is not None:
        try:
            log_file.parent.mkdir(parents=True, exist_ok=True)
            file_handler = _File(log_file, encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise UserError(
                f"cannot write the log {log_file} ({error.strerror}): choose another folder with --log_dir"
            ) from error
        file_handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        handlers.append(file_handler)
    for handler in handlers:
        _LOGGER.addHandler(handler)
    _LOGGER.setLevel(logging.DEBUG if verbose else logging.INFO)
    _LOGGER.propagate = False  # a handler of the root logger would show everything twice
    return _LOGGER


def close() -> None:
    """Detach and close the handlers that `setup` attached, if any."""
    for handler in list(_LOGGER.handlers):
        _LOGGER.removeHandler(handler)
        handler.close()
    _LOGGER.propagate = True


@contextlib.contextmanager
def opened(folder: Path, rank: int, *, verbose: bool) -> Iterator[logging.Logger]:
    """Keep the log of a run open; an error that ends the run is logged as well.

    Args:
        folder: of the run, for the file `log.txt` of the first process.
        rank: number of this process, from 0.
        verbose: show debug messages.
    """
    logger = setup(folder / "log.txt", verbose) if rank == 0 else silent(rank)
    try:
        yield logger
    except (TrainingError, UserError, OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):  # a full disk takes no log either
            logger.error("failed: %s", str(error).partition("\n")[0], extra={"to_file_only": True})
        raise
    finally:
        close()
