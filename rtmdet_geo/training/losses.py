"""Quality focal loss, losses on the overlap of boxes (rotated IoU, GIoU) and of masks (dice), always in float32.

Sources: Li et al., Generalized Focal Loss (arXiv 2006.04388), eq. 6; Zhou et al., IoU Loss for 2D/3D Object Detection
(arXiv 1908.03851); Rezatofighi et al., Generalized Intersection over Union (arXiv 1902.09630), eq. 4; Milletari et al.,
V-Net (arXiv 1606.04797), eq. 3; reductions as mmdet 3.3 ``weight_reduce_loss``.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from rtmdet_geo.training.rotated_iou import rotated_iou_aligned

Reduction = Literal["none", "mean", "sum"]
IoULossMode = Literal["linear", "log", "square"]
_FLOAT32_EPSILON = torch.finfo(torch.float32).eps


def reduce_loss(
    loss: Tensor,
    weight: Tensor | None = None,
    *,
    reduction: Reduction = "mean",
    average_factor: float | Tensor | None = None,
) -> Tensor:
    """Weigh and reduce per-element losses.

    Args:
        loss: (N,) losses.
        weight: (N,) factors, or None for 1.
        reduction: "none" -> (N,), "sum" -> scalar, "mean" -> scalar: sum / N, or sum / (average_factor + eps) if given.
        average_factor: divisor of "mean", counted in whatever the caller averages over.

    Returns:
        (N,) or scalar.

    Raises:
        ValueError: the reduction is unknown, or "sum" comes with an average factor.
    """
    if weight is not None:
        loss = loss * weight
    if reduction == "none":
        return loss
    if reduction == "sum" and average_factor is None:
        return loss.sum()
    if reduction == "mean":
        return loss.mean() if average_factor is None else loss.sum() / (average_factor + _FLOAT32_EPSILON)
    raise ValueError(f"no reduction {reduction!r} with average_factor={average_factor!r}; take 'none', 'mean' or 'sum'")


def quality_focal_loss(
    logits: Tensor,
    labels: Tensor,
    scores: Tensor,
    *,
    weight: Tensor | None = None,
    beta: float = 2.0,
    reduction: Reduction = "mean",
    average_factor: float | Tensor | None = None,
) -> Tensor:
    """Quality focal loss: binary cross entropy against a soft target, times |target - probability| ** beta.

    Every class is a binary problem. The target is the score for a prior's own class and 0 for all others.

    Args:
        logits: (N, C) raw class scores.
        labels: (N,) int64 class indices; values outside [0, C) are background.
        scores: (N,) soft targets in [0, 1] (the assigned IoU), ignored for background.
        weight: (N,) factors.
        beta: focusing exponent (2 in the paper).
        reduction: see :func:`reduce_loss`.
        average_factor: see :func:`reduce_loss`.

    Returns:
        (N,) sums over the classes, or a scalar; float32.
    """
    with torch.autocast(logits.device.type, enabled=False):
        logits, scores = logits.float(), scores.float()
        num_classes = logits.shape[1]
        positive = torch.nonzero((labels >= 0) & (labels < num_classes)).squeeze(1)
        target = torch.zeros_like(logits)
        target[positive, labels[positive]] = scores[positive]
        distance = (target - logits.sigmoid()).abs()
        factor = distance.square() if beta == 2 else distance.pow(beta)
        loss = functional.binary_cross_entropy_with_logits(logits, target, reduction="none") * factor
        return reduce_loss(loss.sum(1), weight, reduction=reduction, average_factor=average_factor)


def rotated_iou_loss(
    predictions: Tensor,
    targets: Tensor,
    *,
    weight: Tensor | None = None,
    mode: IoULossMode = "linear",
    epsilon: float = 1e-6,
    reduction: Reduction = "mean",
    average_factor: float | Tensor | None = None,
) -> Tensor:
    """Loss on the exact IoU of rotated boxes: 1 - IoU, 1 - IoU² or -log IoU, with IoU clamped to at least epsilon.

    Args:
        predictions: (N, 5) cx, cy, w, h in px, angle in rad; gradients flow here.
        targets: (N, 5) likewise.
        weight: (N,) factors.
        mode: "linear" (RTMDet), "square" or "log".
        epsilon: floor of the IoU; below it the gradient is 0.
        reduction: see :func:`reduce_loss`.
        average_factor: see :func:`reduce_loss`.

    Returns:
        (N,) or scalar, float32 (float64 for float64 boxes).

    Raises:
        ValueError: unknown mode.
    """
    with torch.autocast(predictions.device.type, enabled=False):
        iou = rotated_iou_aligned(predictions, targets).clamp(min=epsilon)
        if mode == "linear":
            loss = 1 - iou
        elif mode == "square":
            loss = 1 - iou.square()
        elif mode == "log":
            loss = -iou.log()
        else:
            raise ValueError(f"unknown IoU loss mode {mode!r}; take 'linear', 'log' or 'square'")
        return reduce_loss(loss, weight, reduction=reduction, average_factor=average_factor)


def giou_loss(
    predictions: Tensor,
    targets: Tensor,
    *,
    weight: Tensor | None = None,
    epsilon: float = 1e-6,
    reduction: Reduction = "mean",
    average_factor: float | Tensor | None = None,
) -> Tensor:
    """Loss on the generalised IoU of horizontal boxes, in [0, 2]: boxes that do not overlap still attract each other.

    1 - IoU + (enclosing box - union) / enclosing box, as areas, as mmdet 3.3 ``giou_loss``.

    Args:
        predictions: (N, 4) x1, y1, x2, y2 in px; gradients flow here. Sides may be negative early in a training.
        targets: (N, 4) likewise.
        weight: (N,) factors.
        epsilon: floor of the union and of the enclosing area, px².
        reduction: see :func:`reduce_loss`.
        average_factor: see :func:`reduce_loss`.

    Returns:
        (N,) or scalar, float32.

    Raises:
        ValueError: the shapes are not two (N, 4).
    """
    if predictions.shape != targets.shape or predictions.shape[1:] != (4,):
        raise ValueError(f"giou_loss takes two (N, 4), got {tuple(predictions.shape)} and {tuple(targets.shape)}")
    with torch.autocast(predictions.device.type, enabled=False):
        predictions, targets = predictions.float(), targets.float()
        low, high = predictions[:, :2], predictions[:, 2:]
        target_low, target_high = targets[:, :2], targets[:, 2:]
        common = (torch.minimum(high, target_high) - torch.maximum(low, target_low)).clamp(min=0).prod(1)
        union = ((high - low).prod(1) + (target_high - target_low).prod(1) - common).clamp(min=epsilon)
        around = (torch.maximum(high, target_high) - torch.minimum(low, target_low)).clamp(min=0).prod(1)
        around = around.clamp(min=epsilon)
        loss = 1 - common / union + (around - union) / around
        return reduce_loss(loss, weight, reduction=reduction, average_factor=average_factor)


def dice_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    weight: Tensor | None = None,
    epsilon: float = 5e-6,
    reduction: Reduction = "mean",
    average_factor: float | Tensor | None = None,
) -> Tensor:
    """Loss on the dice coefficient of masks: 1 - 2 <p, t> / (<p, p> + <t, t>) with p = sigmoid(logits), in [0, 1].

    As mmdet 3.3 ``dice_loss`` with ``naive_dice=False``; RTMDet-Ins takes epsilon 5e-6.

    Args:
        logits: (N, ...) raw mask values; gradients flow here.
        targets: (N, ...) the same shape, in [0, 1] or bool.
        weight: (N,) factors.
        epsilon: added to each of the two sums of squares, so that two empty masks divide by no zero.
        reduction: see :func:`reduce_loss`.
        average_factor: see :func:`reduce_loss`.

    Returns:
        (N,) or scalar, float32.

    Raises:
        ValueError: the shapes differ.
    """
    if logits.shape != targets.shape:
        raise ValueError(f"dice_loss takes two of one shape, got {tuple(logits.shape)} and {tuple(targets.shape)}")
    with torch.autocast(logits.device.type, enabled=False):
        probability, target = logits.float().flatten(1).sigmoid(), targets.flatten(1).float()
        common = (probability * target).sum(1)
        squares = (probability.square().sum(1) + epsilon) + (target.square().sum(1) + epsilon)
        return reduce_loss(1 - 2 * common / squares, weight, reduction=reduction, average_factor=average_factor)
