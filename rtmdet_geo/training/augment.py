"""Random changes of a training crop, for pixels, rotated boxes and outlines alike. numpy and OpenCV only.

Geometry is one similarity transform (rotation, scale, flip, shift) per crop, so pixels are interpolated once and labels
follow exactly: outlines are transformed and only then cut into masks. Boxes are cx, cy, w, h in px and an angle in rad
(le90), in the frame of structures.py: continuous coordinates, origin at the outer corner of the top-left pixel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from rtmdet_geo.annotations.outlines import (
    Outline,
    fill_outline,
    pixel_window,
    transform_outline,
    visible_bounds,
)
from rtmdet_geo.boxes import boxes_to_hboxes, regularize_le90
from rtmdet_geo.nms import rotated_iou
from rtmdet_geo.recipe_sections import CropAugment, ImageAugment
from rtmdet_geo.structures import PAD_VALUE

Array = NDArray[Any]


def random_similarity(
    rng: np.random.Generator, section: CropAugment, centre: tuple[float, float], size: tuple[int, int]
) -> Array:
    """Draw a transform that puts ``centre`` (x, y in source px) into the middle of a crop.

    Args:
        rng: source of randomness.
        section: ranges of rotation and scale (log-uniform), probability of a flip.
        centre: point of the source, continuous px.
        size: width and height of the crop in px.

    Returns:
        (2, 3) float64: crop = matrix @ (x, y, 1), continuous coordinates in both frames.
    """
    angle = math.radians(section.max_rotation_deg) * rng.uniform(-1, 1)
    scale = math.exp(rng.uniform(math.log(section.scale_min), math.log(section.scale_max)))
    cosine, sine = scale * math.cos(angle), scale * math.sin(angle)
    linear = np.array([[cosine, -sine], [sine, cosine]])
    if rng.random() < section.flip_prob:
        linear = linear @ np.diag([-1.0, 1.0])
    shift = np.array([size[0] / 2, size[1] / 2]) - linear @ np.asarray(centre, float)
    return np.column_stack([linear, shift])


def warp_crop(image: Array, matrix: Array, size: tuple[int, int]) -> Array:
    """Cut a crop out of an image by a similarity transform; bilinear, PAD_VALUE outside.

    Args:
        image: (C, H, W) uint8; may be a memory map, only the window that is needed is read.
        matrix: (2, 3) source px to crop px, continuous coordinates.
        size: width and height of the crop.

    Returns:
        (C, height, width) uint8.
    """
    width, height = size
    channels, source_height, source_width = image.shape
    inverse = cv2.invertAffineTransform(matrix)
    corners = np.array([[0, 0], [width, 0], [0, height], [width, height]], float) @ inverse[:, :2].T + inverse[:, 2]
    x0, y0 = np.maximum(np.floor(corners.min(axis=0)).astype(int) - 2, 0)
    x1, y1 = np.minimum(np.ceil(corners.max(axis=0)).astype(int) + 2, (source_width, source_height))
    if x1 <= x0 or y1 <= y0:
        return np.full((channels, height, width), PAD_VALUE, np.uint8)
    window = np.ascontiguousarray(np.moveaxis(image[:, y0:y1, x0:x1], 0, -1))
    local = matrix.copy()
    # OpenCV counts from pixel centres, and the window starts at (x0, y0).
    local[:, 2] += matrix[:, :2] @ np.array([x0 + 0.5, y0 + 0.5]) - 0.5
    crop = cv2.warpAffine(
        window, local, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT, borderValue=[PAD_VALUE] * 4
    )
    return np.ascontiguousarray(np.moveaxis(crop.reshape(height, width, channels), -1, 0))


def transform_boxes(boxes: Array, matrix: Array) -> Array:
    """Move boxes by a similarity transform.

    Args:
        boxes: (N, 5) cx, cy, w, h, angle.
        matrix: (2, 3) similarity: uniform scale, rotation, perhaps a flip.

    Returns:
        (N, 5) float64, le90.
    """
    linear = matrix[:, :2]
    scale = math.sqrt(abs(np.linalg.det(linear)))
    moved = np.array(boxes, float).reshape(-1, 5)
    axis = np.stack([np.cos(moved[:, 4]), np.sin(moved[:, 4])], axis=1) @ linear.T
    moved[:, :2] = moved[:, :2] @ linear.T + matrix[:, 2]
    moved[:, 2:4] *= scale
    moved[:, 4] = np.arctan2(axis[:, 1], axis[:, 0])
    return regularize_le90(moved)


def visible_share(boxes: Array, size: tuple[float, float]) -> Array:
    """Return the share of each box's area that lies inside a (width, height) crop: (N,) float64 in [0, 1]."""
    width, height = size
    inside = np.array([[width / 2, height / 2, width, height, 0.0]])
    share = np.zeros(len(boxes))
    bounds = boxes_to_hboxes(boxes) if len(boxes) else np.zeros((0, 4))
    near = (bounds[:, 2] > 0) & (bounds[:, 3] > 0) & (bounds[:, 0] < width) & (bounds[:, 1] < height)
    if near.any():
        share[near] = rotated_iou(boxes[near], inside, mode="iof")[:, 0]
    return share


