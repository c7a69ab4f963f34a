"""Average precision, pooled over images: the area under the curve (VOC 2010 and later) and 11 points of it (VOC 2007).

Boxes are compared by their rotated IoU; whoever compares something else, such as masks
(:func:`rtmdet_geo.evaluation.masks.mask_iou`), brings the overlaps along.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtmdet_geo.nms import rotated_iou
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

        That precision is 0 where a recall is not reached; the mean is nan when nothing is labelled. Source: Everingham
        et al. 2010, The PASCAL Visual Object Classes (VOC) Challenge.
        """
        if self.num_objects == 0:
            return float("nan")
        # recalls are ratios of whole numbers: the slack makes 3 of 5 reach 0.6
        best = [self.precision[self.recall >= point / 10 - 1e-9].max(initial=0.0) for point in range(11)]
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
    an ignored object do not count.

    Args:
        detections: one per image.
        truths: one per image, same order.
        label: class index.
        iou_threshold: IoU from which on a detection is a hit, in (0, 1].
        overlaps: per image (D, G) IoU of all its detections with all its objects, classes mixed; None: the rotated IoU
            of the boxes.

    Returns:
        The curve.

    Raises:
        ValueError: detections, truths and overlaps do not agree in number or shape.
    """
    if overlaps is not None:
        shapes = [(len(found), len(truth.labels)) for found, truth in zip(detections, truths, strict=True)]
        if [overlap.shape for overlap in overlaps] != shapes:
            raise ValueError(f"overlaps must be {shapes}, one row a detection and one column an object of each image")
    scores, hits, counted = [], [], []
    num_objects = 0
    for image, (found, truth) in enumerate(zip(detections, truths, strict=True)):
        of_class = truth.labels == label
        boxes, ignored = truth.boxes[of_class], truth.ignored[of_class]
        num_objects += int((~ignored).sum())
        rows = np.flatnonzero(found.labels == label)
        rows = rows[np.argsort(-found.scores[rows], kind="stable")]
        if overlaps is not None:
            overlap = overlaps[image][np.ix_(rows, np.flatnonzero(of_class))]
        elif len(boxes) and len(rows):
            overlap = rotated_iou(found.boxes[rows], boxes)
        else:
            overlap = np.zeros((len(rows), len(boxes)))
        taken = np.zeros(len(boxes), bool)
        for row in range(len(rows)):
            best = int(np.argmax(overlap[row])) if len(boxes) else -1
            near = best >= 0 and overlap[row, best] >= iou_threshold
            hits.append(bool(near and not ignored[best] and not taken[best]))
            counted.append(not (near and ignored[best]))
            if near:
                taken[best] = True
        scores.append(found.scores[rows])
    score = np.concatenate(scores) if scores else np.zeros(0)
    keep = np.array(counted, bool)
    return curve_of(score[keep], np.array(hits, bool)[keep], num_objects)


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
