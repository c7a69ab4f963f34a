"""Rotated boxes: the one angle convention, and conversions between boxes, polygons and horizontal boxes. numpy only.

A box is ``cx, cy, w, h`` in pixels and an angle in radians. The angle turns the w axis **clockwise on screen** (x to
the right, y down); le90, the convention of all results, makes w the long side and the angle lie in [-pi/2, pi/2)::

    o----> x    p3 _____w_____ p2     angle 0     u = ( cos a, sin a)  along w     p1 = centre + w/2 u + h/2 v
    |             |           |                   v = (-sin a, cos a)  along h     p2 = centre + w/2 u - h/2 v
    v             |___________| h                                                  p3 = centre - w/2 u - h/2 v
    y           p4             p1                                                  p4 = centre - w/2 u + h/2 v

:mod:`rtmdet_geo.structures` states the same convention for detections. Every function takes anything that numpy turns
into an array, computes and returns **float64**, leaves its arguments alone and accepts N = 0. Functions that move boxes
(flip, rotate, rescale) keep the meaning of w and h and do not regularise: call :func:`regularize_le90` on their result
where le90 is wanted.

Behaviour follows mmrotate 1.x ``structures/bbox`` (RotatedBoxes, QuadriBoxes), in float64.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]
FlipDirection = Literal["horizontal", "vertical", "diagonal"]

#: Corner signs along (w axis, h axis), in the order in which mmrotate's rbox2qbox lists the corners.
_CORNER_SIGNS = np.array([[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0], [-1.0, 1.0]])
#: The six point pairs of a quadrilateral: every edge of its convex hull is one of them.
_QUAD_FROM = np.array([0, 1, 2, 3, 0, 1])
_QUAD_TO = np.array([1, 2, 3, 0, 2, 3])
#: Areas that differ by less are equal but for rounding.
_AREA_TIE = 1e-9
#: Hull edges handled at a time by minimum_area_rectangle; bounds its memory.
_EDGE_CHUNK = 256


def as_boxes(boxes: ArrayLike, *, columns: int = 5, name: str = "boxes") -> FloatArray:
    """Return ``boxes`` as a contiguous float64 array of shape (N, columns); any empty array gives (0, columns).

    Raises:
        ValueError: the shape is another one.
    """
    array = np.ascontiguousarray(boxes, np.float64)
    if array.size == 0:
        return array.reshape(0, columns)
    if array.ndim != 2 or array.shape[1] != columns:
        raise ValueError(f"{name} has shape {array.shape}; give an (N, {columns}) array")
    return array


def as_polygons(polygons: ArrayLike) -> FloatArray:
    """Return quadrilaterals given as (N, 4, 2) or (N, 8) as a float64 array (N, 4, 2).

    Raises:
        ValueError: the shape is another one.
    """
    array = np.ascontiguousarray(polygons, np.float64)
    if array.size == 0:
        return array.reshape(0, 4, 2)
    if array.shape[1:] not in ((4, 2), (8,)):
        raise ValueError(f"polygons has shape {array.shape}; give an (N, 4, 2) or (N, 8) array")
    return array.reshape(-1, 4, 2)


def normalize_angle(angle_rad: ArrayLike) -> FloatArray:
    """Wrap angles in rad into [-pi/2, pi/2), the same line turned by multiples of pi. Any shape."""
    half_turn = np.pi / 2
    wrapped = np.mod(np.asarray(angle_rad, np.float64) + half_turn, np.pi) - half_turn
    # np.mod of a tiny negative number rounds to pi itself
    return np.where(wrapped >= half_turn, -half_turn, wrapped)


def regularize_le90(boxes: ArrayLike) -> FloatArray:
    """Return the same rectangles in le90: w > h, angle in [-pi/2, pi/2).

    A square has two such forms; like mmrotate's ``regularize_boxes`` this takes the one turned by pi/2 from the input.

    Args:
        boxes: (N, 5) cx, cy, w, h in px, angle in rad.

    Returns:
        (N, 5) float64.
    """
    boxes = as_boxes(boxes)
    width, height, angle = boxes[:, 2], boxes[:, 3], boxes[:, 4]
    is_wide = width > height
    result = boxes.copy()
    result[:, 2] = np.where(is_wide, width, height)
    result[:, 3] = np.where(is_wide, height, width)
    result[:, 4] = normalize_angle(np.where(is_wide, angle, angle + np.pi / 2))
    return result


def box_areas(boxes: ArrayLike) -> FloatArray:
    """Return the areas w * h in px², (N,); negative where exactly one of the sides is negative."""
    boxes = as_boxes(boxes)
    return np.asarray(boxes[:, 2] * boxes[:, 3])


def _axes(boxes: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return the half side vectors along w and along h, (N, 2) each."""
    cos, sin = np.cos(boxes[:, 4]), np.sin(boxes[:, 4])
    half_width = boxes[:, 2:3] / 2 * np.stack([cos, sin], axis=1)
    half_height = boxes[:, 3:4] / 2 * np.stack([-sin, cos], axis=1)
    return half_width, half_height


