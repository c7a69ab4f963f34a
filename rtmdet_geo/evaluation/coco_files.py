"""COCO result files against COCO labels: the twelve figures of boxes or masks, and the AP of each class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rtmdet_geo.annotations.coco import CocoLabels, CocoObject, decode_counts, encode_counts, read_coco
from rtmdet_geo.annotations.coco_results import CocoResult, read_coco_results
from rtmdet_geo.errors import AnnotationError
from rtmdet_geo.evaluation.coco import CocoDetections, CocoScores, CocoTruth, evaluate_coco, require_coco
from rtmdet_geo.evaluation.confusion import CONFUSION_IOU, confuse_classes
from rtmdet_geo.evaluation.report import EvaluationReport
from rtmdet_geo.evaluation.rotated import best_columns, best_of_overlaps, match_class

Array = NDArray[Any]
CocoMeasure = Literal["boxes", "masks"]


def evaluate_coco_results(
    results: str | Path, annotations: str | Path, *, measure: CocoMeasure | None = None
) -> EvaluationReport:
    """Score a COCO result file by COCO's protocol.

    Args:
        results: JSON list of detections.
        annotations: COCO label file.
        measure: whose IoU counts; None: of boxes where the results have them, else of masks.

    Returns:
        COCO's twelve figures, and AP, AP50 and AP75 by class. The confusion of classes and the scores of hits are at
        IoU 0.5, where each detection looks at the object that it overlaps most.

    Raises:
        AnnotationError: a file is malformed; the message names the entry.
        MissingDependencyError: faster-coco-eval is not installed.
    """
    library = require_coco()
    labels = read_coco(annotations)
    found = read_coco_results(results, labels)
    chosen: CocoMeasure = measure or ("masks" if found and found[0].hbox is None else "boxes")
    lacking = [number for number, one in enumerate(found) if (one.hbox if chosen == "boxes" else one.mask) is None]
    if lacking:
        raise AnnotationError(f"result file {str(results)!r}, entry {lacking[0]}: it has none of the {chosen} to score")
    label_of = {name: label for label, name in enumerate(labels.classes)}
    by_image: dict[int, list[CocoResult]] = {image_id: [] for image_id in labels.images}
    for one in found:
        by_image[one.image_id].append(one)
    detections = [_detections(entries, label_of) for entries in by_image.values()]
    truths = [_truth(labels, image_id, label_of, chosen, library, str(annotations)) for image_id in by_image]
    scores = evaluate_coco(detections, truths, num_classes=len(label_of), measure=chosen)
    return _report(scores, labels.classes, detections, truths, chosen, library)


def _detections(entries: Sequence[CocoResult], label_of: Mapping[str, int]) -> CocoDetections:
    return CocoDetections(
        np.array([one.hbox or (0, 0, 0, 0) for one in entries], np.float64).reshape(-1, 4),
        np.array([one.score for one in entries], np.float64),
        np.array([label_of[one.class_name] for one in entries], np.int64),
        [one.mask or {} for one in entries],
    )


def _truth(
    labels: CocoLabels, image_id: int, label_of: Mapping[str, int], measure: CocoMeasure, library: Any, path: str
) -> CocoTruth:
    objects, image = labels.objects[image_id], labels.images[image_id]
    boxes = np.array([_bounds(entry) for entry in objects], np.float64).reshape(-1, 4)
    areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    stated = np.array([entry.area for entry in objects], np.float64)
    masks = [_packed(entry, image, library, path) for entry in objects] if measure == "masks" else None
    return CocoTruth(
        boxes,
        np.array([label_of[entry.class_name] for entry in objects], np.int64),
        np.array([entry.is_crowd for entry in objects], np.bool_),
        np.where(np.isnan(stated), areas, stated),
        masks,
    )


def _bounds(entry: CocoObject) -> tuple[float, ...]:
    if entry.hbox is not None:
        return entry.hbox
    return (*entry.points.min(axis=0), *entry.points.max(axis=0)) if len(entry.points) else (0.0, 0.0, 0.0, 0.0)


def _packed(entry: CocoObject, image: Mapping[str, Any], library: Any, path: str) -> dict[str, Any]:
    """Return an object's mask as run lengths; polygons are filled as COCO's own tools do."""
    height, width = image.get("height"), image.get("width")
    place = f"label file {path!r}, annotation {entry.annotation_id}"
    mask: dict[str, Any]
    if entry.segmentation is None or not height or not width:
        raise AnnotationError(f"{place}: masks need a segmentation, and an image with height and width")
    try:
        if isinstance(entry.segmentation, Mapping):
            counts = encode_counts(decode_counts(entry.segmentation["counts"]))
            mask = {"size": list(entry.segmentation["size"]), "counts": counts}
        else:
            mask = library.mask.merge(library.mask.frPyObjects(entry.segmentation, int(height), int(width)))
    except (AnnotationError, RuntimeError, TypeError, ValueError, KeyError) as error:
        raise AnnotationError(f"{place}: malformed segmentation ({error})") from error
    if list(mask["size"]) != [height, width]:
        raise AnnotationError(f"{place}: its mask is of size {mask['size']}, the image of {[height, width]}")
    return mask


def _report(
    scores: CocoScores,
    classes: Sequence[str],
    detections: Sequence[CocoDetections],
    truths: Sequence[CocoTruth],
    measure: CocoMeasure,
    library: Any,
) -> EvaluationReport:
    curves = {name: scores.curve(label, CONFUSION_IOU) for label, name in enumerate(classes)}
    overlaps = [_overlaps(one, truth, measure, library) for one, truth in zip(detections, truths, strict=True)]
    rows, hits, misses = [], [np.zeros(0)], [np.zeros(0)]
    for label, name in enumerate(classes):
        own = [np.flatnonzero(one.labels == label) for one in detections]
        columns = [np.flatnonzero(truth.labels == label) for truth in truths]
        matches = match_class(*_taken(detections, truths, overlaps, own, columns))
        is_hit, is_counted = matches.judge(CONFUSION_IOU)
        hits.append(matches.scores[is_hit])
        misses.append(matches.scores[is_counted & ~is_hit])
        rows.append(
            {"class": name, "objects": int(scores.num_objects[label]), "detections": len(matches.scores)}
            | {"AP": scores.average_precision(label), "AP50": scores.average_precision(label, 0.5)}
            | {"AP75": scores.average_precision(label, 0.75)}
            | best_columns(*curves[name].best_f1, curves[name].num_objects, len(matches.scores))
        )
    least = np.array([curves[name].best_f1[1] for name in classes])
    sure = [np.flatnonzero(one.scores >= least[one.labels]) for one in detections]
    everything = [np.arange(len(truth.labels)) for truth in truths]
    confusion = confuse_classes(
        classes,
        match_class(*_taken(detections, truths, overlaps, sure, everything)),
        np.concatenate([np.zeros(0, np.int64), *(truth.labels for truth in truths)]),
        np.concatenate([np.zeros(0, np.int64), *(one.labels[own] for one, own in zip(detections, sure, strict=True))]),
    )
    return EvaluationReport(
        f"COCO, {measure}",
        scores.figures,
        tuple(rows),
        {name: curve for name, curve in curves.items() if curve.num_objects},
        confusion,
        np.concatenate(hits),
        np.concatenate(misses),
    )


def _taken(
    detections: Sequence[CocoDetections],
    truths: Sequence[CocoTruth],
    overlaps: Sequence[Array],
    rows: Sequence[Array],
    columns: Sequence[Array],
) -> tuple[Array, Array, Array, Array]:
    """Return scores, best matches, their overlaps, and which objects are ignored, of some of each image."""
    scores = [np.zeros(0), *(one.scores[own] for one, own in zip(detections, rows, strict=True))]
    crowds = [np.zeros(0, np.bool_), *(truth.is_crowd[own] for truth, own in zip(truths, columns, strict=True))]
    return np.concatenate(scores), *best_of_overlaps(overlaps, rows, columns), np.concatenate(crowds)


def _overlaps(found: CocoDetections, truth: CocoTruth, measure: CocoMeasure, library: Any) -> Array:
    """Return the IoU (D, G) of an image as COCO counts it; of crowds the share of the detection that is inside."""
    if not len(found.scores) or not len(truth.labels):
        return np.zeros((len(found.scores), len(truth.labels)))
    first, second = (found.masks, truth.masks) if measure == "masks" else (_as_xywh(found.boxes), _as_xywh(truth.boxes))
    return np.asarray(library.mask.iou(first, second, truth.is_crowd.astype(int).tolist()))


def _as_xywh(boxes: Array) -> Array:
    return np.concatenate((boxes[:, :2], boxes[:, 2:] - boxes[:, :2]), axis=1)
