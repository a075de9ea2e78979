"""Experiment tracking: MLflow's files and W&B's offline mode; and trackers that do not answer."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from tests.main.runs import FP, call, files, log_of, metrics, summary
from utils.processes.interrupt import Stop
from utils.report.trackers import PACKAGES, MLflow


def installed(name: str) -> Any:
    return pytest.importorskip(name, reason=f"{name} is not installed: pip install -r requirement-track.txt")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No server, and nothing of this user's."""
    for name in [name for name in os.environ if name.startswith(("MLFLOW_", "WANDB_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb-home"))
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")


def test_mlflow(tmp_path: Path) -> None:
    """Configuration, metrics, paths and files are in one run, which a resumed training goes on with."""
    client = installed("mlflow").MlflowClient((tmp_path / "mlruns").as_uri())
    assert call(f"{FP} --track mlflow --case a --epochs 1 --seed 3") == 0
    run = json.loads((tmp_path / "exp" / "a" / "track.json").read_text())["mlflow"]
    first = client.get_run(run)
    assert (first.info.run_name, first.info.status) == ("a", "FINISHED")
    assert first.data.params["model.name"] == "resnet20" and first.data.params["schedule.epochs"] == "1"
    assert call(f"{FP} --track mlflow --case a --epochs 2 --seed 3 -r") == 0
    assert json.loads((tmp_path / "exp" / "a" / "track.json").read_text())["mlflow"] == run
    (experiment,) = client.search_experiments(filter_string="name = 'lowbit'")
    assert [each.info.run_id for each in client.search_runs([experiment.experiment_id])] == [run]
    found = client.get_run(run)
    assert found.info.status == "FINISHED" and found.data.tags["changed.schedule.epochs"] == "2"
    for column in ("train_loss", "val_top1", "lr"):
        history = [(point.step, point.value) for point in client.get_metric_history(run, column)]
        assert history == [(i + 1, float(row[column])) for i, row in enumerate(metrics(tmp_path, "a"))]
    assert found.data.metrics["outcome/last_top1"] == summary(tmp_path, "a")["last_top1"]
    assert "weights/resnet20/a-checkpoint.pth.tar" in found.data.tags["checkpoints"]
    files = {item.path for item in client.list_artifacts(run)}
    assert files == {"config.yaml", "metrics.csv", "summary.json", "audit.txt", "curves.png", "log.txt"}
    assert call(f"{FP} --track mlflow --case a --epochs 1") == 0  # a new training of the case is a new run
    assert json.loads((tmp_path / "exp" / "a" / "track.json").read_text())["mlflow"] != run
    assert len(client.search_runs([experiment.experiment_id])) == 2


def test_wandb_offline(tmp_path: Path) -> None:
    """Both parts of a resumed training are files of the same run, with all metrics."""
    installed("wandb")
    assert call(f"{FP} --track wandb --case a --epochs 1") == 0
    run = json.loads((tmp_path / "exp" / "a" / "track.json").read_text())["wandb"]
    assert call(f"{FP} --track wandb --case a --epochs 2 -r") == 0
    parts = sorted((tmp_path / "wandb").glob(f"offline-run-*-{run}"))
    assert len(parts) == 2 and len(list((tmp_path / "wandb").glob("offline-run-*"))) == 2
    rows, config, texts = [], {}, {}
    for part in parts:
        for record in records(part / f"run-{run}.wandb"):
            if record.HasField("history"):
                values = {
                    "/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item
                }
                rows.append(values)
            for item in [*record.config.update, *record.run.config.update]:
                config["/".join(item.nested_key) or item.key] = json.loads(item.value_json)
            for item in record.summary.update:
                texts["/".join(item.nested_key) or item.key] = json.loads(item.value_json)
    assert [row["epoch"] for row in rows if "val_top1" in row] == [1, 2]
    found = [row["val_top1"] for row in rows if "val_top1" in row]
    assert found == [float(row["val_top1"]) for row in metrics(tmp_path, "a")]
    assert config["model.name"] == "resnet20" and config["schedule.epochs"] == 2
    assert texts["outcome"] == "finished" and "a-checkpoint.pth.tar" in texts["checkpoints"]
    kept = {path.name for path in (parts[1] / "files").iterdir()}
    assert {"config.yaml", "metrics.csv", "summary.json", "curves.png"} <= kept


def records(path: Path) -> Iterator[Any]:
    """What a file of W&B holds: the log format of LevelDB, in blocks of 32 KiB, after a header of 7 bytes."""
    kind = import_module("wandb.proto.wandb_internal_pb2").Record
    data, place, whole = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if 2**15 - place % 2**15 < 7:
            place += 2**15 - place % 2**15
        _, length, part = struct.unpack_from("<IHB", data, place)
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if part in (1, 4):  # whole, or the last part
            yield kind.FromString(whole)
            whole = b""


def test_a_stopped_run_is_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that fails, too."""
    client = installed("mlflow").MlflowClient((tmp_path / "mlruns").as_uri())

    def status(case: str) -> str:
        run = json.loads((tmp_path / "exp" / case / "track.json").read_text())["mlflow"]
        return client.get_run(run).info.status

    assert call(f"{FP} --track mlflow --case diverges --epochs 1 --lr 1e30") == 1
    assert status("diverges") == "FAILED"
    monkeypatch.setattr(Stop, "agree", lambda self, other: True)
    assert call(f"{FP} --track mlflow --case stopped --epochs 1") == 75
    assert status("stopped") == "KILLED"


def test_a_tracker_that_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A new training does not begin without it; one that has begun goes on, says so, and sends the rest later."""
    client = installed("mlflow").MlflowClient((tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    capsys.readouterr()
    assert call(f"{FP} --track mlflow --case a --epochs 1") == 2
    out, err = capsys.readouterr()
    assert (
        "--track" not in out
        and err.count("\n") == 1
        and err.startswith("main.py: error: --track mlflow: ")
        and "127.0.0.1" in err
    )
    assert not (tmp_path / "weights" / "resnet20" / "a-checkpoint.pth.tar").exists()

    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert call(f"{FP} --track mlflow --case a --epochs 1") == 0
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    before = files(tmp_path)
    assert call(f"{FP} --track mlflow --case a --epochs 1") == 2  # the earlier run stays where it is
    assert files(tmp_path) == before
    assert call(f"{FP} --track mlflow --case a --epochs 2 -r") == 0
    log = log_of(tmp_path, "a")
    assert "not everything could be sent; metrics.csv" in log and summary(tmp_path, "a")["epochs"] == 2
    run = json.loads((tmp_path / "exp" / "a" / "track.json").read_text())["mlflow"]
    assert len(client.get_metric_history(run, "val_top1")) == 1

    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    metrics_of, failures = MLflow.metrics, [OSError("connection\nlost")]

    def flaky(self: MLflow, *arguments: Any) -> None:
        if failures:
            raise failures.pop()
        metrics_of(self, *arguments)

    monkeypatch.setattr(MLflow, "metrics", flaky)
    assert call(f"{FP} --track mlflow --case a --epochs 4 -r") == 0
    assert capsys.readouterr().out.count("\n--track mlflow: connection lost\n") == 1
    assert [point.step for point in client.get_metric_history(run, "val_top1")] == [1, 3, 4]


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_missing_package(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Found by a dry run, too; nothing is written."""
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    for line in (f"{FP} --track {name}", f"{FP} --track {name} --dry_run"):
        assert call(line) == 2
        expected = f"main.py: error: --track {name} needs the package {PACKAGES[name]}: pip install {PACKAGES[name]}\n"
        assert capsys.readouterr().err == expected
    assert not any(tmp_path.iterdir())


def test_other_values(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(f"{FP} --track mlfow --dry_run") == 2
    assert "--track mlfow is not known; did you mean mlflow?" in capsys.readouterr().err
    assert call(f"{FP} --track wandb -e --dry_run") == 0
    assert "--track has no effect with --evaluate" in capsys.readouterr().out
    assert call(f"{FP} --track wandb --track none --dry_run") == 0  # whether it is installed or not
