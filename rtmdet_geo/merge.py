"""Tile detections -> scene detections: NMS in the tile, border rule, exact NMS over the scene. numpy only.

The order of work, and why:

1. NMS in each tile, so that one box stands for an object and carries its duplicates with it. (The border rule on raw
   candidates would drop the best box of a cut object and leave a slightly shorter duplicate.)
2. Border rule: **an object is taken from the tile that sees it whole.** A box that comes within a margin of an inner
   edge of its tile is dropped if some other tile of the grid holds it with twice that margin to spare (the surplus
   keeps a detector's jitter from making both tiles defer to each other). Where no tile sees the object whole (it is
   longer than the overlap) the box stays. The scene's own edges are no inner edges.
3. To scene pixels in float64, then NMS over the scene, per class.
4. A box at an inner tile edge that lies mostly inside a larger box of another tile is a fragment of it: it gives way.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtmdet_geo.boxes import boxes_to_hboxes
from rtmdet_geo.nms import nms_horizontal, nms_rotated, rotated_iou_aligned
from rtmdet_geo.structures import Detections, Kind, Tile
from rtmdet_geo.tiles import TileGrid

logger = logging.getLogger(__name__)

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

#: A box that comes so near (px) to an edge touches it.
BORDER_MARGIN_PX = 2.0
#: A box at an inner edge with so much of its own area in a larger box is a fragment of that object.
FRAGMENT_IOF = 0.7


@dataclass(frozen=True)
class Merged:
    """What is left of the detections of all tiles.

    Attributes:
        detections: N detections, frame "scene" but in **resampled** px (what the grid counts): ``Scene.to_source``
            takes them to source px. Highest score first, ties in box order.
        num_merged: (N,) int64 >= 1, raw detections behind each one, itself included: duplicates in its tile and in
            others. Those that the border rule dropped do not count.
        on_edge: (N,) bool, the box touches the scene's own edge, so the object may go on outside.
    """

    detections: Detections
    num_merged: IntArray
    on_edge: BoolArray

    def __len__(self) -> int:
        """Return N."""
        return len(self.detections)

    def select(self, index: NDArray[Any]) -> Merged:
        """Return the rows that ``index`` (boolean or integer, numpy rules) picks."""
        return Merged(self.detections.select(index), self.num_merged[index], self.on_edge[index])


def to_scene(detections: Detections, tile: Tile) -> Detections:
    """Move detections from tile px to scene px (float64, frame "scene").

    Raises:
        ValueError: they are in scene px already.
    """
    if detections.frame != "tile":
        raise ValueError("detections are in scene px already; pass those of one tile, in its px")
    boxes = detections.boxes.astype(np.float64)
    boxes[:, :2] += (tile.x, tile.y)
    return replace(detections, boxes=boxes, frame="scene")


def touches_inner_edge(scene_boxes: NDArray[Any], tile: Tile, grid: TileGrid, *, margin: float) -> BoolArray:
    """Return (N,) bool: the box comes within ``margin`` px of an edge of its tile that is not the scene's edge.

    Args:
        scene_boxes: (N, 5) in scene px.
        tile: where they were found.
        grid: the grid of the tile.
        margin: in px.
    """
    bounds = boxes_to_hboxes(scene_boxes)
    touches = np.zeros(len(bounds), bool)
    if tile.x > 0:
        touches |= bounds[:, 0] < tile.x + margin
    if tile.y > 0:
        touches |= bounds[:, 1] < tile.y + margin
    if tile.x + tile.width < grid.width:
        touches |= bounds[:, 2] > tile.x + tile.width - margin
    if tile.y + tile.height < grid.height:
        touches |= bounds[:, 3] > tile.y + tile.height - margin
    return touches


def touches_scene_edge(scene_boxes: NDArray[Any], grid: TileGrid, *, margin: float = BORDER_MARGIN_PX) -> BoolArray:
    """Return (N,) bool: the box (scene px) comes within ``margin`` px of the scene's own edge or goes beyond it."""
    bounds = boxes_to_hboxes(scene_boxes)
    beyond = np.maximum(margin - bounds[:, :2], bounds[:, 2:] - np.array([grid.width, grid.height]) + margin)
    return np.asarray((beyond > 0).any(axis=1))


def _fits_some_tile(low: FloatArray, high: FloatArray, offsets: Sequence[int], side: int, length: int) -> BoolArray:
    """Return (N,) bool: along one axis some tile of ``side`` px holds [low, high], cut to the scene's [0, length]."""
    starts = np.asarray(offsets)
    last = np.searchsorted(starts, np.maximum(low, 0), side="right") - 1  # the last tile that begins before the box
    return np.asarray(starts[last] + side >= np.minimum(high, length))


