"""Where in a scene to look: bounds, or polygons in any CRS, brought to the pixels of the tiles. shapely and pyproj.

Tiles that do not touch the area are neither read nor run; those that do are seen whole, so an object on the border
looks as it does without an area. Of what is found, that is kept whose centre (the box's) lies inside or on the border.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyproj
import shapely
from numpy.typing import NDArray
from shapely.affinity import scale

from rtmdet_geo.errors import AnnotationError, ConfigError, GeometryWarning
from rtmdet_geo.label_layers import features_with_geometry, read_vector_file
from rtmdet_geo.polygons import keep_polygons, repair
from rtmdet_geo.scene import Scene
from rtmdet_geo.structures import Tile
from rtmdet_geo.tiles import TileGrid
from rtmdet_geo.vector import WGS84, parse_crs, pixel_to_world, project_points

FloatArray = NDArray[np.float64]

#: What shares less than this with a tile (px) does not touch it: neighbours along a common edge do not.
_TOUCH_PX = 1e-6
#: Points per side of the scene that say where it lies in another CRS.
_POINTS_PER_SIDE = 33
#: Straight edges of another CRS are curves in the scene: they are followed in steps of this share of its extent.
_STEP = 1 / 256


@dataclass(frozen=True, eq=False)
class Area:
    """A part of a scene.

    Attributes:
        shape: valid polygon or multipolygon in resampled px, within the scene.
    """

    shape: Any

    def tiles(self, grid: TileGrid) -> list[Tile]:
        """Return the tiles of a grid that touch the area, in the grid's order."""
        corners = np.array([(tile.x, tile.y, tile.x + tile.width, tile.y + tile.height) for tile in grid], np.float64)
        windows = shapely.box(*(corners + _TOUCH_PX * np.array([1, 1, -1, -1])).T)
        shapely.prepare(self.shape)
        return [grid[int(index)] for index in np.flatnonzero(shapely.intersects(self.shape, windows))]

    def scaled(self, x: float, y: float) -> Area:
        """Return the same area in px of which the scene has ``x`` and ``y`` times as many."""
        return Area(scale(self.shape, x, y, origin=(0, 0)))

    def holds(self, points: FloatArray) -> NDArray[np.bool_]:
        """Say which points (N, 2) x y in resampled px lie inside or on the border."""
        shapely.prepare(self.shape)
        return np.asarray(shapely.intersects_xy(self.shape, points[:, 0], points[:, 1]), np.bool_)


def find_area(
    source: Scene,
    *,
    bounds: Sequence[float] | None = None,
    geographic: bool = False,
    aoi: str | os.PathLike[str] | None = None,
) -> Area | None:
    """Return the part of a scene that is asked for, or None where all of it is.

    Args:
        source: open scene.
        bounds: west, south, east, north in the scene's CRS; px (left, bottom, right, top) without one.
        geographic: the bounds are longitudes and latitudes; west is greater than east across the antimeridian.
        aoi: file of polygons in any CRS, holes respected. With bounds: what lies in both.

    Raises:
        ConfigError: the bounds are none, or the area lies outside the scene.
        AnnotationError: the file cannot be read, or holds no polygon, or other features.
    """
    if bounds is None and geographic:
        raise ConfigError("geographic says what bounds are given in; give bounds too")
    shapes = []
    if bounds is not None:
        box, name = _bounds_box(source, bounds, geographic)
        shapes.append(_in_scene(source, np.array([box]), parse_crs(WGS84 if geographic else source.crs), name))
    if aoi is not None:
        polygons, crs, name = _read_polygons(source, Path(aoi))
        shapes.append(_in_scene(source, polygons, crs, name))
    if not shapes:
        return None
    shape = keep_polygons(shapely.intersection_all(shapes))
    if shape.is_empty:
        raise ConfigError(f"bounds and area of interest have nothing in common on scene {source.path!r}; give one")
    return Area(shape)


def _bounds_box(source: Scene, bounds: Sequence[float], geographic: bool) -> tuple[Any, str]:
    """Return bounds as a polygon in their CRS, and their name for messages."""
    if len(bounds) != 4 or not all(math.isfinite(value) for value in bounds):
        raise ConfigError(f"bounds {tuple(bounds)} must be four numbers: west, south, east, north")
    west, south, east, north = bounds
    name = f"bounds {_text(bounds)}"
    if source.crs is None:
        if geographic:
            raise ConfigError(f"scene {source.path!r} has no CRS, so its bounds cannot be geographic; give pixels")
        south, north = min(south, north), max(south, north)  # y runs downwards: the bottom is the greater one
    elif geographic and west > east:
        east += 360.0
    if not (west < east and south < north):
        raise ConfigError(f"{name}: west must be below east and south below north")
    return shapely.box(west, south, east, north), name


