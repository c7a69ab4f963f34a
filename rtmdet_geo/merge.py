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

Instances go the same way by their boxes, with two differences. Masks are made for the survivors of step 2 only, and
pieces of one object that no tile sees whole are joined before step 3 (:mod:`rtmdet_geo.stitch`). Step 4 then asks
masks, not boxes, whether one lies inside another, and a step follows:

5. Two masks of one class of which the smaller lies mostly in the other are one object: the better score stays, or the
   larger where the other is but a part of it. NMS, which goes by boxes, lets many such pairs pass. The published
   evaluation does not take this step.

:func:`tile_survivors` is steps 1 and 2, done as soon as a tile has been run, so that its raw candidates can be
forgotten; :func:`merge_survivors` is the rest.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtmdet_geo.annotations.outlines import Outline, outline_area, trace_mask, transform_outline
from rtmdet_geo.boxes import boxes_to_hboxes, overlapping_pairs
from rtmdet_geo.masks import MASK_STRIDE, CroppedMask, assemble_detections
from rtmdet_geo.nms import nms_of_kind, rotated_iou_aligned
from rtmdet_geo.stitch import Pieces, as_outlines, contained_share, outlines_of, stitch
from rtmdet_geo.structures import Detections, Kind, MaskKernels, Tile
from rtmdet_geo.tiles import TileGrid

logger = logging.getLogger(__name__)

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

#: A box that comes so near (px) to an edge touches it.
BORDER_MARGIN_PX = 2.0
#: The same for instances: where a mask ends is known to a cell of the mask features.
MASK_BORDER_MARGIN_PX = float(MASK_STRIDE)
#: A box at an inner edge with so much of its own area in a larger box is a fragment of that object.
FRAGMENT_IOF = 0.7
#: Two masks of a class of which the smaller shares so much with the other are one object: what is seen of two objects
#: shares no pixel.
MAX_OVERLAP = 0.7
#: Probability above which a pixel belongs to a mask (``mask_thr_binary`` of the published test configurations).
MASK_THRESHOLD = 0.5


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


def to_scene(
    detections: Detections,
    tile: Tile,
    *,
    mask_threshold: float = MASK_THRESHOLD,
    input_shape: tuple[int, int] | None = None,
    valid: BoolArray | None = None,
) -> Detections:
    """Move detections from tile px to scene px (float64, frame "scene"); masks of kernels become outlines.

    Args:
        detections: of one tile.
        tile: where they were found.
        mask_threshold: probability in (0, 1) above which a pixel belongs to a mask.
        input_shape: (height, width) in px of what the engine was given: the tile, perhaps padded at the bottom and the
            right; None: not padded.
        valid: (tile.height, tile.width) bool, pixels that a mask may cover; None: all.

    Raises:
        ValueError: they are in scene px already.
    """
    masks = None
    if isinstance(detections.masks, MaskKernels):
        height, width = input_shape if input_shape is not None else (tile.height, tile.width)
        cropped = assemble_detections(detections, height, width, threshold=mask_threshold)
        masks = as_outlines([_outline(item, tile, valid) for item in cropped])
    return replace(detections, boxes=_scene_boxes(detections, tile), frame="scene", masks=masks)


def _scene_boxes(detections: Detections, tile: Tile) -> FloatArray:
    if detections.frame != "tile":
        raise ValueError("detections are in scene px already; pass those of one tile, in its px")
    boxes = detections.boxes.astype(np.float64)
    boxes[:, :2] += (tile.x, tile.y)
    return boxes


def _outline(item: CroppedMask, tile: Tile, valid: BoolArray | None) -> Outline:
    """Return a mask's outline in scene px, without what lies in the padding or on pixels without data."""
    mask = item.mask[: max(tile.height - item.y, 0), : max(tile.width - item.x, 0)]
    if valid is not None:
        mask = mask * valid[item.y : item.y + mask.shape[0], item.x : item.x + mask.shape[1]]
    return transform_outline(trace_mask(mask), [[1, 0, tile.x + item.x], [0, 1, tile.y + item.y]])


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
    boxes = _scene_boxes(detections, tile)
    return detections.select(~is_seen_whole_elsewhere(boxes, tile, grid, margin=margin))


def _keep_by_rank(boxes: FloatArray, labels: IntArray | None, kind: Kind, iou_threshold: float) -> IntArray:
    """Return rising indexes of what NMS keeps of boxes that are in order of preference."""
    ranks = -np.arange(len(boxes), dtype=np.float64)
    return np.sort(nms_of_kind(boxes, ranks, labels, kind=kind, iou_threshold=iou_threshold))


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


