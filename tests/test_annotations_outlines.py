"""Outlines and masks: inverse to each other, no pixel twice or left out, bounds as pixel counts say."""

from __future__ import annotations

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rtmdet_geo.annotations.outlines import (
    Window,
    as_outline,
    clip_outline,
    fill_outline,
    mask_bounds,
    outline_points,
    outline_to_lists,
    pixel_window,
    trace_mask,
    transform_outline,
    visible_bounds,
)

masks = arrays(bool, st.tuples(st.integers(1, 24), st.integers(1, 24)))
SQUARE_WITH_HOLE = as_outline([[[[2, 2], [12, 2], [12, 12], [2, 12]], [[5, 5], [5, 9], [9, 9], [9, 5]]]])


def polygon(seed, count=9, centre=(32, 32), radius=25):
    """A star-shaped polygon with ``count`` corners; it never crosses itself."""
    rng = np.random.default_rng(seed)
    angle = (np.arange(count) + rng.uniform(0, 0.9, count)) * 2 * np.pi / count
    length = rng.uniform(0.2, 1, count) * radius
    return np.column_stack((centre[0] + length * np.cos(angle), centre[1] + length * np.sin(angle)))


@settings(deadline=None, max_examples=60)
@given(masks)
def test_trace_and_fill_are_inverse(mask):
    outline = trace_mask(mask)
    height, width = mask.shape
    np.testing.assert_array_equal(fill_outline(outline, Window(0, 0, width, height)), mask)
    for part in outline:
        for ring in part:
            step = np.abs(np.roll(ring, -1, axis=0) - ring)
            assert len(ring) >= 4 and ((step > 0).sum(axis=1) == 1).all()  # along pixel edges, each corner a turn
    area = sum(signed_area(ring) for part in outline for ring in part)
    assert area == mask.sum()


def signed_area(ring):
    x, y = ring.T
    return float((x * np.roll(y, -1) - np.roll(x, -1) * y).sum() / 2)


def test_trace_by_hand():
    mask = np.zeros((5, 6), bool)
    mask[1:4, 2:5] = True
    mask[2, 3] = False
    (part,) = trace_mask(mask)
    assert [ring.tolist() for ring in part] == [
        [[2, 1], [5, 1], [5, 4], [2, 4]],  # clockwise on screen
        [[3, 3], [4, 3], [4, 2], [3, 2]],  # the hole the other way round
    ]
    assert trace_mask(np.zeros((3, 3), bool)) == ()
    touching = np.eye(2, dtype=bool)
    assert [len(ring) for ring in trace_mask(touching)[0]] == [4, 4]


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(3, 12), st.floats(-20, 20), st.floats(-20, 20))
def test_a_pixel_is_inside_if_its_centre_is(seed, count, dx, dy):
    ring = polygon(seed, count) + np.array([dx, dy])
    mask = fill_outline(as_outline([[ring]]), Window(0, 0, 64, 48))
    y, x = np.mgrid[0:48, 0:64] + 0.5
    np.testing.assert_array_equal(mask, shapely.contains_xy(shapely.Polygon(ring), x, y))
    # A window sees what the whole sees there.
    np.testing.assert_array_equal(fill_outline(as_outline([[ring]]), Window(10, 5, 30, 20)), mask[5:25, 10:40])


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.booleans())
def test_neighbours_share_no_pixel_and_leave_none_out(seed, count, on_centres):
    """A plane cut into triangles: every pixel belongs to exactly one, also where corners lie on pixel centres."""
    points = np.random.default_rng(seed).uniform(0, 64, (count, 2))
    if on_centres:
        points = np.floor(points) + 0.5
    frame = [[-100, -90], [200, -110], [190, 170], [-80, 160]]
    triangles = shapely.get_parts(shapely.delaunay_triangles(shapely.MultiPoint([*points, *frame])))
    total = np.zeros((64, 64), int)
    for number, triangle in enumerate(triangles):
        ring = shapely.get_coordinates(triangle)
        total += fill_outline(as_outline([[ring[:: -1 if number % 2 else 1]]]), Window(0, 0, 64, 64))
    assert (total == 1).all()


def test_holes_and_parts():
    mask = fill_outline(SQUARE_WITH_HOLE, Window(0, 0, 16, 16))
    assert mask.sum() == 100 - 16 and not mask[5:9, 5:9].any() and mask.dtype == np.uint8
    # Parts add up even where they overlap; the rings of one part do not.
    two = [[0, 0, 4, 0, 4, 4, 0, 4], [2, 2, 6, 2, 6, 6, 2, 6]]
    assert fill_outline(as_outline([[two[0]], [two[1]]]), Window(0, 0, 8, 8)).sum() == 28
    assert fill_outline(as_outline([two]), Window(0, 0, 8, 8)).sum() == 24
    assert fill_outline((), Window(0, 0, 8, 8)).sum() == 0
    assert fill_outline(SQUARE_WITH_HOLE, Window(50, 50, 8, 8)).sum() == 0
    assert fill_outline(SQUARE_WITH_HOLE, Window(0, 0, 0, 0)).shape == (0, 0)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(3, 10), st.floats(-30, 60), st.floats(-30, 60))
