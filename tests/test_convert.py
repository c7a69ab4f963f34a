"""data convert: every format to every other and back, what targets cannot hold, bad input, whole outputs, real data."""

from __future__ import annotations

import itertools
import json
import logging
import math
import shutil
from pathlib import Path

import geopandas
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from label_folders import coco_box, coco_folder, dota_folder, write_image, write_text
from rasters import make_raster

from rtmdet_geo.annotations.angles import AngleConvention
from rtmdet_geo.annotations.coco import decode_mask, encode_mask, read_coco
from rtmdet_geo.annotations.convert import convert_labels
from rtmdet_geo.annotations.dota import read_dota
from rtmdet_geo.annotations.hrsc import read_hrsc
from rtmdet_geo.annotations.label_sets import FORMATS, LabelSet, ReadOptions, find_classes, read_label_set
from rtmdet_geo.annotations.labels import box_corners, object_corners
from rtmdet_geo.annotations.outlines import fill_outline, pixel_window
from rtmdet_geo.annotations.rbox import read_rbox
from rtmdet_geo.boxes import boxes_to_polygons
from rtmdet_geo.cli import cli, data_convert
from rtmdet_geo.errors import (
    AnnotationError,
    ConfigError,
    DatasetNotFoundError,
    OutputError,
    RTMDetGeoError,
)

#: Names that HRSC2016 has, too; the last has a space.
NAMES = ("Nimitz", "yacht", "Blue Ridge")
#: Names that are one word.
WORDS = NAMES[:2]
#: Formats that hold rotated boxes, and those that hold any four corners.
ROTATED = ("dota", "yolo_obb", "coco", "hrsc", "rbox", "rolabelimg", "gis")
CORNERS = ("dota", "yolo_obb", "coco", "gis")

rectangles = st.lists(
    st.tuples(
        st.tuples(st.floats(5, 55), st.floats(5, 35), st.floats(3, 30), st.floats(0.5, 2.9), st.floats(-1.57, 1.57)),
        st.sampled_from(WORDS),
        st.booleans(),
    ),
    min_size=1,
    max_size=4,
)
pixels = st.tuples(st.floats(1, 59), st.floats(1, 39))


@st.composite
def quadrilaterals(draw):
    """Convex ones with an area, from any corner, in either sense: a corner on each side of a box."""
    x, y, w, h = (draw(st.floats(*span)) for span in ((2, 30), (2, 20), (3, 25), (3, 15)))
    a, b, c, d = (draw(st.floats(0.1, 0.9)) for _ in range(4))
    corners = np.array([[x + a * w, y], [x + w, y + b * h], [x + c * w, y + h], [x, y + d * h]])
    return np.roll(corners, draw(st.integers(0, 3)), axis=0)[:: draw(st.sampled_from([-1, 1]))].tolist()


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """A folder with one georeferenced image of 60 x 40 px and 16 bits."""
    folder = tmp_path_factory.mktemp("images")
    make_raster(folder / "port.tif", dtype="uint16")
    return folder


def at(folder: Path, label_format: str, name: str = "") -> Path:
    """Where labels of a format go."""
    return folder / (name + label_format + {"coco": ".json", "gis": ".gpkg"}.get(label_format, ""))


def dota_text(objects) -> str:
    """Lines of (corners, name, is_difficult)."""
    return "".join(
        " ".join(map(repr, np.ravel(corners).tolist())) + f" {name} {int(hard)}\n" for corners, name, hard in objects
    )


def convert(source, target, from_format, to_format, **more):
    return convert_labels(source, target, from_format=from_format, to_format=to_format, hrsc_level=3, **more)


def read(path, label_format, images, **more) -> LabelSet:
    return read_label_set(path, label_format, images, ReadOptions(hrsc_level=3, **more))


def gaps(first, second):
    """Largest distance between corners of two objects (4, 2), whatever their order."""
    return np.hypot(*(np.asarray(first)[:, None] - second).transpose(2, 0, 1)).min(axis=1).max()


# ---------------------------------------------------------------- every pair, both ways


@pytest.mark.parametrize(("first", "second"), list(itertools.combinations(ROTATED, 2)))
@settings(deadline=None, max_examples=2, suppress_health_check=[HealthCheck.too_slow])
@given(objects=rectangles)
def test_rotated_boxes_survive_every_pair(tmp_path_factory, images, first, second, objects):
    """To 1e-6 px: four corners to a rectangle and back; marks survive but for yolo_obb, which has none."""
    folder = tmp_path_factory.mktemp("pair")
    corners = [boxes_to_polygons([box])[0] for box, _, _ in objects]
    source = write_text(
        folder / "start" / "port.txt", dota_text((c, n, d) for c, (_, n, d) in zip(corners, objects, strict=True))
    )
    convert(source.parent, at(folder, first), "dota", first, images=images, classes=WORDS)
    convert(at(folder, first), at(folder, second, "b-"), first, second, images=images, classes=WORDS)
    convert(at(folder, second, "b-"), at(folder, first, "c-"), second, first, images=images, classes=WORDS)
    (image,) = read(at(folder, first, "c-"), first, images).images
    assert image.name == "port.tif" and image.size == (60, 40)
    assert image.labels.class_names == tuple(name for _, name, _ in objects)
    hard = [False] * len(objects) if "yolo_obb" in (first, second) else [is_hard for _, _, is_hard in objects]
    assert image.labels.difficult.tolist() == hard
    found = box_corners(image.labels.boxes)
    assert max(gaps(a, b) for a, b in zip(found, corners, strict=True)) < 1e-6


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(CORNERS, 2)))
@settings(deadline=None, max_examples=2, suppress_health_check=[HealthCheck.too_slow])
@given(quads=st.lists(quadrilaterals(), min_size=1, max_size=3))
def test_four_corners_survive_with_their_order(tmp_path_factory, images, first, second, quads):
    """Exactly where the format has px; to 1e-9 px through shares and through the ground."""
    folder = tmp_path_factory.mktemp("pair")
    source = write_text(folder / "start" / "port.txt", dota_text((quad, "yacht", False) for quad in quads))
    convert(source.parent, at(folder, first), "dota", first, images=images, classes=WORDS)
    convert(at(folder, first), at(folder, second, "b-"), first, second, images=images, classes=WORDS)
    summary = convert(at(folder, second, "b-"), folder / "end", second, "dota", images=images, classes=WORDS)
    assert summary["changes"] == {} and summary["num_objects"] == len(quads)
    found = object_corners(read_dota(folder / "end" / "port.txt", with_outlines=True))
    if {first, second} == {"dota", "coco"}:
        assert found.tolist() == quads
    np.testing.assert_allclose(found, quads, rtol=0, atol=1e-8 if "gis" in (first, second) else 1e-12 * 60)


