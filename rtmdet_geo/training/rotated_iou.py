"""Intersection over union of rotated boxes in torch: differentiable pairs, and a matrix for CUDA.

The intersection is an integral, not a vertex list. In box 1's frame box 1 is ``[-a, a] x [-b, b]``, and with box 2's
border run through once, ``area = |sum over its edges of the integral of clamp(y, -b, b) dx over x in [-a, a]|``.
Each edge's term is continuous in its end points, so no vertex is lost or counted twice when edges (nearly) coincide,
where implementations that collect and sort vertices go wrong (mmcv's float32 IoU falls to 0 on near duplicates).

The gradient is written out instead of traced. A moving border changes the area by its normal velocity, integrated over
the part of it that borders the intersection (Leibniz / Reynolds): that needs lengths and first moments of the visible
pieces of 8 edges, hence it is bounded by the boxes' sizes and finite for every finite pair. Where an edge lies exactly
on the other box's border the function has a kink and the mean of both one-sided derivatives is given: identical boxes
have gradient 0.

Boxes are ``cx, cy, w, h`` in px and an angle in rad, positive clockwise on screen; any angle, sides in any order. A
box with ``w <= 0`` or ``h <= 0``, or an area below 1e-14 px², is empty: IoU 0, gradient 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

#: Boxes of a smaller area (px²) overlap with nothing (mmcv ``box_iou_rotated`` has the same limit).
MINIMUM_AREA = 1e-14
#: Pairs of boxes handled at once by :func:`rotated_iou_pairwise` (about 200 bytes a pair and live temporary).
PAIRS_PER_CHUNK = 1 << 20


def _as_float(boxes: Tensor) -> Tensor:
    """Return float64 boxes as they are and all others (half, bfloat16, integers) as float32."""
    return boxes if boxes.dtype == torch.float64 else boxes.float()


def _safe_divisor(value: Tensor) -> Tensor:
    """Replace exact zeros by one, so that a quotient is finite (its caller does not use it there)."""
    return torch.where(value == 0, torch.ones_like(value), value)


def _relative_frame(boxes1: Tensor, boxes2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Centre of box 2 in box 1's frame and cosine and sine of the angle from box 1 to box 2.

    Args:
        boxes1: (N, 5) boxes.
        boxes2: (N, 5) boxes.

    Returns:
        x, y, cosine, sine: (N,) each; x and y in px.
    """
    cosine1, sine1 = torch.cos(boxes1[:, 4]), torch.sin(boxes1[:, 4])
    delta_x, delta_y = boxes2[:, 0] - boxes1[:, 0], boxes2[:, 1] - boxes1[:, 1]
    turn = boxes2[:, 4] - boxes1[:, 4]
    x = cosine1 * delta_x + sine1 * delta_y
    y = cosine1 * delta_y - sine1 * delta_x
    return x, y, torch.cos(turn), torch.sin(turn)


