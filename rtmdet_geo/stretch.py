"""From scene values (digital numbers) to uint8, as the model's :class:`~rtmdet_geo.structures.StretchSpec` says."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtmdet_geo.errors import RasterError
from rtmdet_geo.jit import compiled
from rtmdet_geo.structures import StretchSpec


@dataclass(frozen=True, slots=True)
class BandStretch:
    """Linear stretch of one band: values ``low``..``high`` become 0..255; ``None`` limits pass 8-bit values."""

    low: float | None
    high: float | None

    def apply(self, values: NDArray[Any], lut: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
        """Stretch ``values`` (any shape, real dtype). NaN becomes 0. ``lut``: what :meth:`lut` gave for the dtype."""
        if self.low is None or self.high is None:
            return values.astype(np.uint8, copy=False)
        if lut is not None:
            index = values.view(np.uint16) if values.dtype == np.int16 else values
            found = np.empty(index.shape, np.uint8)
            _look_up(lut, np.ascontiguousarray(index).ravel(), found.ravel())
            return found
        scaled = (values.astype(np.float64) - self.low) * (255.0 / (self.high - self.low)) + 0.5
        with np.errstate(invalid="ignore"):
            scaled = np.where(np.isnan(scaled), 0.0, np.clip(scaled, 0.0, 255.0))
        return scaled.astype(np.uint8)

    def lut(self, dtype: np.dtype[Any]) -> NDArray[np.uint8] | None:
        """Table over all values of a uint8, uint16 or int16 band (int16 by its bit pattern); None for other dtypes."""
        if self.low is None or dtype not in (np.uint8, np.uint16, np.int16):
            return None
        size = 256 if dtype == np.uint8 else 65536
        every_value = np.arange(size, dtype=np.uint8 if size == 256 else np.uint16)
        return self.apply(every_value.view(dtype))


@compiled
def _look_up(lut: NDArray[np.uint8], values: NDArray[Any], found: NDArray[np.uint8]) -> None:
    """``found[...] = lut[values]`` of flat arrays; numpy's own makes 8-byte indexes of the values first."""
    for position in range(values.shape[0]):
        found[position] = lut[values[position]]


def fixed_stretch(
    spec: StretchSpec, dtype: np.dtype[Any], scale: float, offset: float, where: str
) -> tuple[BandStretch, float, float]:
    """Stretch of a band for ``kind`` "fixed" or "none".

    Args:
        spec: the model's stretch.
        dtype: dtype of the band.
        scale: the band's scale tag (1 when it has none).
        offset: the band's offset tag (0 when it has none).
        where: names the band in errors.

    Returns:
        The stretch, and the scale and offset that were used (physical = DN * scale + offset).

    Raises:
        RasterError: ``none`` with a band that is not 8-bit, or a scale of 0.
    """
    if dtype == np.uint8:
        return BandStretch(None, None), 1.0, 0.0
    if spec.kind == "none":
        raise RasterError(
            f"{where} is {dtype}, but 8-bit values are to be taken as they are; "
            "convert with gdal_translate -ot Byte -scale, or give a --stretch"
        )
    if scale == 1.0 and offset == 0.0 and dtype.kind in "iu":
        scale = spec.default_scale
    if scale == 0.0 or not np.isfinite([scale, offset]).all():
        raise RasterError(f"{where} has scale tag {scale} and offset tag {offset}; correct them with gdal_edit.py")
    low, high = (spec.low - offset) / scale, (spec.high - offset) / scale
    return BandStretch(low, high), scale, offset


def without_haze(spec: StretchSpec, stretch: BandStretch, scale: float, values: NDArray[Any]) -> BandStretch:
    """Move a fixed stretch up by the band's dark level (``StretchSpec.dark_percent``).

    Args:
        spec: the model's stretch.
        stretch: what :func:`fixed_stretch` gave.
        scale: the scale that it used.
        values: (n,) the band's valid, finite values over the whole scene; n may be 0: nothing moves.

    Returns:
        Limits ``dark + low / scale .. dark + high / scale`` in DN; ``dark .. dark + 255`` for 8-bit scenes.
    """
    if values.size == 0 or spec.dark_percent is None:
        return stretch
    (dark,) = _percentiles(values, spec.dark_percent)
    if stretch.low is None:
        return BandStretch(dark, dark + 255.0)
    return BandStretch(dark + spec.low / scale, dark + spec.high / scale)


