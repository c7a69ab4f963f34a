"""From raw outputs to candidate boxes: priors, distance-angle coder, top-K, and the graph that is exported.

Follows mmrotate 1.x to the digit (``MlvlPointGenerator`` offset 0, ``DistanceAnglePointCoder`` le90): the centre's
offset is rotated by the unwrapped angle, the angle is wrapped to [-pi/2, pi/2), w and h are never swapped, boxes are
never clipped. Only standard ONNX operators of opset 17 come out (TopK, GatherElements, ...); batches may be dynamic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rtmdet_geo.models.boxes_torch import norm_angle, to_own_axes
from rtmdet_geo.models.heads import STRIDES, RotatedOutputs, at_least_float32

#: Candidates kept per level (RECIPES: rotated 2000).
MAX_CANDIDATES_ROTATED = 2000
#: TensorRT's TopK takes no more.
MAX_TOP_K = 3840


class TopK(NamedTuple):
    """The best (prior, class) pairs of one level, in falling score order; all (N, k)."""

    priors: Tensor
    scores: Tensor
    labels: Tensor


class Candidates(NamedTuple):
    """Candidate boxes before threshold and NMS, levels concatenated.

    Attributes:
        boxes: (N, K, 5) cx, cy, w, h in px and angle in rad [-pi/2, pi/2); w may be the short side or negative.
        scores: (N, K) in [0, 1].
        labels: (N, K) int64.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor


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


def select_top_k(logits: Tensor, limit: int = MAX_CANDIDATES_ROTATED, *, multi_label: bool = True) -> TopK:
    """Pick the best candidates of one level.

    Args:
        logits: (N, P, C).
        limit: at most so many; at most :data:`MAX_TOP_K` if the graph is to run in TensorRT.
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
        raw = flatten_level(at_least_float32(torch.cat((reg, angle), dim=1)))
        raw = raw.gather(1, best.priors.unsqueeze(-1).expand(-1, -1, 5))
        points = _points_of(best.priors, cls.shape[3], stride).to(raw.dtype)
        parts.append(Candidates(decode_distances(points, raw), best.scores, best.labels))
    return Candidates(*(torch.cat(part, dim=1) for part in zip(*parts, strict=True)))


def _points_of(priors: Tensor, width: int, stride: int) -> Tensor:
    """Return the points (N, k, 2) x, y in px, integers, of priors (N, k); needs no table, whatever H and W are."""
    row = torch.div(priors, width, rounding_mode="trunc")
    return torch.stack((priors - row * width, row), dim=-1) * stride


class DetectionGraph(nn.Module):
    """What a model file holds: uint8 pixels in, candidates out; normalisation, decoding and top-K inside, NMS outside.

    Args:
        model: a rotated RTMDet (see :mod:`rtmdet_geo.models.rtmdet`).
        mean: per channel, on the uint8 scale.
        std: per channel, on the uint8 scale.
        limit: candidates kept per level.
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
        limit: int = MAX_CANDIDATES_ROTATED,
        multi_label: bool = True,
    ) -> None:
        super().__init__()
        self.model = model
        self.limit = limit
        self.multi_label = multi_label
        self.register_buffer("mean", torch.tensor(tuple(mean), dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(tuple(std), dtype=torch.float32).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Candidates:
        """Map uint8 images (N, C, H, W), H and W multiples of 32, to :class:`Candidates`."""
        normalised = (images.to(self.mean.dtype) - self.mean) / self.std
        return decode_rotated(self.model(normalised), limit=self.limit, multi_label=self.multi_label)
