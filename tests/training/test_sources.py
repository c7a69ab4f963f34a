"""Images of a recipe's data section: what is taken, what is left out and said, what is refused."""

from __future__ import annotations

import json
import logging
import math
import shutil

import numpy as np
import pytest
from label_folders import coco_box, coco_folder, dota_folder, write_image, write_text

from rtmdet_geo.annotations.outlines import outline_points
from rtmdet_geo.config import parse_recipe
from rtmdet_geo.errors import AnnotationError, ConfigError, DatasetNotFoundError
from rtmdet_geo.training.image_files import ImageCache
from rtmdet_geo.training.sources import load_datasets, load_images

SHIP = "10 10 30 10 30 20 10 20 ship 0\n"


def recipe_of(root, *, name="rtmdet_r_test", classes=("ship",), bands=None, **data):
    """A recipe whose training part is ``images`` and ``labels`` below ``root``."""
    model = {"name": name, "classes": list(classes), **({"bands": bands} if bands else {})}
    data = {"format": "dota", "root": str(root), "train_images": "images", "train_labels": "labels", **data}
    return parse_recipe({"name": "toy", "model": model, "data": data})


def load(root, **changes):
    """The training images of such a recipe."""
    recipe = recipe_of(root, **changes)
    return load_images(recipe.data, recipe.model, "train")


