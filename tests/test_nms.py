"""nms.py against the oracle, shapely, a brute-force loop, and properties."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from rtmdet_geo import nms
from rtmdet_geo.nms import nms_horizontal, nms_of_kind, nms_rotated, rotated_iou, rotated_iou_aligned

PI = np.pi
TOLERANCE = 1e-4  # oracle README, IoU against iou_exact

place = st.floats(-60, 60)
side = st.floats(1, 80)
box = st.tuples(place, place, side, side, st.floats(-7, 7))


# slow and obvious


def polygon_of(values, origin=(0.0, 0.0)):
    """A shapely polygon, with its corners from complex numbers."""
    x, y, width, height, angle = (float(value) for value in values)
    turn = np.exp(1j * angle)
    corners = [complex(x - origin[0], y - origin[1]) + turn * complex(a * width / 2, b * height / 2)
               for a, b in ((1, 1), (-1, 1), (-1, -1), (1, -1))]  # fmt: skip
    return shapely.Polygon([(corner.real, corner.imag) for corner in corners])


def slow_iou(box1, box2):
    first, second = polygon_of(box1, box1[:2]), polygon_of(box2, box1[:2])
    if first.area == 0 or second.area == 0:
        return 0.0
    common = first.intersection(second).area
    return common / (first.area + second.area - common)


def slow_nms(iou, scores, labels, threshold, *, strict=False):
    """The greedy loop over a full IoU matrix."""
    kept = []
    for i in sorted(range(len(scores)), key=lambda index: -scores[index]):
        rivals = [j for j in kept if labels is None or labels[i] == labels[j]]
        if not any(iou[j, i] > threshold or (iou[j, i] == threshold and not strict) for j in rivals):
            kept.append(i)
    return np.array(kept, np.int64)


def slow_horizontal_iou(hboxes):
    low = np.maximum(hboxes[:, None, :2], hboxes[None, :, :2])
    high = np.minimum(hboxes[:, None, 2:], hboxes[None, :, 2:])
    common = np.prod(np.maximum(high - low, 0), axis=2)
    area = np.prod(np.maximum(hboxes[:, 2:] - hboxes[:, :2], 0), axis=1)
    union = area[:, None] + area[None] - common
    return np.divide(common, union, out=np.zeros_like(common), where=union > 0)


def as_fed(values):
    """The oracle's inputs were cast to float32 first."""
    return np.asarray(values, np.float32).astype(np.float64)


