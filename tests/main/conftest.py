"""A folder of its own for each test, and a run that is done."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.main.runs import LSQ, done_in


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs write below the current folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def lsq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a two-bit run of two epochs, case `lsq`."""
    line = f"{LSQ} --case lsq --epochs 2 --re_init --tensorboard --verbose -s 1"
    return done_in(tmp_path_factory.mktemp("lsq"), line)
