"""Dynamic soft label assignment: which prior learns which ground truth.

RTMDet (arXiv 2212.07784), section 3.3, eq. 2-5, as mmdet 3.3 ``DynamicSoftLabelAssigner`` behaves (checked by golden
numbers). A prior is a candidate if it lies inside any ground truth. The cost of a (candidate, ground truth) pair is

    soft classification cost   BCE(logit, soft label) * |soft label - probability|², summed over the classes, where
                               the soft label is the IoU for the ground truth's class and 0 for all others
    + iou_weight * -log(IoU + 1e-7)
    + 10 ** (distance of prior and centre / stride - soft_center_radius)

Each ground truth takes its k cheapest candidates, k = sum of its ``topk`` largest IoUs, rounded down, at least 1. A
candidate wanted by several goes to the ground truth with the lowest cost of all. Boxes are rotated or horizontal; the
centre is the box's, or the mask's centroid where there are masks (:func:`mask_centers`).

What differs is the bookkeeping: all of it runs over candidates only, and in chunks of ground truths with a running
minimum per candidate, so that the memory does not grow with their number. The BCE of the other classes is summed once
per candidate instead of once per pair.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from rtmdet_geo.models.boxes_torch import INSIDE_MARGIN_PX, points_inside
from rtmdet_geo.nms import rotated_iou
from rtmdet_geo.training.assign_kernels import class_terms, horizontal_overlaps, match_chunk, points_in_any
from rtmdet_geo.training.rotated_iou import rotated_iou_pairwise

_EPSILON = 1e-7
#: Sides of predicted boxes below this (px, also negative ones) count as this, as in mmrotate's ``rbbox_overlaps``.
_MINIMUM_SIDE = 1e-3
_MAXIMUM_COORDINATE = 1e7


class Assignment(NamedTuple):
    """Positives of one image, K of them, in rising prior order; all other priors are background.

    Attributes:
        priors: (K,) int64, index into the priors.
        gts: (K,) int64, 0-based index into the ground truths.
        ious: (K,) float32 in [0, 1], IoU of the prior's box with its ground truth: the soft label.
        num_candidates: how many priors lie inside a ground truth.
    """

    priors: Tensor
    gts: Tensor
    ious: Tensor
    num_candidates: int


def inside_boxes(points: Tensor, boxes: Tensor) -> Tensor:
    """Tell which points lie in which boxes: rotated ones by more than 0.01 px, horizontal ones strictly.

    Args:
        points: (P, 2) x, y in px.
        boxes: (G, 5) rotated or (G, 4) x1, y1, x2, y2 in px.

    Returns:
        (P, G) bool.
    """
    if boxes.shape[1] == 5:
        return points_inside(points, boxes)
    after = points[:, None] - boxes[None, :, :2]
    before = boxes[None, :, 2:] - points[:, None]
    return torch.minimum(after, before).amin(-1) > 0


def horizontal_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """IoU matrix (N, M) of horizontal boxes (N, 4) and (M, 4), x1, y1, x2, y2 in px."""
    upper_left = torch.maximum(boxes1[:, None, :2], boxes2[None, :, :2])
    lower_right = torch.minimum(boxes1[:, None, 2:], boxes2[None, :, 2:])
    overlap = (lower_right - upper_left).clamp(min=0).prod(-1)
    area1, area2 = (boxes1[:, 2:] - boxes1[:, :2]).prod(-1), (boxes2[:, 2:] - boxes2[:, :2]).prod(-1)
    union: Tensor = area1[:, None] + area2[None] - overlap
    return overlap / union.clamp(min=1e-6)


def mask_centers(masks: Tensor) -> Tensor:
    """Return the centroids of masks, for :meth:`DynamicSoftLabelAssigner.assign`.

    As mmdet 3.3 ``center_of_mass``: pixel (row, column) counts as the point (column, row), not as its middle.

    Args:
        masks: (G, H, W) bool or uint8, 0 or 1.

    Returns:
        (G, 2) float32 x, y in px; the origin for an empty mask.
    """
    columns, rows = masks.sum(1), masks.sum(2)  # (G, W), (G, H) int64: no mask is copied to a wider type
    area = rows.sum(1).clamp(min=1).double()
    x = (columns * torch.arange(columns.shape[1], device=masks.device)).sum(1) / area
    y = (rows * torch.arange(rows.shape[1], device=masks.device)).sum(1) / area
    return torch.stack((x, y), dim=1).float()


def _as_measurable(boxes: Tensor) -> Tensor:
    """Return boxes with every number finite, rotated ones with sides of at least 1e-3 px (mmrotate ``rbbox_overlaps``).

    A prediction that is not a number then has IoU 0 or nearly so here; the loss reports it.
    """
    boxes = torch.nan_to_num(boxes, nan=0.0).clamp(-_MAXIMUM_COORDINATE, _MAXIMUM_COORDINATE)
    if boxes.shape[1] == 4:
        return boxes
    return torch.cat((boxes[:, :2], boxes[:, 2:4].clamp(min=_MINIMUM_SIDE), boxes[:, 4:]), dim=1)


class DynamicSoftLabelAssigner:
    """Assigns priors to ground truths; see the module's text.

    Args:
        topk: candidates whose IoUs make up k.
        soft_center_radius: strides from the centre at which the centre cost is 1.
        iou_weight: factor of the IoU cost.
        max_pairs: (prior, ground truth) pairs held at once; about 40 bytes each.
        use_numba: on the CPU, compute with the kernels of :mod:`rtmdet_geo.training.assign_kernels` instead of torch;
            same result, faster.
    """

    def __init__(
        self,
        topk: int = 13,
        soft_center_radius: float = 3.0,
        iou_weight: float = 3.0,
        *,
        max_pairs: int = 2_000_000,
        use_numba: bool = True,
    ) -> None:
        """Keep the parameters."""
        self.topk = topk
        self.soft_center_radius = soft_center_radius
        self.iou_weight = iou_weight
        self.max_pairs = max_pairs
        self.use_numba = use_numba

    @torch.no_grad()
    def candidates(self, priors: Tensor, gt_boxes: Tensor) -> Tensor:
        """Find the priors inside any ground truth.

        Args:
            priors: (P, 2 or more) x, y in px first.
            gt_boxes: (G, 5) rotated or (G, 4) horizontal.

        Returns:
            (V,) int64, rising.
        """
        if self._runs_kernels(gt_boxes):
            margin = INSIDE_MARGIN_PX if gt_boxes.shape[1] == 5 else 0.0
            points, boxes = (np.ascontiguousarray(part.float().numpy()) for part in (priors, gt_boxes))
            found = points_in_any(points, boxes, margin)
            return torch.from_numpy(np.flatnonzero(found))
        inside = torch.zeros(len(priors), dtype=torch.bool, device=priors.device)
        step = max(1, self.max_pairs // max(1, len(priors)))
        for start in range(0, len(gt_boxes), step):
            inside |= inside_boxes(priors[:, :2], gt_boxes[start : start + step]).any(1)
        return torch.nonzero(inside).squeeze(1)

    @torch.no_grad()
    def assign(
        self,
        boxes: Tensor,
        logits: Tensor,
        priors: Tensor,
        gt_boxes: Tensor,
        gt_labels: Tensor,
        *,
        gt_centers: Tensor | None = None,
    ) -> Assignment:
        """Assign the priors of one image.

        Args:
            boxes: (P, 5) rotated cx, cy, w, h, angle or (P, 4) horizontal x1, y1, x2, y2 predictions in px.
            logits: (P, C) raw class scores.
            priors: (P, 3 or more) x, y, stride in px.
            gt_boxes: (G, 5) or (G, 4), the same kind as ``boxes``.
            gt_labels: (G,) int64 in [0, C).
            gt_centers: (G, 2) px where the centre cost is 0 (mask centroids); the boxes' centres by default.

        Returns:
            :class:`Assignment` with indices into the P priors.
        """
        chosen = self.candidates(priors, gt_boxes)
        found = self.match(boxes[chosen], logits[chosen], priors[chosen], gt_boxes, gt_labels, gt_centers=gt_centers)
        return found._replace(priors=chosen[found.priors])

    @torch.no_grad()
    def match(
        self,
        boxes: Tensor,
        logits: Tensor,
        priors: Tensor,
        gt_boxes: Tensor,
        gt_labels: Tensor,
        *,
        gt_centers: Tensor | None = None,
    ) -> Assignment:
        """Assign candidates only; arguments as :meth:`assign` with V candidates for the P priors.

        Returns:
            :class:`Assignment` with indices into the V candidates.

        Raises:
            ValueError: a label is outside [0, C).
        """
        device = boxes.device
        if len(boxes) == 0 or len(gt_boxes) == 0:
            nothing = torch.zeros(0, dtype=torch.int64, device=device)
            return Assignment(nothing, nothing, torch.zeros(0, device=device), len(boxes))
        if int(gt_labels.min()) < 0 or int(gt_labels.max()) >= logits.shape[1]:
            raise ValueError(
                f"labels {int(gt_labels.min())} to {int(gt_labels.max())} for {logits.shape[1]} classes; "
                "check the class list of the labels against the model's"
            )
        with torch.autocast(device.type, enabled=False):
            boxes, logits, gt_boxes, priors = (part.detach().float() for part in (boxes, logits, gt_boxes, priors))
            if gt_centers is None:
                gt_centers = gt_boxes[:, :2] if gt_boxes.shape[1] == 5 else (gt_boxes[:, :2] + gt_boxes[:, 2:]) / 2
            boxes, gt_boxes = _as_measurable(boxes), _as_measurable(gt_boxes)
            match = self._match_numba if self._runs_kernels(gt_boxes) else self._match_torch
            return match(boxes, logits, priors, gt_boxes, gt_labels.long(), gt_centers.float())

    def _runs_kernels(self, gt_boxes: Tensor) -> bool:
        return self.use_numba and gt_boxes.device.type == "cpu"

    def _match_numba(
        self, boxes: Tensor, logits: Tensor, priors: Tensor, gt_boxes: Tensor, gt_labels: Tensor, gt_centers: Tensor
    ) -> Assignment:
        number = len(boxes)
        # One memory layout, so that numba compiles one version.
        raw, points, predicted, wanted, centers, labels = (
            np.ascontiguousarray(part.numpy()) for part in (logits, priors, boxes, gt_boxes, gt_centers, gt_labels)
        )
        probability, softplus, all_wrong = class_terms(raw)
        count, taken_gt, lowest_gt = (np.zeros(number, np.int64) for _ in range(3))
        taken_iou, lowest_iou, lowest_cost = np.zeros(number), np.zeros(number), np.full(number, np.inf)
        step = max(1, self.max_pairs // number)
        overlaps = rotated_iou if predicted.shape[1] == 5 else horizontal_overlaps
        for start in range(0, len(wanted), step):
            part = slice(start, start + step)
            ious = overlaps(wanted[part], predicted)
            match_chunk(
                ious,
                raw,
                probability,
                softplus,
                all_wrong,
                points,
                labels[part],
                centers[part],
                start,
                min(self.topk, number),
                self.soft_center_radius,
                self.iou_weight,
                count,
                taken_gt,
                taken_iou,
                lowest_cost,
                lowest_gt,
                lowest_iou,
            )
        positive = np.flatnonzero(count)
        contested = count[positive] > 1
        gts = np.where(contested, lowest_gt[positive], taken_gt[positive])
        soft_labels = np.where(contested, lowest_iou[positive], taken_iou[positive]).astype(np.float32)
        return Assignment(torch.from_numpy(positive), torch.from_numpy(gts), torch.from_numpy(soft_labels), number)

    def _match_torch(
        self, boxes: Tensor, logits: Tensor, priors: Tensor, gt_boxes: Tensor, gt_labels: Tensor, gt_centers: Tensor
    ) -> Assignment:
        number, device = len(boxes), boxes.device
        probability, softplus = logits.sigmoid(), functional.softplus(logits)
        wrong_class = softplus * probability.square()  # BCE against 0, focused
        terms = _CandidateTerms(logits, probability, softplus, wrong_class, wrong_class.sum(1), priors)
        pairwise_iou = rotated_iou_pairwise if boxes.shape[1] == 5 else horizontal_iou
        count = torch.zeros(number, dtype=torch.int64, device=device)
        taken_gt, lowest_gt = torch.zeros_like(count), torch.zeros_like(count)
        taken_iou, lowest_iou = torch.zeros(number, device=device), torch.zeros(number, device=device)
        lowest_cost = torch.full((number,), torch.inf, device=device)
        step, k = max(1, self.max_pairs // number), min(self.topk, number)
        for start in range(0, len(gt_boxes), step):
            part = slice(start, start + step)
            iou = pairwise_iou(boxes, gt_boxes[part])
            cost = self._costs(terms, iou, gt_labels[part], gt_centers[part])
            dynamic_k = iou.topk(k, dim=0).values.sum(0).long().clamp(min=1)
            cheapest = cost.topk(k, dim=0, largest=False).indices  # (k, g)
            rank, column = torch.nonzero(torch.arange(k, device=device)[:, None] < dynamic_k, as_tuple=True)
            row = cheapest[rank, column]
            count.index_add_(0, row, torch.ones_like(row))
            taken_gt[row] = column + start
            taken_iou[row] = iou[row, column]
            value, argument = cost.min(1)
            better = value < lowest_cost
            lowest_cost = torch.where(better, value, lowest_cost)
            lowest_gt = torch.where(better, argument + start, lowest_gt)
            lowest_iou = torch.where(better, iou.gather(1, argument[:, None]).squeeze(1), lowest_iou)
        positive = torch.nonzero(count).squeeze(1)
        contested = count[positive] > 1
        gts = torch.where(contested, lowest_gt[positive], taken_gt[positive])
        ious = torch.where(contested, lowest_iou[positive], taken_iou[positive])
        return Assignment(positive, gts, ious, number)

    def _costs(self, terms: _CandidateTerms, iou: Tensor, labels: Tensor, centers: Tensor) -> Tensor:
        """Cost matrix (V, g) of all candidates and one chunk of ground truths."""
        logits, probability = terms.logits[:, labels], terms.probability[:, labels]
        cost = (terms.softplus[:, labels] - logits * iou) * (iou - probability).square()
        cost += terms.wrong_class_sum[:, None] - terms.wrong_class[:, labels]
        cost -= self.iou_weight * (iou + _EPSILON).log()
        distance = torch.hypot(terms.priors[:, 0, None] - centers[:, 0], terms.priors[:, 1, None] - centers[:, 1])
        cost += torch.pow(10.0, distance / terms.priors[:, 2, None] - self.soft_center_radius)
        return cost


class _CandidateTerms(NamedTuple):
    """What the cost needs of each of the V candidates, whatever the ground truth."""

    logits: Tensor
    probability: Tensor
    softplus: Tensor
    wrong_class: Tensor
    wrong_class_sum: Tensor
    priors: Tensor
