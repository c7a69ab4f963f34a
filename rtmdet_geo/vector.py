"""Geometries, attributes and files: boxes or polygons in source pixels become georeferenced features.

World coordinates are ``transform * (x, y)`` on continuous pixel coordinates, never pixel centres. Lengths, areas and
angles are geodesic on WGS 84 (:class:`pyproj.Geod`), never projected metres, so they hold in any CRS. Without a CRS the
geometries are pixel coordinates (x to the right, **y down**, as they are) and the metric attributes are null.

Files are written under a temporary name beside the target and renamed, so the final name holds a whole file or the
old one.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pandas as pd
import pyproj
import shapely
from affine import Affine
from numpy.typing import NDArray

from rtmdet_geo.boxes import boxes_to_polygons
from rtmdet_geo.errors import ConfigError, OutputError
from rtmdet_geo.geodesy import geodesic_areas, geodesic_measures, ground_rectangles
from rtmdet_geo.outputs import check_folder, staged_output, staged_set
from rtmdet_geo.polygons import repair
from rtmdet_geo.structures import Kind
from rtmdet_geo.vector_drivers import open_chunks, write_staged
from rtmdet_geo.vector_formats import (
    LONLAT_DRIVERS,
    PIXEL_DRIVERS,
    GeometryType,
    Metadata,
    driver_of,
    ending_of,
    feature_texts,
    names_of,
    staged_suffix,
)
from rtmdet_geo.vector_pixels import SourceImage

logger = logging.getLogger(__name__)

FloatArray = NDArray[np.float64]

#: Attributes of every feature, in the order of the file; the geometry comes last.
SCHEMA = tuple(
    "id class_id class_name score lon lat azimuth_deg length_m width_m area_m2 gsd_m scene_id acquired_at sensor "
    "on_edge n_merged model model_sha run_id".split()
)

WGS84 = "EPSG:4326"
#: Decimals of GeoJSON coordinates: 1e-8 degrees are about 1 mm.
_GEOJSON_DECIMALS = 8


def _pixel_points(boxes: FloatArray) -> FloatArray:
    """Return (N, 9, 2) px: four corners, the midpoints of sides 1-2, 2-3, 3-4 and 4-1, the centre."""
    corners = boxes_to_polygons(boxes)
    midpoints = (corners + np.roll(corners, -1, axis=1)) / 2
    return np.concatenate([corners, midpoints, boxes[:, None, :2]], axis=1)


def pixel_to_world(points: FloatArray, transform: Affine) -> FloatArray:
    """Return ``transform * (x, y)`` of continuous pixel coordinates.

    Args:
        points: (..., 2) float64 x y in px of the source scene, origin at the outer corner of the top-left pixel.
        transform: pixel -> world, with any rotation and shear.

    Returns:
        (..., 2) float64 in the unit of the scene's CRS.
    """
    x, y = points[..., 0], points[..., 1]
    return np.stack(
        [
            transform.a * x + transform.b * y + transform.c,
            transform.d * x + transform.e * y + transform.f,
        ],
        axis=-1,
    )


def parse_crs(crs: Any) -> pyproj.CRS | None:
    """Return ``crs`` (EPSG code, WKT, rasterio or pyproj CRS, None) as pyproj's.

    Raises:
        ConfigError: pyproj cannot read it.
    """
    if crs is None or isinstance(crs, pyproj.CRS):
        return crs
    try:
        return pyproj.CRS.from_user_input(crs)
    except pyproj.exceptions.CRSError as error:
        raise ConfigError(f"unknown coordinate reference system {str(crs)!r}; give one such as EPSG:32630") from error


def check_target_crs(
    dst_crs: Any, output: str | os.PathLike[str] | None, driver: str | None = None
) -> pyproj.CRS | None:
    """Return ``dst_crs`` as pyproj's, and refuse early what the output cannot hold.

    Raises:
        ConfigError: it is unknown, or the output is of a format that is always EPSG:4326 (:data:`LONLAT_DRIVERS`).
    """
    target = parse_crs(dst_crs)
    if target is not None and target != WGS84 and output is not None:
        name = driver_of(output, driver)
        if name in LONLAT_DRIVERS:
            raise ConfigError(f"{name} is always EPSG:4326, not {dst_crs}: leave --dst-crs out, or write a .gpkg")
    return target


def project_points(points: FloatArray, source: pyproj.CRS, target: pyproj.CRS | str) -> FloatArray:
    """Project (..., 2) points, x before y on both sides; what cannot be projected becomes NaN."""
    transformer = pyproj.Transformer.from_crs(source, target, always_xy=True)
    x, y = transformer.transform(points[..., 0], points[..., 1])
    projected = np.stack([np.asarray(x, np.float64), np.asarray(y, np.float64)], axis=-1)
    projected[~np.isfinite(projected).all(axis=-1)] = np.nan
    return projected


def map_coordinates(geometries: NDArray[Any], function: Callable[[FloatArray], FloatArray]) -> NDArray[Any]:
    """Return polygons with ``function`` applied to all their coordinates (M, 2) at once."""
    return np.asarray(shapely.set_coordinates(geometries.copy(), function(shapely.get_coordinates(geometries))))


def _unwrap_longitudes(polygons: NDArray[Any]) -> NDArray[Any]:
    """Shift longitudes by whole turns: a polygon across the antimeridian stays in one piece."""
    points, owner = shapely.get_coordinates(polygons, return_index=True)
    if len(points):
        first = points[np.searchsorted(owner, np.arange(len(polygons)))[owner], 0]
        points[:, 0] -= 360.0 * np.round((points[:, 0] - first) / 360.0)
    return np.asarray(shapely.set_coordinates(polygons.copy(), points))


def project_polygons(polygons: NDArray[Any], source: pyproj.CRS, target: pyproj.CRS | str) -> NDArray[Any]:
    """Project polygons; in a geographic CRS none is torn at the antimeridian; exteriors run counter-clockwise.

    Raises:
        ConfigError: one cannot be expressed there.
    """
    target = pyproj.CRS.from_user_input(target)
    if target != source:
        polygons = map_coordinates(polygons, lambda points: project_points(points, source, target))
    if not np.isfinite(shapely.get_coordinates(polygons)).all():
        raise ConfigError(f"some features lie where {target.name!r} is not defined; choose another --dst-crs")
    return counter_clockwise(repair(_unwrap_longitudes(polygons) if target.is_geographic else polygons))


def counter_clockwise(polygons: NDArray[Any]) -> NDArray[Any]:
    """Turn exteriors counter-clockwise in their coordinates, holes clockwise (RFC 7946)."""
    return np.asarray(shapely.orient_polygons(polygons))


def parse_time(acquired_at: str | None) -> pd.Timestamp | None:
    """Return an ISO 8601 time in UTC; without an offset it is taken as UTC."""
    if not acquired_at:
        return None
    try:
        stamp = pd.Timestamp(acquired_at)
        return stamp.tz_localize("UTC") if stamp.tzinfo is None else stamp.tz_convert("UTC")
    except (ValueError, TypeError, OverflowError):
        logger.warning("acquisition time %r is not ISO 8601; acquired_at is left null", acquired_at)
        return None


def text_column(value: str | None, number: int) -> pd.Series:
    """Return a column of N equal strings; None or "" is null."""
    return pd.Series([value or None] * number, dtype="str")


def origin_columns(
    number: int,
    *,
    gsd_m: float | None,
    scene_id: str,
    acquired_at: str | None,
    sensor: str | None,
    model: str,
    model_sha: str,
    run_id: str,
) -> dict[str, Any]:
    """Return the columns of N rows that say where they come from; arguments as :func:`build_features` has them."""
    return {
        "gsd_m": np.full(number, np.nan if gsd_m is None else gsd_m, np.float64),
        "scene_id": text_column(scene_id, number),
        "acquired_at": pd.Series([parse_time(acquired_at)] * number, dtype="datetime64[ms, UTC]"),
        "sensor": text_column(sensor, number),
        "model": text_column(model, number),
        "model_sha": text_column(model_sha, number),
        "run_id": text_column(run_id, number),
    }


def build_features(
    boxes: NDArray[Any],
    scores: NDArray[Any],
    labels: NDArray[Any],
    num_merged: NDArray[Any],
    on_edge: NDArray[Any],
    *,
    transform: Affine,
    crs: Any,
    classes: Sequence[str],
    gsd_m: float | None,
    scene_id: str,
    acquired_at: str | None = None,
    sensor: str | None = None,
    model: str = "",
    model_sha: str = "",
    run_id: str = "",
    dst_crs: Any = None,
    kind: Kind = "rotated",
    polygons: NDArray[Any] | None = None,
) -> geopandas.GeoDataFrame:
    """Return the features of one scene with the whole schema (:data:`SCHEMA`), highest score first.

    Args:
        boxes: (N, 5) float64 cx, cy, w, h in px that ``transform`` takes to the world, angle in rad (le90).
        scores: (N,) in [0, 1].
        labels: (N,) indexes into ``classes``.
        num_merged: (N,) int, see merge.Merged.
        on_edge: (N,) bool, see merge.Merged.
        transform: px -> world; ignored without a CRS, where the boxes must be in px of the source scene.
        crs: the scene's CRS, anything pyproj accepts; None: pixel coordinates and null metric attributes.
        classes: class names in label order.
        gsd_m: metres per pixel on the ground of the scene, or None.
        scene_id: name of the scene.
        acquired_at: ISO 8601 or None.
        sensor: its name or None.
        model: name of what made the detections; "" is null.
        model_sha: SHA-256 of its weights; "" is null.
        run_id: of this run; "" is null.
        dst_crs: CRS of the geometries; None: the scene's. The attributes do not depend on it.
        kind: "horizontal" leaves azimuth_deg null.
        polygons: (N,) shapely polygons or multipolygons of masks, in px as the boxes. They take the boxes' place:
            length, width and azimuth are those of the smallest rectangle on the ground that holds the polygon, the area
            is the polygon's own, ``lon`` and ``lat`` are its centroid's.

    Returns:
        N rows, columns SCHEMA + geometry: polygons of four corners, or those of the masks, exterior counter-clockwise
        in the CRS (in the plane of x and y as numbers where there is none). ``id`` counts from 1. In a geographic CRS a
        polygon across the antimeridian stays in one piece: its longitudes go beyond 180 degrees. ``lon`` is in
        [-180, 180).

    Raises:
        ConfigError: ``crs`` or ``dst_crs`` is unknown, ``dst_crs`` is asked for a scene without CRS, or a polygon
            cannot be expressed in it.
        ValueError: the arrays do not agree, or a label is no index into ``classes``.
    """
    boxes = np.asarray(boxes, np.float64).reshape(-1, 5)
    scores, labels = np.asarray(scores, np.float32), np.asarray(labels, np.int64)
    num_merged, on_edge = np.asarray(num_merged, np.int64), np.asarray(on_edge, bool)
    number = len(boxes)
    for name, array in (("scores", scores), ("labels", labels), ("num_merged", num_merged), ("on_edge", on_edge)):
        if array.shape != (number,):
            raise ValueError(f"{name} has shape {array.shape}, the boxes are {number}")
    if number and not (labels.min() >= 0 and labels.max() < len(classes)):
        raise ValueError(f"labels {labels.min()}..{labels.max()} are no indexes into {len(classes)} class names")
    order = np.lexsort((*boxes.T[::-1], labels, -scores))
    boxes, scores, labels, num_merged, on_edge = (
        array[order] for array in (boxes, scores, labels, num_merged, on_edge)
    )
    shapes = shapely.polygons(boxes_to_polygons(boxes)) if polygons is None else polygons[order]

    source_crs, target_crs = parse_crs(crs), parse_crs(dst_crs)
    if source_crs is None:
        if target_crs is not None:
            raise ConfigError("a scene without coordinate reference system cannot be projected; leave --dst-crs out")
        lonlat, areas = np.full((number, 9, 2), np.nan), None
        geometry = counter_clockwise(shapes)
    else:
        shapes = map_coordinates(shapes, lambda pixels: pixel_to_world(pixels, transform))
        target_crs = target_crs or source_crs
        geometry = project_polygons(shapes, source_crs, target_crs)
        if polygons is None:
            lonlat, areas = project_points(pixel_to_world(_pixel_points(boxes), transform), source_crs, WGS84), None
        else:
            lonlat, areas = _measure_polygons(shapes, source_crs)
    measures = geodesic_measures(lonlat)
    if areas is not None:
        measures["area_m2"] = areas
    if kind == "horizontal":
        measures["azimuth_deg"][:] = np.nan

    names = np.asarray(classes, object)
    columns = {
        "id": np.arange(1, number + 1, dtype=np.int64),
        "class_id": labels,
        "class_name": pd.Series(names[labels] if number else [], dtype="str"),
        "score": scores,
        "lon": np.mod(lonlat[:, 8, 0] + 180.0, 360.0) - 180.0,
        "lat": lonlat[:, 8, 1],
        "azimuth_deg": measures["azimuth_deg"],
        "length_m": measures["length_m"],
        "width_m": measures["width_m"],
        "area_m2": measures["area_m2"],
        "on_edge": on_edge,
        "n_merged": num_merged,
        **origin_columns(
            number,
            gsd_m=gsd_m,
            scene_id=scene_id,
            acquired_at=acquired_at,
            sensor=sensor,
            model=model,
            model_sha=model_sha,
            run_id=run_id,
        ),
    }
    return geopandas.GeoDataFrame({name: columns[name] for name in SCHEMA}, geometry=geometry, crs=target_crs)


def _measure_polygons(shapes: NDArray[Any], source: pyproj.CRS) -> tuple[FloatArray, FloatArray]:
    """Return the nine points of each polygon's rectangle, lon lat, and its area in m^2; NaN where it has no lon lat."""
    lonlat, areas = np.full((len(shapes), 9, 2), np.nan), np.full(len(shapes), np.nan)
    points, owner = shapely.get_coordinates(shapes, return_index=True)
    is_lost = ~np.isfinite(project_points(points, source, WGS84)).all(axis=1)
    known = np.setdiff1d(np.arange(len(shapes)), owner[is_lost])
    if len(known):
        on_globe = project_polygons(shapes[known], source, WGS84)
        lonlat[known], areas[known] = ground_rectangles(on_globe), geodesic_areas(on_globe)
    return lonlat, areas


