"""DOTA's official evaluation as its development kit does it: a plain loop per class, slow and obvious.

Own code after the rules of ``dota_evaluation_task1.py`` and ``dota_evaluation_task2.py``: every detection in the order
of scores, the horizontal overlap with all objects of its image, the polygons of those that meet it; shapely has the
polygons.
"""

from __future__ import annotations

import numpy as np
import shapely


def bounds(corners):
    points = np.reshape(corners, (-1, 4, 2))
    return np.concatenate((points.min(axis=1), points.max(axis=1)), axis=1)


def pixel_overlaps(box, others):
    """IoU of boxes whose last pixel belongs to them."""
    sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2]) + 1
    common = np.maximum(sides, 0).prod(axis=1)
    return common / ((box[2:] - box[:2] + 1).prod() + (others[:, 2:] - others[:, :2] + 1).prod(axis=1) - common)


def polygon_overlap(first, second):
    one, other = (shapely.Polygon(np.reshape(corners, (4, 2))) for corners in (first, second))
    common = one.intersection(other).area
    return common / (one.area + other.area - common)


def average(recall, precision, is_voc07):
    if is_voc07:
        return sum(precision[recall >= step].max(initial=0) / 11 for step in np.arange(0.0, 1.1, 0.1))
    recall, precision = np.concatenate(([0], recall, [1])), np.concatenate(([0], precision, [0]))
    best = np.maximum.accumulate(precision[::-1])[::-1]
    return sum((recall[i] - recall[i - 1]) * best[i] for i in range(1, len(recall)) if recall[i] != recall[i - 1])


def nearest_object(shape, corners, task):
    """Index of the object that a detection overlaps most, and how much; minus infinity without objects."""
    if not len(corners):
        return -1, -np.inf
    if task == 2:
        overlaps = pixel_overlaps(shape, np.trunc(bounds(corners)))
    else:
        meeting = np.flatnonzero(pixel_overlaps(bounds(shape)[0], bounds(corners)) > 0)
        overlaps = np.full(len(corners), -np.inf)
        for index in meeting:
            overlaps[index] = polygon_overlap(corners[index], shape)
    return int(np.argmax(overlaps)), overlaps.max()


def official_curve(detections, labelled, threshold, task=1):
    """Recall and precision of one class.

    Args:
        detections: (image, score, corners or box) each.
        labelled: by image: corners (G, 8) and whether each is difficult (G,).
        threshold: IoU that a hit exceeds.
        task: 1 polygons, 2 boxes.
    """
    taken = {image: np.zeros(len(corners), bool) for image, (corners, _) in labelled.items()}
    order = np.argsort([-score for _, score, _ in detections], kind="stable")
    hits, misses = np.zeros(len(order)), np.zeros(len(order))
    for place, index in enumerate(order):
        image, _, shape = detections[index]
        corners, is_difficult = labelled[image]
        nearest, overlap = nearest_object(np.asarray(shape, float), corners, task)
        if overlap > threshold:
            if not is_difficult[nearest]:
                hits[place], misses[place] = not taken[image][nearest], taken[image][nearest]
                taken[image][nearest] = True
        else:
            misses[place] = 1
    num_objects = sum(int((~is_difficult).sum()) for _, is_difficult in labelled.values())
    hits, misses = np.cumsum(hits), np.cumsum(misses)
    recall = hits / num_objects if num_objects else np.full(len(hits), np.nan)
    return recall, hits / np.maximum(hits + misses, np.finfo(float).eps)


def official_ap(detections, labelled, threshold, *, task=1, is_voc07=True):
    """Average precision of one class; arguments as of official_curve."""
    return average(*official_curve(detections, labelled, threshold, task), is_voc07)
