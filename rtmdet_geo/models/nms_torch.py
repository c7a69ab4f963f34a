"""Non-maximum suppression of rotated boxes on the device, many tiles at once.

For programs that keep boxes on a GPU. It keeps what :func:`rtmdet_geo.nms.nms_rotated` keeps, which the pipeline uses:
exact IoU in float64, boxes in falling order of their scores, classes apart. Tiles and classes are told apart by their
numbers, not by moving their boxes to places of their own, where float32 would round them.

**IoU.** The larger rectangle is moved into the frame of the smaller one, ``|x| <= a, |y| <= b``. What they share is the
integral over its border, once round, of ``clamp(y, -b, b) dx`` within ``|x| <= a``. Along an edge that is linear
between the points where it crosses the four sides, so trapezoids between them are exact.

**Greedy order.** A box stays if no box before it, that stays itself, suppresses it. Applied to all boxes at once, over
and over, this rule has settled after as many rounds as the longest chain of boxes that suppress each other, and what
it settles on is the greedy result, since the first boxes of all chains are right from the first round on.

The host waits for the device once to learn how many candidates there are, twice for each part of the pairs, and once
for every :data:`_ROUNDS` rounds.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

#: Pairs of boxes whose enclosing boxes are compared at once: about 100 MB.
PAIRS_AT_ONCE = 2**21
#: Pairs whose overlap is computed at once, a part of those; an eighth as many take as much memory.
_OVERLAPS_AT_ONCE = PAIRS_AT_ONCE // 8
#: Rounds of the greedy rule between two looks whether it has settled.
_ROUNDS = 4


class _Frames(NamedTuple):
    """Boxes as NMS needs them, float64 each of the same shape: px, and cosine and sine of the w axis."""

    x: Tensor
    y: Tensor
    half_w: Tensor
    half_h: Tensor
    cos: Tensor
    sin: Tensor

    def at(self, *index: Tensor) -> _Frames:
        """Return the chosen ones."""
        return _Frames(*(part[index] for part in self))


def nms_rotated_batch(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    *,
    score_threshold: float,
    iou_threshold: float,
    is_strict: bool = False,
    pairs_at_once: int = PAIRS_AT_ONCE,
) -> Tensor:
    """Tell which rows of each image stay: those above the score threshold that no better one of their class suppresses.

    Rows are what a :class:`rtmdet_geo.models.decode.DetectionGraph` gives. Those without area or with numbers that are
    not finite are left out.

    Args:
        boxes: (N, K, 5) cx, cy, w, h in px, angle in rad.
        scores: (N, K); of equal scores the first row counts as the better one.
        labels: (N, K), whole numbers of any dtype.
        score_threshold: rows with a score below it are left out.
        iou_threshold: in [0, 1]; a box is suppressed where its IoU with a kept one is >= it.
        is_strict: suppress where the IoU is > the threshold only, as models of horizontal boxes and instances want it
            (:func:`rtmdet_geo.nms.nms_horizontal`).
        pairs_at_once: bounds the memory.

    Returns:
        (N, K) bool.

    Raises:
        ValueError: the shapes do not agree, or the threshold is outside [0, 1].
    """
    if boxes.ndim != 3 or boxes.shape[2] != 5 or boxes.shape[:2] != scores.shape or scores.shape != labels.shape:
        raise ValueError(
            "boxes (N, K, 5), scores and labels (N, K) are wanted, got "
            f"{tuple(boxes.shape)}, {tuple(scores.shape)} and {tuple(labels.shape)}"
        )
    if not 0 <= iou_threshold <= 1:
        raise ValueError(f"iou_threshold {iou_threshold!r} is outside [0, 1]")
    if not scores.numel():
        return torch.zeros_like(scores, dtype=torch.bool)
    is_candidate = (scores >= score_threshold) & (boxes[..., 2:4] > 0).all(dim=2) & boxes.isfinite().all(dim=2)
    number = int(is_candidate.sum(dim=1).max())
    order = torch.sort(scores.masked_fill(~is_candidate, -torch.inf), dim=1, descending=True, stable=True)[1]
    order = order[:, :number]
    alive = is_candidate.gather(1, order)
    chosen = boxes.gather(1, order[..., None].expand(-1, -1, 5)).double()
    chosen = torch.where(alive[..., None], chosen, 1.0)  # what is left out may be NaN
    x, y, width, height, angle = chosen.unbind(dim=2)
    frames = _Frames(x, y, width / 2, height / 2, angle.cos(), angle.sin())
    better, worse = _suppressions(frames, alive, labels.gather(1, order), iou_threshold, is_strict, pairs_at_once)
    return torch.zeros_like(is_candidate).scatter(1, order, _settle(alive, better, worse))


def _suppressions(
    frames: _Frames, alive: Tensor, labels: Tensor, iou_threshold: float, is_strict: bool, pairs_at_once: int
) -> tuple[Tensor, Tensor]:
    """Return all pairs of boxes of which the first suppresses the second if it stays.

    Args:
        frames: (N, K) in falling order of scores.
        alive: (N, K) whether it is a candidate at all.
        labels: (N, K).
        iou_threshold: see :func:`nms_rotated_batch`.
        is_strict: likewise.
        pairs_at_once: likewise.

    Returns:
        Their places in the flattened (N, K), two tensors (P,) int64.
    """
    num_images, number = alive.shape
    reach_x = frames.cos.abs() * frames.half_w + frames.sin.abs() * frames.half_h
    reach_y = frames.sin.abs() * frames.half_w + frames.cos.abs() * frames.half_h
    rank = torch.arange(number, device=alive.device)
    step = max(1, pairs_at_once // max(1, num_images * number))
    part_size = max(1, pairs_at_once * _OVERLAPS_AT_ONCE // PAIRS_AT_ONCE)
    better, worse = [], []
    for start in range(0, number, step):
        rows, columns = slice(start, start + step), slice(start, None)
        near = (labels[:, rows, None] == labels[:, None, columns]) & (rank[rows, None] < rank[columns])
        near &= alive[:, rows, None] & alive[:, None, columns]
        if iou_threshold > 0 or is_strict:  # otherwise boxes that do not touch suppress each other as well
            for centre, reach in ((frames.x, reach_x), (frames.y, reach_y)):
                distance = (centre[:, rows, None] - centre[:, None, columns]).abs()
                near &= distance < reach[:, rows, None] + reach[:, None, columns]
        image, first, second = near.nonzero(as_tuple=True)
        first, second = first + start, second + start
        for part in zip(*(index.split(part_size) for index in (image, first, second)), strict=True):
            iou = _iou(frames.at(part[0], part[1]), frames.at(part[0], part[2]))
            hits = (iou > iou_threshold if is_strict else iou >= iou_threshold).nonzero()[:, 0]
            better.append((part[0] * number + part[1])[hits])
            worse.append((part[0] * number + part[2])[hits])
    if not better:
        return rank[:0], rank[:0]
    return torch.cat(better), torch.cat(worse)


def _settle(alive: Tensor, better: Tensor, worse: Tensor) -> Tensor:
    """Return (N, K) which boxes stay, see the top of this module."""
    kept = everything = alive.flatten()
    while True:
        for _ in range(_ROUNDS):
            before = kept
            hits = torch.zeros_like(everything, dtype=torch.int32).index_add_(0, worse, before[better].int())
            kept = everything & (hits == 0)
        if torch.equal(kept, before):
            return kept.view_as(alive)


def _iou(one: _Frames, other: _Frames) -> Tensor:
    """Return the IoU (P,) of pairs of boxes that have an area."""
    is_larger = one.half_w * one.half_h > other.half_w * other.half_h
    small = _Frames(*(torch.where(is_larger, b, a) for a, b in zip(one, other, strict=True)))
    large = _Frames(*(torch.where(is_larger, a, b) for a, b in zip(one, other, strict=True)))
    area_small, area_large = 4 * small.half_w * small.half_h, 4 * large.half_w * large.half_h
    dx, dy = large.x - small.x, large.y - small.y
    x, y = small.cos * dx + small.sin * dy, small.cos * dy - small.sin * dx
    cos = small.cos * large.cos + small.sin * large.sin
    sin = small.cos * large.sin - small.sin * large.cos
    signs = x.new_tensor([[1, 1], [1, -1], [-1, -1], [-1, 1]])
    along, across = signs[:, 0] * large.half_w[:, None], signs[:, 1] * large.half_h[:, None]  # (P, 4) corners
    corners_x = x[:, None] + cos[:, None] * along - sin[:, None] * across
    corners_y = y[:, None] + sin[:, None] * along + cos[:, None] * across
    common = _area_inside(corners_x, corners_y, small.half_w[:, None], small.half_h[:, None])
    common = torch.minimum(common, area_small)
    return common / (area_small + area_large - common)


def _area_inside(corners_x: Tensor, corners_y: Tensor, half_w: Tensor, half_h: Tensor) -> Tensor:
    """Return the area (P,) of convex polygons with corners (P, 4) in order that is inside |x| <= half_w, |y| <= half_h.

    half_w and half_h are (P, 1).
    """
    width, height = corners_x.roll(-1, dims=1) - corners_x, corners_y.roll(-1, dims=1) - corners_y

    def crossings(start: Tensor, length: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
        """Return where on the edges, 0 to 1, they enter and leave -limit to limit; anywhere if they run along it."""
        moving = torch.where(length == 0, 1.0, length)
        ends = (-limit - start) / moving, (limit - start) / moving
        return torch.minimum(*ends), torch.maximum(*ends)

    first, last = (end.clamp(0, 1) for end in crossings(corners_x, width, half_w))
    low, high = (end.clamp(first, last) for end in crossings(corners_y, height, half_h))
    stops = [first, low, high, last]
    heights = [(corners_y + stop * height).clamp(-half_h, half_h) for stop in stops]
    mean = sum((stops[i + 1] - stops[i]) * (heights[i] + heights[i + 1]) for i in range(3)) / 2
    return (mean * width).sum(dim=1).abs()