def is_seen_whole_elsewhere(scene_boxes: NDArray[Any], tile: Tile, grid: TileGrid, *, margin: float) -> BoolArray:
    """Return (N,) bool: the box is cut by (or near) its tile's inner edge, and another tile holds all of it.

    Args:
        scene_boxes: (N, 5) in scene px.
        tile: where they were found.
        grid: the grid of the tile.
        margin: px; within it a box touches the edge, and the other tile must have twice as much to spare.
    """
    bounds = boxes_to_hboxes(scene_boxes)
    low, high = bounds[:, :2] - 2 * margin, bounds[:, 2:] + 2 * margin
    # the tile itself never fits: the box is nearer to its edge than twice the margin
    fits = _fits_some_tile(low[:, 0], high[:, 0], grid.xs, grid.tile_width, grid.width)
    fits &= _fits_some_tile(low[:, 1], high[:, 1], grid.ys, grid.tile_height, grid.height)
    return fits & touches_inner_edge(scene_boxes, tile, grid, margin=margin)


def drop_cut_detections(
    detections: Detections, tile: Tile, grid: TileGrid, *, margin: float = BORDER_MARGIN_PX
) -> Detections:
    """Apply the border rule to the detections of one tile.

    Args:
        detections: frame "tile".
        tile: where they were found.
        grid: the grid of the tile.
        margin: in px, see :func:`is_seen_whole_elsewhere`.

    Returns:
        Those that are whole, or that no other tile sees whole; in the given order, frame "tile".

    Raises:
        ValueError: the frame is not "tile".
    """
    boxes = to_scene(detections, tile).boxes
    return detections.select(~is_seen_whole_elsewhere(boxes, tile, grid, margin=margin))


def overlapping_pairs(first: FloatArray, second: FloatArray) -> tuple[IntArray, IntArray]:
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


def _keep_by_rank(boxes: FloatArray, labels: IntArray | None, kind: Kind, iou_threshold: float) -> IntArray:
    """Return rising indexes of what NMS keeps of boxes that are in order of preference."""
    ranks = -np.arange(len(boxes), dtype=np.float64)
    if kind == "horizontal":
        kept = nms_horizontal(boxes_to_hboxes(boxes), ranks, labels, iou_threshold=iou_threshold)
    else:
        kept = nms_rotated(boxes, ranks, labels, iou_threshold=iou_threshold)
    return np.sort(np.asarray(kept, np.int64))


def _count_merged(boxes: FloatArray, labels: IntArray | None, kept: IntArray, counts: IntArray) -> IntArray:
    """Give each box to the kept box that it overlaps most (the higher score among equals).

    Returns:
        (len(kept),) int64: the sums of ``counts`` per kept box.
    """
    home = np.full(len(boxes), -1, np.int64)
    home[kept] = np.arange(len(kept))
    others = np.flatnonzero(home < 0)
    bounds = boxes_to_hboxes(boxes)
    i, j = overlapping_pairs(bounds[kept], bounds[others])
    if labels is not None:
        same = labels[kept[i]] == labels[others[j]]
        i, j = i[same], j[same]
    if len(i):
        iou = rotated_iou_aligned(boxes[kept[i]], boxes[others[j]])
        order = np.lexsort((i, -iou, j))
        first = order[np.unique(j[order], return_index=True)[1]]
        home[others[j[first]]] = i[first]
    found = home >= 0
    sums = np.zeros(len(kept), np.int64)
    np.add.at(sums, home[found], counts[found])
    return sums


def _fragment_pairs(
    boxes: FloatArray, labels: IntArray | None, is_cut: BoolArray, tile_ids: IntArray
) -> tuple[IntArray, IntArray]:
    """Return pairs (fragment, container): a box at an inner tile edge, a larger box of another tile that holds it."""
    bounds = boxes_to_hboxes(boxes)
    cut = np.flatnonzero(is_cut)
    container, fragment = overlapping_pairs(bounds, bounds[cut])
    fragment = cut[fragment]
    areas = boxes[:, 2] * boxes[:, 3]
    possible = (areas[container] > areas[fragment]) & (tile_ids[container] != tile_ids[fragment])
    if labels is not None:
        possible &= labels[container] == labels[fragment]
    fragment, container = fragment[possible], container[possible]
    if not len(fragment):
        return fragment, container
    iou = np.asarray(rotated_iou_aligned(boxes[fragment], boxes[container]), np.float64)
    intersection = iou * (areas[fragment] + areas[container]) / (1.0 + iou)
    contained = intersection >= FRAGMENT_IOF * areas[fragment]
    return fragment[contained], container[contained]


