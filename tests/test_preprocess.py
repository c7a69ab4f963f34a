"""Resizing, padding and normalising an ordinary image, against the reference's pixels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import recipes
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from rtmdet_geo.preprocess import (
    MEAN_BGR,
    STD_BGR,
    Letterbox,
    crop_centre,
    keep_ratio_size,
    letterbox,
    normalise,
    resize_bicubic,
    short_side_size,
)
from rtmdet_geo.structures import PAD_VALUE


@pytest.fixture(scope="module")
def golden(oracle_dir: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((oracle_dir / "preprocess.json").read_text())
    assert content["cases"]
    return content


def image_of(case: dict[str, Any]) -> np.ndarray:
    image: np.ndarray = recipes.image(case["kind"], case["seed"], case["height"], case["width"])
    assert int(image.sum(dtype=np.int64)) == case["image_sum"]
    return image


def check(boxed: Letterbox, normalised: np.ndarray, case: dict[str, Any]) -> None:
    """Compare with a golden case: sizes and factors exactly, pixels to one grey level."""
    meta = case["meta"]
    assert list(boxed.content) == case["content"]
    assert list(boxed.image.shape[:2]) == meta["img_shape"] == meta["pad_shape"]
    assert boxed.scale_factor == pytest.approx(meta["scale_factor"], rel=1e-12)
    height, width = boxed.content
    means = boxed.image[:height, :width].mean(axis=(0, 1))
    np.testing.assert_allclose(means, case["uint8_mean_content"], atol=2e-3)
    padding = {*boxed.image[height:].ravel().tolist(), *boxed.image[:, width:].ravel().tolist()}
    assert sorted(padding) == case["uint8_pad_values"]
    assert list(normalised.shape) == case["padded_shape"]
    for channel, y, x, grey, value in case["pixels"]:
        assert abs(int(boxed.image[y, x, channel]) - grey) <= 1, (channel, y, x)
        assert normalised[channel, y, x] == pytest.approx(value, abs=1.01 / min(STD_BGR)), (channel, y, x)
    assert recipes.check_summary(case["normalised"], normalised) < 1.01 / min(STD_BGR) / case["normalised"]["absmax"]
    assert normalised.mean(dtype=np.float64) == pytest.approx(case["normalised"]["mean"], abs=1e-4)


def test_oracle_preprocess(golden: dict[str, Any]) -> None:
    assert golden["mean_bgr"] == pytest.approx(MEAN_BGR)
    assert golden["std_bgr"] == pytest.approx(STD_BGR)
    assert golden["pad_value"] == PAD_VALUE
    assert golden["bgr_to_rgb"] is False
    for case in golden["cases"]:
        boxed = letterbox(image_of(case), case["size"])
        check(boxed, normalise(boxed.image), case)


def test_oracle_preprocess_negative_controls(golden: dict[str, Any]) -> None:
    """Other padding, statistics of the other channel order, a resize to the nearest pixel: each is seen."""
    case = max(golden["cases"], key=lambda case: len(case["uint8_pad_values"]) * case["height"] * case["width"])
    image = image_of(case)
    boxed = letterbox(image, case["size"])
    black = letterbox(image, case["size"], pad_value=0)
    swapped = normalise(boxed.image, MEAN_BGR[::-1], STD_BGR[::-1])
    moved = boxed._replace(image=np.roll(boxed.image, 8, axis=1))
    for wrong, normalised in (
        (black, normalise(black.image)),
        (boxed, swapped),
        (moved, normalise(moved.image)),
        (boxed, normalise(boxed.image).transpose(0, 2, 1)),
    ):
        with pytest.raises(AssertionError):
            check(wrong, normalised, case)


def test_worked_example() -> None:
    """2 x 4 px to a side of 8: each pixel twice as large, interpolated between centres, grey below."""
    image = np.array([[[0], [100], [200], [100]], [[0], [100], [200], [100]]], np.uint8)
    boxed = letterbox(image, 8)
    assert (boxed.content, boxed.scale_factor) == ((4, 8), (2.0, 2.0))
    assert boxed.image[:4, :, 0].tolist() == [[0, 25, 75, 125, 175, 175, 125, 100]] * 4
    assert (boxed.image[4:] == 114).all()
    np.testing.assert_allclose(normalise(boxed.image, [100.0], [50.0])[0, 0], [-2, -1.5, -0.5, 0.5, 1.5, 1.5, 0.5, 0])


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 9), st.integers(1, 96), st.integers(0, 2**32))
@example(6, 18, 2, 9, 0)
def test_properties(height: int, width: int, channels: int, side: int, seed: int) -> None:
    image = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    before = image.copy()
    boxed = letterbox(image, side)
    new_height, new_width = boxed.content
    assert boxed.image.shape == (side, side, channels)
    assert max(boxed.content) == side
    assert min(boxed.content) >= 1
    assert abs(new_height - height * side / max(height, width)) <= 1
    assert abs(new_width - width * side / max(height, width)) <= 1
    assert boxed.scale_factor == (new_width / width, new_height / height)
    assert (boxed.image[new_height:] == PAD_VALUE).all()
    assert (boxed.image[:, new_width:] == PAD_VALUE).all()
    assert np.array_equal(image, before)
    one = letterbox(image[:, :, -1:], side)  # channels do not mix; OpenCV rounds one and several channels differently
    np.testing.assert_allclose(one.image[:, :, 0], boxed.image[:, :, -1].astype(int), rtol=0, atol=1)
    turned = letterbox(np.ascontiguousarray(image.transpose(1, 0, 2)), side)
    assert turned.content == (new_width, new_height)
    if max(height, width) == side:
        assert np.array_equal(boxed.image[:height, :width], image)


def test_odd_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match="sides start at 1"):
        keep_ratio_size(0, 5, 640)
    for wrong in (np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.uint16), np.zeros((0, 4, 3), np.uint8)):
        with pytest.raises(ValueError, match="uint8"):
            letterbox(wrong, 8)
    image = np.zeros((4, 4, 3), np.uint8)
    with pytest.raises(ValueError, match="one mean and std per channel"):
        normalise(image, [1.0], [1.0])
    with pytest.raises(ValueError, match="positive"):
        normalise(image, [1.0] * 3, [1.0, 0.0, 1.0])


def test_worked_bicubic() -> None:
    """A step made half as wide: cubic weights (a = -1/2) at distances 1/4, 3/4, 5/4, 7/4 new px, divided by their sum.

    w(x) = 1.5 x^3 - 2.5 x^2 + 1 below 1, -.5 x^3 + 2.5 x^2 - 4 x + 2 below 2: .8672, .2266, -.0703, -.0234, twice,
    sum 2; so .4336, .1133, -.0352, -.0117 to each side. A step to 200 one pixel away: 200 (.1133 - .0352 - .0117) =
    13.3; three away: 200 (-.0117) = -2.3, which is 0; and the counterparts 200 - 13.3 and 202.3.
    """
    image = np.zeros((4, 16, 1), np.uint8)
    image[:, 8:] = 200
    assert resize_bicubic(image, 4, 8)[:, :, 0].tolist() == [[0, 0, 0, 13, 187, 202, 200, 200]] * 4
    upright = resize_bicubic(np.ascontiguousarray(image.transpose(1, 0, 2)), 8, 4)
    assert upright[:, 0, 0].tolist() == [0, 0, 0, 13, 187, 202, 200, 200]
    plain = cv2.resize(image, (8, 4), interpolation=cv2.INTER_CUBIC)  # control: no antialiasing
    assert plain[0].tolist() != [0, 0, 0, 13, 187, 202, 200, 200]


def test_bicubic_is_pillow_s() -> None:
    """Colours as Pillow resizes them together; a fourth channel is no alpha, whose pixels Pillow would weigh."""
    rng = np.random.default_rng(0)
    for height, width in ((50, 31), (3, 90), (41, 41)):
        image = rng.integers(0, 256, (height, width, 4), dtype=np.uint8)
        resized = resize_bicubic(image, 37, 23)
        whole = Image.fromarray(np.ascontiguousarray(image[:, :, :3])).resize((23, 37), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(resized[:, :, :3], np.asarray(whole))
        weighed = Image.fromarray(image).resize((23, 37), Image.Resampling.BICUBIC)  # control
        assert not np.array_equal(resized, np.asarray(weighed))


@pytest.mark.parametrize(
    ("size", "resized", "offset"),
    [
        ((480, 640), (236, 314), (6, 45)),  # 236 * 640 / 480 = 314.67, cut; (314 - 224) / 2 = 45
        ((640, 480), (314, 236), (45, 6)),
        ((236, 313), (236, 313), (6, 44)),  # 44.5 to the even neighbour
        ((315, 236), (315, 236), (46, 6)),  # 45.5 likewise
        ((236, 236), (236, 236), (6, 6)),
        ((100, 100), (236, 236), (6, 6)),
        ((1000, 59), (4000, 236), (1888, 6)),
    ],
)
def test_crop_of_classifiers(size: tuple[int, int], resized: tuple[int, int], offset: tuple[int, int]) -> None:
    """Published: short side 236, centre 224 (ResizeEdge cuts fractions off, CenterCrop rounds half to even)."""
    assert short_side_size(*size, 236) == resized
    image = np.random.default_rng(1).integers(0, 256, (*size, 2), dtype=np.uint8)
    whole = resize_bicubic(image, *resized)
    top, left = offset
    np.testing.assert_array_equal(crop_centre(image, 224), whole[top : top + 224, left : left + 224])
    if size == resized:
        np.testing.assert_array_equal(whole, image)


def _middle(image: np.ndarray) -> np.ndarray:
    """Cut the largest square out of the centre; half a pixel goes to the even side."""
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = round((height - side) / 2), round((width - side) / 2)
    return image[top : top + side, left : left + side]


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 6), st.integers(1, 64), st.integers(0, 255))
def test_crop_properties(height: int, width: int, channels: int, side: int, grey: int) -> None:
    image = np.random.default_rng(grey).integers(0, 256, (height, width, channels), dtype=np.uint8)
    before = image.copy()
    cropped = crop_centre(image, side)
    assert cropped.shape == (side, side, channels)
    assert np.array_equal(image, before)
    assert np.array_equal(crop_centre(image[:, :, -1:], side)[:, :, 0], cropped[:, :, -1])  # channels do not mix
    assert (crop_centre(np.full_like(image, grey), side) == grey).all()
    assert np.array_equal(crop_centre(image, side, round(side * 236 / 224)), cropped)
    assert np.array_equal(crop_centre(image, min(height, width), min(height, width)), _middle(image))
    new_height, new_width = short_side_size(height, width, 236)
    assert min(new_height, new_width) == 236
    assert short_side_size(width, height, 236) == (new_width, new_height)


def test_odd_inputs_to_crops_are_refused() -> None:
    with pytest.raises(ValueError, match="sides start at 1"):
        short_side_size(5, 5, 0)
    with pytest.raises(ValueError, match="sides start at 1"):
        crop_centre(np.zeros((4, 4, 3), np.uint8), 0)
    with pytest.raises(ValueError, match="32 px out of a shorter side of 31 px"):
        crop_centre(np.zeros((4, 4, 3), np.uint8), 32, 31)
    for wrong in (np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32), np.zeros((4, 0, 3), np.uint8)):
        for resize in (lambda image: crop_centre(image, 8), lambda image: resize_bicubic(image, 8, 8)):
            with pytest.raises(ValueError, match="uint8"):
                resize(wrong)