def test_visible_bounds_are_those_of_the_intersection(seed, count, x, y):
    ring = polygon(seed, count, centre=(x, y))
    seen = shapely.intersection(shapely.Polygon(ring), shapely.box(0, 0, 40, 30))
    found = visible_bounds(as_outline([[ring]]), 40, 30)
    if seen.area > 1e-9:
        np.testing.assert_allclose(found, seen.bounds, atol=1e-6)
    elif found is not None:
        assert (found[2] - found[0]) * (found[3] - found[1]) < 1e-6


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(3, 10), st.floats(-30, 60), st.floats(-30, 60))
def test_clipping_keeps_what_is_inside_and_nothing_else(seed, count, x, y):
    outline = as_outline([[polygon(seed, count, centre=(x, y)), polygon(seed + 1, 4, centre=(x, y))]])
    clipped = clip_outline(outline, 40, 30)
    inside = Window(0, 0, 40, 30)
    np.testing.assert_array_equal(fill_outline(clipped, inside), fill_outline(outline, inside))
    points = outline_points(clipped)
    assert (points >= 0).all() and (points <= (40, 30)).all()
    if (outline_points(outline) >= 0).all() and (outline_points(outline) <= (40, 30)).all():
        assert all(np.array_equal(a, b) for a, b in zip(clipped[0], outline[0], strict=True))


def test_clipping_by_hand():
    ((ring, hole),) = clip_outline(SQUARE_WITH_HOLE, 7, 30)
    assert sorted(map(tuple, ring)) == [(2, 2), (2, 12), (7, 2), (7, 12)]
    assert sorted(map(tuple, hole)) == [(5, 5), (5, 9), (7, 5), (7, 9)]
    assert clip_outline(SQUARE_WITH_HOLE, 40, 30) is SQUARE_WITH_HOLE
    assert clip_outline(SQUARE_WITH_HOLE, 1, 1) == () == clip_outline((), 9, 9)


def test_visible_bounds_by_hand():
    assert visible_bounds(SQUARE_WITH_HOLE, 16, 16).tolist() == [2, 2, 12, 12]
    assert visible_bounds(SQUARE_WITH_HOLE, 7, 30).tolist() == [2, 2, 7, 12]
    assert visible_bounds(as_outline([[[-9, -9, 99, -9, 99, 99, -9, 99]]]), 7, 30).tolist() == [0, 0, 7, 30]
    assert visible_bounds(as_outline([[[50, 50, 60, 50, 60, 60]]]), 7, 30) is None
    assert visible_bounds((), 7, 30) is None
    # The image lies inside the hole.
    moved = transform_outline(SQUARE_WITH_HOLE, [[1, 0, -6], [0, 1, -6]])
    assert visible_bounds(moved, 2, 2) is None


@settings(deadline=None, max_examples=60)
@given(masks)
def test_bounds_of_masks_and_outlines_agree(mask):
    outline, bounds = trace_mask(mask), mask_bounds(mask)
    if bounds is None:
        assert outline == () and not mask.any()
        return
    points = outline_points(outline)
    assert bounds.tolist() == [*points.min(axis=0), *points.max(axis=0)]
    window = pixel_window(outline, mask.shape[1], mask.shape[0])
    assert [window.x, window.y, window.x + window.width, window.y + window.height] == bounds.tolist()
    assert fill_outline(outline, window).sum() == mask.sum()


def test_a_window_is_cut_to_the_image():
    assert pixel_window(as_outline([[[-5, 3.5, 9.2, 3.5, 9.2, 90]]]), 20, 30) == (0, 3, 10, 27)
    assert pixel_window(as_outline([[[50, 3, 90, 3, 90, 9]]]), 20, 30)[2] == 0
    assert pixel_window((), 20, 30) == (0, 0, 0, 0)


def test_lists_survive_a_round_trip_to_a_thousandth():
    outline = as_outline([[polygon(1), polygon(2)], [polygon(3)]])
    again = as_outline(outline_to_lists(outline))
    assert [len(part) for part in again] == [2, 1]
    for part, other in zip(outline, again, strict=True):
        for ring, same in zip(part, other, strict=True):
            np.testing.assert_allclose(ring, same, atol=5.1e-4)
    assert outline_to_lists(as_outline([[[-1e-5, 0, 1, 0, 1, 1]]]))[0][0][0] == 0  # not -0.0


def test_what_is_no_ring():
    assert as_outline([[[0, 0, 1, 1]], [[], [0, 0, 1, 0, 1, 1]]])[0][0].tolist() == [[0, 0], [1, 0], [1, 1]]
    assert as_outline([]) == () and as_outline([[[0, 0, 1, 1]]]) == ()
    with pytest.raises(ValueError, match="not finite"):
        as_outline([[[0, 0, 1, float("nan"), 1, 1]]])
    with pytest.raises(ValueError, match="reshape"):
        as_outline([[[0, 0, 1]]])
