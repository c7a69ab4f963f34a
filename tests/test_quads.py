"""quads.py against shapely, a brute-force loop, hand-worked numbers and rectangles of nms.py."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import shapely
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rtmdet_geo.boxes import boxes_to_polygons
from rtmdet_geo.nms import rotated_iou
from rtmdet_geo.quads import nms_polygons, polygon_iou, polygon_iou_aligned

SQUARE = [0, 0, 4, 0, 4, 4, 0, 4]
ARROW = [0, 0, 4, 2, 0, 4, 1, 2]  # a dent from the left: area 8 - 2 = 6
BOW_TIE = [0, 0, 4, 4, 4, 0, 0, 4]

place = st.integers(-24, 24).map(lambda number: number / 4)
quad = st.tuples(*[place] * 8)


def slow_iou(first, second):
    one, other = (shapely.Polygon(np.reshape(values, (4, 2))) for values in (first, second))
    assume(one.is_valid and other.is_valid)
    if one.area == 0 or other.area == 0:
        return 0.0
    common = one.intersection(other).area
    return common / (one.area + other.area - common)


def slow_nms(polygons, scores, threshold):
    kept = []
    for i in np.argsort(-scores, kind="stable").tolist():
        if all(slow_iou(polygons[i], polygons[j]) <= threshold for j in kept):
            kept.append(i)
    return kept


def test_by_hand():
    half = [2, 0, 6, 0, 6, 4, 2, 4]
    iou = polygon_iou([SQUARE, ARROW], [SQUARE, half, ARROW, [9, 9, 10, 9, 10, 10, 9, 10]])
    # of the arrow, x > 2 is a triangle of area 2
    expected = [[1, 8 / 24, 6 / 16, 0], [6 / 16, 2 / (16 + 6 - 2), 1, 0]]
    np.testing.assert_allclose(iou, expected, rtol=0, atol=1e-15)


def test_no_area_is_no_overlap_and_crossing_sides_count_by_their_windings():
    line, point, spike = [0, 0, 4, 4, 0, 0, 4, 4], [1, 1] * 4, [0, 0, 4, 0, 0, 0, 4, 0]
    assert polygon_iou([SQUARE, line, point, spike, BOW_TIE], [line, point, spike, BOW_TIE]).max() == 0
    # a larger lobe of 4 and a smaller one of 1, turned the other way round: 3 in all, inside and with its sign
    crossed = [0, 0, 0, 4, 3, -2, 3, 1]
    lobes = shapely.make_valid(shapely.Polygon(np.reshape(crossed, (4, 2))))
    areas = sorted(part.area for part in lobes.geoms)
    around = [-1, -9, 9, -9, 9, 9, -1, 9]
    assert polygon_iou([crossed], [around])[0, 0] == pytest.approx((areas[1] - areas[0]) / 180)


@settings(deadline=None, max_examples=200)
@given(quad, quad)
def test_equals_shapely_for_simple_quadrilaterals(first, second):
    expected = slow_iou(first, second)
    assert polygon_iou([first], [second])[0, 0] == pytest.approx(expected, abs=1e-12)


@settings(deadline=None, max_examples=100)
@given(quad, quad, st.integers(0, 3), st.integers(0, 3), st.tuples(place, place))
def test_symmetric_bounded_and_blind_to_order_direction_and_offset(first, second, turn, other_turn, offset):
    one, other = np.reshape(first, (4, 2)), np.reshape(second, (4, 2))
    iou = polygon_iou([one], [other])[0, 0]
    assert 0 <= iou <= 1
    assume(shapely.Polygon(one).is_valid and shapely.Polygon(other).is_valid)
    move = np.array(offset) * 1e5
    moved = polygon_iou([np.roll(other, turn, 0)[::-1] + move], [np.roll(one, other_turn, 0) + move])[0, 0]
    assert moved == pytest.approx(iou, abs=1e-9)
    assert polygon_iou([one], [one])[0, 0] == pytest.approx(float(shapely.Polygon(one).area > 0), abs=1e-12)


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.tuples(place, place, st.floats(0.5, 9), st.floats(0.5, 9), st.floats(-7, 7)), min_size=2, max_size=6)
)
def test_equals_rotated_iou_for_rectangles(boxes):
    polygons = boxes_to_polygons(boxes)
    assert (np.diag(polygon_iou(polygons, polygons)) == 1).all()
    np.testing.assert_allclose(polygon_iou(polygons, polygons), rotated_iou(boxes, boxes), rtol=0, atol=1e-9)
    aligned = polygon_iou_aligned(polygons[:-1], polygons[1:].reshape(-1, 8))
    np.testing.assert_array_equal(aligned, np.diag(polygon_iou(polygons, polygons), 1))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(quad, st.integers(0, 9)), max_size=9), st.sampled_from([0.0, 0.1, 0.3, 0.9]))
def test_nms_is_the_greedy_loop(entries, threshold):
    polygons = [entry[0] for entry in entries if shapely.Polygon(np.reshape(entry[0], (4, 2))).is_valid]
    scores = np.array([entry[1] / 10 for entry in entries][: len(polygons)])
    kept = nms_polygons(np.array(polygons).reshape(-1, 8), scores, threshold)
    assert kept.dtype == np.int64 and kept.tolist() == slow_nms(polygons, scores, threshold)


def test_nms_is_strict_and_keeps_what_has_no_area():
    below = [0, 0, 2, 0, 2, 4, 0, 4]  # IoU exactly 1/2
    assert nms_polygons([SQUARE, below], [0.9, 0.8], 0.5).tolist() == [0, 1]
    assert nms_polygons([SQUARE, below], [0.8, 0.9], 0.499).tolist() == [1]
    assert nms_polygons([[1, 1] * 4] * 3, [1, 3, 2], 0).tolist() == [1, 2, 0]
    assert nms_polygons([SQUARE] * 3, [1, 1, 1], 0).tolist() == [0]
    assert nms_polygons([], [], 0.5).tolist() == []


def test_nms_of_a_crowd_with_one_wide_quadrilateral():
    rng = np.random.default_rng(3)
    boxes = np.column_stack([rng.uniform(0, 300, (400, 2)), rng.uniform(5, 40, (400, 2)), rng.uniform(-2, 2, 400)])
    boxes[0] = [150, 150, 290, 8, 0.1]
    polygons, scores = boxes_to_polygons(boxes), rng.random(400)
    iou = polygon_iou(polygons, polygons)
    kept = []
    for i in np.argsort(-scores).tolist():
        if not (iou[i, kept] > 0.2).any():
            kept.append(i)
    assert 20 < len(kept) < 380
    assert nms_polygons(polygons, scores, 0.2).tolist() == kept


@pytest.mark.parametrize(
    ("call", "part"),
    [
        (lambda: polygon_iou([[0, 0, 1, 1]], [SQUARE]), "shape"),
        (lambda: polygon_iou([SQUARE], [[float("nan")] * 8]), r"polygons2\[0\]"),
        (lambda: polygon_iou([SQUARE], [[1e200] * 8]), "too large"),
        (lambda: polygon_iou_aligned([SQUARE], []), "1 polygons against 0"),
        (lambda: nms_polygons([SQUARE], [0.5, 0.6], 0.5), "1 polygons, but scores"),
        (lambda: nms_polygons([SQUARE], [float("inf")], 0.5), r"scores\[0\]"),
        (lambda: nms_polygons([SQUARE], [0.5], 1.5), "outside"),
    ],
)
def test_what_cannot_be_meant_is_refused(call, part):
    with pytest.raises(ValueError, match=part):
        call()


def test_threads_get_the_same():
    rng = np.random.default_rng(1)
    polygons, scores = rng.uniform(0, 60, (800, 8)), rng.random(800)
    expected, results = nms_polygons(polygons, scores, 0.1).tolist(), []
    threads = [
        threading.Thread(target=lambda: results.append(nms_polygons(polygons, scores, 0.1).tolist())) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected] * 4