def scene_of(oracle_dir, recipe):
    """Boxes, scores, labels of a scene recipe, by the oracle's own recipes.py."""
    import importlib.util

    candidates = [oracle_dir / "recipes.py", oracle_dir.parent / "recipes.py"]
    path = next(candidate for candidate in candidates if candidate.is_file())
    spec = importlib.util.spec_from_file_location("oracle_recipes", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.scene_boxes(recipe["seed"], recipe["n"], recipe["extent"])


@pytest.fixture(scope="module")
def iou_oracle(oracle_dir):
    return json.loads((oracle_dir / "ops.json").read_text())["box_iou_rotated"]


@pytest.fixture(scope="module")
def nms_oracle(oracle_dir):
    return json.loads((oracle_dir / "nms.json").read_text())


# oracle


def test_oracle_iou_matrix(iou_oracle):
    case = iou_oracle["random"]
    boxes1, boxes2 = as_fed(case["boxes1"]), as_fed(case["boxes2"])
    np.testing.assert_allclose(rotated_iou(boxes1, boxes2), case["iou_exact"], rtol=0, atol=TOLERANCE)
    # the reference's own float32 numbers are wrong where boxes nearly coincide; everywhere else they agree
    iou_is_right = np.abs(np.array(case["iou"]) - case["iou_exact"]) < 1e-3
    iof = rotated_iou(boxes1, boxes2, mode="iof")
    np.testing.assert_allclose(iof[iou_is_right], np.array(case["iof"])[iou_is_right], rtol=0, atol=TOLERANCE)


def test_oracle_iou_pairs(iou_oracle):
    for case in iou_oracle["pairs"]:
        actual = rotated_iou(as_fed([case["box1"]]), as_fed([case["box2"]]))[0, 0]
        assert actual == pytest.approx(case["iou_exact"], abs=TOLERANCE), case["name"]
        assert actual == pytest.approx(case["iou_exact"], rel=1e-4, abs=1e-9), case["name"]


def test_oracle_iou_near_duplicates(iou_oracle):
    for case in iou_oracle["near_duplicates"]:
        actual = rotated_iou_aligned(as_fed(case["boxes1"]), as_fed(case["boxes2"]))
        np.testing.assert_allclose(actual, case["iou_exact"], rtol=0, atol=1e-8, err_msg=case["name"])


def test_oracle_iou_counterclockwise(iou_oracle):
    """clockwise=False of the reference is the same geometry with all angles negated."""
    case = iou_oracle["ccw"]
    boxes1, boxes2 = (as_fed(case[name]) * [1, 1, 1, 1, -1] for name in ("boxes1", "boxes2"))
    actual, expected = rotated_iou(boxes1, boxes2), np.array(case["iou"])
    exact = np.array([[slow_iou(first, second) for second in boxes2] for first in boxes1])
    np.testing.assert_allclose(actual, exact, rtol=0, atol=1e-9)
    is_right = np.abs(expected - exact) < 1e-3
    np.testing.assert_allclose(actual[is_right], expected[is_right], rtol=0, atol=TOLERANCE)


def test_oracle_nms_agnostic(nms_oracle, oracle_dir):
    assert nms_oracle["agnostic"]
    for case in nms_oracle["agnostic"]:
        boxes, scores, _ = scene_of(oracle_dir, case["recipe"])
        if "boxes" in case:
            np.testing.assert_array_equal(boxes, case["boxes"])
        kept = nms_rotated(boxes, scores, iou_threshold=case["iou_threshold"])
        if case.get("same_as_exact", True):
            assert kept.tolist() == case["keep"], case["recipe"]
        else:  # the reference erred: the exact greedy loop decides
            expected = slow_nms(rotated_iou(boxes, boxes), scores, None, case["iou_threshold"])
            assert kept.tolist() == case.get("keep_exact", expected.tolist()), case["recipe"]


def test_oracle_nms_multiclass(nms_oracle, oracle_dir):
    for case in nms_oracle["multiclass"]:
        boxes, scores, labels = scene_of(oracle_dir, case["recipe"])
        kept = nms_rotated(boxes, scores, labels, iou_threshold=case["iou_threshold"])
        assert kept.tolist() == case["keep_without_offset"], case["recipe"]


def test_oracle_nms_edge_cases(nms_oracle):
    for case in nms_oracle["edge"]:
        kept = nms_rotated(case["boxes"], case["scores"], iou_threshold=case["iou_threshold"])
        assert kept.tolist() == case["keep_exact"], case["name"]
        assert kept.dtype == np.int64


def test_oracle_nms_horizontal(nms_oracle, oracle_dir):
    for case in nms_oracle["hbb"]:
        boxes, scores, labels = scene_of(oracle_dir, case["recipe"])
        hboxes = np.concatenate([boxes[:, :2] - boxes[:, 2:4] / 2, boxes[:, :2] + boxes[:, 2:4] / 2], axis=1)
        threshold = case["iou_threshold"]
        assert nms_horizontal(hboxes, scores, iou_threshold=threshold).tolist() == case["keep"]
        assert nms_horizontal(hboxes, scores, labels, iou_threshold=threshold).tolist() == case["keep_multiclass"]
    case = nms_oracle["hbb_equal_threshold"]
    kept = nms_horizontal(case["boxes"], case["scores"], iou_threshold=case["iou_threshold"])
    assert kept.tolist() == case["keep"]


# IoU


def test_iou_by_hand():
    octagon = 8 * (np.sqrt(2) - 1)  # a square of side 2 with the same turned by 45 degrees
    assert rotated_iou([[0, 0, 2, 2, 0]], [[0, 0, 2, 2, PI / 4]])[0, 0] == pytest.approx(octagon / (8 - octagon))
    assert rotated_iou([[0, 0, 4, 2, 0]], [[1, 0, 4, 2, 0]])[0, 0] == 0.6
    assert rotated_iou([[0, 0, 4, 2, 0]], [[0, 0, 8, 4, 0]], mode="iof")[0, 0] == 1
    assert rotated_iou([[0, 0, 8, 4, 0]], [[0, 0, 4, 2, 0]], mode="iof")[0, 0] == 0.25
    assert rotated_iou([[0, 0, 4, 2, 0]], [[4, 0, 4, 2, 0]])[0, 0] == 0  # they touch
    assert rotated_iou([], [[0, 0, 4, 2, 0]]).shape == (0, 1)
    assert rotated_iou_aligned([], []).shape == (0,)


def adversarial_boxes():
    """Coincident, touching, nested, thin, turned by multiples of pi/2, tiny, huge, far out."""
    shapes = [(24, 10), (10, 24), (10, 10), (400, 0.01), (1e-3, 1e-3), (20000, 15000)]
    places = [(0, 0), (12, 5), (24, 0), (1e-9, -1e-9), (0.5, 0.25)]
    angles = [0, PI / 2, -PI / 2, PI, 0.3, 0.3 + PI / 2, 0.3 + 1e-9, PI / 4]
    return np.array([(x, y, w, h, a) for w, h in shapes for x, y in places for a in angles], np.float64)


@pytest.mark.parametrize("offset", [0.0, 1e5, 1e6])
def test_iou_equals_shapely_on_adversarial_boxes(offset):
    boxes = adversarial_boxes()[:: 1 if offset == 0 else 3]
    boxes[:, :2] += offset
    polygons = np.array([polygon_of(values, (offset, offset)) for values in boxes])
    area = shapely.area(polygons)
    common = shapely.area(shapely.intersection(polygons[:, None], polygons[None, :]))
    expected = common / (area[:, None] + area[None] - common)
    actual = rotated_iou(boxes, boxes)
    # shapely is handed rounded corners: thin boxes 20000 px long know them to 4e-12 px only
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6)
    assert np.abs(actual - expected).mean() < 1e-9
    assert actual.min() >= 0 and actual.max() <= 1
    np.testing.assert_allclose(np.diag(actual), 1, rtol=0, atol=1e-12)
    np.testing.assert_allclose(actual, actual.T, rtol=0, atol=1e-9)


