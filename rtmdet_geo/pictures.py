"""Ordinary image files - JPEG, PNG, BMP, TIFF and what else Pillow reads - with 8 bits a channel.

Pixels are taken as they are stored: an EXIF orientation is ignored, because labels count stored pixels. Images of more
than twice ``PIL.Image.MAX_IMAGE_PIXELS`` (179 Mpx unless the host has changed it) are refused, unless the caller says
how many it takes.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from rtmdet_geo.errors import AnnotationError

#: What Pillow and its codecs raise over a file that is broken or no image, or that turns out huge while it decodes.
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, Image.DecompressionBombError)
#: Number of the EXIF tag that says how a viewer should turn an image; 1 is "not at all".
_EXIF_ORIENTATION = 0x0112

#: Endings of file names that are taken for images in a folder.
IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})

#: Pillow's limit belongs to the whole process; it is another one only while this is held.
_LIMIT_LOCK = threading.Lock()


def image_stem(name: str) -> str:
    """Return the name of an image file without folders and without the ending of an image."""
    stem, suffix = os.path.splitext(os.path.basename(name))
    return stem if suffix.lower() in IMAGE_SUFFIXES else os.path.basename(name)


def image_size(path: Path, *, max_pixels: int | None = None) -> tuple[int, int]:
    """Return width and height in px as a file's header has them, without decoding.

    Args:
        path: of the file.
        max_pixels: larger images are refused; None: see the module's text.

    Raises:
        AnnotationError: the file is missing, no image, too large, or has more than 8 bits a channel.
    """
    with _open(path, max_pixels) as image:
        return image.size


def decode_image(path: Path, *, max_pixels: int | None = None) -> NDArray[np.uint8]:
    """Decode an image file.

    Args:
        path: of the file.
        max_pixels: larger images are refused; None: see the module's text.

    Returns:
        (H, W) uint8 of a grey image, else (H, W, 3) uint8 in the order red, green, blue; transparency is dropped.

    Raises:
        AnnotationError: the file is missing, no image, corrupt, cut off, too large, or has more than 8 bits a channel.
    """
    with _open(path, max_pixels) as image:
        try:
            mode = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
            return np.array(image if image.mode == mode else image.convert(mode))
        except _DECODE_ERRORS as error:
            raise _broken(path, error) from error


def is_turned(path: Path) -> bool:
    """Say whether a file asks viewers to turn or mirror it (EXIF orientation); :func:`decode_image` does not.

    Raises:
        AnnotationError: see :func:`image_size`.
    """
    with _open(path) as image:
        try:
            orientation: Any = image.getexif().get(_EXIF_ORIENTATION, 1)
        except _DECODE_ERRORS as error:
            raise _broken(path, error) from error
    return orientation in range(2, 9)


@contextmanager
def _no_pixel_limit() -> Iterator[None]:
    """Let Pillow open images of any size."""
    with _LIMIT_LOCK:
        before = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _open(path: Path, max_pixels: int | None = None) -> Image.Image:
    """Open an image and look at its header.

    Raises:
        AnnotationError: see :func:`image_size`.
    """
    try:
        with nullcontext() if max_pixels is None else _no_pixel_limit():
            image = Image.open(path)
    except FileNotFoundError as error:
        raise AnnotationError(f"image {str(path)!r} is missing") from error
    except UnidentifiedImageError as error:
        raise AnnotationError(
            f"{str(path)!r} is no image that can be read here (JPEG, PNG, BMP, 8-bit TIFF): repair or remove it; "
            "scenes of other kinds are cut into chips (rtmdet-geo data chips)"
        ) from error
    except Image.DecompressionBombError as error:
        raise _too_large(path, error) from error
    except _DECODE_ERRORS as error:
        raise _broken(path, error) from error
    if max_pixels is not None and image.width * image.height > max_pixels:
        size = image.size
        image.close()
        raise AnnotationError(
            f"image {str(path)!r} is {size[0]} x {size[1]} px; at most {max_pixels / 1e6:.0f} Mpx are taken: cut it up"
        )
    if image.mode in ("I", "F") or image.mode.startswith("I;16") or ";16" in _stored_mode(image):
        image.close()
        raise AnnotationError(
            f"image {str(path)!r} has more than 8 bits a channel, and how to stretch them is not known: cut chips "
            "from it (rtmdet-geo data chips), which are stretched as the recipe says"
        )
    return image


def _stored_mode(image: Image.Image) -> str:
    """Return how pixels lie in the file ("RGB;16B"); Pillow's own mode hides colours of 16 bits."""
    tiles = getattr(image, "tile", None) or [(None, None, None, "")]
    arguments = tiles[0][3]
    return str(arguments[0] if isinstance(arguments, tuple) and arguments else arguments)


def _broken(path: Path, error: Exception) -> AnnotationError:
    return AnnotationError(f"image {str(path)!r} does not decode ({error}): replace it, or remove it with its labels")


def _too_large(path: Path, error: Exception) -> AnnotationError:
    """Say how large an image is that Pillow does not open because of that."""
    size = _header_size(path)
    if size is None or Image.MAX_IMAGE_PIXELS is None:
        return _broken(path, error)
    return AnnotationError(
        f"image {str(path)!r} is {size[0]} x {size[1]} px; training and data check take images of up to "
        f"{2 * Image.MAX_IMAGE_PIXELS / 1e6:.0f} Mpx: cut it into tiles first ('rtmdet-geo data split' cuts DOTA's "
        "images, 'rtmdet-geo data chips' GeoTIFFs)"
    )


def _header_size(path: Path) -> tuple[int, int] | None:
    """Return width and height in px by the first of Pillow's formats that takes the file; None if none does."""
    with path.open("rb") as stream:
        start = stream.read(16)
        for factory, accepts in list(Image.OPEN.values()):
            if accepts is not None and accepts(start) is not True:
                continue
            stream.seek(0)
            try:
                return factory(stream, str(path)).size
            except _DECODE_ERRORS:
                continue
    return None
