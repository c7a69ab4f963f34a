"""Soft-NMS and weighted box fusion against numbers worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_merge import detections

from rtmdet_geo.errors import ConfigError
from rtmdet_geo.merge import merge_detections, merge_survivors, tile_survivors
from rtmdet_geo.merge_methods import fuse_boxes, soft_nms
from rtmdet_geo.nms import rotated_iou
from rtmdet_geo.tiles import TileGrid

GRID = TileGrid(180, 100, tile_size=100, overlap=20)  # tiles at x 0 and 80
#: in a row, each 4 x 2; IoU of neighbours 1 px apart 3/5, of those 2 px apart 2/6
ROW = np.array([[5, 5, 4, 2, 0], [6, 5, 4, 2, 0], [7, 5, 4, 2, 0]], float)


def test_soft_nms_by_hand():
    # 0.9 first; 0.8 -> 0.8 exp(-.36 / .5) = 0.3894, 0.7 -> 0.7 exp(-(1/9) / .5) = 0.5605 which is next and
    # takes 0.3894 down by exp(-.72) again
    kept, scores = soft_nms(ROW, np.array([0.9, 0.8, 0.7]))
    assert kept.tolist() == [0, 1, 2]
    expected = [0.9, 0.8 * math.exp(-0.72) ** 2, 0.7 * math.exp(-2 / 9)]
    np.testing.assert_allclose(scores, expected, rtol=1e-12)
    np.testing.assert_allclose(scores, [0.9, 0.18954, 0.56052], atol=1e-5)


def test_soft_nms_drops_below_the_least_score():
    scores = np.array([0.9, 0.8, 0.7])
    assert soft_nms(ROW, scores, least_score=0.2)[0].tolist() == [0, 2]
    assert soft_nms(ROW, scores, least_score=0.6)[0].tolist() == [0]
    assert soft_nms(ROW, scores, least_score=0.95)[0].tolist() == []
    # a wider Gaussian: 0.8 exp(-.36 / 2) = 0.668 goes before 0.7 exp(-(1/9) / 2) = 0.662
    assert soft_nms(ROW, scores, sigma=2.0)[1][1] == pytest.approx(0.8 * math.exp(-0.18))


def test_soft_nms_leaves_other_classes_and_rotates():
    assert soft_nms(ROW, np.array([0.9, 0.8, 0.7]), np.array([0, 1, 2]))[1].tolist() == [0.9, 0.8, 0.7]
    cross = np.array([[0, 0, 4, 2, 0], [0, 0, 4, 2, math.pi / 2]])  # 4 of 12
    np.testing.assert_allclose(soft_nms(cross, np.array([0.9, 0.6]))[1], [0.9, 0.6 * math.exp(-2 / 9)])


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.integers(0, 25))
def test_soft_nms_is_the_plain_loop(seed: int, number: int) -> None:
    rng = np.random.default_rng(seed)
    boxes = np.c_[rng.uniform(0, 30, (number, 2)), rng.uniform(3, 15, (number, 2)), rng.uniform(-1.5, 1.5, number)]
    scores = rng.permutation(np.linspace(0.1, 1, number))
    iou, left, current = rotated_iou(boxes, boxes), list(range(number)), scores.copy()
    expected = {}
    while left:
        best = max(left, key=lambda index: current[index])
        if current[best] < 0.05:
            break
        expected[best] = current[best]
        left.remove(best)
        for other in left:
            current[other] *= math.exp(-(iou[best, other] ** 2) / 0.5)
    kept, found = soft_nms(boxes, scores, least_score=0.05)
    assert kept.tolist() == sorted(expected)
    np.testing.assert_allclose(found, [expected[index] for index in kept], rtol=1e-9)


def test_fused_box_by_hand():
    boxes = np.array([[10, 10, 8, 4, 0.1], [11, 10, 10, 4, 0.3]])
    fused = fuse_boxes(boxes, np.array([0.9, 0.3]), np.array([0, 0]), iou_threshold=0.5)
    # weights 3 : 1; angle: half of atan2(3 sin .2 + sin .6, 3 cos .2 + cos .6) = 0.5 * atan2(1.160650, 3.765535)
    np.testing.assert_allclose(fused.boxes, [[10.25, 10, 8.5, 4, 0.149495]], atol=1e-6)
    np.testing.assert_allclose(fused.scores, [0.6])
    assert fused.clusters.tolist() == [0, 0]


def test_a_box_is_compared_with_the_fused_box():
    # the third has IoU 1/3 with the first, 3/5 with the second, and 2.5 / 5.5 = 0.4545 with their mean, at 5.5
    scores, labels = np.array([0.8, 0.8, 0.8]), np.zeros(3, np.int64)
    assert fuse_boxes(ROW, scores, labels, iou_threshold=0.46).clusters.tolist() == [0, 0, 1]
    fused = fuse_boxes(ROW, scores, labels, iou_threshold=0.45)
    assert fused.clusters.tolist() == [0, 0, 0]
    np.testing.assert_allclose(fused.boxes, [[6, 5, 4, 2, 0]])
    assert fuse_boxes(ROW[:2], scores[:2], labels[:2], iou_threshold=0.61).clusters.tolist() == [0, 1]


def test_angles_across_the_wrap_and_by_quarter_turns():
    near = math.pi / 2 - 0.01
    wrapped = np.array([[0, 0, 20, 10, near], [0, 0, 20, 10, -near]])
    fused = fuse_boxes(wrapped, np.array([0.5, 0.5]), np.zeros(2, np.int64), iou_threshold=0.5)
    assert abs(fused.boxes[0, 4]) == pytest.approx(math.pi / 2)
    np.testing.assert_allclose(fused.boxes[0, :4], [0, 0, 20, 10], atol=1e-9)
    squares = np.array([[0, 0, 10.2, 10, 0.02], [0, 0, 10.2, 10, -math.pi / 2 + 0.02]])  # alike but for the names
    fused = fuse_boxes(squares, np.array([0.5, 0.5]), np.zeros(2, np.int64), iou_threshold=0.5)
    np.testing.assert_allclose(fused.boxes[0, 2:4], [10.1, 10.1])
    assert math.remainder(fused.boxes[0, 4] - 0.02, math.pi / 2) == pytest.approx(0, abs=1e-9)


def test_fusion_of_classes_and_of_horizontal_boxes():
    scores, labels = np.array([0.9, 0.3]), np.array([1, 0])
    assert fuse_boxes(ROW[:2], scores, labels, iou_threshold=0.5).labels.tolist() == [1, 0]
    blind = fuse_boxes(ROW[:2], scores, labels, iou_threshold=0.5, class_aware=False)
    assert blind.labels.tolist() == [1] and blind.scores.tolist() == [pytest.approx(0.6)]
    upright = np.array([[5, 5, 2, 4, 0], [5, 6, 2, 4, 0]], float)
    fused = fuse_boxes(upright, scores, labels, iou_threshold=0.5, kind="horizontal", class_aware=False)
    np.testing.assert_allclose(fused.boxes, [[5, 5.25, 2, 4, 0]])  # w stays along x


@pytest.mark.parametrize("kind", ["rotated", "horizontal"])
def test_methods_over_the_scene(kind: str) -> None:
    """One object in both tiles, 1 px apart, clear of all edges; IoU 7 / 9."""
    left, right = detections([(88, 50, 8, 4, 0, 0.9, 0)], kind=kind), detections([(9, 50, 8, 4, 0, 0.6, 0)], kind=kind)
    parts = [
        tile_survivors(found, GRID[index], GRID, iou_threshold=0.1, margin=0)
        for index, found in enumerate((left, right))
    ]
    greedy = merge_survivors(parts, GRID, iou_threshold=0.1)
    np.testing.assert_allclose(greedy.detections.boxes, [[88, 50, 8, 4, 0]])
    soft = merge_survivors(parts, GRID, iou_threshold=0.1, method="soft-nms")
    np.testing.assert_allclose(soft.detections.scores, [0.9, 0.6 * math.exp(-((7 / 9) ** 2) / 0.5)], rtol=1e-6)
    assert soft.num_merged.tolist() == [1, 1]
    soft = merge_survivors(parts, GRID, iou_threshold=0.1, method="soft-nms", least_score=0.2)
    assert soft.num_merged.tolist() == [2] and soft.detections.scores.tolist() == [np.float32(0.9)]
    fused = merge_survivors(parts, GRID, iou_threshold=0.1, method="wbf")
    np.testing.assert_allclose(fused.detections.boxes, [[88.4, 50, 8, 4, 0]], rtol=1e-6)
    np.testing.assert_allclose(fused.detections.scores, [0.75])
    assert fused.num_merged.tolist() == [2]


def test_a_fragment_gives_way_before_boxes_are_fused():
    grid = TileGrid(260, 100, tile_size=100, overlap=60)
    whole, fragment = detections([(50, 50, 96, 10, 0, 0.4, 0)]), detections([(71, 50, 58, 10, 0, 0.9, 0)])
    parts = [tile_survivors(fragment, grid[0], grid, iou_threshold=0.1)]
    parts.append(tile_survivors(whole, grid[1], grid, iou_threshold=0.1))
    for method in ("soft-nms", "wbf"):
        merged = merge_survivors(parts, grid, iou_threshold=0.1, method=method)
        np.testing.assert_allclose(merged.detections.boxes, [[90, 50, 96, 10, 0]])
        assert merged.num_merged.tolist() == [2] and merged.detections.scores.tolist() == [np.float32(0.4)]


def test_unknown_method_and_nothing_found():
    with pytest.raises(ConfigError, match="unknown merge method 'mean'; use"):
        merge_survivors([], GRID, iou_threshold=0.1, method="mean")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="gives masks"):
        merge_survivors([], GRID, iou_threshold=0.1, kind="mask", method="wbf")
    assert len(merge_detections([], GRID, iou_threshold=0.1)) == 0
    for method in ("soft-nms", "wbf"):
        assert len(merge_survivors([], GRID, iou_threshold=0.1, method=method)) == 0
