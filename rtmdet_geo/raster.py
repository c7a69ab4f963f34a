"""The only reader of scenes: any GDAL raster in, :class:`~rtmdet_geo.scene.Scene` out."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import rasterio
import rasterio.env
from affine import Affine
from numpy.typing import NDArray
from rasterio._err import CPLE_BaseError
from rasterio.enums import MaskFlags, Resampling
from rasterio.errors import NotGeoreferencedWarning as RasterioNotGeoreferencedWarning
from rasterio.errors import RasterioError
from rasterio.vrt import WarpedVRT
from rasterio.windows import Window

from rtmdet_geo.bands import Band, name_bands, sensor_family
from rtmdet_geo.errors import NotGeoreferencedWarning, RasterError
from rtmdet_geo.gdal_options import FILE_REMEDY, SERVER_REMEDY, gdal_options, is_remote, is_virtual, one_line, retries
from rtmdet_geo.georeference import ground_sample_distance
from rtmdet_geo.mosaic import Part, PartBand, mosaic_vrt, rasters_in
from rtmdet_geo.scene import Scene
from rtmdet_geo.scene_tags import acquisition_time, scene_stem, sensor_name
from rtmdet_geo.stretch_options import StoredStretch, StretchWish
from rtmdet_geo.structures import StretchSpec

__all__ = ["Scene", "describe_scene", "open_scene", "scene_stem"]

logger = logging.getLogger(__name__)

#: Rational polynomials give longitude and latitude on WGS 84 (NITF STDI-0002, RPC00B).
_RPC_CRS = "EPSG:4326"


def open_scene(
    path: str | Path | Sequence[str | Path],
    *,
    bands: Sequence[int | str] | None = None,
    model_bands: Sequence[str] = ("red", "green", "blue"),
    optional_bands: Mapping[str, int] | None = None,
    stretch: StretchSpec | StretchWish | StoredStretch | None = None,
    model_gsd_m: float | None = None,
    gsd_m: float | None = None,
    trained_gsd_m: tuple[float, float] | None = None,
    nodata: float | None = None,
) -> Scene:
    """Open a scene for one model.

    Scenes that carry only ground control points or rational polynomials are warped on the fly.

    Args:
        path: file, folder, URL or GDAL virtual path (``/vsizip/...``, ``/vsicurl/...``). Several, or a folder that is
            no dataset of GDAL's own, are one mosaic (:mod:`rtmdet_geo.mosaic`); of a folder, its rasters by name.
        bands: ``--bidx``, band numbers or names in the model's channel order; None chooses by name.
        model_bands: the model's channels (``ModelSpec.bands``).
        optional_bands: uint8 value of channels that a scene may lack (``ModelSpec.optional_bands``).
        stretch: values to uint8, the model's (``ModelSpec.stretch``) or one of :mod:`rtmdet_geo.stretch_options`; None
            is the default StretchSpec.
        model_gsd_m: metres per pixel the model expects; None: no resampling.
        gsd_m: ``--gsd``, the user's statement of the scene's metres per pixel, over what the file says.
        trained_gsd_m: lowest and highest metres per pixel of the model's training scenes (``ModelSpec.trained_gsd_m``);
            within them no resolution is warned of.
        nodata: ``--nodata``, over what the file says.

    Raises:
        RasterError: missing, no raster, no bands, complex values, palette, unreadable.
        BandError: the scene lacks a band, or has it twice.
        ResolutionError: ground sample distance outside 0.1-10x the model's.
    """
    source = _open_source(path)
    try:
        with source.environment():
            scene = Scene(
                source.path,
                source,
                bands=bands,
                model_bands=model_bands,
                optional_bands=optional_bands,
                stretch=stretch or StretchSpec(),
                model_gsd_m=model_gsd_m,
                gsd_m=gsd_m,
                trained_gsd_m=trained_gsd_m,
                nodata=nodata,
            )
    except BaseException:
        source.close()
        raise
    scene.files = source.files
    if source.files != (source.path,) and Path(source.path).is_dir():
        scene.scene_id = Path(source.path).resolve().name
    if not scene.is_georeferenced:
        assumed = ""
        if gsd_m is None and model_gsd_m is not None:
            assumed = f"; its pixels are taken for {model_gsd_m:g} m, the model's (--gsd says otherwise)"
        warnings.warn(
            f"scene {scene.path!r} has no CRS; results are in pixels, without metres and azimuths{assumed}",
            NotGeoreferencedWarning,
            stacklevel=2,
        )
    return scene


def describe_scene(path: str | Path) -> dict[str, Any]:
    """Facts about a scene for ``rtmdet-geo info``, ready for json; no model is involved.

    Returns:
        ``path``, ``driver``, ``width``, ``height`` (px), ``bands`` (list of number, name, description, dtype, colour,
        scale, offset, nodata), ``crs`` (text or None), ``transform`` (six numbers), ``bounds`` (left, bottom, right,
        top in the CRS, or None), ``gsd_x_m``, ``gsd_y_m``, ``valid_mask`` (kind), ``warped_from`` (None, "gcps" or
        "rpcs"), ``acquired_at``, ``sensor``.

    Raises:
        RasterError: as :func:`open_scene`.
    """
    with _open_source(path) as source, source.environment():
        sensor = sensor_name(source.tags)
        bands = source.named_bands(sensor)
        a, b, c, d, e, f = tuple(source.transform)[:6]
        corners = [(x, y) for x in (0, source.width) for y in (0, source.height)]
        xs, ys = [a * x + b * y + c for x, y in corners], [d * x + e * y + f for x, y in corners]
        gsd_x_m, gsd_y_m = source.gsd_m if source.gsd_m is not None else (None, None)
        return {
            "path": str(path),
            "driver": source.driver,
            "width": source.width,
            "height": source.height,
            "bands": [_describe_band(source, band) for band in bands],
            "crs": source.crs.to_string() if source.crs is not None else None,
            "transform": [a, b, c, d, e, f],
            "bounds": [min(xs), min(ys), max(xs), max(ys)] if source.crs is not None else None,
            "gsd_x_m": gsd_x_m,
            "gsd_y_m": gsd_y_m,
            "valid_mask": source.mask_kind([band.index for band in bands if not band.is_alpha] or [1]),
            "warped_from": source.warped_from,
            "acquired_at": acquisition_time(source.tags),
            "sensor": sensor,
        }


def _describe_band(source: _Source, band: Band) -> dict[str, Any]:
    scale, offset = source.scale_offset(band.index)
    nodata = source.nodata(band.index)
    return {
        "number": band.index,
        "name": "alpha" if band.is_alpha else band.name,
        "description": band.description or None,
        "dtype": str(source.dtype(band.index)),
        "colour": band.colour,
        "scale": scale,
        "offset": offset,
        "nodata": nodata if nodata is None or math.isfinite(nodata) else str(nodata),
    }


class _Source:
    """An open dataset, warped to a plain geotransform where only control points or rational polynomials place it.

    Attributes are those of :class:`rtmdet_geo.scene.SceneSource`, and ``driver``, ``warped_from`` (None, "gcps" or
    "rpcs") and ``block_shape`` (height and width in px of what is decoded at a time). For a warped scene, pixels and
    blocks are those of the warped view.
    """

    def __init__(self, path: str, original: Any, files: tuple[str, ...] | None = None, *, vrt: str = "") -> None:
        self.path = path
        self.files = files or (path,)
        self._opened = vrt or path
        self.driver = str(original.driver)
        self.tags: dict[str, str] = {}
        for namespace in (None, "IMAGERY"):  # GDAL gathers satellite metadata files in the IMAGERY domain
            self.tags |= original.tags(ns=namespace)
        self._original = original
        self._lock = threading.Lock()  # a GDAL dataset serves one thread at a time
        self._dataset, self.warped_from = _warped(original, path)
        self.width, self.height = int(self._dataset.width), int(self._dataset.height)
        block_height, block_width = self._dataset.block_shapes[0]
        self.block_shape = (int(block_height), int(block_width))
        self.crs, self.transform, self.gsd_m = self._georeference()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def part(self) -> Part:
        """What a mosaic needs to know; of a warped scene there is none.

        Raises:
            RasterError: control points or rational polynomials place it.
        """
        if self.warped_from is not None:
            raise RasterError(f"{self.path!r} is placed by its {self.warped_from}; warp it with gdalwarp first")
        data = self._original
        local = os.path.exists(self.path)
        bands = tuple(
            PartBand(
                dtype, colour.name, text or "", None if nodata is None else repr(nodata), float(scale), float(shift)
            )
            for dtype, colour, text, nodata, scale, shift in zip(
                data.dtypes,
                data.colorinterp,
                data.descriptions,
                data.nodatavals,
                data.scales,
                data.offsets,
                strict=True,
            )
        )
        return Part(
            path=self.path,
            source=os.path.abspath(self.path) if local else (data.files or [self.path])[0],
            width=self.width,
            height=self.height,
            crs=data.crs.to_wkt() if data.crs else "",
            transform=data.transform,
            bands=bands,
            has_mask=any(
                MaskFlags.per_dataset in flags and MaskFlags.alpha not in flags for flags in data.mask_flag_enums
            ),
            tags=self.tags,
        )

    def close(self) -> None:
        """Close the warped view, then the file."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        if self._dataset is not self._original:
            self._dataset.close()
        self._original.close()

    def _georeference(self) -> tuple[Any, Affine, tuple[float, float] | None]:
        """CRS, transform and ground sample distance; None, identity and None when pixels cannot be placed on Earth."""
        crs, transform = self._dataset.crs, self._dataset.transform
        if not crs or transform.is_identity or transform.is_degenerate:
            return None, Affine.identity(), None
        gsd = ground_sample_distance(crs.to_wkt(), tuple(transform)[:6], self.width, self.height)
        if gsd is None:
            logger.warning("%s: its CRS gives no longitude and latitude at the scene's centre; not used", self.path)
            return None, Affine.identity(), None
        return crs, transform, gsd

    def named_bands(self, sensor: str | None) -> list[Band]:
        """Bands with wavelength names; descriptions and colours are the file's, as a warped view may lose them."""
        number = self._dataset.count
        descriptions = (*self._original.descriptions, None)[:number]  # a warped view may add an alpha band
        colours = (*(colour.name for colour in self._original.colorinterp), "alpha")[:number]
        return name_bands(descriptions, colours, sensor_family(sensor, scene_stem(self.path)))

    def dtype(self, index: int) -> np.dtype[Any]:
        """Dtype of a band."""
        name = str(self._dataset.dtypes[index - 1])
        return np.dtype({"complex_int16": "complex64"}.get(name, name))

    def nodata(self, index: int) -> float | None:
        """Nodata value of a band."""
        value = self._dataset.nodatavals[index - 1]
        return None if value is None else float(value)

    def scale_offset(self, index: int) -> tuple[float, float]:
        """Scale and offset tags of a band; 1 and 0 when it has none."""
        if index > self._original.count:
            return 1.0, 0.0
        return float(self._original.scales[index - 1]), float(self._original.offsets[index - 1])

    def check_values(self, indexes: Sequence[int]) -> None:
        """Refuse what cannot be stretched: complex values and colour tables."""
        for index in indexes:
            if self.dtype(index).kind == "c":
                raise RasterError(
                    f"band {index} of scene {self.path!r} holds complex values; write their amplitude with "
                    'gdal_calc.py --calc="abs(A)" and run on that'
                )
            if index <= self._original.count and self._original.colorinterp[index - 1].name == "palette":
                raise RasterError(
                    f"band {index} of scene {self.path!r} is a colour table; expand it with gdal_translate -expand rgb"
                )

    def mask_kind(self, indexes: Sequence[int]) -> str:
        """What of the file says which pixels are valid: "alpha", "mask", "nodata" or "none"."""
        flags = {flag for index in indexes for flag in self._dataset.mask_flag_enums[index - 1]}
        if MaskFlags.alpha in flags:
            return "alpha"
        if MaskFlags.per_dataset in flags:
            return "mask"
        return "nodata" if MaskFlags.nodata in flags else "none"

    def read(
        self,
        indexes: Sequence[int],
        x: int,
        y: int,
        width: int,
        height: int,
        out_shape: tuple[int, int] | None = None,
        *,
        with_mask: bool = False,
    ) -> tuple[list[NDArray[Any]], NDArray[np.bool_] | None]:
        """One (h, w) array per band in the band's dtype, and the dataset's mask where asked for.

        Raises:
            RasterError: the window cannot be read.
        """
        options: dict[str, Any] = {"window": Window(x, y, width, height)}
        if out_shape is not None:
            options |= {"out_shape": out_shape, "resampling": Resampling.nearest}
        try:
            with self._lock, self.environment():
                return self._read_insistently(indexes, options, with_mask)
        except (RasterioError, CPLE_BaseError) as error:
            remedy = SERVER_REMEDY if any(map(is_remote, self.files)) else FILE_REMEDY
            where = f"x={x} y={y}, {width} x {height} px"
            raise RasterError(f"scene {self.path!r} cannot be read at {where}: {one_line(error)}; {remedy}") from error

    def environment(self) -> rasterio.Env:
        """GDAL's options for whatever reads the file."""
        return rasterio.Env(**_gdal_options(*self.files))

    def _read_insistently(
        self, indexes: Sequence[int], options: Mapping[str, Any], with_mask: bool
    ) -> tuple[list[NDArray[Any]], NDArray[np.bool_] | None]:
        """Read; of a server anew where that fails (of a silent one once), as GDAL itself repeats no torn answer."""
        started, (number, pause_s, silent_s) = time.monotonic(), retries(_options_in_force())
        for attempt in range(number if any(map(is_remote, self.files)) else 0):
            try:
                return self._read(indexes, options, with_mask)
            except (RasterioError, CPLE_BaseError) as error:
                if attempt and time.monotonic() - started >= silent_s:
                    raise
                logger.warning("%s: %s; asked again", self.path, one_line(error))
            time.sleep(pause_s)
            self._reopen()
        return self._read(indexes, options, with_mask)

    def _reopen(self) -> None:
        """Close the file, with which GDAL forgets what came of it, and open it again."""
        self._close()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RasterioNotGeoreferencedWarning)
            self._original = rasterio.open(self._opened)
        self._dataset, _ = _warped(self._original, self.path)
        if (self._dataset.width, self._dataset.height) != (self.width, self.height):
            raise RasterError(f"scene {self.path!r} changed while it was read; run again with --overwrite")

    def _read(
        self, indexes: Sequence[int], options: Mapping[str, Any], with_mask: bool
    ) -> tuple[list[NDArray[Any]], NDArray[np.bool_] | None]:
        if "out_shape" not in options and len({self.dtype(index) for index in indexes}) == 1:
            values = list(self._dataset.read(list(indexes), **options))
        else:
            values = [self._dataset.read(index, **options) for index in indexes]
        return values, self._dataset.read_masks(indexes[0], **options) != 0 if with_mask else None


