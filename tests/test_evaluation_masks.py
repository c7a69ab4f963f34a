"""Overlap of masks: pixels counted by hand and the slow obvious way, and AP on it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rtmdet_geo.evaluation.masks import mask_iou
from rtmdet_geo.evaluation.rotated import Truth, precision_recall
from rtmdet_geo.masks import CroppedMask
from rtmdet_geo.structures import Detections

SIZE = 24


def whole(item):
    """The mask in a frame of 24 px."""
    frame = np.zeros((SIZE, SIZE), bool)
    height, width = item.mask.shape
    frame[item.y : item.y + height, item.x : item.x + width] = item.mask != 0
    return frame


@st.composite
def cropped(draw):
    width, height = draw(st.integers(0, 12)), draw(st.integers(0, 12))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    mask = (rng.random((height, width)) < draw(st.sampled_from([0.0, 0.5, 1.0]))).astype(np.uint8)
    return CroppedMask(mask, draw(st.integers(0, SIZE - width)), draw(st.integers(0, SIZE - height)))


@settings(deadline=None, max_examples=60)
@given(st.lists(cropped(), max_size=5), st.lists(cropped(), max_size=5))
def test_equals_whole_frames(first, second):
    found = mask_iou(first, second)
    assert found.shape == (len(first), len(second))
    for i, one in enumerate(map(whole, first)):
        for j, other in enumerate(map(whole, second)):
            union = (one | other).sum()
            assert found[i, j] == pytest.approx((one & other).sum() / union if union else 0)


def block(x, y, width, height):
    return CroppedMask(np.ones((height, width), np.uint8), x, y)


def test_by_hand():
    found = mask_iou(
        [block(0, 0, 4, 4), block(10, 10, 2, 2)], [block(2, 0, 4, 4), block(0, 0, 4, 4), block(9, 9, 9, 9)]
    )
    np.testing.assert_allclose(found, [[8 / 24, 1, 0], [0, 0, 4 / 81]])


def test_average_precision_takes_the_overlaps_it_is_given():
    """Boxes that agree do not help a mask that does not; rows and columns are sorted by class and score."""
    boxes = np.array([[5.0, 5, 10, 10, 0], [5, 5, 10, 10, 0], [5, 5, 10, 10, 0]])
    found = Detections(boxes, np.array([0.5, 0.9, 0.7]), np.array([0, 1, 0]), frame="scene")
    truth = Truth(boxes[:2], np.array([1, 0]), np.zeros(2, bool))
    overlap = np.array([[0.9, 0.1], [0.8, 0.3], [0.2, 0.6]])

    def curve(label, overlaps):
        return precision_recall([found], [truth], label=label, iou_threshold=0.5, overlaps=overlaps)

    assert curve(1, [overlap]).average_precision == 1
    assert curve(0, [overlap]).precision.tolist() == [1, 0.5]  # .7 hits with .6, then .5 misses with .1
    assert curve(0, None).average_precision == 1
    for wrong in ([overlap.T], [], [overlap, overlap]):
        with pytest.raises(ValueError, match="one row a detection"):
            curve(0, wrong)
