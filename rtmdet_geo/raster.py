"""The only reader of scenes: any GDAL raster in, uint8 windows with a valid mask out.

Order of work for a window: read the source pixels it needs, stretch them to uint8, then resample to the model's ground
sample distance. Every step depends on scene-wide numbers only, so a pixel is bit-identical whichever window asks.
"""

from __future__ import annotations

import logging
import math
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import rasterio
from affine import Affine
from numpy.typing import NDArray
from rasterio._err import CPLE_BaseError
from rasterio.enums import MaskFlags, Resampling
from rasterio.errors import NotGeoreferencedWarning as RasterioNotGeoreferencedWarning
from rasterio.errors import RasterioError
from rasterio.vrt import WarpedVRT
from rasterio.windows import Window

from rtmdet_geo.bands import Band, BandChoice, choose_bands, name_bands, sensor_family
from rtmdet_geo.errors import (
    NodataWarning,
    NotGeoreferencedWarning,
    RasterError,
    ResolutionError,
)
from rtmdet_geo.georeference import check_resolution, ground_sample_distance
from rtmdet_geo.resample import axis_taps, resample
from rtmdet_geo.scene_tags import acquisition_time, sensor_name
from rtmdet_geo.stretch import BandStretch, fixed_stretch, percentile_stretch, stretch_record
from rtmdet_geo.structures import StretchSpec

logger = logging.getLogger(__name__)

#: Above this number of pixels, percentiles come from a decimated read of the whole scene.
PERCENTILE_MAX_PIXELS = 16_000_000
#: Rational polynomials give longitude and latitude on WGS 84 (NITF STDI-0002, RPC00B).
_RPC_CRS = "EPSG:4326"