def _open_source(path: str | Path | Sequence[str | Path]) -> _Source:
    if not isinstance(path, str | Path):
        return _open_mosaic([str(part) for part in path], None)
    text = str(path)
    with warnings.catch_warnings(), rasterio.Env(**_gdal_options(text)):
        warnings.simplefilter("ignore", RasterioNotGeoreferencedWarning)  # open_scene issues one of its own
        try:
            dataset = rasterio.open(path)
        except (RasterioError, CPLE_BaseError, OSError, ValueError, TypeError) as error:
            if Path(text).is_dir():
                return _open_mosaic(rasters_in(Path(text)), text)
            if not is_virtual(text) and not Path(text).exists():
                raise RasterError(f"scene {text!r} does not exist; check the path") from error
            raise RasterError(f"scene {text!r} cannot be opened as a raster: {one_line(error)}") from error
        try:
            if dataset.count == 0:
                parts = dataset.subdatasets
                hint = f"it holds {len(parts)} subdatasets, open one, such as {parts[0]!r}" if parts else "give another"
                raise RasterError(f"scene {text!r} has no bands; {hint}")
            return _Source(text, dataset)
        except (RasterioError, CPLE_BaseError) as error:
            dataset.close()
            raise RasterError(f"scene {text!r} cannot be opened as a raster: {one_line(error)}") from error
        except BaseException:
            dataset.close()
            raise


