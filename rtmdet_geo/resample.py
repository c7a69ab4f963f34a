"""Separable resampling whose result for a pixel never depends on the window that asks for it. numpy and numba only.

Resampled pixel ``i`` of an axis covers source ``[i * ratio, (i + 1) * ratio)`` with ``ratio = source_size / size``; its
centre is at source coordinate ``(i + 0.5) * ratio``. The kernel is a triangle of half-width ``max(1, ratio)`` source
pixels: bilinear interpolation when enlarging, an anti-aliasing (tent) filter when shrinking. Taps are computed from
the scene-wide index ``i`` in float64, so every window uses the same numbers in the same order.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtmdet_geo.jit import compiled


def axis_taps(
    source_size: int, size: int, start: int, stop: int
) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.int64]]:
    """Filter taps of the resampled pixels ``start..stop-1`` of one axis.

    Args:
        source_size: length of the axis in source px.
        size: length of the axis in resampled px.
        start: first resampled px wanted, 0 <= start < stop.
        stop: one past the last, stop <= size.

    Returns:
        first: (n,) int64, the first source px that each pixel reads; ``first + k <= source_size``.
        weights: (n, k) float32, weights that sum to 1; taps beyond the scene's edge are left out and the rest
            renormalised (for bilinear this equals repeating the edge pixel).
        nearest: (n,) int64, the source px whose area holds the resampled px's centre.
    """
    ratio = source_size / size
    radius = max(1.0, ratio)
    num_taps = min(math.ceil(2.0 * radius), source_size)
    centre = (np.arange(start, stop, dtype=np.float64) + 0.5) * ratio
    first = np.floor(centre - 0.5 - radius).astype(np.int64) + 1
    first = np.clip(first, 0, source_size - num_taps)
    position = first[:, None] + np.arange(num_taps, dtype=np.int64)[None, :]  # (n, k)
    weights = np.maximum(0.0, 1.0 - np.abs(centre[:, None] - (position + 0.5)) / radius)
    weights /= weights.sum(axis=1, keepdims=True)
    nearest = np.clip(np.floor(centre).astype(np.int64), 0, source_size - 1)
    return first, weights.astype(np.float32), nearest


@compiled
def _rows(source: Any, first: Any, weights: Any, out: Any) -> None:
    """Filter along x: source (C, h, w) uint8, first (n,), weights (n, k), out (C, h, n) float32."""
    channels, height, _ = source.shape
    num, taps = weights.shape
    for channel in range(channels):
        for row in range(height):
            for column in range(num):
                begin = first[column]
                total = np.float32(0.0)
                for tap in range(taps):
                    total += weights[column, tap] * np.float32(source[channel, row, begin + tap])
                out[channel, row, column] = total


@compiled
def _columns(rows: Any, first: Any, weights: Any, out: Any) -> None:
    """Filter along y: rows (C, h, n) float32, first (m,), weights (m, k), out (C, m, n) float32."""
    channels, _, width = rows.shape
    num, taps = weights.shape
    for channel in range(channels):
        for row in range(num):
            begin = first[row]
            for column in range(width):
                out[channel, row, column] = np.float32(0.0)
            for tap in range(taps):
                weight = weights[row, tap]
                for column in range(width):
                    out[channel, row, column] += weight * rows[channel, begin + tap, column]


def _filter(
    source: NDArray[np.uint8],
    first_y: NDArray[np.int64],
    weights_y: NDArray[np.float32],
    first_x: NDArray[np.int64],
    weights_x: NDArray[np.float32],
) -> NDArray[np.float32]:
    channels, height, _ = source.shape
    rows = np.empty((channels, height, len(first_x)), np.float32)
    _rows(source, first_x, weights_x, rows)
    out = np.empty((channels, len(first_y), len(first_x)), np.float32)
    _columns(rows, first_y, weights_y, out)
    return out


def resample(
    source: NDArray[np.uint8],
    valid: NDArray[np.bool_],
    taps_y: tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.int64]],
    taps_x: tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.int64]],
    row_offset: int,
    column_offset: int,
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Resample one window.

    A resampled pixel is valid when its nearest source pixel is; invalid source pixels take no part in the weighted
    mean of a valid one (weights are renormalised), and invalid resampled pixels are 0.

    Args:
        source: (C, h, w) uint8, the source window; 0 where invalid.
        valid: (h, w) bool.
        taps_y: what :func:`axis_taps` gave for the rows, in scene coordinates.
        taps_x: the same for the columns.
        row_offset: scene row of the window's first row.
        column_offset: scene column of the window's first column.

    Returns:
        (C, m, n) uint8 and (m, n) bool.
    """
    first_y, weights_y, nearest_y = taps_y
    first_x, weights_x, nearest_x = taps_x
    first_y, nearest_y = first_y - row_offset, nearest_y - row_offset
    first_x, nearest_x = first_x - column_offset, nearest_x - column_offset
    values = _filter(np.ascontiguousarray(source), first_y, weights_y, first_x, weights_x)
    if valid.all():
        return _to_uint8(values), np.ones(values.shape[1:], np.bool_)
    # Two planes: share of the weight that is valid, and whether any tap is invalid. Pixels without an invalid tap keep
    # the plain sum, so a window with nodata elsewhere gives the same digits as one without.
    planes = np.stack([valid, ~valid]).astype(np.uint8)
    share, lost = _filter(planes, first_y, weights_y, first_x, weights_x)
    resampled_valid = valid[np.ix_(nearest_y, nearest_x)]
    divisor = np.where((lost > 0) & (share > 0), share, np.float32(1.0))
    values /= divisor[None]
    pixels = _to_uint8(values)
    pixels[:, ~resampled_valid] = 0
    return pixels, resampled_valid


def _to_uint8(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Round half up; the values are weighted means of uint8, so they lie in 0..255 but for rounding."""
    values += np.float32(0.5)
    np.minimum(values, np.float32(255.0), out=values)
    return values.astype(np.uint8)