def warnings_in(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_images_come_with_labels_and_pixels_when_asked(tmp_path):
    root = dota_folder(tmp_path, b=SHIP + "1 1 5 1 5 3 1 3 buoy 0", a="")
    empty, image = load(root, classes=("buoy", "ship"), bands=["blue", "green", "red"])
    assert (empty.name, image.name, image.scene) == ("a.png", "b.png", "b.png")
    assert empty.boxes.shape == (0, 5) and empty.labels.shape == empty.ignored.shape == (0,)
    assert (image.width, image.height) == (40, 30)
    assert image.boxes == pytest.approx(np.array([[20, 15, 20, 10, 0], [3, 2, 4, 2, 0]]))
    assert image.labels.tolist() == [1, 0] and image.labels.dtype == np.int64 and image.outlines == ()
    assert image.pixels.shape == (3, 30, 40)
    assert np.array_equal(image.pixels, load(root, classes=("buoy", "ship"))[1].pixels[::-1])


def test_datasets_share_a_cache_and_folder_replaces_the_root(tmp_path):
    dota_folder(tmp_path / "data", a=SHIP, b=SHIP)
    dota_folder(tmp_path / "data" / "more", c=SHIP)
    recipe = recipe_of("elsewhere", val_images="more/images", val_labels="more/labels")
    training, left_out = load_datasets(recipe.with_data(tmp_path / "data"))
    assert [image.name for image in training] == ["a.png", "b.png"] and [image.name for image in left_out] == ["c.png"]
    assert training[0].source.cache is left_out[0].source.cache
    assert training[0].source.cache.budget == recipe.data.cache_mb * 1_000_000
    assert load_datasets(recipe_of(tmp_path / "data"))[1] == []
    cache = ImageCache(7)
    assert load_images(recipe_of(tmp_path / "data").data, recipe.model, "train", cache)[0].source.cache is cache


def test_chips_are_loaded_and_split(chips_dir, recipe, tmp_path):
    training, left_out = load_datasets(recipe)
    assert [chip.scene for chip in training] == ["beta", "gamma"] and [chip.scene for chip in left_out] == ["alpha"]
    shutil.copytree(chips_dir, tmp_path / "copy")
    assert len(load_datasets(recipe.with_data(tmp_path / "copy"))[0]) == 2
    with pytest.raises(ConfigError, match="chips has no label files"):
        load_images(recipe.data, recipe.model, "train")
    with pytest.raises(ConfigError, match=r"data\.val_images"):
        load_images(recipe_of(tmp_path).data, recipe.model, "val")


def test_objects_without_area_or_outside_are_left_out_and_said(tmp_path, caplog):
    lines = [
        "10 10 30 10 30 20 10 20 ship 0",  # inside
        "-9 10 9 10 9 20 -9 20 ship 0",  # half of it is outside: stays
        "5 5 5 5 5 5 5 5 ship 0",  # a point
        "5 5 9 5 9 5 5 5 ship 0",  # a line
        "50 10 60 10 60 20 50 20 ship 0",  # outside
        "-20 12 12 -20 10 -22 -22 10 ship 0",  # a tilted box that passes the corner by
        "-8 12 12 -8 10 -10 -10 10 ship 0",  # one that cuts it: stays
        "40 0 50 0 50 10 40 10 ship 0",  # only touches the edge
    ]
    root = dota_folder(tmp_path, a="\n".join(lines))
    with caplog.at_level(logging.INFO):
        (image,) = load(root)
    assert image.boxes[:, 0] == pytest.approx([20, 0, 1])
    said = "\n".join(warnings_in(caplog))
    assert f"train: 2 x zero area (objects left out), such as {root / 'labels' / 'a.txt'}:3: 'ship' of 0 x 0 px" in said
    assert "train: 3 x outside (objects left out), such as" in said and "a.txt:5" in said
    assert "2 x partly outside" in caplog.text and "partly" not in said
    assert "train: 1 images (0 of them without objects), 3 objects" in caplog.text


def test_difficult_and_crowd(tmp_path):
    root = dota_folder(tmp_path / "dota", a=SHIP + "1 1 5 1 5 3 1 3 ship 1\n2 2 6 2 6 4 2 4 ship 2")
    for choice, number, ignored in (("keep", 3, [False] * 3), ("ignore", 3, [False, True, True]), ("drop", 1, [False])):
        (image,) = load(root, difficult=choice)
        assert len(image.boxes) == len(image.labels) == number and image.ignored.tolist() == ignored
    boxes = [coco_box(1, 1, [1, 2, 9, 4]), coco_box(2, 1, [0, 0, 20, 20], iscrowd=1)]
    root = coco_folder(tmp_path / "coco", boxes)
    image, empty = load(root, format="coco", train_labels="all.json", classes=("ship", "buoy"))
    assert image.ignored.tolist() == [False, True] and len(empty.boxes) == 0


def test_unknown_classes_are_refused_or_dropped_with_counts(tmp_path, caplog):
    root = dota_folder(tmp_path, a=SHIP + SHIP.replace("ship", "buoy") * 2, b=SHIP.replace("ship", "whale"))
    with pytest.raises(ConfigError, match=r"3 objects have classes.*'buoy' \(2\), 'whale' \(1\).*a\.txt:2.*=drop"):
        load(root)
    images = load(root, unknown_classes="drop")
    assert [len(image.boxes) for image in images] == [1, 0] and images[0].labels.tolist() == [0]
    assert "3 x unknown class (objects left out)" in "\n".join(warnings_in(caplog))
    assert [image.name for image in load(root, unknown_classes="drop", empty_images="drop")] == ["a.png"]


def test_classes_without_objects_are_said(tmp_path, caplog):
    root = dota_folder(tmp_path, a=SHIP)
    load(root, classes=("ship", "buoy", "quay"))
    assert warnings_in(caplog) == ["train: no object of 2 of the 3 classes: buoy, quay"]
    caplog.clear()
    load(root)
    assert warnings_in(caplog) == []


def test_an_image_without_labels_is_background_for_yolo_only(tmp_path, caplog):
    root = dota_folder(tmp_path, a=SHIP)
    write_image(root / "images" / "b.png", 9)
    assert [image.name for image in load(root)] == ["a.png"]
    assert "1 x image without labels" in "\n".join(warnings_in(caplog)) and "b.png" in caplog.text
    write_text(root / "labels" / "a.txt", "0 0.5 0.5 0.5 0.5")
    write_text(root / "labels" / "classes.txt", "ship")  # what labelling programs leave behind
    with_background = load(root, format="yolo_obb")
    assert [(image.name, len(image.boxes)) for image in with_background] == [("a.png", 1), ("b.png", 0)]


def test_ids_take_a_part(tmp_path):
    root = dota_folder(tmp_path, a=SHIP, b=SHIP, c=SHIP)
    write_text(root / "train.txt", "c\n\na.png\nsome/folder/a.png\n")
    assert [image.name for image in load(root, train_ids="train.txt")] == ["c.png", "a.png"]
    coco_folder(tmp_path / "coco", [], images=3)
    write_text(tmp_path / "coco" / "ids.txt", "3.png\n1\n")
    coco = {"format": "coco", "train_labels": "all.json", "classes": ("ship",)}
    assert [image.name for image in load(tmp_path / "coco", train_ids="ids.txt", **coco)] == ["1.png", "3.png"]
    write_text(tmp_path / "coco" / "ids.txt", "17.png\n")
    with pytest.raises(AnnotationError, match=r"ids\.txt: '17' is not among the images of .*all\.json"):
        load(tmp_path / "coco", train_ids="ids.txt", **coco)


def test_lists_may_come_with_the_recipes(tmp_path, monkeypatch):
    monkeypatch.setattr("rtmdet_geo.annotations.parts.recipe_folder", lambda: tmp_path / "configs")
    root = dota_folder(tmp_path / "data", a=SHIP, b=SHIP)
    write_text(tmp_path / "configs" / "splits" / "few.txt", "b\n")
    assert [image.name for image in load(root, train_ids="splits/few.txt")] == ["b.png"]
    write_text(root / "splits" / "few.txt", "a\n")  # the data's own goes before it
    assert [image.name for image in load(root, train_ids="splits/few.txt")] == ["a.png"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda root: shutil.rmtree(root / "images"), DatasetNotFoundError, "images' is missing"),
        (lambda root: shutil.rmtree(root / "labels"), DatasetNotFoundError, "labels' is missing"),
        (lambda root: [path.unlink() for path in (root / "images").iterdir()], DatasetNotFoundError, "no images in"),
        (lambda root: [path.unlink() for path in (root / "labels").iterdir()], DatasetNotFoundError, "no label files"),
        (lambda root: (root / "train.txt").unlink(), DatasetNotFoundError, "train.txt' is missing"),
        (lambda root: write_text(root / "train.txt", " \n"), DatasetNotFoundError, "train.txt' is empty"),
        (lambda root: write_text(root / "train.txt", "z"), AnnotationError, "train.txt: 'z' is not in"),
        (lambda root: (root / "labels" / "a.txt").unlink(), AnnotationError, "'a' has no a.txt"),
        (lambda root: write_text(root / "labels" / "a.txt", "1 2"), AnnotationError, r"a\.txt.*: 2 words"),
        (
            lambda root: write_image(root / "images" / "a.jpg", 1),
            AnnotationError,
            "a.png: it shares its labels with a.jpg",
        ),
        (lambda root: write_text(root / "images" / "a.png", "no image"), AnnotationError, r"a\.png.*no image"),
        (lambda root: write_text(root / "labels" / "a.txt", ""), ConfigError, "no labelled object is left"),
    ],
)
def test_what_is_refused(tmp_path, change, error, message):
    root = dota_folder(tmp_path, a=SHIP, other="")
    write_text(root / "train.txt", "a")
    assert len(load_datasets(recipe_of(root, train_ids="train.txt"))[0]) == 1
    change(root)
    with pytest.raises(error, match=message):
        load_datasets(recipe_of(root, train_ids="train.txt"))