def _read_polygons(source: Scene, path: Path) -> tuple[NDArray[Any], pyproj.CRS | None, str]:
    """Return the valid polygons of a file, their CRS, and the file's name for messages."""
    name = f"area of interest {str(path)!r}"
    if not path.exists():
        raise AnnotationError(f"{name} does not exist; check the path")
    layer = read_vector_file(path, name, None, "give a file with one layer")
    if not len(layer) or not hasattr(layer, "geom_type"):
        raise AnnotationError(f"{name} holds no geometries; give a layer of polygons")
    layer = layer.iloc[features_with_geometry(layer, name) - 1]
    kinds = set(layer.geom_type)
    if not kinds or not kinds <= {"Polygon", "MultiPolygon"}:
        raise AnnotationError(f"{name} holds {', '.join(sorted(kinds)) or 'no geometries'}; give polygons")
    if source.crs is None and layer.crs is not None:
        raise AnnotationError(f"scene {source.path!r} has no CRS, but {name} has; give polygons in pixels, without CRS")
    if source.crs is not None and layer.crs is None:
        raise AnnotationError(f"{name} has no CRS; assign one, such as with ogr2ogr -a_srs EPSG:32630")
    polygons = shapely.force_2d(np.asarray(layer.geometry.array))
    num_invalid = int((~shapely.is_valid(polygons)).sum())
    if num_invalid:
        warnings.warn(
            f"{name}: {num_invalid} of {len(polygons)} polygons are not valid (they cross themselves, as a rule); "
            "they were repaired",
            GeometryWarning,
            stacklevel=4,
        )
    return repair(polygons), layer.crs, name


def _in_scene(source: Scene, polygons: NDArray[Any], crs: pyproj.CRS | None, name: str) -> Any:
    """Return what of polygons in a CRS lies on a scene, as one shape in resampled px.

    They are cut to the scene's surroundings before they are projected: far away a projection may not be defined.
    """
    extent = _extent(source, crs)
    window = _widened(extent, crs)
    turns = (0.0, -360.0, 360.0) if crs is not None and crs.is_geographic else (0.0,)
    copies = [shapely.transform(polygons, np.array([turn, 0.0]).__add__) for turn in turns]
    near = keep_polygons(shapely.union_all(shapely.intersection(np.concatenate(copies), window)))
    world = parse_crs(source.crs)
    if crs is not None and world is not None and crs != world:
        near = shapely.segmentize(near, max(extent[2] - extent[0], extent[3] - extent[1]) * _STEP)
        near = shapely.transform(near, lambda points: project_points(points, crs, world))
        if not np.isfinite(shapely.get_coordinates(near)).all():
            raise ConfigError(
                f"{name} reaches where the CRS of scene {source.path!r} is not defined; give a smaller one"
            )
    inverse, scales = ~source.transform, np.array([source.scale_x, source.scale_y])
    pixels = shapely.make_valid(shapely.transform(near, lambda points: pixel_to_world(points, inverse) / scales))
    inside = keep_polygons(shapely.intersection(pixels, shapely.box(0, 0, source.width, source.height)))
    if inside.is_empty:
        raise ConfigError(
            f"{name} lies outside the scene: it spans {_text(shapely.total_bounds(polygons))}, scene {source.path!r} "
            f"{_text(extent)} (west, south, east, north; {'px' if crs is None else crs.name}); check place and CRS"
        )
    return inside


def _extent(source: Scene, crs: pyproj.CRS | None) -> FloatArray:
    """Return west, south, east, north of the scene in a CRS; longitudes are not torn at the antimeridian."""
    x, y = np.meshgrid(
        *(np.linspace(0, side, _POINTS_PER_SIDE) for side in (source.source_width, source.source_height))
    )
    points = pixel_to_world(np.stack([x.ravel(), y.ravel()], axis=1), source.transform)
    world = parse_crs(source.crs)
    if crs is not None and world is not None and crs != world:
        points = project_points(points, world, crs)
        points = points[np.isfinite(points).all(axis=1)]
        if not len(points):
            raise ConfigError(
                f"scene {source.path!r} lies where {crs.name!r} is not defined; give the area in another CRS"
            )
        if crs.is_geographic:
            points[:, 0] -= 360.0 * np.round((points[:, 0] - points[len(points) // 2, 0]) / 360.0)
    return np.concatenate([points.min(axis=0), points.max(axis=0)])


def _widened(extent: FloatArray, crs: pyproj.CRS | None) -> Any:
    """Return an extent as a box, a little larger: between the points it comes from a side may bulge."""
    margin = (extent[2:] - extent[:2]) / _POINTS_PER_SIDE
    low, high = extent[:2] - margin, extent[2:] + margin
    if crs is not None and crs.is_geographic:
        low[1], high[1] = max(low[1], -90.0), min(high[1], 90.0)
    return shapely.box(*low, *high)


def _text(bounds: Sequence[float] | FloatArray) -> str:
    return " ".join(f"{value:.8g}" for value in bounds)
