"""Windows and labels of DOTA's split tools: golden lines, hand-worked cuts, what holds for any objects."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rtmdet_geo.annotations.dota import DotaObjects, read_dota_objects
from rtmdet_geo.boxes import boxes_to_polygons
from rtmdet_geo.dota.rules import PatchName, SplitRules, Window, find_tool, parse_patch_name, resized_shape
from rtmdet_geo.errors import AnnotationError, ConfigError


def objects_of(*lines):
    words = [line.split() for line in lines]
    corners = np.array([[float(word) for word in row[:8]] for row in words]).reshape(-1, 8)
    names, marks = (tuple(row[column] for row in words) for column in (8, 9))
    return DotaObjects(corners, names, marks, np.arange(len(words)))


def cut(rules, objects, width, height):
    """Return the lines of each patch by its name."""
    windows = rules.windows(width, height)
    return {
        window.name: lines for window, lines in zip(windows, rules.cut(objects, width, height, windows), strict=True)
    }


# ---------------------------------------------------------------- golden lines


def oracle_images(oracle_dir):
    images = json.loads((oracle_dir / "split.json").read_text())["images"]
    assert images
    return images


def golden_tiles(tiles, image):
    return {tile["id"].removeprefix(f"{image['id']}__"): tile["lines"] for tile in tiles}


def test_oracle_devkit(oracle_dir):
    for image in oracle_images(oracle_dir):
        for case in image["devkit"]:
            rules = SplitRules(
                "devkit", case["subsize"], case["gap"], (float(case["rate"]),), iof_threshold=case["thresh"]
            )
            found = cut(rules, objects_of(*image["labelTxt"]), image["width"], image["height"])
            assert found == golden_tiles(case["tiles"], image), (image["id"], case["rate"])


@pytest.mark.parametrize(("key", "gap", "rates"), [("mmrotate_ss", 200, (1.0,)), ("mmrotate_ms", 500, (0.5, 1.0, 1.5))])
def test_oracle_bboxtoolkit(oracle_dir, key, gap, rates):
    content = json.loads((oracle_dir / "split.json").read_text())
    for image in content["images"]:
        rules = SplitRules(
            "bboxtoolkit",
            gap=gap,
            rates=rates,
            iof_threshold=content["iof_thr"],
            image_threshold=content["img_rate_thr"],
        )
        windows = rules.windows(image["width"], image["height"])
        assert [[w.x, w.y, w.x + w.size, w.y + w.size] for w in windows] == image[key]["windows"], image["id"]
        found = cut(rules, objects_of(*image["labelTxt"]), image["width"], image["height"])
        golden = golden_tiles(image[key]["tiles"], image)
        assert list(found) == list(golden), image["id"]
        assert found == golden, image["id"]


def test_oracle_notices_another_rule(oracle_dir):
    """Negative control: another threshold, or the other tool, does not give the golden lines."""
    differs = {"threshold": False, "tool": False}
    for image in oracle_images(oracle_dir):
        objects, shape = objects_of(*image["labelTxt"]), (image["width"], image["height"])
        golden = list(golden_tiles(image["mmrotate_ss"]["tiles"], image).values())
        other = SplitRules("bboxtoolkit", iof_threshold=0.5)
        differs["threshold"] |= list(cut(other, objects, *shape).values()) != golden
        differs["tool"] |= list(cut(SplitRules("devkit"), objects, *shape).values()) != golden
    assert all(differs.values())


# ---------------------------------------------------------------- by hand


def test_devkit_windows_by_hand():
    # 250 px in steps of 60: 0, 60, 120, and the last one ends with the image
    names = [window.name for window in SplitRules(size=100, gap=40).windows(250, 100)]
    assert names == ["1__0___0", "1__60___0", "1__120___0", "1__150___0"]
    assert SplitRules(size=100, gap=40, rates=(0.5,)).windows(250, 100) == [
        Window("0.5__0___0", 0.5, 0, 0, 100),
        Window("0.5__25___0", 0.5, 25, 0, 100),
    ]


def test_devkit_cut_by_hand():
    # A rectangle from x = 80 to 120: half of it is in the window that ends at 100.
    lines = cut(SplitRules(size=100, gap=0), objects_of("80 10 120 10 120 30 80 30 ship 0"), 300, 90)
    assert lines["1__0___0"] == ["80.0 10.0 100.0 10.0 100.0 30.0 80.0 30.0 ship 2"]
    assert lines["1__100___0"] == ["1.0 10.0 20.0 10.0 20.0 30.0 1.0 30.0 ship 2"]  # 0 becomes 1, as the devkit has it
    # more than the threshold of it inside: as difficult as it was
    lines = cut(SplitRules(size=100, gap=0), objects_of("80 10 105 10 105 30 80 30 ship 1"), 300, 90)
    assert lines["1__0___0"] == ["80.0 10.0 100.0 10.0 100.0 30.0 80.0 30.0 ship 1"]


def test_devkit_makes_four_corners_of_five_and_none_of_six():
    # A corner of a diamond beyond x = 100 leaves five: the cut of 4 px is the shortest side, its middle is kept.
    diamond = "92 40 102 50 92 60 82 50 ship 0"
    lines = cut(SplitRules(size=100, gap=0), objects_of(diamond), 300, 99)
    assert lines["1__0___0"] == ["92.0 40.0 100.0 50.0 92.0 60.0 82.0 50.0 ship 0"]
    # Two corners of a larger one are beyond two sides of the window: six are left.
    assert cut(SplitRules(size=100, gap=0), objects_of("60 60 104 80 80 104 50 90 ship 0"), 300, 300)["1__0___0"] == []


def test_devkit_takes_whole_numbers_before_it_resizes():
    lines = cut(SplitRules(size=100, gap=0, rates=(0.5,)), objects_of("21.9 10 41 10 41 31.9 21.9 31.9 ship 0"), 90, 90)
    assert lines["0.5__0___0"] == ["10.0 5.0 20.0 5.0 20.0 15.0 10.0 15.0 ship 0"]


def test_bboxtoolkit_by_hand():
    rules = SplitRules("bboxtoolkit", size=100, gap=0, iof_threshold=0.5)
    lines = cut(rules, objects_of("80 10 110 10 110 30 80 30 ship 0", "70 10 120 10 120 30 70 30 ship 0"), 200, 100)
    # 2 / 3 of the first is inside, 3 / 5 of the second; both keep their corners
    assert lines["100__0___0"] == [
        "80.0 10.0 110.0 10.0 110.0 30.0 80.0 30.0 ship 2",
        "70.0 10.0 120.0 10.0 120.0 30.0 70.0 30.0 ship 2",
    ]
    assert lines["100__100___0"] == []


def test_negative_zeros_of_labels_are_zeros_in_patches():
    """BboxToolkit adds what others subtract, which shows in the sign of a zero."""
    for tool in ("devkit", "bboxtoolkit"):
        lines = cut(SplitRules(tool, size=100, gap=0), objects_of("-0.0 -0.0 20 0 20 10 -0.0 10 ship 0"), 100, 100)
        assert list(lines.values()) == [["0.0 0.0 20.0 0.0 20.0 10.0 0.0 10.0 ship 0"]]


def test_bboxtoolkit_windows_are_full_enough_or_the_fullest():
    rules = SplitRules("bboxtoolkit", size=100, gap=0)
    assert [window.name for window in rules.windows(170, 100)] == ["100__0___0", "100__70___0"]
    assert [window.name for window in rules.windows(30, 30)] == ["100__0___0"]  # 9 % of it is image
    rules = SplitRules("bboxtoolkit", size=100, gap=0, rates=(0.5, 1.0))
    assert [window.name for window in rules.windows(100, 70)] == ["100__0___0"]  # the one of 200 px is 18 % full


def test_quadrilaterals_with_crossing_sides_or_a_notch_are_cut_all_the_same():
    bow_tie, arrow = "10 10 30 30 30 10 10 30 ship 0", "80 10 120 50 80 90 110 50 ship 0"
    for rules in (SplitRules(size=100, gap=0), SplitRules("bboxtoolkit", size=100, gap=0)):
        lines = next(iter(cut(rules, objects_of(bow_tie, arrow), 200, 100).values()))
        assert lines[0] == "10.0 10.0 30.0 30.0 30.0 10.0 10.0 30.0 ship 0"


def test_labels_without_area_or_beyond_the_image_are_in_no_patch():
    lines = cut(SplitRules(size=100, gap=0), objects_of("5 5 9 5 9 5 5 5 a 0", "300 5 310 5 310 9 300 9 a 0"), 200, 100)
    assert set(map(len, lines.values())) == {0}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"tool": "mmrotate"}, "tool='mmrotate' is unknown"),
        ({"gap": 1024}, "gap=1024 px must be"),
        ({"size": 0}, "below size=0"),
        ({"rates": ()}, "must be one number"),
        ({"rates": (0.0,)}, "must be one number"),
        ({"rates": (float("nan"),)}, "must be one number"),
        ({"rates": (1.0, 1.0)}, "name a rate twice"),
        ({"tool": "bboxtoolkit", "size": 10, "gap": 9, "rates": (5.0, 12.0)}, "the same at one of the rates"),
        ({"tool": "bboxtoolkit", "rates": (3.0, 3.001)}, "two have windows of one size"),
        ({"iof_threshold": 1.5}, "iof_threshold=1.5"),
        ({"image_threshold": -1}, "image_threshold=-1"),
    ],
)
def test_wrong_rules_are_refused(changes, text):
    with pytest.raises(ConfigError, match=text):
        SplitRules(**changes)


def test_rates_are_named_with_all_their_digits():
    """So that merging divides by the very rate; 1 is 1 and not 1.0, as the devkit names what it is given as an int."""
    rules = SplitRules(size=100, gap=0, rates=(1 / 3, 1.0, 1.25))
    scales = [parse_patch_name(f"P__{window.name}").scale for window in rules.windows(90, 90)]
    assert list(dict.fromkeys(scales)) == ["0.3333333333333333", "1", "1.25"]
    assert float(scales[0]) == 1 / 3


def test_patch_names():
    assert parse_patch_name("P__3__0.5__824___0") == PatchName("P__3", "0.5", 824, 0)
    for name in ("P0003", "P0003__1__0__0", "P0003__0__0___0", "P0003__x__0___0", "__1__0___0", "P0003__1__0___0.png"):
        with pytest.raises(AnnotationError, match=r"^here:4: .* is no patch"):
            parse_patch_name(name, "here:4")


def test_label_files(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"imagesource:GoogleEarth\r\ngsd:0.1\r\n1 2 3 2 3 4 1 4 ship 1\r\n\r\n1 2 3 2 3 4 1 4.5 ship\r\n")
    found = read_dota_objects(path)
    assert (found.class_names, found.difficult, found.corners[1, 7]) == (("ship", "ship"), ("1", "0"), 4.5)
    assert found.numbers.tolist() == [3, 5]
    for text, fault in [
        ("1 2 3 ship 0", "5 words"),
        ("1 2 3 2 3 4 1 nan ship 0", "not finite"),
        ("x " * 9, "is no number"),
    ]:
        path.write_text(f"1 2 3 2 3 4 1 4 ship 1\n{text}\n")
        with pytest.raises(AnnotationError, match=rf"a\.txt:2: .*{fault}"):
            read_dota_objects(path)


# ---------------------------------------------------------------- whatever the objects

TOOLS = st.sampled_from(["devkit", "bboxtoolkit"])


@given(TOOLS, st.integers(1, 400), st.integers(1, 400), st.integers(8, 120), st.data())
@settings(max_examples=60, deadline=None)
def test_windows_cover_every_pixel(tool, width, height, size, data):
    gap = data.draw(st.integers(0, size - 1))
    windows = SplitRules(tool, size, gap, image_threshold=0.0).windows(width, height)
    seen = np.zeros((height, width), bool)
    for window in windows:
        assert 0 <= window.x <= max(width - size, 0) and 0 <= window.y <= max(height - size, 0)
        seen[window.y : window.y + size, window.x : window.x + size] = True
    assert seen.all() and len(set(windows)) == len(windows)
    starts = sorted({window.x for window in windows})
    assert all(after - before <= size - gap for before, after in itertools.pairwise(starts))


@st.composite
def scenes(draw):
    """Whole-numbered rectangles in cells of 40 px, of 6 to 30 px a side."""
    columns, rows = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    lines = []
    for x in range(0, 40 * columns, 40):
        for y in range(0, 40 * rows, 40):
            if draw(st.booleans()):
                w, h = draw(st.integers(6, 30)), draw(st.integers(6, 30))
                left, top = x + draw(st.integers(1, 33 - w)), y + draw(st.integers(1, 33 - h))
                corners = [left, top, left + w, top, left + w, top + h, left, top + h]
                lines.append(" ".join(map(str, corners)) + " ship 0")
    return objects_of(*lines), 40 * columns + draw(st.integers(0, 39)), 40 * rows + draw(st.integers(0, 39))


@given(TOOLS, scenes(), st.integers(64, 120))
@settings(max_examples=60, deadline=None)
def test_an_object_that_a_window_shows_whole_is_in_its_patch(tool, scene, size):
    objects, width, height = scene
    windows = SplitRules(tool, size, 32).windows(width, height)
    patches = cut(SplitRules(tool, size, 32), objects, width, height)
    found = set()
    for window in windows:
        shift = np.array([window.x, window.y] * 4)
        lines = {tuple(map(float, line.split()[:8])): line.split()[9] for line in patches[window.name]}
        for index, corners in enumerate(objects.corners - shift):
            if corners.min() >= 0 and corners.max() < size and tuple(corners) in lines:
                assert lines[tuple(corners)] == "0"
                found.add(index)
            else:
                assert corners.min() < 0 or corners.max() >= size
    assert found == set(range(len(objects)))  # none is longer than the gap, so some window shows it whole


@given(st.integers(0, 10_000), st.floats(0.2, 3.0))
@settings(max_examples=40, deadline=None)
def test_devkit_objects_keep_their_ground_at_any_rate(seed, rate):
    generator = np.random.default_rng(seed)
    boxes = np.column_stack(
        [generator.uniform(100, 300, (5, 2)), generator.uniform(20, 60, (5, 2)), generator.uniform(-1.5, 1.5, 5)]
    )
    corners = boxes_to_polygons(boxes).reshape(-1, 8)
    objects = DotaObjects(corners, ("ship",) * 5, ("0",) * 5, np.arange(5))
    rate = round(rate, 2)
    shape = resized_shape(400, 400, rate)
    (lines,) = cut(SplitRules(size=2000, gap=0, rates=(rate,)), objects, 400, 400).values()
    found = np.array([list(map(float, line.split()[:8])) for line in lines])
    assert found.max() < max(shape)
    # rounding may hide that all of an object is inside; then its corners come in the order of the window's
    apart = np.abs(found.reshape(-1, 4, 1, 2) / rate - corners.reshape(-1, 1, 4, 2)).max(axis=3)
    assert apart.min(axis=1).max() <= 1 + 1 / rate


def test_whose_patches_by_their_names():
    assert find_tool(["P1__1024__0___0", "P1__64__0___0", "P1"]) == "bboxtoolkit"
    assert find_tool(["P1__1.5__0___0", "P1__64__0___0"]) == "devkit"
    assert find_tool(["P1__64__0___0"], "bboxtoolkit") == "bboxtoolkit"
    assert find_tool([]) == "devkit"
    for names, tool, text in (
        (["P1__1024__0___0"], "devkit", "'P1__1024__0___0' is none of devkit.* it is of bboxtoolkit"),
        (["P1__32.5__0___0"], "bboxtoolkit", "is none of bboxtoolkit.* names a rate"),
        (["P1__31__0___0", "P2__1024__0___0"], None, "'P1__31__0___0' and 'P2__1024__0___0' were not made by one tool"),
        (["P1__100__0___0"], None, "say whose it is"),
    ):
        with pytest.raises(ConfigError, match=text):
            find_tool(names, tool)
