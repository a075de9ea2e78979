"""The value of 16-bit images that becomes white: a checkpoint has it, and what goes on with it compares."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.main.runs import call, checkpoint, done_in
from utils.checkpoint.archive import read as read_checkpoint
from utils.checkpoint.archive import save as save_checkpoint

LINE = (
    "--dataset imagenet --num_classes 2 --keyword cbas,origin,small_stem --model resnet20 --width_alpha 0.125 "
    "--input_size 16 -b 4 -v 4 -j 0"
)
FILE = "weights/resnet20/old-checkpoint.pth.tar"


def write_images(folder: Path, most: int) -> None:
    """Two images for each of two classes, with values of up to `most`."""
    draw = np.random.default_rng(most)
    for name in "ab":
        (folder / name).mkdir(parents=True)
        for i in range(2):
            pixels = draw.integers(0, most, (16, 16), dtype=np.uint16)
            pixels[:8, :8] = most  # a corner would be cropped
            Image.fromarray(pixels).save(folder / name / f"{i}.png")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one epoch, case `old`, on `photos`; `alone` has its validation images, `others` darker images."""
    folder = tmp_path_factory.mktemp("range")
    write_images(folder / "photos" / "train", 1023)
    write_images(folder / "photos" / "val", 700)
    write_images(folder / "others" / "train", 500)
    (folder / "alone").mkdir()
    for root in ("alone", "others"):
        (folder / root / "val").symlink_to(folder / "photos" / "val")
    return done_in(folder, f"{LINE} --root photos --case old --epochs 1")


@pytest.mark.parametrize(
    ("how", "found"),
    [
        (f"-e --root alone --pretrained {FILE}", 700),
        ("-e --root alone -r --case old", 700),
        (f"--root others --pretrained {FILE} --case new", 500),
        ("--root others -r --case old --epochs 2", 500),
        (f"--root others --distill_teacher resnet20 --distill_pretrained {FILE} --case new", 500),
    ],
)
def test_another_range_is_an_error_that_names_the_trainings(
    trained: Path, how: str, found: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(trained)
    assert checkpoint(trained, "old")["max_value"] == 1023
    assert call(f"{LINE} {how}") == 2
    error = capsys.readouterr().err
    assert f"the largest value of these images is {found}: write --max_value 1023, or another" in error
    assert error.count("\n") == 1 and not (trained / "exp" / "new").exists()


def test_what_goes_on(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the value, with another one on purpose, with the training images, with a file of an earlier version."""
    monkeypatch.chdir(trained)
    payload = read_checkpoint(Path(FILE))
    del payload["max_value"]
    save_checkpoint(Path("older.pth"), payload)
    for how in (
        f"--root alone --max_value 1023 --pretrained {FILE}",
        f"--root alone --max_value 700 --pretrained {FILE}",
        f"--root photos --pretrained {FILE}",
        "--root alone --pretrained older.pth",
    ):
        assert call(f"{LINE} -e {how}") == 0, how
    capsys.readouterr()