def _tile_survivors(
    detections: Detections, tile: Tile, grid: TileGrid, iou_threshold: float, class_aware: bool, margin: float
) -> tuple[Detections, IntArray, BoolArray]:
    """Return NMS and border rule of one tile: (detections in scene px, counts, is_cut)."""
    detections = to_scene(detections, tile)
    detections = detections.select(np.lexsort((*detections.boxes.T[::-1], detections.labels, -detections.scores)))
    labels = detections.labels if class_aware else None
    kept = _keep_by_rank(detections.boxes, labels, detections.kind, iou_threshold)
    counts = _count_merged(detections.boxes, labels, kept, np.ones(len(detections), np.int64))
    detections = detections.select(kept)
    whole = ~is_seen_whole_elsewhere(detections.boxes, tile, grid, margin=margin)
    detections = detections.select(whole)
    return detections, counts[whole], touches_inner_edge(detections.boxes, tile, grid, margin=2 * margin)


def merge_detections(
    parts: Sequence[tuple[Tile, Detections]],
    grid: TileGrid,
    *,
    iou_threshold: float,
    class_aware: bool = True,
    margin: float = BORDER_MARGIN_PX,
) -> Merged:
    """Merge the raw detections of all tiles of a scene; see the module's text for the rules.

    The result does not depend on the order of ``parts``. As long as objects are not longer than the overlap less four
    margins and a detector finds the same in every tile that sees an object whole, it does not depend on the grid.

    Args:
        parts: (tile, its detections in frame "tile") in any order; empty tiles may be left out.
        grid: the grid that the tiles come from.
        iou_threshold: boxes of one class whose IoU reaches it (rotated; horizontal: exceeds it) are one object.
        class_aware: False: boxes of different classes suppress each other too.
        margin: px of the border rule.

    Returns:
        See :class:`Merged`; N = 0 when nothing was found.

    Raises:
        ValueError: a part is not in frame "tile", or kinds are mixed.
    """
    kinds = {detections.kind for _, detections in parts}
    if len(kinds) > 1:
        raise ValueError(f"parts of different kinds cannot be merged: {sorted(kinds)}")
    kind: Kind = next(iter(kinds)) if kinds else "rotated"
    survivors = [
        (tile, *_tile_survivors(detections, tile, grid, iou_threshold, class_aware, margin))
        for tile, detections in parts
        if len(detections)
    ]
    if not survivors:
        return Merged(Detections.empty("scene", kind), np.zeros(0, np.int64), np.zeros(0, bool))
    detections = Detections.concatenate([part for _, part, _, _ in survivors], "scene", kind)
    counts = np.concatenate([part for _, _, part, _ in survivors])
    is_cut = np.concatenate([part for _, _, _, part in survivors])
    tile_ids = np.concatenate(
        [np.full(len(part), tile.row * grid.num_cols + tile.col, np.int64) for tile, part, _, _ in survivors]
    )
    detections, counts, on_edge = _merge_survivors(
        detections, counts, is_cut, tile_ids, iou_threshold=iou_threshold, class_aware=class_aware, grid=grid
    )
    logger.debug("merged %d raw detections into %d", sum(len(part) for _, part in parts), len(detections))
    return Merged(detections, counts, on_edge)


def _merge_survivors(
    detections: Detections,
    counts: IntArray,
    is_cut: BoolArray,
    tile_ids: IntArray,
    *,
    iou_threshold: float,
    class_aware: bool,
    grid: TileGrid,
) -> tuple[Detections, IntArray, BoolArray]:
    """Return NMS over the scene and fragment suppression: (detections, num_merged, on_edge)."""

    def ordered(*first: NDArray[Any]) -> IntArray:
        return np.lexsort((tile_ids, *detections.boxes.T[::-1], detections.labels, -detections.scores, *first))

    labels = detections.labels if class_aware else None
    fragment, _ = _fragment_pairs(detections.boxes, labels, is_cut, tile_ids)
    is_fragment = np.zeros(len(detections), bool)
    is_fragment[fragment] = True
    order = ordered(is_fragment)  # a fragment must not suppress the whole object, whatever its score
    detections, counts, is_cut, tile_ids = detections.select(order), counts[order], is_cut[order], tile_ids[order]
    labels = detections.labels if class_aware else None

    kept = _keep_by_rank(detections.boxes, labels, detections.kind, iou_threshold)
    counts = _count_merged(detections.boxes, labels, kept, counts)
    detections, is_cut, tile_ids = detections.select(kept), is_cut[kept], tile_ids[kept]
    labels = detections.labels if class_aware else None

    alive = np.ones(len(detections), bool)
    areas = detections.boxes[:, 2] * detections.boxes[:, 3]
    fragments, containers = _fragment_pairs(detections.boxes, labels, is_cut, tile_ids)
    for index in np.lexsort((containers, -areas[containers], -areas[fragments])):  # containers are settled before
        fragment_index, container_index = fragments[index], containers[index]
        if alive[fragment_index] and alive[container_index]:
            alive[fragment_index] = False
            counts[container_index] += counts[fragment_index]
    detections, counts, tile_ids = detections.select(alive), counts[alive], tile_ids[alive]
    order = ordered()
    detections, counts = detections.select(order), counts[order]
    return detections, counts, touches_scene_edge(detections.boxes, grid)
