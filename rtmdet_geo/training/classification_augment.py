"""Random changes of one image for classifiers: crop, flip, RandAugment. numpy, OpenCV and Pillow.

Figures are those that the published classifiers were trained with (mmdet 3.x
``configs/rtmdet/classification/cspnext-s_8xb256-rsb-a1-600e_in1k.py`` over mmpretrain's ``imagenet_bs256_rsb_a12.py``):
crops as Inception's (arXiv 1409.4842), RandAugment (arXiv 1909.13719) in timm's "increasing" form, in which every
operation is the stronger the higher its level.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from rtmdet_geo.preprocess import resize_bicubic
from rtmdet_geo.recipe_sections import ClassificationAugment, ModelSection

Array = NDArray[Any]

#: Width by height of a crop, drawn on a logarithmic scale, and tries before the centre is taken.
_RATIOS, _CROP_TRIES = (3 / 4, 4 / 3), 10
#: Probability that an operation which was drawn is done, and the highest level.
_OPERATION_PROB, _MAX_LEVEL = 0.5, 10.0
#: What each operation does at the highest level.
_ROTATION_DEG, _SHEAR, _SHIFT, _BLEND, _BITS, _ADDED = 30.0, 0.3, 0.45, 0.9, 4, 110
#: Weights of the colours in a grey image (ITU-R BT.601), as Pillow's.
_LUMA = {"red": 0.299, "green": 0.587, "blue": 0.114}
#: Kernel of the blurred image that sharpening moves away from, Pillow's ``SMOOTH``.
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13


@dataclass(frozen=True)
class Palette:
    """What operations need to know of the channels.

    Attributes:
        fill: grey of what lies outside the image, per channel, 0..255.
        luma: (1, C) float32: share of each channel in a grey image, sum 1.
    """

    fill: tuple[int, ...]
    luma: Array

    @classmethod
    def of_model(cls, model: ModelSection) -> Palette:
        """Fill with the model's mean colour."""
        weights = np.array([[_LUMA.get(band, 1.0) for band in model.bands]], np.float32)
        return cls(tuple(round(value) for value in model.mean), weights / weights.sum())


def augment_image(rng: np.random.Generator, section: ClassificationAugment, palette: Palette, image: Array) -> Array:
    """Crop, flip and change an image.

    Args:
        rng: source of randomness.
        section: sizes, probabilities and levels.
        palette: of the image's channels.
        image: (C, H, W) uint8, not written to.

    Returns:
        (C, image_size, image_size) uint8.
    """
    _, height, width = image.shape
    y, x, rows, columns = random_window(rng, height, width, section.crop_area_min)
    crop = np.moveaxis(image[:, y : y + rows, x : x + columns], 0, -1)
    changed = resize_bicubic(np.ascontiguousarray(crop), section.image_size, section.image_size)
    if rng.random() < section.flip_prob:
        changed = np.ascontiguousarray(changed[:, ::-1])
    changed = rand_augment(rng, section, palette, changed)
    return np.ascontiguousarray(np.moveaxis(changed, -1, 0))


def random_window(rng: np.random.Generator, height: int, width: int, area_min: float) -> tuple[int, int, int, int]:
    """Draw a part of an image: of random area, and with sides between 3:4 and 4:3.

    Args:
        rng: source of randomness.
        height: of the image, px.
        width: likewise.
        area_min: smallest share of the area.

    Returns:
        y, x, height, width in px, inside the image. Where no window of the area drawn fits in ten tries, the largest
        in the centre whose sides are in that range.
    """
    for _ in range(_CROP_TRIES):
        area = rng.uniform(area_min, 1.0) * height * width
        ratio = math.exp(rng.uniform(math.log(_RATIOS[0]), math.log(_RATIOS[1])))
        columns, rows = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < columns <= width and 0 < rows <= height:
            return int(rng.integers(height - rows + 1)), int(rng.integers(width - columns + 1)), rows, columns
    columns = min(width, max(1, round(height * _RATIOS[1])))
    rows = min(height, max(1, round(width / _RATIOS[0])))
    return (height - rows) // 2, (width - columns) // 2, rows, columns


def rand_augment(rng: np.random.Generator, section: ClassificationAugment, palette: Palette, image: Array) -> Array:
    """Do some random operations of :data:`OPERATIONS`, each with probability one half, on (H, W, C) uint8.

    Operations are drawn with replacement. Each has its own level: normally distributed about ``randaugment_magnitude``,
    in [0, 10]; those that know two directions take one at random.
    """
    names = list(OPERATIONS)
    for index in rng.integers(len(names), size=section.randaugment_num):
        is_done = rng.random() < _OPERATION_PROB
        level = rng.normal(section.randaugment_magnitude, section.randaugment_std)
        level = min(max(level, 0.0), _MAX_LEVEL) / _MAX_LEVEL
        sign = 1 if rng.random() < 0.5 else -1
        if is_done:
            image = OPERATIONS[names[index]](image, sign * level, palette)
    return image


def auto_contrast(image: Array, level: float, palette: Palette) -> Array:
    """Stretch each channel to 0..255; knows no level."""
    return _per_channel(ImageOps.autocontrast, image)


def equalize(image: Array, level: float, palette: Palette) -> Array:
    """Make each channel's histogram flat; knows no level."""
    return _per_channel(ImageOps.equalize, image)


