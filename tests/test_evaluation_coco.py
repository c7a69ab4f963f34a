"""COCO's figures: worked out by hand, as published for COCO's own example, and as pycocotools counts them."""

from __future__ import annotations

import contextlib
import io
import json
import math
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rtmdet_geo.annotations.coco import decode_mask, encode_mask
from rtmdet_geo.errors import MissingDependencyError
from rtmdet_geo.evaluation.coco import FIGURES, CocoDetections, CocoTruth, evaluate_coco, run_lengths
from rtmdet_geo.masks import CroppedMask

#: Of val2014_fake_eval_res.txt, printed to three digits.
PUBLISHED = {
    "bbox": (0.505, 0.697, 0.573, 0.586, 0.519, 0.501, 0.387, 0.594, 0.595, 0.640, 0.566, 0.564),
    "segm": (0.320, 0.562, 0.299, 0.387, 0.310, 0.327, 0.268, 0.415, 0.417, 0.469, 0.377, 0.381),
}
MEASURES = {"bbox": "boxes", "segm": "masks"}


def truth(boxes, *, labels=None, crowd=(), areas=None):
    boxes = np.array(boxes, float).reshape(-1, 4)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) if areas is None else np.array(areas)
    labels = np.zeros(len(boxes), np.int64) if labels is None else np.array(labels)
    return CocoTruth(boxes, labels, np.isin(np.arange(len(boxes)), crowd), areas)


def found(boxes, scores, labels=None):
    labels = np.zeros(len(scores), np.int64) if labels is None else np.array(labels)
    return CocoDetections(np.array(boxes, float).reshape(-1, 4), np.array(scores, float), labels)


def test_two_objects_by_hand():
    """IoU 1 and 0.8 (of 10 thresholds 7 are reached), and a miss between them in order of scores."""
    objects = [[0, 0, 10, 10], [100, 0, 110, 10]]
    scores = evaluate_coco(
        [found([[0, 0, 10, 10], [50, 50, 60, 60], [100, 0, 110, 8]], [0.9, 0.8, 0.7])], [truth(objects)], num_classes=1
    )
    half, both = 51 / 101, (51 + 50 * 2 / 3) / 101  # of 101 recalls 51 lie in [0, 0.5]
    assert scores.figures["AP50"] == pytest.approx(both)
    assert scores.figures["AP75"] == pytest.approx(both)
    assert scores.figures["AP"] == pytest.approx((7 * both + 3 * half) / 10)
    assert scores.figures["AR100"] == pytest.approx((7 * 1 + 3 * 0.5) / 10)
    assert scores.figures["AR1"] == pytest.approx(0.5)
    assert scores.figures["APs"] == scores.figures["AP"] and math.isnan(scores.figures["APl"])
    assert scores.average_precision(0) == pytest.approx(scores.figures["AP"])
    assert scores.average_precision(0, 0.85) == pytest.approx(half)
    curve = scores.curve(0, 0.5)
    assert curve.best_f1 == pytest.approx((0.8, 0.7)) and curve.num_objects == 2
    assert curve.average_precision == pytest.approx(both) and curve.recall[50] == 0.5


def test_what_lies_in_a_crowd_does_not_count():
    """The share of the detection that lies in the crowd decides, and several may lie in one."""
    crowd = truth([[0, 0, 10, 10], [50, 0, 150, 100]], crowd=[1])
    inside = found([[60, 10, 70, 20], [80, 10, 90, 20], [0, 0, 10, 10]], [0.9, 0.8, 0.7])
    assert evaluate_coco([inside], [crowd], num_classes=1).figures["AP"] == 1
    outside = found([[160, 10, 170, 20], [0, 0, 10, 10]], [0.9, 0.7])
    assert evaluate_coco([outside], [crowd], num_classes=1).figures["AP"] == pytest.approx(0.5)
    assert evaluate_coco([inside], [crowd], num_classes=1).num_objects.tolist() == [1]


def test_classes_without_objects_are_left_out_of_the_mean():
    detections = [found([[0, 0, 10, 10], [0, 0, 10, 10]], [0.9, 0.8], [0, 1])]
    scores = evaluate_coco(detections, [truth([[0, 0, 10, 10]])], num_classes=3)
    assert scores.figures["AP"] == 1 and scores.num_objects.tolist() == [1, 0, 0]
    assert math.isnan(scores.average_precision(1)) and scores.curve(1, 0.5).best_f1 == (0, 1)


