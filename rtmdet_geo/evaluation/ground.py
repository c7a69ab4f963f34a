"""Objects of vector layers on the ground, in metres, wherever they lie: what GIS layers are compared by.

There is no one plane in which a whole archive could be measured, so every object has its own: it touches the ellipsoid
of WGS 84 at the object's centroid, and things around are seen from straight above (orthographic projection; 1 km away
lengths are right to 4e-9). A pair of objects is compared in the plane of one of them. Earth-centred coordinates know
neither zones nor an antimeridian, and hold at the poles.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyproj
import shapely
from numpy.typing import NDArray

from rtmdet_geo.boxes import normalize_angle, polygons_to_boxes
from rtmdet_geo.nms import rotated_iou_aligned
from rtmdet_geo.polygons import repair
from rtmdet_geo.vector import WGS84, project_points

Array = NDArray[Any]
FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

_GEOD = pyproj.Geod(ellps="WGS84")
#: Less than any radius of curvature of the ellipsoid, in m: angles seen from there are never too small.
_LEAST_RADIUS_M = 6_300_000.0
#: A flat polygon is widened by so many m, which nobody can measure, to have a smallest rectangle.
_WIDENING_M = 1e-6
#: Objects whose neighbours are looked for at a time.
_CHUNK = 8192


@dataclass(frozen=True)
class GroundObjects:
    """N objects of a layer.

    Attributes:
        lonlat: (N, 2) degrees, centroids on the ground.
        centres: (N, 3) m, the same, earth-centred.
        axes: (N, 2, 3) unit vectors to the east and to the north there, earth-centred.
        shapes: (N,) shapely polygons, multipolygons or points, in m east and north of the centroid.
        boxes: (N, 5) smallest rectangles: centre in m east and north of the centroid, long and short side in m, angle
            of the long side in rad from east to north, in [-pi/2, pi/2); without sides for points.
        radii: (N,) m from the centroid to the farthest vertex, of shape and rectangle.
    """

    lonlat: FloatArray
    centres: FloatArray
    axes: FloatArray
    shapes: NDArray[np.object_]
    boxes: FloatArray
    radii: FloatArray

    def __len__(self) -> int:
        """Return N."""
        return len(self.lonlat)


def place_objects(geometries: NDArray[Any], crs: pyproj.CRS) -> GroundObjects:
    """Return polygons, multipolygons or points of any CRS as objects on the ground.

    Args:
        geometries: (N,) shapely geometries, none missing or empty. Invalid polygons are repaired.
        crs: of their coordinates, x before y.

    Raises:
        ValueError: a coordinate has no longitude and latitude; the message is the number of such geometries.
    """
    points, owner = shapely.get_coordinates(geometries, return_index=True)
    lonlat = project_points(points, crs, WGS84)
    is_lost = ~(np.isfinite(lonlat).all(axis=1) & (np.abs(lonlat[:, 1]) <= 90))
    if is_lost.any():
        raise ValueError(str(len(np.unique(owner[is_lost]))))
    first = np.searchsorted(owner, np.arange(len(geometries)))
    origin, axes = _earth_centred(lonlat[first]), _local_axes(lonlat[first])
    flat = np.einsum("nc,nac->na", _earth_centred(lonlat) - origin[owner], axes[owner])
    shapes = repair(shapely.set_coordinates(shapely.force_2d(geometries), flat))
    middle = shapely.get_coordinates(shapely.centroid(shapes)).reshape(-1, 2)
    centres_lonlat = _lonlat(origin + np.einsum("na,nac->nc", middle, axes))
    centres, centre_axes = _earth_centred(centres_lonlat), _local_axes(centres_lonlat)
    turns, offsets = _view(origin, axes, centres, centre_axes)
    shapes = _moved(shapes, turns, offsets)
    boxes = _smallest_rectangles(shapes)
    return GroundObjects(centres_lonlat, centres, centre_axes, shapes, boxes, _radii(shapes, boxes))


def azimuths_deg(objects: GroundObjects) -> FloatArray:
    """Return the direction of each object's long side, clockwise from true north, in [0, 180)."""
    return np.asarray(np.mod(90 - np.degrees(objects.boxes[:, 4]), 180))


