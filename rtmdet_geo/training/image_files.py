"""Image files as training reads them: decoded when asked for, kept in memory within a budget.

:mod:`rtmdet_geo.pictures` decodes; an EXIF orientation is ignored, because labels count stored pixels.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from rtmdet_geo.errors import AnnotationError
from rtmdet_geo.pictures import decode_image
from rtmdet_geo.recipe_sections import IMAGE_BANDS, DataSection

Array = NDArray[Any]


class ImageCache:
    """Keeps the images that were asked for last, as many as fit into a budget; any number of threads may share it.

    An image larger than the whole budget is not kept, and a budget of 0 keeps nothing. Threads that ask for the same
    image at the same time wait for one of them to decode it.
    """

    def __init__(self, budget_bytes: int) -> None:
        """Keep images of ``budget_bytes`` together at most; images in use elsewhere stay in memory beyond that."""
        self.budget_bytes = budget_bytes
        self._images: OrderedDict[Any, Array] = OrderedDict()  # the image that was asked for last is last
        self._decoding: dict[Any, Future[Array]] = {}
        self._num_bytes = 0
        self._lock = threading.Lock()

    @classmethod
    def of_recipe(cls, data: DataSection) -> ImageCache:
        """Return a cache of ``data.cache_mb``, megabytes of a million bytes."""
        return cls(data.cache_mb * 1_000_000)

    @property
    def num_bytes(self) -> int:
        """Bytes of the images kept now."""
        return self._num_bytes

    def __len__(self) -> int:
        """Return the number of images kept now."""
        return len(self._images)

    def get(self, key: Any, decode: Callable[[], Array]) -> Array:
        """Return the image of a key, decoded now if it is not kept.

        Args:
            key: hashable name of the image.
            decode: makes the image; what it raises goes to every thread that waits for it.
        """
        with self._lock:
            if key in self._images:
                self._images.move_to_end(key)
                return self._images[key]
            is_first = key not in self._decoding
            promise = self._decoding.setdefault(key, Future())
        if not is_first:
            return promise.result()
        try:
            image = decode()
        except BaseException as error:
            with self._lock:
                del self._decoding[key]
            promise.set_exception(error)
            raise
        with self._lock:
            del self._decoding[key]
            self._keep(key, image)
        promise.set_result(image)
        return image

    def _keep(self, key: Any, image: Array) -> None:
        """Make room for an image and keep it."""
        if image.nbytes > self.budget_bytes:
            return
        while self._num_bytes + image.nbytes > self.budget_bytes:
            _, oldest = self._images.popitem(last=False)
            self._num_bytes -= oldest.nbytes
        self._images[key] = image
        self._num_bytes += image.nbytes


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