def test_labels_without_image_are_refused(tmp_path):
    root = dota_folder(tmp_path, a=SHIP, b=SHIP, c=SHIP)
    for name in "bc":
        (root / "images" / f"{name}.png").unlink()
    with pytest.raises(AnnotationError, match=r"labels without image: .*b\.txt.*and 1 more.*data check"):
        load(root)


def test_coco_faults(tmp_path):
    def refused(message, annotations=(), error=AnnotationError, **more):
        root = coco_folder(tmp_path, list(annotations), **more)
        with pytest.raises(error, match=message):
            load(root, format="coco", train_labels="all.json", classes=("ship", "buoy"))

    refused(r"annotation 5: image_id 9 is not among", [coco_box(5, 9, [1, 2, 3, 4])])
    refused(r"annotation 5: category_id 1 is not among", [coco_box(5, 1, [1, 2, 3, 4], category=1)])
    refused("names no images", images=0, error=DatasetNotFoundError)
    image = {"id": 1, "file_name": "1.png", "width": 30, "height": 40}
    write_text(tmp_path / "all.json", json.dumps({"images": [image], "annotations": [], "categories": []}))
    with pytest.raises(AnnotationError, match=r"1\.png: it is 40 x 30 px, .*says 30 x 40 px, turned by 90 degrees"):
        load(tmp_path, format="coco", train_labels="all.json")
    gone = image | {"id": 3, "file_name": "9.png"}
    write_text(tmp_path / "all.json", json.dumps({"images": [image, gone], "annotations": [], "categories": []}))
    with pytest.raises(AnnotationError, match=r"labels without image: .*image 3: .*9\.png' is missing"):
        load(tmp_path, format="coco", train_labels="all.json")
    write_text(tmp_path / "all.json", json.dumps({"images": [gone], "annotations": [], "categories": []}))
    with pytest.raises(DatasetNotFoundError, match=r"such as '1\.png'.*such as '9\.png'"):
        load(tmp_path, format="coco", train_labels="all.json")
    write_text(tmp_path / "all.json", json.dumps({"images": [{"id": 1}], "annotations": [], "categories": []}))
    with pytest.raises(AnnotationError, match="image 1: it has no file_name"):
        load(tmp_path, format="coco", train_labels="all.json")
    with pytest.raises(DatasetNotFoundError, match=r"gone\.json' is missing"):
        load(tmp_path, format="coco", train_labels="gone.json")


def test_a_broken_image_stops_or_is_left_out(tmp_path, caplog):
    root = dota_folder(tmp_path, a=SHIP, b=SHIP)
    write_text(root / "images" / "a.png", "no image")
    with pytest.raises(AnnotationError, match=r"broken image: .*a\.png"):
        load(root)
    assert [image.name for image in load(root, on_bad_image="skip")] == ["b.png"]
    assert "1 x broken image (left out)" in "\n".join(warnings_in(caplog))