def near_pairs(
    first: GroundObjects, second: GroundObjects, reach_first: FloatArray, reach_second: FloatArray
) -> Iterator[tuple[IntArray, IntArray]]:
    """Yield the pairs of objects that reach each other, in chunks that bound memory.

    Args:
        first: N objects.
        second: M objects.
        reach_first: (N,) m around the centroids.
        reach_second: (M,) m; a pair is one where both reaches together bridge the way between the centroids.

    Yields:
        (P,), (P,) indices into first and second; all pairs of an object of the first are in one chunk.
    """
    if not len(first) or not len(second):
        return
    left, right = _degree_boxes(first.lonlat, reach_first), _degree_boxes(second.lonlat, reach_second)
    tree = shapely.STRtree(shapely.box(*right.T))
    low, high = right[:, 0].min(), right[:, 2].max()
    for start in range(0, len(first), _CHUNK):
        rows = np.arange(start, min(start + _CHUNK, len(first)))
        keys = []
        for turn in (-360.0, 0.0, 360.0):  # across the antimeridian
            chosen = rows[(left[rows, 2] + turn >= low) & (left[rows, 0] + turn <= high)]
            shifted = left[chosen] + [turn, 0, turn, 0]
            query, match = tree.query(shapely.box(*shifted.T))
            keys.append(chosen[query] * len(second) + match)
        a, b = np.divmod(np.unique(np.concatenate(keys)), len(second))
        is_near = straight_distances(first, second, a, b) <= reach_first[a] + reach_second[b]
        yield a[is_near], b[is_near]


def straight_distances(first: GroundObjects, second: GroundObjects, a: IntArray, b: IntArray) -> FloatArray:
    """Return the distances (P,) in m of the centroids of pairs, straight through the ground: for comparing only."""
    return np.asarray(np.linalg.norm(first.centres[a] - second.centres[b], axis=1))


def ground_distances(first: GroundObjects, second: GroundObjects, a: IntArray, b: IntArray) -> FloatArray:
    """Return the geodesic distances (P,) in m of the centroids of pairs."""
    start, end = first.lonlat[a], second.lonlat[b]
    return np.asarray(_GEOD.inv(start[:, 0], start[:, 1], end[:, 0], end[:, 1])[2])


def rectangle_ious(first: GroundObjects, second: GroundObjects, a: IntArray, b: IntArray) -> FloatArray:
    """Return the IoU (P,) of the smallest rectangles of pairs, in the plane of the second."""
    return rotated_iou_aligned(seen_boxes(first, second, a, b), second.boxes[b])


def outline_ious(first: GroundObjects, second: GroundObjects, a: IntArray, b: IntArray) -> FloatArray:
    """Return the IoU (P,) of the polygons of pairs, holes and all, in the plane of the second."""
    turns, offsets = _view(first.centres[a], first.axes[a], second.centres[b], second.axes[b])
    moved, others = _moved(first.shapes[a], turns, offsets), second.shapes[b]
    common = shapely.area(shapely.intersection(moved, others))
    union = shapely.area(moved) + shapely.area(others) - common
    return np.asarray(np.clip(np.divide(common, union, out=np.zeros(len(a)), where=union > 0), 0, 1))


def seen_boxes(first: GroundObjects, second: GroundObjects, a: IntArray, b: IntArray) -> FloatArray:
    """Return the rectangles (P, 5) of the first of each pair as they lie in the plane of the second."""
    turns, offsets = _view(first.centres[a], first.axes[a], second.centres[b], second.axes[b])
    boxes = first.boxes[a].copy()
    direction = np.stack((np.cos(boxes[:, 4]), np.sin(boxes[:, 4])), axis=1)
    boxes[:, :2] = _turned(turns, boxes[:, :2]) + offsets
    direction = _turned(turns, direction)
    boxes[:, 4] = normalize_angle(np.arctan2(direction[:, 1], direction[:, 0]))
    return boxes


def _earth_centred(lonlat: FloatArray) -> FloatArray:
    """Return earth-centred coordinates (N, 3) in m of points on the ellipsoid, degrees (N, 2)."""
    to_earth = pyproj.Transformer.from_crs("EPSG:4979", "EPSG:4978", always_xy=True)
    return np.stack(to_earth.transform(lonlat[:, 0], lonlat[:, 1], np.zeros(len(lonlat))), axis=-1).reshape(-1, 3)