@pytest.mark.parametrize("other", ROTATED)
@settings(deadline=None, max_examples=2, suppress_health_check=[HealthCheck.too_slow])
@given(boxes=st.lists(st.tuples(pixels, st.floats(0.5, 9), st.floats(0.5, 9)), min_size=1, max_size=3))
def test_upright_boxes_survive_voc_and_every_other(tmp_path_factory, images, other, boxes):
    folder = tmp_path_factory.mktemp("pair")
    hboxes = [(x, y, x + w, y + h) for (x, y), w, h in boxes]
    entries = "".join(
        f"<object><name>yacht</name><bndbox><xmin>{a!r}</xmin><ymin>{b!r}</ymin><xmax>{c!r}</xmax><ymax>{d!r}</ymax>"
        "</bndbox></object>"
        for a, b, c, d in hboxes
    )
    source = write_text(folder / "voc" / "port.xml", f"<annotation>{entries}</annotation>")
    convert(source.parent, at(folder, other), "voc", other, images=images, classes=WORDS)
    convert(at(folder, other), folder / "end", other, "voc", images=images, classes=WORDS)
    (image,) = read(folder / "end", "voc", images).images
    corners = box_corners(image.labels.boxes)
    found = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)
    np.testing.assert_allclose(found, hboxes, rtol=0, atol=1e-8)


@pytest.mark.parametrize("suffix", [".gpkg", ".geojson"])
def test_layers_in_another_crs(tmp_path, images, suffix):
    """GeoJSON rounds to 1e-8 degrees, a ten-thousandth of these px of 10 m, and turns corners counter-clockwise."""
    quad = [[10, 10], [30, 12], [29, 20], [9, 18]]
    source = write_text(tmp_path / "a" / "port.txt", dota_text([(quad, "yacht", True)]))
    layer = tmp_path / f"b{suffix}"
    more = {"dst_crs": "EPSG:3857"} if suffix == ".gpkg" else {}
    convert(source.parent, layer, "dota", "gis", images=images, **more)
    frame = geopandas.read_file(layer)
    assert frame.crs == (3857 if suffix == ".gpkg" else 4326)
    row = frame.drop(columns="geometry").iloc[0].to_dict()
    assert row == {
        "id": 1, "class_id": 0, "class_name": "yacht", "scene_id": "port", "difficult": True, "crowd": False,
    }  # fmt: skip
    convert(layer, tmp_path / "c", "gis", "dota", images=images, corner_order="top-left")
    found = read_dota(tmp_path / "c" / "port.txt", with_outlines=True)
    assert found.difficult.tolist() == [True]
    np.testing.assert_allclose(object_corners(found)[0], quad, atol=1e-3 if suffix == ".geojson" else 1e-6)


# ---------------------------------------------------------------- by hand