def test_coincident_boxes_give_one_in_any_form():
    generator = np.random.default_rng(3)
    boxes = generator.uniform([0, 0, 1, 1, -9], [1e6, 1e6, 2000, 2000, 9], (2000, 5))
    assert (rotated_iou_aligned(boxes, boxes) == 1).all()
    turned = boxes + np.array([0, 0, 0, 0, PI])
    swapped = boxes[:, [0, 1, 3, 2, 4]] + np.array([0, 0, 0, 0, PI / 2])
    negative = boxes * [1, 1, -1, 1, 1]
    for other in (turned, swapped, negative):
        np.testing.assert_allclose(rotated_iou_aligned(boxes, other), 1, rtol=0, atol=1e-9)


@settings(deadline=None, max_examples=60)
@given(box, box, st.floats(-7, 7), st.sampled_from([0.0, 1e6, -1e6]))
def test_iou_properties(first, second, angle, offset):
    iou = rotated_iou([first], [second])[0, 0]
    assert 0 <= iou <= 1
    assert rotated_iou([second], [first])[0, 0] == pytest.approx(iou, abs=1e-12)
    assert iou == pytest.approx(slow_iou(first, second), abs=1e-9)
    pair = np.array([first, second])
    turned = pair.copy()
    turn = np.exp(1j * angle) * (pair[:, 0] + 1j * pair[:, 1])
    turned[:, 0], turned[:, 1], turned[:, 4] = turn.real + offset, turn.imag - offset, pair[:, 4] + angle
    # centres at 1e6 are rounded to 1e-10 px
    assert rotated_iou(turned[:1], turned[1:])[0, 0] == pytest.approx(iou, abs=1e-8)
    scaled = pair * [1024, 1024, 1024, 1024, 1]
    assert rotated_iou(scaled[:1], scaled[1:])[0, 0] == iou


