"""From an ordinary image to a network's input: resize with the sides' ratio kept, pad or crop, normalise.

The published detectors' preprocessing (RTMDet's recipes; mmdet 3.x ``Resize(keep_ratio=True)``, ``Pad``,
``DetDataPreprocessor``), which golden numbers pin: bilinear resize of the uint8 image by OpenCV, padding with grey 114
at the bottom and the right, channels left in their order, which for the published weights is BGR.

The published classifiers' is another (mmpretrain's imagenet_bs256_rsb_a12.py: ``ResizeEdge``, ``CenterCrop``): bicubic
resize with antialiasing by Pillow until the short side is a little longer than the network's, then the centre is cut
out; channels are RGB.

Scenes do not come this way: :mod:`rtmdet_geo.scene` resamples them by ground sample distance.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rtmdet_geo.errors import ConfigError
from rtmdet_geo.structures import PAD_VALUE

#: Statistics of the published models on the uint8 scale, in the order blue, green, red.
MEAN_BGR = (103.53, 116.28, 123.675)
STD_BGR = (57.375, 57.12, 58.395)

#: Short side in px that classified images are resized to, and side of the square that is cut out of their centre.
_SHORT_SIDE, _CROP_SIDE = 236, 224


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
    _check_image(image)
    height, width, channels = image.shape
    new_height, new_width = keep_ratio_size(height, width, side)
    resized: NDArray[Any] = np.ascontiguousarray(image)
    if (new_height, new_width) != (height, width):
        resized = cv2.resize(resized, (new_width, new_height), interpolation=cv2.INTER_LINEAR)
    padded = np.full((side, side, channels), pad_value, np.uint8)
    padded[:new_height, :new_width] = resized.reshape(new_height, new_width, channels)  # OpenCV drops a single channel
    return Letterbox(padded, (new_height, new_width), (new_width / width, new_height / height))


def short_side_size(height: int, width: int, side: int) -> tuple[int, int]:
    """Return the (height, width) of an image whose shorter side becomes ``side`` px (mmpretrain ``ResizeEdge``).

    Raises:
        ValueError: a number is below 1.

    Example:
        >>> short_side_size(480, 641, 236)
        (236, 315)
    """
    if min(height, width, side) < 1:
        raise ValueError(f"cannot resize {height} x {width} px to a side of {side} px; sides start at 1")
    return (side * height // width, side) if width < height else (side, side * width // height)


def resize_bicubic(image: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Resize as Pillow does: cubic interpolation, widened to average over what a smaller image leaves out.

    Args:
        image: (h, w, C) uint8. Each channel is resized by itself; none is taken for an alpha channel.
        height: of the result in px.
        width: likewise.

    Returns:
        (height, width, C) uint8.

    Raises:
        ValueError: the image is not (h, w, C) uint8, or is empty; or a side is below 1.
    """
    _check_image(image)
    channels = [
        Image.fromarray(image[:, :, channel]).resize((width, height), Image.Resampling.BICUBIC)
        for channel in range(image.shape[2])
    ]
    return np.stack([np.asarray(channel) for channel in channels], axis=-1)


def crop_centre(image: NDArray[np.uint8], side: int, short_side: int | None = None) -> NDArray[np.uint8]:
    """Resize an image until its shorter side has so many px, and cut the square out of its centre.

    Args:
        image: (height, width, C) uint8, channels in the order of the network.
        side: of the square in px; published: 224.
        short_side: px, at least ``side``; None takes 236 / 224 of it, as published.

    Returns:
        (side, side, C) uint8.

    Raises:
        ValueError: the image is not (height, width, C) uint8, or is empty; ``side`` is below 1 or above ``short_side``.

    Example:
        >>> crop_centre(np.zeros((480, 640, 3), np.uint8), 224).shape
        (224, 224, 3)
    """
    _check_image(image)
    if short_side is None:
        short_side = round(side * _SHORT_SIDE / _CROP_SIDE)
    if short_side < side:
        raise ValueError(f"cannot cut {side} px out of a shorter side of {short_side} px")
    height, width = short_side_size(image.shape[0], image.shape[1], short_side)
    top, left = round((height - side) / 2), round((width - side) / 2)  # half to even, as mmcv's CenterCrop
    return resize_bicubic(image, height, width)[top : top + side, left : left + side]


def _check_image(image: NDArray[np.uint8]) -> None:
    if image.ndim != 3 or image.dtype != np.uint8 or 0 in image.shape:
        raise ValueError(f"need an image (height, width, C) uint8, got {image.shape} {image.dtype}; stretch it first")


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


def check_array(image: Any, *, instead: str) -> NDArray[Any]:
    """Return the image if it is a numpy array.

    Args:
        image: what somebody passed as an image.
        instead: the function that takes files.

    Raises:
        ConfigError: it is none, such as the None that OpenCV returns for a file it cannot read.
    """
    if not isinstance(image, np.ndarray):
        hint = "was the file read?" if image is None else f"read the file first, or use {instead}"
        raise ConfigError(f"the image is {type(image).__name__}, not a numpy array: {hint}")
    return image