def test_by_hand_to_every_format(tmp_path):
    """An image of 40 x 30 px with a box along x, and a square on its corner that is difficult."""
    root = dota_folder(tmp_path, a="10 10 30 10 30 20 10 20 ship 0\n20 5 25 10 20 15 15 10 Car-park 1\n", b="")
    source, images = root / "labels", root / "images"
    convert(source, tmp_path / "all.json", "dota", "coco", images=images, classes=("Car-park", "ship", "whale"))
    content = json.loads((tmp_path / "all.json").read_text())
    assert content["images"] == [
        {"id": 1, "file_name": "a.png", "width": 40, "height": 30},
        {"id": 2, "file_name": "b.png", "width": 40, "height": 30},
    ]
    assert [entry["name"] for entry in content["categories"]] == ["Car-park", "ship", "whale"]
    first, second = content["annotations"]
    assert first == {
        "id": 1, "image_id": 1, "category_id": 2, "bbox": [10, 10, 20, 10], "area": 200, "iscrowd": 0,
        "segmentation": [[10, 10, 30, 10, 30, 20, 10, 20]],
    }  # fmt: skip
    assert second["area"] == 50 and second["difficult"] == 1 and second["bbox"] == [15, 5, 10, 10]

    convert(source, tmp_path / "yolo", "dota", "yolo_obb", images=images)
    assert (tmp_path / "yolo" / "classes.txt").read_text() == "Car-park\nship\n"
    assert (tmp_path / "yolo" / "b.txt").read_text() == ""
    lines = (tmp_path / "yolo" / "a.txt").read_text().splitlines()
    assert [float(word) for word in lines[0].split()] == pytest.approx(
        [1, 0.25, 1 / 3, 0.75, 1 / 3, 0.75, 2 / 3, 0.25, 2 / 3]
    )
    convert(source, tmp_path / "boxes", "dota", "yolo_obb", images=images, kind="horizontal")
    lines = (tmp_path / "boxes" / "a.txt").read_text().splitlines()
    assert lines[1] == f"0 0.5 {1 / 3!r} 0.25 {1 / 3!r}"

    convert(source, tmp_path / "rbox", "dota", "rbox", to_angle=AngleConvention("oc", "deg"))
    first, second = (line.split() for line in (tmp_path / "rbox" / "a.txt").read_text().splitlines())
    assert first == ["20", "15", "10", "20", "-90", "ship", "0"]
    assert [float(word) for word in second[:5]] == pytest.approx([20, 10, 50**0.5, 50**0.5, -45]) and second[6] == "1"

    convert(source, tmp_path / "voc", "dota", "voc", images=images)
    text = "".join((tmp_path / "voc" / "a.xml").read_text().split())
    assert "<width>40</width><height>30</height>" in text and "<filename>a.png</filename>" in text
    assert "<bndbox><xmin>15</xmin><ymin>5</ymin><xmax>25</xmax><ymax>15</ymax></bndbox>" in text

    ships = write_text(tmp_path / "ships" / "a.txt", "50 40 20 10 30 ship\n50 40 20 10 30 warcraft 1")
    convert(ships, tmp_path / "a.xml", "rbox", "hrsc", from_angle=AngleConvention(unit="deg", sense="ccw"))
    found = read_hrsc(tmp_path / "a.xml", 3)
    assert found.class_names == ("ship", "warcraft") and found.difficult.tolist() == [False, True]
    assert found.boxes[0] == pytest.approx([50, 40, 20, 10, -math.pi / 6])
    assert "<Class_ID>100000003</Class_ID>" in (tmp_path / "a.xml").read_text()


def test_corner_orders(tmp_path):
    source = write_text(tmp_path / "a.txt", "10 20 30 20 30 10 10 10 ship 0")  # from the lower left, counter-clockwise
    expected = {
        "any": "10 20 30 20 30 10 10 10 ship 0",
        "head": "10 20 10 10 30 10 30 20 ship 0",
        "top-left": "10 10 30 10 30 20 10 20 ship 0",
    }
    for order, line in expected.items():
        convert(source, tmp_path / f"{order}.txt", "dota", "dota", corner_order=order)
        assert (tmp_path / f"{order}.txt").read_text() == line + "\n"


def test_masks_stay_masks(tmp_path, images):
    """Run lengths to the ground and back are the same pixels; polygons the same numbers."""
    mask = np.zeros((40, 60), bool)
    mask[5:20, 10:30], mask[8:12, 15:20], mask[30:33, 3:9] = True, False, True  # a hole, and a second piece
    triangle = [1.25, 2.5, 30.125, 4.0, 7.0, 21.75]
    annotations = [
        {"id": 5, "image_id": 1, "category_id": 7, "segmentation": encode_mask(mask), "iscrowd": 1},
        coco_box(6, 1, [1.25, 2.5, 28.875, 19.25], segmentation=[triangle], area=270.5),
    ]
    content = {
        "images": [{"id": 1, "file_name": "port.tif", "width": 60, "height": 40}],
        "categories": [{"id": 7, "name": "a ship"}],
        "annotations": annotations,
    }
    source = write_text(tmp_path / "a.json", json.dumps(content))
    convert(source, tmp_path / "b.gpkg", "coco", "gis", images=images)
    assert set(geopandas.read_file(tmp_path / "b.gpkg").geom_type) == {"MultiPolygon"}
    summary = convert(tmp_path / "b.gpkg", tmp_path / "c.json", "gis", "coco", images=images)
    assert summary["num_crowd"] == 1 and summary["changes"] == {}
    first, second = read_coco(tmp_path / "c.json").objects[1]
    assert first.is_crowd and first.class_name == "a ship" and (decode_mask(first.segmentation) == mask).all()
    assert np.allclose(np.sort(np.ravel(second.segmentation)), sorted(triangle), atol=1e-8)
    convert(source, tmp_path / "d.json", "coco", "coco")
    copied = json.loads((tmp_path / "d.json").read_text())["annotations"]
    assert copied[1]["segmentation"] == [triangle] and copied[1]["area"] == 270.5
    assert copied[0]["segmentation"] == annotations[0]["segmentation"] and copied[0]["iscrowd"] == 1


# ---------------------------------------------------------------- what a target cannot hold


def test_what_is_lost_is_counted_and_said_once(tmp_path, caplog):
    square = [5, 5, 15, 5, 15, 15, 5, 15]
    annotations = [
        coco_box(1, 1, [5, 5, 10, 10], segmentation=[square], iscrowd=1),
        coco_box(2, 1, [5, 5, 10, 10], segmentation=[square], difficult=1),
        coco_box(3, 2, [5, 5, 10, 10], segmentation=[[5, 5, 15, 5, 10, 15]]),
        coco_box(4, 2, [5, 5, 10, 10], segmentation=[[5, 5, 15, 6, 14, 15, 5, 15]], category=3),
    ]
    root = coco_folder(tmp_path, annotations)
    source, images = root / "all.json", root / "images"
    with caplog.at_level(logging.WARNING, logger="rtmdet_geo"):
        yolo = convert(source, tmp_path / "yolo", "coco", "yolo_obb", images=images)
    assert yolo["changes"] == {
        "crowd regions were left out": 1,
        "marks of difficult objects were left out": 1,
        "outlines became rectangles of least area": 1,
    }
    assert yolo["num_by_class"] == {"buoy": 1, "ship": 2} and yolo["num_difficult"] == 0
    assert sum("crowd regions were left out" in line for line in caplog.text.splitlines()) == 1
    dota = convert(source, tmp_path / "dota", "coco", "dota")
    assert dota["changes"] == {
        "crowd regions became difficult objects": 1,
        "outlines became rectangles of least area": 1,
    }
    assert dota["num_difficult"] == 2 and dota["num_images"] == 2
    rbox = convert(source, tmp_path / "rbox", "coco", "rbox")
    assert rbox["changes"]["quadrilaterals became rectangles of least area"] == 1
    masks = convert(source, tmp_path / "masks", "coco", "yolo_obb", images=images, kind="mask")
    assert "outlines became rectangles of least area" not in masks["changes"]
    assert len((tmp_path / "masks" / "2.txt").read_text().splitlines()[0].split()) == 7


