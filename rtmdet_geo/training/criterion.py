"""The loss of a rotated RTMDet: assignment, quality focal loss, rotated IoU loss, and their common averages.

As mmrotate 1.x ``RotatedRTMDetHead.loss_by_feat`` behaves (checked by golden numbers): the classification target of a
positive is its IoU at assignment, the same IoU weighs its box loss, and both losses are divided by the sum of those
IoUs over the batch (over all processes: its mean), at least 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, distributed, nn

from rtmdet_geo.models.boxes_torch import regularize_le90
from rtmdet_geo.models.decode import decode_distances, flatten_level, priors_with_stride
from rtmdet_geo.models.heads import STRIDES, RotatedOutputs
from rtmdet_geo.training.assign import Assignment, DynamicSoftLabelAssigner, inside_boxes
from rtmdet_geo.training.losses import quality_focal_loss, rotated_iou_loss

#: One image's ground truth: boxes (G, 5), labels (G,), and optionally boxes (I, 5) in which nothing is known.
Target = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]


class _Batch(NamedTuple):
    """Levels concatenated, fine to coarse; N images, P priors, float32."""

    logits: Tensor  # (N, P, C)
    distances: Tensor  # (N, P, 5) left, top, right, bottom in px, angle in rad
    priors: Tensor  # (P, 4) x, y, stride, stride in px
    level_sizes: list[int]


class RotatedCriterion(nn.Module):
    """Training loss of a rotated model.

    Args:
        num_classes: C.
        strides: px per cell of each level.
        loss_cls_weight: factor of the classification loss.
        loss_bbox_weight: factor of the box loss.
        assigner: the label assigner; RTMDet's by default.
    """

    def __init__(
        self,
        num_classes: int,
        strides: Sequence[int] = STRIDES,
        *,
        loss_cls_weight: float = 1.0,
        loss_bbox_weight: float = 2.0,
        assigner: DynamicSoftLabelAssigner | None = None,
    ) -> None:
        """Keep the parameters."""
        super().__init__()
        self.num_classes = num_classes
        self.strides = tuple(strides)
        self.loss_cls_weight = loss_cls_weight
        self.loss_bbox_weight = loss_bbox_weight
        self.assigner = assigner if assigner is not None else DynamicSoftLabelAssigner()

    def forward(self, outputs: RotatedOutputs, targets: Sequence[Target]) -> dict[str, Tensor]:
        """Return ``loss_cls`` and ``loss_bbox``: float32 scalars, weights included, to be summed.

        Args:
            outputs: raw outputs of the model, any floating dtype.
            targets: per image boxes (G, 5) float32 px and rad in any angle convention, labels (G,) int64, and
                optionally ignore boxes (I, 5): background priors in these do not count in the classification loss.

        Raises:
            ValueError: the number of targets is not the batch size, or a label is outside [0, C).
        """
        return {name: values.sum() for name, values in self.losses_per_level(outputs, targets).items()}

    def losses_per_level(self, outputs: RotatedOutputs, targets: Sequence[Target]) -> dict[str, Tensor]:
        """Return the terms of :meth:`forward`'s losses, (L,) each; arguments and errors likewise."""
        with torch.autocast(outputs.cls[0].device.type, enabled=False):
            batch = self._flatten(outputs)
            assignments = self._assign(batch, targets)
            return self._losses(batch, targets, assignments)

    def assignments(self, outputs: RotatedOutputs, targets: Sequence[Target]) -> list[Assignment]:
        """Return the assignment of every image; arguments and errors as :meth:`forward`."""
        with torch.autocast(outputs.cls[0].device.type, enabled=False):
            return self._assign(self._flatten(outputs), targets)

    def _flatten(self, outputs: RotatedOutputs) -> _Batch:
        sizes = [(level.shape[2], level.shape[3]) for level in outputs.cls]
        logits = torch.cat([flatten_level(level) for level in outputs.cls], dim=1).float()
        distances = torch.cat(
            [
                flatten_level(torch.cat((reg.float(), angle.float()), dim=1))
                for reg, angle in zip(outputs.reg, outputs.angle, strict=True)
            ],
            dim=1,
        )
        priors = torch.cat(priors_with_stride(sizes, self.strides, device=logits.device))
        return _Batch(logits, distances, priors, [height * width for height, width in sizes])

    @torch.no_grad()
    def _assign(self, batch: _Batch, targets: Sequence[Target]) -> list[Assignment]:
        if len(targets) != len(batch.logits):
            raise ValueError(f"{len(targets)} targets for a batch of {len(batch.logits)} images; give one per image")
        assignments = []
        for logits, distances, target in zip(batch.logits, batch.distances, targets, strict=True):
            boxes, labels = target[0].float(), target[1]
            chosen = self.assigner.candidates(batch.priors, boxes)
            predicted = decode_distances(batch.priors[chosen, :2], distances[chosen])
            found = self.assigner.match(predicted, logits[chosen], batch.priors[chosen], boxes, labels)
            assignments.append(found._replace(priors=chosen[found.priors]))
        return assignments

    def _losses(self, batch: _Batch, targets: Sequence[Target], assignments: Sequence[Assignment]) -> dict[str, Tensor]:
        num_images, num_priors, num_classes = batch.logits.shape
        device = batch.logits.device
        # Positives of all images, as indices into the flattened (N * P) priors.
        positive = torch.cat([found.priors + i * num_priors for i, found in enumerate(assignments)])
        ious = torch.cat([found.ious for found in assignments])
        labels = torch.full((num_images * num_priors,), num_classes, dtype=torch.int64, device=device)
        scores = torch.zeros(num_images * num_priors, device=device)
        labels[positive] = torch.cat([target[1][found.gts] for target, found in zip(targets, assignments, strict=True)])
        scores[positive] = ious
        average_factor = _mean_over_processes(ious.sum()).clamp(min=1)

        loss_cls = quality_focal_loss(
            batch.logits.flatten(0, 1), labels, scores, weight=self._known(batch, targets, positive), reduction="none"
        )
        level_cls = torch.stack(
            [part.sum() for part in loss_cls.view(num_images, num_priors).split(batch.level_sizes, dim=1)]
        )

        distances = batch.distances.flatten(0, 1)
        # Without positives this is 0 with gradient 0 on every output: distributed training waits for all of them.
        prior = positive % num_priors
        predicted = decode_distances(batch.priors[prior, :2], distances[positive])
        wanted = torch.cat([target[0].float()[found.gts] for target, found in zip(targets, assignments, strict=True)])
        loss_bbox = rotated_iou_loss(predicted, regularize_le90(wanted), weight=ious, reduction="none")
        ends = torch.tensor(batch.level_sizes, device=device).cumsum(0)
        level_bbox = torch.zeros(len(ends), device=device).index_add(
            0, torch.bucketize(prior, ends, right=True), loss_bbox
        )
        return {
            "loss_cls": level_cls * (self.loss_cls_weight / average_factor),
            "loss_bbox": level_bbox * (self.loss_bbox_weight / average_factor),
        }

    def _known(self, batch: _Batch, targets: Sequence[Target], positive: Tensor) -> Tensor | None:
        """Weights (N * P,) of the classification loss: 0 for background priors in ignore boxes; None if all are 1."""
        if not any(len(target) > 2 and len(target[2]) for target in targets):
            return None
        weight = batch.logits.new_ones(batch.logits.shape[:2])
        for row, target in zip(weight, targets, strict=True):
            if len(target) > 2 and len(target[2]):
                row[inside_boxes(batch.priors[:, :2], target[2].float()).any(1)] = 0
        weight = weight.flatten()
        weight[positive] = 1
        return weight


def _mean_over_processes(value: Tensor) -> Tensor:
    """Mean of a scalar over all processes of a distributed training; the scalar itself without one."""
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return value
    value = value.clone()
    distributed.all_reduce(value)
    return value / distributed.get_world_size()
