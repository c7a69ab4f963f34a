"""boxes.py against the oracle, numbers worked out by hand, shapely, and properties."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from rtmdet_geo import boxes as bx

PI = np.pi
TOLERANCE = 1e-4  # oracle README, box conversions

coordinate = st.floats(-1e6, 1e6)
side = st.floats(0.5, 2000)
box = st.tuples(coordinate, coordinate, side, side, st.floats(-10, 10))
small_point = st.tuples(st.integers(-20, 20), st.integers(-20, 20))


@pytest.fixture(scope="module")
def oracle(oracle_dir):
    return json.loads((oracle_dir / "ops.json").read_text())["boxes"]


def as_fed(values):
    """The oracle's inputs were cast to float32 first."""
    return np.asarray(values, np.float32).astype(np.float64)


def angle_distance(actual, expected, period):
    """Distance of angles that mean the same modulo ``period``."""
    return np.abs((np.asarray(actual) - expected + period / 2) % period - period / 2)


def assert_same_boxes(actual, expected, *, period=None, tolerance=TOLERANCE):
    """Compare number by number; ``period`` (per row or one) compares angles modulo it."""
    expected = np.asarray(expected, np.float64).reshape(-1, 5)
    assert actual.shape == expected.shape and actual.dtype == np.float64
    np.testing.assert_allclose(actual[:, :4], expected[:, :4], rtol=1e-6, atol=tolerance)
    if period is None:
        np.testing.assert_allclose(actual[:, 4], expected[:, 4], rtol=0, atol=tolerance)
    else:
        assert angle_distance(actual[:, 4], expected[:, 4], period).max(initial=0) < tolerance


def square_period(boxes):
    """Pi, but pi/2 for squares, whose long side is ambiguous (oracle README)."""
    boxes = np.asarray(boxes)
    return np.where(np.abs(boxes[:, 2] - boxes[:, 3]) < 1e-3, PI / 2, PI)


def assert_le90(boxes):
    assert (boxes[:, 2] >= boxes[:, 3]).all()
    assert (boxes[:, 4] >= -PI / 2).all() and (boxes[:, 4] < PI / 2).all()


# oracle


def test_oracle_polygons_and_horizontal_boxes(oracle):
    rboxes, qboxes = as_fed(oracle["rboxes"]), as_fed(oracle["qboxes"])
    options = {"rtol": 1e-6, "atol": TOLERANCE}
    np.testing.assert_allclose(bx.boxes_to_polygons(rboxes).reshape(-1, 8), oracle["rbox2qbox"], **options)
    np.testing.assert_allclose(bx.boxes_to_hboxes(rboxes), oracle["rbox2hbox"], **options)
    np.testing.assert_allclose(bx.polygons_to_hboxes(qboxes), oracle["qbox2hbox"], **options)


def assert_minimum_rectangles(actual, expected, polygons, tolerance):
    """Same boxes, or, where the reference's float32 chose otherwise, one of equal area around the same points."""
    assert_le90(actual)
    area, expected_area = actual[:, 2] * actual[:, 3], expected[:, 2] * expected[:, 3]
    np.testing.assert_allclose(area, expected_area, rtol=1e-4, atol=1e-3)
    is_tie = np.abs(actual - expected).max(axis=1) > 0.01
    is_tie &= np.abs(area / expected_area - 1) < 1e-6
    is_tie &= angle_distance(actual[:, 4], expected[:, 4], PI / 2) > 1e-4
    for polygon, found in zip(polygons[is_tie], actual[is_tie], strict=True):
        assert bx.points_in_boxes(polygon, [found], margin=-1e-6).all()
    other = ~is_tie
    assert other.sum() >= len(actual) / 2
    assert_same_boxes(actual[other], expected[other], period=square_period(expected[other]), tolerance=tolerance)


def test_oracle_minimum_area_rectangles(oracle):
    polygons = as_fed(oracle["qboxes"]).reshape(-1, 4, 2)
    expected = np.array(oracle["qbox2rbox_le90"])
    # OpenCV works in float32: centres are off by up to 2e-4 px
    assert_minimum_rectangles(bx.polygons_to_boxes(polygons), expected, polygons, 5e-4)
    single = np.array([bx.minimum_area_rectangle(polygon) for polygon in polygons])
    assert_minimum_rectangles(single, expected, polygons, 5e-4)


def test_oracle_regularize(oracle):
    actual = bx.regularize_le90(as_fed(oracle["rboxes"]))
    assert_le90(actual)
    assert_same_boxes(actual, oracle["regularize"]["le90"], period=PI)  # float32 of the reference wraps at +-pi/2


