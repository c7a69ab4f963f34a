"""Pascal VOC and roLabelImg files: worked by hand, malformed, written, and as the data check reads them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from label_folders import write_image, write_text

from rtmdet_geo.annotations.parts import PartSource
from rtmdet_geo.annotations.voc import read_voc, write_voc
from rtmdet_geo.boxes import boxes_to_polygons
from rtmdet_geo.dataset_check import check_dataset
from rtmdet_geo.errors import AnnotationError


def upright(name, xmin, ymin, xmax, ymax, more=""):
    box = f"<xmin>{xmin}</xmin><ymin>{ymin}</ymin><xmax>{xmax}</xmax><ymax>{ymax}</ymax>"
    return f"<object><name>{name}</name>{more}<bndbox>{box}</bndbox></object>"


def rotated(name, cx, cy, w, h, angle, more=""):
    box = f"<cx>{cx}</cx><cy>{cy}</cy><w>{w}</w><h>{h}</h><angle>{angle}</angle>"
    return f"<object><type>robndbox</type><name>{name}</name>{more}<robndbox>{box}</robndbox></object>"


def voc_xml(*objects, size="<size><width>100</width><height>80</height><depth>3</depth></size>"):
    return f"<annotation><filename>a.png</filename>{size}{''.join(objects)}</annotation>"


def test_voc_by_hand(tmp_path):
    path = write_text(
        tmp_path / "a.xml",
        voc_xml(upright("ship", 10, 20, 40, 30), upright("fishing boat", 1, 2, 3, 8, "<difficult>1</difficult>")),
    )
    labels = read_voc(path)
    assert labels.class_names == ("ship", "fishing boat") and labels.size == (100, 80)
    assert labels.boxes[0] == pytest.approx([25, 25, 30, 10, 0])
    assert labels.boxes[1] == pytest.approx([2, 5, 6, 2, -math.pi / 2])  # le90: w is the long side
    assert labels.difficult.tolist() == [False, True] and labels.place(1) == f"{path}, object 2"
    pixels = read_voc(path, counts_from_one=True)  # pixels 10 to 40, 31 of them, from 9 to 40
    assert pixels.boxes[0] == pytest.approx([24.5, 24.5, 31, 11, 0])
    assert len(read_voc(write_text(tmp_path / "b.xml", voc_xml(size="")))) == 0


def test_rotated_boxes_turn_clockwise_on_screen(tmp_path):
    """What roLabelImg draws: w along x, turned by the angle; the upper left corner of a box goes right and up first."""
    path = write_text(
        tmp_path / "a.xml", voc_xml(rotated("ship", 50, 40, 20, 10, 0.5), rotated("tug", 9, 8, 2, 6, 3.0))
    )
    labels = read_voc(path)
    assert labels.boxes[0] == pytest.approx([50, 40, 20, 10, 0.5])
    assert labels.boxes[1] == pytest.approx([9, 8, 6, 2, 3.0 + math.pi / 2 - math.pi])
    cos, sin = math.cos(0.5), math.sin(0.5)
    corner = [50 - 10 * cos + 5 * sin, 40 - 10 * sin - 5 * cos]  # (-w/2, -h/2), turned as libs/pascal_voc_io.py does
    assert np.hypot(*(boxes_to_polygons(labels.boxes[:1])[0] - corner).T).min() < 1e-9
    half = 10 * cos + 5 * sin
    assert read_voc(path, "horizontal").boxes[0, 2] == pytest.approx(2 * half)


def test_what_is_written(tmp_path):
    labels = read_voc(
        write_text(tmp_path / "a.xml", voc_xml(upright("ship", 10, 20, 40, 30), rotated("tug", 99, 8, 6, 2, 3.0)))
    )
    write_voc(tmp_path / "b.xml", labels, "a.png", 100, 80, is_rotated=True)
    text = (tmp_path / "b.xml").read_text()
    assert text.count("<robndbox>") == 2 and "<angle>0</angle>" in text and "<filename>a.png</filename>" in text
    assert text.index("<truncated>0") < text.index("<truncated>1")
    again = read_voc(tmp_path / "b.xml")
    assert again.boxes == pytest.approx(labels.boxes, abs=1e-9) and again.size == (100, 80)
    write_voc(tmp_path / "c.xml", labels, "a.png", 100, 80)
    text = (tmp_path / "c.xml").read_text()
    assert "<xmin>10</xmin>" in text and "<ymax>30</ymax>" in text and "robndbox" not in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<annotation>", "not XML"),
        ("<HRSC_Image/>", "not of Pascal VOC.*'HRSC_Image'"),
        (voc_xml("<object><name>ship</name></object>"), "object 1: it has neither bndbox nor robndbox"),
        (voc_xml(upright("", 1, 1, 2, 2)), "object 1: it has no name"),
        (voc_xml(upright("a", 1, 1, 2, 2), upright("a", 1, "", 2, 2)), "object 2: it has no ymin"),
        (voc_xml(upright("a", 1, 1, "two", 2)), "object 1: .* is no number"),
        (voc_xml(upright("a", 5, 1, 2, 2)), "object 1: sides -3 x 1 px"),
        (voc_xml(rotated("a", 5, 1, 2, -2, 0)), "object 1: sides 2 x -2 px"),
        (voc_xml(rotated("a", 5, 1, 2, 2, "nan")), "object 1: 'nan' is not finite"),
        (voc_xml(rotated("a", 5, 1, 2, 2, "")), "object 1: it has no angle"),
        (voc_xml(upright("a", 1, 1, 2, 2, "<difficult>no</difficult>")), "object 1: difficult is 'no'"),
    ],
)
def test_malformed_voc(tmp_path, text, message):
    with pytest.raises(AnnotationError, match=r"bad\.xml.*" + message):
        read_voc(write_text(tmp_path / "bad.xml", text))


def test_gone(tmp_path):
    with pytest.raises(AnnotationError, match=r"gone\.xml.*No such file"):
        read_voc(tmp_path / "gone.xml")


def test_the_data_check_reads_both(tmp_path):
    for name, entry in {"a": upright("ship", 10, 20, 40, 30), "b": rotated("ship", 50, 40, 20, 10, 0.5)}.items():
        write_image(tmp_path / "images" / f"{name}.png", ord(name), (100, 80))
        write_text(tmp_path / "labels" / f"{name}.xml", voc_xml(entry))
    write_image(tmp_path / "images" / "c.png", 3, (90, 80))
    write_text(tmp_path / "labels" / "c.xml", voc_xml())
    summary = check_dataset({"data": PartSource("voc", tmp_path / "images", tmp_path / "labels", classes=("ship",))})
    assert summary["parts"]["data"]["classes"] == {"ship": 2}
    assert [(fault["kind"], fault["count"]) for fault in summary["faults"]] == [("other image size", 1)]