def _intersection_areas(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Areas of the intersections of pairs of boxes with sides >= 0.

    Args:
        boxes1: (N, 5) float32 or float64.
        boxes2: (N, 5) same dtype.

    Returns:
        (N,) px².
    """
    x, y, cosine, sine = _relative_frame(boxes1, boxes2)
    half_w1, half_h1 = boxes1[:, 2, None] * 0.5, boxes1[:, 3, None] * 0.5  # (N, 1)
    half_w2, half_h2 = boxes2[:, 2] * 0.5, boxes2[:, 3] * 0.5
    along_x, along_y = half_w2 * cosine, half_w2 * sine
    across_x, across_y = -half_h2 * sine, half_h2 * cosine
    corners_x = torch.stack(
        (x - along_x - across_x, x + along_x - across_x, x + along_x + across_x, x - along_x + across_x), dim=1
    )  # (N, 4), once round the border
    corners_y = torch.stack(
        (y - along_y - across_y, y + along_y - across_y, y + along_y + across_y, y - along_y + across_y), dim=1
    )
    run, rise = corners_x.roll(-1, 1) - corners_x, corners_y.roll(-1, 1) - corners_y
    from_x = corners_x.clamp(-half_w1, half_w1)
    to_x = corners_x.roll(-1, 1).clamp(-half_w1, half_w1)
    # The part of each edge with x in [-a, a]; an edge along y spans no x, any y will do for it.
    slope = rise / _safe_divisor(run)
    low_y, high_y = torch.minimum(corners_y, corners_y + rise), torch.maximum(corners_y, corners_y + rise)
    from_y = (corners_y + (from_x - corners_x) * slope).clamp(low_y, high_y)
    to_y = (corners_y + (to_x - corners_x) * slope).clamp(low_y, high_y)
    # Mean of clamp(y, -b, b) while y runs evenly from from_y to to_y: below, above and between the limits.
    change = to_y - from_y
    divisor = _safe_divisor(change)
    first = ((-half_h1 - from_y) / divisor).clamp(0, 1)
    second = ((half_h1 - from_y) / divisor).clamp(0, 1)
    entry, leave = torch.minimum(first, second), torch.maximum(first, second)
    start_y, end_y = from_y.clamp(-half_h1, half_h1), to_y.clamp(-half_h1, half_h1)
    mean = start_y * entry + end_y * (1 - leave) + (start_y + end_y) * 0.5 * (leave - entry)
    # When y does not change at all both quotients are meaningless, and start_y == end_y makes the mean right anyway.
    return ((to_x - from_x) * mean).sum(1).abs()


def _visible_pieces(boxes: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Lengths and first moments of the parts of each box's edges that lie in the other box.

    Args:
        boxes: (N, 5) boxes whose edges are cut; in the order +w, -w, +h, -h side.
        others: (N, 5) boxes that cut.

    Returns:
        lengths: (N, 4) px.
        moments: (N, 4) px², integral of the signed coordinate along the edge (the box's y, y, x, x axis).
    """
    x, y, cosine, sine = _relative_frame(others, boxes)
    half_w, half_h = boxes[:, 2] * 0.5, boxes[:, 3] * 0.5
    middle_x = torch.stack((x + half_w * cosine, x - half_w * cosine, x - half_h * sine, x + half_h * sine), dim=1)
    middle_y = torch.stack((y + half_w * sine, y - half_w * sine, y + half_h * cosine, y - half_h * cosine), dim=1)
    direction_x = torch.stack((-sine, -sine, cosine, cosine), dim=1)
    direction_y = torch.stack((cosine, cosine, sine, sine), dim=1)
    reach = torch.stack((half_h, half_h, half_w, half_w), dim=1)
    low, high, share = -reach, reach, torch.ones_like(reach)
    for middle, direction, limit in (
        (middle_x, direction_x, others[:, 2, None] * 0.5),
        (middle_y, direction_y, others[:, 3, None] * 0.5),
    ):
        divisor = _safe_divisor(direction)
        one, two = (-limit - middle) / divisor, (limit - middle) / divisor
        parallel = direction == 0
        low = torch.where(parallel, low, torch.maximum(low, torch.minimum(one, two)))
        high = torch.where(parallel, high, torch.minimum(high, torch.maximum(one, two)))
        inside = (torch.sign(limit - middle.abs()) + 1) * 0.5  # on the border: one half
        share = torch.where(parallel, share * inside, share)
    visible = high > low
    low, high = torch.where(visible, low, 0.0), torch.where(visible, high, 0.0)
    return share * (high - low), share * (high - low) * (high + low) * 0.5


def _area_gradients(boxes: Tensor, others: Tensor) -> Tensor:
    """Gradient of the intersection's area with respect to ``boxes``.

    Args:
        boxes: (N, 5).
        others: (N, 5).

    Returns:
        (N, 5) px for the first four columns, px² / rad for the angle.
    """
    lengths, moments = _visible_pieces(boxes, others)
    cosine, sine = torch.cos(boxes[:, 4]), torch.sin(boxes[:, 4])
    push_w, push_h = lengths[:, 0] - lengths[:, 1], lengths[:, 2] - lengths[:, 3]
    return torch.stack(
        (
            push_w * cosine - push_h * sine,
            push_w * sine + push_h * cosine,
            (lengths[:, 0] + lengths[:, 1]) * 0.5,
            (lengths[:, 2] + lengths[:, 3]) * 0.5,
            moments[:, 1] - moments[:, 0] + moments[:, 2] - moments[:, 3],
        ),
        dim=1,
    )


def _iou_and_union(boxes1: Tensor, boxes2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """IoU of pairs, their unions (1 where a box is empty) and which pairs have no empty box."""
    size1, size2 = boxes1[:, 2:4], boxes2[:, 2:4]
    area1, area2 = size1[:, 0] * size1[:, 1], size2[:, 0] * size2[:, 1]
    solid = ((size1 > 0) & (size2 > 0)).all(1) & (area1 >= MINIMUM_AREA) & (area2 >= MINIMUM_AREA)
    positive1 = torch.cat((boxes1[:, :2], size1.clamp(min=0), boxes1[:, 4:]), dim=1)
    positive2 = torch.cat((boxes2[:, :2], size2.clamp(min=0), boxes2[:, 4:]), dim=1)
    intersection = torch.minimum(_intersection_areas(positive1, positive2), torch.minimum(area1, area2))
    union = torch.where(solid, area1 + area2 - intersection, 1.0)
    # A NaN in a box is not hidden: it must reach the loss and stop the training.
    empty = ~solid & torch.isfinite(area1) & torch.isfinite(area2)
    return torch.where(empty, 0.0, intersection / union), union, solid


class _RotatedIoU(torch.autograd.Function):
    """IoU of pairs with the gradient described at the top of this module."""

    @staticmethod
    def forward(context: Any, boxes1: Tensor, boxes2: Tensor) -> Tensor:
        """Return (N,) IoU; keep what the gradient needs."""
        iou, union, solid = _iou_and_union(boxes1, boxes2)
        context.save_for_backward(boxes1, boxes2, iou, union, solid)
        return iou

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of both box tensors: d(I / U) = (dI (1 + IoU) - IoU dA) / U."""
        boxes1, boxes2, iou, union, solid = context.saved_tensors
        factor = (gradient / union)[:, None]
        results: list[Tensor | None] = []
        for needed, boxes, others in zip(context.needs_input_grad, (boxes1, boxes2), (boxes2, boxes1), strict=True):
            if not needed:
                results.append(None)
                continue
            value = _area_gradients(boxes, others) * (1 + iou)[:, None]
            value[:, 2] -= iou * boxes[:, 3]
            value[:, 3] -= iou * boxes[:, 2]
            results.append(torch.where(solid[:, None], value * factor, 0.0))
        return results[0], results[1]


def rotated_iou_aligned(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Differentiable IoU of box i of one tensor with box i of the other.

    Computed in float32 (float64 if both inputs are float64) whatever autocast says; half inputs are cast first.

    Args:
        boxes1: (N, 5) cx, cy, w, h in px, angle in rad.
        boxes2: (N, 5) likewise.

    Returns:
        (N,) IoU in [0, 1].

    Raises:
        ValueError: the shapes are not (N, 5) and equal.
    """
    if boxes1.shape != boxes2.shape or boxes1.ndim != 2 or boxes1.shape[1] != 5:
        raise ValueError(f"rotated_iou_aligned wants two (N, 5), got {tuple(boxes1.shape)} and {tuple(boxes2.shape)}")
    with torch.autocast(boxes1.device.type, enabled=False):
        boxes1, boxes2 = _as_float(boxes1), _as_float(boxes2)
        if boxes1.dtype != boxes2.dtype:
            boxes1, boxes2 = boxes1.float(), boxes2.float()
        result: Tensor = _RotatedIoU.apply(boxes1, boxes2)
        return result


@torch.no_grad()
def rotated_iou_pairwise(boxes1: Tensor, boxes2: Tensor, *, pairs_per_chunk: int = PAIRS_PER_CHUNK) -> Tensor:
    """IoU of every box with every box, without gradient; for devices where numba does not run.

    Only pairs whose circumscribed circles meet are computed, in chunks.

    Args:
        boxes1: (N, 5) cx, cy, w, h in px, angle in rad.
        boxes2: (M, 5) likewise.
        pairs_per_chunk: most pairs (of the matrix and of candidates) handled at once; bounds the memory.

    Returns:
        (N, M) IoU in [0, 1], float32 (float64 if both inputs are).
    """
    with torch.autocast(boxes1.device.type, enabled=False):
        boxes1, boxes2 = _as_float(boxes1), _as_float(boxes2)
        if boxes1.dtype != boxes2.dtype:
            boxes1, boxes2 = boxes1.float(), boxes2.float()
        result = boxes1.new_zeros((len(boxes1), len(boxes2)))
        if result.numel() == 0:
            return result
        radius1, radius2 = torch.hypot(boxes1[:, 2], boxes1[:, 3]) / 2, torch.hypot(boxes2[:, 2], boxes2[:, 3]) / 2
        step = max(1, pairs_per_chunk // len(boxes1))
        for start in range(0, len(boxes2), step):
            part = slice(start, start + step)
            distance = torch.hypot(boxes1[:, 0, None] - boxes2[part, 0], boxes1[:, 1, None] - boxes2[part, 1])
            rows, columns = torch.nonzero(distance < radius1[:, None] + radius2[part], as_tuple=True)
            for first in range(0, len(rows), pairs_per_chunk):
                row, column = rows[first : first + pairs_per_chunk], columns[first : first + pairs_per_chunk] + start
                result[row, column] = _iou_and_union(boxes1[row], boxes2[column])[0]
        return result
