"""Exact IoU and non-maximum suppression of quadrilaterals of any shape: what DOTA labels and result files hold.

A quadrilateral is four corners ``x1 y1 x2 y2 x3 y3 x4 y4`` in px, in either direction, convex or not. Convex ones are
clipped by one another (Sutherland and Hodgman 1974); others count as two triangles with signs, so that what lies
outside cancels. Coordinates are taken from a corner of the first of the two, in float64: an offset in the scene costs
no digits, and coincident convex quadrilaterals give 1. One whose sides cross counts by its winding numbers, as in
``polyiou.cpp`` of DOTA's development kit; one without area has IoU 0 with everything.

For rectangles see :mod:`rtmdet_geo.nms`, which is quicker.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rtmdet_geo.boxes import as_polygons
from rtmdet_geo.jit import compiled

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

#: Larger numbers are refused: their areas could overflow.
_MAX_MAGNITUDE = 1e100
#: Cheap tests that spare the exact computation allow for this relative rounding error.
_SLACK = 1e-9
#: Columns of a row: the corners in positive order, then these.
_AREA, _CONVEX, _X_LOW, _Y_LOW, _X_HIGH, _Y_HIGH, _NUM_COLUMNS = 8, 9, 10, 11, 12, 13, 14
#: Two polygons, and the one that clips. Clipping by a side at most doubles the four corners, were it not convex.
_WORK_SHAPE = (6, 64)


@compiled
def _doubled_area(corners: FloatArray, is_turned: bool) -> float:
    """Return twice the signed area of corners (4, 2), or of the same in reverse order, less the first of them."""
    first = 3 if is_turned else 0
    x, y = corners[first, 0], corners[first, 1]
    doubled, last_x, last_y = 0.0, 0.0, 0.0
    for k in range(1, 4):  # the terms, and their order, of _clip_area: equal corners give equal areas
        corner = 3 - k if is_turned else k
        next_x, next_y = corners[corner, 0] - x, corners[corner, 1] - y
        doubled += last_x * next_y - next_x * last_y
        last_x, last_y = next_x, next_y
    return doubled


@compiled
def _fill_rows(polygons: FloatArray, rows: FloatArray) -> None:
    """Write corners in positive order, area, whether it is convex, and bounds of polygons (N, 4, 2) into (N, 14)."""
    for i in range(polygons.shape[0]):
        turned = _doubled_area(polygons[i], False)
        for k in range(4):
            source = k if turned >= 0 else 3 - k
            rows[i, 2 * k], rows[i, 2 * k + 1] = polygons[i, source, 0], polygons[i, source, 1]
        rows[i, _AREA], rows[i, _CONVEX] = abs(_doubled_area(polygons[i], turned < 0)) / 2, 1.0
        for axis in range(2):
            rows[i, _X_LOW + axis] = rows[i, _X_HIGH + axis] = polygons[i, 0, axis]
        for k in range(4):
            x, y = rows[i, 2 * k], rows[i, 2 * k + 1]
            ux, uy = rows[i, (2 * k + 2) % 8] - x, rows[i, (2 * k + 3) % 8] - y
            vx, vy = rows[i, (2 * k + 4) % 8] - x - ux, rows[i, (2 * k + 5) % 8] - y - uy
            if ux * vy - uy * vx < 0:
                rows[i, _CONVEX] = 0.0
            rows[i, _X_LOW], rows[i, _X_HIGH] = min(rows[i, _X_LOW], x), max(rows[i, _X_HIGH], x)
            rows[i, _Y_LOW], rows[i, _Y_HIGH] = min(rows[i, _Y_LOW], y), max(rows[i, _Y_HIGH], y)


@compiled
def _load_piece(rows: FloatArray, i: int, piece: int, x: float, y: float, work: FloatArray, place: int) -> float:
    """Write corners of a piece, less (x, y), in positive order into two rows of work; return its sign.

    A convex quadrilateral is one piece of four corners, another one two of three.
    """
    if rows[i, _CONVEX] > 0:
        for k in range(4):
            work[place, k], work[place + 1, k] = rows[i, 2 * k] - x, rows[i, 2 * k + 1] - y
        return 1.0
    ax, ay = rows[i, 0] - x, rows[i, 1] - y
    bx, by = rows[i, 2 * piece + 2] - x, rows[i, 2 * piece + 3] - y
    cx, cy = rows[i, 2 * piece + 4] - x, rows[i, 2 * piece + 5] - y
    sign = 1.0
    if (bx - ax) * (cy - ay) - (by - ay) * (cx - ax) < 0:
        bx, by, cx, cy, sign = cx, cy, bx, by, -1.0
    work[place, 0], work[place + 1, 0] = ax, ay
    work[place, 1], work[place + 1, 1] = bx, by
    work[place, 2], work[place + 1, 2] = cx, cy
    return sign


@compiled
def _clip_area(count: int, num_sides: int, work: FloatArray) -> float:
    """Return the area of the polygon in work[:2, :count] inside the convex one in work[4:, :num_sides]."""
    source, target = 0, 2
    for side in range(num_sides):
        ax, ay = work[4, side], work[5, side]
        ux, uy = work[4, (side + 1) % num_sides] - ax, work[5, (side + 1) % num_sides] - ay
        kept = 0
        last_x, last_y = work[source, count - 1], work[source + 1, count - 1]
        last = ux * (last_y - ay) - uy * (last_x - ax)
        for k in range(count):
            x, y = work[source, k], work[source + 1, k]
            value = ux * (y - ay) - uy * (x - ax)
            if (value >= 0) != (last >= 0):
                part = last / (last - value)
                work[target, kept] = last_x + (x - last_x) * part
                work[target + 1, kept] = last_y + (y - last_y) * part
                kept += 1
            if value >= 0:
                work[target, kept], work[target + 1, kept] = x, y
                kept += 1
            last_x, last_y, last = x, y, value
        if kept < 3:
            return 0.0
        count, source, target = kept, target, source
    doubled = 0.0
    last_k = count - 1
    for k in range(count):
        doubled += work[source, last_k] * work[source + 1, k] - work[source, k] * work[source + 1, last_k]
        last_k = k
    return abs(doubled) / 2


@compiled
def _iou(rows1: FloatArray, i: int, rows2: FloatArray, j: int, least: float, work: FloatArray) -> float:
    """Return the IoU of two quadrilaterals, or 0 where cheap bounds show that it is less than ``least``."""
    width = min(rows1[i, _X_HIGH], rows2[j, _X_HIGH]) - max(rows1[i, _X_LOW], rows2[j, _X_LOW])
    height = min(rows1[i, _Y_HIGH], rows2[j, _Y_HIGH]) - max(rows1[i, _Y_LOW], rows2[j, _Y_LOW])
    area1, area2 = rows1[i, _AREA], rows2[j, _AREA]
    # IoU >= t is the same as intersection >= t / (1 + t) * (sum of areas)
    needed = least / (1 + least) * (area1 + area2) * (1 - _SLACK)
    smaller = min(area1, area2)
    if width <= 0 or height <= 0 or smaller <= 0 or smaller < needed:
        return 0.0
    is_convex = rows1[i, _CONVEX] > 0 and rows2[j, _CONVEX] > 0
    if is_convex and width * height < needed:
        return 0.0
    x, y = rows1[i, 0], rows1[i, 1]
    corners1, corners2 = (4 if rows1[i, _CONVEX] > 0 else 3), (4 if rows2[j, _CONVEX] > 0 else 3)
    common = 0.0
    for piece1 in range(5 - corners1):
        for piece2 in range(5 - corners2):
            sign = _load_piece(rows1, i, piece1, x, y, work, 0) * _load_piece(rows2, j, piece2, x, y, work, 4)
            common += sign * _clip_area(corners1, corners2, work)
    common = min(max(common, 0.0), smaller)
    return float(common / (area1 + area2 - common))


@compiled
def _pairwise(polygons1: FloatArray, polygons2: FloatArray, is_aligned: bool) -> FloatArray:
    """Return the IoU of all pairs (N, M), or of equal rows (N, 1)."""
    rows1, rows2 = np.empty((polygons1.shape[0], _NUM_COLUMNS)), np.empty((polygons2.shape[0], _NUM_COLUMNS))
    _fill_rows(polygons1, rows1)
    _fill_rows(polygons2, rows2)
    num_columns = 1 if is_aligned else rows2.shape[0]
    result = np.zeros((rows1.shape[0], num_columns))
    work = np.empty(_WORK_SHAPE)
    for i in range(rows1.shape[0]):
        for column in range(num_columns):
            result[i, column] = _iou(rows1, i, rows2, i if is_aligned else column, 0.0, work)
    return result


@compiled
def _greedy(
    rows: FloatArray, by_x: IntArray, iou_threshold: float, is_kept: NDArray[np.bool_], work: FloatArray
) -> None:
    """Write which of the quadrilaterals, given in descending score order, are kept.

    Args:
        rows: (N, 14) as of _fill_rows.
        by_x: (N,) their indices in the order of their left bounds.
        iou_threshold: suppress where IoU is larger.
        is_kept: (N,) True; the result.
        work: of _WORK_SHAPE.
    """
    num = rows.shape[0]
    widest = 0.0
    for i in range(num):
        widest = max(widest, rows[i, _X_HIGH] - rows[i, _X_LOW])
    for i in range(num):
        if not is_kept[i]:
            continue
        low, high = 0, num  # first whose left bound may let it reach i
        while low < high:
            middle = (low + high) // 2
            if rows[by_x[middle], _X_LOW] < rows[i, _X_LOW] - widest * (1 + _SLACK):
                low = middle + 1
            else:
                high = middle
        while low < num and rows[by_x[low], _X_LOW] < rows[i, _X_HIGH]:
            j = by_x[low]
            if j > i and is_kept[j] and _iou(rows, i, rows, j, iou_threshold, work) > iou_threshold:
                is_kept[j] = False
            low += 1


def polygon_iou(polygons1: ArrayLike, polygons2: ArrayLike) -> FloatArray:
    """Return the exact IoU of every pair of quadrilaterals.

    Args:
        polygons1: (N, 8) or (N, 4, 2) corners in px.
        polygons2: (M, 8) or (M, 4, 2).

    Returns:
        (N, M) float64 in [0, 1].

    Raises:
        ValueError: a shape is wrong or a number is not finite.

    Example:
        >>> polygon_iou([[0, 0, 4, 0, 4, 2, 0, 2]], [[1, 0, 5, 0, 5, 2, 1, 2], [0, 0, 4, 0, 2, 1, 0, 2]]).tolist()
        [[0.6, 0.5]]
    """
    return np.asarray(_pairwise(_check(polygons1, "polygons1"), _check(polygons2, "polygons2"), False))


def polygon_iou_aligned(polygons1: ArrayLike, polygons2: ArrayLike) -> FloatArray:
    """Return the exact IoU of polygons1[i] with polygons2[i], (N,) float64; otherwise as :func:`polygon_iou`.

    Raises:
        ValueError: as :func:`polygon_iou`, or the numbers of polygons differ.
    """
    first, second = _check(polygons1, "polygons1"), _check(polygons2, "polygons2")
    if len(first) != len(second):
        raise ValueError(f"{len(first)} polygons against {len(second)}; aligned IoU needs equal numbers")
    return np.asarray(_pairwise(first, second, True)[:, 0])


def nms_polygons(polygons: ArrayLike, scores: ArrayLike, iou_threshold: float) -> IntArray:
    """Greedy non-maximum suppression of quadrilaterals by exact IoU.

    In descending score order (equal scores: by index) one is kept unless its IoU with one kept before it is
    **> iou_threshold**, as in ``ResultMerge.py`` of DOTA's development kit.

    Args:
        polygons: (N, 8) or (N, 4, 2) corners in px.
        scores: (N,) finite.
        iou_threshold: in [0, 1].

    Returns:
        Indices of those kept, int64, in descending score order.

    Raises:
        ValueError: shapes do not agree, a number is not finite, or the threshold is outside [0, 1].

    Example:
        >>> nms_polygons([[0, 0, 4, 0, 4, 2, 0, 2], [0, 0, 4, 0, 4, 3, 0, 3]], [0.6, 0.9], 0.5).tolist()
        [1]
    """
    checked, score_array = _check(polygons, "polygons"), np.asarray(scores, np.float64)
    if score_array.shape != (len(checked),) and score_array.size + len(checked) > 0:
        raise ValueError(f"{len(checked)} polygons, but scores {score_array.shape}")
    if not np.isfinite(score_array).all():
        raise ValueError(f"scores[{int(np.argmin(np.isfinite(score_array)))}] is not finite; drop such polygons first")
    if not 0 <= iou_threshold <= 1:
        raise ValueError(f"iou_threshold {iou_threshold!r} is outside [0, 1]")
    order = np.argsort(-score_array, kind="stable")
    rows = np.empty((len(order), _NUM_COLUMNS))
    _fill_rows(checked[order], rows)
    is_kept = np.ones(len(order), np.bool_)
    by_x = np.argsort(rows[:, _X_LOW], kind="stable").astype(np.int64)
    _greedy(rows, by_x, float(iou_threshold), is_kept, np.empty(_WORK_SHAPE))
    return np.asarray(order[is_kept], np.int64)


def _check(polygons: ArrayLike, name: str) -> FloatArray:
    """Return (N, 4, 2) float64; raise ValueError for another shape and for numbers that are not usable."""
    array = as_polygons(polygons)
    if array.size and not (array.min() >= -_MAX_MAGNITUDE and array.max() <= _MAX_MAGNITUDE):  # so also for nan
        row = int(np.argmin((np.abs(array) <= _MAX_MAGNITUDE).all(axis=(1, 2))))
        raise ValueError(f"{name}[{row}] = {array[row].tolist()} is not finite or too large; drop such polygons first")
    return array
