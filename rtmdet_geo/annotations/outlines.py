"""Outlines of objects: what a mask is before it is cut into pixels.

An outline is a tuple of parts, a part a tuple of rings, a ring an (M, 2) array of x, y in px (structures.py: origin at
the outer corner of the top-left pixel), closed or not. A point is inside a part if a ray from it crosses the part's
rings an odd number of times, so further rings cut holes; it is inside the outline if it is inside any part.

A pixel belongs to the mask if its centre is inside. Outlines that share an edge share no pixel and leave none out, and
:func:`trace_mask` and :func:`fill_outline` are inverse to each other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rtmdet_geo.jit import compiled

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
MaskArray = NDArray[np.uint8]
Outline: TypeAlias = tuple[tuple[FloatArray, ...], ...]

#: Decimals of px in which outlines are stored.
_DECIMALS = 3


class Window(NamedTuple):
    """A rectangle of whole pixels."""

    x: int
    y: int
    width: int
    height: int


def as_outline(parts: Iterable[Iterable[ArrayLike]]) -> Outline:
    """Return parts of rings, each (M, 2) or flat x, y, x, y, ..., as an outline; rings of fewer than 3 points go.

    Raises:
        ValueError: a ring has no pairs of numbers, or one that is not finite.
    """
    outline = []
    for part in parts:
        rings = [np.ascontiguousarray(ring, np.float64).reshape(-1, 2) for ring in part]
        if not all(np.isfinite(ring).all() for ring in rings):
            raise ValueError("an outline holds coordinates that are not finite")
        rings = [ring for ring in rings if len(ring) >= 3]
        if rings:
            outline.append(tuple(rings))
    return tuple(outline)


def outline_to_lists(outline: Outline) -> list[list[list[float]]]:
    """Return an outline for a json file: per part, per ring, x, y, x, y, ... to a thousandth of a px.

    :func:`as_outline` reads it back.
    """
    return [[(ring.round(_DECIMALS) + 0.0).ravel().tolist() for ring in part] for part in outline]


def outline_points(outline: Outline) -> FloatArray:
    """Return the corners of all rings, (M, 2) x, y in px; (0, 2) for an empty outline."""
    rings = [ring for part in outline for ring in part]
    return np.concatenate(rings) if rings else np.zeros((0, 2))


def transform_outline(outline: Outline, matrix: ArrayLike) -> Outline:
    """Return the outline moved by an affine transform (2, 3): matrix @ (x, y, 1)."""
    matrix = np.asarray(matrix, np.float64)
    return tuple(tuple(ring @ matrix[:, :2].T + matrix[:, 2] for ring in part) for part in outline)


def fill_outline(outline: Outline, window: Window) -> MaskArray:
    """Cut an outline into the pixels of a window.

    Args:
        outline: in px of the image.
        window: of the image; may lie anywhere.

    Returns:
        (window.height, window.width) uint8, 1 where the pixel's centre is inside the outline.
    """
    mask = np.zeros((window.height, window.width), np.uint8)
    for part in outline:
        ends = np.cumsum([len(ring) for ring in part])
        points = np.concatenate(part) - (window.x, window.y)
        _fill(np.ascontiguousarray(points), np.asarray(ends, np.int64), mask)
    return mask


def pixel_window(outline: Outline, width: int, height: int) -> Window:
    """Return the smallest window that holds all pixels of an outline that lie in an image of width x height px."""
    points = outline_points(outline)
    if len(points) == 0:
        return Window(0, 0, 0, 0)
    x0, y0 = np.clip(np.floor(points.min(axis=0)), 0, (width, height)).astype(int).tolist()
    x1, y1 = np.clip(np.ceil(points.max(axis=0)), 0, (width, height)).astype(int).tolist()
    return Window(x0, y0, x1 - x0, y1 - y0)


def visible_bounds(outline: Outline, width: float, height: float) -> FloatArray | None:
    """Return the bounds of what an image of width x height px shows of an outline.

    Its extreme points are corners of the outline inside the image, points where it crosses the image's edges, and
    corners of the image inside the outline.

    Returns:
        (4,) x1, y1, x2, y2 in px, within the image; None if it shows nothing.
    """
    found = []
    for part in outline:
        begin = np.concatenate(part)
        end = np.concatenate([np.roll(ring, -1, axis=0) for ring in part])
        found += [_clipped_ends(begin, end, width, height), _image_corners_inside(begin, end, width, height)]
    points = np.concatenate(found) if found else np.zeros((0, 2))
    return np.concatenate((points.min(axis=0), points.max(axis=0))) if len(points) else None


def clip_outline(outline: Outline, width: float, height: float) -> Outline:
    """Return what of an outline lies in an image of width x height px (Sutherland and Hodgman 1974, ring by ring).

    Where a ring leaves the image and comes back, its pieces stay connected along the image's edge, by lines without
    area: :func:`fill_outline` is exact, corners may be more than needed. An outline within the image is returned
    as it is.
    """
    points = outline_points(outline)
    if (points >= 0).all() and (points <= (width, height)).all():
        return outline
    parts = []
    for part in outline:
        rings = part
        for axis, limit, sign in ((0, 0.0, 1), (0, width, -1), (1, 0.0, 1), (1, height, -1)):
            rings = tuple(_clip_ring(ring, axis, limit, sign) for ring in rings)
        rings = tuple(ring for ring in rings if len(ring) >= 3)
        if rings:
            parts.append(rings)
    return tuple(parts)


def trace_mask(mask: NDArray[Any]) -> Outline:
    """Return the outline of a mask along the edges of its pixels; all rings are one part.

    Args:
        mask: (H, W), nonzero inside.

    Returns:
        Outline in px, () for an empty mask.
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if len(rows) == 0:
        return ()
    y, x = int(rows[0]), int(columns[0])
    cut = np.pad(mask[y : rows[-1] + 1, x : columns[-1] + 1] != 0, 1)
    corners, ends = _trace(cut)
    moved = corners + np.array([x - 1.0, y - 1.0])
    return (tuple(np.split(moved, ends[:-1])),)


