"""What may stand in for NMS over the scene: soft-NMS and weighted box fusion, by exact IoU. numpy only.

Both look only at boxes of one class (or of all) whose bounds overlap, so what lies apart cannot change the result.
"""

from __future__ import annotations

import heapq
import math
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rtmdet_geo.boxes import boxes_to_hboxes, hboxes_to_boxes, overlapping_pairs, regularize_le90
from rtmdet_geo.nms import rotated_iou, rotated_iou_aligned
from rtmdet_geo.structures import Kind

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

#: "nms": greedy, exact; "soft-nms": scores decay; "wbf": weighted box fusion.
MergeMethod = Literal["nms", "soft-nms", "wbf"]
#: Width of soft-NMS's Gaussian (Bodla et al. 2017, section 5).
SOFT_SIGMA = 0.5
#: Soft-NMS drops a box whose score has decayed below this (the authors' own setting).
LEAST_SCORE = 0.001


class Fused(NamedTuple):
    """C clusters of weighted box fusion, in the order of their best boxes.

    Attributes:
        boxes: (C, 5) float64 weighted means.
        scores: (C,) float64 means.
        labels: (C,) int64, that of the best box.
        clusters: (N,) int64, the cluster of each box given.
    """

    boxes: FloatArray
    scores: FloatArray
    labels: IntArray
    clusters: IntArray


def soft_nms(
    boxes: FloatArray,
    scores: NDArray[np.floating],
    labels: IntArray | None = None,
    *,
    sigma: float = SOFT_SIGMA,
    least_score: float = LEAST_SCORE,
) -> tuple[IntArray, FloatArray]:
    """Lower the scores of boxes that overlap better ones by ``exp(-iou ** 2 / sigma)`` (Bodla et al. 2017, eq. 4).

    The best box is taken, the scores of all others decay by their IoU with it, and so on with what is left.

    Args:
        boxes: (N, 5) cx, cy, w, h in px, angle in rad.
        scores: (N,); among equals the first goes first.
        labels: (N,) int64, boxes of different labels leave each other alone; None: all compete.
        sigma: above 0; the larger, the less scores decay.
        least_score: boxes whose score is or decays below it are dropped.

    Returns:
        Rising indexes of the boxes that are left, and their scores, (K,) float64.

    Example:
        >>> boxes = np.array([[5.0, 5, 4, 2, 0], [6, 5, 4, 2, 0]])  # IoU 0.6
        >>> soft_nms(boxes, np.array([0.9, 0.8]))[1].round(4).tolist()  # 0.8 * exp(-0.36 / 0.5)
        [0.9, 0.3894]
    """
    current = np.asarray(scores, np.float64).tolist()
    first, second = _pairs(boxes, labels)
    decay = np.exp(-(rotated_iou_aligned(boxes[first], boxes[second]) ** 2) / sigma).tolist()
    neighbours: list[list[tuple[int, float]]] = [[] for _ in current]
    for i, j, factor in zip(first.tolist(), second.tolist(), decay, strict=True):
        if factor < 1:
            neighbours[i].append((j, factor))
            neighbours[j].append((i, factor))
    queue = [(-score, index) for index, score in enumerate(current)]
    heapq.heapify(queue)
    is_taken = [False] * len(current)
    while queue:
        negative, index = heapq.heappop(queue)
        if -negative < least_score:
            break
        if is_taken[index] or -negative != current[index]:  # an entry from before its score decayed
            continue
        is_taken[index] = True
        for other, factor in neighbours[index]:
            if not is_taken[other]:
                current[other] *= factor
                heapq.heappush(queue, (-current[other], other))
    kept = np.flatnonzero(np.array(is_taken, bool))
    return kept, np.array(current, np.float64)[kept]