def crop_bounds(outlines: Sequence[Outline], matrix: Array, size: tuple[int, int]) -> Array:
    """Return the horizontal boxes around what a crop shows of outlines.

    Args:
        outlines: N of them, in px of the source.
        matrix: (2, 3) source px to crop px.
        size: width and height of the crop.

    Returns:
        (N, 4) float64 x1, y1, x2, y2 in px within the crop; zeros where it shows nothing.
    """
    bounds = np.zeros((len(outlines), 4))
    for row, outline in zip(bounds, outlines, strict=True):
        seen = visible_bounds(transform_outline(outline, matrix), *size)
        if seen is not None:
            row[:] = seen
    return bounds


def crop_masks(outlines: Sequence[Outline], matrix: Array, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Cut outlines into the pixels of a crop.

    Args:
        outlines: N of them, in px of the source.
        matrix: (2, 3) source px to crop px.
        size: width and height of the crop.

    Returns:
        (N, height, width) uint8, 1 where the pixel's centre lies inside.
    """
    width, height = size
    masks = np.zeros((len(outlines), height, width), np.uint8)
    for mask, outline in zip(masks, outlines, strict=True):
        moved = transform_outline(outline, matrix)
        window = pixel_window(moved, width, height)
        mask[window.y : window.y + window.height, window.x : window.x + window.width] = fill_outline(moved, window)
    return masks


def random_tones(rng: np.random.Generator, section: CropAugment, image: Array) -> Array:
    """Change gain, offset and gamma (per crop, gain also per band), blur and noise.

    Args:
        rng: source of randomness.
        section: ranges.
        image: (C, H, W) uint8.

    Returns:
        (C, H, W) uint8.
    """
    gamma = math.exp(rng.uniform(-section.gamma, section.gamma))
    gain = 1 + rng.uniform(-section.gain, section.gain)
    offset = rng.uniform(-section.offset, section.offset)
    ramp = 255.0 * (np.arange(256) / 255.0) ** gamma
    result = np.empty_like(image)
    blurred = rng.random() < section.blur_prob
    for band, plane in enumerate(image):
        band_gain = gain * (1 + rng.uniform(-section.band_gain, section.band_gain))
        table = np.clip(np.rint(ramp * band_gain + offset), 0, 255).astype(np.uint8)
        result[band] = cv2.LUT(plane, table)
        if blurred:
            result[band] = cv2.GaussianBlur(result[band], (3, 3), 0)
    if section.noise > 0 and rng.random() < 0.5:
        noise = rng.standard_normal(image.shape, dtype=np.float32) * (section.noise * rng.random())
        result = np.clip(np.rint(result + noise), 0, 255).astype(np.uint8)
    return result


def jitter_hsv(
    rng: np.random.Generator, section: ImageAugment, image: Array, colours: tuple[int, ...]
) -> NDArray[np.uint8]:
    """Shift hue, saturation and value, each with probability one half (YOLOX; mmdet YOLOXHSVRandomAug).

    Args:
        rng: source of randomness.
        section: greatest shifts: hue in steps of 2 degrees, saturation and value of 255.
        image: (H, W, 3) uint8.
        colours: index of red, green and blue in the last axis.

    Returns:
        (H, W, 3) uint8; saturation and value stop at 0 and 255, hue goes round.
    """
    deltas = np.array([section.hue_delta, section.saturation_delta, section.value_delta])
    shifts = (rng.uniform(-1, 1, 3) * deltas * rng.integers(0, 2, 3)).astype(int)
    if not shifts.any():
        return image
    there, back = (cv2.COLOR_RGB2HSV, cv2.COLOR_HSV2RGB)
    if colours == (2, 1, 0):
        there, back = (cv2.COLOR_BGR2HSV, cv2.COLOR_HSV2BGR)
    is_known = colours in ((0, 1, 2), (2, 1, 0))
    levels = np.arange(256)[:, None] + shifts
    table = np.clip(levels, 0, 255).astype(np.uint8)
    table[:, 0] = levels[:, 0] % 180
    hsv = cv2.LUT(cv2.cvtColor(image if is_known else image[..., list(colours)], there), table[None])
    shifted = np.asarray(cv2.cvtColor(hsv, back), np.uint8)
    return shifted if is_known else shifted[..., np.argsort(colours)]


def drop_bands(rng: np.random.Generator, image: Array, probabilities: dict[int, float], fill: dict[int, int]) -> Array:
    """Overwrite whole bands with their fill value, each with its own probability, so that a model can do without.

    Args:
        rng: source of randomness.
        image: (C, H, W) uint8, changed in place.
        probabilities: band index to probability.
        fill: band index to the uint8 value that stands for "this scene lacks the band".

    Returns:
        The same array.
    """
    for band, probability in probabilities.items():
        if rng.random() < probability:
            image[band] = fill[band]
    return image