@pytest.mark.parametrize("source_format", ["dota", "coco", "hrsc", "rbox", "rolabelimg", "gis"])
def test_boxes_that_enclose_others_are_counted(tmp_path, images, source_format):
    lines = "10 10 20 10 20 15 10 15 yacht 0\n10 10 20 12 19 17 9 15 yacht 0\n40 30 30 20 50 20 45 25 yacht 0\n"
    write_text(tmp_path / "dota/port.txt", lines)
    target = tmp_path / ("a" + {"coco": ".json", "gis": ".gpkg"}.get(source_format, ""))
    convert(tmp_path / "dota", target, "dota", source_format, images=images)
    upright = convert(target, tmp_path / "same", source_format, "dota", images=images)
    assert not any("enclosing" in text for text in upright["changes"])
    boxes = convert(target, tmp_path / "voc", source_format, "voc", images=images)
    assert boxes["changes"]["rotated boxes became enclosing boxes"] == 2 and boxes["num_objects"] == 3
    again = convert(tmp_path / "voc", tmp_path / "again", "voc", "voc")
    assert again["changes"] == {}


def test_masks_that_become_boxes_are_counted(tmp_path):
    ring = [5, 5, 15, 5, 20, 12, 15, 20, 5, 15]
    root = coco_folder(tmp_path, [coco_box(1, 1, [5, 5, 15, 15], segmentation=[ring]), coco_box(2, 2, [1, 2, 3, 4])])
    summary = convert(root / "all.json", tmp_path / "voc", "coco", "voc")
    assert summary["changes"] == {"outlines became enclosing boxes": 1}


def test_layers_of_a_file_images_without_crs_and_classes_without_column(tmp_path, images, caplog):
    write_text(tmp_path / "dota/port.txt", "10 10 20 10 20 15 10 15 ship 0\n")
    convert(tmp_path / "dota", tmp_path / "a.gpkg", "dota", "gis", images=images)
    folder = tmp_path / "mixed"
    shutil.copytree(images, folder)
    write_image(folder / "preview.png", 1)
    table = geopandas.read_file(tmp_path / "a.gpkg").drop(columns="class_name")
    table.to_file(tmp_path / "a.gpkg", layer="bare")
    with pytest.raises(AnnotationError, match=r"a\.gpkg' holds the layers labels, bare; name one of them with --layer"):
        convert(tmp_path / "a.gpkg", tmp_path / "b", "gis", "dota", images=folder)
    with pytest.raises(AnnotationError, match="has no layer 'ships'; it holds labels, bare"):
        convert(tmp_path / "a.gpkg", tmp_path / "b", "gis", "dota", images=folder, layer="ships")
    with caplog.at_level(logging.WARNING):
        summary = convert(tmp_path / "a.gpkg", tmp_path / "b", "gis", "dota", images=folder, layer="bare")
    assert summary["num_by_class"] == {"object": 1} and summary["num_images"] == 1
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == [
        "no column 'class_name', so every object is of class 'object' (--class-column names another column)",
        "1 of 2 images have no CRS and are left out, such as preview.png",
    ]
    (folder / "port.tif").unlink()
    with pytest.raises(AnnotationError, match=r"none of the 1 images in .*mixed' has a CRS"):
        convert(tmp_path / "a.gpkg", tmp_path / "c", "gis", "dota", images=folder, layer="bare")


def test_rings_that_a_format_cannot_hold(tmp_path, images):
    ground = geopandas.GeoSeries.from_wkt(
        ["POLYGON ((1 1, 21 1, 21 21, 1 21, 1 1), (5.5 5.5, 9.5 5.5, 9.5 9.5, 5.5 9.5, 5.5 5.5))"], crs="EPSG:32630"
    ).affine_transform([10, 0, 0, -10, 500_000, 4_000_400])  # px to the ground
    ground.to_frame("geometry").to_file(tmp_path / "a.gpkg")
    coco = convert(tmp_path / "a.gpkg", tmp_path / "a.json", "gis", "coco", images=images)
    assert coco["changes"] == {"outlines with holes were cut into pixels": 1} and coco["num_by_class"] == {"object": 1}
    (entry,) = read_coco(tmp_path / "a.json").objects[1]
    assert decode_mask(entry.segmentation).sum() == 400 - 16
    yolo = convert(tmp_path / "a.gpkg", tmp_path / "yolo", "gis", "yolo_obb", images=images, kind="mask")
    assert yolo["changes"] == {"outlines in several rings became their convex hulls": 1}
    assert len((tmp_path / "yolo" / "port.txt").read_text().split()) == 9


