"""Experiment tracking by MLflow and by Weights & Biases, each behind the same few methods."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Protocol

PROJECT = "lowbit"  # the project of W&B, the experiment of MLflow, where the environment names none
PATIENCE = 60  # seconds that W&B may take to send the rest at the end
_BATCH = 100  # options that MLflow's server takes at once


class Tracker(Protocol):
    """A run as a tracker keeps it. Its methods raise any exception of the tracker's library.

    Attributes:
        run: by which the tracker finds the run again.
    """

    run: str

    def options(self, values: Mapping[str, object]) -> None:
        """Record the configuration; of a run that goes on also values that have changed."""
        ...

    def metrics(self, values: Mapping[str, float], epoch: int) -> None:
        """Record finite numbers after an epoch, counted from 1."""
        ...

    def notes(self, values: Mapping[str, str]) -> None:
        """Record texts about the run."""
        ...

    def file(self, path: Path) -> None:
        """Keep a file with the run."""
        ...

    def end(self, outcome: str) -> None:
        """End it: "finished", "stopped" or "failed"."""
        ...


class MLflow:
    """MLflow's tracking server, or without MLFLOW_TRACKING_URI its files in `mlruns/`.

    Args:
        name: of a new run.
        run: the run to go on with; empty: a new one.
    """

    def __init__(self, name: str, run: str) -> None:
        # Seconds and tries of a request: a server that does not answer must not hold up the training.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # it would report its use to its makers
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        client = import_module("mlflow").MlflowClient(
            os.environ.get("MLFLOW_TRACKING_URI") or Path("mlruns").absolute().as_uri()
        )
        self._client = client
        if run:
            client.update_run(run, status="RUNNING")
        else:
            experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
            known = client.get_experiment_by_name(experiment)
            number = known.experiment_id if known else client.create_experiment(experiment)
            run = client.create_run(number, run_name=name).info.run_id
        self.run = run

    def options(self, values: Mapping[str, object]) -> None:
        """Parameters cannot change; those that have changed are tags, too."""
        param = import_module("mlflow.entities").Param
        texts = {name: str(value) or "(empty)" for name, value in values.items()}
        known = self._client.get_run(self.run).data.params
        new = [param(name, text) for name, text in texts.items() if name not in known]
        for first in range(0, len(new), _BATCH):
            self._client.log_batch(self.run, params=new[first : first + _BATCH])
        changed = {name: text for name, text in texts.items() if known.get(name, text) != text}
        self.notes({f"changed.{name}": text for name, text in changed.items()})

    def metrics(self, values: Mapping[str, float], epoch: int) -> None:
        metric = import_module("mlflow.entities").Metric
        now = int(1000 * time.time())
        self._client.log_batch(
            self.run, metrics=[metric(name, value, now, epoch) for name, value in values.items()]
        )

    def notes(self, values: Mapping[str, str]) -> None:
        for name, text in values.items():
            self._client.set_tag(self.run, name, text)

    def file(self, path: Path) -> None:
        self._client.log_artifact(self.run, str(path))

    def end(self, outcome: str) -> None:
        status = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}[outcome]
        self._client.set_terminated(self.run, status)


class WandB:
    """Weights & Biases; WANDB_MODE=offline writes files in `wandb/` that `wandb sync` sends later.

    Args:
        name: of a new run.
        run: the run to go on with; empty: a new one.
    """

    def __init__(self, name: str, run: str) -> None:
        wandb = import_module("wandb")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT, name=name, id=run or None,
            resume="allow" if run else None,
            settings=wandb.Settings(console="off", silent=True, finish_timeout=PATIENCE, init_timeout=PATIENCE),
        )  # fmt: skip
        self._run.define_metric("*", step_metric="epoch")
        self.run = self._run.id

    def options(self, values: Mapping[str, object]) -> None:
        self._run.config.update(
            {
                name: value if isinstance(value, int | float | str | None) else str(value)
                for name, value in values.items()
            },
            allow_val_change=True,
        )

    def metrics(self, values: Mapping[str, float], epoch: int) -> None:
        self._run.log({**values, "epoch": epoch})

    def notes(self, values: Mapping[str, str]) -> None:
        self._run.summary.update(dict(values))

    def file(self, path: Path) -> None:
        shutil.copy(path, self._run.dir)  # whatever lies there is sent at the end

    def end(self, outcome: str) -> None:
        self._run.summary["outcome"] = outcome
        self._run.finish(exit_code=1 if outcome == "failed" else 0)


TRACKERS: dict[str, type[MLflow] | type[WandB]] = {"mlflow": MLflow, "wandb": WandB}
PACKAGES = {"mlflow": "mlflow-skinny", "wandb": "wandb"}  # what is installed for each
