"""The losses of RTMDet's three kinds: assignment, quality focal loss, a loss on boxes, and their common averages.

As mmdet 3.3 ``RTMDetHead`` and ``RTMDetInsHead`` and mmrotate 1.x ``RotatedRTMDetHead`` behave (checked by golden
numbers): the classification target of a positive is its IoU at assignment, the same IoU weighs its box loss, and both
losses are divided by the sum of those IoUs over the batch (over all processes: its mean), at least 1. The kinds differ
in what a box is and how boxes are compared; instances add a loss on masks (:mod:`rtmdet_geo.training.mask_loss`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor, distributed, nn

from rtmdet_geo.models.boxes_torch import regularize_le90
from rtmdet_geo.models.decode import decode_distances, decode_sides, flatten_level, priors_with_stride
from rtmdet_geo.models.heads import STRIDES, HorizontalOutputs, InstanceOutputs, RotatedOutputs
from rtmdet_geo.structures import Kind
from rtmdet_geo.training.assign import Assignment, DynamicSoftLabelAssigner, inside_boxes, mask_centers
from rtmdet_geo.training.losses import giou_loss, quality_focal_loss, rotated_iou_loss
from rtmdet_geo.training.mask_loss import mask_losses

Outputs: TypeAlias = RotatedOutputs | HorizontalOutputs | InstanceOutputs


class Target(NamedTuple):
    """One image's ground truth; a plain tuple of the first fields does as well.

    Attributes:
        boxes: (G, 5) cx, cy, w, h in px and angle in rad (any convention) for rotated models, else (G, 4) x1, y1, x2,
            y2 in px; float32.
        labels: (G,) int64 in [0, C).
        ignored: (I, 5) or (I, 4) boxes in which nothing is known: background priors there do not count.
        masks: (G, H, W) bool or uint8 of the image's size, 0 or 1; for instances only.
    """

    boxes: Tensor
    labels: Tensor
    ignored: Tensor | None = None
    masks: Tensor | None = None


class _Batch(NamedTuple):
    """Levels concatenated, fine to coarse; N images, P priors, float32."""

    logits: Tensor  # (N, P, C)
    distances: Tensor  # (N, P, 4) left, top, right, bottom in px; rotated: (N, P, 5), angle in rad
    priors: Tensor  # (P, 4) x, y, stride, stride in px
    level_sizes: list[int]


class Criterion(nn.Module, ABC):
    """Training loss of a model, what is common to all kinds.

    Args:
        num_classes: C.
        strides: px per cell of each level.
        loss_cls_weight: factor of the classification loss.
        loss_bbox_weight: factor of the box loss.
        assigner: the label assigner; RTMDet's by default.
    """

    kind: ClassVar[Kind]
    #: Numbers of a box.
    columns: ClassVar[int] = 4

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

    def forward(self, outputs: Outputs, targets: Sequence[Target | tuple[Tensor, ...]]) -> dict[str, Tensor]:
        """Return ``loss_cls``, ``loss_bbox`` (instances: and ``loss_mask``): float32 scalars, to be summed.

        Args:
            outputs: raw outputs of a model of this kind, any floating dtype.
            targets: one :class:`Target` per image.

        Raises:
            ValueError: the number of targets is not the batch size, boxes or masks are of another shape than the kind
                takes, or a label is outside [0, C).
        """
        return {name: values.sum() for name, values in self.losses_per_level(outputs, targets).items()}

    def losses_per_level(self, outputs: Outputs, targets: Sequence[Target | tuple[Tensor, ...]]) -> dict[str, Tensor]:
        """Return the terms of :meth:`forward`'s losses, (L,) each, (1,) for masks; arguments and errors likewise."""
        with torch.autocast(outputs.cls[0].device.type, enabled=False):
            batch = self._flatten(outputs)
            checked = self._check(batch, targets)
            assignments = self._assign(batch, checked)
            losses = self._losses(batch, checked, assignments)
            return losses | self._more_losses(outputs, batch, checked, assignments)

    def assignments(self, outputs: Outputs, targets: Sequence[Target | tuple[Tensor, ...]]) -> list[Assignment]:
        """Return the assignment of every image; arguments and errors as :meth:`forward`."""
        with torch.autocast(outputs.cls[0].device.type, enabled=False):
            batch = self._flatten(outputs)
            return self._assign(batch, self._check(batch, targets))

    # What the kinds define.

    def _raw_distances(self, outputs: Outputs) -> list[Tensor]:
        """Per level (N, 4 or 5, h, w)."""
        return outputs.reg

    @abstractmethod
    def _decode(self, points: Tensor, distances: Tensor) -> Tensor:
        """Boxes (..., columns) of points (..., 2) and distances (..., columns)."""

    @abstractmethod
    def _box_loss(self, predicted: Tensor, wanted: Tensor, weight: Tensor) -> Tensor:
        """Weighted losses (K,) of boxes (K, columns)."""

    def _centers(self, target: Target) -> Tensor | None:
        """Where the assigner's centre cost is 0, (G, 2) px; None for the boxes' centres."""
        return None

    def _more_losses(
        self, outputs: Outputs, batch: _Batch, targets: Sequence[Target], assignments: Sequence[Assignment]
    ) -> dict[str, Tensor]:
        """Further losses, 1-D each, weights and averages included."""
        return {}

    # What they share.

    def _flatten(self, outputs: Outputs) -> _Batch:
        sizes = [(level.shape[2], level.shape[3]) for level in outputs.cls]
        logits = torch.cat([flatten_level(level) for level in outputs.cls], dim=1).float()
        distances = torch.cat([flatten_level(level) for level in self._raw_distances(outputs)], dim=1).float()
        priors = torch.cat(priors_with_stride(sizes, self.strides, device=logits.device))
        return _Batch(logits, distances, priors, [height * width for height, width in sizes])

    def _check(self, batch: _Batch, targets: Sequence[Target | tuple[Tensor, ...]]) -> list[Target]:
        if len(targets) != len(batch.logits):
            raise ValueError(f"{len(targets)} targets for a batch of {len(batch.logits)} images; give one per image")
        checked = [target if isinstance(target, Target) else Target(*target) for target in targets]
        for number, target in enumerate(checked):
            if target.boxes.shape != (len(target.labels), self.columns):
                raise ValueError(
                    f"target {number}: boxes {tuple(target.boxes.shape)} and labels {tuple(target.labels.shape)}; "
                    f"{self.kind} models take boxes (G, {self.columns}) and labels (G,)"
                )
        return checked

    @torch.no_grad()
    def _assign(self, batch: _Batch, targets: Sequence[Target]) -> list[Assignment]:
        assignments = []
        for logits, distances, target in zip(batch.logits, batch.distances, targets, strict=True):
            boxes = target.boxes.float()
            chosen = self.assigner.candidates(batch.priors, boxes)
            predicted = self._decode(batch.priors[chosen, :2], distances[chosen])
            found = self.assigner.match(
                predicted,
                logits[chosen],
                batch.priors[chosen],
                boxes,
                target.labels,
                gt_centers=self._centers(target),
            )
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
        labels[positive] = torch.cat([t.labels[found.gts] for t, found in zip(targets, assignments, strict=True)])
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
        predicted = self._decode(batch.priors[prior, :2], distances[positive])
        wanted = torch.cat([t.boxes.float()[found.gts] for t, found in zip(targets, assignments, strict=True)])
        loss_bbox = self._box_loss(predicted, wanted, ious)
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
        if not any(target.ignored is not None and len(target.ignored) for target in targets):
            return None
        weight = batch.logits.new_ones(batch.logits.shape[:2])
        for row, target in zip(weight, targets, strict=True):
            if target.ignored is not None and len(target.ignored):
                row[inside_boxes(batch.priors[:, :2], target.ignored.float()).any(1)] = 0
        weight = weight.flatten()
        weight[positive] = 1
        return weight


