"""Outlines of masks as polygons: holes kept, specks dropped, staircases simplified, always valid. shapely.

An outline follows the edges of pixels. Simplification (Douglas and Peucker 1973, with GEOS keeping the topology) moves
no point of it by more than the tolerance, which for 1 px turns the staircases of slanted walls into straight lines.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray

from rtmdet_geo.annotations.outlines import Outline
from rtmdet_geo.masks import MASK_STRIDE

#: Default tolerance of simplification in px of the image that masks were made for.
SIMPLIFY_PX = 1.0
#: Parts of a mask that are smaller (px^2) than a cell of the mask features are noise.
SPECK_PX2 = float(MASK_STRIDE**2)


def outlines_to_polygons(outlines: Iterable[Outline], *, tolerance: float = SIMPLIFY_PX) -> NDArray[np.object_]:
    """Turn outlines of masks into polygons.

    Args:
        outlines: N of them, as :func:`rtmdet_geo.annotations.outlines.trace_mask` makes them; none empty.
        tolerance: px by which an edge may move; 0 keeps the pixels' edges, else parts smaller than SPECK_PX2 and holes
            smaller than a square of twice the tolerance are dropped, the largest part never.

    Returns:
        (N,) shapely polygons, or multipolygons where a mask falls apart; valid, with holes.

    Raises:
        ValueError: the tolerance is negative, or an outline is empty.
    """
    if not tolerance >= 0:
        raise ValueError(f"tolerance {tolerance!r} px must not be negative")
    polygons = [_without_specks(_exact(outline), (2 * tolerance) ** 2) for outline in outlines]
    result = np.empty(len(polygons), object)
    result[:] = polygons
    if tolerance > 0:
        result = shapely.simplify(result, tolerance, preserve_topology=True)
    return repair(result)


def outline_rings(outline: Outline) -> list[NDArray[np.float64]]:
    """Return the rings (M, 2) around the pixels of an outline; edges between its parts are gone."""
    if len(outline) == 1:
        return list(outline[0])
    polygons = shapely.get_parts(_exact(outline))
    return [np.asarray(ring.coords) for polygon in polygons for ring in (polygon.exterior, *polygon.interiors)]


def _exact(outline: Outline) -> Any:
    """Return the polygon of the pixels of an outline: what an odd number of a part's rings encloses, for any part."""
    parts = [_exact_part(part) for part in outline]
    if not parts:
        raise ValueError("an empty outline has no polygon; leave instances without a pixel out")
    return parts[0] if len(parts) == 1 else keep_polygons(shapely.union_all(parts))


def _exact_part(rings: tuple[NDArray[np.float64], ...]) -> Any:
    if len(rings) == 1:
        polygon = shapely.Polygon(rings[0])
        if polygon.is_valid:
            return polygon
    together = shapely.MultiPolygon([shapely.Polygon(ring) for ring in rings])
    return keep_polygons(shapely.make_valid(together, method="linework"))  # odd and even, as rings are meant


def _without_specks(polygon: Any, least_hole: float) -> Any:
    """Drop holes below an area in px^2, and specks, but never the largest part; nothing for 0."""
    if least_hole == 0:
        return polygon
    parts = shapely.get_parts(polygon)
    areas = shapely.area(parts)
    kept = [
        shapely.Polygon(part.exterior, [hole for hole in part.interiors if shapely.Polygon(hole).area >= least_hole])
        for part, area in zip(parts, areas, strict=True)
        if area >= SPECK_PX2 or area == areas.max()
    ]
    return keep_polygons(shapely.union_all(kept))  # an island may lie in a hole that is gone


def repair(polygons: NDArray[Any]) -> NDArray[Any]:
    """Return polygons of which the invalid ones are made valid, without the lines and points that this may leave."""
    repaired = polygons.copy()
    for index in np.flatnonzero(~shapely.is_valid(polygons)):
        repaired[index] = keep_polygons(shapely.make_valid(polygons[index]))
    return repaired


def keep_polygons(geometry: Any) -> Any:
    """Return the polygons of a geometry as one: without the lines and points that repairs may leave."""
    parts = shapely.get_parts(shapely.get_parts(geometry))
    parts = [part for part in parts if part.geom_type == "Polygon" and not part.is_empty]
    return parts[0] if len(parts) == 1 else shapely.MultiPolygon(parts)
