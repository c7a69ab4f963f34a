"""From an ordinary image to a network's input: resize with the sides' ratio kept, pad, normalise. numpy and OpenCV.

The published models' preprocessing (RTMDet's recipes; mmdet 3.x ``Resize(keep_ratio=True)``, ``Pad``,
``DetDataPreprocessor``), which golden numbers pin: bilinear resize of the uint8 image by OpenCV, padding with grey 114
at the bottom and the right, channels left in their order, which for the published weights is BGR. Scenes do not come
this way: :mod:`rtmdet_geo.scene` resamples them by ground sample distance.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from rtmdet_geo.structures import PAD_VALUE

#: Statistics of the published models on the uint8 scale, in the order blue, green, red.
MEAN_BGR = (103.53, 116.28, 123.675)
STD_BGR = (57.375, 57.12, 58.395)


class Letterbox(NamedTuple):
    """An image inside a padded square.

    Attributes:
        image: (side, side, C) uint8.
        content: (height, width) of the resized image in px, in the top left corner.
        scale_factor: (x, y) resized px per original px, each of its own axis because sides are whole numbers.
    """

    image: NDArray[np.uint8]
    content: tuple[int, int]
    scale_factor: tuple[float, float]


def keep_ratio_size(height: int, width: int, side: int) -> tuple[int, int]:
    """Return the (height, width) of an image whose longer side becomes ``side`` px (mmcv ``rescale_size``).

    Raises:
        ValueError: a number is below 1.

    Example:
        >>> keep_ratio_size(1200, 800, 640)
        (640, 427)
    """
    if min(height, width, side) < 1:
        raise ValueError(f"cannot resize {height} x {width} px to a side of {side} px; sides start at 1")
    scale = side / max(height, width)
    return max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)


def letterbox(image: NDArray[np.uint8], side: int, *, pad_value: int = PAD_VALUE) -> Letterbox:
    """Resize an image so that its longer side is ``side`` px, and pad it to a square at the bottom and the right.

    Args:
        image: (height, width, C) uint8, up to 128 channels.
        side: px.
        pad_value: grey of the padding, 0..255.

    Raises:
        ValueError: the image is not (height, width, C) uint8, or is empty; or ``side`` is below 1.

    Example:
        >>> boxed = letterbox(np.zeros((100, 200, 3), np.uint8), 640)
        >>> boxed.image.shape, boxed.content, boxed.scale_factor
        ((640, 640, 3), (320, 640), (3.2, 3.2))
    """
    if image.ndim != 3 or image.dtype != np.uint8 or 0 in image.shape:
        raise ValueError(f"need an image (height, width, C) uint8, got {image.shape} {image.dtype}; stretch it first")
    height, width, channels = image.shape
    new_height, new_width = keep_ratio_size(height, width, side)
    resized: NDArray[Any] = np.ascontiguousarray(image)
    if (new_height, new_width) != (height, width):
        resized = cv2.resize(resized, (new_width, new_height), interpolation=cv2.INTER_LINEAR)
    padded = np.full((side, side, channels), pad_value, np.uint8)
    padded[:new_height, :new_width] = resized.reshape(new_height, new_width, channels)  # OpenCV drops a single channel
    return Letterbox(padded, (new_height, new_width), (new_width / width, new_height / height))


def normalise(
    image: NDArray[np.uint8], mean: Sequence[float] = MEAN_BGR, std: Sequence[float] = STD_BGR
) -> NDArray[np.float32]:
    """Return (image - mean) / std with channels first; for networks without this inside (model files have it).

    Args:
        image: (height, width, C) uint8.
        mean: C values on the uint8 scale.
        std: C values, > 0.

    Returns:
        (C, height, width) float32.

    Raises:
        ValueError: the numbers of channels differ, or a std is not positive.
    """
    means, deviations = np.asarray(mean, np.float32), np.asarray(std, np.float32)
    if image.ndim != 3 or means.shape != (image.shape[2],) or deviations.shape != means.shape:
        raise ValueError(f"image {image.shape} needs one mean and std per channel, got {len(means)}, {len(deviations)}")
    if not (deviations > 0).all():
        raise ValueError(f"std {tuple(std)!r} must be positive")
    normalised = (image.astype(np.float32) - means) / deviations
    return np.ascontiguousarray(normalised.transpose(2, 0, 1))