def test_oracle_norm_angle(oracle):
    actual = bx.normalize_angle(as_fed(oracle["norm_angle_input"]))
    np.testing.assert_allclose(actual, oracle["norm_angle"]["le90"], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("direction", ["horizontal", "vertical", "diagonal"])
def test_oracle_flip(oracle, direction):
    height, width = oracle["flip_img_shape"]
    assert_same_boxes(bx.flip_boxes(as_fed(oracle["rboxes"]), width, height, direction), oracle["flip"][direction])


@pytest.mark.parametrize("name", ["rotate", "rotate_neg"])
def test_oracle_rotate(oracle, name):
    case = oracle[name]
    actual = bx.rotate_boxes(as_fed(oracle["rboxes"]), np.radians(case["angle_deg"]), tuple(case["center"]))
    assert_same_boxes(actual, case["out"])


@pytest.mark.parametrize("name", ["rescale_iso", "rescale_aniso"])
def test_oracle_rescale(oracle, name):
    """The reference follows the h side; arctan2 wraps angles beyond +-pi, which means the same box."""
    actual = bx.rescale_boxes(as_fed(oracle["rboxes"]), *oracle[name]["factor"], follow="h")
    assert_same_boxes(actual, oracle[name]["out"], period=PI)


def test_oracle_translate(oracle):
    case = oracle["translate"]
    assert_same_boxes(bx.translate_boxes(as_fed(oracle["rboxes"]), *case["distances"]), case["out"])


def test_oracle_project(oracle):
    case = oracle["project"]
    expected = np.array(case["out_le90"])
    actual = bx.project_boxes(as_fed(oracle["rboxes"]), case["matrix"])
    assert_same_boxes(actual, expected, period=square_period(expected))


def test_oracle_find_inside_points(oracle):
    case = oracle["find_inside_points"]
    actual = bx.points_in_boxes(as_fed(case["points"]), as_fed(case["boxes"]))
    np.testing.assert_array_equal(actual, np.array(case["out"], bool))


# by hand


def test_corners_turn_clockwise_on_screen():
    lower_right, upper_right, upper_left, lower_left = bx.boxes_to_polygons([[10, 20, 4, 2, 0]])[0].tolist()
    assert (lower_right, upper_right, upper_left, lower_left) == ([12, 21], [12, 19], [8, 19], [8, 21])
    bow = bx.boxes_to_polygons([[0, 0, 2, 0, PI / 2]])[0, 0]  # a quarter turn: the w axis points down the screen
    np.testing.assert_allclose(bow, [0, 1], atol=1e-15)


def test_normalize_angle_at_the_seam():
    angles = np.array([-PI / 2, PI / 2, np.nextafter(-PI / 2, -2), 0.0, PI, -1e-300 - PI / 2])
    wrapped = bx.normalize_angle(angles)
    assert (wrapped >= -PI / 2).all() and (wrapped < PI / 2).all()
    assert wrapped[0] == wrapped[1] == -PI / 2


def test_regularize_keeps_a_long_box_and_swaps_a_tall_one():
    result = bx.regularize_le90([[1, 2, 4, 2, 0.3], [1, 2, 2, 4, 0.3], [0, 0, 5, 1, 2.0]])
    np.testing.assert_allclose(result[0], [1, 2, 4, 2, 0.3])
    np.testing.assert_allclose(result[1], [1, 2, 4, 2, 0.3 - PI / 2])
    np.testing.assert_allclose(result[2], [0, 0, 5, 1, 2 - PI])


def test_horizontal_boxes_keep_w_along_x():
    result = bx.hboxes_to_boxes([[1, 2, 3, 10]])
    np.testing.assert_array_equal(result, [[2, 6, 2, 8, 0]])
    np.testing.assert_array_equal(bx.boxes_to_hboxes(result), [[1, 2, 3, 10]])


def test_areas_and_signs():
    np.testing.assert_array_equal(bx.box_areas([[0, 0, 2, 3, 1], [0, 0, -2, 3, 1]]), [6, -6])


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([[3, 4]], [3, 4, 0, 0, 0]),
        ([[3, 4]] * 4, [3, 4, 0, 0, 0]),
        ([[0, 0], [2, 2], [1, 1], [0, 0]], [1, 1, np.sqrt(8), 0, PI / 4]),
        ([[0, 0], [0, 3], [0, 1], [0, 2]], [0, 1.5, 3, 0, -PI / 2]),
        ([[0, 0], [4, 0], [4, 1], [0, 1]], [2, 0.5, 4, 1, 0]),
        ([[0, 0], [4, 1], [4, 0], [0, 1]], [2, 0.5, 4, 1, 0]),  # crossed
        ([[0, 0], [6, 0], [1, 1], [0, 6]], [3, 3, 6, 6, 0]),  # concave; its triangle has two such areas
    ],
)
def test_degenerate_and_odd_polygons(points, expected):
    rectangle = bx.minimum_area_rectangle(points)
    area = expected[2] * expected[3]
    assert rectangle[2] * rectangle[3] == pytest.approx(area, abs=1e-12)
    period = PI / 2 if expected[2] == expected[3] else PI
    results = [rectangle, bx.polygons_to_boxes([points])[0]] if len(points) == 4 else [rectangle]
    for result in results:
        np.testing.assert_allclose(result[:4], expected[:4], atol=1e-12)
        assert angle_distance(result[4], expected[4], period) < 1e-12


