"""How a training sample shows whole images: where they lie, what is cut out, and the pixels of it.

One image, or a mosaic of four, lies in a *frame*: the image or the mosaic after the random resize, in px of the sample.
A *view* turns the frame about its centre, cuts the sample out of it and flips that. Both together are one similarity
transform per image, so pixels are interpolated once and nothing outside the sample is computed; the reference (mmdet
3.x ``CachedMosaic``, ``RandomResize``, ``RandomCrop``, mmrotate 1.x ``RandomRotate``) interpolates at every step and
rounds every size to whole px. All coordinates are continuous px (structures.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from rtmdet_geo.annotations.outlines import (
    Outline,
    Window,
    clip_outline,
    fill_outline,
    outline_points,
    transform_outline,
)
from rtmdet_geo.recipe_sections import ImageAugment
from rtmdet_geo.structures import PAD_VALUE

Array = NDArray[Any]

#: The mosaic's centre lies at this share of an image's side at least and at most (mmdet center_ratio_range).
_CENTRE_RANGE = (0.5, 1.5)
#: Which corner of each image of a mosaic lies at its centre, in shares of width and height.
_INNER_CORNERS = ((1.0, 1.0), (0.0, 1.0), (1.0, 0.0), (0.0, 0.0))
#: Images that shrink further are averaged first: bilinear interpolation would skip pixels.
_AREA_BELOW = 0.5


class Framing(NamedTuple):
    """How a sample shows one image or the four of a mosaic.

    Attributes:
        placements: per image (2, 3), image px to frame px: uniform scale and shift.
        frame: width and height of the frame.
        view: (2, 3), frame px to sample px: rotation, perhaps a flip, and shift.
        shown: width and height of the frame's part that the sample shows, at its top left; the rest is padding.
    """

    placements: tuple[Array, ...]
    frame: tuple[float, float]
    view: Array
    shown: tuple[float, float]

    @property
    def is_turned(self) -> bool:
        """Whether the frame's edges may run through the sample."""
        return bool(self.view[0, 1] != 0)

    def matrix(self, index: int) -> Array:
        """Return (2, 3): px of an image to px of the sample."""
        return compose(self.view, self.placements[index])

    def outlines_in_sample(self, outlines: Iterable[Outline], index: int) -> tuple[Outline, ...]:
        """Return outlines in px of an image in px of the sample, cut off at the frame's edges."""
        matrix, placement = self.matrix(index), self.placements[index]
        if not self.is_turned:  # then all of the sample lies within the frame
            return tuple(transform_outline(outline, matrix) for outline in outlines)
        placed = (clip_outline(transform_outline(outline, placement), *self.frame) for outline in outlines)
        return tuple(transform_outline(outline, self.view) for outline in placed)


def compose(second: Array, first: Array) -> Array:
    """Return the transform (2, 3) that does ``first`` (2, 3), then ``second`` (2, 3)."""
    return np.column_stack((second[:, :2] @ first[:, :2], second[:, :2] @ first[:, 2] + second[:, 2]))


def place_images(
    rng: np.random.Generator, section: ImageAugment, sizes: Sequence[tuple[int, int]], side: int
) -> tuple[tuple[Array, ...], tuple[float, float]]:
    """Draw the random resize and, for four images, the mosaic's centre.

    Args:
        rng: source of randomness.
        section: range of the factor of the resize.
        sizes: width and height of one image, or of four.
        side: of the sample; each image is fitted into it with its aspect kept, then scaled by the factor.

    Returns:
        ``placements`` and ``frame`` of a :class:`Framing`.
    """
    factor = rng.uniform(section.scale_min, section.scale_max)
    scales = [min(side / width, side / height) * factor for width, height in sizes]
    if len(sizes) == 1:
        (width, height), scale = sizes[0], scales[0]
        return (np.array([[scale, 0, 0], [0, scale, 0]]),), (width * scale, height * scale)
    centre = [int(rng.uniform(*_CENTRE_RANGE) * side) * factor for _ in range(2)]
    placements = []
    for (width, height), scale, (share_x, share_y) in zip(sizes, scales, _INNER_CORNERS, strict=True):
        x, y = centre[0] - share_x * width * scale, centre[1] - share_y * height * scale
        placements.append(np.array([[scale, 0, x], [0, scale, y]]))
    return tuple(placements), (2 * side * factor, 2 * side * factor)


def draw_view(
    rng: np.random.Generator, section: ImageAugment, frame: tuple[float, float], side: int, *, quarter_turns: bool
) -> tuple[Array, tuple[float, float]]:
    """Draw rotation about the frame's centre, crop and flip.

    The rotation comes before the crop, as in mmrotate's recipe with strong augmentation; where the crop takes all,
    this is the flip and rotation of the recipes without it, whose order does not matter to what may come out.

    Args:
        rng: source of randomness.
        section: their probabilities and ranges.
        frame: width and height.
        side: of the sample.
        quarter_turns: turn by 90, 180 or 270 degrees only, as mmrotate's RandomRotate does where the image holds an
            object of ``rect_obj_labels``.

    Returns:
        ``view`` and ``shown`` of a :class:`Framing`.
    """
    view = np.eye(2, 3)
    if rng.random() < section.rotate_prob:
        view = _rotation(rng, section, frame, quarter_turns)
    shown = (min(float(side), frame[0]), min(float(side), frame[1]))
    view[:, 2] -= [rng.integers(0, int(room) + 1) for room in (frame[0] - shown[0], frame[1] - shown[1])]
    if section.flip_directions and rng.random() < section.flip_prob:
        direction = section.flip_directions[rng.integers(len(section.flip_directions))]
        view = compose(flip_matrix(direction, shown), view)
    return view, shown