def check_output(
    path: str | os.PathLike[str], overwrite: bool = False, *, driver: str | None = None, has_image: bool = False
) -> None:
    """Check before a long run that :func:`write_features` could write ``path``, with ``image`` if ``has_image``.

    Raises:
        OutputError: as write_features, as far as it can be known without writing.
    """
    if (name := driver_of(path, driver)) in PIXEL_DRIVERS and not has_image:
        raise OutputError(f"{name} holds pixels of one scene, not a layer on the map; write a .gpkg")
    for part in names_of(path):
        check_folder(part, overwrite)


def write_features(frame: geopandas.GeoDataFrame, path: str | os.PathLike[str], **options: Any) -> None:
    """Write features to a file, whole or not at all; no feature gives a valid empty layer.

    Args:
        frame: what build_features returns.
        path: target; its folder must exist.
        **options: as :func:`write_feature_chunks` has them.

    Raises:
        OutputError: as write_feature_chunks.
    """
    write_feature_chunks([frame], path, **options)


def write_feature_chunks(
    chunks: Iterable[geopandas.GeoDataFrame],
    path: str | os.PathLike[str],
    *,
    driver: str | None = None,
    layer: str = "detections",
    overwrite: bool = False,
    metadata: Metadata | None = None,
    geometry_type: GeometryType = "Polygon",
    style: str | None = None,
    image: SourceImage | None = None,
) -> int:
    """Write features chunk by chunk in one pass, whole or not at all; memory holds a chunk, whatever their number.

    Args:
        chunks: frames with the same columns and CRS, at least one: where nothing is found it is one without rows.
        path: target; its folder must exist. A Shapefile (.shp) is several files, which get their names together.
        driver: a name of :data:`rtmdet_geo.vector_formats.DRIVERS`; None: by extension.
        layer: name of the layer, where the format has names.
        overwrite: replace an existing file.
        metadata: about the run (model, thresholds, stretch, versions, attribution), or what is called for it after the
            last chunk; the table of :mod:`rtmdet_geo.vector_formats` says where each format has them, if at all.
        geometry_type: of a GPKG or FlatGeobuf layer; "MultiPolygon" for masks, which may fall apart; "Unknown" for any.
        style: QML with which QGIS opens a GPKG, see :mod:`rtmdet_geo.qgis_style`; others have no place for it.
        image: the scene, which DOTA and COCO want.

    GeoJSON, GeoJSONSeq and CSV are always EPSG:4326 (RFC 7946, 4); without a CRS they hold pixel coordinates, and
    GeoJSON says ``"crs": null``. The other formats have the CRS of the frames, or none.

    Returns:
        The number of features.

    Raises:
        OutputError: the file exists and ``overwrite`` is False, its folder is missing or not writable, its extension is
            unknown, or writing failed. Nothing is left behind and an old file stays as it was.
        ValueError: there is no chunk, or the columns or CRS of one are not those of the first.
    """
    path, driver, metadata = Path(path), driver_of(path, driver), metadata or {}
    check_output(path, overwrite, driver=driver, has_image=image is not None)
    head, chunks = open_chunks(chunks)
    if driver in LONLAT_DRIVERS:
        if head.crs is None:
            logger.warning(
                "without a CRS %s holds pixel coordinates, which readers take for degrees: write a .gpkg", driver
            )
        elif not _is_wgs84(head.crs):
            logger.info("%s holds EPSG:4326; the geometries are projected from %s", driver, head.crs.name)
        chunks = map(partial(_in_degrees, is_rounded=driver != "CSV"), chunks)
    is_set = ending_of(path) == ".shp" and driver == "ESRI Shapefile"
    suffix = staged_suffix(path, driver)
    with staged_set(names_of(path)) if is_set else staged_output(path, suffix=suffix) as staged:
        number = write_staged(
            chunks,
            staged,
            path,
            driver,
            layer=layer,
            metadata=metadata,
            geometry_type=geometry_type,
            style=style,
            image=image,
            has_crs=head.crs is not None,
        )
    logger.info("wrote %d features to %s", number, path)
    return number


