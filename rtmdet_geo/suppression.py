"""What decides, over a scene, which of the boxes that tiles gave stay; the rules are those of :mod:`rtmdet_geo.merge`.

Two pieces have a say in each other's fate only where their boxes' bounds overlap and, where classes matter, their
labels agree (NMS with a threshold of 0 apart, which leaves one rotated box a label). Ties go by score, label, box,
tile and the order given, never by an index into all that is merged. So pieces that lie apart can be merged apart, as
:mod:`rtmdet_geo.merge_rows` does.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtmdet_geo.annotations.outlines import outline_area
from rtmdet_geo.boxes import boxes_to_hboxes, hboxes_to_boxes, overlapping_pairs
from rtmdet_geo.errors import ConfigError
from rtmdet_geo.merge_methods import LEAST_SCORE, MergeMethod, fuse_boxes, soft_nms
from rtmdet_geo.nms import nms_of_kind, rotated_iou_aligned
from rtmdet_geo.stitch import Pieces, contained_share, outlines_of
from rtmdet_geo.structures import Kind

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

#: A box at an inner edge with so much of its own area in a larger box is a fragment of that object.
FRAGMENT_IOF = 0.7


def keep_by_rank(boxes: FloatArray, labels: IntArray | None, kind: Kind, iou_threshold: float) -> IntArray:
    """Return rising indexes of what NMS keeps of boxes that are in order of preference."""
    ranks = -np.arange(len(boxes), dtype=np.float64)
    return np.sort(nms_of_kind(boxes, ranks, labels, kind=kind, iou_threshold=iou_threshold))


def count_merged(boxes: FloatArray, labels: IntArray | None, kept: IntArray, counts: IntArray) -> IntArray:
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


def in_order(pieces: Pieces, *first: NDArray[Any]) -> Pieces:
    """Sort by the last of ``first``, then score, whole before cut, label, box, tile: no order of tiles shows."""
    found = pieces.detections
    keys = (pieces.tile_ids, *found.boxes.T[::-1], found.labels, pieces.is_cut, -found.scores, *first)
    return pieces.select(np.lexsort(keys))


def check_method(method: str, kind: Kind) -> None:
    """Raise ConfigError for a method of merging that is unknown or that does not go with a kind."""
    if method not in ("nms", "soft-nms", "wbf"):
        raise ConfigError(f"unknown merge method {method!r}; use 'nms', 'soft-nms' or 'wbf'")
    if kind == "mask" and method != "nms":
        raise ConfigError(f"merge method {method!r} knows boxes only, and this model gives masks; use 'nms'")


def merge_pieces(
    pieces: Pieces,
    *,
    iou_threshold: float,
    class_aware: bool,
    max_overlap: float,
    method: MergeMethod = "nms",
    least_score: float = LEAST_SCORE,
) -> Pieces:
    """Return what the method over the scene and the suppression of fragments and of doubles leave, in order.

    Args:
        pieces: of all tiles, after the border rule, joined (:func:`rtmdet_geo.stitch.stitch`).
        iou_threshold: see :func:`rtmdet_geo.merge.merge_detections`.
        class_aware: likewise.
        max_overlap: likewise.
        method: see :func:`rtmdet_geo.merge.merge_survivors`.
        least_score: likewise.
    """
    if method == "nms":
        return _greedily(pieces, iou_threshold, max_overlap, class_aware)
    # neither method would make a fragment give way to the whole object: a mean of both is no object
    pieces = in_order(_without_fragments(in_order(pieces), class_aware))
    if method == "soft-nms":
        return _softly(pieces, class_aware, least_score)
    return _fused(pieces, iou_threshold, class_aware)


def _greedily(pieces: Pieces, iou_threshold: float, max_overlap: float, class_aware: bool) -> Pieces:
    fragment, _ = _fragment_pairs(pieces, class_aware)
    is_fragment = np.zeros(len(pieces.detections), bool)
    is_fragment[fragment] = True
    pieces = in_order(pieces, is_fragment)  # a fragment must not suppress the whole object, whatever its score
    found = pieces.detections
    labels = found.labels if class_aware else None
    kept = keep_by_rank(found.boxes, labels, found.kind, iou_threshold)
    counts = count_merged(found.boxes, labels, kept, pieces.counts)
    pieces = in_order(_without_fragments(pieces.select(kept)._replace(counts=counts), class_aware))
    if outlines_of(pieces.detections) is not None and max_overlap < 1:
        pieces = _absorb(pieces, *_double_pairs(pieces, max_overlap, class_aware))
    return pieces


def _softly(pieces: Pieces, class_aware: bool, least_score: float) -> Pieces:
    found, labels = pieces.detections, pieces.detections.labels if class_aware else None
    boxes = found.boxes if found.kind == "rotated" else hboxes_to_boxes(boxes_to_hboxes(found.boxes))
    kept, scores = soft_nms(boxes, found.scores, labels, least_score=least_score)
    counts = count_merged(found.boxes, labels, kept, pieces.counts)
    left = pieces.select(kept)._replace(counts=counts)
    return in_order(left._replace(detections=replace(left.detections, scores=scores.astype(np.float32))))


def _fused(pieces: Pieces, iou_threshold: float, class_aware: bool) -> Pieces:
    found = pieces.detections
    fused = fuse_boxes(
        found.boxes, found.scores, found.labels, iou_threshold=iou_threshold, kind=found.kind, class_aware=class_aware
    )
    best = np.unique(fused.clusters, return_index=True)[1]
    counts = np.zeros(len(best), np.int64)
    np.add.at(counts, fused.clusters, pieces.counts)
    detections = replace(
        found.select(best), boxes=fused.boxes, scores=fused.scores.astype(np.float32), labels=fused.labels
    )
    return in_order(pieces.select(best)._replace(detections=detections, counts=counts))


def _without_fragments(pieces: Pieces, class_aware: bool) -> Pieces:
    """Drop what lies in a larger box of another tile, cut by its own tile's edge."""
    areas = pieces.detections.boxes[:, 2] * pieces.detections.boxes[:, 3]
    fragments, containers = _fragment_pairs(pieces, class_aware)
    order = np.lexsort((containers, -areas[containers], -areas[fragments]))  # containers are settled before
    return _absorb(pieces, containers[order], fragments[order])


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
