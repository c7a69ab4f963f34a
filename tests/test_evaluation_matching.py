"""matching.py against the full matrix of overlaps."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rtmdet_geo.boxes import boxes_to_polygons
from rtmdet_geo.evaluation import matching
from rtmdet_geo.evaluation.matching import best_matches
from rtmdet_geo.nms import rotated_iou
from rtmdet_geo.quads import polygon_iou

place, side = st.integers(-20, 20), st.integers(1, 16)
box = st.tuples(place, place, side, side, st.integers(-3, 3).map(lambda turn: turn * 0.4))
scene = st.lists(st.tuples(box, st.integers(0, 2)), max_size=12)


def corners_of(boxes):
    return boxes_to_polygons(boxes).reshape(-1, 8)


def hboxes_of(boxes):
    return np.column_stack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:4]])


def hbox_iou(first, second, extra):
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    common = np.prod(np.maximum(high - low + extra, 0), axis=2)
    areas = [np.prod(boxes[:, 2:] - boxes[:, :2] + extra, axis=1) for boxes in (first, second)]
    return common / (areas[0][:, None] + areas[1][None] - common)


SHAPES = {
    "boxes": (lambda boxes: boxes, rotated_iou),
    "polygons": (corners_of, polygon_iou),
    "hboxes": (hboxes_of, lambda first, second: hbox_iou(first, second, 0)),
    "pixels": (hboxes_of, lambda first, second: hbox_iou(first, second, 1)),
}


@pytest.mark.parametrize("measure", SHAPES)
@settings(deadline=None, max_examples=60)
@given(scene, scene, st.sampled_from([1, 7, 1 << 17]))
def test_equals_the_full_matrix(measure, detections, objects, room):
    shape, overlap = SHAPES[measure]
    boxes, there = (np.array([entry[0] for entry in part], float).reshape(-1, 5) for part in (detections, objects))
    images, groups = (np.array([entry[1] for entry in part], np.int64) for part in (detections, objects))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matching, "_PAIRS", room)  # a buffer that is full after each detection
        best, values = best_matches(shape(boxes), images, shape(there), groups, measure=measure)
    expected = np.zeros((len(boxes), len(there) + 1))
    expected[:, 1:] = overlap(shape(boxes), shape(there)) * (images[:, None] == groups[None])
    np.testing.assert_allclose(values, expected.max(axis=1), rtol=0, atol=1e-12)
    for row, (index, value) in enumerate(zip(best, values, strict=True)):
        assert expected[row, index + 1] == pytest.approx(value, abs=1e-12)
    np.testing.assert_array_equal(best[values == 0], -1)


def test_of_equal_overlaps_the_first_object_counts():
    objects = [[6, 0, 10, 4], [0, 0, 4, 4], [0, 0, 4, 4], [3, 0, 7, 4]]
    found = [[0, 0, 4, 4], [3, 0, 7, 4], [1.5, 0, 8.5, 4]]
    best, overlap = best_matches(found, [0, 0, 0], objects, [0] * 4, measure="hboxes")
    assert best.tolist() == [1, 3, 3] and overlap.tolist() == [1, 1, 4 / 7]
    best, _ = best_matches([[2, 0, 8, 4]], [0], objects[:3], [0] * 3, measure="hboxes")
    assert best.tolist() == [0]  # 2 of 8 px wide with each: the first in the list, not from the left


def test_shapes_that_are_none_are_refused():
    with pytest.raises(ValueError, match=r"polygons2\[0\]"):
        best_matches([[0, 0, 4, 0, 4, 4, 0, 4]], [0], [[0, 0, 4, 0, 4, 4, 0, np.inf]], [0], measure="polygons")
