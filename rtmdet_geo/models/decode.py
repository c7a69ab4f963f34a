"""From raw outputs to candidates: priors, box coders, top-K, and the graph that is exported.

Rotated boxes follow mmrotate 1.x to the digit (``MlvlPointGenerator`` offset 0, ``DistanceAnglePointCoder`` le90): the
centre's offset is rotated by the unwrapped angle, the angle is wrapped to [-pi/2, pi/2), w and h are never swapped,
boxes are never clipped. Horizontal boxes, those of instances too, follow mmdet 3.x (``DistancePointBBoxCoder``): their
corners are clipped to the image, which is the padded one. Only standard ONNX operators of opset 17 come out (TopK,
GatherElements, ...); batches may be dynamic, heights and widths as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rtmdet_geo.models.boxes_torch import norm_angle, to_own_axes
from rtmdet_geo.models.heads import HorizontalOutputs, InstanceOutputs, RotatedOutputs, at_least_float32
from rtmdet_geo.structures import Kind
from rtmdet_geo.variants import MAX_CANDIDATES, STRIDES

MAX_CANDIDATES_ROTATED = MAX_CANDIDATES["rotated"]

#: (height, width) in px: numbers, or symbols while a graph is traced.
ImageShape = tuple[int, int] | tuple[Tensor, Tensor]


class TopK(NamedTuple):
    """The best (prior, class) pairs of one level, in falling score order; all (N, k)."""

    priors: Tensor
    scores: Tensor
    labels: Tensor


class Candidates(NamedTuple):
    """Candidate boxes before threshold and NMS, levels concatenated.

    Attributes:
        boxes: (N, K, 5) cx, cy, w, h in px and angle in rad [-pi/2, pi/2); w may be the short side or negative.
            Horizontal boxes have angle 0 and w along x.
        scores: (N, K) in [0, 1].
        labels: (N, K) int64.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor


class InstanceCandidates(NamedTuple):
    """Candidates of instance segmentation, and all that :mod:`rtmdet_geo.masks` needs for those that survive NMS.

    Attributes:
        boxes: (N, K, 5), see :class:`Candidates`; angle 0.
        scores: (N, K) in [0, 1].
        labels: (N, K) int64.
        kernels: (N, K, 169) parameters of each candidate's mask.
        mask_priors: (N, K, 3) x, y and stride in px of the prior that each candidate comes from.
        mask_features: (N, 8, H / 8, W / 8) of the whole image.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    kernels: Tensor
    mask_priors: Tensor
    mask_features: Tensor


def level_priors(
    height: int,
    width: int,
    stride: int,
    *,
    offset: float = 0.0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return prior points (height * width, 2) x, y in px of one level, row major: ``(column + offset) * stride``."""
    x = (torch.arange(width, device=device, dtype=dtype) + offset) * stride
    y = (torch.arange(height, device=device, dtype=dtype) + offset) * stride
    return torch.stack((x.repeat(height), y.repeat_interleave(width)), dim=-1)