def _lonlat(points: FloatArray) -> FloatArray:
    """Return longitude and latitude (N, 2) of earth-centred points."""
    to_degrees = pyproj.Transformer.from_crs("EPSG:4978", "EPSG:4979", always_xy=True)
    return np.stack(to_degrees.transform(*points.T)[:2], axis=-1).reshape(-1, 2)


def _local_axes(lonlat: FloatArray) -> FloatArray:
    """Return unit vectors (N, 2, 3) to the east and to the north."""
    lon, lat = np.radians(lonlat).T
    east = np.stack((-np.sin(lon), np.cos(lon), np.zeros(len(lon))), axis=1)
    north = np.stack((-np.sin(lat) * np.cos(lon), -np.sin(lat) * np.sin(lon), np.cos(lat)), axis=1)
    return np.stack((east, north), axis=1)


def _view(
    centres: FloatArray, axes: FloatArray, other_centres: FloatArray, other_axes: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Return how planes lie in other ones: matrices (P, 2, 2) and origins (P, 2) in m."""
    turns = np.einsum("pic,pjc->pij", other_axes, axes)
    offsets = np.einsum("pic,pc->pi", other_axes, centres - other_centres)
    return turns, offsets


def _turned(turns: FloatArray, vectors: FloatArray) -> FloatArray:
    return np.asarray(np.einsum("pij,pj->pi", turns, vectors))


def _moved(shapes: NDArray[Any], turns: FloatArray, offsets: FloatArray) -> NDArray[np.object_]:
    """Return shapes (P,) of some planes in other ones."""
    points, owner = shapely.get_coordinates(shapes, return_index=True)
    return np.asarray(shapely.set_coordinates(shapes.copy(), _turned(turns[owner], points) + offsets[owner]))


def _smallest_rectangles(shapes: NDArray[Any]) -> FloatArray:
    """Return the rectangles of least area (N, 5) around shapes; without sides around points."""
    boxes = np.zeros((len(shapes), 5))
    kinds = shapely.get_type_id(shapes)
    boxes[:, :2] = shapely.get_coordinates(shapely.centroid(shapes)).reshape(-1, 2)
    is_point = kinds == shapely.GeometryType.POINT
    is_quad = is_quadrilateral(shapes)
    quads = np.flatnonzero(is_quad)
    others = np.flatnonzero(~is_quad & ~is_point)
    boxes[quads] = polygons_to_boxes(shapely.get_coordinates(shapes[quads]).reshape(-1, 5, 2)[:, :4])
    wide = shapely.buffer(shapely.convex_hull(shapes[others]), _WIDENING_M, join_style="mitre")
    rings = shapely.get_coordinates(shapely.oriented_envelope(wide)).reshape(-1, 5, 2)
    boxes[others] = polygons_to_boxes(rings[:, :4])
    return boxes


def is_quadrilateral(shapes: NDArray[Any]) -> NDArray[np.bool_]:
    """Tell which shapes (N,) are polygons of four corners without holes."""
    is_polygon = shapely.get_type_id(shapes) == shapely.GeometryType.POLYGON
    has_four = (shapely.get_num_coordinates(shapes) == 5) & (shapely.get_num_interior_rings(shapes) == 0)
    return np.asarray(is_polygon & has_four)


def _radii(shapes: NDArray[Any], boxes: FloatArray) -> FloatArray:
    """Return the distance from the plane's origin to the farthest point of shape and rectangle."""
    points, owner = shapely.get_coordinates(shapes, return_index=True)
    radii = np.hypot(boxes[:, 0], boxes[:, 1]) + np.hypot(boxes[:, 2], boxes[:, 3]) / 2
    np.maximum.at(radii, owner, np.hypot(points[:, 0], points[:, 1]))
    return radii


def _degree_boxes(lonlat: FloatArray, reach_m: FloatArray) -> FloatArray:
    """Return bounds (N, 4) in degrees that hold everything within so many m of points; all around near the poles."""
    high = np.degrees(reach_m / _LEAST_RADIUS_M) + 1e-9
    top = np.abs(lonlat[:, 1]) + high
    is_polar = top >= 89.9
    wide = np.where(is_polar, 360.0, high / np.cos(np.radians(np.where(is_polar, 0, top))))
    return np.stack((lonlat[:, 0] - wide, lonlat[:, 1] - high, lonlat[:, 0] + wide, lonlat[:, 1] + high), axis=1)