def test_names_of_classes(tmp_path):
    root = coco_folder(tmp_path, [coco_box(1, 1, [5, 5, 10, 10]), coco_box(2, 2, [5, 5, 10, 10], category=3)])
    source = root / "all.json"
    text = source.read_text().replace('"ship"', '"cargo ship"')
    source.write_text(text)
    with pytest.raises(
        ConfigError, match=r"1 objects have classes that the list of classes lacks: 'buoy' \(1\).*annotation 2"
    ):
        convert(source, tmp_path / "a", "coco", "yolo_obb", classes=("cargo ship",))
    summary = convert(source, tmp_path / "a", "coco", "dota")
    assert summary["num_by_class"] == {"buoy": 1, "cargo-ship": 1}
    assert summary["changes"] == {"objects got hyphens for the spaces in their class's name": 1}
    listed = convert(source, tmp_path / "listed", "coco", "rbox", classes=("cargo ship", "buoy"))
    assert listed["num_by_class"] == {"cargo-ship": 1, "buoy": 1}
    source.write_text(text.replace('"buoy"', '"cargo-ship"'))
    with pytest.raises(ConfigError, match="fall together"):
        convert(source, tmp_path / "b", "coco", "dota")
    with pytest.raises(ConfigError, match=r"HRSC2016 does not have: .*'cargo-ship' \(1\)"):
        convert(source, tmp_path / "c", "coco", "hrsc")
    assert not (tmp_path / "b").exists() and not (tmp_path / "c").exists()
    assert find_classes("dota_v1.0")[0] == "plane" and find_classes("a, b c") == ("a", "b c")
    assert find_classes(str(write_text(tmp_path / "names.txt", "x\n\ny z\n"))) == ("x", "y z")
    for text in ("a,,b", "a,a"):
        with pytest.raises(AnnotationError, match="no different names"):
            find_classes(text)


def test_yolo_takes_its_names_from_the_list_beside_it(tmp_path):
    for name in "ab":
        write_image(tmp_path / "images" / f"{name}.png", ord(name))
    write_text(tmp_path / "labels" / "a.txt", "1 0.5 0.5 0.5 0.2\n")
    arguments = (tmp_path / "labels", tmp_path / "dota", "yolo_obb", "dota")
    with pytest.raises(ConfigError, match=r"name them with --classes, or in .*classes\.txt"):
        convert(*arguments, images=tmp_path / "images")
    with pytest.raises(AnnotationError, match=r"a\.txt:1: class 1 has no name"):
        convert(*arguments, images=tmp_path / "images", classes=("pier",))
    write_text(tmp_path / "labels" / "classes.txt", "pier\nship\n")
    convert(*arguments, images=tmp_path / "images")
    assert (tmp_path / "dota" / "a.txt").read_text() == "10 12 30 12 30 18 10 18 ship 0\n"
    assert (tmp_path / "dota" / "b.txt").read_text() == ""  # an image without a file is background
    convert(
        *arguments[:1], tmp_path / "yolo", "yolo_obb", "yolo_obb", images=tmp_path / "images", classes=("ship", "pier")
    )
    assert (tmp_path / "yolo" / "a.txt").read_text().startswith("0 ")


# ---------------------------------------------------------------- bad input, whole outputs


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("to_format", FORMATS)
def test_nothing_is_left_after_bad_input(tmp_path, images, to_format):
    write_text(tmp_path / "labels" / "port.txt", "10 10 30 10 30 20 10 20 Nimitz 0\n1 2 3 nan 5 6 7 8 Nimitz 0\n")
    target = at(tmp_path, to_format)
    before = everything(tmp_path)
    with pytest.raises(AnnotationError, match=r"port\.txt:2: '.*' is not finite"):
        convert(tmp_path / "labels", target, "dota", to_format, images=images)
    assert everything(tmp_path) == before


@pytest.mark.parametrize("to_format", FORMATS)
def test_existing_outputs(tmp_path, images, to_format):
    write_text(tmp_path / "labels" / "port.txt", "10 10 30 10 30 20 10 20 Nimitz 0\n")
    target = at(tmp_path, to_format)
    run = lambda **more: convert(tmp_path / "labels", target, "dota", to_format, images=images, **more)  # noqa: E731
    run()
    before = everything(tmp_path)
    with pytest.raises(OutputError, match="exists; add --overwrite"):
        run()
    assert everything(tmp_path) == before
    run(overwrite=True)
    assert set(everything(tmp_path)) == set(before)
    if target.is_dir():
        write_text(target / "photo.png", "mine")
        with pytest.raises(OutputError, match=r"holds other files than labels \(photo\.png\)"):
            run(overwrite=True)
        assert (target / "photo.png").read_text() == "mine"


def test_a_failure_while_writing_leaves_the_old_output(tmp_path, images, monkeypatch):
    write_text(tmp_path / "labels" / "port.txt", "10 10 30 10 30 20 10 20 Nimitz 0\n")
    convert(tmp_path / "labels", tmp_path / "out", "dota", "yolo_obb", images=images)
    before = everything(tmp_path)

    def full(*_):
        raise OutputError("no space left")

    monkeypatch.setattr("rtmdet_geo.annotations.convert.write_lines", full)
    with pytest.raises(OutputError, match="no space"):
        convert(tmp_path / "labels", tmp_path / "out", "dota", "yolo_obb", images=images, overwrite=True)
    assert everything(tmp_path) == before and not list(tmp_path.glob(".*"))