def test_minimum_area_rectangle_of_a_large_round_outline():
    angle = np.linspace(0, 2 * PI, 5000, endpoint=False)
    points = np.stack([1e6 + 40 * np.cos(angle), -2e6 + 10 * np.sin(angle)], axis=1)
    np.testing.assert_allclose(bx.minimum_area_rectangle(points), [1e6, -2e6, 80, 20, 0], atol=1e-3)


def test_convex_hull_drops_collinear_points():
    hull = bx.convex_hull([[0, 0], [1, 0], [2, 0], [2, 2], [0, 2], [1, 1], [2, 0]])
    assert {tuple(point) for point in hull.tolist()} == {(0, 0), (2, 0), (2, 2), (0, 2)}


def test_rescale_of_axis_aligned_boxes_is_exact():
    result = bx.rescale_boxes([[10, 20, 4, 2, 0], [10, 20, 4, 2, PI / 2]], 2, 3)
    np.testing.assert_allclose(result, [[20, 60, 8, 6, 0], [20, 60, 12, 4, PI / 2]])


def test_rescale_keeps_the_heading_of_the_long_side():
    heading = np.arctan2(0.5, 1)  # (1, 1) on pixels half as high
    for values in ([0, 0, 10, 2, PI / 4], [0, 0, 2, 10, -PI / 4]):
        result = bx.regularize_le90(bx.rescale_boxes([values], 1, 0.5))[0]
        assert result[4] == pytest.approx(heading)
        assert result[2] == pytest.approx(10 * np.hypot(1, 0.5) / np.sqrt(2))
    reference = bx.rescale_boxes([[0, 0, 10, 2, PI / 4]], 1, 0.5, follow="h")[0]
    assert reference[4] == pytest.approx(PI / 2 - heading)


def test_points_on_the_outline_need_no_margin_to_be_inside():
    points = [[2, 1], [1.995, 0], [1.98, 0], [0, 0], [3, 0]]
    inside = bx.points_in_boxes(points, [[0, 0, 4, 2, 0]])[:, 0]
    assert inside.tolist() == [False, False, True, True, False]
    assert bx.points_in_boxes(points, [[0, 0, 4, 2, 0]], margin=0)[:, 0].tolist() == [True, True, True, True, False]


def test_perspective_divides():
    matrix = [[1, 0, 0], [0, 1, 0], [0, 0, 2]]
    np.testing.assert_allclose(bx.project_boxes([[4, 6, 8, 2, 0]], matrix), [[2, 3, 4, 1, 0]], atol=1e-12)


def test_no_boxes():
    for function in (bx.regularize_le90, bx.boxes_to_polygons, bx.boxes_to_hboxes, bx.box_areas):
        assert len(function([])) == 0
    assert bx.polygons_to_boxes([]).shape == (0, 5)
    assert bx.hboxes_to_boxes(np.zeros((0, 4))).shape == (0, 5)
    assert bx.project_boxes([], np.eye(3)).shape == (0, 5)
    assert bx.rescale_boxes([], 1, 2).shape == (0, 5)
    assert bx.points_in_boxes([], [[0, 0, 1, 1, 0]]).shape == (0, 1)


