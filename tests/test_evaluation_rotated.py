"""Average precision worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rtmdet_geo.evaluation.rotated import Truth, precision_recall
from rtmdet_geo.structures import Detections


def at(*xs):
    return np.array([[x, 50.0, 20.0, 10.0, 0.0] for x in xs]).reshape(-1, 5)


def truth(*xs, ignored=()):
    return Truth(at(*xs), np.zeros(len(xs), np.int64), np.isin(np.arange(len(xs)), ignored))


def found(*pairs):
    boxes = at(*(x for x, _ in pairs))
    return Detections(boxes, np.array([score for _, score in pairs]), np.zeros(len(pairs)), frame="scene")


def test_hit_miss_hit_by_hand():
    curve = precision_recall([found((100, 0.9), (300, 0.8), (200, 0.7))], [truth(100, 200)], label=0, iou_threshold=0.5)
    assert curve.precision == pytest.approx([1, 1 / 2, 2 / 3])
    assert curve.recall == pytest.approx([0.5, 0.5, 1])
    assert curve.average_precision == pytest.approx(0.5 + 0.5 * 2 / 3)
    assert curve.best_f1 == pytest.approx((0.8, 0.7))


def test_pooling_orders_detections_of_all_images_together():
    detections = [found((100, 0.5)), found((300, 0.9))]
    curve = precision_recall(detections, [truth(100), truth(100)], label=0, iou_threshold=0.5)
    assert curve.average_precision == pytest.approx(0.5 * 0.5)


def test_second_hit_on_one_object_is_a_miss():
    curve = precision_recall([found((100, 0.9), (101, 0.8))], [truth(100)], label=0, iou_threshold=0.5)
    assert curve.precision.tolist() == [1, 0.5]


def test_ignored_objects_count_neither_way():
    curve = precision_recall(
        [found((100, 0.9), (200, 0.8))], [truth(100, 200, ignored=[0])], label=0, iou_threshold=0.5
    )
    assert (curve.num_objects, curve.average_precision, len(curve.scores)) == (1, 1.0, 1)


def test_threshold_is_inclusive_and_classes_are_apart():
    # Shifted by half its length: IoU = 10 / 30.
    shifted = [found((110, 0.9))]
    assert precision_recall(shifted, [truth(100)], label=0, iou_threshold=1 / 3 - 1e-9).average_precision == 1
    assert precision_recall(shifted, [truth(100)], label=0, iou_threshold=0.34).average_precision == 0
    assert math.isnan(precision_recall(shifted, [truth(100)], label=1, iou_threshold=0.3).average_precision)


def test_nothing_found_and_nothing_there():
    assert (
        precision_recall([Detections.empty("scene")], [truth(100)], label=0, iou_threshold=0.5).average_precision == 0
    )
    empty = precision_recall([], [], label=0, iou_threshold=0.5)
    assert math.isnan(empty.average_precision) and empty.best_f1 == (0.0, 1.0)