def invert(image: Array, level: float, palette: Palette) -> Array:
    """Return 255 - image; knows no level."""
    return 255 - image


def rotate(image: Array, level: float, palette: Palette) -> Array:
    """Turn about the centre by up to 30 degrees, clockwise where the level is positive."""
    height, width = image.shape[:2]
    angle = math.radians(_ROTATION_DEG * level)
    linear = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    centre = np.array([width / 2, height / 2])
    return _warp(image, np.column_stack([linear, centre - linear @ centre]), palette)


def posterize(image: Array, level: float, palette: Palette) -> Array:
    """Keep the upper 4 bits of each value, fewer at higher levels, none at the highest."""
    dropped = 8 - math.ceil(_BITS * (1 - abs(level)))
    return image & np.uint8(255 >> dropped << dropped)


def solarize(image: Array, level: float, palette: Palette) -> Array:
    """Invert values from a threshold on, which falls from 256 to 0."""
    return np.where(image < 256 * (1 - abs(level)), image, 255 - image)


def solarize_add(image: Array, level: float, palette: Palette) -> Array:
    """Make values below 128 brighter, by up to 110."""
    return np.where(image < 128, image + np.uint8(_ADDED * abs(level)), image)  # 127 + 110 fits into uint8


def colour(image: Array, level: float, palette: Palette) -> Array:
    """Strengthen or weaken colours: away from or towards grey."""
    grey = np.clip(np.rint(_grey(image, palette)), 0, 255).astype(np.uint8)
    return _blend(image, np.repeat(grey[..., None], image.shape[2], axis=2), level)


def contrast(image: Array, level: float, palette: Palette) -> Array:
    """Strengthen or weaken contrast: away from or towards the mean grey."""
    return _blend(image, np.full_like(image, round(float(_grey(image, palette).mean()))), level)


def brightness(image: Array, level: float, palette: Palette) -> Array:
    """Multiply by a factor between .1 and 1.9."""
    return _blend(image, np.zeros_like(image), level)


def sharpness(image: Array, level: float, palette: Palette) -> Array:
    """Sharpen or soften: away from or towards a smoothed image."""
    return _blend(image, cv2.filter2D(image, -1, _SMOOTH).reshape(image.shape), level)


def shear_x(image: Array, level: float, palette: Palette) -> Array:
    """Move rows to the right by up to .3 px per px from the upper edge; to the left at negative levels."""
    return _warp(image, np.array([[1, _SHEAR * level, 0], [0, 1, 0]]), palette)


def shear_y(image: Array, level: float, palette: Palette) -> Array:
    """Move columns down by up to .3 px per px from the left edge; up at negative levels."""
    return _warp(image, np.array([[1, 0, 0], [_SHEAR * level, 1, 0]]), palette)


def translate_x(image: Array, level: float, palette: Palette) -> Array:
    """Move to the right by up to .45 of the width; to the left at negative levels."""
    return _warp(image, np.array([[1, 0, _SHIFT * level * image.shape[1]], [0, 1, 0]]), palette)


def translate_y(image: Array, level: float, palette: Palette) -> Array:
    """Move down by up to .45 of the height; up at negative levels."""
    return _warp(image, np.array([[1, 0, 0], [0, 1, _SHIFT * level * image.shape[0]]]), palette)


#: Operations by name: image (H, W, C) uint8, level in [-1, 1] and palette to an image of the same shape.
OPERATIONS: dict[str, Callable[[Array, float, Palette], Array]] = {
    "auto_contrast": auto_contrast,
    "equalize": equalize,
    "invert": invert,
    "rotate": rotate,
    "posterize": posterize,
    "solarize": solarize,
    "solarize_add": solarize_add,
    "colour": colour,
    "contrast": contrast,
    "brightness": brightness,
    "sharpness": sharpness,
    "shear_x": shear_x,
    "shear_y": shear_y,
    "translate_x": translate_x,
    "translate_y": translate_y,
}


def _per_channel(function: Callable[[Image.Image], Image.Image], image: Array) -> Array:
    """Apply an operation of Pillow's on grey images to each channel."""
    channels = [function(Image.fromarray(np.ascontiguousarray(plane))) for plane in np.moveaxis(image, -1, 0)]
    return np.stack([np.asarray(channel) for channel in channels], axis=-1)


def _grey(image: Array, palette: Palette) -> Array:
    """Return the grey image (H, W) float32."""
    return cv2.transform(image.astype(np.float32), palette.luma).reshape(image.shape[:2])


def _blend(image: Array, other: Array, level: float) -> Array:
    """Return the image at level 0, .9 of the way to the other image at -1, as far beyond it at 1."""
    factor = 1 + _BLEND * level
    return cv2.addWeighted(image, factor, other, 1 - factor, 0).reshape(image.shape)


def _warp(image: Array, matrix: Array, palette: Palette) -> Array:
    """Transform pixels by (2, 3) in continuous px, bicubic; outside is the palette's fill."""
    height, width = image.shape[:2]
    shifted = matrix.astype(np.float64)
    shifted[:, 2] += matrix[:, :2] @ (0.5, 0.5) - 0.5  # OpenCV counts from pixel centres
    warped = cv2.warpAffine(image, shifted, (width, height), flags=cv2.INTER_CUBIC, borderValue=palette.fill)
    return warped.reshape(image.shape)
