"""Angle conventions and corner orders: worked by hand, there and back, against OpenCV."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import cv2
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from label_folders import write_text

from rtmdet_geo.annotations.angles import (
    AngleConvention,
    boxes_from_convention,
    boxes_to_convention,
    convention_fault,
    order_corners,
    parse_angle,
)
from rtmdet_geo.annotations.labels import make_labels
from rtmdet_geo.annotations.rbox import read_rbox, write_rbox
from rtmdet_geo.boxes import boxes_to_polygons, regularize_le90
from rtmdet_geo.errors import AnnotationError, ConfigError

CONVENTIONS = [
    AngleConvention(*words)
    for words in itertools.product(("any", "oc", "oc451", "le90", "le135"), ("rad", "deg"), ("cw", "ccw"))
]
#: First and last angle in degrees of each range, and which of them belongs to it.
RANGES = {"oc": (-90, 0, "["), "oc451": (0, 90, "]"), "le90": (-90, 90, "["), "le135": (-45, 135, "[")}

any_box = st.tuples(
    *(st.floats(-500, 500), st.floats(-500, 500), st.floats(0, 300), st.floats(0, 300), st.floats(-7, 7))
)


def corner_gap(first, second):
    """Largest distance between the corners of two boxes, whatever their order."""
    a, b = boxes_to_polygons(first)[0], boxes_to_polygons(second)[0]
    return np.hypot(*(a[:, None] - b).transpose(2, 0, 1)).min(axis=1).max()


@pytest.mark.parametrize("convention", CONVENTIONS, ids=str)
@settings(deadline=None, max_examples=60)
@given(box=any_box)
@example(box=(0.0, 0.0, 4.0, 2.0, math.pi / 2))
@example(box=(0.0, 0.0, 4.0, 2.0, -math.pi / 2))
@example(box=(0.0, 0.0, 2.0, 2.0, 0.0))
@example(box=(0.0, 0.0, 2.0, 4.0, -1e-17))
@example(box=(0.0, 0.0, 4.0, 2.0, -math.pi / 4))
@example(box=(0.0, 0.0, 4.0, 2.0, 3 * math.pi / 4))
def test_there_and_back_is_the_same_rectangle(convention, box):
    there = boxes_to_convention([box], convention)
    assert corner_gap(boxes_from_convention(there, convention), [box]) < 1e-9
    assert sorted(there[0, 2:4]) == sorted(box[2:4]) and there[0, :2].tolist() == list(box[:2])
    if convention.range == "any":
        return
    low, high, closed = RANGES[convention.range]
    degrees = there[0, 4] if convention.unit == "deg" else np.degrees(there[0, 4])
    assert low <= degrees <= high
    assert degrees != (high if closed == "[" else low)
    if convention.range.startswith("le"):
        assert there[0, 2] >= there[0, 3]
    assert convention_fault(*there[0, 2:], convention) is None


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("any,deg", (20, 10, -120)),
        ("oc,deg", (10, 20, -30)),
        ("oc451,deg", (20, 10, 60)),
        ("le90,deg", (20, 10, 60)),
        ("le135,deg", (20, 10, 60)),
        ("oc,deg,ccw", (20, 10, -60)),
        ("oc451,deg,ccw", (10, 20, 30)),
        ("le90,deg,ccw", (20, 10, -60)),
        ("le135,deg,ccw", (20, 10, 120)),
        ("le135", (20, 10, math.pi / 3)),
    ],
)
def test_conventions_by_hand(words, expected):
    """The long side of a 20 x 10 box points down to the right, 60 degrees clockwise of x (or up to the left, -120)."""
    found = boxes_to_convention([[0, 0, 20, 10, math.radians(-120)]], parse_angle(words))[0, 2:]
    assert found == pytest.approx(expected)


@settings(deadline=None, max_examples=100)
@given(width=st.floats(5, 300), height=st.floats(5, 300), angle=st.floats(1.0, 89.0))
def test_opencv_gives_one_of_its_two_ranges(width, height, angle):
    version = tuple(int(word) for word in cv2.__version__.split(".")[:3])
    convention = AngleConvention("oc451" if (4, 5, 1) <= version < (4, 13) else "oc", "deg")
    corners = boxes_to_polygons([[200, 200, width, height, math.radians(angle)]])[0].astype(np.float32)
    (_, _), (w, h), found = cv2.minAreaRect(corners)
    mine = boxes_to_convention([[200, 200, width, height, math.radians(angle)]], convention)[0]
    assert corner_gap([[200, 200, w, h, math.radians(found)]], [[200, 200, *mine[2:4], math.radians(mine[4])]]) < 0.01
    assert mine[4] == pytest.approx(found, abs=0.05)


def test_words():
    assert parse_angle("CCW, deg") == AngleConvention("any", "deg", "ccw")
    assert all(parse_angle(str(convention)) == convention for convention in CONVENTIONS)
    for text, reason in (("", "'' is unknown"), ("le91", "'le91' is unknown"), ("deg,rad", "'rad' is a second unit")):
        with pytest.raises(ConfigError, match=reason):
            parse_angle(text)


@pytest.mark.parametrize("convention", CONVENTIONS, ids=str)
def test_text_files_in_every_convention(tmp_path, convention):
    boxes = regularize_le90(
        [[50, 40, 20, 10, 0.3], [50, 40, 10, 20, 0.3], [9, 8, 30, 2, -1.5], [5, 5, 4, 2, -math.pi / 2]]
    )
    labels = make_labels(tmp_path, boxes, ["a", "b", "c", "d"], range(4), difficult=[1, 0, 0, 0])
    write_rbox(tmp_path / "a.txt", labels, angle=convention)
    found = read_rbox(tmp_path / "a.txt", "ship", angle=convention)
    assert found.class_names == labels.class_names and found.difficult.tolist() == [True, False, False, False]
    assert max(corner_gap([a], [b]) for a, b in zip(found.boxes, boxes, strict=True)) < 1e-9


@pytest.mark.parametrize(
    ("line", "words", "reason"),
    [
        ("1 2 20 10 120", "le90,deg", "angle 120 deg is not in the range of le90,deg,cw"),
        ("1 2 20 10 1.6", "oc", "angle 1.6 rad is not in the range of oc,rad,cw"),
        ("1 2 10 20 0.3", "le135", "w 10 is shorter than h 20, but in le135,rad,cw it is the long side"),
    ],
)
def test_files_that_contradict_their_convention(tmp_path, line, words, reason):
    path = write_text(tmp_path / "bad.txt", f"1 2 20 10 -0.001 ship\n{line}\n")
    with pytest.raises(AnnotationError, match=r"bad\.txt:2: " + reason):
        read_rbox(path, "ship", angle=parse_angle(words))
    assert len(read_rbox(path, "ship", angle=replace(parse_angle(words), range="any"))) == 2
    if "deg" in words:
        with pytest.raises(AnnotationError, match=r"bad\.txt:2: angle 120 rad is more than a turn.*any,deg,cw"):
            read_rbox(path, "ship")
    rounded = write_text(tmp_path / "rounded.txt", "1 2 20 10 1.5708\n1 2 9.995 10 -1.5708")  # pi/2 to four digits
    assert len(read_rbox(rounded, "ship", angle=parse_angle("le90"))) == 2


# ---------------------------------------------------------------- corners


def test_corner_orders_by_hand():
    """A square on its corner-less side: (0, 0) top left, counter-clockwise on screen as given, from the lower right."""
    given_order = [[10, 5], [10, 0], [0, 0], [0, 5]]
    assert order_corners([given_order], "any")[0].tolist() == given_order
    assert order_corners([given_order], "head")[0].tolist() == [[10, 5], [0, 5], [0, 0], [10, 0]]
    assert order_corners([given_order], "top-left")[0].tolist() == [[0, 0], [10, 0], [10, 5], [0, 5]]
    assert order_corners(np.zeros((0, 8)), "top-left").shape == (0, 4, 2)
    with pytest.raises(ValueError, match="unknown order"):
        order_corners([given_order], "first")


def signed_area(corners):
    x, y = np.asarray(corners).T
    return (np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2


@settings(deadline=None, max_examples=100)
@given(box=any_box, first=st.integers(0, 3), turns=st.booleans())
def test_corner_orders_keep_the_quadrilateral(box, first, turns):
    corners = np.roll(boxes_to_polygons([box])[0], first, axis=0)[:: -1 if turns else 1]
    for order in ("any", "head", "top-left"):
        (found,) = order_corners([corners], order)
        assert sorted(map(tuple, found)) == sorted(map(tuple, corners))
        assert order == "any" or signed_area(found) >= -1e-6  # clockwise on screen
        assert order == "top-left" or (found[0] == corners[0]).all()
    (found,) = order_corners([corners], "top-left")
    low, high = found.min(axis=0), found.max(axis=0)
    frame = np.array([low, [high[0], low[1]], high, [low[0], high[1]]])
    ways = [np.hypot(*(np.roll(found, -k, axis=0) - frame).T).sum() for k in range(4)]
    assert ways[0] <= min(ways) + 1e-9
