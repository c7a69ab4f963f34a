"""Image files as training reads them: decoded when asked for, kept in memory within a budget.

:mod:`rtmdet_geo.pictures` decodes; an EXIF orientation is ignored, because labels count stored pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from rtmdet_geo.errors import AnnotationError
from rtmdet_geo.pictures import decode_image
from rtmdet_geo.recipe_sections import IMAGE_BANDS, DataSection
from rtmdet_geo.training.thread_cache import ThreadCache

Array = NDArray[Any]


class ImageCache(ThreadCache[Array]):
    """Decoded images, by their bytes; see :class:`ThreadCache`."""

    def __init__(self, budget_bytes: int) -> None:
        """Keep images of ``budget_bytes`` together at most; images in use elsewhere stay in memory beyond that."""
        super().__init__(budget_bytes, lambda image: image.nbytes)

    @classmethod
    def of_recipe(cls, data: DataSection) -> ImageCache:
        """Return a cache of ``data.cache_mb``, megabytes of a million bytes."""
        return cls(data.cache_mb * 1_000_000)


@dataclass(frozen=True)
class ImageFile:
    """Pixels of an image file, a :class:`rtmdet_geo.training.labelled.PixelSource`.

    Attributes:
        path: of the file.
        width: in px, as :func:`rtmdet_geo.pictures.image_size` tells it.
        height: in px.
        bands: channels in order, some of red, green, blue; a grey image gives the same plane for each.
        cache: keeps decoded images.
    """

    path: Path
    width: int
    height: int
    bands: tuple[str, ...]
    cache: ImageCache

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W), known without decoding."""
        return len(self.bands), self.height, self.width

    def read(self) -> Array:
        """Return (C, H, W) uint8, not to be written to: a view of (H, W, C) memory, which OpenCV takes as it is.

        Raises:
            AnnotationError: the file is gone, does not decode, or its size is not what its header said before.
        """
        image = read_image(self.path, self.bands, self.cache)
        if image.shape[1:] != (self.height, self.width):
            raise AnnotationError(
                f"image {str(self.path)!r} is {image.shape[2]} x {image.shape[1]} px now, it was {self.width} x "
                f"{self.height} px when the labels were read: leave images alone while training runs"
            )
        return image


def read_image(path: Path, bands: tuple[str, ...], cache: ImageCache) -> Array:
    """Return the pixels of an image file; it is not opened if they are kept.

    Args:
        path: of the file.
        bands: channels in order, some of red, green, blue; a grey image gives the same plane for each.
        cache: keeps decoded images.

    Returns:
        (C, H, W) uint8, not to be written to: a view of (H, W, C) memory, which OpenCV takes as it is.

    Raises:
        AnnotationError: the file is gone or does not decode.
    """
    return np.moveaxis(cache.get((path, bands), lambda: _decode(path, bands)), -1, 0)


def _decode(path: Path, bands: tuple[str, ...]) -> Array:
    """Return (H, W, C) uint8."""
    image = decode_image(path)
    order = [IMAGE_BANDS.index(band) for band in bands]
    if image.ndim == 2:
        image = np.repeat(image[..., None], len(order), axis=2)
    elif order != [0, 1, 2]:
        ordered = np.empty((*image.shape[:2], len(order)), np.uint8)
        cv2.mixChannels([image], [ordered], [index for pair in enumerate(order) for index in reversed(pair)])
        image = ordered
    image.flags.writeable = False
    return image