def test_boxes_without_area():
    flat = [[5, 5, 0, 4, 0.3], [5, 5, 0, 0, 0], [5, 5, 1e-200, 1e-200, 0], [5, 5, -0.0, 4, 0]]
    assert (rotated_iou(flat, [*flat, [5, 5, 4, 4, 0]]) == 0).all()
    assert (rotated_iou(flat, flat, mode="iof") == 0).all()


# NMS


def clustered_scene(seed, num_clusters, num_copies, *, num_labels=3):
    """Clusters of near copies of boxes from 1 to 2000 px, with a large box over many small ones here and there."""
    generator = np.random.default_rng(seed)
    size = 2.0 ** generator.uniform(0, 11, num_clusters)
    centres = np.stack([generator.uniform(-5000, 5000, num_clusters), generator.uniform(0, 2000, num_clusters)], 1)
    boxes = np.column_stack([centres, size, size * generator.uniform(0.01, 1, num_clusters)])
    boxes = np.column_stack([boxes, generator.uniform(-4, 4, num_clusters)]).repeat(num_copies, axis=0)
    amount = 10.0 ** generator.uniform(-3, 0, (len(boxes), 1))  # from nearly the same box to another one
    boxes[:, :2] += amount * generator.normal(0, 0.2, (len(boxes), 2)) * boxes[:, 2:3]
    boxes[:, 2:4] *= 2.0 ** (amount * generator.normal(0, 0.6, (len(boxes), 2)))
    boxes[:, 4] += amount[:, 0] * generator.normal(0, 0.4, len(boxes))
    scores = np.round(generator.random(len(boxes)), 2)  # many ties
    return boxes, scores, generator.integers(-1, num_labels - 1, len(boxes))


@pytest.mark.parametrize("threshold", [0.001, 0.1, 0.3, 0.65, 0.9, 1.0])
@pytest.mark.parametrize("seed", [1, 2])
def test_nms_equals_the_brute_force_loop(seed, threshold):
    boxes, scores, labels = clustered_scene(seed, 60, 15)
    iou = rotated_iou(boxes, boxes)
    for used in (None, labels):
        kept = nms_rotated(boxes, scores, used, iou_threshold=threshold)
        np.testing.assert_array_equal(kept, slow_nms(iou, scores, used, threshold))
    assert len(kept) < len(boxes) or threshold == 1


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.65, 1.0])
def test_horizontal_nms_equals_the_brute_force_loop(threshold):
    boxes, scores, labels = clustered_scene(5, 60, 15)
    boxes = np.round(boxes * 16) / 16  # exact numbers: the two IoU formulas then agree to the digit
    hboxes = np.concatenate([boxes[:, :2] - boxes[:, 2:4] / 2, boxes[:, :2] + boxes[:, 2:4] / 2], axis=1)
    hboxes[::50, 2] = hboxes[::50, 0] - 1  # inverted: no area
    iou = slow_horizontal_iou(hboxes)
    for used in (None, labels):
        kept = nms_horizontal(hboxes, scores, used, iou_threshold=threshold)
        np.testing.assert_array_equal(kept, slow_nms(iou, scores, used, threshold, strict=True))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(box, st.integers(0, 5), st.integers(0, 1)), max_size=14), st.floats(0, 1))
def test_nms_properties(rows, threshold):
    boxes, scores, labels = [row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows]
    kept = nms_rotated(boxes, scores, labels, iou_threshold=threshold)
    expected = slow_nms(rotated_iou(boxes, boxes), scores, labels, threshold)
    np.testing.assert_array_equal(kept, expected)
    again = nms_rotated([boxes[i] for i in kept], [scores[i] for i in kept], [labels[i] for i in kept],
                        iou_threshold=threshold)  # fmt: skip
    assert again.tolist() == list(range(len(kept)))  # what is kept is kept again


