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
forgotten; :func:`merge_survivors` is the rest (decided in :mod:`rtmdet_geo.suppression`), with NMS over the scene
replaced by another method on request. :mod:`rtmdet_geo.merge_rows` gives the same row by row.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtmdet_geo.annotations.outlines import Outline, trace_mask, transform_outline
from rtmdet_geo.boxes import boxes_to_hboxes
from rtmdet_geo.masks import MASK_STRIDE, CroppedMask, assemble_detections
from rtmdet_geo.merge_methods import LEAST_SCORE, MergeMethod
from rtmdet_geo.stitch import Pieces, as_outlines, outlines_of, stitch
from rtmdet_geo.structures import Detections, Kind, MaskKernels, Tile
from rtmdet_geo.suppression import check_method, count_merged, in_order, keep_by_rank, merge_pieces
from rtmdet_geo.tiles import TileGrid

logger = logging.getLogger(__name__)

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

#: A box that comes so near (px) to an edge touches it.
BORDER_MARGIN_PX = 2.0
#: The same for instances: where a mask ends is known to a cell of the mask features.
MASK_BORDER_MARGIN_PX = float(MASK_STRIDE)
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
    kept = keep_by_rank(boxes, labels, detections.kind, iou_threshold)
    counts = count_merged(boxes, labels, kept, np.ones(len(boxes), np.int64))
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
    method: MergeMethod = "nms",
    least_score: float = LEAST_SCORE,
) -> Merged:
    """Merge what :func:`tile_survivors` left of each tile.

    Args:
        parts: of the tiles, in any order.
        grid: see :func:`merge_detections`.
        iou_threshold: likewise; "wbf" fuses boxes whose IoU exceeds it, "soft-nms" has no use for it.
        class_aware: likewise.
        max_overlap: likewise.
        kind: the result's where there are no parts.
        method: what is done over the scene: "nms"; "soft-nms", scores decay
            (:func:`rtmdet_geo.merge_methods.soft_nms`); "wbf", boxes are fused
            (:func:`rtmdet_geo.merge_methods.fuse_boxes`). In the last two fragments (step 4) give way beforehand.
            Tiles have NMS in any case.
        least_score: "soft-nms" drops boxes whose score decays below it.

    Returns:
        As :func:`merge_detections`.

    Raises:
        ConfigError: the method is unknown, or parts have masks and it is not "nms".
        ValueError: kinds are mixed.
    """
    pieces = join_parts(parts, kind)
    check_method(method, pieces.detections.kind)
    merged = merge_pieces(
        stitch(in_order(pieces), grid, class_aware=class_aware),
        iou_threshold=iou_threshold,
        class_aware=class_aware,
        max_overlap=max_overlap,
        method=method,
        least_score=least_score,
    )
    logger.debug("merged %d survivors of NMS in tiles into %d", len(pieces.detections), len(merged.detections))
    return Merged(merged.detections, merged.counts, touches_scene_edge(merged.detections.boxes, grid))


def join_parts(parts: Sequence[Pieces], kind: Kind = "rotated") -> Pieces:
    """Return the pieces of all parts, in order; ``kind`` is the result's where there are no parts.

    Raises:
        ValueError: kinds are mixed.
    """
    kinds = {part.detections.kind for part in parts}
    if len(kinds) > 1:
        raise ValueError(f"parts of different kinds cannot be merged: {sorted(kinds)}")
    return Pieces(
        Detections.concatenate([part.detections for part in parts], "scene", next(iter(kinds)) if kinds else kind),
        np.concatenate([np.zeros(0, np.int64), *(part.counts for part in parts)]),
        np.concatenate([np.zeros(0, bool), *(part.is_cut for part in parts)]),
        np.concatenate([np.zeros(0, np.int64), *(part.tile_ids for part in parts)]),
    )