def bad(name: str, root: Path, images: Path) -> dict:
    """Arguments of a conversion that cannot be done."""
    labels, source = root / "labels", root / "labels" / "port.txt"
    dota = {"from_format": "dota", "to_format": "dota", "source": labels, "target": root / "out"}
    bare = make_raster(root / "bare" / "port.tif", crs=None) if name == "no crs" else None
    return (
        dota
        | {
            "gone": {"source": root / "gone"},
            "empty": {"source": images},
            "no images folder": {"images": root / "gone"},
            "no image": {"images": write_image(root / "other" / "x.png", 1).parent},
            "sizes": {"to_format": "coco", "target": root / "a.json"},
            "yolo without images": {"from_format": "yolo_obb"},
            "gis without images": {"to_format": "gis", "target": root / "a.gpkg"},
            "layer without images": {"from_format": "gis", "source": source},
            "no layer": {"from_format": "gis", "source": source, "images": images},
            "no crs": {"to_format": "gis", "target": root / "a.gpkg", "images": bare and bare.parent},
            "kind": {"kind": "mask"},
            "ending": {"to_format": "coco", "images": images},
            "itself": {"target": labels},
            "classes": {"classes": ("a", "a")},
            "two in one": {"target": root / "b.txt"},
            "twice": {"images": write_image(root / "same" / "port.bmp", 1).parent},
        }[name]
    )


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("gone", DatasetNotFoundError, "gone' are missing"),
        ("empty", DatasetNotFoundError, r"no label files \(\*\.txt\)"),
        ("no images folder", DatasetNotFoundError, "folder of images .*gone' is missing"),
        ("no image", AnnotationError, r"labels/port\.txt: .*other' has no image of that name"),
        ("sizes", ConfigError, "coco wants the sizes of images.*--images"),
        ("yolo without images", ConfigError, "yolo_obb counts in shares.*--images"),
        ("gis without images", ConfigError, "georeferenced images with --images"),
        ("layer without images", ConfigError, "georeferenced images with --images"),
        ("no layer", AnnotationError, r"label layer .*port\.txt' cannot be read"),
        ("no crs", AnnotationError, r"bare/port\.tif' has no CRS"),
        ("kind", ConfigError, "dota cannot hold kind 'mask'; it can hold rotated, horizontal"),
        ("ending", OutputError, r"out' should end in \.json"),
        ("itself", OutputError, "is the source itself"),
        ("classes", ConfigError, "must be different names"),
        ("two in one", OutputError, r"2 images do not go into one file"),
        ("twice", AnnotationError, r"'port\.bmp' and 'port\.png'.*share their labels"),
    ],
)
def test_what_cannot_be_done_is_said(tmp_path, images, name, error, message):
    write_text(tmp_path / "labels" / "port.txt", "10 10 30 10 30 20 10 20 Nimitz 0\n")
    if name == "two in one":
        write_text(tmp_path / "labels" / "b.txt", "")
    if name == "twice":
        write_image(tmp_path / "same" / "port.png", 2)
    if name == "no crs":
        (tmp_path / "bare").mkdir()
    arguments = bad(name, tmp_path, images)
    before = everything(tmp_path)
    with pytest.raises(error, match=message) as caught:
        convert_labels(arguments.pop("source"), arguments.pop("target"), **arguments)
    assert isinstance(caught.value, RTMDetGeoError) and "\n" not in str(caught.value)
    assert everything(tmp_path) == before


def test_windows_lines_and_sizes_that_differ(tmp_path):
    root = coco_folder(tmp_path, [coco_box(1, 1, [5, 5, 10, 10])])
    write_image(root / "images" / "1.png", 9, (41, 30))
    with pytest.raises(AnnotationError, match=r"all\.json says 40 x 30 px, the image is 41 x 30 px"):
        convert(root / "all.json", tmp_path / "a", "coco", "dota", images=root / "images")
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "a.txt").write_bytes(b"gsd:1\r\n1 1 9 1 9 5 1 5 ship 0\r\n")
    convert(tmp_path / "w", tmp_path / "b", "dota", "dota")
    assert (tmp_path / "b" / "a.txt").read_bytes() == b"gsd:1\n1 1 9 1 9 5 1 5 ship 0\n"
    summary = convert(tmp_path / "w", tmp_path / "c", "dota", "rbox")
    assert summary["changes"] == {"files lost their header lines (imagesource, gsd)": 1}


def test_layers_that_lie_elsewhere_or_have_no_crs(tmp_path, images):
    shape = geopandas.GeoSeries.from_wkt(["POLYGON ((0 0, 1 0, 1 1, 0 0))"])
    shape.to_frame("geometry").set_crs(4326).to_file(tmp_path / "far.gpkg")
    with pytest.raises(AnnotationError, match=r"none of the 1 objects of .*far\.gpkg"):
        convert(tmp_path / "far.gpkg", tmp_path / "a", "gis", "dota", images=images)
    with pytest.warns(UserWarning, match="crs"):
        shape.to_frame("geometry").to_file(tmp_path / "bare.gpkg")
    with pytest.raises(AnnotationError, match=r"bare\.gpkg' has no CRS"):
        convert(tmp_path / "bare.gpkg", tmp_path / "a", "gis", "dota", images=images)
    with pytest.raises(AnnotationError, match="has no column 'kind'"):
        convert(tmp_path / "far.gpkg", tmp_path / "a", "gis", "dota", images=images, class_column="kind")
    assert not (tmp_path / "a").exists()