def _in_degrees(chunk: geopandas.GeoDataFrame, is_rounded: bool) -> geopandas.GeoDataFrame:
    """Return a chunk as a file of EPSG:4326 has it."""
    shapes = _lonlat_shapes(chunk)
    shapes = _rounded(shapes) if is_rounded else shapes
    return chunk.set_geometry(geopandas.GeoSeries(shapes, index=chunk.index, name=chunk.geometry.name))


def _is_wgs84(crs: pyproj.CRS) -> bool:
    return bool(crs.equals(pyproj.CRS(WGS84), ignore_axis_order=True))


def _lonlat_shapes(frame: geopandas.GeoDataFrame) -> NDArray[Any]:
    """Return geometries in EPSG:4326, longitude first, or in pixels without a CRS.

    Raises:
        OutputError: one has no longitude and latitude.
    """
    shapes = np.asarray(frame.geometry.array)
    try:
        if frame.crs is not None and not _is_wgs84(frame.crs):
            shapes = project_polygons(shapes, frame.crs, WGS84)
    except ConfigError as error:
        raise OutputError("some features have no longitude and latitude; write a GeoPackage (.gpkg)") from error
    if not np.isfinite(shapely.get_coordinates(shapes)).all():
        raise OutputError("some features have no longitude and latitude; write a GeoPackage (.gpkg) instead")
    return shapes


def geojson_features(frame: geopandas.GeoDataFrame) -> Iterator[str]:
    """Return features as GeoJSON texts without line breaks, in EPSG:4326 (RFC 7946, 4), or pixels without a CRS.

    Raises:
        OutputError: a polygon has no longitude and latitude; raised at once, before the first text.
    """
    return feature_texts(frame, _rounded(_lonlat_shapes(frame)))


def _rounded(shapes: NDArray[Any]) -> NDArray[Any]:
    """Return shapes with the decimals of GeoJSON, valid as they were."""
    rounded = map_coordinates(shapes, lambda points: np.round(points, _GEOJSON_DECIMALS))
    is_invalid = ~shapely.is_valid(rounded)
    precise = shapely.set_precision(shapes[is_invalid], 10.0**-_GEOJSON_DECIMALS)
    kept = np.where(shapely.is_empty(precise), shapes[is_invalid], precise)  # smaller than the last decimal
    rounded[is_invalid] = counter_clockwise(kept)
    return rounded
