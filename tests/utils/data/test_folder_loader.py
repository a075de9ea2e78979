"""Images of folders: how they are read, and those that cannot be."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.utils.data.helpers import CLASSES, pixels, read, validation, write_folder
from utils.config.schema import DataConfig
from utils.data.crop import resize_to_centre
from utils.data.fake import photograph
from utils.data.folder_sets import IMAGENET_MEAN, IMAGENET_STD
from utils.data.loader import epoch_order
from utils.data.sources import open_data
from utils.errors import UserError


def as_png(data: bytes) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(data)).save(buffer, "PNG")
    return buffer.getvalue()


DAMAGE = {
    "halved": lambda data: data[: len(data) // 2],
    "cut": lambda data: data[:-20],
    "text": lambda data: b"not an image",
    "empty": lambda data: b"",
    # Whole to look at: what is missing shows in decoding only.
    "broken": lambda data: as_png(data)[: len(data) // 2],
}


@pytest.mark.parametrize("size", [(16, 16), (14, 28), (28, 14)])
def test_imagenet_validation_images_are_resized_and_cropped(
    imagenet: DataConfig, folder: Path, size: tuple[int, int]
) -> None:
    high, wide = size
    loaders = open_data(replace(imagenet, input_size=high if high == wide else size))
    assert (loaders.mean, loaders.std) == (IMAGENET_MEAN, IMAGENET_STD)
    images, target = (torch.cat(parts) for parts in zip(*validation(loaders), strict=True))
    assert target.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    paths = [folder / "val" / name / f"{i}.jpg" for name in CLASSES for i in range(3)]
    for path, actual in zip(paths, pixels(images, loaders), strict=True):
        image = Image.open(path)
        factor = max(round(wide * 256 / 224) / image.width, round(high * 256 / 224) / image.height)
        width, height = (int(side * factor + 1e-6) for side in image.size)
        left, top = round((width - wide) / 2), round((height - high) / 2)
        whole = image.resize((width, height), Image.Resampling.BILINEAR)
        expected = whole.crop((left, top, left + wide, top + high))
        # torchvision rounds the sums of its two passes elsewhere than Pillow.
        np.testing.assert_allclose(actual.transpose(1, 2, 0), np.asarray(expected), atol=1.01)


def test_imagenet_training_is_augmented_anew_each_epoch(imagenet: DataConfig) -> None:
    config = replace(imagenet, batch_size=18)
    loader = open_data(config).train
    first, second = (read(loader, e)[0][0][epoch_order(18, config.seed, e).argsort()] for e in (0, 1))
    assert (first != second).flatten(1).any(1).all()


@pytest.mark.parametrize(("dataset", "workers"), [("imagenet", 0), ("imagenet", 2), ("dali", 2)])
@pytest.mark.parametrize("damage", DAMAGE)
def test_an_unreadable_image_is_named(tmp_path: Path, dataset: str, workers: int, damage: str) -> None:
    write_folder(tmp_path, train=2, val=1)
    path = tmp_path / "train" / "bee" / "1.jpg"
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    loader = open_data(
        DataConfig(
            dataset=dataset, root=tmp_path, num_classes=3, input_size=16, batch_size=3, workers=workers
        )
    ).train
    message = ""
    try:  # not `pytest.raises`: what it keeps would hold the workers until some later test
        read(loader)
    except UserError as error:
        message = str(error)
    assert message.startswith(f"cannot read the image {path} (")
    assert "\n" not in message
    assert "Traceback" not in message


@pytest.mark.parametrize("dataset", ["imagenet", "dali"])
def test_what_is_no_file_is_named(tmp_path: Path, dataset: str) -> None:
    write_folder(tmp_path, train=2, val=1)
    path = tmp_path / "train" / "bee" / "1.jpg"
    path.unlink()
    path.symlink_to("/dev/null")
    config = DataConfig(dataset=dataset, root=tmp_path, num_classes=3, input_size=16, batch_size=3, workers=0)
    with pytest.raises(UserError, match=r"bee/1.jpg \(not a regular file\)"):
        read(open_data(config).train)


@pytest.mark.parametrize("shape", [(1, 60_000), (60_000, 1), (2, 90_000)])
@pytest.mark.parametrize("dataset", ["imagenet", "dali"])
def test_slender_images_need_little_memory(tmp_path: Path, dataset: str, shape: tuple[int, int]) -> None:
    """Resized as a whole such an image would have some 200 GB."""
    write_folder(tmp_path, train=2, val=1)
    Image.new("RGB", shape, (10, 100, 200)).save(tmp_path / "val" / "bee" / "0.png")
    Image.new("RGB", shape, (10, 100, 200)).save(tmp_path / "train" / "bee" / "0.png")
    config = DataConfig(
        dataset=dataset,
        root=tmp_path,
        num_classes=3,
        input_size=1024,
        batch_size=7,
        val_batch_size=6,
        workers=0,
    )
    loaders = open_data(config)
    [(images, _)] = validation(loaders)
    np.testing.assert_allclose(pixels(images, loaders)[2, :, 500, 500], (10, 100, 200), atol=1e-3)
    read(loaders.train)


@pytest.mark.parametrize("dataset", ["imagenet", "dali"])
@pytest.mark.parametrize("error", [RuntimeError("you tried to allocate too much"), MemoryError()])
def test_an_image_that_cannot_be_fitted_is_named(
    tmp_path: Path, dataset: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when memory does not suffice for one."""
    write_folder(tmp_path, train=2, val=2)
    Image.new("RGB", (70, 70)).save(tmp_path / "val" / "bee" / "1.jpg")

    def fit(image: Tensor, size: tuple[int, int]) -> Tensor:
        if image.shape[0] == 70:
            raise error
        return resize_to_centre(image, size)

    monkeypatch.setattr(
        f"utils.data.{'dali' if dataset == 'dali' else 'folder'}_loader.resize_to_centre", fit
    )
    config = DataConfig(
        dataset=dataset, root=tmp_path, num_classes=3, input_size=16, val_batch_size=3, workers=0
    )
    with pytest.raises(UserError, match=f"cannot read .*bee/1.jpg \\({str(error) or 'MemoryError'}\\)"):
        read(validation(open_data(config)))
    targets = [target for _, target in read(validation(open_data(replace(config, skip_corrupt=1))))]
    assert torch.cat(targets).tolist() == [0, 0, 1, 2, 2]


