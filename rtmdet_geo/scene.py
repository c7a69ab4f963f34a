"""A scene as one model sees it: bands chosen, stretched to uint8, resampled, with a valid mask. No raster library here.

Order of work for a window: read the source pixels it needs, stretch them to uint8, then resample to the model's ground
sample distance. Every step depends on scene-wide numbers only, so a pixel is bit-identical whichever window asks.
"""

from __future__ import annotations

import copy
import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from rtmdet_geo.bands import Band, BandChoice, choose_bands
from rtmdet_geo.errors import NodataWarning, ResolutionError
from rtmdet_geo.georeference import check_resolution
from rtmdet_geo.resample import axis_taps, resample
from rtmdet_geo.scene_tags import acquisition_time, scene_stem, sensor_name
from rtmdet_geo.sentinel2 import radiometric_offset
from rtmdet_geo.stretch import (
    BandStretch,
    band_records,
    differs,
    fixed_stretch,
    percentile_stretch,
    spec_record,
    without_haze,
)
from rtmdet_geo.stretch_options import StoredStretch, StretchWish
from rtmdet_geo.structures import StretchSpec

logger = logging.getLogger(__name__)

#: Above this number of pixels, percentiles come from a decimated read of the whole scene.
PERCENTILE_MAX_PIXELS = 4_000_000
#: A scene whose ground sample distance is the model's but for this share is not resampled: no model tells them apart,
#: and grids in UTM miss theirs by up to 0.001.
SAME_GSD = 0.01


class SceneSource(Protocol):
    """What a scene needs of an open file; ``raster.py`` gives it with GDAL.

    Attributes:
        width, height: in px.
        crs: CRS object or None. transform: affine map from px to the CRS, identity without CRS.
        gsd_m: geodesic metres per px along x and y at the centre, or None.
        tags: the file's metadata.
    """

    width: int
    height: int
    crs: Any
    transform: Any
    gsd_m: tuple[float, float] | None
    tags: dict[str, str]

    def named_bands(self, sensor: str | None) -> list[Band]:
        """Return the bands with wavelength names."""
        ...

    def dtype(self, index: int) -> np.dtype[Any]:
        """Return the dtype of a band (1-based)."""
        ...

    def nodata(self, index: int) -> float | None:
        """Return the nodata value of a band."""
        ...

    def scale_offset(self, index: int) -> tuple[float, float]:
        """Return scale and offset tags of a band; 1 and 0 when it has none."""
        ...

    def check_values(self, indexes: Sequence[int]) -> None:
        """Raise RasterError for bands whose values cannot be stretched."""
        ...

    def mask_kind(self, indexes: Sequence[int]) -> str:
        """Return "none", "nodata", "alpha" or "mask"."""
        ...

    def read(
        self,
        indexes: Sequence[int],
        x: int,
        y: int,
        width: int,
        height: int,
        out_shape: tuple[int, int] | None,
        *,
        with_mask: bool,
    ) -> tuple[list[NDArray[Any]], NDArray[np.bool_] | None]:
        """Return one (h, w) array per band, and the file's own mask where asked for; safe to call from threads."""
        ...

    def close(self) -> None:
        """Close the file."""
        ...


