"""Pieces of one object from neighbouring tiles become one mask. numpy only.

An object longer than the overlap may be whole in no tile: each tile that shows it finds a piece, cut off at the tile's
edge. Two tiles see the strip that they share alike, so two pieces belong to one object where their masks agree within
that strip. Such pieces are joined, over as many tiles as it takes, and no seam is left.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rtmdet_geo.annotations.outlines import (
    Outline,
    Window,
    count_common_pixels,
    join_outlines,
    outline_area,
    outline_points,
)
from rtmdet_geo.boxes import boxes_to_hboxes, hboxes_to_boxes, overlapping_pairs
from rtmdet_geo.structures import Detections, Tile
from rtmdet_geo.tiles import TileGrid

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

#: Two pieces whose masks overlap by so much (IoU) in the strip that both tiles show are one object.
SAME_OBJECT_IOU = 0.5


class Pieces(NamedTuple):
    """N detections of all tiles, frame "scene", with where they come from.

    Attributes:
        detections: with outlines as masks.
        counts: (N,) raw detections behind each.
        is_cut: (N,) bool, the box touches an inner edge of its tile.
        tile_ids: (N,) index into the grid; below 0: joined, from several tiles.
    """

    detections: Detections
    counts: IntArray
    is_cut: BoolArray
    tile_ids: IntArray

    def select(self, index: NDArray[Any]) -> Pieces:
        """Return the rows that ``index`` picks."""
        return Pieces(self.detections.select(index), self.counts[index], self.is_cut[index], self.tile_ids[index])


def outlines_of(detections: Detections) -> NDArray[np.object_] | None:
    """Return the outlines of detections of a scene, or None where they have no masks."""
    return detections.masks if isinstance(detections.masks, np.ndarray) else None


def as_outlines(outlines: list[Outline]) -> NDArray[np.object_]:
    """Return outlines as an array (N,) of objects, which numpy would otherwise take apart."""
    array = np.empty(len(outlines), object)
    for index, outline in enumerate(outlines):
        array[index] = outline
    return array


def contained_share(part: Outline, whole: Outline) -> float:
    """Return the share of ``part`` that lies in ``whole``, counted in pixels; 0 for an empty part."""
    area = outline_area(part)
    return count_common_pixels(part, whole) / area if area > 0 else 0.0


def stitch(pieces: Pieces, grid: TileGrid, *, class_aware: bool = True) -> Pieces:
    """Join the pieces of objects that no tile sees whole.

    Args:
        pieces: of all tiles, after the border rule.
        grid: the tiles' grid.
        class_aware: False: pieces of different classes may be one object, which has the best one's class.

    Returns:
        What needs no joining, in the given order, then the joined: box around all pieces, best score and its class,
        sums of counts. Pieces without masks are returned as they are.
    """
    outlines = outlines_of(pieces.detections)
    cut = np.flatnonzero(pieces.is_cut)
    if outlines is None or len(cut) < 2:
        return pieces
    groups = _groups(len(cut), _same_object_pairs(pieces.select(cut), grid, class_aware))
    joined = [cut[group] for group in groups if len(group) > 1]
    if not joined:
        return pieces
    alone = np.ones(len(pieces.detections), bool)
    alone[np.concatenate(joined)] = False
    rest, found = pieces.select(alone), [_join(pieces, group, outlines) for group in joined]
    return Pieces(
        Detections.concatenate([rest.detections, *found], "scene", pieces.detections.kind),
        np.append(rest.counts, [pieces.counts[group].sum() for group in joined]),
        np.append(rest.is_cut, np.zeros(len(joined), bool)),
        np.append(rest.tile_ids, -1 - np.arange(len(joined))),
    )


def _same_object_pairs(pieces: Pieces, grid: TileGrid, class_aware: bool) -> list[tuple[int, int]]:
    outlines = outlines_of(pieces.detections)
    assert outlines is not None
    bounds = outline_bounds(outlines)
    first, second = overlapping_pairs(bounds, bounds)
    possible = (first < second) & (pieces.tile_ids[first] != pieces.tile_ids[second])
    if class_aware:
        possible &= pieces.detections.labels[first] == pieces.detections.labels[second]
    pairs = []
    for i, j in zip(first[possible].tolist(), second[possible].tolist(), strict=True):
        strip = _shared(grid[int(pieces.tile_ids[i])], grid[int(pieces.tile_ids[j])])
        if strip is not None and _agree(outlines[i], outlines[j], strip):
            pairs.append((i, j))
    return pairs


def _agree(first: Outline, second: Outline, strip: Window) -> bool:
    """Say whether two outlines are the same object in the strip that both tiles show."""
    common = count_common_pixels(first, second, strip)
    either = count_common_pixels(first, first, strip) + count_common_pixels(second, second, strip) - common
    return common > 0 and common >= SAME_OBJECT_IOU * either


def _shared(first: Tile, second: Tile) -> Window | None:
    """Return the px of the scene that two tiles both show."""
    x0, y0 = max(first.x, second.x), max(first.y, second.y)
    x1 = min(first.x + first.width, second.x + second.width)
    y1 = min(first.y + first.height, second.y + second.height)
    return Window(x0, y0, x1 - x0, y1 - y0) if x1 > x0 and y1 > y0 else None


def outline_bounds(outlines: NDArray[np.object_]) -> NDArray[np.float64]:
    """Return (N, 4) x1 y1 x2 y2 around outlines."""
    bounds = np.zeros((len(outlines), 4))
    for row, outline in zip(bounds, outlines, strict=True):
        points = outline_points(outline)
        row[:2], row[2:] = points.min(axis=0), points.max(axis=0)
    return bounds


def _groups(number: int, pairs: list[tuple[int, int]]) -> list[list[int]]:
    """Return the connected components of ``number`` nodes, each rising (union-find)."""
    parent = list(range(number))

    def root(node: int) -> int:
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for one, other in pairs:
        parent[root(one)] = root(other)
    groups: dict[int, list[int]] = {}
    for node in range(number):
        groups.setdefault(root(node), []).append(node)
    return list(groups.values())


def _join(pieces: Pieces, group: IntArray, outlines: NDArray[np.object_]) -> Detections:
    """Return the one detection that a group of pieces is."""
    parts = pieces.detections.select(group)
    corners = boxes_to_hboxes(parts.boxes)
    box = np.concatenate((corners[:, :2].min(axis=0), corners[:, 2:].max(axis=0)))
    best = np.lexsort((parts.labels, -parts.scores))[:1]
    return replace(
        parts.select(best), boxes=hboxes_to_boxes(box[None]), masks=as_outlines([join_outlines(outlines[group])])
    )
