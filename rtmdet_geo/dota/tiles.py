"""Pixels of patches: an image resized by each rate, cut by its windows, filled up where they reach beyond it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from rtmdet_geo.dota.rules import SplitRules, Window, resized_shape


def cut_pixels(
    image: NDArray[np.uint8], windows: Sequence[Window], rules: SplitRules
) -> Iterator[tuple[Window, NDArray[np.uint8]]]:
    """Yield each window with its pixels; beside the image one resized copy is in memory at a time.

    Args:
        image: (H, W, 3) uint8 red, green, blue, or (H, W), which is shown grey.
        windows: what ``rules`` gave for it.
        rules: the tool's.

    Yields:
        (size, size, 3) uint8 each, or what the image has of it where ``rules.pad`` is False.
    """
    resized, rate = image, 1.0
    for window in windows:
        if window.rate != rate:
            del resized
            rate = window.rate
            resized = image if rate == 1 else _resize(image, rate)
        part = resized[window.y : window.y + window.size, window.x : window.x + window.size]
        if part.ndim == 2:
            part = np.repeat(part[..., None], 3, axis=2)
        if rules.pad and part.shape[:2] != (window.size, window.size):
            full = np.empty((window.size, window.size, 3), np.uint8)
            full[:] = rules.pad_colour
            full[: part.shape[0], : part.shape[1]] = part
            part = full
        yield window, part


def _resize(image: NDArray[np.uint8], rate: float) -> NDArray[np.uint8]:
    """Resize as the devkit does: cubic, by the rate itself and not by the ratio of the rounded sides."""
    height, width = image.shape[:2]
    size = None if min(width, height) * rate > 0.5 else resized_shape(width, height, rate)
    return np.asarray(cv2.resize(image, size, fx=rate, fy=rate, interpolation=cv2.INTER_CUBIC), np.uint8)
