"""Which labelled object a detection overlaps most, over all images at once: the only matcher of the evaluation.

Pascal VOC, DOTA and HRSC2016 let every detection look at the one object of its image and class that it overlaps most,
whatever the threshold, so this is found once and judged at each threshold afterwards
(:class:`rtmdet_geo.evaluation.rotated.ClassMatches`). Objects lie sorted by image and left bound: only those whose
bounds meet a detection's are compared with it, exactly. Work goes through a buffer of pairs, so memory stays bounded
however crowded an image is, and the kernels leave the interpreter lock: classes may be matched in threads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rtmdet_geo.boxes import boxes_to_hboxes, polygons_to_hboxes
from rtmdet_geo.jit import compiled
from rtmdet_geo.nms import rotated_iou_aligned
from rtmdet_geo.quads import polygon_iou_aligned

Array = NDArray[Any]
FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

#: What is compared: "boxes" (N, 5) rotated ones; "polygons" (N, 8) corners; "hboxes" (N, 4) x1 y1 x2 y2; and
#: "pixels", such boxes whose second corner belongs to them, so that sides are x2 - x1 + 1 (Pascal VOC).
Measure = Literal["boxes", "polygons", "hboxes", "pixels"]

#: Pairs of a detection and an object that are compared at a time; bounds the memory.
_PAIRS = 1 << 17
#: What makes of "pixels" boxes whose sides are x2 - x1.
_LAST_PIXEL = np.array([0.0, 0.0, 1.0, 1.0])


def best_matches(
    shapes: Array, images: Array, object_shapes: Array, object_images: Array, *, measure: Measure = "boxes"
) -> tuple[IntArray, FloatArray]:
    """Find the object of its image that each detection overlaps most; of equal overlaps the first object's counts.

    Args:
        shapes: (D, ...) detections as ``measure`` has them, px.
        images: (D,) integers from 0: their images.
        object_shapes: (G, ...) labelled objects.
        object_images: (G,) their images.
        measure: what the shapes are.

    Returns:
        (D,) int64 index of the object, -1 where a detection overlaps none, and (D,) float64 IoU.

    Raises:
        ValueError: shapes are malformed or not finite.

    Example:
        >>> best_matches([[0, 0, 4, 4], [9, 9, 10, 10]], [0, 0], [[0, 0, 4, 2]], [0], measure="hboxes")[1].tolist()
        [0.5, 0.0]
    """
    found, there = (np.asarray(values, np.float64).reshape(-1, _COLUMNS[measure]) for values in (shapes, object_shapes))
    bounds, object_bounds = _bounds(found, measure), _bounds(there, measure)
    groups, object_groups = (np.asarray(values, np.int64).reshape(-1) for values in (images, object_images))
    best, overlap = np.full(len(found), -1, np.int64), np.zeros(len(found))
    if not len(found) or not len(there):
        return best, overlap
    num_images = int(max(groups.max(), object_groups.max())) + 1
    order = np.lexsort((object_bounds[:, 0], object_groups))
    begins = np.searchsorted(object_groups[order], np.arange(num_images + 1))
    widest = np.zeros(num_images)
    np.maximum.at(widest, object_groups, object_bounds[:, 2] - object_bounds[:, 0])
    sorted_bounds = np.ascontiguousarray(object_bounds[order])
    pairs = np.empty((2, max(_PAIRS, int(np.diff(begins).max()))), np.int64)
    first = 0
    while first < len(found):
        first, count = _find_pairs(bounds, groups, first, sorted_bounds, order, begins, widest, pairs)
        rows, columns = pairs[:, :count]
        _keep_best(rows, columns, _OVERLAPS[measure](found[rows], there[columns]), best, overlap)
    return best, overlap


@compiled
def _find_pairs(
    bounds: FloatArray,
    images: IntArray,
    first: int,
    object_bounds: FloatArray,
    order: IntArray,
    begins: IntArray,
    widest: FloatArray,
    pairs: IntArray,
) -> tuple[int, int]:
    """Write detections from ``first`` on, and objects whose bounds meet theirs, until ``pairs`` might be full.

    Args:
        bounds: (D, 4) of the detections.
        images: (D,) of the detections.
        first: detection to begin with.
        object_bounds: (G, 4) in the order of image and left bound.
        order: (G,) the objects in that order.
        begins: (I+1,) where the objects of each image begin.
        widest: (I,) width of each image's widest object.
        pairs: (2, P) the result; P is at least the number of objects of any image.

    Returns:
        The detection to go on with, and the number of pairs.
    """
    count = 0
    for i in range(first, bounds.shape[0]):
        low, end = begins[images[i]], begins[images[i] + 1]
        if count + end - low > pairs.shape[1]:
            return i, count
        high, least = end, bounds[i, 0] - widest[images[i]]
        while low < high:
            middle = (low + high) // 2
            if object_bounds[middle, 0] < least:
                low = middle + 1
            else:
                high = middle
        while low < end and object_bounds[low, 0] <= bounds[i, 2]:
            if (
                object_bounds[low, 2] >= bounds[i, 0]
                and object_bounds[low, 1] <= bounds[i, 3]
                and object_bounds[low, 3] >= bounds[i, 1]
            ):
                pairs[0, count], pairs[1, count] = i, order[low]
                count += 1
            low += 1
    return bounds.shape[0], count


@compiled
def _keep_best(rows: IntArray, columns: IntArray, values: FloatArray, best: IntArray, overlap: FloatArray) -> None:
    """Write the object that each detection overlaps most, and by how much."""
    for k in range(rows.shape[0]):
        i, j, value = rows[k], columns[k], values[k]
        if value > overlap[i] or (value == overlap[i] and value > 0 and j < best[i]):
            best[i], overlap[i] = j, value


def _bounds(shapes: FloatArray, measure: Measure) -> FloatArray:
    """Return x1 y1 x2 y2 around shapes, (N, 4)."""
    if measure == "boxes":
        return boxes_to_hboxes(shapes)
    if measure == "polygons":
        return polygons_to_hboxes(shapes)
    return shapes + _LAST_PIXEL if measure == "pixels" else shapes


def _hbox_iou(first: FloatArray, second: FloatArray) -> FloatArray:
    """Return the IoU of boxes (N, 4) with those of the same row, (N,); 0 where both have no area."""
    common = np.prod(np.maximum(np.minimum(first, second)[:, 2:] - np.maximum(first, second)[:, :2], 0), axis=1)
    union = np.prod(first[:, 2:] - first[:, :2], axis=1) + np.prod(second[:, 2:] - second[:, :2], axis=1) - common
    return np.asarray(np.divide(common, union, out=np.zeros(len(common)), where=union > 0))


def _pixel_iou(first: FloatArray, second: FloatArray) -> FloatArray:
    return _hbox_iou(first + _LAST_PIXEL, second + _LAST_PIXEL)


_COLUMNS: dict[Measure, int] = {"boxes": 5, "polygons": 8, "hboxes": 4, "pixels": 4}
_OVERLAPS: dict[Measure, Callable[[Array, Array], FloatArray]] = {
    "boxes": rotated_iou_aligned,
    "polygons": polygon_iou_aligned,
    "hboxes": _hbox_iou,
    "pixels": _pixel_iou,
}