class Scene:
    """An open scene, seen through the eyes of one model. Made by :func:`open_scene`; a context manager.

    Attributes:
        path: as given.
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
        source: _Source,
        *,
        bands: Sequence[int | str] | None,
        model_bands: Sequence[str],
        optional_bands: Mapping[str, int] | None,
        stretch: StretchSpec,
        model_gsd_m: float | None,
        gsd_m: float | None,
        nodata: float | None,
    ) -> None:
        """Take over ``source``; :func:`open_scene` explains the arguments."""
        self.path = str(path)
        self.scene_id = scene_stem(path)
        self._source = source
        self._dataset = dataset = source.dataset
        self._lock = threading.Lock()
        self.source_width, self.source_height = int(dataset.width), int(dataset.height)
        self.acquired_at, self.sensor = acquisition_time(source.tags), sensor_name(source.tags)
        self.crs, self.transform, gsd = source.georeference()
        self.gsd_x_m, self.gsd_y_m = gsd if gsd is not None else (None, None)
        self.bands = source.named_bands(self.sensor, self.scene_id)
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
        self._set_size(model_gsd_m, gsd_m)
        self._stretches, self.stretch_record = self._make_stretches(stretch, choice, model_bands)
        self._luts = {
            index: band.lut(np.dtype(dataset.dtypes[index - 1])) for index, band in self._stretches.items()
        }

    @property
    def is_georeferenced(self) -> bool:
        """Whether results can be given in world coordinates."""
        return self.crs is not None

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
        inside = (slice(top - y, bottom - y), slice(left - x, right - x))
        if (self.width, self.height) == (self.source_width, self.source_height):
            part, part_valid = self._read_source(Window(left, top, right - left, bottom - top))
        else:
            taps_x = axis_taps(self.source_width, self.width, left, right)
            taps_y = axis_taps(self.source_height, self.height, top, bottom)
            column, row = int(taps_x[0].min()), int(taps_y[0].min())
            columns = int(taps_x[0].max()) + taps_x[1].shape[1] - column
            rows = int(taps_y[0].max()) + taps_y[1].shape[1] - row
            source, source_valid = self._read_source(Window(column, row, columns, rows))
            part, part_valid = resample(source, source_valid, taps_y, taps_x, row, column)
        order = {index: number for number, index in enumerate(self._read_indexes)}
        for channel, (index, fill) in enumerate(zip(self.band_indexes, self._fills, strict=True)):
            if index is not None:
                pixels[channel][inside] = part[order[index]]
            else:
                pixels[channel][inside] = np.where(part_valid, np.uint8(fill or 0), np.uint8(0))
        valid[inside] = part_valid
        return pixels, valid

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

    def _set_size(self, model_gsd_m: float | None, gsd_m: float | None) -> None:
        """Set width, height and scales from the scene's and the model's ground sample distance."""
        self.width, self.height = self.source_width, self.source_height
        if gsd_m is not None and not (math.isfinite(gsd_m) and gsd_m > 0):
            raise ResolutionError(f"--gsd {gsd_m} is no ground sample distance; give metres per pixel above 0")
        gsd_x = gsd_m if gsd_m is not None else self.gsd_x_m
        gsd_y = gsd_m if gsd_m is not None else self.gsd_y_m
        if model_gsd_m is not None and gsd_x is not None and gsd_y is not None:
            check_resolution(f"scene {self.path!r}", gsd_x, gsd_y, model_gsd_m)
            self.width = max(1, round(self.source_width * gsd_x / model_gsd_m))
            self.height = max(1, round(self.source_height * gsd_y / model_gsd_m))
        self.scale_x, self.scale_y = self.source_width / self.width, self.source_height / self.height

    def _read_source(self, window: Window) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """Stretched source pixels (B, h, w) uint8 of the bands read, and their validity (h, w)."""
        values, valid = self._read_values(self._read_indexes, window)
        pixels = np.empty((len(values), *valid.shape), np.uint8)
        for number, (index, band) in enumerate(zip(self._read_indexes, values, strict=True)):
            pixels[number] = self._stretches[index].apply(band, self._luts[index])
        if not valid.all():
            pixels[:, ~valid] = 0
        return pixels, valid

    def _read_values(
        self, indexes: Sequence[int], window: Window, out_shape: tuple[int, int] | None = None
    ) -> tuple[list[NDArray[Any]], NDArray[np.bool_]]:
        """Digital numbers of ``indexes`` and the valid mask; nearest decimation when ``out_shape`` is given."""
        options: dict[str, Any] = {"window": window}
        if out_shape is not None:
            options |= {"out_shape": out_shape, "resampling": Resampling.nearest}
        where = f"{self.path!r}, window x={window.col_off} y={window.row_off} {window.width}x{window.height}"
        with self._lock, _reading(where):
            dtypes = {self._dataset.dtypes[index - 1] for index in indexes}
            if len(dtypes) == 1 and out_shape is None:
                values = list(self._dataset.read(list(indexes), **options))
            else:
                values = [self._dataset.read(index, **options) for index in indexes]
            mask = self._dataset.read_masks(1, **options) if self.mask_kind in ("alpha", "mask") else None
        valid = mask != 0 if mask is not None else np.ones(values[0].shape, np.bool_)
        valid &= self._has_data(indexes, values)
        for band in values:
            if band.dtype.kind == "f":
                valid &= np.isfinite(band)
        return values, valid

    def _has_data(self, indexes: Sequence[int], values: Sequence[NDArray[Any]]) -> NDArray[np.bool_]:
        """Where any of the bands differs from its nodata value (as GDAL's own dataset mask does)."""
        found: NDArray[np.bool_] = np.zeros(values[0].shape, np.bool_)
        for index, band in zip(indexes, values, strict=True):
            nodata = self._nodata
            if nodata is None and self.mask_kind == "nodata":
                nodata = self._dataset.nodatavals[index - 1]
            if nodata is None:
                return np.ones(values[0].shape, np.bool_)
            found |= _differs(band, nodata)
        return found

    def _make_stretches(
        self, spec: StretchSpec, choice: BandChoice, model_bands: Sequence[str]
    ) -> tuple[dict[int, BandStretch], dict[str, Any]]:
        """One stretch per band read, and the record of all of it."""
        stretches: dict[int, BandStretch] = {}
        scales: dict[int, tuple[float, float]] = {}
        dtypes = {index: str(self._dataset.dtypes[index - 1]) for index in self._read_indexes}
        decimation = 1
        if spec.kind == "percentile":
            decimation = max(1, math.ceil(math.sqrt(self.source_width * self.source_height / PERCENTILE_MAX_PIXELS)))
            stretches = self._percentiles(spec, decimation)
        else:
            for index in self._read_indexes:
                stretches[index], scale, offset = fixed_stretch(
                    spec,
                    np.dtype(dtypes[index]),
                    *self._source.scale_offset(index),
                    f"band {index} of scene {self.path!r}",
                )
                scales[index] = (scale, offset)
        record = stretch_record(spec, model_bands, choice.indexes, choice.fills, stretches, scales, dtypes)
        return stretches, record | {"decimation": decimation, "repeated": choice.repeated, "guessed": choice.guessed}

    def _percentiles(self, spec: StretchSpec, decimation: int) -> dict[int, BandStretch]:
        """Limits of each band over the whole valid scene, never over an area."""
        whole = Window(0, 0, self.source_width, self.source_height)
        shape = None
        if decimation > 1:
            shape = (math.ceil(self.source_height / decimation), math.ceil(self.source_width / decimation))
            logger.info("%s: percentiles come from every %dth pixel of the whole scene", self.path, decimation)
        values, valid = self._read_values(self._read_indexes, whole, shape)
        if not valid.any():
            warnings.warn(f"scene {self.path!r} holds no valid pixel", NodataWarning, stacklevel=5)
        return {
            index: percentile_stretch(spec, band[valid])
            for index, band in zip(self._read_indexes, values, strict=True)
        }


def open_scene(
    path: str | Path,
    *,
    bands: Sequence[int | str] | None = None,
    model_bands: Sequence[str] = ("red", "green", "blue"),
    optional_bands: Mapping[str, int] | None = None,
    stretch: StretchSpec | None = None,
    model_gsd_m: float | None = None,
    gsd_m: float | None = None,
    nodata: float | None = None,
) -> Scene:
    """Open a scene for one model.

    Scenes that carry only ground control points or rational polynomials are warped on the fly.

    Args:
        path: file, folder, URL or GDAL virtual path (``/vsizip/...``, ``/vsicurl/...``).
        bands: ``--bidx``, band numbers or names in the model's channel order; None chooses by name.
        model_bands: the model's channels (``ModelSpec.bands``).
        optional_bands: uint8 value of channels that a scene may lack (``ModelSpec.optional_bands``).
        stretch: values to uint8 (``ModelSpec.stretch``); None is the default StretchSpec.
        model_gsd_m: metres per pixel the model expects; None: no resampling.
        gsd_m: ``--gsd``, the user's statement of the scene's metres per pixel, over what the file says.
        nodata: ``--nodata``, over what the file says.

    Raises:
        RasterError: missing, no raster, no bands, complex values, palette, unreadable.
        BandError: the scene lacks a band, or has it twice.
        ResolutionError: ground sample distance outside 0.1-10x the model's.
    """
    source = _open_source(path)
    try:
        with _reading(f"{str(path)!r}"):
            scene = Scene(
                path,
                source,
                bands=bands,
                model_bands=model_bands,
                optional_bands=optional_bands,
                stretch=stretch or StretchSpec(),
                model_gsd_m=model_gsd_m,
                gsd_m=gsd_m,
                nodata=nodata,
            )
    except BaseException:
        source.close()
        raise
    if not scene.is_georeferenced:
        warnings.warn(
            f"scene {scene.path!r} has no CRS; results are in pixel coordinates, without metres or azimuths",
            NotGeoreferencedWarning,
            stacklevel=2,
        )
    return scene


def describe_scene(path: str | Path) -> dict[str, Any]:
    """Facts about a scene for ``rtmdet-geo info``, ready for json; no model is involved.

    Returns:
        ``path``, ``driver``, ``width``, ``height`` (px), ``bands`` (list of number, name, description, dtype, colour,
        scale, offset, nodata), ``crs`` (text or None), ``transform`` (six numbers), ``bounds`` (left, bottom, right, top
        in the CRS, or None), ``gsd_x_m``, ``gsd_y_m``, ``valid_mask`` (kind), ``warped_from`` (None, "gcps" or "rpcs"),
        ``acquired_at``, ``sensor``.

    Raises:
        RasterError: as :func:`open_scene`.
    """
    source = _open_source(path)
    with _reading(f"{str(path)!r}"), source:
        dataset = source.dataset
        crs, transform, gsd = source.georeference()
        sensor = sensor_name(source.tags)
        bands = source.named_bands(sensor, scene_stem(path))
        corners = [transform * corner for corner in ((0, 0), (dataset.width, 0), (0, dataset.height))]
        corners.append(transform * (dataset.width, dataset.height))
        xs, ys = zip(*corners, strict=True)
        return {
            "path": str(path),
            "driver": source.original.driver,
            "width": int(dataset.width),
            "height": int(dataset.height),
            "bands": [
                {
                    "number": band.index,
                    "name": "alpha" if band.is_alpha else band.name,
                    "description": band.description or None,
                    "dtype": str(dataset.dtypes[band.index - 1]),
                    "colour": band.colour,
                    "scale": source.scale_offset(band.index)[0],
                    "offset": source.scale_offset(band.index)[1],
                    "nodata": dataset.nodatavals[band.index - 1],
                }
                for band in bands
            ],
            "crs": crs.to_string() if crs is not None else None,
            "transform": [float(value) for value in transform[:6]],
            "bounds": [min(xs), min(ys), max(xs), max(ys)] if crs is not None else None,
            "gsd_x_m": gsd[0] if gsd is not None else None,
            "gsd_y_m": gsd[1] if gsd is not None else None,
            "valid_mask": source.mask_kind([band.index for band in bands if not band.is_alpha] or [1]),
            "warped_from": source.warped_from,
            "acquired_at": acquisition_time(source.tags),
            "sensor": sensor,
        }


def scene_stem(path: str | Path) -> str:
    """File name without folder, URL query and suffix: ``/vsicurl/https://host/a.b.tif?sig=1`` gives ``a.b``."""
    text = str(path)
    if "://" in text:
        text = text.split("?", 1)[0]
    return Path(text.rstrip("/")).stem


class _Source:
    """An open dataset, warped to a plain geotransform where only control points or rational polynomials place it."""

    def __init__(self, path: str, original: Any) -> None:
        self.path = path
        self.original = original
        self.dataset = original
        self.warped_from: str | None = None
        self.tags: dict[str, str] = {}
        if original.count == 0:
            parts = original.subdatasets
            hint = f"; it holds {len(parts)} subdatasets, open one, such as {parts[0]!r}" if parts else ""
            raise RasterError(f"scene {path!r} has no bands{hint}")
        for namespace in (None, "IMAGERY", "IMAGE_STRUCTURE"):
            self.tags |= original.tags(ns=namespace) if namespace else original.tags()
        self._warp()

    def _warp(self) -> None:
        points, points_crs = self.original.gcps
        if not self.original.transform.is_identity:
            return
        if points and points_crs is not None:
            self.warped_from, method, crs = "gcps", "GCP_POLYNOMIAL", points_crs
        elif self.original.rpcs is not None:
            self.warped_from, method, crs = "rpcs", "RPC", rasterio.crs.CRS.from_string(_RPC_CRS)
        else:
            return
        has_mask = any(value is not None for value in self.original.nodatavals) or any(
            colour.name == "alpha" for colour in self.original.colorinterp
        )
        self.dataset = WarpedVRT(
            self.original,
            src_crs=crs,
            crs=crs,
            resampling=Resampling.bilinear,
            add_alpha=not has_mask,
            SRC_METHOD=method,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the warped view, then the file."""
        if self.dataset is not self.original:
            self.dataset.close()
        self.original.close()

    def georeference(self) -> tuple[Any, Affine, tuple[float, float] | None]:
        """CRS, transform and ground sample distance; None, identity and None when the scene has no usable CRS."""
        crs, transform = self.dataset.crs, self.dataset.transform
        if not crs or transform.is_identity or transform.is_degenerate:
            return None, Affine.identity(), None
        gsd = ground_sample_distance(crs.to_wkt(), transform, self.dataset.width, self.dataset.height)
        if gsd is None:
            logger.warning("%s: its CRS leads to no longitude and latitude at the scene's centre; not used", self.path)
            return None, Affine.identity(), None
        return crs, transform, gsd

    def named_bands(self, sensor: str | None, scene_id: str) -> list[Band]:
        """The dataset's bands with wavelength names."""
        number = self.dataset.count
        descriptions = (*self.original.descriptions, None)[:number]  # a warped view may add an alpha band
        colours = (*(colour.name for colour in self.original.colorinterp), "alpha")[:number]
        return name_bands(descriptions, colours, sensor_family(sensor, scene_id))

    def scale_offset(self, index: int) -> tuple[float, float]:
        """Scale and offset tags of a band; 1 and 0 when it has none."""
        if index > self.original.count:
            return 1.0, 0.0
        return float(self.original.scales[index - 1]), float(self.original.offsets[index - 1])

    def check_values(self, indexes: Sequence[int]) -> None:
        """Refuse what cannot be stretched: complex values and colour tables."""
        for index in indexes:
            dtype = str(self.dataset.dtypes[index - 1])
            if dtype.startswith("complex"):
                raise RasterError(
                    f"band {index} of scene {self.path!r} is {dtype}; write its amplitude with "
                    "gdal_calc.py --calc='abs(A)' and detect on that"
                )
            if index <= self.original.count and self.original.colorinterp[index - 1].name == "palette":
                raise RasterError(
                    f"band {index} of scene {self.path!r} is a colour table; expand it with gdal_translate -expand rgb"
                )

    def mask_kind(self, indexes: Sequence[int]) -> str:
        """What says which pixels are valid."""
        flags = {flag for index in indexes for flag in self.dataset.mask_flag_enums[index - 1]}
        if MaskFlags.alpha in flags:
            return "alpha"
        if MaskFlags.per_dataset in flags:
            return "mask"
        return "nodata" if MaskFlags.nodata in flags else "none"


def _open_source(path: str | Path) -> _Source:
    text = str(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RasterioNotGeoreferencedWarning)
            dataset = rasterio.open(path)
    except (RasterioError, OSError, ValueError, TypeError) as error:
        if not _is_virtual(text) and not Path(text).exists():
            raise RasterError(f"scene {text!r} does not exist; check the path") from error
        raise RasterError(f"scene {text!r} cannot be opened as a raster: {_one_line(error)}") from error
    try:
        with _reading(f"{text!r}"):
            return _Source(text, dataset)
    except BaseException:
        dataset.close()
        raise


@contextmanager
def _reading(where: str) -> Iterator[None]:
    """Turn rasterio's and GDAL's errors into one line that names the file; quiet rasterio's own CRS warning."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RasterioNotGeoreferencedWarning)
            yield
    except (RasterioError, CPLE_BaseError) as error:
        raise RasterError(
            f"scene {where} cannot be read: {_one_line(error)}; the file may be truncated, copy it again"
        ) from error


def _differs(values: NDArray[Any], nodata: float) -> NDArray[np.bool_]:
    """Where ``values`` are not ``nodata``; nodata is rounded to a float band's dtype, and matches no integer it is not."""
    if math.isnan(nodata):
        return ~np.isnan(values) if values.dtype.kind == "f" else np.ones(values.shape, np.bool_)
    if values.dtype.kind in "iu":
        limits = np.iinfo(values.dtype)
        if nodata != int(nodata) or not limits.min <= nodata <= limits.max:
            return np.ones(values.shape, np.bool_)
    different: NDArray[np.bool_] = values != values.dtype.type(nodata)
    return different


def _is_virtual(text: str) -> bool:
    """Whether GDAL, not the file system, resolves the path."""
    return text.startswith("/vsi") or ":" in text[2:] or text.lstrip().startswith(("<", "{"))


def _one_line(error: BaseException) -> str:
    """Message of an error on one line; rasterio keeps GDAL's reason in ``__cause__``."""
    texts = [str(error)]
    if error.__cause__ is not None and str(error.__cause__) not in texts[0]:
        texts.append(str(error.__cause__))
    return " ".join(" ".join(texts).split()) or type(error).__name__
