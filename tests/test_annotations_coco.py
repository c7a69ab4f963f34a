"""COCO label files and their run-length masks."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rtmdet_geo.annotations.coco import (
    CocoObject,
    decode_counts,
    decode_mask,
    encode_counts,
    encode_mask,
    image_labels,
    mask_corner_points,
    object_mask,
    object_outline,
    read_coco,
)
from rtmdet_geo.annotations.outlines import outline_points
from rtmdet_geo.boxes import minimum_area_rectangle
from rtmdet_geo.errors import AnnotationError

masks = arrays(bool, st.tuples(st.integers(1, 40), st.integers(1, 40)))


def corners_by_hand(mask):
    rows, columns = np.nonzero(mask)
    return {(x + dx, y + dy) for y, x in zip(rows, columns, strict=True) for dx in (0, 1) for dy in (0, 1)}


def test_counts_worked_by_hand():
    # 5 -> "5"; 2 -> "2"; 68 = 4 + 2 * 32 -> chr(4 + 32 + 48) "T", chr(2 + 48) "2"; the fourth is 9 - 2 = 7 -> "7"
    assert decode_counts("52T27").tolist() == [5, 2, 68, 9]
    assert encode_counts([5, 2, 68, 9]) == "52T27"
    assert decode_counts([5, 2, 68]).tolist() == [5, 2, 68]
    assert decode_counts("").tolist() == []


def test_runs_go_down_columns():
    mask = decode_mask({"size": [3, 2], "counts": [1, 3, 2]})
    assert mask.tolist() == [[False, True], [True, False], [True, False]]


@settings(deadline=None, max_examples=60)
@given(masks)
def test_mask_round_trip(mask):
    segmentation = encode_mask(mask)
    np.testing.assert_array_equal(decode_mask(segmentation), mask)
    plain = {"size": segmentation["size"], "counts": decode_counts(segmentation["counts"]).tolist()}
    np.testing.assert_array_equal(decode_mask(plain), mask)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 2**31), max_size=12))
def test_counts_round_trip(runs):
    assert decode_counts(encode_counts(runs)).tolist() == runs


@settings(deadline=None, max_examples=60)
@given(masks)
def test_pycocotools_agrees(mask):
    coco_mask = pytest.importorskip("pycocotools.mask")
    ours, theirs = encode_mask(mask), coco_mask.encode(np.asfortranarray(mask, np.uint8))
    np.testing.assert_array_equal(decode_mask({"size": theirs["size"], "counts": theirs["counts"]}), mask)
    np.testing.assert_array_equal(decode_mask({"size": theirs["size"], "counts": theirs["counts"].decode()}), mask)
    assert ours["counts"] == theirs["counts"].decode()


@settings(deadline=None, max_examples=60)
@given(masks)
def test_corner_points_have_the_hull_of_all_pixel_corners(mask):
    points = mask_corner_points(encode_mask(mask))
    every = corners_by_hand(mask)
    assert {tuple(point) for point in points} <= every and bool(len(points)) == bool(every)
    if every:
        ours, slow = minimum_area_rectangle(points), minimum_area_rectangle(np.array(sorted(every), float))
        assert ours[2] * ours[3] == pytest.approx(slow[2] * slow[3])
        np.testing.assert_allclose(ours[:2], slow[:2], atol=len(every)) if len(every) == 4 else None


def test_one_pixel_is_a_unit_square():
    mask = np.zeros((5, 9), bool)
    mask[2, 6] = True
    box = minimum_area_rectangle(mask_corner_points(encode_mask(mask)))
    assert box[:4] == pytest.approx([6.5, 2.5, 1, 1])
    assert mask_corner_points({"size": [5, 9], "counts": [45]}).shape == (0, 2)


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ({"size": [3, 2], "counts": [1, 3]}, "covers 4 px"),
        ({"size": [3, 2], "counts": [8, -2]}, "negative"),
        ({"size": [3, 2], "counts": "5T"}, "ends inside a number"),
        ({"size": [3, 2], "counts": "5 1"}, "does not use"),
        ({"counts": "6"}, "needs size and counts"),
        ({"size": [3, 2]}, "needs size and counts"),
    ],
)
def test_broken_masks(segmentation, message):
    with pytest.raises(AnnotationError, match=message):
        mask_corner_points(segmentation)


def coco(**changes):
    content = {
        "images": [{"id": 4, "file_name": "a.tif", "width": 20, "height": 10}, {"id": 7, "file_name": "b.tif"}],
        "categories": [{"id": 9, "name": "plane"}, {"id": 2, "name": "ship"}],
        "annotations": [
            {"id": 1, "image_id": 4, "category_id": 9, "segmentation": [[0, 0, 4, 0, 4, 2], [6, 6, 8, 6, 8, 9]]},
            {"id": 2, "image_id": 4, "category_id": 2, "bbox": [1, 2, 3, 4], "iscrowd": 1},
            {"id": 3, "image_id": 4, "category_id": 2, "segmentation": {"size": [10, 20], "counts": [0, 1, 199]}},
        ],
    }
    return content | changes


def test_reading(tmp_path):
    path = tmp_path / "labels.json"
    path.write_text(json.dumps(coco()))
    labels = read_coco(path)
    assert labels.classes == ("ship", "plane") and labels.objects[7] == []
    polygon, box, mask = labels.objects[4]
    assert polygon.class_name == "plane" and polygon.points.shape == (6, 2) and not polygon.is_crowd
    assert box.points.tolist() == [[1, 2], [4, 2], [4, 6], [1, 6]] and box.is_crowd
    assert mask.points.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]] and mask.annotation_id == 3


def test_polygons_run_lengths_and_crowds_become_masks(tmp_path):
    runs = encode_mask(np.arange(200).reshape(10, 20) % 7 == 0)
    plain = {"size": [10, 20], "counts": decode_counts(runs["counts"]).tolist()}
    extra = [
        {"id": 4, "image_id": 4, "category_id": 2, "segmentation": runs},
        {"id": 5, "image_id": 4, "category_id": 2, "segmentation": plain, "iscrowd": 1},
        {"id": 6, "image_id": 4, "category_id": 2, "segmentation": [], "bbox": [1, 2, 3, 4]},
    ]
    path = tmp_path / "labels.json"
    path.write_text(json.dumps(coco(annotations=coco()["annotations"] + extra)))
    polygon, box, pixel, compressed, crowd, no_polygon = read_coco(path).objects[4]
    mask = object_mask(polygon, 10, 20)
    assert mask.shape == (10, 20) and mask.dtype == bool
    assert np.argwhere(mask).tolist() == [  # centres in the triangles (0 0, 4 0, 4 2) and (6 6, 8 6, 8 9)
        [0, 1], [0, 2], [0, 3], [1, 3], [6, 6], [6, 7], [7, 7],
    ]  # fmt: skip
    assert object_mask(pixel, 10, 20).nonzero() == (0, 0)
    np.testing.assert_array_equal(object_mask(compressed, 10, 20), np.arange(200).reshape(10, 20) % 7 == 0)
    np.testing.assert_array_equal(object_mask(crowd, 10, 20), object_mask(compressed, 10, 20))
    assert crowd.is_crowd and not compressed.is_crowd
    for entry in (box, no_polygon):
        assert entry.segmentation is None and object_outline(entry) == () and not object_mask(entry, 10, 20).any()
    assert outline_points(object_outline(pixel)).tolist() == [[0, 0], [1, 0], [1, 1], [0, 1]]
    assert [len(part) for part in object_outline(polygon)] == [1, 1]
    with pytest.raises(AnnotationError, match="annotation 4: its mask is 10 x 20 px, the image is 20 x 20 px"):
        object_mask(compressed, 20, 20)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.floats(0, 40), st.floats(0, 30)), min_size=3, max_size=8))
def test_polygons_cover_what_pycocotools_covers_but_for_the_border(corners):
    coco_mask = pytest.importorskip("pycocotools.mask")
    ring = np.array(corners).ravel().tolist()
    theirs = decode_mask(coco_mask.frPyObjects([ring], 30, 40)[0])
    entry = CocoObject(0, "ship", np.array(corners), False, 1, [ring])
    ours = object_mask(entry, 30, 40)
    edges = np.concatenate([np.linspace(a, b, 200) for a, b in zip(corners, corners[1:] + corners[:1], strict=True)])
    for row, column in np.argwhere(ours != theirs):
        assert np.hypot(*(edges - (column + 0.5, row + 0.5)).T).min() < 1.5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not json"),
        ("[]", "is not COCO"),
        ('{"images": []}', "is not COCO"),
        (coco(images=[{"file_name": "a"}]), "malformed image or category"),
        (
            coco(annotations=[{"id": 5, "image_id": 1, "category_id": 9, "bbox": [0, 0, 1, 1]}]),
            "annotation 5: image_id 1",
        ),
        (
            coco(annotations=[{"id": 5, "image_id": 4, "category_id": 1, "bbox": [0, 0, 1, 1]}]),
            "annotation 5: category_id",
        ),
        (coco(annotations=[{"id": 5, "image_id": 4, "category_id": 9}]), "neither segmentation nor bbox"),
        (coco(annotations=[{"image_id": 4, "category_id": 9, "bbox": [0, 0, 1]}]), "annotation 0"),
        (coco(annotations=[{"id": 5, "image_id": 4, "category_id": 9, "segmentation": [[1, 2, 3]]}]), "annotation 5"),
        (coco(annotations=[7]), "annotation 0"),
        (coco(annotations=[{"id": 6, "category_id": 9}]), "annotation 6: it has no 'image_id'"),
    ],
)
def test_malformed_files(tmp_path, content, message):
    path = tmp_path / "labels.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(AnnotationError, match=message) as caught:
        read_coco(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(AnnotationError, match="cannot read"):
        read_coco(tmp_path / "absent.json")


def test_real_labels(data_dir):
    path = data_dir / "sen2ships" / "annotations.json"
    labels = read_coco(path)
    annotations = json.loads(path.read_text())["annotations"]
    assert sum(map(len, labels.objects.values())) == len(annotations) > 0
    for annotation in annotations[::10]:
        mask = decode_mask(annotation["segmentation"])
        rows, columns = np.nonzero(mask)
        x, y, width, height = annotation["bbox"]
        assert (columns.min(), rows.min()) == (x, y)
        assert (columns.max() + 1 - x, rows.max() + 1 - y) == (width, height)


# ---------------------------------------------------------------- objects of an image as arrays


def labels_of(tmp_path, annotations, kind, image=None):
    image = {"id": 4, "file_name": "4.png", "width": 40, "height": 30, **(image or {})}
    content = {"images": [image], "annotations": annotations, "categories": [{"id": 1, "name": "ship"}]}
    path = tmp_path / "all.json"
    path.write_text(json.dumps(content))
    read = read_coco(path)
    return image_labels(path, read.images[4], read.objects[4], kind)


def test_boxes_follow_the_kind_of_model(tmp_path):
    """A tilted square of 200 px^2 with a bbox of its own: least rectangle, the bbox, or the bbox and the outline."""
    annotations = [
        {
            "id": 11,
            "image_id": 4,
            "category_id": 1,
            "bbox": [0, 0, 21, 20],
            "segmentation": [[10, 0, 20, 10, 10, 20, 0, 10]],
        },
        {"id": 12, "image_id": 4, "category_id": 1, "segmentation": [[0, 0, 8, 0, 8, 4, 0, 4]], "iscrowd": 1},
        {"id": 13, "image_id": 4, "category_id": 1, "bbox": [1, 2, 3, 4]},
        {"id": 14, "image_id": 4, "category_id": 1, "segmentation": {"size": [30, 40], "counts": [1200]}},
    ]
    rotated = labels_of(tmp_path, annotations, "rotated")
    assert rotated.boxes[0, 2:4] == pytest.approx([200**0.5, 200**0.5]) and rotated.outlines == ()
    assert rotated.boxes[3].tolist() == [0, 0, 0, 0, 0]  # a mask without pixels
    assert rotated.crowd.tolist() == [False, True, False, False] and rotated.size == (40, 30)
    assert rotated.place(1) == f"{tmp_path / 'all.json'}, annotation 12"
    horizontal = labels_of(tmp_path, annotations, "horizontal")
    assert horizontal.boxes[0] == pytest.approx([10.5, 10, 21, 20, 0]) and horizontal.outlines == ()
    assert horizontal.boxes[1] == pytest.approx([4, 2, 8, 4, 0])
    assert horizontal.boxes[2] == pytest.approx([2.5, 4, 4, 3, -np.pi / 2])
    masks = labels_of(tmp_path, annotations, "mask")
    assert [len(outline_points(outline)) for outline in masks.outlines] == [4, 4, 0, 0]
    assert np.array_equal(masks.boxes, horizontal.boxes)


def test_areas_are_taken_where_they_are_stated(tmp_path):
    stated = [12.5, None, 0, float("inf"), -3, 200]
    annotations = [
        {"id": number, "image_id": 4, "category_id": 1, "bbox": [1, 2, 3, 4]} | ({} if area is None else {"area": area})
        for number, area in enumerate(stated)
    ]
    areas = labels_of(tmp_path, annotations, "horizontal").areas
    nan = float("nan")
    assert areas.tolist() == pytest.approx([12.5, nan, nan, nan, nan, 200], nan_ok=True) and areas.dtype == np.float64
    assert labels_of(tmp_path, annotations[1:3], "mask").areas is None
    with pytest.raises(AnnotationError, match=r"annotation 7: could not convert string to float: 'large'"):
        labels_of(tmp_path, [annotations[0] | {"id": 7, "area": "large"}], "mask")


@pytest.mark.parametrize("image", [{"width": None}, {"height": 0}])
def test_sizes_may_be_open(tmp_path, image):
    labels = labels_of(tmp_path, [], "rotated", image)
    assert labels.size is None and labels.boxes.shape == (0, 5)


@pytest.mark.parametrize(
    ("bbox", "message"),
    [([1, 2, -3, 4], "sides of -3 x 4 px"), ([1, 2, 3], "not enough values"), ([1, 2, float("nan"), 4], "not finite")],
)
def test_malformed_annotations_are_refused_or_handed_on(tmp_path, bbox, message):
    good = {"id": 1, "image_id": 4, "category_id": 1, "bbox": [1, 2, 3, 4]}
    bad = {**good, "id": 2, "bbox": bbox}
    with pytest.raises(AnnotationError, match=r"all\.json.*annotation 2: .*" + message):
        labels_of(tmp_path, [good, bad], "rotated")
    errors = []
    assert len(read_coco(tmp_path / "all.json", errors.append).objects[4]) == 1
    assert len(errors) == 1 and "annotation 2" in str(errors[0])
