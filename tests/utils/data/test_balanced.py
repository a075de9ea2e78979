"""The balanced sampler: equal shares, the contract of all loaders, and images that come several times."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.utils.data.helpers import FAKE, read, same, write_folder
from utils.config.schema import DataConfig
from utils.data.loader import balanced_samples, epoch_order
from utils.data.sources import open_data

SETS = ["imagenet", "dali", "fake"]
UNEVEN = torch.tensor([0] * 90 + [1] * 9 + [2])


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 8, 8 and 1 training images."""
    root = tmp_path_factory.mktemp("uneven")
    write_folder(root, train=8, val=1)
    for number in range(1, 8):
        (root / "train" / "cat" / f"{number}.jpg").unlink()
    return root


def config_of(dataset: str, root: Path) -> DataConfig:
    """A configuration of one of `SETS`."""
    if dataset == "fake":
        return replace(FAKE, fake_size=17, num_classes=4, batch_size=4, balanced=True)
    return DataConfig(
        dataset=dataset, root=root, num_classes=3, input_size=(16, 24), batch_size=4, val_batch_size=4, workers=0,
        balanced=True,
    )  # fmt: skip


def test_classes_and_the_images_of_a_class_come_equally_often() -> None:
    drawn = torch.cat([balanced_samples(UNEVEN, 0, epoch) for epoch in range(300)])
    shares = torch.bincount(UNEVEN[drawn], minlength=3) / len(drawn)
    torch.testing.assert_close(shares, torch.full((3,), 1 / 3), atol=0.01, rtol=0)  # 3.7 standard deviations
    of_the_first = torch.bincount(drawn[drawn < 90], minlength=90).double()
    assert abs(float(of_the_first.mean()) / (10_000 / 90) - 1) < 0.05
    assert float(of_the_first.std()) < 2 * (10_000 / 90) ** 0.5


def test_draws_depend_on_seed_and_epoch() -> None:
    first = balanced_samples(UNEVEN, 0, 3)
    assert first.equal(balanced_samples(UNEVEN, 0, 3))
    assert not first.equal(balanced_samples(UNEVEN, 1, 3))
    assert not first.equal(balanced_samples(UNEVEN, 0, 4))


@pytest.mark.parametrize("dataset", SETS)
def test_an_epoch_is_the_same_for_other_workers_processes_and_resumed_runs(
    dataset: str, uneven: Path
) -> None:
    config = config_of(dataset, uneven)
    whole = read(open_data(config).train, 2)
    assert len(whole) == 4
    assert same(read(open_data(replace(config, workers=2)).train, 2), whole)
    assert same(read(open_data(config).train, 2, position=3), whole[3:])
    used = open_data(config).train
    read(used, 0)
    assert same(read(used, 2), whole)
    parts = [
        read(open_data(replace(config, batch_size=2, rank=rank, world_size=2)).train, 2) for rank in (0, 1)
    ]
    together = [(torch.cat([a[0], b[0]]), torch.cat([a[1], b[1]])) for a, b in zip(*parts, strict=True)]
    assert same(together, whole)


def test_images_have_their_own_classes(uneven: Path) -> None:
    """Computed images, which are not augmented, are those of the numbers drawn."""
    config = config_of("fake", uneven)
    loader = open_data(config).train
    drawn = balanced_samples(loader.target, config.seed, 1)[epoch_order(17, config.seed, 1)]
    images, targets = (torch.cat(parts) for parts in zip(*read(loader, 1), strict=True))
    assert targets.equal(loader.target[drawn[:16]])  # the incomplete batch is left out
    plain, classes = (
        torch.cat(parts)
        for parts in zip(*read(open_data(replace(config, batch_size=17, balanced=False)).train), strict=True)
    )
    place = epoch_order(17, config.seed, 0).argsort()
    assert images.equal(plain[place][drawn[:16]])
    assert targets.equal(classes[place][drawn[:16]])


@pytest.mark.parametrize("dataset", ["imagenet", "dali"])
def test_an_image_that_comes_several_times_is_augmented_anew(dataset: str, uneven: Path) -> None:
    """The only image of its class."""
    batches = read(open_data(config_of(dataset, uneven)).train, 0)
    images = torch.cat([images[target == 2] for images, target in batches])
    assert len(images) > 1
    for number, image in enumerate(images):
        assert not any(torch.equal(image, other) for other in images[number + 1 :])


def test_validation_is_not_balanced(uneven: Path) -> None:
    config = config_of("imagenet", uneven)
    one, two = open_data(config).val, open_data(replace(config, balanced=False)).val
    assert one is not None and two is not None
    assert same(read(one), read(two))