def _gdal_options(*paths: str) -> dict[str, Any]:
    """GDAL's options for opening and reading paths; those that the user or a calling program set are left alone."""
    return gdal_options(*paths, set_already=_options_in_force())


def _options_in_force() -> dict[str, Any]:
    return {**os.environ, **(rasterio.env.getenv() if rasterio.env.hasenv() else {})}


def _open_mosaic(paths: Sequence[str], folder: str | None) -> _Source:
    """Open rasters as one; ``folder`` names them."""
    if not paths:
        raise RasterError("no files were given for a mosaic; give one at least")
    if len(paths) == 1 and folder is None:
        return _open_source(paths[0])
    name = folder or f"{paths[0]} and {len(paths) - 1} more"
    parts = []
    for path in paths:
        with _open_source(path) as source:
            parts.append(source.part())
    vrt = mosaic_vrt(parts, f"mosaic {name!r}")
    with rasterio.Env(**_gdal_options(*paths)):
        return _Source(name, rasterio.open(vrt), tuple(paths), vrt=vrt)


def _warped(original: Any, path: str) -> tuple[Any, str | None]:
    """The dataset itself, or a view warped by control points or rational polynomials when nothing else places it."""
    points, points_crs = original.gcps
    if not original.transform.is_identity:
        return original, None
    if points and points_crs is not None:
        kind, method, crs = "gcps", "GCP_POLYNOMIAL", points_crs
    elif original.rpcs is not None:
        kind, method, crs = "rpcs", "RPC", rasterio.crs.CRS.from_string(_RPC_CRS)
    else:
        return original, None
    has_mask = any(value is not None for value in original.nodatavals) or any(
        colour.name == "alpha" for colour in original.colorinterp
    )
    try:
        view = WarpedVRT(
            original, src_crs=crs, crs=crs, resampling=Resampling.bilinear, add_alpha=not has_mask, SRC_METHOD=method
        )
    except (RasterioError, CPLE_BaseError) as error:
        raise RasterError(
            f"scene {path!r} cannot be placed by its {kind}: {one_line(error)}; give it a geotransform with gdalwarp"
        ) from error
    if view.width < 1 or view.height < 1:  # GDAL's integers ran over
        view.close()
        raise RasterError(f"scene {path!r} cannot be placed by its {kind}: they make no sense; check the file")
    return view, kind