def test_arguments_are_left_alone():
    original = np.array([[1.0, 2.0, 3.0, 4.0, 5.0]])
    kept = original.copy()
    bx.regularize_le90(original)
    bx.flip_boxes(original, 10, 10, "diagonal")
    bx.rotate_boxes(original, 1.0, (0, 0))
    bx.translate_boxes(original, 1, 1)
    bx.rescale_boxes(original, 2, 3)
    bx.polygons_to_boxes(bx.boxes_to_polygons(original))
    np.testing.assert_array_equal(original, kept)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: bx.regularize_le90([[1, 2, 3, 4]]), "boxes has shape"),
        (lambda: bx.regularize_le90([1, 2, 3, 4, 5]), "boxes has shape"),
        (lambda: bx.polygons_to_boxes([[1, 2, 3, 4]]), "polygons has shape"),
        (lambda: bx.minimum_area_rectangle([]), "at least one point"),
        (lambda: bx.flip_boxes([[1, 2, 3, 4, 5]], 1, 1, "sideways"), "sideways"),
        (lambda: bx.rescale_boxes([[1, 2, 3, 4, 5]], 0, 1), "positive"),
        (lambda: bx.rescale_boxes([[1, 2, 3, 4, 5]], 1, float("nan")), "positive"),
        (lambda: bx.rescale_boxes([[1, 2, 3, 4, 5]], 1, 2, follow="w"), "follow"),
        (lambda: bx.project_boxes([[1, 2, 3, 4, 5]], np.eye(2)), "3 x 3"),
    ],
)
def test_bad_arguments(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_boxes_needs_numpy_only():
    tree = ast.parse(Path(bx.__file__).read_text(encoding="utf-8"))
    roots = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            roots.add((node.module or "").split(".")[0])
    assert roots == {"__future__", "typing", "numpy"}


# properties


@settings(deadline=None, max_examples=60)
@given(box)
def test_polygon_round_trip(values):
    original = bx.regularize_le90([values])
    result = bx.polygons_to_boxes(bx.boxes_to_polygons(original))
    assert_le90(result)
    np.testing.assert_allclose(result[:, :4], original[:, :4], rtol=0, atol=1e-6)
    # an offset of 1e6 leaves 1e-10 px for the corners, which turn a short side by this much
    slack = 1e-8 / original[0, 2] + 1e-12
    is_squarish = original[0, 2] - original[0, 3] < 1e-6
    assert angle_distance(result[0, 4], original[0, 4], PI / 2 if is_squarish else PI) < slack


@settings(deadline=None, max_examples=60)
@given(box)
def test_regularize_keeps_the_rectangle(values):
    result = bx.regularize_le90([values])
    assert_le90(result)
    before, after = bx.boxes_to_polygons([values])[0], bx.boxes_to_polygons(result)[0]
    distance = np.abs(before[:, None] - after[None]).max(axis=2).min(axis=1)
    assert distance.max() < 1e-8


@settings(deadline=None, max_examples=60)
@given(box, st.floats(-7, 7), st.sampled_from(["horizontal", "vertical", "diagonal"]))
def test_moving_boxes_moves_their_corners(values, angle, direction):
    corners = bx.boxes_to_polygons([values])[0]
    cos, sin = np.cos(angle), np.sin(angle)
    centre = np.array([3.0, -4.0])
    expected = (corners - centre) @ np.array([[cos, -sin], [sin, cos]]).T + centre
    rotated = bx.boxes_to_polygons(bx.rotate_boxes([values], angle, (3.0, -4.0)))[0]
    np.testing.assert_allclose(rotated, expected, rtol=0, atol=1e-7)
    flipped = bx.boxes_to_polygons(bx.flip_boxes([values], 120, 80, direction))[0]
    mirrored = corners.copy()
    if direction != "vertical":
        mirrored[:, 0] = 120 - mirrored[:, 0]
    if direction != "horizontal":
        mirrored[:, 1] = 80 - mirrored[:, 1]
    distance = np.abs(flipped[:, None] - mirrored[None]).max(axis=2).min(axis=1)
    assert distance.max() < 1e-8


@settings(deadline=None, max_examples=60)
@given(st.lists(small_point, min_size=1, max_size=12))
def test_minimum_area_rectangle_equals_shapely(points):
    rectangle = bx.minimum_area_rectangle(points)
    expected = shapely.MultiPoint(points).minimum_rotated_rectangle
    assert rectangle[2] * rectangle[3] == pytest.approx(expected.area, rel=1e-9, abs=1e-9)
    if len(points) == 4:
        quad = bx.polygons_to_boxes([points])[0]
        assert quad[2] * quad[3] == pytest.approx(expected.area, rel=1e-9, abs=1e-9)
    grown = rectangle + np.array([0, 0, 1e-9, 1e-9, 0])
    assert bx.points_in_boxes(points, [grown], margin=0).all()


def test_control_a_shifted_angle_is_noticed(oracle):
    """Negative control: the comparison fails for an angle that is off by a thousandth, and for degrees."""
    actual = bx.rotate_boxes(as_fed(oracle["rboxes"]), np.radians(oracle["rotate"]["angle_deg"]) + 1e-3, (60, 40))
    with pytest.raises(AssertionError):
        assert_same_boxes(actual, oracle["rotate"]["out"])
    with pytest.raises(AssertionError):
        assert_same_boxes(np.array([[0, 0, 2, 1, 0.0]]), [[0, 0, 2, 1, PI / 2]], period=PI)
