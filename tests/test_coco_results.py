"""COCO result files: published figures from the files themselves, and every malformed entry is named."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from rtmdet_geo.annotations.coco import encode_mask
from rtmdet_geo.errors import AnnotationError
from rtmdet_geo.evaluation.coco import FIGURES
from rtmdet_geo.evaluation.coco_files import evaluate_coco_results

BOX = {"image_id": 7, "category_id": 3, "score": 0.9, "bbox": [10, 10, 20, 10]}
MASK = {key: BOX[key] for key in ("image_id", "category_id", "score")} | {
    "segmentation": {"size": [40, 50], "counts": [0, 40 * 50]}
}


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.fixture
def labels(tmp_path):
    """Two images; a ship of 20 x 10 px, a plane of 8 x 8 px, a crowd of ships."""
    images = [{"id": 7, "file_name": "a.png", "width": 50, "height": 40}]
    images.append({"id": 9, "file_name": "b.png", "width": 50, "height": 40})
    crowd = np.zeros((40, 50), bool)
    crowd[:10, :10] = True
    annotations = [
        {"id": 1, "image_id": 7, "category_id": 3, "bbox": [10, 10, 20, 10], "area": 200, "iscrowd": 0}
        | {"segmentation": [[10, 10, 30, 10, 30, 20, 10, 20]]},
        {"id": 2, "image_id": 9, "category_id": 5, "bbox": [4, 4, 8, 8], "area": 64, "iscrowd": 0}
        | {"segmentation": [[4, 4, 12, 4, 12, 12, 4, 12]]},
        {"id": 3, "image_id": 9, "category_id": 3, "bbox": [0, 0, 10, 10], "area": 100, "iscrowd": 1}
        | {"segmentation": encode_mask(crowd)},
    ]
    categories = [{"id": 3, "name": "ship"}, {"id": 5, "name": "plane"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    return write(tmp_path / "labels.json", content)


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_published_figures_from_files(data_dir, kind):
    """Twelve figures of boxes and of masks, to the digits that are printed."""
    folder = data_dir / "coco_eval_gold"
    text = (folder / "val2014_fake_eval_res.txt").read_text().split(f"type={kind}")[1].split("type=")[0]
    published = [float(line.rpartition("=")[2]) for line in text.splitlines() if "Average" in line]
    results, annotations = f"instances_val2014_fake{kind}100_results.json", "instances_val2014_100.json"
    report = evaluate_coco_results(folder / results, folder / annotations)
    assert report.protocol == f"COCO, {'boxes' if kind == 'bbox' else 'masks'}"
    assert tuple(report.figures) == FIGURES and len(published) == 12
    assert [round(value, 3) for value in report.figures.values()] == published
    by_class = [row["AP"] for row in report.rows if row["objects"]]
    assert np.mean(by_class) == pytest.approx(report.figures["AP"], abs=1e-9)
    assert report.confusion.matrix.sum() > 100 and len(report.hit_scores) > len(report.miss_scores) / 4


def test_by_hand(labels, tmp_path):
    """A ship found, a plane taken for a ship, a detection in a crowd that does not count."""
    results = [BOX, BOX | {"image_id": 9, "bbox": [4, 4, 8, 8], "score": 0.8}]
    results.append(BOX | {"image_id": 9, "bbox": [0, 0, 5, 5], "score": 0.7})
    report = evaluate_coco_results(write(tmp_path / "r.json", results), labels)
    assert [row["class"] for row in report.rows] == ["ship", "plane"]
    assert [row["AP50"] for row in report.rows] == [1, 0] and report.figures["AP50"] == 0.5
    assert [row["objects"] for row in report.rows] == [1, 1] and report.hit_scores.tolist() == [0.9]
    # ships are sure from 0.9 on, where the F1 is best: the plane was missed
    assert report.confusion.matrix.tolist() == [[1, 0, 0], [0, 0, 1], [0, 0, 0]]


def test_masks_by_hand_and_nothing_found(labels, tmp_path):
    """Half of the plane's pixels, in either form of run lengths, by the resolution of the mask itself."""
    half = np.zeros((40, 50), bool)
    half[4:12, 4:8] = True
    plane = {"image_id": 9, "category_id": 5, "score": 0.5}
    packed = encode_mask(half)
    runs = {"size": [40, 50], "counts": [4 * 40 + 4, 8, 32, 8, 32, 8, 32, 8, 40 * 50 - 4 * 40 - 132]}
    for segmentation in (packed, runs):
        path = write(tmp_path / "r.json", [plane | {"segmentation": segmentation}])
        report = evaluate_coco_results(path, labels)
        assert report.protocol == "COCO, masks"
        assert report.rows[1]["AP50"] == 1 and report.rows[1]["AP"] == pytest.approx(0.1)
    nothing = evaluate_coco_results(write(tmp_path / "r.json", []), labels)
    assert nothing.figures["AP"] == 0 and nothing.hit_scores.size == 0
    assert nothing.confusion.matrix.tolist() == [[0, 0, 1], [0, 0, 1], [0, 0, 0]]


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("{", "is not JSON"),
        ({"annotations": []}, "is no list of results"),
        ([BOX, 5], "entry 1: 5 is no object"),
        ([{key: BOX[key] for key in BOX if key != "score"}], "entry 0: it has no 'score'"),
        ([BOX | {"image_id": 8}], "entry 0: image_id 8 is not among the images"),
        ([BOX | {"image_id": "7"}], "entry 0: image_id '7' is not among"),
        ([BOX | {"category_id": 4}], "entry 0: category_id 4 is not among"),
        ([BOX | {"score": math.nan}], "entry 0: its score is nan"),
        ([BOX | {"score": None}], "entry 0: "),
        ([BOX | {"bbox": [1, 2, 3]}], "entry 0: its bbox has 3 numbers"),
        ([BOX | {"bbox": [1, 2, -3, 4]}], "entry 0: its bbox is .* sides of -3 x 4 px"),
        ([BOX | {"bbox": [1, 2, 3, math.inf]}], "entry 0: its bbox"),
        ([BOX | {"bbox": []}], "entry 0: it has neither bbox nor segmentation"),
        ([BOX, BOX | {"score": 0.5}, BOX], "entry 2: it repeats entry 0"),
        ([BOX | {"id": 1}, BOX | {"id": 1, "score": 0.5}], "entry 1: it repeats entry 0, or its id"),
        ([MASK | {"segmentation": [[1, 1, 5, 1, 5, 5]]}], "entry 0: its segmentation is no run-length mask"),
        ([MASK | {"segmentation": {"size": [40, 50], "counts": [5]}}], r"entry 0: its mask covers 5 px"),
        (
            [MASK | {"segmentation": {"size": [50, 40], "counts": [2000]}}],
            r"of size \[50, 40\], the image of \[40, 50\]",
        ),
        ([MASK | {"segmentation": {"size": [40, 50]}}], "entry 0: it has no 'counts'"),
        ([MASK | {"segmentation": {"size": [40, 50], "counts": "\x01"}}], "entry 0: run-length text"),
        ([BOX, MASK], "entry 1: it has none of the boxes to score"),
    ],
)
def test_malformed_entries_are_named(labels, tmp_path, content, part):
    path = write(tmp_path / "results.json", content)
    with pytest.raises(AnnotationError, match=part) as raised:
        evaluate_coco_results(path, labels)
    assert "results.json" in str(raised.value)


def test_missing_files_and_masks_of_labels_are_named(labels, tmp_path):
    with pytest.raises(AnnotationError, match=r"nosuch.json"):
        evaluate_coco_results(tmp_path / "nosuch.json", labels)
    with pytest.raises(AnnotationError, match=r"results.json.*is not COCO"):
        evaluate_coco_results(labels, write(tmp_path / "results.json", [BOX]))
    content = json.loads(labels.read_text())
    content["annotations"][2]["segmentation"]["size"] = [50, 40]
    results = write(tmp_path / "results.json", [MASK])
    with pytest.raises(AnnotationError, match="annotation 3: its mask is of size"):
        evaluate_coco_results(results, write(tmp_path / "turned.json", content))
    del content["annotations"][1]["segmentation"]
    with pytest.raises(AnnotationError, match="annotation 2: masks need a segmentation"):
        evaluate_coco_results(results, write(tmp_path / "boxes.json", content))