def _fragment_pairs(pieces: Pieces, class_aware: bool) -> tuple[IntArray, IntArray]:
    """Return pairs (fragment, container): one at an inner tile edge, a larger one of another tile that holds it."""
    boxes, labels = pieces.detections.boxes, pieces.detections.labels
    bounds = boxes_to_hboxes(boxes)
    cut = np.flatnonzero(pieces.is_cut)
    container, fragment = overlapping_pairs(bounds, bounds[cut])
    fragment = cut[fragment]
    areas = boxes[:, 2] * boxes[:, 3]
    possible = (areas[container] > areas[fragment]) & (pieces.tile_ids[container] != pieces.tile_ids[fragment])
    if class_aware:
        possible &= labels[container] == labels[fragment]
    fragment, container = fragment[possible], container[possible]
    if not len(fragment):
        return fragment, container
    outlines = outlines_of(pieces.detections)
    if outlines is not None:
        shares = [contained_share(outlines[i], outlines[j]) for i, j in zip(fragment, container, strict=True)]
        contained = np.array(shares) >= FRAGMENT_IOF
    else:
        iou = np.asarray(rotated_iou_aligned(boxes[fragment], boxes[container]), np.float64)
        intersection = iou * (areas[fragment] + areas[container]) / (1.0 + iou)
        contained = intersection >= FRAGMENT_IOF * areas[fragment]
    return fragment[contained], container[contained]


def tile_survivors(
    detections: Detections,
    tile: Tile,
    grid: TileGrid,
    *,
    iou_threshold: float,
    class_aware: bool = True,
    margin: float | None = None,
    mask_threshold: float = MASK_THRESHOLD,
    input_shape: tuple[int, int] | None = None,
    valid: BoolArray | None = None,
) -> Pieces:
    """Apply NMS and the border rule to the raw detections of one tile, and make the survivors' masks.

    Args:
        detections: frame "tile".
        tile: where they were found.
        grid: the grid of the tile.
        iou_threshold: see :func:`merge_detections`.
        class_aware: likewise.
        margin: px of the border rule; None: BORDER_MARGIN_PX, for instances MASK_BORDER_MARGIN_PX.
        mask_threshold: see :func:`to_scene`.
        input_shape: likewise.
        valid: likewise.

    Returns:
        What is left, in scene px; instances whose mask has no pixel are left out.

    Raises:
        ValueError: the frame is not "tile".
    """
    if margin is None:
        margin = MASK_BORDER_MARGIN_PX if detections.kind == "mask" else BORDER_MARGIN_PX
    boxes = _scene_boxes(detections, tile)
    order = np.lexsort((*boxes.T[::-1], detections.labels, -detections.scores))
    boxes, labels = boxes[order], detections.labels[order] if class_aware else None
    kept = _keep_by_rank(boxes, labels, detections.kind, iou_threshold)
    counts = _count_merged(boxes, labels, kept, np.ones(len(boxes), np.int64))
    whole = ~is_seen_whole_elsewhere(boxes[kept], tile, grid, margin=margin)
    survivors = to_scene(
        detections.select(order[kept[whole]]),
        tile,
        mask_threshold=mask_threshold,
        input_shape=input_shape,
        valid=valid,
    )
    is_cut = touches_inner_edge(survivors.boxes, tile, grid, margin=2 * margin)
    tile_ids = np.full(len(survivors), tile.row * grid.num_cols + tile.col, np.int64)
    pieces = Pieces(survivors, counts[whole], is_cut, tile_ids)
    outlines = outlines_of(survivors)
    return pieces if outlines is None else pieces.select(np.array([len(outline) > 0 for outline in outlines], bool))


def merge_detections(
    parts: Sequence[tuple[Tile, Detections]],
    grid: TileGrid,
    *,
    iou_threshold: float,
    class_aware: bool = True,
    margin: float | None = None,
    mask_threshold: float = MASK_THRESHOLD,
    max_overlap: float = MAX_OVERLAP,
) -> Merged:
    """Merge the raw detections of all tiles of a scene; see the module's text for the rules.

    The result does not depend on the order of ``parts``. As long as objects are not longer than the overlap less four
    margins and a detector finds the same in every tile that sees an object whole, it does not depend on the grid.

    Args:
        parts: (tile, its detections in frame "tile") in any order; empty tiles may be left out.
        grid: the grid that the tiles come from.
        iou_threshold: boxes of one class whose IoU reaches it (rotated; horizontal: exceeds it) are one object.
        class_aware: False: boxes of different classes suppress each other too.
        margin: see :func:`tile_survivors`.
        mask_threshold: see :func:`to_scene`.
        max_overlap: share of the smaller of two masks of a class, in (0, 1], from which on they are one object; 1
            leaves it to NMS by boxes alone.

    Returns:
        See :class:`Merged`; N = 0 when nothing was found.

    Raises:
        ValueError: a part is not in frame "tile", or kinds are mixed.
    """
    survivors = [
        tile_survivors(
            detections,
            tile,
            grid,
            iou_threshold=iou_threshold,
            class_aware=class_aware,
            margin=margin,
            mask_threshold=mask_threshold,
        )
        for tile, detections in parts
    ]
    return merge_survivors(
        survivors, grid, iou_threshold=iou_threshold, class_aware=class_aware, max_overlap=max_overlap
    )