def fuse_boxes(
    boxes: FloatArray,
    scores: NDArray[np.floating],
    labels: IntArray,
    *,
    iou_threshold: float,
    kind: Kind = "rotated",
    class_aware: bool = True,
) -> Fused:
    """Fuse boxes of one object into their mean (weighted box fusion, Solovyev et al. 2021, section 3).

    In the order given a box joins the cluster whose fused box it overlaps most, if their IoU exceeds the threshold,
    or begins one of its own. Centre and sides of a fused box are means weighted by the scores. The angle is that of
    the weighted mean of (cos 2a, sin 2a), members turned by quarter turns (w and h change places) to be nearest to the
    best one. The score is the plain mean: how many models agree, by which the paper rescales it, does not apply.
    Clusters are compared where the bounds of one of their members overlap those of the box.

    Args:
        boxes: (N, 5) cx, cy, w, h in px, angle in rad, best score first.
        scores: (N,).
        labels: (N,) int64.
        iou_threshold: in [0, 1].
        kind: "rotated"; another: enclosing boxes are fused.
        class_aware: False: boxes of different labels are fused, too.

    Example:
        >>> boxes = np.array([[5.0, 5, 4, 2, 0], [6, 5, 4, 2, 0]])
        >>> fused = fuse_boxes(boxes, np.array([0.9, 0.3]), np.array([0, 0]), iou_threshold=0.5)
        >>> fused.boxes.round(6).tolist(), fused.scores.round(6).tolist()
        ([[5.25, 5.0, 4.0, 2.0, 0.0]], [0.6])
    """
    weights = np.asarray(scores, np.float64)
    boxes = np.asarray(boxes, np.float64) if kind == "rotated" else hboxes_to_boxes(boxes_to_hboxes(boxes))
    first, second = _pairs(boxes, labels if class_aware else None)
    order = np.lexsort((first, second))
    before = np.split(first[order], np.searchsorted(second[order], np.arange(1, len(boxes))))
    clusters = np.zeros(len(boxes), np.int64)
    members: list[list[int]] = []
    fused: list[FloatArray] = []
    for index in range(len(boxes)):
        candidates = np.unique(clusters[before[index]])
        home = -1
        if len(candidates):
            iou = rotated_iou(boxes[index : index + 1], np.array([fused[number] for number in candidates]))[0]
            home = int(candidates[np.argmax(iou)]) if iou.max() > iou_threshold else -1
        if home < 0:
            home = len(members)
            members.append([])
            fused.append(boxes[index])
        members[home].append(index)
        clusters[index] = home
        if len(members[home]) > 1:
            fused[home] = _mean_box(boxes[members[home]], weights[members[home]])
    means = np.array(fused).reshape(-1, 5)
    return Fused(
        regularize_le90(means) if kind == "rotated" else means,
        np.array([weights[group].mean() for group in members], np.float64),
        np.array([labels[group[0]] for group in members], np.int64),
        clusters,
    )


def _pairs(boxes: FloatArray, labels: IntArray | None) -> tuple[IntArray, IntArray]:
    """Return the pairs i < j of boxes that compete and whose bounds overlap, sorted."""
    bounds = boxes_to_hboxes(boxes)
    first, second = overlapping_pairs(bounds, bounds)
    possible = first < second
    if labels is not None:
        possible &= labels[first] == labels[second]
    return first[possible], second[possible]


def _mean_box(boxes: FloatArray, weights: FloatArray) -> FloatArray:
    """Return the (5,) mean of boxes (N, 5), the first one's orientation deciding which side is the width."""
    if weights.sum() <= 0:
        weights = np.ones(len(boxes))
    quarters = np.round((boxes[:, 4] - boxes[0, 4]) / (math.pi / 2)).astype(np.int64)
    sizes = np.where((quarters % 2 == 1)[:, None], boxes[:, 3:1:-1], boxes[:, 2:4])
    turned = 2 * (boxes[:, 4] - quarters * math.pi / 2)
    angle = 0.5 * math.atan2(float(weights @ np.sin(turned)), float(weights @ np.cos(turned)))
    return np.concatenate([weights @ np.column_stack([boxes[:, :2], sizes]) / weights.sum(), [angle]])