@pytest.mark.parametrize(("dataset", "workers"), [("imagenet", 0), ("imagenet", 2), ("dali", 1)])
def test_unreadable_images_are_left_out_counted_and_reported(
    tmp_path: Path, dataset: str, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    write_folder(tmp_path, train=4, val=2)
    damaged = ["train/ant/0.jpg", "train/bee/1.jpg", "val/cat/1.jpg"]
    for name, damage in zip(damaged, ("broken", "text", "halved"), strict=True):
        (tmp_path / name).write_bytes(DAMAGE[damage]((tmp_path / name).read_bytes()))
    config = DataConfig(
        dataset=dataset, root=tmp_path, num_classes=3, input_size=16, batch_size=4, val_batch_size=4,
        workers=workers, skip_corrupt=3,
    )  # fmt: skip
    loaders = open_data(config)
    for epoch in (0, 1):
        assert sum(len(target) for _, target in read(loaders.train, epoch)) == 10
    order = epoch_order(12, config.seed, 1).tolist()
    good = [index // 4 for index in order if index not in (0, 5)]
    assert torch.cat([target for _, target in read(loaders.train, 1)]).tolist() == good
    assert torch.cat([target for _, target in read(validation(loaders))]).tolist() == [0, 0, 1, 1, 2]
    # Each is named once, however often it is met.
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 3
    for number, (line, name) in enumerate(zip(sorted(lines), damaged, strict=True), 1):
        assert line.startswith(f"left out an image that cannot be read, {number} of 3: ")
        assert any(str(tmp_path / name) in line for line in lines)


def unnoticed(data: bytes) -> bytes:
    """Half of the picture is missing, and the end is there."""
    return data[: len(data) // 2] + b"\xff\xd9"


def with_an_odd_marker(data: bytes) -> bytes:
    """In the middle of the picture's data is what no JPEG has."""
    middle = len(data) // 2
    return data[:middle] + b"\xff\x02" + data[middle + 2 :]


@pytest.mark.parametrize(
    ("dataset", "damage", "seen"),
    [
        ("imagenet", unnoticed, False),
        ("imagenet", with_an_odd_marker, True),
        ("dali", unnoticed, False),
        ("dali", with_an_odd_marker, False),
    ],
)
def test_which_damage_of_a_photograph_training_sees(
    tmp_path: Path, dataset: str, damage: Callable[[bytes], bytes], seen: bool
) -> None:
    """What docs/data.md says of it; `verify-data` sees all of this, see tests/utils/tools/test_images.py."""
    path = tmp_path / "val" / "one" / "0.jpg"
    for folder in (tmp_path / "train" / "one", path.parent):
        folder.mkdir(parents=True)
        photograph(0, 0, 1, 500, 375).save(folder / "0.jpg", quality=95)
    path.write_bytes(damage(path.read_bytes()))
    config = DataConfig(
        dataset=dataset, root=tmp_path, num_classes=1, input_size=32, val_batch_size=1, workers=0
    )
    with pytest.raises(UserError, match="cannot read the image") if seen else nullcontext():
        read(validation(open_data(config)))


def test_odd_names_are_one_line_in_messages(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_folder(tmp_path, train=2, val=1)
    name = tmp_path / "train" / "bee" / os.fsdecode(b"a\n\x1b\xff.jpg")
    name.write_text("no image")
    config = DataConfig(
        dataset="imagenet",
        root=tmp_path,
        num_classes=3,
        input_size=16,
        batch_size=7,
        workers=0,
        skip_corrupt=1,
    )
    read(open_data(config).train)
    [line] = [record.getMessage() for record in caplog.records]
    assert line.endswith(r"bee/a\n\x1b\udcff.jpg (no image)")
    with pytest.raises(UserError, match=r"bee/a\\n\\x1b\\udcff.jpg \(no image\)"):
        read(open_data(replace(config, skip_corrupt=0)).train)


@pytest.mark.parametrize("dataset", ["imagenet", "dali"])
@pytest.mark.parametrize("damage", ["text", "halved"])
def test_a_single_image_that_is_left_of_a_training_batch_stops_the_run(
    tmp_path: Path, dataset: str, damage: str
) -> None:
    """It would have no batch statistics; validation needs none."""
    write_folder(tmp_path, train=2, val=2)
    for path in (tmp_path / "train" / "bee" / "1.jpg", tmp_path / "val" / "bee" / "1.jpg"):
        path.write_bytes(DAMAGE[damage](path.read_bytes()))
    config = DataConfig(
        dataset=dataset, root=tmp_path, num_classes=3, input_size=16, batch_size=2, val_batch_size=2, workers=0,
        skip_corrupt=9,
    )  # fmt: skip
    loaders = open_data(config)
    assert [len(target) for _, target in read(validation(loaders))] == [2, 1, 2]
    with pytest.raises(UserError, match=r"a single image of a training batch can be read.*bee/1.jpg"):
        read(loaders.train)


@pytest.mark.parametrize(("dataset", "workers"), [("imagenet", 0), ("imagenet", 2), ("dali", 1)])
@pytest.mark.parametrize("damage", ["text", "broken"])
def test_a_batch_of_validation_may_be_lost_whole(
    tmp_path: Path, dataset: str, workers: int, damage: str
) -> None:
    """At the beginning, in the middle, two in a row and at the end; what is left are the images that can be read."""
    write_folder(tmp_path, train=2, val=3)
    paths = [tmp_path / "val" / name / f"{i}.jpg" for name in CLASSES for i in range(3)]
    for number in (0, 3, 4, 5, 8):
        paths[number].write_bytes(DAMAGE[damage](paths[number].read_bytes()))
    config = DataConfig(
        dataset=dataset, root=tmp_path, num_classes=3, input_size=16, val_batch_size=1, workers=workers,
        skip_corrupt=5,
    )  # fmt: skip
    loader = validation(open_data(config))
    for _ in range(2):
        assert [target.tolist() for _, target in read(loader)] == [[0], [0], [2], [2]]
    with pytest.raises(UserError, match=f"cannot read .*{paths[8].name}.*4 others are left out already"):
        read(validation(open_data(replace(config, skip_corrupt=4, workers=0))))
    for path in paths:
        path.write_text("no image")
    with pytest.raises(UserError, match="no image of the validation set can be read"):
        read(validation(open_data(replace(config, skip_corrupt=9, workers=0))))


@pytest.mark.parametrize("dataset", ["imagenet", "dali"])
def test_one_unreadable_image_too_many_stops_the_run(tmp_path: Path, dataset: str) -> None:
    write_folder(tmp_path, train=4, val=2)
    for name in ("ant/0.jpg", "bee/1.jpg"):
        (tmp_path / "train" / name).write_text("not an image")
    config = DataConfig(
        dataset=dataset, root=tmp_path, num_classes=3, input_size=16, batch_size=12, workers=0, skip_corrupt=1
    )
    with pytest.raises(UserError, match=r"cannot read .*\.jpg \(no image\): .*1 others are left out already"):
        read(open_data(config).train)
    # Of a batch something must be left.
    with pytest.raises(UserError, match="no image of a training batch can be read"):
        read(open_data(replace(config, batch_size=1, skip_corrupt=9)).train)


@pytest.mark.parametrize("dataset", ["imagenet", "dali"])
@pytest.mark.parametrize("ending", ["png", "tiff"])
def test_the_range_of_sixteen_bits_is_found_in_the_training_images(
    tmp_path: Path, dataset: str, ending: str
) -> None:
    """12 bits become all greys, not 16 of them; validation takes the same range."""
    for split, most in (("train", 4000), ("val", 8000)):
        for number, share in enumerate((1.0, 0.5)):
            path = tmp_path / split / "one" / f"{number}.{ending}"
            path.parent.mkdir(parents=True, exist_ok=True)
            ramp = np.linspace(0, share * most, 32).round().astype(np.uint16)
            Image.fromarray(np.tile(ramp, (32, 1))).save(path)
    Image.new("RGB", (32, 32), (9, 99, 199)).save(tmp_path / "train" / "one" / f"2.{ending}")
    config = DataConfig(
        dataset=dataset,
        root=tmp_path,
        num_classes=1,
        input_size=28,
        batch_size=3,
        val_batch_size=2,
        workers=0,
    )
    loaders = open_data(config)
    [warning] = loaders.warnings
    assert warning.startswith(
        f"2 of 3 images in {tmp_path / 'train'} have 16 bits: their largest value, 4000, becomes white (255)"
    )
    [(images, _)] = validation(loaders)
    whole, half = (image[:, 14] for image in pixels(images, loaders))  # a row of each
    ramp = np.linspace(0, 255, 32)[2:-2]
    np.testing.assert_allclose(half, np.tile(ramp, (3, 1)), atol=1.01)
    np.testing.assert_allclose(whole, np.tile(np.minimum(2 * ramp, 255), (3, 1)), atol=2.01)
    assert loaders.max_value == 4000
    (tmp_path / "train").rename(tmp_path / "gone")
    alone = open_data(replace(config, train=False))
    [warning] = alone.warnings
    assert "val have 16 bits: their largest value, 8000, becomes white" in warning and alone.max_value == 8000
    assert warning.endswith("another one than that of the training images: write --max_value with theirs")
    (tmp_path / "gone").rename(tmp_path / "train")
    loaders = open_data(replace(config, max_value=16000))
    assert loaders.warnings == ()
    [(images, _)] = validation(loaders)
    np.testing.assert_allclose(pixels(images, loaders)[1, :, 14], np.tile(ramp / 4, (3, 1)), atol=1.01)