def merge_survivors(
    parts: Sequence[Pieces],
    grid: TileGrid,
    *,
    iou_threshold: float,
    class_aware: bool = True,
    max_overlap: float = MAX_OVERLAP,
    kind: Kind = "rotated",
) -> Merged:
    """Merge what :func:`tile_survivors` left of each tile.

    Arguments and result are those of :func:`merge_detections`; ``kind`` is the result's where there are no parts.
    """
    kinds = {part.detections.kind for part in parts}
    if len(kinds) > 1:
        raise ValueError(f"parts of different kinds cannot be merged: {sorted(kinds)}")
    kind = next(iter(kinds)) if kinds else kind
    pieces = Pieces(
        Detections.concatenate([part.detections for part in parts], "scene", kind),
        np.concatenate([np.zeros(0, np.int64), *(part.counts for part in parts)]),
        np.concatenate([np.zeros(0, bool), *(part.is_cut for part in parts)]),
        np.concatenate([np.zeros(0, np.int64), *(part.tile_ids for part in parts)]),
    )
    stitched = stitch(_ordered(pieces), grid, class_aware=class_aware)
    merged = _merge_pieces(stitched, iou_threshold, max_overlap, class_aware)
    logger.debug("merged %d survivors of NMS in tiles into %d", len(pieces.detections), len(merged.detections))
    return Merged(merged.detections, merged.counts, touches_scene_edge(merged.detections.boxes, grid))


def _ordered(pieces: Pieces, *first: NDArray[Any]) -> Pieces:
    """Sort by the last of ``first``, if given, then score, label, box and tile: no order of tiles shows."""
    found = pieces.detections
    keys = (pieces.tile_ids, *found.boxes.T[::-1], found.labels, -found.scores, *first)
    return pieces.select(np.lexsort(keys))


def _merge_pieces(pieces: Pieces, iou_threshold: float, max_overlap: float, class_aware: bool) -> Pieces:
    """Return what NMS over the scene and the suppression of fragments and of doubles leave."""
    fragment, _ = _fragment_pairs(pieces, class_aware)
    is_fragment = np.zeros(len(pieces.detections), bool)
    is_fragment[fragment] = True
    pieces = _ordered(pieces, is_fragment)  # a fragment must not suppress the whole object, whatever its score
    found = pieces.detections
    labels = found.labels if class_aware else None
    kept = _keep_by_rank(found.boxes, labels, found.kind, iou_threshold)
    counts = _count_merged(found.boxes, labels, kept, pieces.counts)
    pieces = pieces.select(kept)._replace(counts=counts)

    areas = pieces.detections.boxes[:, 2] * pieces.detections.boxes[:, 3]
    fragments, containers = _fragment_pairs(pieces, class_aware)
    order = np.lexsort((containers, -areas[containers], -areas[fragments]))  # containers are settled before
    pieces = _ordered(_absorb(pieces, containers[order], fragments[order]))
    if outlines_of(pieces.detections) is not None and max_overlap < 1:
        pieces = _absorb(pieces, *_double_pairs(pieces, max_overlap, class_aware))
    return pieces


def _absorb(pieces: Pieces, into: IntArray, gone: IntArray) -> Pieces:
    """Drop ``gone``, pair by pair, where both are still there; its count goes to ``into``."""
    alive, counts = np.ones(len(pieces.detections), bool), pieces.counts.copy()
    for stays, goes in zip(into.tolist(), gone.tolist(), strict=True):
        if alive[stays] and alive[goes]:
            alive[goes] = False
            counts[stays] += counts[goes]
    return pieces._replace(counts=counts).select(alive)


def _double_pairs(pieces: Pieces, max_overlap: float, class_aware: bool) -> tuple[IntArray, IntArray]:
    """Return pairs (stays, goes) of masks, of which the smaller shares ``max_overlap`` or more with the other.

    The one with the better score stays, unless it is less than half as large: a chimney is no roof. Pieces are in the
    order of their scores, and pairs in that of the better ones.
    """
    found, outlines = pieces.detections, outlines_of(pieces.detections)
    assert outlines is not None
    areas = [outline_area(outline) for outline in outlines]
    bounds = boxes_to_hboxes(found.boxes)
    first, second = overlapping_pairs(bounds, bounds)  # sorted by first, then second
    possible = first < second
    if class_aware:
        possible &= found.labels[first] == found.labels[second]
    first, second = first[possible], second[possible]
    stays, goes = [], []
    for better, worse in zip(first.tolist(), second.tolist(), strict=True):
        small, large = (better, worse) if areas[better] < areas[worse] else (worse, better)
        if contained_share(outlines[small], outlines[large]) >= max_overlap:
            is_part = areas[small] < 0.5 * areas[large]
            stays.append(large if is_part else better)
            goes.append(small if is_part else worse)
    return np.array(stays, np.int64), np.array(goes, np.int64)
