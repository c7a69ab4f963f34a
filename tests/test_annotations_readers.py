"""Label files of DOTA, HRSC2016, YOLO and rotated boxes: worked by hand, round trips, real files, malformed lines."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from label_folders import write_text

from rtmdet_geo.annotations.dota import read_dota
from rtmdet_geo.annotations.hrsc import HRSC_CLASSES, read_hrsc
from rtmdet_geo.annotations.labels import make_labels
from rtmdet_geo.annotations.rbox import read_rbox
from rtmdet_geo.annotations.yolo import read_yolo
from rtmdet_geo.boxes import boxes_to_polygons, regularize_le90
from rtmdet_geo.class_names import HRSC_LEVEL2, HRSC_LEVEL3
from rtmdet_geo.errors import AnnotationError

boxes_in_an_image = st.lists(
    st.tuples(st.floats(0, 800), st.floats(0, 600), st.floats(20, 300), st.floats(2, 19), st.floats(-1.55, 1.55)),
    max_size=6,
)


def corners_by_box(boxes):
    """Corners of each box, sorted, for comparison whatever the order."""
    return [sorted(map(tuple, corners.round(6).tolist())) for corners in boxes_to_polygons(boxes)]


# ---------------------------------------------------------------- DOTA


def test_dota_by_hand(tmp_path):
    path = write_text(
        tmp_path / "P0003.txt",
        "\ufeffimagesource:GoogleEarth\ngsd:0.115\n\n10 10 30 10 30 20 10 20 ship 0\n"
        "0 0 3 4 -1 7 -4 3 large-vehicle 1\n5 5 6 5 6 6 5 6 plane\n5 5 6 5 6 6 5 6 plane 2\n",
    )
    labels = read_dota(path)
    assert labels.class_names == ("ship", "large-vehicle", "plane", "plane")
    assert labels.boxes[0] == pytest.approx([20, 15, 20, 10, 0])
    # The second is a square of side 5 (3-4-5 triangle) about (-0.5, 3.5), outside the image or not.
    assert labels.boxes[1, :4] == pytest.approx([-0.5, 3.5, 5, 5])
    assert math.tan(2 * labels.boxes[1, 4]) == pytest.approx(math.tan(2 * math.atan2(4, 3)))
    assert labels.difficult.tolist() == [False, True, False, True] and not labels.crowd.any()
    assert labels.numbers.tolist() == [4, 5, 6, 7] and labels.place(1) == f"{path}:5"
    assert labels.outlines == () and labels.boxes.dtype == np.float64


def test_dota_boxes_of_other_models_enclose_the_corners(tmp_path):
    path = write_text(tmp_path / "a.txt", "0 10 10 0 24 10 10 20 ship 0\n0 0 4 0 4 12 0 12 ship 0")
    horizontal = read_dota(path, "horizontal").boxes
    assert horizontal[0] == pytest.approx([12, 10, 24, 20, 0])
    assert horizontal[1] == pytest.approx([2, 6, 12, 4, -math.pi / 2])  # le90: w is the long side
    assert read_dota(path).boxes[0, 2:4].prod() < 24 * 20


@settings(deadline=None, max_examples=40)
@given(boxes=boxes_in_an_image)
def test_dota_round_trip(tmp_path_factory, boxes):
    corners = boxes_to_polygons(boxes).reshape(-1, 8)
    lines = [" ".join(map(repr, row)) + " ship 0" for row in corners.tolist()]
    found = read_dota(write_text(tmp_path_factory.mktemp("dota") / "a.txt", "\n".join(lines)))
    assert found.boxes == pytest.approx(np.array(boxes).reshape(-1, 5), abs=1e-6)


def test_empty_files_have_no_objects(tmp_path):
    path = write_text(tmp_path / "a.txt", "\n \n")
    for labels in (read_dota(path), read_rbox(path, "ship"), read_yolo(path, 10, 10, None)):
        assert len(labels) == 0 and labels.boxes.shape == (0, 5) and labels.class_names == ()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1 2 3 4 5 6 7 8", "8 words"),
        ("1 2 3 4 5 6 7 8 small vehicle 0", "11 words"),
        ("1 2 3 4 5 6 7 x ship 0", "'x' is no number; it should be x1 y1 .* class"),
        ("1 2 3 4 5 6 7 nan ship 0", "not finite"),
        ("1 2 3 4 5 6 7 8 ship maybe", "difficult is 'maybe', not 0, 1 or 2"),
        ("imagesource:late 2 3 4 5 6 7 8 ship 0", "'imagesource:late' is no number"),
        ("1 2 3 4 5 6 7 ship 0", "'ship' is no number; it should be x1 y1 .* class"),
    ],
)
def test_malformed_dota_names_file_and_line(tmp_path, line, message):
    path = write_text(tmp_path / "bad.txt", f"gsd:1\n1 2 3 4 5 6 7 8 ship 0\n\n{line}\n")
    with pytest.raises(AnnotationError, match=r"bad\.txt:4: .*" + message):
        read_dota(path)


def test_files_that_are_gone_or_no_text(tmp_path):
    with pytest.raises(AnnotationError, match=r"gone\.txt.*No such file"):
        read_dota(tmp_path / "gone.txt")
    (tmp_path / "noise.txt").write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(AnnotationError, match=r"noise\.txt.*not text"):
        read_rbox(tmp_path / "noise.txt", "ship")


# ---------------------------------------------------------------- rotated boxes


def test_rbox_by_hand(tmp_path):
    path = write_text(tmp_path / "a.txt", "50 40 20 10 0.3\n50 40 10 20 0.3 buoy\n1 2 3 2 0 ship 1")
    labels = read_rbox(path, "ship")
    assert labels.boxes[0] == pytest.approx([50, 40, 20, 10, 0.3])
    assert labels.boxes[1] == pytest.approx([50, 40, 20, 10, 0.3 + math.pi / 2 - math.pi])
    assert labels.class_names == ("ship", "buoy", "ship") and labels.difficult.tolist() == [False, False, True]
    half = 10 * math.cos(0.3) + 5 * math.sin(0.3)
    assert read_rbox(path, "ship", "horizontal").boxes[0, 2] == pytest.approx(2 * half)


@settings(deadline=None, max_examples=40)
@given(boxes=boxes_in_an_image)
def test_rbox_round_trip_is_exact(tmp_path_factory, boxes):
    lines = [" ".join(map(repr, box)) for box in boxes]
    found = read_rbox(write_text(tmp_path_factory.mktemp("rbox") / "a.txt", "\n".join(lines)), "ship")
    assert np.array_equal(found.boxes, regularize_le90(boxes))


@pytest.mark.parametrize(
    ("line", "message"),
    [("1 2 3 4", "4 words"), ("1 2 3 4 0 ship 0 more", "8 words"), ("1 2 -3 4 0", "-3 x 4 px are negative")],
)
def test_malformed_rboxes(tmp_path, line, message):
    with pytest.raises(AnnotationError, match=r"bad\.txt:1: .*" + message):
        read_rbox(write_text(tmp_path / "bad.txt", line), "ship")


# ---------------------------------------------------------------- YOLO


def test_yolo_by_hand(tmp_path):
    """An image of 200 x 100 px: an oriented box, a box, a triangle."""
    path = write_text(
        tmp_path / "a.txt",
        "1 0.1 0.2 0.3 0.2 0.3 0.3 0.1 0.3\n0 0.5 0.5 0.1 0.4\n2 0 0 0.5 0 0 0.5\n",
    )
    labels = read_yolo(path, 200, 100, ("plane", "ship"))
    assert labels.class_names == ("ship", "plane", "class 2")
    assert labels.boxes[0] == pytest.approx([40, 25, 40, 10, 0])
    assert labels.boxes[1] == pytest.approx([100, 50, 40, 20, -math.pi / 2])
    assert labels.boxes[2] == pytest.approx([50, 25, 100, 50, 0]) and labels.outlines == ()
    masks = read_yolo(path, 200, 100, None, "mask")
    assert masks.class_names == ("class 1", "class 0", "class 2")
    assert masks.outlines[1] == () and masks.outlines[2][0][0].tolist() == [[0, 0], [100, 0], [0, 50]]
    assert masks.outlines[0][0][0].shape == (4, 2)


@settings(deadline=None, max_examples=40)
@given(boxes=boxes_in_an_image)
def test_yolo_round_trip(tmp_path_factory, boxes):
    corners = (boxes_to_polygons(boxes) / [800, 600]).reshape(-1, 8)
    lines = ["3 " + " ".join(map(repr, row)) for row in corners.tolist()]
    path = write_text(tmp_path_factory.mktemp("yolo") / "a.txt", "\n".join(lines))
    assert read_yolo(path, 800, 600, None).boxes == pytest.approx(np.array(boxes).reshape(-1, 5), abs=1e-6)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("ship 0.1 0.2 0.3 0.4", "'ship' is no number; it should be a class index"),
        ("1.5 0.1 0.2 0.3 0.4", "class '1.5' is no index"),
        ("-1 0.1 0.2 0.3 0.4", "class '-1' is no index"),
        ("0 0.1 0.2 0.3", "4 words"),
        ("0 0.1 0.2 0.3 0.4 0.9", "6 words"),
        ("0 100 200 30 40", "200 is no share"),
        ("0 0.1 0.2 -0.3 0.4", "-0.3 x 0.4 are negative"),
        ("0 0.1 0.2 inf 0.4", "not finite"),
    ],
)
def test_malformed_yolo(tmp_path, line, message):
    with pytest.raises(AnnotationError, match=r"bad\.txt:1: .*" + message):
        read_yolo(write_text(tmp_path / "bad.txt", line), 10, 10, None)


# ---------------------------------------------------------------- HRSC2016


def hrsc_xml(*objects, size=(100, 80)):
    width, height = size
    entries = "".join(
        f"<HRSC_Object><Class_ID>{class_id}</Class_ID><difficult>{difficult}</difficult><mbox_cx>{cx}</mbox_cx>"
        f"<mbox_cy>{cy}</mbox_cy><mbox_w>{w}</mbox_w><mbox_h>{h}</mbox_h><mbox_ang>{angle}</mbox_ang></HRSC_Object>"
        for class_id, difficult, cx, cy, w, h, angle in objects
    )
    sizes = f"<Img_SizeWidth>{width}</Img_SizeWidth><Img_SizeHeight>{height}</Img_SizeHeight>"
    return f"<HRSC_Image>{sizes}<HRSC_Objects>{entries}</HRSC_Objects></HRSC_Image>"


def test_hrsc_by_hand(tmp_path):
    path = write_text(
        tmp_path / "a.xml",
        hrsc_xml(
            ("100000013", 0, 50, 40, 20, 10, 0.3), ("100000018", 1, 5, 4, 1, 2, 0), ("100000001", 0, 1, 1, 2, 1, 0)
        ),
    )
    labels = read_hrsc(path)
    assert labels.class_names == ("ship",) * 3 and labels.size == (100, 80)
    assert labels.boxes[0] == pytest.approx([50, 40, 20, 10, 0.3])
    assert labels.boxes[1] == pytest.approx([5, 4, 2, 1, -math.pi / 2])
    assert labels.difficult.tolist() == [False, True, False] and labels.place(1) == f"{path}, object 2"
    assert read_hrsc(path, 2).class_names == ("aircraft carrier", "merchant ship", "ship")
    assert read_hrsc(path, 3).class_names == ("Kuznetsov", "Container", "ship")
    empty = read_hrsc(write_text(tmp_path / "b.xml", hrsc_xml()))
    assert len(empty) == 0


def test_hrsc_classes_are_one_table():
    assert len(HRSC_CLASSES) == 31 and tuple(HRSC_CLASSES[key][2] for key in sorted(HRSC_CLASSES)) == HRSC_LEVEL3
    assert {names[1] for names in HRSC_CLASSES.values()} == set(HRSC_LEVEL2)
    assert HRSC_CLASSES["100000006"] == ("ship", "aircraft carrier", "Enterprise")
    assert HRSC_CLASSES["100000022"] == ("ship", "merchant ship", "Hovercraft")
    assert HRSC_CLASSES["100000027"] == ("ship", "submarine", "submarine")
    assert not {"100000021", "100000023"} & set(HRSC_CLASSES)
    contested = {digits: HRSC_CLASSES[f"1000000{digits}"][1] for digits in ("16", "19", "20", "28", "29", "30")}
    assert contested == {
        "16": "aircraft carrier", "19": "warcraft", "20": "merchant ship", "28": "warcraft", "29": "warcraft",
        "30": "merchant ship",
    }  # fmt: skip


def test_hrsc_classes_not_in_use(tmp_path):
    path = write_text(tmp_path / "a.xml", hrsc_xml(("100000021", 0, 5, 4, 2, 1, 0)))
    assert read_hrsc(path).class_names == ("ship",) and read_hrsc(path, 2).class_names == ("class 100000021",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<HRSC_Image><HRSC_Objects>", "not XML"),
        ("<annotation/>", "not of HRSC2016.*'annotation'"),
        ("<HRSC_Image/>", "needs HRSC_Image with HRSC_Objects"),
        (hrsc_xml(("", 0, 1, 1, 2, 1, 0)), "object 1: it has no Class_ID"),
        (hrsc_xml(("100000001", 0, 1, 1, 2, 1, 0), ("100000001", 0, 1, "", 2, 1, 0)), "object 2: it has no mbox_cy"),
        (hrsc_xml(("100000001", 0, 1, "one", 2, 1, 0)), "object 1: .* is no number"),
        (hrsc_xml(("100000001", 0, 1, 1, -2, 1, 0)), "object 1: sides -2 x 1 px"),
        (hrsc_xml(("100000001", 7, 1, 1, 2, 1, 0)), "object 1: difficult is '7'"),
    ],
)
def test_malformed_hrsc(tmp_path, text, message):
    with pytest.raises(AnnotationError, match=r"bad\.xml.*" + message):
        read_hrsc(write_text(tmp_path / "bad.xml", text), 2)


def test_hrsc_that_is_gone(tmp_path):
    with pytest.raises(AnnotationError, match=r"gone\.xml.*No such file"):
        read_hrsc(tmp_path / "gone.xml")


# ---------------------------------------------------------------- real files


def test_official_xml_and_resized_boxes_agree(data_dir):
    """The copy of the image is 800 px wide, the original 1172: boxes agree to the rounding of sizes."""
    official = read_hrsc(data_dir / "hrsc_xml_sample" / "100000006.xml", 3)
    resized = read_rbox(data_dir / "hrsc2016_train" / "labels" / "100000006.txt", "ship")
    assert official.size == (1172, 816) and official.class_names == ("Kuznetsov",)
    assert official.boxes[0, :4] * (800 / 1172) == pytest.approx(resized.boxes[0, :4], abs=0.05)
    assert official.boxes[0, 4] == pytest.approx(resized.boxes[0, 4])


def test_all_real_files_are_read(data_dir):
    ships = [read_rbox(path, "ship") for path in sorted((data_dir / "hrsc2016_train" / "labels").iterdir())]
    assert len(ships) == 768 and sum(map(len, ships)) == 2014
    vehicles = read_dota(data_dir / "dota_full" / "labelTxt" / "P0003.txt")
    first = [[937, 913], [921, 912], [923, 874], [940, 875]]  # its first line, whose least rectangle holds it
    assert vehicles.numbers[0] == 3 and vehicles.class_names[0] == "small-vehicle"
    assert vehicles.boxes[0, :2] == pytest.approx(np.mean(first, axis=0), abs=1)
    tile = read_yolo(data_dir / "dota8" / "labels" / "train" / "P0861__1024__0___1648.txt", 1024, 1024, None)
    assert tile.boxes[0, :2] == pytest.approx([0.842773 * 1024, 0.51416 * 1024], abs=1) and len(tile) > 50


def test_labels_of_lists():
    labels = make_labels("a", [[1, 2, 4, 3, 0]], ["ship"], [1], crowd=[True], outlines=[()])
    assert labels.crowd.tolist() == [True] and labels.outlines == () and labels.place(0) == "a:1"
