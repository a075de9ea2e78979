"""Augmentation: colours, crops, mixtures, against torchvision's own functions or by their definition."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from utils.config.schema import DataConfig
from utils.data.augment import COLOUR_DRAWS, colour, crop_flip, mixing, warp
from utils.data.crop import CROP_DRAWS, centre_crop, random_crop
from utils.data.loader import Batch, Loader
from utils.data.sources import check_data, open_data
from utils.errors import UserError

CONFIG = DataConfig(
    dataset="fake", fake_size=48, batch_size=12, val_batch_size=5, input_size=16, num_classes=4
)


def epoch(loader: Loader, number: int = 0, position: int = 0) -> list[Batch]:
    loader.set_epoch(number)
    loader.set_position(position)
    return list(loader)


def same(left: list[Batch], right: list[Batch]) -> bool:
    pairs = zip(left, right, strict=True)
    return all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in pairs)


def smooth_images(count: int) -> Tensor:
    """Images in [0, 255] of pixels that differ little from their neighbours."""
    small = 255 * torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(small, size=(20, 24), mode="bilinear")


def test_colours_are_jittered_as_torchvision_does() -> None:
    images, rng = smooth_images(8), np.random.default_rng(0)
    draws = rng.random((8, COLOUR_DRAWS), dtype=np.float32)
    draws[:, 3:] = 0.5  # no lighting
    for image, row, actual in zip(images, draws, colour(images, torch.from_numpy(draws)), strict=True):
        factors = (0.6 + 0.8 * row[:3]).tolist()
        expected = functional.adjust_brightness(image / 255, factors[0])
        expected = functional.adjust_contrast(expected, factors[1])
        expected = functional.adjust_saturation(expected, factors[2])
        np.testing.assert_allclose(actual.numpy() / 255, expected.numpy(), atol=2e-3)


def test_lighting_has_the_covariance_of_the_principal_components() -> None:
    count = 40_000
    draws = torch.rand(count, COLOUR_DRAWS, generator=torch.Generator().manual_seed(0))
    draws[:, :3] = 0.5  # factors of 1
    added = (colour(torch.full((count, 3, 1, 1), 100.0), draws) - 100).flatten(1).double().numpy() / 255
    vectors = np.array([[-0.5675, -0.5808, -0.5836], [0.7192, -0.0045, -0.6948], [0.4009, -0.8140, 0.4203]])
    expected = vectors.T @ np.diag((0.1 * np.array([0.2175, 0.0188, 0.0045])) ** 2) @ vectors
    np.testing.assert_allclose(np.cov(added.T), expected, atol=0.03 * expected.max())
    np.testing.assert_allclose(added.mean(0), 0, atol=5e-4)


def test_colour_is_finite_at_the_ends_of_the_draws() -> None:
    ends = torch.tensor([0.0, 1 - 2**-24])[:, None].expand(2, COLOUR_DRAWS)
    assert colour(smooth_images(2), ends).isfinite().all()


def test_colours_change_in_training_only_and_with_the_epoch() -> None:
    usual, coloured = open_data(CONFIG), open_data(replace(CONFIG, colour=True))
    assert usual.val is not None and coloured.val is not None
    assert same(epoch(usual.val), epoch(coloured.val))
    [(images, _), *_], [(other, _), *_] = epoch(usual.train), epoch(coloured.train)
    assert (images != other).flatten(1).any(1).all()
    assert same(epoch(coloured.train, 1), epoch(open_data(replace(CONFIG, colour=True)).train, 1))
    assert not same(epoch(coloured.train, 1), epoch(coloured.train, 2))


def test_random_crops_fit_and_have_the_promised_shares_and_shapes() -> None:
    rng = np.random.default_rng(0)
    height, width = 375, 500
    crops = [random_crop(height, width, rng.random(CROP_DRAWS).tolist()) for _ in range(4000)]
    top, left, high, wide = np.array(crops).T
    assert (top >= 0).all() and (left >= 0).all()
    assert (top + high <= height).all() and (left + wide <= width).all()
    share, ratio = high * wide / (height * width), wide / high
    assert 0.079 < share.min() < 0.09 and share.max() > 0.97
    assert 0.74 < ratio.min() < 0.76 and 1.32 < ratio.max() < 1.35
    # The same distribution as torchvision's.
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    params = [v2.RandomResizedCrop(8).make_params([image]) for _ in range(4000)]
    for name, values in (("top", top), ("left", left), ("height", high), ("width", wide)):
        other = np.array([p[name] for p in params])
        for quantile in (0.1, 0.5, 0.9):
            assert abs(np.quantile(values, quantile) - np.quantile(other, quantile)) < 12, name


def test_random_crops_have_the_shape_of_what_they_become_times_the_promised_ratios() -> None:
    rng = np.random.default_rng(0)
    crops = [random_crop(375, 500, rng.random(CROP_DRAWS).tolist(), 160 / 96) for _ in range(2000)]
    top, left, high, wide = np.array(crops).T
    assert (top >= 0).all() and (left >= 0).all()
    assert (top + high <= 375).all() and (left + wide <= 500).all()
    ratio = wide / high * 96 / 160
    assert 0.73 < ratio.min() < 0.77 and 1.3 < ratio.max() < 1.36
    assert abs(np.median(np.log(ratio))) < 0.05


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(10, 1000, (0, 493, 10, 13)), (1000, 10, (493, 0, 13, 10)), (1, 1, (0, 0, 1, 1))],
)
def test_without_a_crop_that_fits_the_largest_centred_one_is_taken(
    height: int, width: int, expected: tuple[int, ...]
) -> None:
    assert random_crop(height, width, [0.9] * CROP_DRAWS) == expected


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 375), (256, 256), (333, 1000), (40, 39)])
def test_centre_crop_is_torchvisions(height: int, width: int) -> None:
    high, wide, top, left = centre_crop(height, width, (224, 224))
    image = torch.arange(height * width, dtype=torch.float32).view(1, height, width)
    resized = v2.Resize(256)(image)
    assert resized.shape[1:] == (high, wide)
    assert torch.equal(functional.crop(resized, top, left, 224, 224), v2.CenterCrop(224)(resized))


def test_mixup_is_a_mixture_of_each_image_with_its_neighbour() -> None:
    plain, mixed = epoch(open_data(CONFIG).train), epoch(open_data(replace(CONFIG, mixup_alpha=0.4)).train)
    shares = set()
    for (images, target), (actual, soft) in zip(plain, mixed, strict=True):
        hot = torch.nn.functional.one_hot(target, 4).float()
        assert soft.dtype == torch.float32
        differ = target != target.roll(1)
        share = soft[differ, target[differ]][0]
        torch.testing.assert_close(soft, share * hot + (1 - share) * hot.roll(1, 0))
        torch.testing.assert_close(actual, share * images + (1 - share) * images.roll(1, 0))
        assert actual.is_contiguous(memory_format=torch.channels_last)
        shares.add(share.item())
    assert len(shares) == len(plain)  # one of its own for each batch


def test_cutmix_pastes_a_rectangle_and_shares_the_class_by_its_area() -> None:
    plain, mixed = epoch(open_data(CONFIG).train), epoch(open_data(replace(CONFIG, cutmix_alpha=1.0)).train)
    pasted = 0
    for (images, target), (actual, soft) in zip(plain, mixed, strict=True):
        own, other = (actual == images).all(1), (actual == images.roll(1, 0)).all(1)
        assert (own | other).all()
        area = other.float().mean((1, 2))
        hot = torch.nn.functional.one_hot(target, 4).float()
        torch.testing.assert_close(soft, (1 - area[0]) * hot + area[0] * hot.roll(1, 0))
        pasted += bool(0 < area[0] < 1)
    assert pasted


@pytest.mark.parametrize("change", [{"mixup_alpha": 0.2}, {"mixup_alpha": 0.2, "cutmix_alpha": 1.0}])
def test_mixtures_depend_on_seed_and_epoch_only(change: dict[str, float]) -> None:
    config = replace(CONFIG, **change)  # pyright: ignore[reportArgumentType]
    one, two = open_data(config), open_data(config)
    state = torch.get_rng_state()
    whole = epoch(one.train, 1)
    assert torch.equal(torch.get_rng_state(), state)
    assert same(epoch(two.train, 1, position=2), whole[2:])
    assert not same(whole, epoch(two.train, 2))
    assert one.val is not None
    assert all(target.dtype == torch.int64 for _, target in one.val)


def test_with_both_some_batches_are_mixed_and_some_pasted() -> None:
    config = replace(CONFIG, fake_size=480, mixup_alpha=0.4, cutmix_alpha=1.0)
    plain, mixed = epoch(open_data(replace(CONFIG, fake_size=480)).train), epoch(open_data(config).train)
    pasted = [
        bool(((a == i).all(1) | (a == i.roll(1, 0)).all(1)).all())
        for (i, _), (a, _) in zip(plain, mixed, strict=True)
    ]
    assert len(pasted) == 40
    assert 8 < sum(pasted) < 32


def test_nothing_is_mixed_without_a_word() -> None:
    assert mixing(0.0, 0.0, 10) is None


def test_mixed_loss_is_the_mixture_of_losses() -> None:
    [(_, soft), *_] = epoch(open_data(replace(CONFIG, mixup_alpha=0.4)).train)
    output = torch.randn(len(soft), 4, generator=torch.Generator().manual_seed(0))
    expected = -(soft * output.log_softmax(1)).sum(1).mean()
    assert math.isclose(torch.nn.functional.cross_entropy(output, soft), expected, rel_tol=1e-5)


def test_rand_augment_changes_training_images_by_seed_and_epoch() -> None:
    config = replace(CONFIG, rand_augment=9)
    plain, augmented = epoch(open_data(CONFIG).train), epoch(open_data(config).train)
    assert not same(plain, augmented)
    assert same(augmented, epoch(open_data(config).train))
    assert not same(augmented, epoch(open_data(replace(config, rand_augment=20)).train))
    state = torch.get_rng_state()
    epoch(open_data(config).train)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dataset", ["dali", "digits", "glyphs"])
def test_rand_augment_is_not_for_all_sets(dataset: str) -> None:
    with pytest.raises(UserError, match=f"--rand_augment is not for --dataset {dataset}: use imagenet"):
        check_data(replace(CONFIG, dataset=dataset, rand_augment=9))


# ---- small images


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_crop_flip_pads_crops_and_flips(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (20, 3, 32, 32))
    draws = rng.random((20, 4), dtype=np.float32)
    draws[0, :3] = 0
    draws[1, :3] = np.nextafter(np.float32(1), np.float32(0))
    padded = np.pad(images, ((0, 0), (0, 0), (4, 4), (4, 4)), mode="reflect")
    expected = []
    for image, (u, v, w, _) in zip(padded, draws, strict=True):
        row, column = math.floor(9 * u), math.floor(9 * v)
        crop = image[:, row : row + 32, column : column + 32]
        expected.append(crop[:, :, ::-1] if w < 0.5 else crop)
    actual = crop_flip(torch.from_numpy(images).to(dtype), torch.from_numpy(draws))
    assert actual.dtype == dtype
    np.testing.assert_array_equal(actual.numpy(), np.stack(expected))


@pytest.mark.parametrize(
    ("draws", "angle", "zoom", "shift"),
    [
        ((0.5, 0.5, 0.5, 0.5), 0, 1, (0, 0)),
        ((0.5, 0.5, 1.0, 0.0), 0, 1, (2, -2)),  # pixels, x and y
        ((1.0, 0.5, 0.5, 0.5), 10, 1, (0, 0)),
        ((0.5, 0.0, 0.5, 0.5), 0, 0.9, (0, 0)),
        ((0.1, 0.9, 0.3, 0.8), -8, 1.08, (-0.8, 1.2)),
    ],
)
def test_warp_turns_zooms_and_shifts(
    draws: tuple[float, ...], angle: float, zoom: float, shift: tuple[float, float]
) -> None:
    image = np.random.default_rng(0).integers(0, 256, (32, 32)).astype(np.float64)
    # Where each pixel of the result comes from, about the centre of the image.
    y, x = np.mgrid[:32, :32] - 15.5
    cos, sin = np.cos(np.radians(angle)) / zoom, np.sin(np.radians(angle)) / zoom
    source = [sin * x + cos * y + shift[1] + 15.5, cos * x - sin * y + shift[0] + 15.5]
    expected = map_coordinates(np.pad(image, 4), np.array(source) + 4, order=1)
    actual = warp(torch.from_numpy(image).to(torch.uint8)[None, None], torch.tensor([draws]))
    np.testing.assert_allclose(actual[0, 0].numpy(), expected, atol=0.02)
