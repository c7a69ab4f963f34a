"""Ground sample distance: geodesic metres per pixel at the scene's centre, per axis."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import pyproj

from rtmdet_geo.errors import ResolutionError, ResolutionWarning

_WGS84 = pyproj.Geod(ellps="WGS84")


def ground_sample_distance(
    crs_wkt: str, transform: Sequence[float], width: int, height: int
) -> tuple[float, float] | None:
    """Metres on the ground that one pixel step spans at the scene's centre.

    Geodesics on WGS 84 between the points half a pixel left and right of (above and below) the centre: what a map
    projection stretches, this undoes (an EPSG:3857 "10 m" pixel is 5.8 m at 54 degrees north).

    Args:
        crs_wkt: the scene's CRS, WKT or any text pyproj takes.
        transform: a, b, c, d, e, f of ``X = a*x + b*y + c``, ``Y = d*x + e*y + f`` (affine order).
        width: of the scene in px.
        height: of the scene in px.

    Returns:
        (gsd_x_m, gsd_y_m) along the pixel's x and y axis, or None where the CRS does not lead to longitude and
        latitude (engineering CRS, centre outside the projection's domain).
    """
    a, b, c, d, e, f = transform[:6]
    x, y = width / 2.0, height / 2.0
    pixels = [(x - 0.5, y), (x + 0.5, y), (x, y - 0.5), (x, y + 0.5)]
    world = [(a * px + b * py + c, d * px + e * py + f) for px, py in pixels]
    try:
        to_lonlat = pyproj.Transformer.from_crs(crs_wkt, "EPSG:4326", always_xy=True)
        lonlat = [to_lonlat.transform(*point, errcheck=True) for point in world]
        _, _, gsd_x = _WGS84.inv(*lonlat[0], *lonlat[1])
        _, _, gsd_y = _WGS84.inv(*lonlat[2], *lonlat[3])
    except pyproj.exceptions.ProjError:  # CRSError is one too
        return None
    if not (math.isfinite(gsd_x) and math.isfinite(gsd_y) and gsd_x > 0 and gsd_y > 0):
        return None
    return float(gsd_x), float(gsd_y)


def check_resolution(
    where: str,
    gsd_x_m: float,
    gsd_y_m: float,
    model_gsd_m: float,
    trained_gsd_m: tuple[float, float] | None = None,
) -> None:
    """Warn outside 0.5-2x the model's ground sample distance, refuse outside 0.1-10x; along either axis.

    A scene whose ground sample distance lies within ``trained_gsd_m`` (lowest and highest of the training scenes before
    resampling, 2 % added) needs no warning: the model has proven itself there.

    Raises:
        ResolutionError: outside 0.1-10x.
    """
    worst = max((gsd_x_m, gsd_y_m), key=lambda gsd: abs(math.log(gsd / model_gsd_m)))
    ratio = worst / model_gsd_m
    if not 0.1 <= ratio <= 10.0:
        raise ResolutionError(
            f"{where} has {worst:.4g} m per pixel, the model expects {model_gsd_m:g} m; "
            "state the scene's with --gsd if the file is wrong, or choose a model for it with --model"
        )
    low, high = trained_gsd_m if trained_gsd_m is not None else (math.inf, -math.inf)
    if not 0.5 <= ratio <= 2.0 and not low / 1.02 <= worst <= high * 1.02:
        warnings.warn(
            f"{where} has {worst:.4g} m per pixel, the model expects {model_gsd_m:g} m; results may be poor",
            ResolutionWarning,
            stacklevel=5,
        )
