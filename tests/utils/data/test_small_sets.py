"""The digits: their split, their pixels, their augmentation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from tests.utils.data.helpers import DIGITS, pixels, read, resized, validation
from utils.data.loader import epoch_order
from utils.data.small_sets import digits
from utils.data.sources import open_data


def test_digits_split_is_stratified_constant_and_disjoint() -> None:
    (train, train_target), (val, val_target) = digits(8)
    assert (len(train), len(val)) == (1437, 360)
    everything, classes = load_digits(return_X_y=True)
    total, held_out = np.bincount(classes), np.bincount(val_target.numpy())
    assert np.abs(held_out - 0.2 * total).max() <= 1
    # At 8 pixels nothing is resized: the values of the set, 0 ... 16, come back.
    rows = [(x.flatten(1).double() * 16 / 255).round().long().tolist() for x in (train, val)]
    labelled = [
        {(*row, label) for row, label in zip(part, target.tolist(), strict=True)}
        for part, target in zip(rows, (train_target, val_target), strict=True)
    ]
    assert labelled[0].isdisjoint(labelled[1])
    assert labelled[0] | labelled[1] == {
        (*map(int, row), int(label)) for row, label in zip(everything, classes, strict=True)
    }
    # A change of the split would make accuracies incomparable.
    assert val_target[:10].tolist() == [7, 6, 3, 7, 7, 3, 2, 8, 9, 3]


def test_digits_are_resized_as_pillow_does() -> None:
    small, _ = digits(8)[1]
    large, _ = digits(32)[1]
    for before, after in zip(small[:20, 0], large[:20, 0], strict=True):
        expected = resized(before.numpy(), (32, 32), Image.Resampling.BICUBIC)
        # Half for rounding here, and half for rounding to 8 bits before enlarging in `small`.
        np.testing.assert_allclose(after.numpy(), np.clip(expected, 0, 255), atol=1.2)


def test_digits_validation_covers_every_sample_once_and_as_it_is() -> None:
    loaders = open_data(DIGITS)
    images, target = (torch.cat(parts) for parts in zip(*validation(loaders), strict=True))
    _, (expected, classes) = digits(32)
    assert torch.equal(target, classes)
    np.testing.assert_allclose(pixels(images, loaders), expected.expand(-1, 3, -1, -1).numpy(), atol=1e-3)


def test_digits_statistics_are_the_training_sets() -> None:
    (train, _), _ = digits(32)
    values = train.numpy().astype(np.float64) / 255
    loaders = open_data(DIGITS)
    assert loaders.mean == pytest.approx((values.mean(),) * 3, rel=1e-4)
    assert loaders.std == pytest.approx((values.std(),) * 3, rel=1e-3)


def test_digits_training_is_augmented_anew_each_epoch() -> None:
    config = replace(DIGITS, batch_size=1437)  # all in one batch, sorted back into the order of the set
    loader = open_data(config).train
    first, second = (
        read(loader, epoch)[0][0][epoch_order(1437, config.seed, epoch).argsort()] for epoch in (0, 1)
    )
    changed = (first != second).flatten(1).any(1)
    assert changed.all()
    assert (first - second).abs().mean() < first.abs().mean()  # still the same digits