def percentile_stretch(spec: StretchSpec, values: NDArray[Any]) -> BandStretch:
    """Stretch of a band for ``kind`` "percentile".

    Args:
        spec: the model's stretch.
        values: (n,) the band's valid, finite values over the whole scene; n may be 0.

    Returns:
        Limits in DN; a constant band maps to 0, a band without values too.
    """
    if values.size == 0:
        return BandStretch(0.0, 1.0)
    low, high = _percentiles(values, spec.low_percent, spec.high_percent)
    return BandStretch(low, high if high > low else low + 1.0)


def _percentiles(values: NDArray[Any], *percents: float) -> list[float]:
    """Percentiles of (n,) values, n > 0; counted where the dtype is small."""
    if values.dtype.kind in "iu" and values.dtype.itemsize <= 2:
        return [float(_counted_percentile(values, percent)) for percent in percents]
    return [float(level) for level in np.percentile(values.astype(np.float64), percents)]


def _counted_percentile(values: NDArray[Any], percent: float) -> float:
    """What np.percentile gives (linear interpolation between ranks), by counting: no sorting, no float copy."""
    lowest = int(np.iinfo(values.dtype).min)
    size = int(np.iinfo(values.dtype).max) - lowest + 1
    unsigned = values.view(f"u{values.dtype.itemsize}")
    counts = np.zeros(size, np.int64)
    for start in range(0, unsigned.size, 1 << 20):  # bincount works on int64 copies; keep them small
        counts += np.bincount(unsigned[start : start + (1 << 20)], minlength=size)
    counts = np.roll(counts, -lowest)
    cumulative = np.cumsum(counts)  # cumulative[i]: number of values <= lowest + i
    rank = percent / 100.0 * (values.size - 1)
    below = int(rank)
    first = int(np.searchsorted(cumulative, below, side="right")) + lowest
    second = int(np.searchsorted(cumulative, min(below + 1, values.size - 1), side="right")) + lowest
    return first + (second - first) * (rank - below)


def differs(values: NDArray[Any], nodata: float) -> NDArray[np.bool_]:
    """Where ``values`` (any shape, real dtype) are not ``nodata``.

    nodata is rounded to a float band's dtype; a value that an integer band cannot hold matches nothing.
    """
    if values.dtype.kind in "iu":
        limits = np.iinfo(values.dtype)
        if not math.isfinite(nodata) or nodata != int(nodata) or not limits.min <= nodata <= limits.max:
            return np.ones(values.shape, np.bool_)
    elif math.isnan(nodata):
        return np.asarray(~np.isnan(values))
    with np.errstate(over="ignore"):  # float32's lowest written with too few digits rounds to -inf
        return np.asarray(values != values.dtype.type(nodata))


def spec_record(spec: StretchSpec) -> dict[str, Any]:
    """Kind and parameters of a model's stretch, ready for json."""
    record: dict[str, Any] = {"kind": spec.kind}
    if spec.kind == "fixed":
        record |= {"low": spec.low, "high": spec.high, "dark_percent": spec.dark_percent}
    elif spec.kind == "percentile":
        record |= {"low_percent": spec.low_percent, "high_percent": spec.high_percent}
    return record


def band_records(
    model_bands: Sequence[str],
    indexes: Sequence[int | None],
    fills: Mapping[str, int],
    stretches: Mapping[int, BandStretch],
    scales: Mapping[int, tuple[float, float]],
    dtypes: Mapping[int, str],
) -> list[dict[str, Any]]:
    """What was done to each channel, ready for json.

    Args:
        model_bands: channel names.
        indexes: 1-based band number per channel, None where a constant fills it.
        fills: that constant, by channel name.
        stretches: limits by band number.
        scales: (scale, offset) used, by band number; empty where the limits are digital numbers from the start.
        dtypes: by band number.
    """
    entries: list[dict[str, Any]] = []
    for name, index in zip(model_bands, indexes, strict=True):
        if index is None:
            entries.append({"name": name, "band": None, "fill": fills[name]})
            continue
        limits = stretches[index]
        entry = {"name": name, "band": index, "dtype": dtypes[index], "low_dn": limits.low, "high_dn": limits.high}
        if index in scales and limits.low is not None:
            entry["scale"], entry["offset"] = scales[index]
        entries.append(entry)
    return entries