def test_marks_in_layers_of_other_programs(tmp_path, images):
    """Words as well as numbers and bools; "0" is not yes only because it is not empty."""
    square = geopandas.GeoSeries.from_wkt(["POLYGON ((1 1, 9 1, 9 5, 1 5, 1 1))"] * 5, crs="EPSG:32630")
    ground = square.affine_transform([10, 0, 0, -10, 500_000, 4_000_400])
    layer = ground.to_frame("geometry").assign(difficult=["0", "1", "2", "False", None], crowd=[0, 1, 0, 0, 0])
    layer.to_file(tmp_path / "a.gpkg")
    (image,) = read(tmp_path / "a.gpkg", "gis", images).images
    assert image.labels.difficult.tolist() == [False, True, True, False, False]
    assert image.labels.crowd.tolist() == [False, True, False, False, False]
    layer.assign(difficult="maybe").to_file(tmp_path / "b.gpkg")
    with pytest.raises(AnnotationError, match=r"b\.gpkg': column 'difficult' says 'maybe'"):
        read(tmp_path / "b.gpkg", "gis", images)


def test_ids_that_are_not_unique(tmp_path):
    root = coco_folder(tmp_path, [coco_box(5, 1, [5, 5, 10, 10]), coco_box(5, 2, [5, 5, 10, 10])])
    with pytest.raises(AnnotationError, match=r"all\.json: 2 annotations have the id 5 \(1 ids are not unique\)"):
        convert(root / "all.json", tmp_path / "a", "coco", "dota")
    content = json.loads((root / "all.json").read_text())
    for part in ("images", "categories"):
        twice = content | {part: [*content[part], content[part][0] | {"file_name": "x", "name": "x"}]}
        path = write_text(tmp_path / f"{part}.json", json.dumps(twice))
        with pytest.raises(
            AnnotationError, match=rf"{part}\.json': 2 of the {part} have the id {content[part][0]['id']}"
        ):
            convert(path, tmp_path / "a", "coco", "dota")
    for number, entry in enumerate(content["annotations"]):
        entry["id"] = 10**12 + number
    write_text(tmp_path / "large.json", "\ufeff" + json.dumps(content))  # with the mark that Windows editors write
    assert convert(tmp_path / "large.json", tmp_path / "a", "coco", "dota")["num_objects"] == 2


def test_names_of_images_with_dots(tmp_path):
    for stem in ("a.b", "c__1"):
        write_text(
            tmp_path / "labels" / f"{stem}.txt", "10 10 30 10 30 20 10 20 ship 0\n40 10 45 10 45 20 40 20 ship 1\n"
        )
        write_image(tmp_path / "images" / f"{stem}.PNG", 1, (61, 39))
    for images, ending in ((None, ""), (tmp_path / "images", "PNG")):
        folder = tmp_path / f"hrsc{ending}"
        convert(tmp_path / "labels", folder, "dota", "hrsc", images=images)
        assert sorted(path.name for path in folder.iterdir()) == ["a.b.xml", "c__1.xml"]
        text = "".join((folder / "a.b.xml").read_text().split())
        assert "<Img_FileName>a.b</Img_FileName>" in text and (f"<Img_FileFmt>{ending}<" in text) == bool(ending)
        assert read_hrsc(folder / "a.b.xml").difficult.tolist() == [False, True]
    convert(tmp_path / "labels", tmp_path / "yolo", "dota", "yolo_obb", images=tmp_path / "images")
    convert(tmp_path / "yolo", tmp_path / "back", "yolo_obb", "dota", images=tmp_path / "images")
    found = object_corners(read_dota(tmp_path / "back" / "a.b.txt", with_outlines=True))  # sides of 61 and 39 px
    np.testing.assert_allclose(found[1], [[40, 10], [45, 10], [45, 20], [40, 20]], rtol=0, atol=1e-12 * 60)


def test_objects_without_area_do_not_reach_a_layer(tmp_path, images):
    text = "1 1 9 1 9 5 1 5 ship 0\n2 2 2 2 2 2 2 2 ship 0\n1 1 9 9 9 1 1 9 ship 0\n"
    write_text(tmp_path / "labels" / "port.txt", text)
    summary = convert(tmp_path / "labels", tmp_path / "a.gpkg", "dota", "gis", images=images)
    assert summary["changes"] == {
        "objects without area were left out": 1,
        "outlines that cross themselves became several polygons": 1,
    }
    assert len(geopandas.read_file(tmp_path / "a.gpkg")) == 2


# ---------------------------------------------------------------- command line


def run(*words):
    return CliRunner().invoke(cli, ["data", "convert", *map(str, words)], prog_name="rtmdet-geo")


def test_command(tmp_path):
    root = dota_folder(tmp_path, a="10 10 30 10 30 20 10 20 ship 0\n20 5 25 10 20 15 15 10 ship 1\n")
    words = (root / "labels", "--from", "dota", "--images", root / "images")
    result = run(*words, "-o", tmp_path / "a.json", "--to", "coco")
    assert result.exit_code == 0 and result.stdout == f"{tmp_path / 'a.json'}: 1 images, 2 objects: 2 ship\n"
    result = run(*words, "-o", tmp_path / "yolo", "--to", "yolo_obb", "--json")
    summary = json.loads(result.stdout)
    assert summary["num_by_class"] == {"ship": 2}
    assert "1 marks of difficult objects were left out" in result.stderr
    result = run(*words, "-o", tmp_path / "a.json", "--to", "coco")
    assert result.exit_code == 1 and result.stdout == "" and "--overwrite" in result.stderr
    result = run(*words, "-o", tmp_path / "rbox", "--to", "rbox", "--to-angle", "le135,deg", "-q")
    assert result.exit_code == 0 and result.output == ""
    assert read_rbox(tmp_path / "rbox" / "a.txt", "", angle=AngleConvention("le135", "deg")).boxes.shape == (2, 5)
    result = run(*words, "-o", tmp_path / "c", "--to", "rbox", "--to-angle", "le80")
    assert result.exit_code == 2 and "'le80' is unknown" in result.stderr
    events = run(*words, "-o", tmp_path / "voc", "--to", "voc", "--progress", "jsonl").stdout.splitlines()
    assert [json.loads(event)["event"] for event in events] == ["start", "progress", "done"]