class Scene:
    """An open scene, seen through the eyes of one model. Made by ``raster.open_scene``; a context manager.

    Attributes:
        path: as given; of several files, a name for them. files: the path, or those of a mosaic's parts.
        scene_id: file name without folder and suffix.
        source_width, source_height: size in source px.
        width, height: size in resampled px.
        scale_x, scale_y: source px per resampled px, exactly ``source_width / width``.
        crs: rasterio CRS, or None (then results are in source pixels).
        transform: affine map from source px (continuous, origin at the outer corner) to the CRS; identity without CRS.
        gsd_x_m, gsd_y_m: geodesic metres per source px at the centre along the pixel's x and y axis; None without CRS.
        band_indexes: 1-based band number per channel; None where a constant fills the channel.
        bands: the scene's bands with their names.
        stretch_record: what was used, ready for json (limits in DN per band, fills, percentiles, decimation).
        acquired_at: ISO 8601 text or None. sensor: text or None.
        mask_kind: "none", "nodata", "alpha" or "mask": what of the file says which pixels are valid (``nodata=`` and
            values that are not finite count besides).
    """

    def __init__(
        self,
        path: str | Path,
        source: SceneSource,
        *,
        bands: Sequence[int | str] | None,
        model_bands: Sequence[str],
        optional_bands: Mapping[str, int] | None,
        stretch: StretchSpec | StretchWish | StoredStretch,
        model_gsd_m: float | None,
        gsd_m: float | None,
        trained_gsd_m: tuple[float, float] | None,
        nodata: float | None,
    ) -> None:
        """Take over ``source``; ``raster.open_scene`` explains the arguments."""
        self.path = str(path)
        self.scene_id = scene_stem(path)
        self.files: tuple[str, ...] = (self.path,)
        self._source = source
        self.source_width, self.source_height = source.width, source.height
        self.acquired_at, self.sensor = acquisition_time(source.tags), sensor_name(source.tags)
        self.crs, self.transform = source.crs, source.transform
        self.gsd_x_m: float | None = source.gsd_m[0] if source.gsd_m is not None else None
        self.gsd_y_m: float | None = source.gsd_m[1] if source.gsd_m is not None else None
        self.bands = source.named_bands(self.sensor)
        choice = choose_bands(
            self.bands,
            model_bands,
            explicit=bands,
            optional_bands=optional_bands,
            where=f"scene {self.path!r}",
        )
        self.band_indexes = choice.indexes
        self._fills = [choice.fills.get(name) for name in model_bands]
        self._read_indexes = sorted({index for index in choice.indexes if index is not None})
        source.check_values(self._read_indexes)
        self._nodata = nodata
        self.mask_kind = source.mask_kind(self._read_indexes)
        self._set_size(model_gsd_m, gsd_m, trained_gsd_m)
        self._stretches, self.stretch_record = self._make_stretches(stretch, choice, model_bands)
        self._luts = {index: band.lut(source.dtype(index)) for index, band in self._stretches.items()}

    @property
    def is_georeferenced(self) -> bool:
        """Whether results can be given in world coordinates."""
        return self.crs is not None

    @property
    def mean_gsd_m(self) -> float | None:
        """Metres per pixel on the ground of the file, the geometric mean of both axes; None if it is not known."""
        if self.gsd_x_m is None or self.gsd_y_m is None:
            return None
        return math.sqrt(self.gsd_x_m * self.gsd_y_m)

    def read(self, x: int, y: int, width: int, height: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """Read a window, in resampled px; parts outside the scene are 0 and invalid.

        Args:
            x: left edge, may be negative.
            y: top edge, may be negative.
            width: in resampled px.
            height: in resampled px.

        Returns:
            pixels: (C, height, width) uint8, channels in the model's order, 0 where invalid.
            valid: (height, width) bool.

        Raises:
            RasterError: the file cannot be read there.
        """
        pixels = np.zeros((len(self.band_indexes), height, width), np.uint8)
        valid = np.zeros((height, width), np.bool_)
        left, right = max(x, 0), min(x + width, self.width)
        top, bottom = max(y, 0), min(y + height, self.height)
        if left >= right or top >= bottom:
            return pixels, valid
        window = self.source_window(left, top, right - left, bottom - top)
        bands, source_valid = self.read_source(*window)
        inside = (slice(top - y, bottom - y), slice(left - x, right - x))
        pixels[:, *inside], valid[inside] = self.from_source(
            np.stack(bands), source_valid, left, top, right - left, bottom - top, origin=window[:2]
        )
        return pixels, valid

    @property
    def block_shape(self) -> tuple[int, int] | None:
        """Height and width in source px of the blocks that the file is decoded by; None: nothing is decoded."""
        return getattr(self._source, "block_shape", None)  # an image in memory has none

    def source_window(self, x: int, y: int, width: int, height: int) -> tuple[int, int, int, int]:
        """Say which source pixels a window inside the scene, in resampled px, is made of.

        Returns:
            x, y, width, height in source px, inside the scene.
        """
        if not self._is_resampled:
            return x, y, width, height
        column, columns = _reach(axis_taps(self.source_width, self.width, x, x + width))
        row, rows = _reach(axis_taps(self.source_height, self.height, y, y + height))
        return column, row, columns, rows

    def read_source(self, x: int, y: int, width: int, height: int) -> tuple[list[NDArray[np.uint8]], NDArray[np.bool_]]:
        """Read a window inside the scene, in source px, and stretch it.

        Returns:
            bands: (height, width) uint8 of each band that is read, in the file's order; 0 where invalid. They may be
                the source's own memory, do not write to them.
            valid: (height, width) bool.

        Raises:
            RasterError: the file cannot be read there.
        """
        values, valid = self._read_values(x, y, width, height)
        bands = [
            self._stretches[index].apply(band, self._luts[index])
            for index, band in zip(self._read_indexes, values, strict=True)
        ]
        if not valid.all():
            bands = [np.where(valid, band, np.uint8(0)) for band in bands]
        return bands, valid

    def from_source(
        self,
        source: NDArray[np.uint8],
        source_valid: NDArray[np.bool_],
        x: int,
        y: int,
        width: int,
        height: int,
        *,
        origin: tuple[int, int],
    ) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """Make a window inside the scene, in resampled px, of the source pixels under it.

        Args:
            source: (B, h, w) the bands that :meth:`read_source` gave for the window's :meth:`source_window`.
            source_valid: (h, w) the same.
            x: left edge in resampled px.
            y: top edge.
            width: in resampled px.
            height: in resampled px.
            origin: x and y of ``source`` in source px.

        Returns:
            As :meth:`read`; without resampling and reordering these are ``source`` and ``source_valid`` themselves.
        """
        part, valid = source, source_valid
        if self._is_resampled:
            taps_x = axis_taps(self.source_width, self.width, x, x + width)
            taps_y = axis_taps(self.source_height, self.height, y, y + height)
            part, valid = resample(source, source_valid, taps_y, taps_x, origin[1], origin[0])
        if list(self.band_indexes) == self._read_indexes:
            return part, valid
        pixels = np.empty((len(self.band_indexes), height, width), np.uint8)
        order = {index: number for number, index in enumerate(self._read_indexes)}
        for channel, (index, fill) in enumerate(zip(self.band_indexes, self._fills, strict=True)):
            if index is not None:
                pixels[channel] = part[order[index]]
            else:
                np.multiply(valid, np.uint8(fill or 0), out=pixels[channel])
        return pixels, valid

    @property
    def _is_resampled(self) -> bool:
        return (self.width, self.height) != (self.source_width, self.source_height)

    def coarser(self, factor: float) -> Scene:
        """Return the same open scene in ``factor`` times fewer px each way; closing either closes both."""
        scene = copy.copy(self)
        scene.width, scene.height = max(1, round(self.width / factor)), max(1, round(self.height / factor))
        scene.scale_x, scene.scale_y = self.source_width / scene.width, self.source_height / scene.height
        return scene

    def to_source(self, boxes: NDArray[Any]) -> NDArray[np.float64]:
        """Boxes from resampled px to source px.

        Args:
            boxes: (N, 5) cx, cy, w, h in resampled px, angle in rad.

        Returns:
            (N, 5) float64, the same in source px, le90. Unequal scales keep the rectangle a rectangle as
            ``boxes.rescale_boxes`` says.
        """
        from rtmdet_geo.boxes import rescale_boxes

        values = np.asarray(boxes, np.float64).reshape(-1, 5)
        if self.scale_x == 1.0 and self.scale_y == 1.0:
            return values.copy()
        return np.asarray(rescale_boxes(values, self.scale_x, self.scale_y), np.float64)

    def close(self) -> None:
        """Close the file; reading afterwards is an error."""
        self._source.close()

    def __enter__(self) -> Self:
        """Return self."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file."""
        self.close()

    def _set_size(
        self, model_gsd_m: float | None, gsd_m: float | None, trained_gsd_m: tuple[float, float] | None
    ) -> None:
        """Set width, height and scales from the scene's and the model's ground sample distance."""
        self.width, self.height = self.source_width, self.source_height
        if gsd_m is not None and not (math.isfinite(gsd_m) and gsd_m > 0):
            raise ResolutionError(f"--gsd {gsd_m} is no ground sample distance; give metres per pixel above 0")
        gsd_x = gsd_m if gsd_m is not None else self.gsd_x_m
        gsd_y = gsd_m if gsd_m is not None else self.gsd_y_m
        if model_gsd_m is not None and gsd_x is not None and gsd_y is not None:
            check_resolution(f"scene {self.path!r}", gsd_x, gsd_y, model_gsd_m, trained_gsd_m)
            if abs(gsd_x / model_gsd_m - 1) > SAME_GSD:
                self.width = max(1, round(self.source_width * gsd_x / model_gsd_m))
            if abs(gsd_y / model_gsd_m - 1) > SAME_GSD:
                self.height = max(1, round(self.source_height * gsd_y / model_gsd_m))
        self.scale_x, self.scale_y = self.source_width / self.width, self.source_height / self.height

    def _read_values(
        self, x: int, y: int, width: int, height: int, out_shape: tuple[int, int] | None = None
    ) -> tuple[list[NDArray[Any]], NDArray[np.bool_]]:
        """Digital numbers of the bands read and the valid mask; nearest decimation when ``out_shape`` is given."""
        with_mask = self.mask_kind in ("alpha", "mask")
        values, mask = self._source.read(self._read_indexes, x, y, width, height, out_shape, with_mask=with_mask)
        valid = mask if mask is not None else np.ones(values[0].shape, np.bool_)
        if self._nodata is not None or self.mask_kind == "nodata":
            valid &= self._has_data(values)
        for band in values:
            if band.dtype.kind == "f":
                valid &= np.isfinite(band)
        return values, valid

    def _has_data(self, values: Sequence[NDArray[Any]]) -> NDArray[np.bool_]:
        """Where any of the bands differs from its nodata value (as GDAL's own dataset mask does)."""
        found = np.zeros(values[0].shape, np.bool_)
        for index, band in zip(self._read_indexes, values, strict=True):
            nodata = self._nodata if self._nodata is not None else self._source.nodata(index)
            if nodata is None:
                return np.ones(values[0].shape, np.bool_)
            found |= differs(band, nodata)
        return found

    def _make_stretches(
        self, wish: StretchSpec | StretchWish | StoredStretch, choice: BandChoice, model_bands: Sequence[str]
    ) -> tuple[dict[int, BandStretch], dict[str, Any]]:
        """One stretch per band read, and the record of all of it."""
        scales: dict[int, tuple[float, float]] = {}
        dtypes = {index: str(self._source.dtype(index)) for index in self._read_indexes}
        decimation, offset_from = 1, None
        if isinstance(wish, StoredStretch):
            channels = zip(model_bands, choice.indexes, strict=True)
            stretches, head = wish.limits(channels, dtypes, f"scene {self.path!r}"), wish.record()
        elif isinstance(wish, StretchWish):
            values: dict[int, NDArray[Any]] = {}
            if wish.needs_values:
                decimation, values = self._sampled(len(self._read_indexes) if wish.joint else 1)
            stretches, head = wish.limits(self._read_indexes, values), wish.record()
        elif wish.kind == "percentile":
            decimation, values = self._sampled()
            stretches, head = (
                {index: percentile_stretch(wish, band) for index, band in values.items()},
                spec_record(wish),
            )
        else:
            decimation, values = self._sampled() if wish.kind == "fixed" and wish.dark_percent is not None else (1, {})
            stretches, scales, offset_from = self._fixed_stretches(wish, values)
            head = spec_record(wish)
        entries = band_records(model_bands, choice.indexes, choice.fills, stretches, scales, dtypes)
        facts = {"decimation": decimation, "repeated": choice.repeated, "guessed": choice.guessed}
        return stretches, head | {"bands": entries, "offset_from": offset_from} | facts

    def _fixed_stretches(
        self, spec: StretchSpec, values: Mapping[int, NDArray[Any]]
    ) -> tuple[dict[int, BandStretch], dict[int, tuple[float, float]], str | None]:
        """Stretch, scale and offset by band, and what besides the band's own tags gave the offset."""
        stretches: dict[int, BandStretch] = {}
        scales: dict[int, tuple[float, float]] = {}
        offset_from = None
        for index in self._read_indexes:
            dtype = self._source.dtype(index)
            scale, offset = self._source.scale_offset(index)
            if (scale, offset) == (1.0, 0.0) and dtype.kind in "iu" and dtype.itemsize > 1:
                nodata = self._nodata if self._nodata is not None else self._source.nodata(index)
                if (found := radiometric_offset(self.path, self._source.tags, nodata)) is not None:
                    scale, offset, offset_from = spec.default_scale, found[0] * spec.default_scale, found[1]
            where = f"band {index} of scene {self.path!r}"
            stretches[index], scale, offset = fixed_stretch(spec, dtype, scale, offset, where)
            scales[index] = (scale, offset)
            if index in values:
                stretches[index] = without_haze(spec, stretches[index], scale, values[index])
        return stretches, scales, offset_from

    def _sampled(self, share: int = 1) -> tuple[int, dict[int, NDArray[Any]]]:
        """Decimation, and the valid values that it leaves; ``share`` bands are looked at together."""
        pixels = self.source_width * self.source_height * share
        decimation = max(1, math.ceil(math.sqrt(pixels / PERCENTILE_MAX_PIXELS)))
        return decimation, self._whole_scene(decimation)

    def _whole_scene(self, decimation: int) -> dict[int, NDArray[Any]]:
        """Valid digital numbers (n,) of each band read, over the whole scene, never over an area."""
        shape = None
        if decimation > 1:
            shape = (math.ceil(self.source_height / decimation), math.ceil(self.source_width / decimation))
            logger.info("%s: percentiles come from every %dth row and column of the scene", self.path, decimation)
        values, valid = self._read_values(0, 0, self.source_width, self.source_height, shape)
        if not valid.any():
            warnings.warn(f"scene {self.path!r} holds no valid pixel", NodataWarning, stacklevel=6)
        return {index: band[valid] for index, band in zip(self._read_indexes, values, strict=True)}


def _reach(taps: tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.int64]]) -> tuple[int, int]:
    """First source px and number of source px that the taps of one axis read."""
    first, weights, _ = taps
    start = int(first.min())
    return start, int(first.max()) + weights.shape[1] - start