class RotatedCriterion(Criterion):
    """Training loss of a rotated model: linear rotated IoU loss; see :class:`Criterion` for the arguments."""

    kind: ClassVar[Kind] = "rotated"
    columns: ClassVar[int] = 5

    def _raw_distances(self, outputs: Outputs) -> list[Tensor]:
        assert isinstance(outputs, RotatedOutputs)
        pairs = zip(outputs.reg, outputs.angle, strict=True)
        return [torch.cat((reg.float(), angle.float()), dim=1) for reg, angle in pairs]

    def _decode(self, points: Tensor, distances: Tensor) -> Tensor:
        return decode_distances(points, distances)

    def _box_loss(self, predicted: Tensor, wanted: Tensor, weight: Tensor) -> Tensor:
        return rotated_iou_loss(predicted, regularize_le90(wanted), weight=weight, reduction="none")


class HorizontalCriterion(Criterion):
    """Training loss of a model of horizontal boxes: GIoU loss; see :class:`Criterion` for the arguments."""

    kind: ClassVar[Kind] = "horizontal"

    def _decode(self, points: Tensor, distances: Tensor) -> Tensor:
        return decode_sides(points, distances)

    def _box_loss(self, predicted: Tensor, wanted: Tensor, weight: Tensor) -> Tensor:
        return giou_loss(predicted, wanted, weight=weight, reduction="none")