@pytest.mark.parametrize(
    "words",
    [
        ("--from", "dota", "--to", "coco", "--from-angle", "deg"),
        ("--from", "dota", "--to", "coco", "--to-angle", "deg"),
        ("--from", "dota", "--to", "coco", "--counts-from-one"),
        ("--from", "dota", "--to", "coco", "--class-column", "kind"),
        ("--from", "dota", "--to", "coco", "--dst-crs", "EPSG:4326"),
        ("--from", "dota", "--to", "pascal"),
        ("--from", "dota"),
        ("--from", "dota", "--to", "voc", "--layer", "ships"),
        ("--from", "rbox", "--to", "voc", "--from-angle", "le77,deg"),
        ("--from", "dota", "--to", "voc", "--kind", "mask"),
    ],
)
def test_wrong_command_lines(tmp_path, words):
    assert run(tmp_path, "-o", tmp_path / "out.json", *words).exit_code == 2


def test_an_ending_of_another_format_is_a_wrong_command_line(tmp_path):
    write_text(tmp_path / "labels/a.txt", "1 1 9 1 9 5 1 5 ship 0\n")
    refused = run(tmp_path / "labels", "-o", tmp_path / "y.txt", "--from", "dota", "--to", "coco")
    assert refused.exit_code == 2 and "should end in .json" in refused.stderr


def test_formats_of_the_command_are_those_of_the_library():
    assert data_convert._FORMATS == FORMATS


# ---------------------------------------------------------------- real data


def test_sen2ships_through_four_formats(tmp_path, data_dir):
    """COCO masks -> DOTA -> COCO -> GeoPackage -> DOTA: 248 vessels, none moved by 0.01 px; masks stay masks."""
    folder = data_dir / "sen2ships"
    start = convert(folder / "annotations.json", tmp_path / "dota", "coco", "dota")
    assert start["num_images"] == 10 and start["num_objects"] == 248
    convert(tmp_path / "dota", tmp_path / "coco.json", "dota", "coco", images=folder)
    convert(tmp_path / "coco.json", tmp_path / "ships.gpkg", "coco", "gis", images=folder)
    frame = geopandas.read_file(tmp_path / "ships.gpkg")
    assert len(frame) == 248 and frame.crs == 3857 and set(frame["class_name"]) == {"ship"}
    end = convert(tmp_path / "ships.gpkg", tmp_path / "end", "gis", "dota", images=folder)
    assert end["num_objects"] == 248 and end["num_images"] == 10
    official = read(folder / "annotations.json", "coco", None)
    for image in official.images:
        boxes = box_corners(image.labels.boxes)
        found = object_corners(read_dota(tmp_path / "end" / f"{image.stem}.txt", with_outlines=True))
        assert max(gaps(a, b) for a, b in zip(found, boxes, strict=True)) < 1e-6

    convert(folder / "annotations.json", tmp_path / "masks.gpkg", "coco", "gis", images=folder)
    back = convert(tmp_path / "masks.gpkg", tmp_path / "masks.json", "gis", "coco", images=folder)
    assert back["changes"] == {}
    again = {image.name: image for image in read(tmp_path / "masks.json", "coco", None).images}
    for image in official.images:
        for first, second in zip(image.labels.outlines, again[image.name].labels.outlines, strict=True):
            window = pixel_window(first, *image.size)
            assert (fill_outline(first, window) == fill_outline(second, window)).all()
            assert pixel_window(second, *image.size) == window


def test_dota_to_coco_and_back_is_exact(tmp_path, data_dir):
    folder = data_dir / "dota_full"
    convert(
        folder / "labelTxt",
        tmp_path / "a.json",
        "dota",
        "coco",
        images=folder / "images",
        classes=find_classes("dota_v1.0"),
    )
    convert(tmp_path / "a.json", tmp_path / "labelTxt", "coco", "dota")
    for path in sorted((folder / "labelTxt").iterdir()):
        official, found = (read_dota(p, with_outlines=True) for p in (path, tmp_path / "labelTxt" / path.name))
        assert len(official) > 10 and found.class_names == official.class_names
        assert (object_corners(found) == object_corners(official)).all()
        assert (found.difficult == official.difficult).all()


def test_hrsc_xml_is_the_text_label_of_the_same_ship(tmp_path, data_dir):
    """The XML is of the original image, 1172 px wide, the text of its copy, 800 px; sides and centre are rounded."""
    folder = data_dir / "hrsc_xml_sample"
    convert_labels(folder, tmp_path / "rbox", from_format="hrsc", to_format="rbox", images=folder)
    converted = read_rbox(tmp_path / "rbox" / "100000006.txt", "?")
    text = data_dir / "hrsc2016_train" / "labels" / "100000006.txt"
    official = read_rbox(text, "ship")
    assert converted.class_names == ("ship",) == official.class_names
    np.testing.assert_allclose(converted.boxes[0, :4] * (800 / 1172), official.boxes[0, :4], atol=0.05)
    assert converted.boxes[0, 4] == pytest.approx(official.boxes[0, 4], abs=1e-6)
    convert(text, tmp_path / "a.xml", "rbox", "hrsc", classes=("ship",))
    assert (read_hrsc(tmp_path / "a.xml").boxes == official.boxes).all()
