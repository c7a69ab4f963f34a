"""COCO's average precision and recall of boxes and of masks, from arrays, counted by faster-coco-eval.

https://cocodataset.org/#detection-eval: 10 IoU thresholds from 0.5 to 0.95, precision at 101 recalls, at most 100
detections per image and class, objects small up to 32 x 32 px and large from 96 x 96 px on. A crowd is no object:
detections inside it do not count, nor does it when it is missed. Ours is the way from arrays and back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rtmdet_geo.annotations.coco import encode_counts
from rtmdet_geo.errors import MissingDependencyError
from rtmdet_geo.evaluation.rotated import Curve
from rtmdet_geo.masks import CroppedMask

Array = NDArray[Any]

#: Names of COCO's twelve figures, in its order: AP and AR, by IoU, by size of the objects, by number of detections.
FIGURES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
#: IoU from which on a detection is a hit; AP is the mean over all.
IOU_THRESHOLDS = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))


@dataclass(frozen=True)
class CocoDetections:
    """What was found in one image.

    Attributes:
        boxes: (D, 4) x1, y1, x2, y2 in px.
        scores: (D,).
        labels: (D,) int64.
        masks: D run-length masks of the whole image (see :func:`run_lengths`), or None.
    """

    boxes: Array
    scores: Array
    labels: Array
    masks: Sequence[dict[str, Any]] | None = None


@dataclass(frozen=True)
class CocoTruth:
    """What is labelled in one image.

    Attributes:
        boxes: (G, 4) x1, y1, x2, y2 in px.
        labels: (G,) int64.
        is_crowd: (G,) bool.
        areas: (G,) px^2, by which an object is small, medium or large: of its mask where it has one.
        masks: G run-length masks of the whole image, or None.
    """

    boxes: Array
    labels: Array
    is_crowd: Array
    areas: Array
    masks: Sequence[dict[str, Any]] | None = None


@dataclass(frozen=True)
class CocoScores:
    """COCO's verdict.

    Attributes:
        figures: by the names of :data:`FIGURES`; nan where nothing of that size is labelled.
        precision: (10, 101, C) at every IoU threshold, recall 0, 0.01, ..., 1 and class; nan for classes without
            objects.
        scores: (10, 101, C) lowest score of the detections that reach the recall; 0 where it is not reached.
        num_objects: (C,) int64 labelled objects, crowds left out.
    """

    figures: dict[str, float]
    precision: Array
    scores: Array
    num_objects: Array

    def average_precision(self, label: int, iou_threshold: float | None = None) -> float:
        """Return the AP of one class, over all IoU thresholds or at one of them; nan when nothing is labelled."""
        at = slice(None) if iou_threshold is None else IOU_THRESHOLDS.index(iou_threshold)
        return float(np.mean(self.precision[at, :, label]))

    def curve(self, label: int, iou_threshold: float) -> Curve:
        """Return precision over the recalls 0, 0.01, ..., 1 of one class, made monotone."""
        at = IOU_THRESHOLDS.index(iou_threshold)
        average, number = self.average_precision(label, iou_threshold), int(self.num_objects[label])
        if number == 0:
            return Curve(average, np.zeros(0), np.zeros(0), np.zeros(0), 0)
        recall = np.linspace(0, 1, self.precision.shape[1])
        return Curve(average, self.precision[at, :, label], recall, self.scores[at, :, label], number)


def run_lengths(mask: CroppedMask, height: int, width: int) -> dict[str, Any]:
    """Return a cropped mask as run lengths of the whole image of height x width px, in COCO's compressed text form."""
    rows = mask.mask.shape[0]
    # a row of background below each column: no run goes on in the next one
    padded = np.zeros((rows + 1, mask.mask.shape[1]), np.int8)
    padded[:rows] = mask.mask != 0
    changes = np.flatnonzero(np.diff(padded.T.ravel(), prepend=0))
    columns, offsets = np.divmod(changes, rows + 1)
    places = (columns + mask.x) * height + offsets + mask.y  # of the whole image, down the columns
    if rows == height:  # runs that do go on: an end and a start at the same place
        unique, counts = np.unique(places, return_counts=True)
        places = unique[counts == 1]
    counts = np.diff(places, prepend=0, append=height * width)
    if len(counts) > 1 and counts[-1] == 0:
        counts = counts[:-1]
    return {"size": [height, width], "counts": encode_counts(counts)}


