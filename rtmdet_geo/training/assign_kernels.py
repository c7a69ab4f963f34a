"""The assigner's inner loops for the CPU, in numba: one thread, no matrix of costs.

torch would do the same with some thirty small operations an image, of which those that spread over all cores wait for
the slowest of them; on a busy machine that cost more than the network's forward pass.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtmdet_geo.jit import compiled

FloatArray = NDArray[np.floating[Any]]
IntArray = NDArray[np.int64]
_EPSILON = 1e-7
_LOG_10 = math.log(10.0)


@compiled
def points_in_any(points: FloatArray, boxes: FloatArray, margin: float) -> NDArray[np.bool_]:
    """Tell which points lie inside any box by more than a margin.

    Args:
        points: (P, 2 or more) x, y in px first.
        boxes: (G, 5) cx, cy, w, h in px, angle in rad, or (G, 4) x1, y1, x2, y2 in px.
        margin: px.

    Returns:
        (P,) bool.
    """
    inside = np.zeros(len(points), np.bool_)
    for j in range(len(boxes)):
        if boxes.shape[1] == 4:
            for i in range(len(points)):
                x, y = points[i, 0], points[i, 1]
                inside[i] |= min(x - boxes[j, 0], y - boxes[j, 1], boxes[j, 2] - x, boxes[j, 3] - y) > margin
            continue
        half_w, half_h = boxes[j, 2] * 0.5, boxes[j, 3] * 0.5
        cosine, sine = math.cos(boxes[j, 4]), math.sin(boxes[j, 4])
        reach_x = abs(half_w * cosine) + abs(half_h * sine)
        reach_y = abs(half_w * sine) + abs(half_h * cosine)
        for i in range(len(points)):
            x, y = points[i, 0] - boxes[j, 0], points[i, 1] - boxes[j, 1]
            if inside[i] or abs(x) > reach_x or abs(y) > reach_y:
                continue
            inside[i] = half_w - abs(x * cosine + y * sine) > margin and half_h - abs(y * cosine - x * sine) > margin
    return inside


@compiled
def horizontal_overlaps(boxes1: FloatArray, boxes2: FloatArray) -> FloatArray:
    """Return the IoU matrix (N, M) float64 of horizontal boxes (N, 4) and (M, 4), x1, y1, x2, y2 in px.

    As :func:`rtmdet_geo.training.assign.horizontal_iou`.
    """
    result = np.zeros((len(boxes1), len(boxes2)), np.float64)
    for i in range(len(boxes1)):
        area1 = (boxes1[i, 2] - boxes1[i, 0]) * (boxes1[i, 3] - boxes1[i, 1])
        for j in range(len(boxes2)):
            width = min(boxes1[i, 2], boxes2[j, 2]) - max(boxes1[i, 0], boxes2[j, 0])
            height = min(boxes1[i, 3], boxes2[j, 3]) - max(boxes1[i, 1], boxes2[j, 1])
            if width > 0 and height > 0:
                area2 = (boxes2[j, 2] - boxes2[j, 0]) * (boxes2[j, 3] - boxes2[j, 1])
                result[i, j] = width * height / max(area1 + area2 - width * height, 1e-6)
    return result


@compiled
def class_terms(logits: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Split the classification cost into what depends on the candidate only.

    Args:
        logits: (V, C).

    Returns:
        probability (V, C), softplus (V, C), and the cost (V,) if no class were right: sum of softplus * probability².
    """
    probability = np.empty(logits.shape, np.float64)
    softplus = np.empty(logits.shape, np.float64)
    all_wrong = np.zeros(len(logits), np.float64)
    for i in range(logits.shape[0]):
        for c in range(logits.shape[1]):
            value = float(logits[i, c])
            small = math.exp(-abs(value))
            probability[i, c] = (1.0 if value >= 0 else small) / (1.0 + small)
            softplus[i, c] = max(value, 0.0) + math.log1p(small)
            all_wrong[i] += softplus[i, c] * probability[i, c] ** 2
    return probability, softplus, all_wrong


@compiled
def match_chunk(
    ious: FloatArray,
    logits: FloatArray,
    probability: FloatArray,
    softplus: FloatArray,
    all_wrong: FloatArray,
    priors: FloatArray,
    labels: IntArray,
    centers: FloatArray,
    first_gt: int,
    topk: int,
    soft_center_radius: float,
    iou_weight: float,
    count: IntArray,
    taken_gt: IntArray,
    taken_iou: FloatArray,
    lowest_cost: FloatArray,
    lowest_gt: IntArray,
    lowest_iou: FloatArray,
) -> None:
    """Let some ground truths choose their candidates; the last six arrays (V,) carry over and are updated.

    Args:
        ious: (G, V) IoU of the ground truths with the candidates.
        logits: (V, C).
        probability: (V, C), from :func:`class_terms`.
        softplus: (V, C), from :func:`class_terms`.
        all_wrong: (V,), from :func:`class_terms`.
        priors: (V, 3 or more) x, y, stride in px.
        labels: (G,) class indices.
        centers: (G, 2) px.
        first_gt: index of the first ground truth here among all of the image.
        topk: candidates whose IoUs make up k, at most V.
        soft_center_radius: strides.
        iou_weight: factor of the IoU cost.
        count: ground truths that chose the candidate.
        taken_gt: the last of them.
        taken_iou: IoU with it.
        lowest_cost: lowest cost so far over all ground truths, whether they chose the candidate or not.
        lowest_gt: the ground truth of that cost.
        lowest_iou: IoU with it.
    """
    best_ious = np.empty(topk, np.float64)
    best_costs = np.empty(topk, np.float64)
    best_candidates = np.empty(topk, np.int64)
    for j in range(len(labels)):
        best_ious[:] = 0.0
        best_costs[:] = np.inf
        best_candidates[:] = -1
        label = labels[j]
        for i in range(len(priors)):
            iou = ious[j, i]
            p = probability[i, label]
            cost = all_wrong[i] - softplus[i, label] * p * p
            cost += (softplus[i, label] - logits[i, label] * iou) * (iou - p) ** 2
            cost -= iou_weight * math.log(iou + _EPSILON)
            distance = math.hypot(priors[i, 0] - centers[j, 0], priors[i, 1] - centers[j, 1])
            cost += math.exp((distance / priors[i, 2] - soft_center_radius) * _LOG_10)
            if cost < lowest_cost[i]:
                lowest_cost[i], lowest_gt[i], lowest_iou[i] = cost, first_gt + j, iou
            if iou > best_ious[topk - 1]:  # insertion into the descending list of the best
                slot = topk - 1
                while slot > 0 and best_ious[slot - 1] < iou:
                    best_ious[slot] = best_ious[slot - 1]
                    slot -= 1
                best_ious[slot] = iou
            if cost < best_costs[topk - 1]:
                slot = topk - 1
                while slot > 0 and best_costs[slot - 1] > cost:
                    best_costs[slot], best_candidates[slot] = best_costs[slot - 1], best_candidates[slot - 1]
                    slot -= 1
                best_costs[slot], best_candidates[slot] = cost, i
        for slot in range(max(1, int(best_ious.sum()))):
            i = best_candidates[slot]
            if i >= 0:  # -1: not a number among the costs
                count[i] += 1
                taken_gt[i], taken_iou[i] = first_gt + j, ious[j, i]