class InstanceCriterion(HorizontalCriterion):
    """Training loss of a model of instances: boxes as horizontal ones, and a dice loss on the masks of positives.

    The centre cost of the assigner is 0 at the mask's centroid. The mask loss is the mean over the positives (over all
    processes: the sum over their mean number).

    Args:
        num_classes: C.
        strides: px per cell of each level.
        loss_mask_weight: factor of the mask loss.
        max_masks: masks of positives held at once; those beyond are computed in portions, twice, for their memory.
        options: of :class:`Criterion`.
    """

    kind: ClassVar[Kind] = "mask"

    def __init__(
        self,
        num_classes: int,
        strides: Sequence[int] = STRIDES,
        *,
        loss_mask_weight: float = 2.0,
        max_masks: int = 256,
        **options: float | DynamicSoftLabelAssigner | None,
    ) -> None:
        """Keep the parameters."""
        super().__init__(num_classes, strides, **options)  # type: ignore[arg-type]
        self.loss_mask_weight = loss_mask_weight
        self.max_masks = max_masks

    def _check(self, batch: _Batch, targets: Sequence[Target | tuple[Tensor, ...]]) -> list[Target]:
        checked = super()._check(batch, targets)
        for number, target in enumerate(checked):
            if target.masks is None or target.masks.ndim != 3 or len(target.masks) != len(target.labels):
                shape = None if target.masks is None else tuple(target.masks.shape)
                raise ValueError(f"target {number}: masks {shape}; give one mask (H, W) for each of the boxes")
        return checked

    def _centers(self, target: Target) -> Tensor | None:
        assert target.masks is not None
        return mask_centers(target.masks)

    def _more_losses(
        self, outputs: Outputs, batch: _Batch, targets: Sequence[Target], assignments: Sequence[Assignment]
    ) -> dict[str, Tensor]:
        assert isinstance(outputs, InstanceOutputs)
        kernels = torch.cat([flatten_level(level) for level in outputs.kernel], dim=1).float()
        num_positive = sum(len(found.priors) for found in assignments)
        loss = kernels.new_zeros(())
        for image, (target, found) in enumerate(zip(targets, assignments, strict=True)):
            assert target.masks is not None
            loss = (
                loss
                + mask_losses(
                    kernels[image, found.priors],
                    batch.priors[found.priors],
                    outputs.mask_features[image].float(),
                    target.masks,
                    found.gts,
                    max_masks=self.max_masks,
                ).sum()
            )
        average_factor = _mean_over_processes(kernels.new_tensor(float(num_positive))).clamp(min=1)
        return {"loss_mask": (loss * (self.loss_mask_weight / average_factor)).reshape(1)}


CRITERIA: dict[Kind, type[Criterion]] = {
    "rotated": RotatedCriterion,
    "horizontal": HorizontalCriterion,
    "mask": InstanceCriterion,
}


def make_criterion(kind: Kind, num_classes: int) -> Criterion:
    """Return RTMDet's criterion for a kind of model.

    Args:
        kind: "rotated", "horizontal" or "mask", as a model's ``kind``.
        num_classes: C.

    Raises:
        ValueError: no such kind.
    """
    if kind not in CRITERIA:
        raise ValueError(f"no criterion for models of kind {kind!r}; there are {', '.join(CRITERIA)}")
    return CRITERIA[kind](num_classes)


def _mean_over_processes(value: Tensor) -> Tensor:
    """Mean of a scalar over all processes of a distributed training; the scalar itself without one."""
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return value
    value = value.clone()
    distributed.all_reduce(value)
    return value / distributed.get_world_size()
