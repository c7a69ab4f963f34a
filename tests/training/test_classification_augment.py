"""Augmentation for classifiers: windows, each operation of RandAugment by hand, Mixup and CutMix of painted batches."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps

from rtmdet_geo.config import parse_recipe
from rtmdet_geo.recipe_sections import ClassificationAugment
from rtmdet_geo.training import classification_augment as augment
from rtmdet_geo.training.classification_augment import OPERATIONS, Palette, augment_image, rand_augment, random_window
from rtmdet_geo.training.mixing import cutmix, mix_batch, mixup

PALETTE = Palette((10, 20, 30), np.array([[0.299, 0.587, 0.114]], np.float32))
FILL = np.array(PALETTE.fill)
GEOMETRY = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
SIDE = 100


def noise(height=40, width=48, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def smooth(height=40, width=48):
    return cv2.GaussianBlur(noise(height, width), (0, 0), 3)


def rng(seed=0):
    return np.random.default_rng(seed)


# --- windows


@settings(deadline=None, max_examples=150)
@given(st.integers(1, 600), st.integers(1, 600), st.floats(0.01, 1), st.integers(0, 10))
def test_windows_stay_inside(height, width, area_min, seed):
    y, x, rows, columns = random_window(rng(seed), height, width, area_min)
    assert 0 <= y and 0 <= x and rows >= 1 and columns >= 1 and y + rows <= height and x + columns <= width
    if min(height, width) >= 100 and max(height, width) <= 1.3 * min(height, width):
        assert 0.74 < columns / rows < 1.35  # whole px
        assert rows * columns > 0.97 * min(area_min, 0.74) * height * width


def test_windows_are_anywhere_and_of_any_size():
    found = np.array([random_window(rng(seed), 200, 300, 0.08) for seed in range(3000)])
    shares = found[:, 2] * found[:, 3] / (200 * 300)
    assert shares.min() < 0.1 and shares.max() > 0.85 and (found[:, :2].max(axis=0) > 100).all()
    assert abs(np.log(found[:, 3] / found[:, 2])).max() < math.log(4 / 3) + 0.03
    np.testing.assert_allclose(np.log(found[:, 3] / found[:, 2])[shares < 0.3].mean(), 0, atol=0.02)


def test_a_window_that_never_fits_is_the_centre():
    """Of 400 x 100 px a window of all the area fits with no ratio up to 4:3: 133 x 100 px in the middle are taken."""
    assert random_window(rng(), 100, 400, 1.0) == (0, (400 - 133) // 2, 100, 133)
    assert random_window(rng(), 400, 100, 1.0) == ((400 - 133) // 2, 0, 133, 100)


# --- operations


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name not in ("auto_contrast", "equalize", "invert")])
def test_level_zero_changes_nothing(name):
    """Except that posterize keeps 4 bits even there (timm's increasing form)."""
    image = noise()
    found = OPERATIONS[name](image, 0.0, PALETTE)
    expected = image & 0xF0 if name == "posterize" else image
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_keep_shape_and_input(name, channels):
    image = noise(channels=channels)
    palette = Palette((0,) * channels, np.full((1, channels), 1 / channels, np.float32))
    for level in (-1.0, -0.7, 0.7, 1.0):
        before = image.copy()
        found = OPERATIONS[name](image, level, palette)
        assert found.shape == image.shape and found.dtype == np.uint8
        np.testing.assert_array_equal(image, before)
        has_effect = name not in ("auto_contrast", "equalize")  # noise fills the histogram already
        if has_effect and (name, channels) != ("colour", 1):  # one channel is grey
            assert (found != image).any(), name


def test_tones_by_hand():
    pixels = np.array([[[0, 50, 100], [127, 128, 255]]], np.uint8)

    def of(name, level):
        return OPERATIONS[name](pixels, level, PALETTE)[0].tolist()

    assert of("invert", 0.3) == [[255, 205, 155], [128, 127, 0]]
    assert of("solarize", 0.5) == of("solarize", -0.5) == [[0, 50, 100], [127, 127, 0]]  # from 128 on
    assert of("solarize", 1.0) == of("invert", 1.0)
    assert of("solarize_add", 0.5) == [[55, 105, 155], [182, 128, 255]]  # 110 / 2 below 128
    assert of("posterize", 0.7) == [[0, 0, 64], [64, 128, 192]]  # 4 * .3 rounded up: 2 bits
    assert of("posterize", 1.0) == [[0, 0, 0], [0, 0, 0]]
    assert of("brightness", -1.0) == [[0, 5, 10], [13, 13, 26]]  # x .1
    assert of("brightness", 0.5) == [[0, 72, 145], [184, 186, 255]]  # x 1.45
    grey = [round(0.587 * 50 + 0.114 * 100), round(0.299 * 127 + 0.587 * 128 + 0.114 * 255)]
    assert of("colour", -1.0) == [
        [round(0.1 * value + 0.9 * tone) for value in pixel]
        for pixel, tone in zip(pixels[0].tolist(), grey, strict=True)
    ]
    mean = round((40.75 + 142.179) / 2)
    assert of("contrast", -1.0) == [
        [round(0.1 * value + 0.9 * mean) for value in pixel] for pixel in pixels[0].tolist()
    ]


@pytest.mark.parametrize("level", [-1.0, -0.63, 0.44, 1.0])
def test_tones_equal_those_of_pillow(level):
    """timm's operations are Pillow's; ours round where Pillow cuts off, and smooth the outermost pixels too."""
    image = smooth()
    theirs = Image.fromarray(image)
    factor = 1 + 0.9 * level
    expected = {
        "colour": ImageEnhance.Color(theirs).enhance(factor),
        "contrast": ImageEnhance.Contrast(theirs).enhance(factor),
        "brightness": ImageEnhance.Brightness(theirs).enhance(factor),
        "sharpness": ImageEnhance.Sharpness(theirs).enhance(factor),
        "solarize": ImageOps.solarize(theirs, math.ceil(256 * (1 - abs(level)))),
        "auto_contrast": ImageOps.autocontrast(theirs),
        "equalize": ImageOps.equalize(theirs),
        "invert": ImageOps.invert(theirs),
    }
    for name, picture in expected.items():
        found = OPERATIONS[name](image, level, PALETTE)[1:-1, 1:-1].astype(int)
        assert abs(found - np.asarray(picture)[1:-1, 1:-1].astype(int)).max() <= 2, name


def test_histograms_by_hand():
    ramp = np.repeat(np.array([[100, 110, 120, 150]], np.uint8)[..., None], 3, axis=2)
    assert augment.auto_contrast(ramp, 0.5, PALETTE)[0, :, 0].tolist() == [0, 51, 102, 255]
    image = noise(200, 200) // 4 + 60
    flat = augment.equalize(image, 0.5, PALETTE)
    assert np.ptp(flat) > 250 and abs(flat.mean() - 127) < 4 and np.ptp(image) < 70


def test_sharpening_by_hand():
    """A lone pixel of 130 is 130 * 5 / 13 = 50 when smoothed: at level -1 it falls to 130 - .9 * 80 = 58."""
    image = np.zeros((5, 5, 3), np.uint8)
    image[2, 2] = 130
    softer, sharper = (augment.sharpness(image, level, PALETTE) for level in (-1.0, 0.5))
    assert softer[2, 2].tolist() == [58] * 3 and softer[1, 1].tolist() == [9] * 3
    assert sharper[2, 2].tolist() == [130 + 36] * 3 and sharper[1, 1].tolist() == [0] * 3


def spot(x, y, side=SIDE):
    """A blurred white spot about a point in continuous px, on black."""
    ys, xs = np.mgrid[:side, :side] + 0.5
    values = 255 * np.exp(-((xs - x) ** 2 + (ys - y) ** 2) / (2 * 3.0**2))
    return np.repeat(values[..., None], 3, axis=2).astype(np.uint8)


def centre_of(image):
    weights = image[..., 0].astype(float)
    ys, xs = np.mgrid[: image.shape[0], : image.shape[1]] + 0.5
    return (xs * weights).sum() / weights.sum(), (ys * weights).sum() / weights.sum()


@pytest.mark.parametrize("level", [-1.0, -0.4, 0.4, 1.0])
@pytest.mark.parametrize(
    "name, moved",
    [
        ("translate_x", lambda x, y, level: (x + 0.45 * level * SIDE, y)),
        ("translate_y", lambda x, y, level: (x, y + 0.45 * level * SIDE)),
        ("shear_x", lambda x, y, level: (x + 0.3 * level * y, y)),
        ("shear_y", lambda x, y, level: (x, y + 0.3 * level * x)),
        (
            "rotate",  # clockwise on screen: to the right of the centre goes down
            lambda x, y, level: (
                50 + (x - 50) * math.cos(math.pi / 6 * level) - (y - 50) * math.sin(math.pi / 6 * level),
                50 + (x - 50) * math.sin(math.pi / 6 * level) + (y - 50) * math.cos(math.pi / 6 * level),
            ),
        ),
    ],
)
def test_geometry_moves_a_painted_spot(name, moved, level):
    black = Palette((0, 0, 0), PALETTE.luma)
    for x, y in ((50.0, 50.0), (60.0, 45.0)):
        expected = moved(x, y, level)
        if not all(9 < value < SIDE - 9 for value in expected):
            continue  # partly outside: no centre to compare
        found = centre_of(OPERATIONS[name](spot(x, y), level, black))
        assert math.dist(found, expected) < 0.05, (found, expected)
        if math.dist(expected, (x, y)) > 1:  # negative control: the other direction is another place
            assert math.dist(found, moved(x, y, -level)) > 1


@pytest.mark.parametrize("name", GEOMETRY)
def test_what_lies_outside_is_the_mean_colour(name):
    found = OPERATIONS[name](np.full((60, 60, 3), 200, np.uint8), 1.0, PALETTE)
    corners = np.concatenate([found[:2, :2], found[:2, -2:], found[-2:, :2], found[-2:, -2:]]).reshape(-1, 3)
    assert (corners == FILL).all(axis=1).any()
    assert (found == 200).all(axis=2).mean() > 0.5


# --- RandAugment


def test_drawn_operations_follow_number_and_probability():
    image = smooth()
    never = ClassificationAugment(randaugment_num=0)
    np.testing.assert_array_equal(rand_augment(rng(), never, PALETTE, image), image)
    one = ClassificationAugment(randaugment_num=1)
    changed = np.mean([(rand_augment(rng(seed), one, PALETTE, image) != image).any() for seed in range(400)])
    assert 0.42 < changed < 0.58
    two = ClassificationAugment(randaugment_num=2)
    changed = np.mean([(rand_augment(rng(seed), two, PALETTE, image) != image).any() for seed in range(400)])
    assert 0.67 < changed < 0.83


def test_levels_have_the_mean_and_spread_of_the_recipe(monkeypatch):
    seen = []

    def note(image, level, palette):
        seen.append(level)
        return image

    monkeypatch.setattr(augment, "OPERATIONS", {"note": note})
    section = ClassificationAugment(randaugment_num=50, randaugment_magnitude=7, randaugment_std=0.5)
    for seed in range(40):
        rand_augment(rng(seed), section, PALETTE, noise())
    levels = np.abs(seen)
    assert abs(levels.mean() - 0.7) < 0.01 and abs(levels.std() - 0.05) < 0.01
    assert 0.4 < np.mean(np.array(seen) > 0) < 0.6
    seen.clear()
    for seed in range(10):
        rand_augment(rng(seed), section.model_copy(update={"randaugment_std": 50.0}), PALETTE, noise())
    assert np.abs(seen).max() == 1 and np.abs(seen).min() == 0


def test_palette_of_a_model_knows_its_channels():
    values = {
        "name": "t",
        "augment": {"sampling": "classification"},
        "data": {"format": "folders", "train_images": "t"},
    }
    model = {"name": "cspnext_test", "classes": ["a"], "bands": ["blue", "green", "red"]}
    recipe = parse_recipe(values | {"model": model | {"mean": [103.53, 116.28, 123.675]}})
    palette = Palette.of_model(recipe.model)
    assert palette.fill == (104, 116, 124)
    np.testing.assert_allclose(palette.luma, [[0.114, 0.587, 0.299]], rtol=1e-6)


def test_a_sample_is_cropped_flipped_and_the_same_again():
    """A ramp from left to right says where the crop was and whether it is flipped."""
    image = np.tile(np.linspace(0, 255, 96).astype(np.uint8), (3, 64, 1))
    section = ClassificationAugment(image_size=32, eval_size=32, randaugment_num=0, crop_area_min=0.5)
    flipped, starts = [], []
    for seed in range(200):
        found = augment_image(rng(seed), section, PALETTE, image)
        assert found.shape == (3, 32, 32) and found.dtype == np.uint8 and found.flags.c_contiguous
        np.testing.assert_array_equal(found, augment_image(rng(seed), section, PALETTE, image))
        row = found[0, 16].astype(int)
        flipped.append(row[0] > row[-1])
        starts.append(min(row[0], row[-1]))
    assert 0.4 < np.mean(flipped) < 0.6 and np.ptp(starts) > 60
    still = section.model_copy(update={"flip_prob": 0.0})
    rows = [augment_image(rng(seed), still, PALETTE, image)[0, 16].astype(int) for seed in range(20)]
    assert all(row[0] < row[-1] for row in rows)


# --- Mixup and CutMix


def painted(number=4, side=24):
    """Image i is all of the value i and of class i."""
    images = torch.arange(number).float().view(-1, 1, 1, 1).expand(number, 3, side, side).clone()
    return images, torch.eye(number)


def test_mixup_by_hand():
    images, targets = painted(2, 1)
    mixed, shares = mixup(images, targets, torch.tensor([1, 0]), 0.75)
    assert mixed[:, 0, 0, 0].tolist() == [0.25, 0.75]
    assert shares.tolist() == [[0.75, 0.25], [0.25, 0.75]]


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 1000), st.integers(1, 6), st.floats(0.05, 3))
def test_mixup_targets_follow_the_pixels(seed, number, alpha):
    images, targets = painted(number)
    mixed, shares = mix_batch(rng(seed), images, targets, mixup_alpha=alpha, cutmix_alpha=0)
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(number))
    torch.testing.assert_close(mixed[:, 0, 0, 0], shares @ torch.arange(number).float(), atol=1e-5, rtol=1e-5)
    assert torch.equal(images, painted(number)[0]) and torch.equal(targets, torch.eye(number))