def test_nms_by_hand():
    chain = [[0, 0, 10, 10, 0], [6, 0, 10, 10, 0], [12, 0, 10, 10, 0]]
    assert nms_rotated(chain, [0.9, 0.8, 0.7], iou_threshold=0.2).tolist() == [0, 2]
    assert nms_rotated(chain, [0.7, 0.9, 0.8], iou_threshold=0.2).tolist() == [1]
    assert nms_rotated(chain, [0.9, 0.8, 0.7], [1, 2, 1], iou_threshold=0.2).tolist() == [0, 1, 2]
    assert nms_rotated(chain, [0.5, 0.5, 0.5], iou_threshold=0.2).tolist() == [0, 2]  # ties by index
    half = [[0, 0, 4, 2, 0], [0, 0, 4, 4, 0]]
    assert nms_rotated(half, [0.9, 0.8], iou_threshold=0.5).tolist() == [0]  # >= suppresses ...
    assert nms_horizontal([[0, 0, 4, 2], [0, 0, 4, 4]], [0.9, 0.8], iou_threshold=0.5).tolist() == [0, 1]  # ... > not
    far = [[0, 0, 1, 1, 0], [1e5, 0, 1, 1, 0], [0, 0, 0, 0, 0]]
    assert nms_rotated(far, [0.1, 0.2, 0.3], [7, 8, 7], iou_threshold=0).tolist() == [2, 1]  # >= 0 always: one a label


def test_nms_of_nothing_and_of_one():
    for empty in ([], np.zeros((0, 5)), np.zeros((0, 5), np.float32)):
        assert nms_rotated(empty, [], [], iou_threshold=0.1).tolist() == []
    assert nms_horizontal([], [], iou_threshold=0.5).dtype == np.int64
    assert nms_rotated([[1, 2, 3, 4, 5]], [0.1], iou_threshold=0.1).tolist() == [0]


def test_labels_and_dtypes_of_all_kinds():
    boxes = np.array([[0, 0, 4, 2, 0]] * 3, np.float32)
    labels = np.array([2**62, 2**62 + 1, -(2**62)])  # equal as floats
    assert nms_rotated(boxes, np.float32([0.1, 0.2, 0.3]), labels, iou_threshold=0.5).tolist() == [2, 1, 0]
    assert nms_rotated(boxes[:, ::1], np.array([1, 2, 3]), np.uint8([1, 1, 2]), iou_threshold=0.5).tolist() == [2, 1]
    strided = np.zeros((3, 10))[:, ::2] + boxes
    assert nms_rotated(strided, [1, 2, 3], iou_threshold=0.5).tolist() == [2]


def test_nms_far_out_coordinates():
    """Tiny boxes, an outlier at 1e12 and a box as large as everything: the grid neither overflows nor misses."""
    generator = np.random.default_rng(9)
    boxes = np.column_stack([generator.uniform(0, 30, (300, 2)), generator.uniform(0.01, 3, (300, 2)), np.zeros(300)])
    boxes[0], boxes[1] = [1e12, -1e12, 5, 3, 1], [5e11, -5e11, 1e13, 1e13, 0]
    boxes[2], boxes[3] = [-1e80, 1e90, 1e60, 1e60, 1], [0, 0, 1e5, 1e-5, 2]
    scores = generator.random(300)
    for chosen in (range(4, 300), [1], [0, *range(4, 300)], range(300)):
        sample, rank = boxes[list(chosen)], scores[list(chosen)]
        kept = nms_rotated(sample, rank, iou_threshold=0.1)
        np.testing.assert_array_equal(kept, slow_nms(rotated_iou(sample, sample), rank, None, 0.1))


def count_checks(monkeypatch, boxes, scores, threshold):
    """Run NMS interpreted and count how often two boxes are compared."""
    calls = 0
    names = ("_fill_frames", "_clip_area", "_intersection", "_bucket", "_suppresses", "_is_hit_in_cell", "_greedy")
    plain = {name: getattr(nms, name).py_func for name in names}

    def counted(*arguments):
        nonlocal calls
        calls += 1
        return plain["_suppresses"](*arguments)

    with monkeypatch.context() as patch:
        for name, function in plain.items():
            patch.setattr(nms, name, function)
        patch.setattr(nms, "_suppresses", counted)
        patch.setattr(nms, "_bucket", lambda label, level, row, mask: hash((label, level, row)) & mask)
        kept = nms_rotated(boxes, scores, iou_threshold=threshold)
    np.testing.assert_array_equal(kept, nms_rotated(boxes, scores, iou_threshold=threshold))
    return calls


