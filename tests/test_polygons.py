"""Outlines of masks as polygons: exact without a tolerance, valid with one, holes and islands kept."""

from __future__ import annotations

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rtmdet_geo.annotations.outlines import (
    Window,
    count_common_pixels,
    join_outlines,
    outline_area,
    trace_mask,
    transform_outline,
)
from rtmdet_geo.polygons import outlines_to_polygons

MASKS = arrays(np.uint8, st.tuples(st.integers(1, 14), st.integers(1, 14)), elements=st.integers(0, 1)).filter(np.any)


def polygon(mask: np.ndarray, tolerance: float) -> shapely.Geometry:
    (found,) = outlines_to_polygons([trace_mask(mask)], tolerance=tolerance)
    return found


@settings(max_examples=150, deadline=None)
@given(MASKS)
def test_without_tolerance_a_polygon_is_its_pixels(mask):
    found = polygon(mask, 0)
    rows, columns = np.mgrid[0 : mask.shape[0], 0 : mask.shape[1]] + 0.5
    assert found.is_valid and found.area == mask.sum() == outline_area(trace_mask(mask))
    np.testing.assert_array_equal(shapely.contains_xy(found, columns, rows), mask == 1)


@settings(max_examples=150, deadline=None)
@given(MASKS, st.floats(0.1, 4))
def test_simplified_polygons_are_valid_and_near(mask, tolerance):
    exact, found = polygon(mask, 0), polygon(mask, tolerance)
    assert found.is_valid and found.area > 0 and found.geom_type in ("Polygon", "MultiPolygon")
    boundary = shapely.get_coordinates(found)
    assert shapely.distance(shapely.points(boundary), exact.boundary).max() <= tolerance + 1e-9


def test_specks_go_and_the_largest_part_stays():
    mask = np.zeros((30, 40), np.uint8)
    mask[2:22, 2:22] = 1
    mask[10, 10] = 0  # a hole of 1 px, below (2 * 1)^2
    mask[23:30, 26:35] = 1  # a part of 63 px, less than a cell of the mask features
    mask[4:8, 4:8] = 0  # a hole of 16 px
    found = polygon(mask, 1.0)
    assert found.geom_type == "Polygon" and [shapely.Polygon(ring).area for ring in found.interiors] == [16]
    assert len(polygon(mask, 0).geoms) == 2
    speck = np.zeros((5, 5), np.uint8)
    speck[2, 2] = 1
    assert polygon(speck, 3.0).area > 0


def test_an_island_in_a_hole_is_a_part():
    mask = np.ones((30, 30), np.uint8)
    mask[5:25, 5:25] = 0
    mask[10:20, 10:20] = 1
    found = polygon(mask, 1.0)
    assert found.area == 900 - 400 + 100 and len(found.geoms) == 2
    filled = polygon(mask, 11.0)  # the hole is below (2 * 11)^2: gone, and the island with it
    assert filled.geom_type == "Polygon" and not filled.interiors and filled.is_valid


def test_wrong_arguments():
    with pytest.raises(ValueError, match="negative"):
        outlines_to_polygons([], tolerance=-1)
    with pytest.raises(ValueError, match="empty outline"):
        outlines_to_polygons([()])
    assert outlines_to_polygons([]).shape == (0,)


@settings(max_examples=60, deadline=None)
@given(MASKS, MASKS, st.integers(-9, 9), st.integers(-9, 9))
def test_common_pixels_and_union(first, second, dx, dy):
    canvas = np.zeros((2, 40, 40), np.uint8)
    canvas[0, 12 : 12 + first.shape[0], 12 : 12 + first.shape[1]] = first
    canvas[1, 12 + dy : 12 + dy + second.shape[0], 12 + dx : 12 + dx + second.shape[1]] = second
    one, other = trace_mask(canvas[0]), trace_mask(canvas[1])
    assert count_common_pixels(one, other) == (canvas[0] & canvas[1]).sum()
    window = Window(10, 13, 9, 5)
    assert count_common_pixels(one, other, window) == (canvas[0] & canvas[1])[13:18, 10:19].sum()
    joined = join_outlines([one, (), other])
    both = (canvas[0] | canvas[1]).sum()
    assert count_common_pixels(joined, joined) == both == outlines_to_polygons([joined], tolerance=0)[0].area
    far = transform_outline(one, [[1, 0, 100], [0, 1, 0]])
    assert count_common_pixels(far, other) == 0 and outline_area(join_outlines([far, other])) == canvas.sum()


def test_many_holes_cost_little():
    mask = np.ones((240, 240), np.uint8)
    mask[1::3, 1::3] = 0
    (found,) = outlines_to_polygons([trace_mask(mask)], tolerance=0)  # 6,400 holes; pairwise it would take minutes
    assert found.is_valid and len(found.interiors) == 80 * 80 and found.area == mask.sum()