@settings(deadline=None, max_examples=80)
@given(st.integers(0, 1000), st.integers(1, 6), st.floats(0.05, 3))
def test_cutmix_targets_are_shares_of_pixels(seed, number, alpha):
    images, targets = painted(number)
    mixed, shares = mix_batch(rng(seed), images, targets, mixup_alpha=0, cutmix_alpha=alpha)
    counted = torch.stack([(mixed[:, 0] == value).float().mean(dim=(1, 2)) for value in range(number)], dim=1)
    torch.testing.assert_close(shares, counted, atol=1e-5, rtol=1e-5)
    assert torch.equal(images, painted(number)[0]) and torch.equal(targets, torch.eye(number))


def test_cutmix_by_hand():
    """Share 3/4 of 20 px: a rectangle of 10 px about the point, cut off at the edges."""

    class Points:
        def __init__(self, *values):
            self.values = list(values)

        def integers(self, high):
            assert high == 20
            return self.values.pop(0)

    images, targets = painted(2, 20)
    partners = torch.tensor([1, 0])
    mixed, shares = cutmix(Points(10, 7), images, targets, partners, 0.75)
    assert mixed[0, 0].nonzero().min(dim=0).values.tolist() == [5, 2]
    assert mixed[0, 0].nonzero().max(dim=0).values.tolist() == [14, 11]
    assert shares[0].tolist() == [0.75, 0.25]
    _, shares = cutmix(Points(0, 19), images, targets, partners, 0.75)  # 5 x 6 px are left
    assert shares[0].tolist() == pytest.approx([1 - 30 / 400, 30 / 400])
    _, shares = cutmix(Points(3, 3), images, targets, partners, 1.0)
    assert shares[0].tolist() == [1, 0]


def test_one_of_both_is_chosen_with_equal_probability():
    images, targets = painted(4)
    kinds = []
    for seed in range(300):
        mixed, _ = mix_batch(rng(seed), images, targets, mixup_alpha=1, cutmix_alpha=1)
        kinds.append("cutmix" if set(mixed.unique().tolist()) <= {0, 1, 2, 3} else "mixup")
    assert 0.42 < kinds.count("cutmix") / len(kinds) < 0.62  # a batch that meets itself counts as cutmix
    same = mix_batch(rng(), images, targets, mixup_alpha=0, cutmix_alpha=0)
    assert same[0] is images and same[1] is targets