def boxes_to_polygons(boxes: ArrayLike) -> FloatArray:
    """Return the corners p1..p4 of the drawing above, (N, 4, 2) x y in px (mmrotate rbox2qbox)."""
    boxes = as_boxes(boxes)
    axes = np.stack(_axes(boxes), axis=1)  # (N, 2 axes, 2)
    return np.asarray(boxes[:, None, :2] + _CORNER_SIGNS @ axes)


def boxes_to_hboxes(boxes: ArrayLike) -> FloatArray:
    """Return the enclosing horizontal boxes, (N, 4) x1 y1 x2 y2 in px (mmrotate rbox2hbox)."""
    boxes = as_boxes(boxes)
    half_width, half_height = _axes(boxes)
    extent = np.abs(half_width) + np.abs(half_height)
    return np.concatenate([boxes[:, :2] - extent, boxes[:, :2] + extent], axis=1)


def hboxes_to_boxes(hboxes: ArrayLike) -> FloatArray:
    """Return horizontal boxes (N, 4) x1 y1 x2 y2 as (N, 5) with angle 0; w stays along x even where it is shorter."""
    hboxes = as_boxes(hboxes, columns=4, name="hboxes")
    low, high = hboxes[:, :2], hboxes[:, 2:]
    return np.concatenate([low + (high - low) / 2, high - low, np.zeros((len(hboxes), 1))], axis=1)


def polygons_to_hboxes(polygons: ArrayLike) -> FloatArray:
    """Return the enclosing horizontal boxes of quadrilaterals, (N, 4) x1 y1 x2 y2 in px (mmrotate qbox2hbox)."""
    polygons = as_polygons(polygons)
    return np.concatenate([polygons.min(axis=1), polygons.max(axis=1)], axis=1)


def _smallest(along: FloatArray, across: FloatArray) -> NDArray[np.int64]:
    """Return the column of the least area in side lengths (N, D); among equal areas the least perimeter decides.

    Equal areas are common, not a curiosity: all three rectangles on the edges of a triangle have twice its area.
    """
    area = along * across
    is_least = area <= area.min(axis=1, keepdims=True) * (1 + _AREA_TIE)
    best: NDArray[np.int64] = np.argmin(np.where(is_least, along + across, np.inf), axis=1)
    return best


def _best_rectangle(points: FloatArray, directions: FloatArray) -> FloatArray:
    """Return the smallest of the rectangles around ``points`` that have a side along one of ``directions``.

    Args:
        points: (N, P, 2).
        directions: (N, D, 2), any length; a zero vector stands for (1, 0).

    Returns:
        (N, 5) with w >= h and an angle in [-pi/2, pi/2).
    """
    length = np.hypot(directions[..., 0], directions[..., 1])[..., None]
    unit = np.where(length > 0, directions, [1.0, 0.0]) / np.where(length > 0, length, 1.0)  # (N, D, 2)
    normal = np.stack([-unit[..., 1], unit[..., 0]], axis=-1)
    along = unit @ points.transpose(0, 2, 1)  # (N, D, P)
    across = normal @ points.transpose(0, 2, 1)
    along_low, along_high = along.min(axis=2), along.max(axis=2)
    across_low, across_high = across.min(axis=2), across.max(axis=2)
    best = _smallest(along_high - along_low, across_high - across_low)
    rows = np.arange(len(points))
    unit, normal = unit[rows, best], normal[rows, best]
    u_low, u_high = along_low[rows, best], along_high[rows, best]
    v_low, v_high = across_low[rows, best], across_high[rows, best]
    centre = ((u_low + u_high) / 2)[:, None] * unit + ((v_low + v_high) / 2)[:, None] * normal
    sides = np.stack([u_high - u_low, v_high - v_low], axis=1)
    angle = np.arctan2(unit[:, 1], unit[:, 0])
    is_wide = sides[:, 0] >= sides[:, 1]
    angle = normalize_angle(np.where(is_wide, angle, angle + np.pi / 2))
    return np.concatenate([centre, np.sort(sides, axis=1)[:, ::-1], angle[:, None]], axis=1)