def evaluate_coco(
    detections: Sequence[CocoDetections],
    truths: Sequence[CocoTruth],
    *,
    num_classes: int,
    measure: Literal["boxes", "masks"] = "boxes",
) -> CocoScores:
    """Score detections by COCO's protocol.

    Args:
        detections: one per image.
        truths: one per image, same order.
        num_classes: C.
        measure: whose IoU counts.

    Raises:
        ValueError: the numbers of images differ, or masks are asked for and some image has none.
        MissingDependencyError: faster-coco-eval is not installed.
    """
    if len(detections) != len(truths):
        raise ValueError(f"detections of {len(detections)} images, but labels of {len(truths)}")
    masks = [*(item.masks for item in detections), *(item.masks for item in truths)]
    if measure == "masks" and any(item is None for item in masks):
        raise ValueError("masks are to be scored, but some detections or labels have none")
    library = require_coco()
    content = {
        "images": [{"id": index, "height": 0, "width": 0} for index in range(1, len(truths) + 1)],  # masks have sizes
        "categories": [{"id": label, "name": str(label)} for label in range(1, num_classes + 1)],
    }
    labelled = library.COCO(content | {"annotations": _truth_entries(truths, measure)})
    found = library.COCO(content | {"annotations": _found_entries(detections, measure, library)})
    judge = library.COCOeval_faster(labelled, found, "bbox" if measure == "boxes" else "segm", print_function=_silent)
    judge.run()
    counted = [truth.labels[~np.asarray(truth.is_crowd, bool)] for truth in truths]
    num_objects = np.bincount(np.concatenate([np.zeros(0, np.int64), *counted]), minlength=num_classes)
    # (T, R, K, A, M): all sizes, the most detections
    precision, scores = (
        np.asarray(judge.eval[name]).reshape(10, 101, num_classes, 4, 3)[..., 0, -1] for name in ("precision", "scores")
    )
    is_absent = precision < 0
    stats = [float(value) if value >= 0 else float("nan") for value in judge.stats[: len(FIGURES)]]
    figures = dict(zip(FIGURES, stats, strict=True))
    return CocoScores(figures, np.where(is_absent, np.nan, precision), np.where(is_absent, 0, scores), num_objects)


def require_coco() -> Any:
    """Return faster-coco-eval, which is imported by nobody else.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import faster_coco_eval
    except ImportError as error:
        raise MissingDependencyError(
            f"faster_coco_eval cannot be imported ({error}); for COCO's figures run: pip install 'rtmdet-geo[eval]'"
        ) from error
    return faster_coco_eval


def _silent(*_: object) -> None:
    """Take the library's lines of print."""


def _truth_entries(truths: Sequence[CocoTruth], measure: str) -> list[dict[str, Any]]:
    """Return the annotations of all images; ids start at 1, for the library takes 0 for "no match"."""
    entries: list[dict[str, Any]] = []
    for image, truth in enumerate(truths, 1):
        for row, (box, label) in enumerate(zip(_as_xywh(truth.boxes), truth.labels, strict=True)):
            entry = {"id": len(entries) + 1, "image_id": image, "category_id": int(label) + 1, "bbox": box}
            entry |= {"area": float(truth.areas[row]), "iscrowd": int(truth.is_crowd[row])}
            if measure == "masks" and truth.masks is not None:
                entry["segmentation"] = truth.masks[row]
            entries.append(entry)
    return entries


def _found_entries(detections: Sequence[CocoDetections], measure: str, library: Any) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    for image, found in enumerate(detections, 1):
        boxes = _as_xywh(found.boxes)
        masks = list(found.masks) if measure == "masks" and found.masks is not None else []
        areas = library.mask.area(masks).tolist() if masks else [width * height for _, _, width, height in boxes]
        for row, (box, label) in enumerate(zip(boxes, found.labels, strict=True)):
            entry = {"id": len(entries) + 1, "image_id": image, "category_id": int(label) + 1, "bbox": box}
            entry |= {"area": areas[row], "iscrowd": 0, "score": float(found.scores[row])}
            if masks:
                entry["segmentation"] = masks[row]
            entries.append(entry)
    return entries


def _as_xywh(boxes: Array) -> list[list[float]]:
    corners = np.asarray(boxes, np.float64).reshape(-1, 4)
    result: list[list[float]] = np.concatenate((corners[:, :2], corners[:, 2:] - corners[:, :2]), axis=1).tolist()
    return result
