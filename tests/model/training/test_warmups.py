"""Warm-ups that do not fit into the run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.main.runs import LSQ, call, log_of, metrics

RUN = f"{LSQ} --case warm --dry_run"  # of four iterations an epoch


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "--epochs 2 --wakeup_epoch 50",
            "--wakeup_epoch: a learning-rate warm-up of 200 iterations does not end within the 8",
        ),
        (
            "--epochs 2 --wakeup 9",
            "--wakeup: a learning-rate warm-up of 9 iterations does not end within the 8",
        ),
        ("--epochs 1 --extra_epoch 5 --wakeup 5", "does not end within the 4 of --epochs"),
        ("--epochs 1 --stable 4", "--stable: a warm-up of 4 iterations is the whole run of 4"),
        ("--epochs 1 --warmup 4", "--warmup: no iteration of 4 is left for the optimizer"),
    ],
)
def test_one_that_does_not_end_is_refused(
    options: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(f"{RUN} {options}") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "options", ["--epochs 2 --wakeup 8", "--epochs 2 --wakeup_epoch 2", "--epochs 2 -e --wakeup 99"]
)
def test_one_that_ends_with_the_schedule_is_taken(options: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(f"{RUN} {options}") == 0
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert not [line for line in warnings if "random weights" not in line]


def test_an_epoch_without_an_optimizer_step_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    """In the dry run, in the table of rates, in the log and in the metrics, where it has no learning rate."""
    line = f"{RUN.replace(' --dry_run', '')} --epochs 3 --warmup_epoch 1 --lr_policy fix"
    none = "no optimizer step (--warmup)"
    assert call(f"{line} --dry_run") == 0
    (schedule,) = [row for row in capsys.readouterr().out.splitlines() if row.startswith("schedule  ")]
    assert schedule.endswith("rate from epoch 1: 0.05; no optimizer step in the first 4 of 12 (--warmup)")
    words = LSQ.split("--keyword ")[1].split()[0]
    assert call(f"{line} --case rates --keyword {words},lr-test") == 0
    rows = capsys.readouterr().out.splitlines()[1:4]
    assert rows == [f"    0  {none}", "    1  0.05", "    2  0.05"]
    assert call(f"{line} --tensorboard --report_freq 2") == 0
    logged = log_of(Path(), "warm")
    for part, rate in (("epoch 1, 2/4:", none), ("epoch 1/3:", none), ("epoch 2, 2/4:", "lr 0.05")):
        (said,) = [row for row in logged.splitlines() if part in row]
        assert rate in said
    assert [row["lr"] for row in metrics(Path(), "warm")] == ["nan", "0.05", "0.05"]


def test_those_of_a_shortened_run_shrink(capsys: pytest.CaptureFixture[str]) -> None:
    """A config's epochs are written first, and those of the command line behind them."""
    assert call(f"{RUN} --epochs 100 --wakeup_epoch 5 --epochs 1") == 0
    assert (
        "warning: --wakeup_epoch: the shortened run of 4 iterations takes 2 of 20" in capsys.readouterr().out
    )