def polygons_to_boxes(polygons: ArrayLike) -> FloatArray:
    """Return the rectangle of least area around each quadrilateral, in le90.

    The least rectangle has a side along an edge of the convex hull (Freeman and Shapira 1975); all six point pairs are
    tried, so concave, crossed and degenerate quadrilaterals are right as well. A segment gives h = 0 along itself, a
    point w = h = 0. The form of a square is ambiguous; the first edge's angle, wrapped, is taken. Of several
    rectangles of equal area the one of least perimeter is taken.

    Args:
        polygons: (N, 4, 2) or (N, 8) x y in px, any vertex order.

    Returns:
        (N, 5) float64, w >= h.
    """
    polygons = as_polygons(polygons)
    origin = polygons[:, :1]
    points = polygons - origin  # locally centred: scene coordinates cost no digits
    result = _best_rectangle(points, points[:, _QUAD_TO] - points[:, _QUAD_FROM])
    result[:, :2] += origin[:, 0]
    return result


def convex_hull(points: ArrayLike) -> FloatArray:
    """Return the convex hull of (M, 2) points without collinear vertices, (H, 2) (Andrew's monotone chain)."""
    ordered: list[list[float]] = np.unique(as_boxes(points, columns=2, name="points"), axis=0).tolist()
    if len(ordered) < 3:
        return np.array(ordered, np.float64).reshape(-1, 2)
    chains: list[list[list[float]]] = []
    for sequence in (ordered, ordered[::-1]):
        chain: list[list[float]] = []
        for x, y in sequence:
            while len(chain) >= 2:
                (ax, ay), (bx, by) = chain[-2], chain[-1]
                if (bx - ax) * (y - ay) - (by - ay) * (x - ax) > 0:
                    break
                chain.pop()
            chain.append([x, y])
        chains.append(chain[:-1])
    return np.array(chains[0] + chains[1], np.float64)


def minimum_area_rectangle(points: ArrayLike) -> FloatArray:
    """Return the rectangle of least area around (M, 2) points x y in px, such as the outline of a mask.

    Returns:
        (5,) cx, cy, w, h, angle in le90; degenerate sets as in :func:`polygons_to_boxes`.

    Raises:
        ValueError: there is no point.
    """
    array = as_boxes(points, columns=2, name="points")
    if len(array) == 0:
        raise ValueError("minimum_area_rectangle needs at least one point")
    origin = array[0]
    hull = convex_hull(array - origin)
    edges = np.roll(hull, -1, axis=0) - hull
    candidates = np.array(
        [
            _best_rectangle(hull[None], edges[None, start : start + _EDGE_CHUNK])[0]
            for start in range(0, len(edges), _EDGE_CHUNK)
        ]
    )
    best = np.asarray(candidates[_smallest(candidates[None, :, 2], candidates[None, :, 3])[0]])
    best[:2] += origin
    return best


def translate_boxes(boxes: ArrayLike, offset_x: float, offset_y: float) -> FloatArray:
    """Return boxes (N, 5) moved by an offset in px."""
    return np.asarray(as_boxes(boxes) + np.array([offset_x, offset_y, 0.0, 0.0, 0.0]))