def flip_matrix(direction: str, size: tuple[float, float]) -> Array:
    """Return the transform (2, 3) that mirrors width x height px: x ("horizontal"), y ("vertical"), or both."""
    matrix = np.eye(2, 3)
    for axis, other in ((0, "vertical"), (1, "horizontal")):
        if direction != other:
            matrix[axis] = -matrix[axis]
            matrix[axis, 2] = size[axis]
    return matrix


def _rotation(
    rng: np.random.Generator, section: ImageAugment, frame: tuple[float, float], quarter_turns: bool
) -> Array:
    """Draw a rotation (2, 3) about the centre of a frame, exact for quarter turns."""
    angle = math.radians(section.max_rotation_deg) * rng.uniform(-1, 1)
    cosine, sine = math.cos(angle), math.sin(angle)
    if quarter_turns:  # 90, 180, -90 and -180 degrees, each as likely
        cosine, sine = ((0.0, 1.0), (-1.0, 0.0), (0.0, -1.0), (-1.0, 0.0))[rng.integers(4)]
    linear, centre = np.array([[cosine, -sine], [sine, cosine]]), np.array(frame) / 2
    return np.column_stack((linear, centre - linear @ centre))


def render(images: Sequence[Array], framing: Framing, side: int) -> NDArray[np.uint8]:
    """Return the pixels of a sample.

    Args:
        images: (C, H, W) uint8, as many as ``framing`` places.
        framing: how the sample shows them.
        side: of the sample.

    Returns:
        (side, side, C) uint8, bilinear, of far shrunk images after averaging; PAD_VALUE where no image is.
    """
    sample = np.full((side, side, len(images[0])), PAD_VALUE, np.uint8)
    for index, image in enumerate(images):
        _, height, width = image.shape
        corners = np.array([[0, 0], [width, 0], [width, height], [0, height]], float)
        (region,) = framing.outlines_in_sample([((corners,),)], index)
        points = outline_points(region)
        if not len(points):
            continue
        low, high = np.maximum(points.min(axis=0), 0), np.minimum(points.max(axis=0), framing.shown)
        (x0, y0), (x1, y1) = (np.ceil(corner - 0.5).astype(int).tolist() for corner in (low, high))
        if x1 <= x0 or y1 <= y0:
            continue
        window = Window(x0, y0, x1 - x0, y1 - y0)
        part = sample[y0:y1, x0:x1]
        pixels = _warp(image, framing.matrix(index), window)
        if framing.is_turned:
            cv2.copyTo(pixels, fill_outline(region, window), part)
        else:
            part[:] = pixels
    return sample


def _warp(image: Array, matrix: Array, window: Window) -> Array:
    """Return the pixels of a window of the sample that lies within the image: (height, width, C) uint8."""
    size = (window.width, window.height)
    local = matrix - np.array([[0, 0, window.x], [0, 0, window.y]])
    inverse = cv2.invertAffineTransform(local)
    corners = np.array([[0, 0], [size[0], 0], [0, size[1]], size], float) @ inverse[:, :2].T + inverse[:, 2]
    scale = math.sqrt(abs(np.linalg.det(matrix[:, :2])))
    step = int(1 / scale) if scale < _AREA_BELOW else 1
    limits = (image.shape[2], image.shape[1])
    start = np.clip(np.floor(corners.min(axis=0)).astype(int) - 2 * step, 0, np.array(limits) - 1)
    counts = -(-(np.ceil(corners.max(axis=0)).astype(int) + 2 * step - start) // step)  # of averaged pixels
    stop = np.clip(start + counts * step, start + 1, limits)
    source = _interleaved(image[:, start[1] : stop[1], start[0] : stop[0]], step)
    # Averaged pixels are (stop - start) / (columns, rows) px wide and high; OpenCV counts from pixel centres.
    pitch = (stop - start) / (source.shape[1], source.shape[0])
    local = compose(local, np.column_stack((np.diag(pitch), start)))
    local[:, 2] += local[:, :2] @ (0.5, 0.5) - 0.5
    pixels = cv2.warpAffine(source, local, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return pixels.reshape(size[1], size[0], -1)


def _interleaved(image: Array, step: int) -> Array:
    """Return (C, H, W) uint8 as (H, W, C) or, for one band, (H, W); each pixel the mean of step x step of them."""
    rows, columns = (-(-length // step) for length in image.shape[1:])
    if image.strides[0] == 1 and len(image) > 1:  # it was decoded so
        view = np.moveaxis(image, 0, -1)
        return view if step == 1 else cv2.resize(view, (columns, rows), interpolation=cv2.INTER_AREA)
    planes = [np.asarray(plane) for plane in image]
    if step > 1:
        planes = [cv2.resize(plane, (columns, rows), interpolation=cv2.INTER_AREA) for plane in planes]
    return planes[0] if len(planes) == 1 else cv2.merge(planes)
