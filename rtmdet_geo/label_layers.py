"""Vector layers as labels: polygons in any CRS, brought to the pixels of a raster."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import shapely
from affine import Affine
from numpy.typing import NDArray

from rtmdet_geo.annotations.outlines import Outline, as_outline, transform_outline
from rtmdet_geo.errors import AnnotationError
from rtmdet_geo.vector_formats import STYLE_TABLE

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RasterPlace:
    """Where a raster lies.

    Attributes:
        path: of the file, for messages.
        crs: WKT, or any text that pyproj takes; None: pixels only.
        transform: px (continuous, origin at the outer corner) to the CRS; identity without CRS.
        width: in px.
        height: in px.
    """

    path: str
    crs: str | None
    transform: Affine
    width: int
    height: int


class PlacedObject(NamedTuple):
    """A feature in px of a raster: its row in the layer, points (M, 2) float64 of its hull, and its outline."""

    row: int
    points: NDArray[np.float64]
    outline: Outline


class LabelLayer:
    """A layer of polygons.

    Attributes:
        path: of the file.
        class_names: of each feature; None without a class column.
        table: columns of the features, as a GeoDataFrame.
    """

    def __init__(
        self,
        path: Path,
        class_column: str | None = None,
        usual_column: str | None = None,
        layer_name: str | None = None,
    ) -> None:
        """Read a layer.

        Args:
            path: of the file.
            class_column: names the class of each feature.
            usual_column: likewise, where ``class_column`` is None and the layer has it.
            layer_name: of the layer, where the file holds several.

        Raises:
            AnnotationError: it is one of several and not named, or there is none of that name; it cannot be read, lacks
                the column or a value in it, or has other features than polygons.
        """
        import geopandas

        self.path = path
        name = f"label layer {str(path)!r}"
        layer = read_vector_file(path, name, layer_name, "name one of them with --layer")
        column = find_column(layer, name, class_column, usual_column)
        if not isinstance(layer, geopandas.GeoDataFrame):
            raise AnnotationError(f"{name} has no geometries; give a layer of polygons")
        rows = features_with_geometry(layer, name)
        self.table = layer.iloc[rows - 1]
        kinds = set(self.table.geom_type.unique())
        if not kinds <= {"Polygon", "MultiPolygon"}:
            raise AnnotationError(f"{name} holds {', '.join(sorted(kinds))}; objects must be polygons")
        self.class_names: list[str | None] = [None] * len(self.table)
        if column is not None:
            self.class_names = [*class_values(self.table[column], rows, name)]
        self._num_near = 0

    def __len__(self) -> int:
        """Return the number of features."""
        return len(self.table)

    def objects(self, place: RasterPlace, rows: NDArray[np.bool_] | None = None) -> Iterator[PlacedObject]:
        """Yield the features that touch a raster, in its px; parts of a multipolygon are one object.

        Args:
            place: of the raster.
            rows: (N,) features to look at; None: all.

        Raises:
            AnnotationError: only one of raster and layer has a CRS.
        """
        geometries = self.table.geometry
        if place.crs is not None:
            if self.table.crs is None:
                raise AnnotationError(
                    f"label layer {str(self.path)!r} has no CRS; assign one, such as with ogr2ogr -a_srs"
                )
            geometries = geometries.to_crs(place.crs)
        elif self.table.crs is not None:
            raise AnnotationError(
                f"scene {place.path!r} has no CRS, but label layer {str(self.path)!r} has; give labels in pixels"
            )
        if len(geometries) == 0:
            return
        shapes = np.asarray(geometries.array)
        points, owner = shapely.get_coordinates(shapes, return_index=True)
        inverse = ~place.transform
        to_pixels = np.array([[inverse.a, inverse.b, inverse.c], [inverse.d, inverse.e, inverse.f]])
        pixels = points @ to_pixels[:, :2].T + to_pixels[:, 2]
        splits = np.flatnonzero(np.diff(owner)) + 1
        for row, (shape, part) in enumerate(zip(shapes, np.split(pixels, splits), strict=True)):
            if rows is not None and not rows[row]:
                continue
            low, high = part.min(axis=0), part.max(axis=0)
            inside = np.isfinite(part).all() and low[0] < place.width and low[1] < place.height
            if inside and high[0] > 0 and high[1] > 0:
                self._num_near += 1
                yield PlacedObject(row, part, _outline_of(shape, to_pixels))

    def check_used(self) -> None:
        """Refuse a layer of which nothing lies on the scenes that were asked about.

        Raises:
            AnnotationError: there are objects, but not one touches a scene.
        """
        if len(self) and self._num_near == 0:
            raise AnnotationError(
                f"none of the {len(self)} objects of {str(self.path)!r} lies on a scene; is it the layer of "
                "other scenes, or its CRS wrong?"
            )

    def sorted_classes(self) -> Sequence[str]:
        """Return the names of the classes that features have, sorted."""
        return sorted({name for name in self.class_names if name is not None})


def read_vector_file(path: Path, name: str, layer: str | None, advice: str) -> Any:
    """Read a vector file, or one of its layers, as geopandas does.

    Args:
        path: of the file.
        name: of it, for messages.
        layer: which one; None: the only one.
        advice: what to do where there are several.

    Raises:
        AnnotationError: it cannot be read, has no such layer, or several of which none is named.
    """
    import geopandas
    import pyogrio

    try:
        if path.suffix.lower() in (".parquet", ".geoparquet"):
            return geopandas.read_parquet(path)
        layers = [str(row[0]) for row in pyogrio.list_layers(path) if row[0] != STYLE_TABLE]
        if layer is None and len(layers) > 1:
            raise AnnotationError(f"{name} holds the layers {', '.join(layers)}; {advice}")
        if layer is not None and layer not in layers:
            raise AnnotationError(f"{name} has no layer {layer!r}; it holds {', '.join(layers)}")
        return geopandas.read_file(path, layer=layer or layers[0])
    except AnnotationError:
        raise
    except Exception as error:  # pyogrio, GDAL and pyarrow raise many kinds; all mean the same here
        raise AnnotationError(f"{name} cannot be read: {' '.join(str(error).split())}") from error


def features_with_geometry(layer: Any, name: str) -> NDArray[np.int64]:
    """Return the places, from 1, of the features of a GeoDataFrame that have a geometry; the log hears of others."""
    keep = np.asarray(~(layer.geometry.isna() | layer.geometry.is_empty))
    if not keep.all():
        logger.warning("%s: %d features without geometry are left out", name, int((~keep).sum()))
    return np.flatnonzero(keep) + 1


def find_column(layer: Any, name: str, wanted: str | None, usual: str | None) -> str | None:
    """Return the name of a column: the one that is asked for, or the usual one if it is there.

    Args:
        layer: a GeoDataFrame.
        name: of the layer, for messages.
        wanted: column that somebody asks for, or None.
        usual: column to take where nobody does, or None.

    Raises:
        AnnotationError: there is no column as asked for.
    """
    if wanted is None:
        return usual if usual in layer.columns else None
    if wanted not in layer.columns:
        known = ", ".join(str(one) for one in layer.columns if one != "geometry") or "none"
        raise AnnotationError(f"{name} has no column {wanted!r}; its columns: {known}")
    return wanted


def class_values(column: Any, rows: NDArray[np.int64], name: str) -> list[str]:
    """Return the values of a column of N class names as text.

    Args:
        column: a pandas.Series.
        rows: (N,) places of the features in the layer, from 1.
        name: of the layer, for messages.

    Raises:
        AnnotationError: a value is missing; the first such feature is named.
    """
    is_missing = np.asarray(column.isna())
    if is_missing.any():
        raise AnnotationError(
            f"{name}, feature {rows[is_missing][0]}: no value in {column.name!r} ({int(is_missing.sum())} such "
            "features); name their class"
        )
    return [str(value) for value in column]


def _outline_of(shape: Any, to_pixels: NDArray[np.float64]) -> Outline:
    """Outline of a Polygon or MultiPolygon, in px."""
    rings = [[shapely.get_coordinates(ring) for ring in shapely.get_rings(part)] for part in shapely.get_parts(shape)]
    return transform_outline(as_outline(rings), to_pixels)