def rescale_boxes(
    boxes: ArrayLike, scale_x: float, scale_y: float, *, follow: Literal["long", "h"] = "long"
) -> FloatArray:
    """Return boxes (N, 5) in coordinates multiplied by ``scale_x`` and ``scale_y`` (> 0).

    With equal factors this is exact. With unequal ones a rectangle becomes a parallelogram: each side is scaled along
    its own direction, and the box can follow the direction of one of them only. The default is the long side, so that
    the heading of a ship stays right on pixels that are not square.

    Args:
        boxes: (N, 5) cx, cy, w, h in px, angle in rad.
        scale_x: factor of x.
        scale_y: factor of y.
        follow: "long" keeps the direction of the longer side (of w where they are equal), "h" that of the h side, which
            is what mmrotate's ``RotatedBoxes.rescale_`` does for every box.

    Returns:
        (N, 5) float64; w and h keep their meaning, the angle is not wrapped to le90.

    Raises:
        ValueError: a factor is not positive and finite, or ``follow`` is unknown.
    """
    boxes = as_boxes(boxes)
    if not (0 < scale_x < np.inf and 0 < scale_y < np.inf):
        raise ValueError(f"scale factors ({scale_x!r}, {scale_y!r}) must be positive and finite")
    if follow not in ("long", "h"):
        raise ValueError(f"unknown follow {follow!r}; use 'long' or 'h'")
    cos, sin = np.cos(boxes[:, 4]), np.sin(boxes[:, 4])
    along_w = np.arctan2(scale_y * sin, scale_x * cos)
    along_h = np.arctan2(scale_x * sin, scale_y * cos)  # the h side runs along (-sin, cos)
    is_w = boxes[:, 2] >= boxes[:, 3] if follow == "long" else np.zeros(len(boxes), bool)
    angle = boxes[:, 4] if scale_x == scale_y else np.where(is_w, along_w, along_h)
    return np.stack(
        [
            boxes[:, 0] * scale_x,
            boxes[:, 1] * scale_y,
            boxes[:, 2] * np.hypot(scale_x * cos, scale_y * sin),
            boxes[:, 3] * np.hypot(scale_x * sin, scale_y * cos),
            angle,
        ],
        axis=1,
    )


def flip_boxes(boxes: ArrayLike, width: float, height: float, direction: FlipDirection) -> FloatArray:
    """Return boxes (N, 5) of the mirrored image (mmrotate ``RotatedBoxes.flip_``); the angle is not wrapped.

    Args:
        boxes: (N, 5).
        width: width of the image in px.
        height: height of the image in px.
        direction: "horizontal" mirrors x, "vertical" y, "diagonal" both (a half turn: the angle stays).

    Raises:
        ValueError: unknown direction.
    """
    if direction not in ("horizontal", "vertical", "diagonal"):
        raise ValueError(f"unknown flip direction {direction!r}; use horizontal, vertical or diagonal")
    flipped = as_boxes(boxes).copy()
    if direction != "vertical":
        flipped[:, 0] = width - flipped[:, 0]
    if direction != "horizontal":
        flipped[:, 1] = height - flipped[:, 1]
    if direction != "diagonal":
        flipped[:, 4] = -flipped[:, 4]
    return flipped


def rotate_boxes(boxes: ArrayLike, angle_rad: float, centre: tuple[float, float]) -> FloatArray:
    """Return boxes (N, 5) turned clockwise on screen about ``centre`` (x, y in px); the angle is not wrapped."""
    rotated = as_boxes(boxes).copy()
    cos, sin = np.cos(angle_rad), np.sin(angle_rad)
    offset = rotated[:, :2] - np.asarray(centre, np.float64)
    rotated[:, :2] = offset @ np.array([[cos, sin], [-sin, cos]]) + np.asarray(centre, np.float64)
    rotated[:, 4] += angle_rad
    return rotated


def project_boxes(boxes: ArrayLike, matrix: ArrayLike) -> FloatArray:
    """Return the le90 least-area rectangles around boxes (N, 5) whose corners a 3 x 3 homography maps.

    The matrix acts on columns (x, y, 1) and the result is divided by its third component (mmrotate
    ``RotatedBoxes.project_``).

    Raises:
        ValueError: the matrix is not 3 x 3.
    """
    homography = np.asarray(matrix, np.float64)
    if homography.shape != (3, 3):
        raise ValueError(f"the matrix has shape {homography.shape}; give a 3 x 3 homography")
    mapped = boxes_to_polygons(boxes) @ homography[:, :2].T + homography[:, 2]
    return polygons_to_boxes(mapped[..., :2] / mapped[..., 2:])