def test_number_of_comparisons_grows_linearly(monkeypatch):
    """Counted, not timed: a scene four times as large costs about four times the comparisons."""
    counts = []
    for num_boxes in (500, 2000):
        generator = np.random.default_rng(0)
        extent = 20 * num_boxes**0.5
        size = 2.0 ** generator.uniform(2, 7, num_boxes)
        boxes = np.column_stack([generator.uniform(0, extent, (num_boxes, 2)), size, size / 3, np.zeros(num_boxes)])
        counts.append(count_checks(monkeypatch, boxes, generator.random(num_boxes), 0.3))
    assert counts[1] < 6 * counts[0]
    assert counts[1] < 2000 * 2000 / 2 / 10


def test_identical_boxes_cost_one_comparison_each(monkeypatch):
    boxes = np.tile([[5, 5, 4, 2, 0.3]], (1000, 1))
    assert count_checks(monkeypatch, boxes, np.zeros(1000), 0.1) == 999


def test_many_identical_boxes():
    boxes = np.tile([[5, 5, 4, 2, 0.3]], (100_000, 1))
    assert nms_rotated(boxes, np.arange(100_000), iou_threshold=0.1).tolist() == [99_999]


def test_same_centre_and_tiny_overlap():
    """Needles that cross in one point, and nested boxes of all sizes: one cell for all of them."""
    angle = np.linspace(-1.5, 1.5, 3000)
    needles = np.column_stack([np.full((3000, 2), 7.0), np.full(3000, 2000), np.full(3000, 0.01), angle])
    assert len(nms_rotated(needles, angle, iou_threshold=0.1)) == 3000
    size = np.geomspace(1e-3, 1e5, 100_000)
    nested = np.column_stack([np.full((100_000, 2), 7.0), size, size, np.zeros(100_000)])
    kept = nms_rotated(nested, size, iou_threshold=0.1)
    assert (np.diff(np.log(size[kept])) <= -np.log(10) / 2).all()  # IoU = ratio of areas < 0.1
    assert len(kept) == pytest.approx(np.log(1e8) / (np.log(10) / 2), abs=2)


