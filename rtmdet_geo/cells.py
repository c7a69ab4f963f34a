"""Cells of a regular grid over a scene: which pixels each covers, and what was found in it as a table of polygons."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import geopandas
import numpy as np
import pandas as pd
import shapely
from affine import Affine
from numpy.typing import NDArray

from rtmdet_geo.errors import ConfigError
from rtmdet_geo.geodesy import geodesic_areas
from rtmdet_geo.structures import Tile
from rtmdet_geo.tiles import TileGrid
from rtmdet_geo.vector import (
    WGS84,
    counter_clockwise,
    map_coordinates,
    origin_columns,
    parse_crs,
    pixel_to_world,
    project_points,
    project_polygons,
)


def cell_batches(width: int, height: int, side: int, batch_size: int) -> Iterator[list[Tile]]:
    """Yield the cells of a grid that covers a scene once, up to ``batch_size`` neighbours of one row at a time.

    Args:
        width: of the scene in px.
        height: likewise.
        side: of a cell in px; the last cells of a row and of a column end with the scene.
        batch_size: at least 1.

    Example:
        >>> [[(cell.x, cell.y, cell.width, cell.height) for cell in row] for row in cell_batches(5, 3, 3, 8)]
        [[(0, 0, 3, 3), (3, 0, 2, 3)]]
    """
    grid = TileGrid(-(-width // side) * side, -(-height // side) * side, side, 0)
    for row in range(grid.num_rows):
        for first in range(0, grid.num_cols, batch_size):
            tiles = (grid.tile(row, column) for column in range(first, min(first + batch_size, grid.num_cols)))
            yield [replace(tile, width=min(side, width - tile.x), height=min(side, height - tile.y)) for tile in tiles]


def count_cells(width: int, height: int, side: int) -> int:
    """Return the number of cells that :func:`cell_batches` yields in all."""
    return -(-width // side) * -(-height // side)


def build_cells(
    edges: NDArray[Any],
    labels: NDArray[Any],
    scores: NDArray[Any],
    valid_shares: NDArray[Any],
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
) -> geopandas.GeoDataFrame:
    """Return one row per cell, in the order given.

    Args:
        edges: (N, 4) float64 left, top, right, bottom in px of the source scene.
        labels: (N, k) indexes into ``classes``, most probable first.
        scores: (N, k) their probabilities.
        valid_shares: (N,) share of the cell's pixels that hold data, in (0, 1].
        transform: px -> world; ignored without a CRS.
        crs: the scene's CRS, anything pyproj accepts; None: pixel coordinates, and lon, lat, area_m2 are null.
        classes: class names in label order.
        gsd_m: metres per pixel on the ground of the scene, or None.
        scene_id: name of the scene.
        acquired_at: ISO 8601 or None.
        sensor: its name or None.
        model: name of the classifier; "" is null.
        model_sha: SHA-256 of its weights; "" is null.
        run_id: of this run; "" is null.
        dst_crs: CRS of the geometries; None: the scene's. The attributes do not depend on it.

    Returns:
        N rows with the columns ``id`` (from 1), ``class_id``, ``class_name`` and ``score`` of the best class,
        ``top2_name``, ``top2_score`` ... of the others, ``lon`` and ``lat`` of the centre, ``area_m2``,
        ``valid_share``, ``gsd_m``, ``scene_id``, ``acquired_at``, ``sensor``, ``model``, ``model_sha``, ``run_id``, and
        a polygon of four corners.

    Raises:
        ConfigError: ``crs`` or ``dst_crs`` is unknown, ``dst_crs`` is asked for a scene without CRS, or a cell cannot
            be expressed in it.
    """
    left, top, right, bottom = np.asarray(edges, np.float64).reshape(-1, 4).T
    labels, scores = np.asarray(labels, np.int64), np.asarray(scores, np.float32)
    number = len(labels)
    shapes = shapely.box(left, top, right, bottom)
    source_crs, target_crs = parse_crs(crs), parse_crs(dst_crs)
    if source_crs is None:
        if target_crs is not None:
            raise ConfigError("a scene without coordinate reference system cannot be projected; leave --dst-crs out")
        geometry, lonlat, areas = counter_clockwise(shapes), np.full((number, 2), np.nan), np.full(number, np.nan)
    else:
        centres = pixel_to_world(np.stack([left + right, top + bottom], axis=-1) / 2, transform)
        lonlat = project_points(centres, source_crs, WGS84)
        shapes = map_coordinates(shapes, lambda pixels: pixel_to_world(pixels, transform))
        areas = geodesic_areas(project_polygons(shapes, source_crs, WGS84))
        target_crs = target_crs or source_crs
        geometry = project_polygons(shapes, source_crs, target_crs)

    names = np.asarray(classes, object)[labels]
    columns: dict[str, Any] = {
        "id": np.arange(1, number + 1, dtype=np.int64),
        "class_id": labels[:, 0],
        "class_name": pd.Series(names[:, 0], dtype="str"),
        "score": scores[:, 0],
    }
    for rank in range(1, labels.shape[1]):
        columns[f"top{rank + 1}_name"] = pd.Series(names[:, rank], dtype="str")
        columns[f"top{rank + 1}_score"] = scores[:, rank]
    columns |= {
        "lon": np.mod(lonlat[:, 0] + 180.0, 360.0) - 180.0,
        "lat": lonlat[:, 1],
        "area_m2": areas,
        "valid_share": np.asarray(valid_shares, np.float64),
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
    return geopandas.GeoDataFrame(columns, geometry=geometry, crs=target_crs)
