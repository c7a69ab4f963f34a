"""Average precision, pooled over images: the area under the curve (VOC 2010 and later) and 11 points of it (VOC 2007).

Boxes are compared by their rotated IoU; whoever compares something else, such as masks
(:func:`rtmdet_geo.evaluation.masks.mask_iou`), brings the overlaps along.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtmdet_geo.evaluation.matching import best_matches
from rtmdet_geo.structures import Detections

Array = NDArray[Any]


@dataclass(frozen=True)
class Truth:
    """Labelled objects of one image: boxes (N, 5) px le90, labels (N,) int64, ignored (N,) bool (no hit, no miss)."""

    boxes: Array
    labels: Array
    ignored: Array


@dataclass(frozen=True)
class Curve:
    """Precision over recall of one class at one IoU, in order of falling score.

    Attributes:
        average_precision: area under the curve made monotone; nan when nothing is labelled.
        precision, recall, scores: (D,) float64.
        num_objects: labelled objects that count.
    """

    average_precision: float
    precision: Array
    recall: Array
    scores: Array
    num_objects: int

    @property
    def average_precision_11(self) -> float:
        """Return the mean, over recalls 0, 0.1, ..., 1, of the best precision from that recall on.

        That precision is 0 where a recall is not reached; the mean is nan when nothing is labelled. As in DOTA's
        development kit and in mmdet's ``average_precision``, recalls are compared with multiples of 0.1 in float64,
        where 3 of 10 do not reach 3 x 0.1. Source: Everingham et al. 2010, The PASCAL Visual Object Classes (VOC)
        Challenge.
        """
        if self.num_objects == 0:
            return float("nan")
        best = [self.precision[self.recall >= point * 0.1].max(initial=0.0) for point in range(11)]
        return float(np.mean(best))

    @property
    def best_f1(self) -> tuple[float, float]:
        """Return the highest F1 and the score threshold that gives it; (0, 1) when nothing was detected."""
        if len(self.scores) == 0:
            return 0.0, 1.0
        total = self.precision + self.recall
        f1 = np.divide(2 * self.precision * self.recall, total, out=np.zeros_like(total), where=total > 0)
        best = int(np.argmax(f1))
        return float(f1[best]), float(self.scores[best])


@dataclass(frozen=True)
class ClassMatches:
    """What the detections of one class overlap most, in order of falling score; see :func:`match_class`.

    Attributes:
        scores: (D,) float64, falling.
        best: (D,) int64 index of the object that each overlaps most, -1 for none.
        overlap: (D,) float64 IoU with it.
        ignored: (G,) bool: objects that are no hit and no miss.
        order: (D,) int64 place of each detection in what was matched.
    """

    scores: Array
    best: Array
    overlap: Array
    ignored: Array
    order: Array

    @property
    def num_objects(self) -> int:
        """Number of objects that count."""
        return int((~self.ignored).sum())

    def judge(self, iou_threshold: float, *, is_strict: bool = False) -> tuple[Array, Array]:
        """Return which detections are hits and which count, (D,) bool each; what counts and is no hit is a miss.

        A detection is near the object that it overlaps most if the IoU reaches the threshold (``is_strict``: exceeds
        it). It is a hit if no better one was near that object before it; near an ignored object it does not count.
        """
        near = np.flatnonzero(self.overlap > iou_threshold if is_strict else self.overlap >= iou_threshold)
        is_ignored = self.ignored[self.best[near]]
        is_hit, is_counted = np.zeros(len(self.scores), np.bool_), np.ones(len(self.scores), np.bool_)
        is_counted[near[is_ignored]] = False
        rivals = near[~is_ignored][::-1]
        first = np.full(len(self.ignored), -1)
        first[self.best[rivals]] = rivals  # of equal indices the last one written stays: the best score
        is_hit[first[first >= 0]] = True
        return is_hit, is_counted

    def curve(self, iou_threshold: float, *, is_strict: bool = False) -> Curve:
        """Return precision over recall at an IoU in (0, 1]."""
        is_hit, is_counted = self.judge(iou_threshold, is_strict=is_strict)
        return curve_of(self.scores[is_counted], is_hit[is_counted], self.num_objects)


def best_columns(f1: float, score: float, num_objects: int, num_detections: int) -> dict[str, float]:
    """Return ``best_f1`` and ``best_score`` as tables tell them, of what :attr:`Curve.best_f1` or the like returned.

    nan where nothing is labelled or nothing was detected, for there is no threshold to choose then; the score is nan
    where no detection hits, for all thresholds are alike.
    """
    is_known = num_objects > 0 and num_detections > 0
    return {"best_f1": f1 if is_known else math.nan, "best_score": score if is_known and f1 > 0 else math.nan}


def match_class(scores: Array, best: Array, overlap: Array, ignored: Array) -> ClassMatches:
    """Put the matches of a class in order of score; of equal scores the one that comes first goes first.

    Args:
        scores: (D,) of the detections.
        best: (D,) as of :func:`rtmdet_geo.evaluation.matching.best_matches`.
        overlap: (D,) likewise.
        ignored: (G,) bool of the objects.
    """
    order = np.argsort(-scores, kind="stable")
    return ClassMatches(scores[order].astype(np.float64), best[order], overlap[order], np.asarray(ignored, bool), order)


def precision_recall(
    detections: Sequence[Detections],
    truths: Sequence[Truth],
    *,
    label: int,
    iou_threshold: float,
    overlaps: Sequence[Array] | None = None,
) -> Curve:
    """Match detections to labelled objects greedily in order of score, pooled over images.

    Each detection looks at the object of its image that it overlaps most (as the DOTA and VOC development kits do): a
    hit if the IoU reaches the threshold and the object is still free, a miss if it is taken; detections that fall on
    an ignored object do not count. For several thresholds see :func:`match_images`.

    Args:
        detections: one per image.
        truths: one per image, same order.
        label: class index.
        iou_threshold: IoU from which on a detection is a hit, in (0, 1].
        overlaps: see :func:`match_images`.

    Returns:
        The curve.

    Raises:
        ValueError: as :func:`match_images`.
    """
    return match_images(detections, truths, label=label, overlaps=overlaps).curve(iou_threshold)


def match_images(
    detections: Sequence[Detections],
    truths: Sequence[Truth],
    *,
    label: int,
    overlaps: Sequence[Array] | None = None,
) -> ClassMatches:
    """Match the detections of a class once; :meth:`ClassMatches.curve` gives the curve at any IoU threshold.

    Args:
        detections: one per image.
        truths: one per image, same order.
        label: class index.
        overlaps: per image (D, G) IoU of all its detections with all its objects, classes mixed; None: the rotated IoU
            of the boxes.

    Raises:
        ValueError: detections, truths and overlaps do not agree in number or shape.
    """
    if len(detections) != len(truths):
        raise ValueError(f"detections of {len(detections)} images, but labels of {len(truths)}")
    if overlaps is not None:
        shapes = [(len(found), len(truth.labels)) for found, truth in zip(detections, truths, strict=True)]
        if [overlap.shape for overlap in overlaps] != shapes:
            raise ValueError(f"overlaps must be {shapes}, one row a detection and one column an object of each image")
    rows = [np.flatnonzero(found.labels == label) for found in detections]
    columns = [np.flatnonzero(truth.labels == label) for truth in truths]
    scores = _joined([found.scores[own] for found, own in zip(detections, rows, strict=True)])
    ignored = _joined([truth.ignored[own] for truth, own in zip(truths, columns, strict=True)]).astype(bool)
    if overlaps is None:
        boxes, images = _pool([found.boxes[own] for found, own in zip(detections, rows, strict=True)])
        best, overlap = best_matches(
            boxes, images, *_pool([t.boxes[own] for t, own in zip(truths, columns, strict=True)])
        )
    else:
        best, overlap = best_of_overlaps(overlaps, rows, columns)
    return match_class(scores, best, overlap, ignored)


def _pool(boxes: Sequence[Array]) -> tuple[Array, Array]:
    """Return boxes of all images, (N, 5), and the image of each, (N,)."""
    return _joined(boxes).reshape(-1, 5), np.repeat(np.arange(len(boxes)), [len(part) for part in boxes])


def _joined(parts: Sequence[Array]) -> Array:
    return np.concatenate(parts) if parts else np.zeros(0)


def best_of_overlaps(overlaps: Sequence[Array], rows: Sequence[Array], columns: Sequence[Array]) -> tuple[Array, Array]:
    """Return what :func:`rtmdet_geo.evaluation.matching.best_matches` would, from overlaps that are known.

    Args:
        overlaps: (D, G) IoU of each image.
        rows: detections of each image to take.
        columns: objects of each image to take; they are counted over all images.
    """
    best: list[Array] = [np.zeros(0, np.int64)]
    overlap: list[Array] = [np.zeros(0)]
    begin = 0
    for matrix, own_rows, own_columns in zip(overlaps, rows, columns, strict=True):
        part = matrix[np.ix_(own_rows, own_columns)] if len(own_columns) else np.zeros((len(own_rows), 1))
        best.append(part.argmax(axis=1) + begin if len(own_columns) else np.full(len(own_rows), -1))
        overlap.append(part.max(axis=1))
        begin += len(own_columns)
    return np.concatenate(best), np.concatenate(overlap)


def curve_of(scores: Array, hits: Array, num_objects: int, *, join_ties: bool = False) -> Curve:
    """Return precision over recall of detections of which it is known whether they hit.

    Args:
        scores: (D,), any order; of equal ones the first comes first.
        hits: (D,) bool.
        num_objects: labelled objects that count.
        join_ties: equal scores make one point of the curve, so that their order does not matter.
    """
    order = np.argsort(-scores, kind="stable")
    score, hit = scores[order].astype(float), hits[order]
    true_positives = np.cumsum(hit)
    precision = true_positives / np.maximum(np.arange(1, len(hit) + 1), 1)
    recall = true_positives / max(num_objects, 1)
    if join_ties:
        last = np.flatnonzero(np.append(np.diff(score) != 0, [True] * (len(score) > 0)))
        precision, recall, score = precision[last], recall[last], score[last]
    return Curve(_area(precision, recall, num_objects), precision, recall, score, num_objects)


def _area(precision: Array, recall: Array, num_objects: int) -> float:
    if num_objects == 0:
        return float("nan")
    if len(precision) == 0:
        return 0.0
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall, prepend=0.0) * envelope))
