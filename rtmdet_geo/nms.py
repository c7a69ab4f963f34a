"""Exact rotated IoU and non-maximum suppression that stays linear at scene scale. numpy and numba.

**IoU.** The larger rectangle is moved into the frame of the smaller one, which is then centred and axis-aligned, and
clipped by its four sides (Sutherland and Hodgman 1974), in float64. Coordinates stay as large as the boxes whatever the
offset in the scene; coincident boxes give 1.

**NMS.** Boxes are taken in the order of their scores. Those kept live in a hash grid with one level per power of two of
the diagonal, so a box looks only into cells around itself and only at levels whose boxes could reach the IoU threshold;
it is suppressed by the first kept box that does. There is no list of pairs: memory is linear in N, and so is time as
long as the boxes that are kept do not pile up at one place. The result is that of the greedy loop over all pairs.

Boxes are ``cx, cy, w, h`` in px, angle in rad (drawing: :mod:`rtmdet_geo.boxes`). A negative size counts by its
absolute value; a box without area has IoU 0 with everything.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rtmdet_geo.boxes import as_boxes, boxes_to_hboxes, hboxes_to_boxes
from rtmdet_geo.jit import compiled

if TYPE_CHECKING:
    from rtmdet_geo.structures import Kind

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

#: Larger numbers are refused: their areas could overflow.
_MAX_MAGNITUDE = 1e100
#: The finest grid cell is the extent of all centres times 2**-40, so that cell numbers are exact.
_FINEST_CELL_BITS = 40
#: Cheap tests that spare the exact computation allow for this relative rounding error.
_SLACK = 1e-9
#: Columns of a frame row: cx, cy, w/2, h/2, cosine, sine, and for NMS the label and the box kept before in the same
#: cell. 64 bytes, a cache line: reading memory in random order is what NMS spends its time on.
_FRAME_COLUMNS = 8
_LABEL, _NEXT = 6, 7
#: Two polygons of at most 64 vertices: clipping by a side at most doubles the four that a rectangle has.
_WORK_SHAPE = (4, 64)


@compiled
def _fill_frames(boxes: FloatArray, frames: FloatArray) -> None:
    """Write cx, cy, w/2, h/2, cos, sin of boxes (N, 5) into frames (N, 8); the columns of NMS stay."""
    for i in range(boxes.shape[0]):
        frames[i, 0], frames[i, 1] = boxes[i, 0], boxes[i, 1]
        frames[i, 2], frames[i, 3] = abs(boxes[i, 2]) / 2, abs(boxes[i, 3]) / 2
        frames[i, 4], frames[i, 5] = math.cos(boxes[i, 4]), math.sin(boxes[i, 4])


@compiled
def _clip_area(half_w: float, half_h: float, work: FloatArray) -> float:
    """Return the area inside |x| <= half_w, |y| <= half_h of the rectangle in work[:2, :4]; work is overwritten."""
    count, source, target = 4, 0, 2
    for side in range(4):
        axis, other = side // 2, 1 - side // 2
        sign = 1.0 if side % 2 == 0 else -1.0
        limit = half_w if axis == 0 else half_h
        kept = 0
        last_value = sign * work[source + axis, count - 1]
        last_other = work[source + other, count - 1]
        for i in range(count):
            value, along = sign * work[source + axis, i], work[source + other, i]
            if (value <= limit) != (last_value <= limit):
                work[target + axis, kept] = sign * limit
                work[target + other, kept] = last_other + (along - last_other) * (
                    (limit - last_value) / (value - last_value)
                )
                kept += 1
            if value <= limit:
                work[target + axis, kept], work[target + other, kept] = work[source + axis, i], along
                kept += 1
            last_value, last_other = value, along
        if kept < 3:
            return 0.0
        count, source, target = kept, target, source
    doubled = 0.0
    last = count - 1
    for i in range(count):
        doubled += work[source, last] * work[source + 1, i] - work[source, i] * work[source + 1, last]
        last = i
    return abs(doubled) / 2


@compiled
def _intersection(frames1: FloatArray, i: int, frames2: FloatArray, j: int, needed: float, work: FloatArray) -> float:
    """Return the area common to two boxes, or 0 where cheap bounds show that it is less than ``needed``."""
    dx, dy = frames2[j, 0] - frames1[i, 0], frames2[j, 1] - frames1[i, 1]
    a_w, a_h, a_cos, a_sin = frames1[i, 2], frames1[i, 3], frames1[i, 4], frames1[i, 5]
    b_w, b_h, b_cos, b_sin = frames2[j, 2], frames2[j, 3], frames2[j, 4], frames2[j, 5]
    if (
        abs(dx) >= abs(a_cos) * a_w + abs(a_sin) * a_h + abs(b_cos) * b_w + abs(b_sin) * b_h
        or abs(dy) >= abs(a_sin) * a_w + abs(a_cos) * a_h + abs(b_sin) * b_w + abs(b_cos) * b_h
    ):
        return 0.0
    if a_w * a_h > b_w * b_h:  # a becomes the smaller one
        a_w, a_h, a_cos, a_sin, b_w, b_h, b_cos, b_sin = b_w, b_h, b_cos, b_sin, a_w, a_h, a_cos, a_sin
        dx, dy = -dx, -dy
    area = 4 * a_w * a_h
    if area < needed or area == 0:
        return 0.0
    # b in the frame of a: its centre and the cosine and sine of its w axis
    x, y = a_cos * dx + a_sin * dy, a_cos * dy - a_sin * dx
    cos, sin = a_cos * b_cos + a_sin * b_sin, a_cos * b_sin - a_sin * b_cos
    if sin == 0:
        cos = math.copysign(1.0, cos)
    # the strips of width h cross in a parallelogram: a bound that sorts out long thin boxes
    if 4 * a_h * b_h < needed * abs(sin):
        return 0.0
    b_x, b_y = abs(cos) * b_w + abs(sin) * b_h, abs(sin) * b_w + abs(cos) * b_h
    overlap_x = min(a_w, x + b_x) - max(-a_w, x - b_x)
    overlap_y = min(a_h, y + b_y) - max(-a_h, y - b_y)
    if overlap_x <= 0 or overlap_y <= 0 or overlap_x * overlap_y < needed:
        return 0.0
    if sin == 0:
        return float(min(overlap_x * overlap_y, area))
    ux, uy, vx, vy = cos * b_w, sin * b_w, -sin * b_h, cos * b_h
    work[0, 0], work[1, 0] = x + ux + vx, y + uy + vy
    work[0, 1], work[1, 1] = x + ux - vx, y + uy - vy
    work[0, 2], work[1, 2] = x - ux - vx, y - uy - vy
    work[0, 3], work[1, 3] = x - ux + vx, y - uy + vy
    return float(min(_clip_area(a_w, a_h, work), area))


@compiled
def _pairwise(boxes1: FloatArray, boxes2: FloatArray, is_aligned: bool, is_iof: bool) -> FloatArray:
    """Return overlaps of all pairs (N, M), or of equal rows (N, 1)."""
    frames1 = np.empty((boxes1.shape[0], _FRAME_COLUMNS))
    frames2 = np.empty((boxes2.shape[0], _FRAME_COLUMNS))
    _fill_frames(boxes1, frames1)
    _fill_frames(boxes2, frames2)
    num_columns = 1 if is_aligned else frames2.shape[0]
    result = np.zeros((frames1.shape[0], num_columns))
    work = np.empty(_WORK_SHAPE)
    for i in range(frames1.shape[0]):
        area = 4 * frames1[i, 2] * frames1[i, 3]
        for column in range(num_columns):
            j = i if is_aligned else column
            common = _intersection(frames1, i, frames2, j, 0.0, work)
            if common > 0:
                union = area + 4 * frames2[j, 2] * frames2[j, 3] - common
                result[i, column] = common / (area if is_iof else union)
    return result


@compiled
def _bucket(label: int, level: int, row: int, mask: int) -> int:
    """Return the hash of one row of cells; cell ``column`` is the bucket ``column`` further on, so rows stay together.

    Two cells may share a bucket: that costs time, never a wrong result.
    """
    mixed = label * 0x1E3779B97F4A7C15 + level * 0x3F58476D1CE4E5B9 + row * 0x14D049BB133111EB
    mixed ^= mixed >> 31
    mixed *= 0x2545F4914F6CDD1D
    return (mixed ^ (mixed >> 29)) & mask


@compiled
def _suppresses(frames: FloatArray, j: int, i: int, iou_threshold: float, is_strict: bool, work: FloatArray) -> bool:
    """Tell whether the kept box ``j`` suppresses box ``i``."""
    both = 4 * frames[i, 2] * frames[i, 3] + 4 * frames[j, 2] * frames[j, 3]
    # IoU >= t is the same as intersection >= t / (1 + t) * (sum of areas)
    needed = iou_threshold / (1 + iou_threshold) * both * (1 - _SLACK)
    common = _intersection(frames, j, frames, i, needed, work)
    if common <= 0 or frames[j, _LABEL] != frames[i, _LABEL]:
        return False
    iou = common / (both - common)
    return iou > iou_threshold or (iou == iou_threshold and not is_strict)


@compiled
def _is_hit_in_cell(
    frames: FloatArray, i: int, head: np.int64, iou_threshold: float, is_strict: bool, work: FloatArray
) -> bool:
    """Tell whether a kept box of the cell whose last one is ``head`` (-1: empty) suppresses box ``i``."""
    j = int(head)
    while j >= 0:
        if _suppresses(frames, j, i, iou_threshold, is_strict, work):
            return True
        j = int(frames[j, _NEXT])
    return False


@compiled
def _greedy(
    frames: FloatArray,
    levels: IntArray,
    cell_sizes: FloatArray,
    bounds: FloatArray,
    iou_threshold: float,
    is_strict: bool,
    is_kept: NDArray[np.bool_],
    cell_head: NDArray[np.int32],
    is_used: NDArray[np.uint8],
    level_head: IntArray,
    level_next: IntArray,
    level_count: IntArray,
    work: FloatArray,
) -> None:
    """Write which of the boxes, given in descending score order, are kept.

    The caller allocates: compiling the allocations would add a second to the first call, and numpy asks the system for
    huge pages.

    Args:
        frames: (N, 8) as of _fill_frames, with labels.
        levels: (N,) index into cell_sizes; the enclosing box is not larger than that cell.
        cell_sizes: (L,) rising powers of two.
        bounds: least x, least y, and the largest differences from them, of all centres.
        iou_threshold: in [0, 1].
        is_strict: suppress where IoU > threshold, not >=.
        is_kept: (N,) False; the result.
        cell_head: (C,) -1: last kept box of a cell; C is a power of two, >= 2 N and >= 8.
        is_used: (C / 8,) 0: a bit per cell. Most cells are empty, and this fits the processor's cache.
        level_head: (L,) -1: last kept box of a level.
        level_next: (N,) the box of the same level that was kept before.
        level_count: (L,) 0: number of kept boxes of a level.
        work: of _WORK_SHAPE.
    """
    num_boxes, num_levels = frames.shape[0], cell_sizes.shape[0]
    mask = cell_head.shape[0] - 1
    origin_x, origin_y, span_x, span_y = bounds[0], bounds[1], bounds[2], bounds[3]

    for i in range(num_boxes):
        half_w, half_h, cos, sin = frames[i, 2], frames[i, 3], abs(frames[i, 4]), abs(frames[i, 5])
        if half_w * half_h == 0:
            is_kept[i] = True
            continue
        x, y = frames[i, 0] - origin_x, frames[i, 1] - origin_y
        label, own_level = int(frames[i, _LABEL]), levels[i]
        own_row = _bucket(label, own_level, math.floor(y / cell_sizes[own_level]), mask)
        own_bucket = (own_row + math.floor(x / cell_sizes[own_level])) & mask
        # duplicates are what NMS mostly meets, and they lie in the same cell
        if _is_hit_in_cell(frames, i, np.int64(cell_head[own_bucket]), iou_threshold, is_strict, work):
            continue
        # Overlap of a box with long side w by one of diagonal d is at most d times the short side, so IoU >= t needs
        # d >= t w; and d is at most sqrt 2 w. Levels go by d: cell / 2 <= d < cell.
        smallest = iou_threshold * 2 * max(half_w, half_h) * (1 - _SLACK)
        largest = 2 * math.hypot(half_w, half_h) * math.sqrt(2.0) * (1 + _SLACK)
        is_hit = False
        for level in range(num_levels):
            cell = cell_sizes[level]
            if level_count[level] == 0 or cell < smallest:
                continue
            if is_hit or (level > 0 and iou_threshold * cell_sizes[level - 1] > largest):
                break
            reach_x = cos * half_w + sin * half_h + cell * 0.501  # 0.001: rounding of x and y
            reach_y = sin * half_w + cos * half_h + cell * 0.501
            first_column = math.floor(max(x - reach_x, 0.0) / cell)
            last_column = math.floor(min(x + reach_x, span_x) / cell)
            first_row = math.floor(max(y - reach_y, 0.0) / cell)
            last_row = math.floor(min(y + reach_y, span_y) / cell)
            # a float: the product of two cell numbers may be larger than int64
            if (last_column - first_column + 1.0) * (last_row - first_row + 1.0) > level_count[level]:
                j = level_head[level]
                while j >= 0 and not is_hit:
                    is_hit = _suppresses(frames, j, i, iou_threshold, is_strict, work)
                    j = level_next[j]
                continue
            for row in range(first_row, last_row + 1):
                row_bucket = _bucket(label, level, row, mask)
                for column in range(first_column, last_column + 1):
                    bucket = (row_bucket + column) & mask
                    if (is_used[bucket >> 3] >> (bucket & 7)) & 1 and bucket != own_bucket:
                        is_hit = _is_hit_in_cell(frames, i, np.int64(cell_head[bucket]), iou_threshold, is_strict, work)
                        if is_hit:
                            break
                if is_hit:
                    break
        if not is_hit:
            is_kept[i] = True
            frames[i, _NEXT], cell_head[own_bucket] = cell_head[own_bucket], i
            is_used[own_bucket >> 3] |= np.uint8(1 << (own_bucket & 7))
            level_next[i], level_head[own_level] = level_head[own_level], i
            level_count[own_level] += 1


def _check_boxes(boxes: ArrayLike, columns: int, name: str) -> FloatArray:
    """Return (N, columns) float64; raise ValueError for another shape and for numbers that are not usable."""
    array = as_boxes(boxes, columns=columns, name=name)
    if array.size and not (array.min() >= -_MAX_MAGNITUDE and array.max() <= _MAX_MAGNITUDE):  # so also for nan
        row = int(np.argmin((np.abs(array) <= _MAX_MAGNITUDE).all(axis=1)))
        raise ValueError(f"{name}[{row}] = {array[row].tolist()} is not finite or too large; drop such boxes first")
    return array


def rotated_iou(boxes1: ArrayLike, boxes2: ArrayLike, *, mode: Literal["iou", "iof"] = "iou") -> FloatArray:
    """Return the exact overlap of every pair of rotated boxes.

    Args:
        boxes1: (N, 5) cx, cy, w, h in px, angle in rad; any form, le90 or not.
        boxes2: (M, 5).
        mode: "iou" intersection over union, "iof" intersection over the area of the first box.

    Returns:
        (N, M) float64 in [0, 1].

    Raises:
        ValueError: a shape is wrong, a number is not finite, or the mode is unknown.

    Example:
        >>> rotated_iou([[0, 0, 4, 2, 0]], [[1, 0, 4, 2, 0], [9, 9, 4, 2, 0]]).tolist()
        [[0.6, 0.0]]
    """
    return _overlaps(boxes1, boxes2, mode, is_aligned=False)


def rotated_iou_aligned(boxes1: ArrayLike, boxes2: ArrayLike, *, mode: Literal["iou", "iof"] = "iou") -> FloatArray:
    """Return the exact overlap of boxes1[i] with boxes2[i], (N,) float64; otherwise as :func:`rotated_iou`.

    Raises:
        ValueError: as :func:`rotated_iou`, or the numbers of boxes differ.
    """
    return _overlaps(boxes1, boxes2, mode, is_aligned=True)[:, 0]


def _overlaps(boxes1: ArrayLike, boxes2: ArrayLike, mode: str, *, is_aligned: bool) -> FloatArray:
    first, second = _check_boxes(boxes1, 5, "boxes1"), _check_boxes(boxes2, 5, "boxes2")
    if mode not in ("iou", "iof"):
        raise ValueError(f"unknown mode {mode!r}; use 'iou' or 'iof'")
    if is_aligned and len(first) != len(second):
        raise ValueError(f"{len(first)} boxes against {len(second)}; aligned overlap needs equal numbers")
    return np.asarray(_pairwise(first, second, is_aligned, mode == "iof"))


def nms_rotated(
    boxes: ArrayLike, scores: ArrayLike, labels: ArrayLike | None = None, *, iou_threshold: float
) -> IntArray:
    """Greedy non-maximum suppression of rotated boxes by exact IoU.

    In descending score order (equal scores: by index) a box is kept unless its IoU with a box kept before it, of the
    same label, is **>= iou_threshold** (mmcv's CPU operator ``nms_rotated``; so threshold 0 keeps one box a label).

    Args:
        boxes: (N, 5) cx, cy, w, h in px, angle in rad.
        scores: (N,) finite.
        labels: (N,) integers; None: all boxes compete.
        iou_threshold: in [0, 1].

    Returns:
        Indices of the kept boxes, int64, in descending score order.

    Raises:
        ValueError: shapes do not agree, a number is not finite, or the threshold is outside [0, 1].

    Example:
        >>> boxes = [[5, 5, 4, 2, 0], [5, 5, 4, 3, 0], [9, 9, 4, 2, 0]]
        >>> nms_rotated(boxes, [0.6, 0.9, 0.3], iou_threshold=0.5).tolist()
        [1, 2]
    """
    return _nms(_check_boxes(boxes, 5, "boxes"), scores, labels, iou_threshold, is_strict=False)


def nms_horizontal(
    boxes: ArrayLike, scores: ArrayLike, labels: ArrayLike | None = None, *, iou_threshold: float
) -> IntArray:
    """Greedy non-maximum suppression of horizontal boxes; suppresses where IoU is **> iou_threshold** (mmcv ``nms``).

    Args:
        boxes: (N, 4) x1 y1 x2 y2 in px; a box with x2 <= x1 or y2 <= y1 has no area and IoU 0 with everything.
        scores: (N,) finite.
        labels: (N,) integers; None: all boxes compete.
        iou_threshold: in [0, 1].

    Returns:
        Indices of the kept boxes, int64, in descending score order (equal scores: by index).

    Raises:
        ValueError: as :func:`nms_rotated`.
    """
    rotated = hboxes_to_boxes(_check_boxes(boxes, 4, "boxes"))
    rotated[:, 2:4] = np.maximum(rotated[:, 2:4], 0)
    return _nms(rotated, scores, labels, iou_threshold, is_strict=True)


def nms_of_kind(
    boxes: ArrayLike, scores: ArrayLike, labels: ArrayLike | None = None, *, kind: Kind, iou_threshold: float
) -> IntArray:
    """Suppress boxes (N, 5) as models of a kind want it: rotated ones as they are, others by their enclosing boxes.

    Args:
        boxes: (N, 5) cx, cy, w, h in px, angle in rad.
        scores: (N,) finite.
        labels: (N,) integers; None: all boxes compete.
        kind: of the model.
        iou_threshold: in [0, 1].

    Returns:
        As :func:`nms_rotated`, or :func:`nms_horizontal`.

    Raises:
        ValueError: as :func:`nms_rotated`.
    """
    if kind == "rotated":
        return nms_rotated(boxes, scores, labels, iou_threshold=iou_threshold)
    return nms_horizontal(boxes_to_hboxes(boxes), scores, labels, iou_threshold=iou_threshold)


def _nms(
    boxes: FloatArray, scores: ArrayLike, labels: ArrayLike | None, iou_threshold: float, *, is_strict: bool
) -> IntArray:
    num_boxes = len(boxes)
    score_array = np.asarray(scores, np.float64)
    label_array = np.zeros(num_boxes, np.int64) if labels is None else np.asarray(labels)
    if score_array.size != num_boxes or label_array.size != num_boxes or max(score_array.ndim, label_array.ndim) > 1:
        raise ValueError(f"{num_boxes} boxes, but scores {score_array.shape} and labels {label_array.shape}")
    if num_boxes and not np.issubdtype(label_array.dtype, np.integer):
        raise ValueError(f"labels are {label_array.dtype}; give integers")
    if not np.isfinite(score_array).all():
        raise ValueError(f"scores[{int(np.argmin(np.isfinite(score_array)))}] is not finite; drop such boxes first")
    if not 0 <= iou_threshold <= 1:
        raise ValueError(f"iou_threshold {iou_threshold!r} is outside [0, 1]")
    if num_boxes > np.iinfo(np.int32).max:
        raise ValueError(f"{num_boxes} boxes are too many for one call; split the scene")
    if num_boxes == 0:
        return np.zeros(0, np.int64)
    order = np.argsort(-score_array, kind="stable")
    if labels is None:
        first = np.zeros(1, np.int64)
    else:  # 0, 1, 2, ... so that any label is exact as a float
        _, first, label_array = np.unique(label_array[order], return_index=True, return_inverse=True)
    if iou_threshold == 0 and not is_strict:  # any two boxes have IoU >= 0: the best of each label is left
        return np.asarray(order[np.sort(first)], np.int64)
    boxes = boxes[order]
    levels, cell_sizes = _grid_levels(boxes)
    frames = np.empty((num_boxes, _FRAME_COLUMNS))
    _fill_frames(boxes, frames)
    frames[:, _LABEL] = label_array
    num_cells = max(8, 1 << (2 * num_boxes - 1).bit_length())
    is_kept = np.zeros(num_boxes, np.bool_)
    _greedy(
        frames,
        levels,
        cell_sizes,
        np.concatenate([boxes[:, :2].min(axis=0), np.ptp(boxes[:, :2], axis=0)]),
        float(iou_threshold),
        is_strict,
        is_kept,
        np.full(num_cells, -1, np.int32),
        np.zeros(num_cells // 8, np.uint8),
        np.full(len(cell_sizes), -1, np.int64),
        np.empty(num_boxes, np.int64),
        np.zeros(len(cell_sizes), np.int64),
        np.empty(_WORK_SHAPE),
    )
    return np.asarray(order[is_kept], np.int64)


def _grid_levels(boxes: FloatArray) -> tuple[IntArray, FloatArray]:
    """Return the level (N,) of each box and the cell size of each level, rising powers of two."""
    # the diagonal bounds the enclosing size: 2 ** (exponent - 1) <= diagonal < 2 ** exponent
    exponent = np.frexp(np.hypot(boxes[:, 2], boxes[:, 3]))[1].astype(np.int64)
    span = float(np.ptp(boxes[:, :2], axis=0).max())
    has_area = (boxes[:, 2] != 0) & (boxes[:, 3] != 0)
    lowest = int(exponent[has_area].min()) if has_area.any() else 0
    lowest = max(lowest, int(np.frexp(span)[1]) - _FINEST_CELL_BITS) if span > 0 else lowest
    highest = max(lowest, int(exponent[has_area].max())) if has_area.any() else lowest
    levels = np.clip(exponent, lowest, highest) - lowest
    return levels, np.ldexp(1.0, np.arange(lowest, highest + 1))
