"""The log: what the console and the file say, and in which process."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from utils.data.image_folder import Unreadable
from utils.errors import UserError
from utils.report import log


@pytest.fixture(autouse=True)
def closed_log() -> Iterator[None]:
    yield
    log.close()


def test_console_is_plain_and_file_has_times(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "run.log"
    logger = log.setup(path, verbose=False)
    logger.info("loss %.2f", 1.5)
    logger.debug("unseen")
    logger.warning("careful")
    assert capsys.readouterr().out == "loss 1.50\ncareful\n"
    first, second = path.read_text().splitlines()  # before any close: every line is flushed
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} INFO loss 1\.50", first)
    assert second.endswith(" WARNING careful")


def test_names_that_are_not_utf8_are_logged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log.setup(tmp_path / "run.log", verbose=False).info("cannot read %s", os.fsdecode(b"\xff.jpg"))
    assert capsys.readouterr() == ("cannot read \\udcff.jpg\n", "")
    assert (tmp_path / "run.log").read_text().endswith("INFO cannot read \\udcff.jpg\n")


def test_verbose_shows_debug(capsys: pytest.CaptureFixture[str]) -> None:
    log.setup(None, verbose=True).debug("detail")
    assert capsys.readouterr().out == "detail\n"


def test_another_process_says_only_what_it_alone_knows(capsys: pytest.CaptureFixture[str]) -> None:
    """As the images that it leaves out."""
    logger = log.silent(3)
    logger.error("what the first process says")
    Unreadable(limit=2).add("x.jpg", "no image")
    assert capsys.readouterr() == (
        "process 3: left out an image that cannot be read, 1 of 2: x.jpg (no image)\n", ""
    )  # fmt: skip


def test_a_second_setup_replaces_the_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log.setup(tmp_path / "a.log", verbose=False).info("one")
    logger = log.setup(tmp_path / "b.log", verbose=False)
    logger.info("two")
    assert logger is logging.getLogger("train")
    assert capsys.readouterr().out == "one\ntwo\n"
    assert [len((tmp_path / name).read_text().splitlines()) for name in ("a.log", "b.log")] == [1, 1]
    log.close()
    assert logger.handlers == []
    log.setup(tmp_path / "b.log", verbose=False).info("three")  # a resumed run goes on in its file
    assert len((tmp_path / "b.log").read_text().splitlines()) == 2


def test_a_log_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "run.log", tmp_path):
        with pytest.raises(UserError, match=r"cannot write the log .*--log_dir"):
            log.setup(path, verbose=False)
    assert logging.getLogger("train").handlers == []
