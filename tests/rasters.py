"""Small rasters by parameters, for tests: values are a smooth pattern with noise from a fixed seed."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import rasterio
from rasterio.enums import ColorInterp
from rasterio.transform import Affine

#: Bounds of a 60 x 40 px scene of 10 m px in UTM zone 30 N.
UTM_BOUNDS = (500_000.0, 4_000_000.0, 500_600.0, 4_000_400.0)


def pattern(num_bands: int, height: int, width: int, dtype: str, *, low: float = 1, high: float = 250, seed: int = 0):
    """Return (num_bands, height, width) values in low..high: waves, edges and noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    bands = []
    for band in range(num_bands):
        wave = 0.5 + 0.3 * np.sin((x + 2 * band) / 5) * np.cos(y / 7) + 0.2 * ((x // 9 + y // 6) % 2)
        bands.append(np.clip(wave + rng.normal(0, 0.1, wave.shape), 0, 1))
    return (low + np.array(bands) * (high - low)).astype(dtype)


def write_raster(
    path: str | Path,
    values: np.ndarray,
    *,
    crs: str | None = "EPSG:32630",
    bounds: tuple[float, float, float, float] | None = UTM_BOUNDS,
    transform=None,
    nodata: float | None = None,
    mask: np.ndarray | None = None,
    mask_kind: str = "mask",
    descriptions: tuple[str | None, ...] | None = None,
    colours: tuple[str, ...] | None = None,
    tags: dict[str, str] | None = None,
    scales: tuple[float, ...] | None = None,
    offsets: tuple[float, ...] | None = None,
    gcps=None,
    rpcs=None,
    **profile,
) -> Path:
    """Write (bands, height, width) values as GeoTIFF; ``mask`` goes in as a mask band or an alpha band."""
    count, height, width = values.shape
    alpha = mask is not None and mask_kind == "alpha"
    if transform is None and crs is not None and bounds is not None and gcps is None and rpcs is None:
        left, bottom, right, top = bounds  # rasterio's from_bounds warns with affine 3
        transform = Affine((right - left) / width, 0, left, 0, (bottom - top) / height, top)
    options = {"driver": "GTiff", "dtype": values.dtype, "nodata": nodata, "photometric": "MINISBLACK", **profile}
    if gcps is None and rpcs is None:
        options |= {"crs": crs, "transform": transform}
    with warnings.catch_warnings(), rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with rasterio.open(path, "w", width=width, height=height, count=count + alpha, **options) as target:
            if gcps is not None:
                target.gcps = (gcps, rasterio.crs.CRS.from_string(crs or "EPSG:4326"))
            if rpcs is not None:
                target.rpcs = rpcs
            names = [*(colours or ["undefined"] * count), *(["alpha"] if alpha else [])]
            target.colorinterp = [ColorInterp[name] for name in names]
            target.write(values, indexes=list(range(1, count + 1)))
            if alpha:
                target.write((mask * (255 if values.dtype == np.uint8 else 65535)).astype(values.dtype), count + 1)
            elif mask is not None:
                target.write_mask(mask)
            for index, text in enumerate(descriptions or (), 1):
                if text is not None:
                    target.set_band_description(index, text)
            if scales is not None:
                target.scales = scales
            if offsets is not None:
                target.offsets = offsets
            target.update_tags(**(tags or {}))
    return Path(path)


def make_raster(
    path: str | Path,
    *,
    num_bands: int = 3,
    width: int = 60,
    height: int = 40,
    dtype: str = "uint8",
    nodata_type: str = "none",
    seed: int = 0,
    high: float | None = None,
    **options,
) -> Path:
    """Write a patterned raster; nodata_type: "none", or "nodata" (value 0), "nan", "alpha", "mask" for a hole."""
    top = high if high is not None else {"uint8": 250, "float32": 0.4, "float64": 0.4}.get(dtype, 4000)
    values = pattern(num_bands, height, width, dtype, low=top / 250, high=top, seed=seed)
    hole = invalid_blob(height, width)
    if nodata_type == "nodata":
        values[:, hole] = 0
        options["nodata"] = 0
    elif nodata_type == "nan":
        values[:, hole] = np.nan
        options["nodata"] = np.nan
    elif nodata_type in ("alpha", "mask"):
        options |= {"mask": ~hole, "mask_kind": nodata_type}
    if num_bands == 3 and "colours" not in options and "descriptions" not in options:
        options["colours"] = ("red", "green", "blue")
    return write_raster(path, values, **options)


def invalid_blob(height: int, width: int) -> np.ndarray:
    """Return make_raster's hole, (height, width) bool: a disc on the left and a strip along the right edge."""
    y, x = np.mgrid[:height, :width]
    return ((x - width * 0.2) ** 2 + (y - height * 0.5) ** 2 < (height * 0.25) ** 2) | (x >= width - 4)