def test_nothing_found_nothing_there_and_no_images():
    nothing = found([], [])
    assert evaluate_coco([nothing], [truth([[0, 0, 10, 10]])], num_classes=1).figures["AP"] == 0
    for images in (0, 1):
        figures = evaluate_coco([nothing] * images, [truth([])] * images, num_classes=2).figures
        assert tuple(figures) == FIGURES and all(math.isnan(value) for value in figures.values())


def test_inputs_that_disagree_are_refused():
    with pytest.raises(ValueError, match="1 images, but labels of 2"):
        evaluate_coco([found([], [])], [truth([])] * 2, num_classes=1)
    with pytest.raises(ValueError, match="have none"):
        evaluate_coco([found([], [])], [truth([])], num_classes=1, measure="masks")


def test_a_missing_package_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'rtmdet-geo\[eval\]'$"):
        evaluate_coco([], [], num_classes=1)


@settings(deadline=None, max_examples=100)
@given(st.tuples(st.integers(1, 6), st.integers(1, 7)), st.tuples(st.integers(0, 6), st.integers(0, 7)), st.randoms())
def test_run_lengths_equal_those_of_the_whole_mask(size, crop, random):
    """Crops that fill the image's height too, whose runs go on from column to column."""
    height, width = size
    rows, columns = min(crop[0], height), min(crop[1], width)
    y, x = random.randint(0, height - rows), random.randint(0, width - columns)
    density = random.choice([0.0, 0.5, 0.9, 1.0])
    cells = [[int(random.random() < density) for _ in range(columns)] for _ in range(rows)]
    mask = np.array(cells, np.uint8).reshape(rows, columns)
    whole = np.zeros((height, width), bool)
    whole[y : y + rows, x : x + columns] = mask != 0
    packed = run_lengths(CroppedMask(mask, x, y), height, width)
    assert packed == encode_mask(whole)
    np.testing.assert_array_equal(decode_mask(packed), whole)


def blobs(rng, number, size):
    """Run lengths of random ellipse-like blobs, their boxes and areas."""
    masks, boxes, areas = [], [], []
    rows, columns = np.mgrid[:size, :size] + 0.5
    for _ in range(number):
        x, y = rng.uniform(0, size, 2)
        w, h = rng.uniform(4, 0.7 * size, 2)
        mask = ((columns - x) / w) ** 2 + ((rows - y) / h) ** 2 < 0.25
        mask[int(y) % size, int(x) % size] = True
        masks.append(encode_mask(mask))
        low, high = np.argwhere(mask).min(axis=0), np.argwhere(mask).max(axis=0) + 1
        boxes.append([low[1], low[0], high[1], high[0]])
        areas.append(int(mask.sum()))
    return masks, np.array(boxes, float).reshape(-1, 4), np.array(areas, float)


def scene(rng, num_classes, size):
    """Labels of an image and detections of which many lie near them."""
    number = int(rng.integers(0, 7))
    masks, boxes, areas = blobs(rng, number, size)
    labels = rng.integers(0, num_classes, number)
    truths = CocoTruth(boxes, labels, rng.random(number) < 0.2, areas, masks)
    more, others, _ = blobs(rng, 5, size)
    near = np.clip(boxes + rng.normal(0, 2, boxes.shape), 0, size)
    near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
    chosen = np.flatnonzero(rng.random(number) < 0.8)
    tags = np.concatenate((labels[chosen], rng.integers(0, num_classes, 5)))
    scores = rng.permutation(40)[: len(tags)] / 40
    return CocoDetections(
        np.concatenate((near[chosen], others)), scores, tags, [masks[i] for i in chosen] + more
    ), truths


