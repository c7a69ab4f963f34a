"""Rotated boxes as torch tensors, for training and decoding: the angle's wrap, le90, corners, points inside.

Boxes are (..., 5) cx, cy, w, h in px and angle in rad; conventions are those of :mod:`rtmdet_geo.structures`. Facts
checked against mmrotate 1.x (``norm_angle``, ``RotatedBoxes``) by the golden numbers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: A point counts as inside a rotated box only if it is this far (px) from every side (mmrotate's soft assigner).
INSIDE_MARGIN_PX = 0.01


def norm_angle(angles: Tensor) -> Tensor:
    """Wrap angles (...) in rad to [-pi/2, pi/2)."""
    return torch.remainder(angles + math.pi / 2, math.pi) - math.pi / 2


def regularize_le90(boxes: Tensor) -> Tensor:
    """Swap sides so that w is the long one and wrap the angle; squares turn by a quarter, as in the reference.

    Args:
        boxes: (..., 5).

    Returns:
        (..., 5), same rectangles.
    """
    width, height, angle = boxes[..., 2], boxes[..., 3], boxes[..., 4]
    is_long = width > height
    return torch.stack(
        (
            boxes[..., 0],
            boxes[..., 1],
            torch.where(is_long, width, height),
            torch.where(is_long, height, width),
            norm_angle(torch.where(is_long, angle, angle + math.pi / 2)),
        ),
        dim=-1,
    )


def corners(boxes: Tensor) -> Tensor:
    """Return the corners (..., 4, 2) x, y in px of boxes (..., 5), in the reference's order.

    In the box's own axes (u along w, v along h): (+u, +v), (+u, -v), (-u, -v), (-u, +v).
    """
    cosine, sine = torch.cos(boxes[..., 4]), torch.sin(boxes[..., 4])
    half_w, half_h = boxes[..., 2] / 2, boxes[..., 3] / 2
    along = torch.stack((half_w * cosine, half_w * sine), dim=-1)
    across = torch.stack((-half_h * sine, half_h * cosine), dim=-1)
    centre = boxes[..., :2]
    return torch.stack(
        (centre + along + across, centre + along - across, centre - along - across, centre - along + across), dim=-2
    )


def to_own_axes(points: Tensor, boxes: Tensor) -> Tensor:
    """Return points (..., 2) relative to the centres of boxes (..., 5), along their w and h axes; px."""
    offset = points - boxes[..., :2]
    cosine, sine = torch.cos(boxes[..., 4]), torch.sin(boxes[..., 4])
    x, y = offset[..., 0], offset[..., 1]
    return torch.stack((x * cosine + y * sine, y * cosine - x * sine), dim=-1)


def points_inside(points: Tensor, boxes: Tensor, margin: float = INSIDE_MARGIN_PX) -> Tensor:
    """Tell which points lie inside which boxes, by more than ``margin`` px.

    Args:
        points: (P, 2) x, y in px.
        boxes: (B, 5).
        margin: px.

    Returns:
        (P, B) bool.
    """
    own = to_own_axes(points[:, None, :], boxes[None, :, :])
    return (boxes[None, :, 2:4] / 2 - own.abs()).amin(dim=-1) > margin