def mask_bounds(mask: NDArray[Any]) -> FloatArray | None:
    """Return the bounds (4,) x1, y1, x2, y2 in px of a mask's (H, W) pixels; None for an empty mask."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if len(rows) == 0:
        return None
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float64)


def outline_area(outline: Outline) -> float:
    """Return the area in px^2 of the pixels of an outline, as :func:`trace_mask` and :func:`join_outlines` make it."""
    if len(outline) > 1:  # parts may overlap
        return float(count_common_pixels(outline, outline))
    return float(sum(_signed_area(ring) for part in outline for ring in part))  # holes run the other way


def count_common_pixels(first: Outline, second: Outline, window: Window | None = None) -> int:
    """Return how many pixels two outlines share, within a window if one is given."""
    low, high = _bounds(outline_points(first)), _bounds(outline_points(second))
    x0, y0, x1, y1 = (*np.maximum(low[:2], high[:2]), *np.minimum(low[2:], high[2:]))
    if window is not None:
        x0, y0 = max(x0, window.x), max(y0, window.y)
        x1, y1 = min(x1, window.x + window.width), min(y1, window.y + window.height)
    if x1 <= x0 or y1 <= y0:
        return 0
    common = Window(int(x0), int(y0), int(x1 - x0), int(y1 - y0))
    return int(np.count_nonzero(fill_outline(first, common) & fill_outline(second, common)))


def join_outlines(outlines: Iterable[Outline]) -> Outline:
    """Return the outline of all pixels that any of the outlines covers: the parts of all, which may overlap."""
    return tuple(part for outline in outlines for part in outline)


def _signed_area(ring: FloatArray) -> float:
    """Return the area of a ring (M, 2); positive if it runs clockwise on screen."""
    x, y = ring[:, 0] - ring[0, 0], ring[:, 1] - ring[0, 1]
    return float(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2


def _bounds(points: FloatArray) -> IntArray:
    """Return x0, y0, x1, y1 of the whole pixels around points (M, 2); zeros for none."""
    if not len(points):
        return np.zeros(4, np.int64)
    return np.concatenate((np.floor(points.min(axis=0)), np.ceil(points.max(axis=0)))).astype(np.int64)


def _clip_ring(ring: FloatArray, axis: int, limit: float, sign: int) -> FloatArray:
    """Return the part of a ring (M, 2) with ``sign * (coordinate - limit) >= 0``."""
    depth = sign * (ring[:, axis] - limit)
    if (depth >= 0).all():
        return ring
    corners = []
    for i in range(len(ring)):
        if (depth[i] >= 0) != (depth[i - 1] >= 0):
            crossing = ring[i - 1] + depth[i - 1] / (depth[i - 1] - depth[i]) * (ring[i] - ring[i - 1])
            crossing[axis] = limit
            corners.append(crossing)
        if depth[i] >= 0:
            corners.append(ring[i])
    return np.array(corners, np.float64).reshape(-1, 2)


def _clipped_ends(begin: FloatArray, end: FloatArray, width: float, height: float) -> FloatArray:
    """Return the ends (2 K, 2) of those of the segments that run through the image (Liang and Barsky 1984)."""
    step = end - begin
    low, high = np.zeros(len(begin)), np.ones(len(begin))
    with np.errstate(divide="ignore", invalid="ignore"):
        for axis, limit in ((0, width), (1, height)):
            first, last = -begin[:, axis] / step[:, axis], (limit - begin[:, axis]) / step[:, axis]
            first, last = np.minimum(first, last), np.maximum(first, last)
            is_level = step[:, axis] == 0
            is_inside = (begin[:, axis] >= 0) & (begin[:, axis] <= limit)
            low = np.maximum(low, np.where(is_level, np.where(is_inside, 0.0, 2.0), first))
            high = np.minimum(high, np.where(is_level, 1.0, last))
    seen = low < high
    ends = np.concatenate((begin + low[:, None] * step, begin + high[:, None] * step))[np.tile(seen, 2)]
    return np.asarray(np.clip(ends, 0, (width, height)))


def _image_corners_inside(begin: FloatArray, end: FloatArray, width: float, height: float) -> FloatArray:
    corners = np.array([[0.0, 0.0], [width, 0.0], [0.0, height], [width, height]])
    x, y = corners[:, 0, None], corners[:, 1, None]
    crosses = (begin[:, 1] <= y) != (end[:, 1] <= y)
    rise = np.where(end[:, 1] == begin[:, 1], 1.0, end[:, 1] - begin[:, 1])
    at = begin[:, 0] + (y - begin[:, 1]) / rise * (end[:, 0] - begin[:, 0])
    return np.asarray(corners[(crosses & (at > x)).sum(axis=1) % 2 == 1])


@compiled
def _fill(points: FloatArray, ring_ends: IntArray, mask: MaskArray) -> None:
    """Set the pixels of one part in ``mask`` (H, W); points (M, 2) are in its px.

    Every edge flips, in each row whose middle it crosses, all pixels whose centre lies to its right; flips are noted
    at the first such pixel and summed up from the left.
    """
    height, width = mask.shape
    flips = np.zeros((height, width + 1), np.uint8)
    start = 0
    for end in ring_ends:
        for i in range(start, end):
            j = i + 1 if i + 1 < end else start
            if points[i, 1] <= points[j, 1]:  # the same arithmetic in either direction
                x0, y0, x1, y1 = points[i, 0], points[i, 1], points[j, 0], points[j, 1]
            else:
                x0, y0, x1, y1 = points[j, 0], points[j, 1], points[i, 0], points[i, 1]
            first = int(min(max(math.ceil(y0 - 0.5), 0.0), float(height)))
            last = int(min(max(math.ceil(y1 - 0.5), 0.0), float(height)))
            for row in range(first, last):
                x = x0 + (row + 0.5 - y0) / (y1 - y0) * (x1 - x0)
                flips[row, int(min(max(math.ceil(x - 0.5), 0.0), float(width)))] ^= 1
        start = end
    for row in range(height):
        inside = np.uint8(0)
        for column in range(width):
            inside ^= flips[row, column]
            mask[row, column] |= inside


#: Steps right, down, left, up, in this order on screen: adding 1 turns right.
_STEP_X, _STEP_Y = (1, 0, -1, 0), (0, 1, 0, -1)


@compiled
def _trace(mask: NDArray[np.bool_]) -> tuple[IntArray, IntArray]:
    """Walk around the pixels of a mask (H, W) with an empty border, object on the right.

    Returns:
        Corners (M, 2) x, y of all rings one after another, and where each ring ends.
    """
    height, width = mask.shape
    leaves = np.zeros((height + 1, width + 1, 4), np.bool_)  # an edge starts at this corner in this direction
    for row in range(height):
        for column in range(width):
            if mask[row, column]:
                leaves[row, column, 0] = not mask[row - 1, column]
                leaves[row, column + 1, 1] = not mask[row, column + 1]
                leaves[row + 1, column + 1, 2] = not mask[row + 1, column]
                leaves[row + 1, column, 3] = not mask[row, column - 1]
    walked = np.zeros_like(leaves)
    xs, ys, ends = [0][:0], [0][:0], [0][:0]  # empty lists of integers, for the compiler
    for start_y in range(height + 1):
        for start_x in range(width + 1):
            if not leaves[start_y, start_x, 0] or walked[start_y, start_x, 0]:
                continue
            x, y, direction, previous = start_x, start_y, 0, -1
            while not walked[y, x, direction]:
                walked[y, x, direction] = True
                if direction != previous:
                    xs.append(x)
                    ys.append(y)
                previous = direction
                x, y = x + _STEP_X[direction], y + _STEP_Y[direction]
                for turn in (1, 0, 3):  # right first: pixels that touch at a corner stay apart
                    if leaves[y, x, (previous + turn) % 4]:
                        direction = (previous + turn) % 4
                        break
            ends.append(len(xs))
    corners = np.empty((len(xs), 2), np.int64)
    for i in range(len(xs)):
        corners[i] = xs[i], ys[i]
    return corners, np.array(ends, np.int64)