def test_several_threads_give_the_same_result():
    boxes, scores, labels = clustered_scene(4, 100, 10)
    expected = nms_rotated(boxes, scores, labels, iou_threshold=0.2)
    results = [None] * 4

    def work(slot):
        results[slot] = nms_rotated(boxes, scores, labels, iou_threshold=0.2)

    threads = [threading.Thread(target=work, args=(slot,)) for slot in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        np.testing.assert_array_equal(result, expected)


# errors


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: nms_rotated([[0, 0, 1, 1, np.nan]], [1], iou_threshold=0.1), r"boxes\[0\].*not finite"),
        (lambda: nms_rotated([[0, 0, 1, 1, 0], [np.inf, 0, 1, 1, 0]], [1, 1], iou_threshold=0.1), r"boxes\[1\]"),
        (lambda: nms_rotated([[0, 0, 1e200, 1, 0]], [1], iou_threshold=0.1), "too large"),
        (lambda: nms_horizontal([[0, 0, -np.inf, 1]], [1], iou_threshold=0.1), "not finite"),
        (lambda: nms_rotated([[0, 0, 1, 1, 0]], [np.nan], iou_threshold=0.1), r"scores\[0\]"),
        (lambda: nms_rotated([[0, 0, 1, 1, 0]], [1, 2], iou_threshold=0.1), "1 boxes, but scores"),
        (lambda: nms_rotated([[0, 0, 1, 1, 0]], [1], [1, 2], iou_threshold=0.1), "1 boxes, but scores"),
        (lambda: nms_rotated([[0, 0, 1, 1, 0]], [1], [1.5], iou_threshold=0.1), "integers"),
        (lambda: nms_rotated([[0, 0, 1, 1, 0]], [1], iou_threshold=1.1), "iou_threshold"),
        (lambda: nms_rotated([[0, 0, 1, 1, 0]], [1], iou_threshold=float("nan")), "iou_threshold"),
        (lambda: nms_rotated([[0, 0, 1, 1]], [1], iou_threshold=0.1), "boxes has shape"),
        (lambda: rotated_iou([[0, 0, 1, 1, np.nan]], [[0, 0, 1, 1, 0]]), r"boxes1\[0\]"),
        (lambda: rotated_iou([[0, 0, 1, 1, 0]], [[0, 0, 1, 1, 0]], mode="giou"), "giou"),
        (lambda: rotated_iou_aligned([[0, 0, 1, 1, 0]], []), "aligned"),
    ],
)
def test_bad_arguments(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# compiled code


def test_read_only_installation_uses_the_users_cache(tmp_path):
    """__pycache__ cannot be written: numba goes to the user's cache folder; the second process compiles nothing."""
    package = tmp_path / "site" / "rtmdet_geo"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    for name in ("boxes.py", "jit.py", "nms.py"):
        shutil.copy(Path(nms.__file__).parent / name, package)
    (package / "__pycache__").write_text("a file where a folder should be: not writable, not even for root")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NUMBA")}
    environment |= {"PYTHONPATH": str(package.parent), "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    program = (
        f"from rtmdet_geo import nms; assert nms.__file__.startswith({str(tmp_path)!r});"
        "nms.nms_rotated([[0, 0, 1, 1, 0]], [1.0], iou_threshold=0.1);"
        "print(sum(nms._greedy.stats.cache_hits.values()))"
    )
    hits = [
        subprocess.run(
            [sys.executable, "-c", program], env=environment, cwd=tmp_path, check=True, capture_output=True, text=True
        )
        for _ in range(2)
    ]
    assert [int(result.stdout) for result in hits] == [0, 1]
    assert list((tmp_path / "cache").rglob("*.nbi"))


def test_one_signature_per_kernel():
    """Every public call casts first, so nothing is compiled twice."""
    nms_rotated(np.zeros((1, 5), np.float32), np.zeros(1, np.float32), np.zeros(1, np.int32), iou_threshold=0.5)
    nms_horizontal(np.zeros((1, 4), np.int16), [1], iou_threshold=1)
    rotated_iou(np.zeros((1, 5), np.float32), np.zeros((1, 5)))
    rotated_iou_aligned(np.zeros((1, 5), int), np.zeros((1, 5)), mode="iof")
    for kernel in (nms._greedy, nms._pairwise, nms._fill_frames):
        assert len(kernel.signatures) == 1


def test_controls():
    """Negative controls: the references notice a wrong threshold rule, a shifted box, and a missed class."""
    boxes, scores, labels = clustered_scene(1, 20, 10)
    iou = rotated_iou(boxes, boxes)
    kept = nms_rotated(boxes, scores, labels, iou_threshold=0.3)
    assert kept.tolist() != slow_nms(iou, scores, None, 0.3).tolist()
    assert kept.tolist() != slow_nms(iou, scores, labels, 0.4).tolist()
    half = np.array([[1, 0.5], [0.5, 1]])
    assert slow_nms(half, [2, 1], None, 0.5).tolist() != slow_nms(half, [2, 1], None, 0.5, strict=True).tolist()
    assert abs(slow_iou([0, 0, 4, 2, 0.3], [0, 0.01, 4, 2, 0.3]) - 1) > 1e-3


def test_kinds_are_suppressed_by_what_they_are():
    """Two slanted boxes side by side do not touch, but the horizontal boxes around them are almost one."""
    boxes = [[10, 10, 20, 2, PI / 4], [12, 8, 20, 2, PI / 4]]
    assert nms_of_kind(boxes, [0.5, 0.9], kind="rotated", iou_threshold=0.1).tolist() == [1, 0]
    assert nms_of_kind(boxes, [0.5, 0.9], kind="horizontal", iou_threshold=0.5).tolist() == [1]
    assert nms_of_kind(boxes, [0.5, 0.9], [0, 1], kind="mask", iou_threshold=0.5).tolist() == [1, 0]
