"""Crops: boxes and masks follow painted pixels, shares are areas, tones and bands behave."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rtmdet_geo.annotations.outlines import Window, as_outline, fill_outline, mask_bounds, transform_outline
from rtmdet_geo.boxes import boxes_to_polygons, minimum_area_rectangle
from rtmdet_geo.nms import rotated_iou_aligned
from rtmdet_geo.recipe_sections import CropAugment
from rtmdet_geo.structures import PAD_VALUE
from rtmdet_geo.training.augment import (
    crop_bounds,
    crop_masks,
    drop_bands,
    random_similarity,
    random_tones,
    transform_boxes,
    visible_share,
    warp_crop,
)


def painted(box, size=200, factor=16):
    """(2, size, size) uint8 with one box painted at 255, anti-aliased by drawing it ``factor`` times larger."""
    polygon = np.round(boxes_to_polygons(np.array([box]))[0] * factor).astype(np.int32)
    large = np.zeros((size * factor, size * factor), np.uint8)
    cv2.fillPoly(large, [polygon], 255)
    plane = cv2.resize(large, (size, size), interpolation=cv2.INTER_AREA)
    return np.stack([plane, plane])


@given(seed=st.integers(0, 2**32 - 1), angle=st.floats(-1.5, 1.5), flip=st.booleans())
@settings(deadline=None, max_examples=25)
def test_boxes_follow_painted_pixels(seed, angle, flip):
    rng = np.random.default_rng(seed)
    box = np.array([100.0, 95.0, 60.0, 24.0, angle])
    section = CropAugment(flip_prob=float(flip))
    matrix = random_similarity(rng, section, (101.0, 96.0), (160, 128))
    crop = warp_crop(painted(box), matrix, (160, 128))
    moved = transform_boxes(box[None], matrix)[0]
    rows, columns = np.nonzero(crop[0] >= 128)
    corners = np.concatenate([np.stack([columns + dx, rows + dy], 1) for dx in (0, 1) for dy in (0, 1)])
    seen = minimum_area_rectangle(corners.astype(float))
    assert np.allclose(seen[:2], moved[:2], atol=1.0)
    assert rotated_iou_aligned(seen[None], moved[None])[0] > 0.85
    assert np.array_equal(crop[0], crop[1])


def house(x, y, angle):
    """L-shaped outline of 60 px with a courtyard in its thick arm."""
    wall = np.array([[0, 0], [60, 0], [60, 30], [24, 30], [24, 60], [0, 60]], float)
    yard = np.array([[32, 8], [52, 8], [52, 22], [32, 22]], float)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return as_outline([[(ring - 30) @ turn.T + (x, y) for ring in (wall, yard)]])


def painted_outline(outline, size=200, factor=8):
    """(2, size, size) uint8, the outline at 255, anti-aliased."""
    large = fill_outline(transform_outline(outline, factor * np.eye(2, 3)), Window(0, 0, size * factor, size * factor))
    plane = cv2.resize(255 * large, (size, size), interpolation=cv2.INTER_AREA)
    return np.stack([plane, plane])


def grown(mask):
    return cv2.dilate(mask.astype(np.uint8), np.ones((3, 3), np.uint8)).astype(bool)


@given(
    seed=st.integers(0, 2**32 - 1),
    angle=st.floats(-3.1, 3.1),
    flip=st.booleans(),
    centre=st.tuples(st.floats(40, 160), st.floats(40, 160)),
)
@settings(deadline=None, max_examples=25)
def test_masks_follow_painted_pixels_to_one_pixel(seed, angle, flip, centre):
    rng = np.random.default_rng(seed)
    outline, size = house(100, 95, angle), (120, 104)
    matrix = random_similarity(rng, CropAugment(flip_prob=float(flip)), centre, size)  # may cut the house
    (mask,) = crop_masks([outline], matrix, size)
    picture = warp_crop(painted_outline(outline), matrix, size)[0]
    inside = warp_crop(np.full((1, 200, 200), 255, np.uint8), matrix, size)[0] == 255  # beyond it is grey, not dark
    seen = picture >= 128
    assert mask.shape == (104, 120) and mask.dtype == np.uint8
    assert not (seen & inside & ~grown(mask)).any() and not ((mask > 0) & inside & ~grown(seen)).any()
    # The box holds the mask; where nothing is cut off they differ by a pixel's rounding.
    (bounds,) = crop_bounds([outline], matrix, size)
    if mask.any():
        found = mask_bounds(mask)
        assert (found[:2] >= np.floor(bounds[:2])).all() and (found[2:] <= np.ceil(bounds[2:])).all()
        if (bounds[:2] > 0).all() and (bounds[2:] < size).all():
            np.testing.assert_allclose(found, bounds, atol=1.5)


def test_nothing_visible_gives_zeros():
    outline, far = house(100, 100, 0), np.array([[1.0, 0, 500], [0, 1, 0]])
    assert crop_bounds([outline, ()], far, (64, 64)).tolist() == [[0] * 4] * 2
    assert not crop_masks([outline, ()], far, (64, 64)).any()
    assert crop_bounds([], far, (64, 32)).shape == (0, 4) and crop_masks([], far, (64, 32)).shape == (0, 32, 64)


def test_identity_gives_the_very_pixels_and_grey_outside():
    image = np.random.default_rng(0).integers(0, 256, (4, 20, 30), dtype=np.uint8)
    identity = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    assert np.array_equal(warp_crop(image, identity, (30, 20)), image)
    far = np.array([[1.0, 0.0, 500.0], [0.0, 1.0, 0.0]])
    assert (warp_crop(image, far, (32, 32)) == PAD_VALUE).all()
    half = warp_crop(image, np.array([[1.0, 0.0, 10.0], [0.0, 1.0, 0.0]]), (40, 20))
    assert np.array_equal(half[:, :, 11:40], image[:, :, 1:])
    assert (half[:, :, :9] == PAD_VALUE).all()


def test_one_band_is_enough():
    image = np.arange(100, dtype=np.uint8).reshape(1, 10, 10)
    assert np.array_equal(warp_crop(image, np.eye(2, 3), (10, 10)), image)


def test_visible_share_by_hand():
    boxes = np.array([[50, 50, 20, 10, 0.3], [0, 50, 20, 10, 0], [100, 100, 20, 10, 0], [300, 50, 20, 10, 0.0]])
    assert visible_share(boxes, (100, 100)) == pytest.approx([1, 0.5, 0.25, 0])
    assert visible_share(np.zeros((0, 5)), (100, 100)).shape == (0,)


def test_tones_change_pixels_within_their_ranges_and_can_be_off():
    image = np.full((3, 16, 16), 100, np.uint8)
    off = CropAugment(gain=0, band_gain=0, offset=0, gamma=0, noise=0, blur_prob=0)
    assert np.array_equal(random_tones(np.random.default_rng(1), off, image), image)
    changed = random_tones(np.random.default_rng(1), CropAugment(), image)
    assert changed.dtype == np.uint8 and not np.array_equal(changed, image)


def test_dropped_band_gets_its_fill_value_and_others_stay():
    image = np.full((4, 8, 8), 7, np.uint8)
    drop_bands(np.random.default_rng(0), image, {3: 1.0, 0: 0.0}, {3: 40, 0: 1})
    assert (image[3] == 40).all() and (image[:3] == 7).all()
