"""Average precision worked out by hand, and as mmrotate counts it."""

from __future__ import annotations

import json
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


def test_two_rotated_neighbours_by_hand():
    """Each detection looks at the object it overlaps most, not at any that is free."""
    # on 100: IoU 18/22 and 16/24; the second is a miss although the object at 112 is free and 12/28 near
    detections = [found((102, 0.9), (104, 0.8))]
    curve = precision_recall(detections, [truth(100, 112)], label=0, iou_threshold=0.4)
    assert curve.precision.tolist() == [1, 0.5] and curve.recall.tolist() == [0.5, 0.5]


def test_inputs_that_disagree_are_refused():
    with pytest.raises(ValueError, match="detections of 1 images, but labels of 2"):
        precision_recall([found()], [truth(), truth()], label=0, iou_threshold=0.5)
    with pytest.raises(ValueError, match=r"overlaps must be \[\(1, 2\)\]"):
        precision_recall([found((1, 0.5))], [truth(1, 9)], label=0, iou_threshold=0.5, overlaps=[np.zeros((2, 1))])


def test_nothing_found_and_nothing_there():
    assert (
        precision_recall([Detections.empty("scene")], [truth(100)], label=0, iou_threshold=0.5).average_precision == 0
    )
    empty = precision_recall([], [], label=0, iou_threshold=0.5)
    assert math.isnan(empty.average_precision) and empty.best_f1 == (0.0, 1.0)


def test_eleven_points_by_hand():
    """Hit, miss, hit: precision 1 up to recall 0.5 (6 points), then 2/3 (5 points)."""
    curve = precision_recall([found((100, 0.9), (300, 0.8), (200, 0.7))], [truth(100, 200)], label=0, iou_threshold=0.5)
    assert curve.average_precision_11 == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)
    detections = [found((100, 0.9), (200, 0.8), (300, 0.7))]
    # 0.6000000000000001, the sixth multiple of 0.1 in floating point, is not reached by 3 of 5: the official tools' way
    for number, reached in ((4, 8), (5, 6), (6, 6), (10, 3)):
        labelled = truth(*range(100, 100 * number + 1, 100))
        curve = precision_recall(detections, [labelled], label=0, iou_threshold=0.5)
        assert curve.average_precision_11 == pytest.approx(reached / 11)
    nothing = precision_recall([Detections.empty("scene")], [truth(100)], label=0, iou_threshold=0.5)
    assert nothing.average_precision_11 == 0
    assert math.isnan(precision_recall([], [], label=0, iou_threshold=0.5).average_precision_11)


def _images(path, *, ignores):
    content = json.loads(path.read_text())
    truths, detections = [], []
    for image in content["images"]:
        objects, seen = image["gts"], image["dets"]
        truths.append(
            Truth(
                np.array([entry["rbox"] for entry in objects]).reshape(-1, 5),
                np.array([entry["label"] for entry in objects], np.int64),
                np.array([bool(entry["difficult"]) and ignores for entry in objects], bool),
            )
        )
        boxes, scores, labels = ([entry[key] for entry in seen] for key in ("rbox", "score", "label"))
        detections.append(Detections(np.array(boxes), np.array(scores), np.array(labels), frame="scene"))
    return content, detections, truths


@pytest.mark.parametrize("part", ["mmrotate_no_ignore", "mmrotate_difficult_ignored"])
def test_oracle_dota(oracle_dir, part):
    """Both averages of every class at ten IoU thresholds, with difficult objects like others and ignored."""
    content, detections, truths = _images(oracle_dir / "dota_eval.json", ignores=part.endswith("ignored"))
    assert any(truth.ignored.any() for truth in truths) == part.endswith("ignored")
    areas = {key: value for key, value in content[part]["area"].items() if key != "mAP_50_95"}
    assert len(areas) == 10
    for threshold, expected in areas.items():
        eleven = content[part]["11points"][threshold]
        for label in range(len(content["classes"])):
            curve = precision_recall(detections, truths, label=label, iou_threshold=float(threshold))
            assert curve.num_objects == expected["num_gts"][label]
            if curve.num_objects == 0:
                assert math.isnan(curve.average_precision) and math.isnan(curve.average_precision_11)
                continue
            assert curve.average_precision == pytest.approx(expected["ap"][label], abs=2e-6)
            assert curve.average_precision_11 == pytest.approx(eleven["ap"][label], abs=2e-6)
            assert curve.recall[-1] == pytest.approx(expected["final_recall"][label], abs=1e-6)


def test_oracle_hrsc(oracle_dir):
    content, detections, truths = _images(oracle_dir / "hrsc_eval.json", ignores=False)
    for threshold in content["dota_ap07"]["per_thr"]:
        curve = precision_recall(detections, truths, label=0, iou_threshold=float(threshold))
        assert curve.average_precision_11 == pytest.approx(content["dota_ap07"]["per_thr"][threshold], abs=2e-6)
        assert curve.average_precision == pytest.approx(content["dota_ap12"]["per_thr"][threshold], abs=2e-6)
