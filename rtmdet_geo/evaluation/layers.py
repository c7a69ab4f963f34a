"""Vector layers as evaluation takes them: read, checked, their classes and scores found, placed on the ground."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeAlias

import geopandas
import numpy as np
import pandas as pd
import pyproj
import shapely
from numpy.typing import NDArray

from rtmdet_geo.errors import AnnotationError, DatasetNotFoundError
from rtmdet_geo.evaluation.ground import GroundObjects, place_objects
from rtmdet_geo.label_layers import class_values, features_with_geometry, find_column, read_vector_file
from rtmdet_geo.vector import WGS84, project_points

logger = logging.getLogger(__name__)

#: A file or an open layer.
Source: TypeAlias = "str | os.PathLike[str] | geopandas.GeoDataFrame"

#: Columns that are taken where none is named: those that detections have.
CLASS_COLUMN, SCORE_COLUMN = "class_name", "score"
#: What all objects are where no class is known.
ANY_CLASS = "object"

_POLYGONS = {"Polygon", "MultiPolygon"}


@dataclass(frozen=True)
class Layer:
    """N objects of a vector layer.

    Attributes:
        name: for messages: "predicted layer 'ships.gpkg'".
        frame: its features, those without geometry left out.
        rows: (N,) int64 place of each in the file, from 1.
        class_names: N names, or None where the layer names none.
        scores: (N,) float64; 1 where the layer has none.
        objects: where they are.
        has_scores: whether the layer has a column of scores.
    """

    name: str
    frame: geopandas.GeoDataFrame
    rows: NDArray[np.int64]
    class_names: NDArray[np.object_] | None
    scores: NDArray[np.float64]
    objects: GroundObjects
    has_scores: bool = False

    def __len__(self) -> int:
        """Return N."""
        return len(self.rows)

    def select(self, keep: NDArray[np.bool_]) -> Layer:
        """Return the objects where ``keep`` (N,) is True."""
        names = None if self.class_names is None else self.class_names[keep]
        objects = GroundObjects(*(getattr(self.objects, one.name)[keep] for one in fields(self.objects)))
        return Layer(self.name, self.frame[keep], self.rows[keep], names, self.scores[keep], objects, self.has_scores)

    @property
    def has_points(self) -> bool:
        """Tell whether some object is a point."""
        return bool((shapely.get_type_id(self.objects.shapes) == shapely.GeometryType.POINT).any())


def read_layer(
    source: Source,
    role: str,
    *,
    layer: str | None = None,
    class_column: str | None = None,
    score_column: str | None = None,
    has_classes: bool = True,
    has_scores: bool = False,
) -> Layer:
    """Read a layer of polygons or points.

    Args:
        source: GeoPackage, GeoJSON, FlatGeobuf, shapefile or GeoParquet, or a GeoDataFrame.
        role: what it is: "predicted".
        layer: its name where a file has several.
        class_column: names the classes; None: "class_name" if there is such a column.
        score_column: holds the scores; None: "score" if there is such a column, else all are 1.
        has_classes: whether classes are asked for; if not, none are read.
        has_scores: the same of scores.

    Raises:
        DatasetNotFoundError: there is no such file.
        AnnotationError: the file or layer cannot be read, has no CRS or a wrong one, no such column, a class or score
            that is missing, or other geometries.
    """
    name = f"{role} layer" if isinstance(source, geopandas.GeoDataFrame) else f"{role} layer {os.fspath(source)!r}"
    option = f"--{role}-layer"
    frame = source if isinstance(source, geopandas.GeoDataFrame) else _read(Path(source), name, layer, option)
    frame, rows = _with_geometry(frame, name)
    _warn_of_parts(frame, name)
    names = _class_names(frame, rows, name, class_column) if has_classes else None
    scores = _scores(frame, rows, name, score_column) if has_scores else None
    certain = np.ones(len(frame)) if scores is None else scores
    return Layer(name, frame, rows, names, certain, _place(frame, name), scores is not None)


def read_area(source: Source, layer: str | None = None) -> geopandas.GeoSeries:
    """Return the polygons of an area of interest.

    Raises:
        DatasetNotFoundError, AnnotationError: as :func:`read_layer`, or there is no polygon.
    """
    name = "area of interest" + ("" if isinstance(source, geopandas.GeoDataFrame) else f" {os.fspath(source)!r}")
    frame = source if isinstance(source, geopandas.GeoDataFrame) else _read(Path(source), name, layer, None)
    frame, _ = _with_geometry(frame, name)
    if not len(frame) or not set(frame.geom_type) <= _POLYGONS:
        raise AnnotationError(f"{name} holds {_kinds(frame)}; give polygons")
    _place(frame, name)
    return frame.geometry


def is_within(lonlat: NDArray[np.float64], area: geopandas.GeoSeries) -> NDArray[np.bool_]:
    """Tell which points (N, 2), degrees, lie within an area."""
    whole = shapely.union_all(shapely.make_valid(np.asarray(area.array)))
    shapely.prepare(whole)
    is_geographic = area.crs.is_geographic
    points = project_points(lonlat, pyproj.CRS(WGS84), area.crs)
    inside = shapely.contains_xy(whole, points)
    for turn in (-360.0, 360.0) if is_geographic else ():  # areas beyond the antimeridian
        inside |= shapely.contains_xy(whole, points + np.array([turn, 0.0]))
    return np.asarray(inside)


def _read(path: Path, name: str, layer: str | None, option: str | None) -> geopandas.GeoDataFrame:
    if not path.exists():
        raise DatasetNotFoundError(f"{name} does not exist; check the path")
    advice = "give a file with one layer" if option is None else f"name one of them with {option}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fields that nobody asks for
        return read_vector_file(path, name, layer, advice)


def _with_geometry(frame: Any, name: str) -> tuple[geopandas.GeoDataFrame, NDArray[np.int64]]:
    """Return the features that have a geometry, single parts as such, and their places from 1."""
    if not isinstance(frame, geopandas.GeoDataFrame) or frame.active_geometry_name is None:
        if len(frame) == 0:  # GDAL knows no geometry in an empty GeoJSON
            frame = geopandas.GeoDataFrame(frame, geometry=geopandas.GeoSeries([], crs=WGS84))
        else:
            raise AnnotationError(f"{name} has no geometries; give a layer of polygons or points")
    if frame.crs is None:
        raise AnnotationError(f"{name} has no CRS; assign one, such as with ogr2ogr -a_srs EPSG:32630")
    rows = features_with_geometry(frame, name)
    frame = frame.iloc[rows - 1]
    shapes = np.asarray(frame.geometry.array)
    kinds, multi = shapely.get_type_id(shapes), (shapely.GeometryType.MULTIPOLYGON, shapely.GeometryType.MULTIPOINT)
    single = np.isin(kinds, multi) & (shapely.get_num_geometries(shapes) == 1)
    if single.any():
        shapes = shapes.copy()
        shapes[single] = shapely.get_geometry(shapes[single], 0)
        frame = frame.set_geometry(geopandas.GeoSeries(shapes, index=frame.index, crs=frame.crs))
    if not set(frame.geom_type) <= {*_POLYGONS, "Point"}:
        raise AnnotationError(f"{name} holds {_kinds(frame)}; objects must be polygons or points")
    return frame, rows


def _warn_of_parts(frame: geopandas.GeoDataFrame, name: str) -> None:
    """Log how many features have several parts."""
    parts = shapely.get_num_geometries(np.asarray(frame.geometry.array))
    several = parts[parts > 1]
    if len(several):
        text = "1 feature has" if len(several) == 1 else f"{len(several)} features have together"
        logger.warning(
            "%s: %s %d parts: each feature counts as one object; split features that hold several (QGIS: Multipart to "
            "singleparts; geopandas: explode)",
            name,
            text,
            several.sum(),
        )


def warn_of_doubles(layer: Layer) -> None:
    """Log how many objects are exact copies of others: same outline, same class."""
    shapes = shapely.to_wkb(shapely.normalize(np.asarray(layer.frame.geometry.array)))
    names = [None] * len(layer) if layer.class_names is None else layer.class_names
    copies = len(layer) - len(set(zip(shapes.tolist(), names, strict=True)))
    if copies:
        text = "1 object is an exact copy of another" if copies == 1 else f"{copies} objects are exact copies of others"
        logger.warning("%s: %s and will be missed, for a prediction finds one object: delete it", layer.name, text)


def _kinds(frame: geopandas.GeoDataFrame) -> str:
    return ", ".join(sorted(set(frame.geom_type))) or "nothing"


def _class_names(
    frame: geopandas.GeoDataFrame, rows: NDArray[np.int64], name: str, wanted: str | None
) -> NDArray[np.object_] | None:
    column = find_column(frame, name, wanted if len(frame) else None, CLASS_COLUMN)
    return None if column is None else np.array(class_values(frame[column], rows, name), object)


def _scores(
    frame: geopandas.GeoDataFrame, rows: NDArray[np.int64], name: str, wanted: str | None
) -> NDArray[np.float64] | None:
    column = find_column(frame, name, wanted if len(frame) else None, SCORE_COLUMN)
    if column is None:
        if len(frame):
            logger.warning("%s has no column %r: all its objects count as equally certain", name, SCORE_COLUMN)
        return None
    scores = pd.to_numeric(frame[column], errors="coerce").to_numpy(np.float64, na_value=np.nan)
    is_wrong = ~np.isfinite(scores)
    if is_wrong.any():
        raise AnnotationError(
            f"{name}, feature {rows[is_wrong][0]}: no number in {column!r} ({int(is_wrong.sum())} such features)"
        )
    return np.asarray(scores)


def _place(frame: geopandas.GeoDataFrame, name: str) -> GroundObjects:
    try:
        return place_objects(np.asarray(frame.geometry.array), frame.crs)
    except ValueError as error:
        raise AnnotationError(
            f"{name} has {error} features without longitude and latitude: is {frame.crs.name!r} its CRS?"
        ) from error


def number_classes(names: Sequence[NDArray[np.object_]]) -> tuple[tuple[str, ...], list[NDArray[np.int64]]]:
    """Return all names, sorted, and the labels of each array of names."""
    classes = sorted({name for array in names for name in array})
    label_of = {name: label for label, name in enumerate(classes)}
    return tuple(classes), [np.array([label_of[name] for name in array], np.int64) for array in names]