def test_areas_go_with_their_objects(tmp_path):
    boxes = [
        coco_box(1, 1, [1, 2, 9, 4], area=17, category=3),
        coco_box(2, 1, [1, 1, 0, 9], area=1),  # without area: left out
        coco_box(3, 1, [5, 5, 9, 4], area=30.5),
        coco_box(4, 1, [5, 9, 9, 4]),
    ]
    root = coco_folder(tmp_path, boxes)
    coco = {"format": "coco", "train_labels": "all.json", "name": "rtmdet_test"}
    image, empty = load(root, classes=("ship",), unknown_classes="drop", **coco)
    assert image.areas.tolist() == pytest.approx([30.5, float("nan")], nan_ok=True) and empty.areas is None
    assert load(dota_folder(tmp_path / "dota", a=SHIP))[0].areas is None


def test_masks_get_outlines_and_boxes_do_not(tmp_path):
    root = dota_folder(tmp_path, a="")
    write_text(root / "labels" / "a.txt", "0 0.25 0 0.5 0.5 0 0.5\n0 0.1 0.1 0.2 0.1 0.2 0.2 0.1 0.2")
    (masks,) = load(root, format="yolo_obb", name="rtmdet_ins_test")
    assert [len(outline_points(outline)) for outline in masks.outlines] == [3, 4]
    assert masks.boxes_of("mask")[0] == pytest.approx([10, 7.5, 20, 15, 0])
    (boxes,) = load(root, format="yolo_obb", name="rtmdet_test")
    assert boxes.outlines == () and boxes.boxes_of("horizontal")[0] == pytest.approx([10, 7.5, 20, 15, 0])


def test_all_formats_tell_the_same_box(tmp_path):
    """One ship, 20 x 8 px about (20, 14), turned by 0.5 rad, in five formats."""
    cos, sin = math.cos(0.5), math.sin(0.5)
    corners = [(20 + x * cos - y * sin, 14 + x * sin + y * cos) for x, y in ((10, 4), (10, -4), (-10, -4), (-10, 4))]
    flat = [value for corner in corners for value in corner]
    dota = dota_folder(tmp_path / "dota", a=" ".join(map(repr, flat)) + " ship 0")
    rbox = dota_folder(tmp_path / "rbox", a="20 14 20 8 0.5")
    shares = [value / (40, 30)[index % 2] for index, value in enumerate(flat)]
    yolo = dota_folder(tmp_path / "yolo", a="0 " + " ".join(map(repr, shares)))
    entry = "<HRSC_Object><Class_ID>100000001</Class_ID><mbox_cx>20</mbox_cx><mbox_cy>14</mbox_cy><mbox_w>20</mbox_w>"
    entry += "<mbox_h>8</mbox_h><mbox_ang>0.5</mbox_ang></HRSC_Object>"
    hrsc = dota_folder(tmp_path / "hrsc", a="")
    write_text(hrsc / "labels" / "a.xml", f"<HRSC_Image><HRSC_Objects>{entry}</HRSC_Objects></HRSC_Image>")
    coco = coco_folder(tmp_path / "coco", [coco_box(1, 1, [0, 0, 1, 1], segmentation=[flat])], images=1)
    for name, root, labels in (
        ("dota", dota, "labels"),
        ("rbox", rbox, "labels"),
        ("yolo_obb", yolo, "labels"),
        ("hrsc", hrsc, "labels"),
        ("coco", coco, "all.json"),
    ):
        (image,) = load(root, format=name, train_labels=labels, unknown_classes="drop")
        assert image.boxes == pytest.approx(np.array([[20, 14, 20, 8, 0.5]]), abs=1e-9), name


def test_real_data(data_dir):
    hrsc = load(data_dir / "hrsc2016_train", format="rbox")
    assert len(hrsc) == 768 and sum(len(image.boxes) for image in hrsc) == 2014
    assert hrsc[0].pixels.shape == (3, hrsc[0].height, hrsc[0].width)
    recipe = recipe_of(data_dir / "ssdd_tiny", train_labels="train", val_images="images", val_labels="val")
    training, left_out = load_datasets(recipe)
    assert (len(training), len(left_out)) == (55, 42)
    assert not {image.name for image in training} & {image.name for image in left_out}
    coco8 = load(
        data_dir / "coco8_seg", format="yolo_obb", name="rtmdet_ins_test", train_images="images/train",
        train_labels="labels/train", classes=[f"class {index}" for index in range(80)],
    )  # fmt: skip
    assert sum(len(image.boxes) for image in coco8) == 13
    assert all(len(image.outlines) == len(image.boxes) and all(image.outlines) for image in coco8)
