"""Lengths, areas and directions on the ground: geodesics on WGS 84, whatever CRS a scene has. pyproj and shapely."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyproj
import shapely
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

_GEOD = pyproj.Geod(ellps="WGS84")
#: Radius in m of a sphere on which nothing but directions and proportions nearby are taken.
_RADIUS_M = 6_371_000.0


def _geodesic_axis(start: FloatArray, end: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return the geodesic length in m and the azimuth halfway, in degrees from true north, of (N, 2) lon lat pairs."""
    forward, backward, length = _GEOD.inv(start[:, 0], start[:, 1], end[:, 0], end[:, 1])
    forward, onward = np.asarray(forward), np.asarray(backward) + 180.0
    turn = np.mod(onward - forward + 180.0, 360.0) - 180.0  # the meridians converge between the two ends
    return np.asarray(length), forward + turn / 2


def geodesic_measures(lonlat: FloatArray) -> dict[str, FloatArray]:
    """Return length_m, width_m, area_m2 and azimuth_deg of boxes whose nine points are given in lon lat.

    Length and width are geodesic distances between the midpoints of opposite sides; the length is the greater of the
    two on the ground, which non-square pixels may make another side than in pixels. The azimuth is the long axis'
    at the box centre, clockwise from true north, in [0, 180).

    Args:
        lonlat: (N, 9, 2) float64 degrees: four corners in order, midpoints of the sides between them, centre.

    Returns:
        Four (N,) float64 arrays; NaN where a point is not finite.
    """
    number = len(lonlat)
    measures = {name: np.full(number, np.nan) for name in ("length_m", "width_m", "area_m2", "azimuth_deg")}
    valid = np.flatnonzero(np.isfinite(lonlat).all(axis=(1, 2)))
    if not len(valid):
        return measures
    points = lonlat[valid]
    w_length, w_azimuth = _geodesic_axis(points[:, 5], points[:, 7])
    h_length, h_azimuth = _geodesic_axis(points[:, 4], points[:, 6])
    is_w_long = w_length >= h_length
    azimuth = np.mod(np.where(is_w_long, w_azimuth, h_azimuth), 180.0)
    azimuth[azimuth >= 180.0] = 0.0  # np.mod(-1e-20, 180) is 180
    measures["length_m"][valid] = np.where(is_w_long, w_length, h_length)
    measures["width_m"][valid] = np.where(is_w_long, h_length, w_length)
    measures["azimuth_deg"][valid] = azimuth
    measures["area_m2"][valid] = [
        abs(_GEOD.polygon_area_perimeter(corners[:, 0], corners[:, 1])[0]) for corners in points[:, :4]
    ]
    return measures


def ground_rectangles(polygons: NDArray[Any]) -> FloatArray:
    """Return the nine points of the smallest rectangle on the ground that holds each polygon.

    The rectangle is found in the plane that touches the globe at the middle of the polygon's bounds.

    Args:
        polygons: (N,) in degrees of longitude and latitude, none empty, none torn at the antimeridian.

    Returns:
        (N, 9, 2) lon lat, as :func:`geodesic_measures` takes them, the centre being the polygon's centroid.
    """
    points, owner = shapely.get_coordinates(polygons, return_index=True)
    bounds = shapely.bounds(polygons).reshape(-1, 4)
    middle = (bounds[:, :2] + bounds[:, 2:]) / 2
    metres = np.radians(np.stack((np.cos(np.radians(middle[:, 1])), np.ones(len(middle))), axis=1)) * _RADIUS_M
    flat = shapely.set_coordinates(polygons.copy(), (points - middle[owner]) * metres[owner])
    # a rectangle's ring has five points; a flat one's fewer, so it is widened by what nobody can measure
    rectangles = shapely.oriented_envelope(shapely.buffer(flat, 1e-6, join_style="mitre"))
    corners = shapely.get_coordinates(rectangles).reshape(-1, 5, 2)[:, :4]
    midpoints = (corners + np.roll(corners, -1, axis=1)) / 2
    centroids = shapely.get_coordinates(shapely.centroid(flat))[:, None]
    found = np.concatenate((corners, midpoints, centroids), axis=1)
    return np.asarray(found / metres[:, None] + middle[:, None])


def geodesic_areas(polygons: NDArray[Any]) -> FloatArray:
    """Return the areas (N,) in m^2 of polygons in degrees of longitude and latitude, without their holes."""
    return np.array([abs(_GEOD.geometry_area_perimeter(polygon)[0]) for polygon in polygons], np.float64)
