"""Overlap of instance masks. numpy only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rtmdet_geo.masks import CroppedMask


def mask_iou(first: Sequence[CroppedMask], second: Sequence[CroppedMask]) -> NDArray[np.float64]:
    """IoU matrix of masks, counted in pixels; time and memory follow the masks' windows, not the image.

    Args:
        first: N masks.
        second: M masks of the same frame.

    Returns:
        (N, M) float64 in [0, 1]; 0 where both masks are empty.
    """
    result = np.zeros((len(first), len(second)))
    if not len(first) or not len(second):
        return result
    areas1, areas2 = (np.array([np.count_nonzero(item.mask) for item in masks], float) for masks in (first, second))
    low1, high1 = _corners(first)
    low2, high2 = _corners(second)
    low = np.maximum(low1[:, None], low2[None])  # (N, M, 2) x, y of the common window
    high = np.minimum(high1[:, None], high2[None])
    for i, j in np.argwhere((high > low).all(axis=2)):
        (x0, y0), (x1, y1) = low[i, j], high[i, j]
        one, other = (item.mask[y0 - item.y : y1 - item.y, x0 - item.x : x1 - item.x] for item in (first[i], second[j]))
        common = np.count_nonzero((one != 0) & (other != 0))
        if common:
            result[i, j] = common / (areas1[i] + areas2[j] - common)
    return result


def _corners(masks: Sequence[CroppedMask]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return x, y of each mask's first pixel, and of the first beyond its window; (N, 2) each."""
    low = np.array([(item.x, item.y) for item in masks], np.int64).reshape(-1, 2)
    sizes = np.array([(item.mask.shape[1], item.mask.shape[0]) for item in masks], np.int64).reshape(-1, 2)
    return low, low + sizes