def priors_with_stride(
    sizes: Sequence[tuple[int, int]],
    strides: Sequence[int] = STRIDES,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """Return per level (h * w, 4) x, y, stride, stride in px, for feature maps of ``sizes`` (height, width)."""
    priors = []
    for (height, width), stride in zip(sizes, strides, strict=True):
        points = level_priors(height, width, stride, device=device, dtype=dtype)
        priors.append(torch.cat((points, torch.full_like(points, stride)), dim=-1))
    return priors


def decode_distances(points: Tensor, distances: Tensor) -> Tensor:
    """Turn distances and angles at points into boxes (mmrotate's ``distance2obb``).

    Args:
        points: (..., 2) x, y in px.
        distances: (..., 5) left, top, right, bottom in px along the box's axes, and angle in rad (any turn).

    Returns:
        (..., 5) cx, cy, w, h, angle in [-pi/2, pi/2).
    """
    left_top, right_bottom, angle = distances[..., :2], distances[..., 2:4], distances[..., 4]
    offset = (right_bottom - left_top) / 2
    cosine, sine = torch.cos(angle), torch.sin(angle)
    x = points[..., 0] + cosine * offset[..., 0] - sine * offset[..., 1]
    y = points[..., 1] + sine * offset[..., 0] + cosine * offset[..., 1]
    size = left_top + right_bottom
    return torch.stack((x, y, size[..., 0], size[..., 1], norm_angle(angle)), dim=-1)


def encode_distances(points: Tensor, boxes: Tensor, *, max_distance: float | None = None, eps: float = 0.1) -> Tensor:
    """Turn boxes into distances from points; inverse of :func:`decode_distances` up to the angle's wrap.

    Args:
        points: (..., 2) x, y in px.
        boxes: (..., 5).
        max_distance: if given, distances are clamped to [0, max_distance - eps] px.
        eps: px.

    Returns:
        (..., 5) left, top, right, bottom in px, and the boxes' angle.
    """
    own = to_own_axes(points, boxes)
    half = boxes[..., 2:4] / 2
    distances = torch.cat((half + own, half - own), dim=-1)
    if max_distance is not None:
        distances = distances.clamp(min=0, max=max_distance - eps)
    return torch.cat((distances, boxes[..., 4:5]), dim=-1)


def decode_sides(points: Tensor, distances: Tensor, *, image_shape: ImageShape | None = None) -> Tensor:
    """Turn distances at points into corners of horizontal boxes (mmdet's ``distance2bbox``).

    Args:
        points: (..., 2) x, y in px.
        distances: (..., 4) left, top, right, bottom in px.
        image_shape: (height, width) in px that corners are clipped to; None: not clipped.

    Returns:
        (..., 4) x1, y1, x2, y2; x2 < x1 where the distances' sum is negative.
    """
    corners = torch.cat((points - distances[..., :2], points + distances[..., 2:]), dim=-1)
    if image_shape is None:
        return corners
    height, width = image_shape
    x1, y1, x2, y2 = corners.unbind(dim=-1)
    return torch.stack((_clip(x1, width), _clip(y1, height), _clip(x2, width), _clip(y2, height)), dim=-1)


def _clip(values: Tensor, limit: int | Tensor) -> Tensor:
    """Return values clipped to [0, limit]; a traced side of an image is a tensor and stays a symbol."""
    if isinstance(limit, Tensor):
        return torch.minimum(values.clamp(min=0), limit.to(values.dtype))
    return values.clamp(min=0, max=limit)


def encode_sides(points: Tensor, corners: Tensor, *, max_distance: float | None = None, eps: float = 0.1) -> Tensor:
    """Turn corners of horizontal boxes into distances from points (mmdet's ``bbox2distance``).

    Args:
        points: (..., 2) x, y in px.
        corners: (..., 4) x1, y1, x2, y2 in px.
        max_distance: if given, distances are clamped to [0, max_distance - eps] px.
        eps: px.

    Returns:
        (..., 4) left, top, right, bottom in px.
    """
    distances = torch.cat((points - corners[..., :2], corners[..., 2:] - points), dim=-1)
    return distances if max_distance is None else distances.clamp(min=0, max=max_distance - eps)


def flatten_level(level: Tensor) -> Tensor:
    """Turn (N, C, h, w) into (N, h * w, C), row major."""
    return level.flatten(2).transpose(1, 2)


def decode_dense(outputs: RotatedOutputs, strides: Sequence[int] = STRIDES) -> tuple[Tensor, Tensor]:
    """Decode every prior, for losses and assignment; gradients flow.

    Returns:
        logits (N, P, num_classes) and boxes (N, P, 5) px, rad; levels concatenated fine to coarse.
    """
    logits, boxes = [], []
    for cls, reg, angle, stride in zip(*outputs, strides, strict=True):
        points = level_priors(cls.shape[2], cls.shape[3], stride, device=reg.device, dtype=reg.dtype)
        logits.append(flatten_level(cls))
        boxes.append(decode_distances(points, flatten_level(torch.cat((reg, angle), dim=1))))
    return torch.cat(logits, dim=1), torch.cat(boxes, dim=1)


def decode_dense_horizontal(
    outputs: HorizontalOutputs | InstanceOutputs, strides: Sequence[int] = STRIDES
) -> tuple[Tensor, Tensor]:
    """Decode every prior's horizontal box, for losses and assignment; not clipped, gradients flow.

    Returns:
        logits (N, P, num_classes) and corners (N, P, 4) x1, y1, x2, y2 in px; levels concatenated fine to coarse.
    """
    logits, corners = [], []
    for cls, reg, stride in zip(outputs.cls, outputs.reg, strides, strict=True):
        points = level_priors(cls.shape[2], cls.shape[3], stride, device=reg.device, dtype=reg.dtype)
        logits.append(flatten_level(cls))
        corners.append(decode_sides(points, flatten_level(reg)))
    return torch.cat(logits, dim=1), torch.cat(corners, dim=1)


def select_top_k(logits: Tensor, limit: int = MAX_CANDIDATES_ROTATED, *, multi_label: bool = True) -> TopK:
    """Pick the best candidates of one level.

    Args:
        logits: (N, P, C).
        limit: at most so many; at most :data:`rtmdet_geo.variants.MAX_TOP_K` if the graph is to run in TensorRT.
        multi_label: rank all (prior, class) pairs, as the reference does; otherwise each prior enters with its best
            class only.

    Returns:
        :class:`TopK` with k = min(P * C, limit), or min(P, limit) for one label a prior.
    """
    num_classes = int(logits.shape[2])
    if multi_label:
        pairs = logits.flatten(1)
        best, index = pairs.topk(min(int(pairs.shape[1]), limit), dim=1)
        priors = torch.div(index, num_classes, rounding_mode="trunc")
        return TopK(priors, best.sigmoid(), index - priors * num_classes)
    highest, labels = logits.max(dim=2)
    best, priors = highest.topk(min(int(highest.shape[1]), limit), dim=1)
    return TopK(priors, best.sigmoid(), labels.gather(1, priors))


def decode_rotated(
    outputs: RotatedOutputs,
    strides: Sequence[int] = STRIDES,
    *,
    limit: int = MAX_CANDIDATES_ROTATED,
    multi_label: bool = True,
) -> Candidates:
    """Pick the top candidates per level and decode only those, in float32.

    Args:
        outputs: raw outputs of a rotated model.
        strides: px per cell.
        limit: candidates kept per level, see :func:`select_top_k`.
        multi_label: see :func:`select_top_k`.

    Returns:
        :class:`Candidates`, no score threshold applied; K is the sum of the levels' k.
    """
    parts = []
    for cls, reg, angle, stride in zip(*outputs, strides, strict=True):
        best = select_top_k(at_least_float32(flatten_level(cls)), limit, multi_label=multi_label)
        raw = _at_priors(torch.cat((reg, angle), dim=1), best.priors)
        points = _points_of(best.priors, cls.shape[3], stride).to(raw.dtype)
        parts.append(Candidates(decode_distances(points, raw), best.scores, best.labels))
    return Candidates(*(torch.cat(part, dim=1) for part in zip(*parts, strict=True)))


def decode_horizontal(
    outputs: HorizontalOutputs | InstanceOutputs,
    strides: Sequence[int] = STRIDES,
    *,
    limit: int = MAX_CANDIDATES["horizontal"],
    multi_label: bool = True,
    image_shape: ImageShape | None = None,
) -> Candidates:
    """Pick the top candidates per level and decode only those, in float32.

    Args:
        outputs: raw outputs of a model of horizontal boxes; of a model of instances only the boxes are used.
        strides: px per cell.
        limit: candidates kept per level, see :func:`select_top_k`.
        multi_label: see :func:`select_top_k`.
        image_shape: (height, width) in px that boxes are clipped to; None is the whole input, padding included, as the
            reference does.

    Returns:
        :class:`Candidates`, no score threshold applied; K is the sum of the levels' k.
    """
    shape = image_shape if image_shape is not None else _input_shape(outputs, strides)
    parts = []
    for cls, reg, stride in zip(outputs.cls, outputs.reg, strides, strict=True):
        best, boxes, _ = _best_horizontal(cls, reg, stride, limit, multi_label, shape)
        parts.append(Candidates(boxes, best.scores, best.labels))
    return Candidates(*(torch.cat(part, dim=1) for part in zip(*parts, strict=True)))


def decode_instances(
    outputs: InstanceOutputs,
    strides: Sequence[int] = STRIDES,
    *,
    limit: int = MAX_CANDIDATES["mask"],
    multi_label: bool = True,
    image_shape: ImageShape | None = None,
) -> InstanceCandidates:
    """Pick the top candidates per level with their kernels and priors; arguments as :func:`decode_horizontal`."""
    shape = image_shape if image_shape is not None else _input_shape(outputs, strides)
    parts = []
    for cls, reg, kernel, stride in zip(outputs.cls, outputs.reg, outputs.kernel, strides, strict=True):
        best, boxes, points = _best_horizontal(cls, reg, stride, limit, multi_label, shape)
        mask_priors = torch.cat((points, torch.full_like(points[..., :1], stride)), dim=-1)
        parts.append((boxes, best.scores, best.labels, _at_priors(kernel, best.priors), mask_priors))
    boxes, scores, labels, kernels, mask_priors = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
    return InstanceCandidates(boxes, scores, labels, kernels, mask_priors, at_least_float32(outputs.mask_features))


def _best_horizontal(
    cls: Tensor, reg: Tensor, stride: int, limit: int, multi_label: bool, image_shape: ImageShape
) -> tuple[TopK, Tensor, Tensor]:
    """Return one level's best candidates, their boxes (N, k, 5) and points (N, k, 2) in px."""
    best = select_top_k(at_least_float32(flatten_level(cls)), limit, multi_label=multi_label)
    distances = _at_priors(reg, best.priors)
    points = _points_of(best.priors, cls.shape[3], stride).to(distances.dtype)
    corners = decode_sides(points, distances, image_shape=image_shape)
    low, high = corners[..., :2], corners[..., 2:]
    boxes = torch.cat(((low + high) / 2, high - low, torch.zeros_like(low[..., :1])), dim=-1)
    return best, boxes, points


def _input_shape(outputs: HorizontalOutputs | InstanceOutputs, strides: Sequence[int]) -> ImageShape:
    """Return (height, width) in px of the network's input."""
    return outputs.cls[0].shape[2] * strides[0], outputs.cls[0].shape[3] * strides[0]


def _at_priors(level: Tensor, priors: Tensor) -> Tensor:
    """Return the values (N, k, C) at priors (N, k) of a level (N, C, h, w), at least float32."""
    values = flatten_level(at_least_float32(level))
    return values.gather(1, priors.unsqueeze(-1).expand(-1, -1, int(level.shape[1])))


def _points_of(priors: Tensor, width: int, stride: int) -> Tensor:
    """Return the points (N, k, 2) x, y in px, integers, of priors (N, k); needs no table, whatever H and W are."""
    row = torch.div(priors, width, rounding_mode="trunc")
    return torch.stack((priors - row * width, row), dim=-1) * stride


class DetectionGraph(nn.Module):
    """What a model file holds: uint8 pixels in, candidates out; normalisation, decoding and top-K inside, NMS outside.

    Args:
        model: an RTMDet of any kind (see :mod:`rtmdet_geo.models.rtmdet`); its ``kind`` says how to decode.
        mean: per channel, on the uint8 scale.
        std: per channel, on the uint8 scale.
        limit: candidates kept per level; None: of :data:`rtmdet_geo.variants.MAX_CANDIDATES`.
        multi_label: rank (prior, class) pairs; exported graphs always do.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        limit: int | None = None,
        multi_label: bool = True,
    ) -> None:
        super().__init__()
        self.model = model
        self.kind: Kind = model.kind
        self.limit = MAX_CANDIDATES[self.kind] if limit is None else limit
        self.multi_label = multi_label
        self.register_buffer("mean", torch.tensor(tuple(mean), dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(tuple(std), dtype=torch.float32).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Candidates | InstanceCandidates:
        """Map uint8 images (N, C, H, W), H and W multiples of 32, to candidates of the model's kind."""
        outputs = self.model((images.to(self.mean.dtype) - self.mean) / self.std)
        if self.kind == "rotated":
            return decode_rotated(outputs, limit=self.limit, multi_label=self.multi_label)
        decode = decode_instances if self.kind == "mask" else decode_horizontal
        return decode(outputs, limit=self.limit, multi_label=self.multi_label)