def count_with_pycocotools(detections, truths, num_classes, kind):
    coco = pytest.importorskip("pycocotools.coco")
    from pycocotools.cocoeval import COCOeval

    images = [{"id": index, "height": 0, "width": 0} for index in range(len(truths))]
    categories = [{"id": label, "name": str(label)} for label in range(num_classes)]
    labels, results = [], []
    for index, (item, seen) in enumerate(zip(truths, detections, strict=True)):
        for i, (x0, y0, x1, y1) in enumerate(item.boxes.tolist()):
            labels.append(
                {"id": len(labels) + 1, "image_id": index, "category_id": int(item.labels[i]), "area": item.areas[i]}
                | {"iscrowd": int(item.is_crowd[i]), "bbox": [x0, y0, x1 - x0, y1 - y0], "segmentation": item.masks[i]}
            )
        for i, (x0, y0, x1, y1) in enumerate(seen.boxes.tolist()):
            results.append(
                {"image_id": index, "category_id": int(seen.labels[i]), "score": float(seen.scores[i])}
                | ({"bbox": [x0, y0, x1 - x0, y1 - y0]} if kind == "bbox" else {"segmentation": seen.masks[i]})
            )
    with contextlib.redirect_stdout(io.StringIO()):
        base = coco.COCO()
        base.dataset = {"info": {}, "images": images, "categories": categories, "annotations": labels}
        base.createIndex()
        judge = COCOeval(base, base.loadRes(results), kind)
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return judge


@pytest.mark.parametrize("kind", ["bbox", "segm"])
@pytest.mark.parametrize("seed", range(4))
def test_equals_pycocotools(kind, seed):
    rng = np.random.default_rng(seed)
    detections, truths = zip(*(scene(rng, 3, 130 if seed % 2 else 60) for _ in range(12)), strict=True)
    ours = evaluate_coco(detections, truths, num_classes=3, measure=MEASURES[kind])
    theirs = count_with_pycocotools(detections, truths, 3, kind)
    expected = [float("nan") if value < 0 else value for value in theirs.stats]
    np.testing.assert_allclose(list(ours.figures.values()), expected, atol=1e-6)
    assert any(item.is_crowd.any() for item in truths) and 0 < ours.figures["AP"] < 1
    precision = theirs.eval["precision"][:, :, :, 0, 2]
    np.testing.assert_allclose(ours.precision, np.where(precision < 0, np.nan, precision), atol=1e-6)
    other = [CocoDetections(item.boxes, -item.scores, item.labels, item.masks) for item in detections]
    figures = evaluate_coco(other, truths, num_classes=3, measure=MEASURES[kind]).figures
    assert abs(figures["AP"] - ours.figures["AP"]) > 1e-4  # the order of scores counts


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_published_figures_of_the_example_of_coco(data_dir, kind):
    """100 images of val2014 with made-up results, whose figures COCO publishes to three digits."""
    mask = pytest.importorskip("pycocotools.mask")
    folder = data_dir / "coco_eval_gold"
    content = json.loads((folder / "instances_val2014_100.json").read_text())
    results = json.loads((folder / f"instances_val2014_fake{kind}100_results.json").read_text())
    sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    labels = {entry["id"]: index for index, entry in enumerate(content["categories"])}

    def packed(segmentation, size):
        if isinstance(segmentation, list):
            return mask.merge(mask.frPyObjects(segmentation, *size))
        if isinstance(segmentation["counts"], list):
            return mask.frPyObjects(segmentation, *size)
        return segmentation

    def of(entries, image):
        mine = [entry for entry in entries if entry["image_id"] == image]
        boxes = np.array([entry.get("bbox", (0, 0, 1, 1)) for entry in mine], float).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        masks = [packed(entry["segmentation"], sizes[image]) for entry in mine] if kind == "segm" else None
        return mine, boxes, np.array([labels[entry["category_id"]] for entry in mine], np.int64), masks

    truths, detections = [], []
    for image in sorted(sizes):
        mine, boxes, tags, masks = of(content["annotations"], image)
        crowd, areas = (np.array([entry[key] for entry in mine]) for key in ("iscrowd", "area"))
        truths.append(CocoTruth(boxes, tags, crowd.astype(bool), areas, masks))
        mine, boxes, tags, masks = of(results, image)
        detections.append(CocoDetections(boxes, np.array([entry["score"] for entry in mine]), tags, masks))
    figures = evaluate_coco(detections, truths, num_classes=len(labels), measure=MEASURES[kind]).figures
    assert [round(value, 3) for value in figures.values()] == list(PUBLISHED[kind])