def points_in_boxes(points: ArrayLike, boxes: ArrayLike, *, margin: float = 0.01) -> NDArray[np.bool_]:
    """Tell which points lie in which boxes, at least ``margin`` px from the outline.

    Args:
        points: (M, 2) x y in px.
        boxes: (N, 5).
        margin: in px; 0.01 is mmrotate's ``RotatedBoxes.find_inside_points``.

    Returns:
        (M, N) bool.
    """
    boxes = as_boxes(boxes)
    offset = as_boxes(points, columns=2, name="points")[:, None] - boxes[None, :, :2]  # (M, N, 2)
    cos, sin = np.cos(boxes[:, 4]), np.sin(boxes[:, 4])
    along = np.abs(offset[..., 0] * cos + offset[..., 1] * sin)
    across = np.abs(offset[..., 1] * cos - offset[..., 0] * sin)
    return np.asarray((along <= boxes[:, 2] / 2 - margin) & (across <= boxes[:, 3] / 2 - margin))


def overlapping_pairs(first: FloatArray, second: FloatArray) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return all pairs (i, j) of axis-aligned boxes that overlap, in time and memory linear in boxes and pairs.

    The boxes of ``first`` are sorted into levels by size (powers of two) and, within a level, into columns as wide as
    the largest box; a box of ``second`` then looks up a few columns by binary search.

    Args:
        first: (N, 4) float64 x1 y1 x2 y2.
        second: (M, 4) float64 x1 y1 x2 y2.

    Returns:
        i into ``first`` and j into ``second``, int64, sorted by i, then j.
    """
    empty = np.zeros(0, np.int64)
    if not len(first) or not len(second):
        return empty, empty
    origin = np.minimum(first[:, :2].min(axis=0), second[:, :2].min(axis=0))
    extents = np.maximum(first[:, 2] - first[:, 0], first[:, 3] - first[:, 1])
    levels = np.ceil(np.log2(np.maximum(extents, 16.0))).astype(int)
    found_first, found_second = [empty], [empty]
    for level in np.unique(levels):
        side = 2.0**level
        members = np.flatnonzero(levels == level)
        columns = np.floor((first[members, 0] - origin[0]) / side).astype(np.int64)
        order = np.lexsort((first[members, 1], columns))
        members, columns = members[order], columns[order]
        tops = first[members, 1]
        span = max(tops.max(), second[:, 3].max()) - min(tops.min(), second[:, 1].min()) + 2 * side + 1.0
        base = min(tops.min(), second[:, 1].min() - side)
        keys = columns * span + (tops - base)
        start_column = np.floor((second[:, 0] - side - origin[0]) / side).astype(np.int64)
        num_columns = np.floor((second[:, 2] - origin[0]) / side).astype(np.int64) - start_column + 1
        asked = np.repeat(np.arange(len(second)), num_columns)
        column = (
            start_column[asked] + np.arange(len(asked)) - np.repeat(np.cumsum(num_columns) - num_columns, num_columns)
        )
        begin = np.searchsorted(keys, column * span + (second[asked, 1] - side - base), side="left")
        end = np.searchsorted(keys, column * span + (second[asked, 3] - base), side="right")
        counts = np.maximum(end - begin, 0)
        j = np.repeat(asked, counts)
        i = members[np.repeat(begin, counts) + np.arange(len(j)) - np.repeat(np.cumsum(counts) - counts, counts)]
        overlap = (first[i, :2] < second[j, 2:]).all(axis=1) & (first[i, 2:] > second[j, :2]).all(axis=1)
        found_first.append(i[overlap])
        found_second.append(j[overlap])
    i, j = np.concatenate(found_first), np.concatenate(found_second)
    order = np.lexsort((j, i))
    return i[order].astype(np.int64), j[order].astype(np.int64)
