"""Experiment tracking of a run (`--track`), which the training does not depend on once it has begun."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from logging import Logger
from pathlib import Path
from typing import Any

from utils.checkpoint.case_files import CheckpointFiles
from utils.config.schema import Config
from utils.errors import UserError
from utils.report.run_report import hyperparameters, write_text
from utils.report.trackers import PACKAGES, TRACKERS, Tracker
from utils.text import printable

FILE = "track.json"  # in the folder of the run: by which each tracker finds it again
FILES = ("config.yaml", "metrics.csv", "summary.json", "audit.txt", "curves.png", "log.txt")
_REFUSED = (
    2  # items in one go after which the tracker does not seem to answer at all; each attempt takes its time
)
_SUMMARY = ("last_top1", "best_top1", "weight_bytes", "bit_operations", "macs")


def check_tracker(config: Config) -> None:
    """Raise `UserError` where the package of `--track` is not installed; an evaluation does not need it."""
    name = config.run.track
    if name is not None and not config.run.evaluate and importlib.util.find_spec(name) is None:
        raise UserError(f"--track {name} needs the package {PACKAGES[name]}: pip install {PACKAGES[name]}")


class Tracking:
    """Sends what a run records to its tracker, or to none.

    A failure of the tracker is a warning in the log. What could not be sent is sent after a later epoch, or at the end.

    Args:
        open_: opens the run at the tracker; None: there is none.
        name: of the tracker, for messages.
        logger: gets the warnings.
    """

    def __init__(self, open_: Callable[[], Tracker] | None, name: str, logger: Logger) -> None:
        self._open, self._name, self._logger = open_, name, logger
        self._tracker: Tracker | None = None
        self._waiting: list[Callable[[Tracker], None]] = []
        self._outcome = "stopped"

    def start(self, options: Mapping[str, object]) -> None:
        """Open the run and record its configuration, if there is some to record."""
        if options:
            self._waiting.append(lambda tracker: tracker.options(options))
        self._send()

    def epoch(self, row: Mapping[str, float]) -> None:
        """Record an epoch's metrics."""
        values = {name: value for name, value in row.items() if name != "epoch" and math.isfinite(value)}
        epoch = int(row["epoch"])
        self._waiting.append(lambda tracker: tracker.metrics(values, epoch))
        self._send()

    def finish(self, config: Config, summary: Mapping[str, Any]) -> None:
        """Record the outcome of a run that has ended, the paths of its checkpoints and its files."""
        values = {f"outcome/{name}": float(summary[name]) for name in _SUMMARY if summary[name] is not None}
        run, epoch = config.run, int(summary["epochs"])
        paths = CheckpointFiles(run.weights_dir, config.model.name, run.case).existing()
        notes = {"checkpoints": ", ".join(map(str, paths)), "audit": str(summary["audit"])}
        self._waiting += [
            lambda tracker: tracker.metrics(values, epoch),
            lambda tracker: tracker.notes(notes),
        ]
        for path in (run.log_dir / run.case / name for name in FILES):
            if path.exists():
                self._waiting.append(lambda tracker, path=path: tracker.file(path))
        self._outcome = "finished"

    def end(self, *, failed: bool = False) -> None:
        """End the run at the tracker."""
        outcome = "failed" if failed else self._outcome
        said = self._send()
        waiting, self._waiting = self._waiting, [lambda tracker: tracker.end(outcome)]
        if self._send(warn=not said) or waiting:
            self._logger.warning(
                "--track %s: not everything could be sent; metrics.csv and the other files of the run have it all",
                self._name,
            )

    def _send(self, *, warn: bool = True) -> str:
        """Do what is waiting; returns what the tracker said where that fails."""
        if self._open is None:
            return ""
        try:
            self._tracker = self._tracker or self._open()
        except Exception as error:  # each tracker has exceptions of its own
            return self._said(error, warn)
        said, refused = "", []
        while self._waiting and len(refused) < _REFUSED:
            item = self._waiting.pop(0)
            try:
                item(self._tracker)
            except Exception as error:
                said = self._said(error, warn and not said)
                refused.append(item)
        self._waiting = refused + self._waiting
        return said

    def _said(self, error: Exception, warn: bool) -> str:
        """What the tracker says, in one line."""
        said = _line(error)
        if warn:
            self._logger.warning("--track %s: %s", self._name, said)
        return said


def begun(config: Config, *, resumed: bool) -> Tracker | None:
    """Open a new run at the tracker of a training that asks for one, before anything is written or moved.

    None where there is no tracker, and where a run goes on, which does so without its tracker too.

    Raises:
        UserError: the tracker refuses it.
    """
    name = config.run.track
    if name is None or config.run.evaluate or config.data.rank != 0 or resumed:
        return None
    tracker = None
    try:
        tracker = TRACKERS[name](config.run.case, "")
        tracker.options(hyperparameters(config))
    except Exception as error:  # each tracker has exceptions of its own
        if tracker is not None:
            with suppress(Exception):
                tracker.end("failed")
        raise UserError(f"--track {name}: {_line(error)}; mend that, or leave --track out") from error
    return tracker


def _line(error: Exception) -> str:
    """What a tracker says, in one line."""
    return printable(" ".join(str(error).split()))[:300] or type(error).__name__


@contextmanager
def tracked(config: Config, folder: Path, logger: Logger, tracker: Tracker | None) -> Iterator[Tracking]:
    """The tracking of a run while the context is open: in the first process, of a training that asks for it.

    Args:
        config: the run's.
        folder: the run's.
        logger: gets warnings about the tracker.
        tracker: of a new run, from `begun`; None: the run goes on, here and at the tracker.
    """
    name = config.run.track
    if name is None or config.run.evaluate or config.data.rank != 0:
        yield Tracking(None, "", logger)
        return

    def open_() -> Tracker:
        known = {} if tracker else _known(folder / FILE)
        opened = tracker or TRACKERS[name](config.run.case, known.get(name, ""))
        write_text(folder / FILE, json.dumps({**known, name: opened.run}) + "\n")
        return opened

    tracking = Tracking(open_, name, logger)
    tracking.start({} if tracker else hyperparameters(config))
    try:
        yield tracking
    except BaseException:
        tracking.end(failed=True)
        raise
    tracking.end()


def _known(path: Path) -> dict[str, str]:
    """The runs in a file of trackers; none where it is missing or damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {str(name): str(run) for name, run in found.items()} if isinstance(found, dict) else {}
