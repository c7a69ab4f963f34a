"""Features as labels of their scene, in its pixels: DOTA labelTxt and COCO json, which this package reads back.

A DOTA file has a line ``x1 y1 x2 y2 x3 y3 x4 y4 class 0`` for each object; masks become their smallest rectangles, and
there is no place for scores. A COCO file has the scene as its one image, and for each object an annotation with bbox,
segmentation, area in px and ``score``, which COCO knows in results only and other readers pass over. Polygons of COCO
have no holes: those of masks are filled.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pyproj
import shapely
from affine import Affine
from numpy.typing import NDArray

from rtmdet_geo.annotations.labels import number_text
from rtmdet_geo.vector_formats import Metadata, metadata_of, plain_cells

logger = logging.getLogger(__name__)

#: Decimals of px: what is off by a thousandth of them cannot be seen.
_DECIMALS = 3


@dataclass(frozen=True)
class SourceImage:
    """The scene in whose pixels objects are written.

    Attributes:
        name: of its file.
        width: px.
        height: px.
        classes: class names in label order.
        transform: px -> world.
        crs: of the world; None: features without CRS are in px already.
    """

    name: str
    width: int
    height: int
    classes: tuple[str, ...]
    transform: Affine
    crs: pyproj.CRS | None

    def pixel_shapes(self, chunk: geopandas.GeoDataFrame) -> NDArray[Any]:
        """Return the chunk's geometries in px of the scene, rounded to a thousandth."""
        shapes = np.asarray(chunk.geometry.array)
        points = shapely.get_coordinates(shapes)
        if chunk.crs is not None and self.crs is not None:
            if chunk.crs != self.crs:
                to_scene = pyproj.Transformer.from_crs(chunk.crs, self.crs, always_xy=True)
                points = np.stack(to_scene.transform(points[:, 0], points[:, 1]), axis=-1)
            inverse = ~self.transform
            x, y = points[:, 0], points[:, 1]
            points = np.stack(
                [inverse.a * x + inverse.b * y + inverse.c, inverse.d * x + inverse.e * y + inverse.f], axis=-1
            )
        return np.asarray(shapely.set_coordinates(shapes.copy(), np.round(points, _DECIMALS)))


def write_dota(chunks: Iterable[geopandas.GeoDataFrame], staged: Path, image: SourceImage) -> int:
    """Write a labelTxt file; white space in names of classes becomes "-", since lines are words.

    Returns:
        The number of objects.
    """
    words = {name: "-".join(name.split()) for name in image.classes}
    if renamed := [f"{name} -> {word}" for name, word in words.items() if name != word]:
        logger.warning("lines of DOTA are words; renamed: %s", ", ".join(renamed))
    number = 0
    with staged.open("w", encoding="utf-8", newline="\n") as stream:
        for chunk in chunks:
            corners = _four_corners(image.pixel_shapes(chunk))
            for row, name in zip(corners.tolist(), chunk["class_name"], strict=True):
                stream.write(" ".join([*map(number_text, row), words[name], "0"]) + "\n")
            number += len(chunk)
    return number


def _four_corners(shapes: NDArray[Any]) -> NDArray[np.float64]:
    """Return (N, 8) px x1 y1 ... x4 y4: a polygon's own corners, or those of its smallest rectangle."""
    is_quad = (shapely.get_type_id(shapes) == shapely.GeometryType.POLYGON) & (shapely.get_num_coordinates(shapes) == 5)
    shapes = shapes.copy()
    shapes[~is_quad] = shapely.minimum_rotated_rectangle(shapes[~is_quad])
    corners = shapely.get_coordinates(shapely.get_exterior_ring(shapes)).reshape(-1, 5, 2)[:, :4]
    return np.asarray(np.round(corners, _DECIMALS), np.float64).reshape(-1, 8)


def write_coco(
    chunks: Iterable[geopandas.GeoDataFrame], staged: Path, image: SourceImage, layer: str, metadata: Metadata
) -> int:
    """Write a COCO json file, one annotation a line; ids of images, annotations and categories count from 1.

    Returns:
        The number of objects.
    """
    categories = {name: number for number, name in enumerate(image.classes, 1)}
    head = {"images": [{"id": 1, "file_name": image.name, "width": image.width, "height": image.height}]}
    tail = {"categories": [{"id": number, "name": name} for name, number in categories.items()]}
    number = 0
    with staged.open("w", encoding="utf-8", newline="\n") as stream:
        stream.write(json.dumps(head, ensure_ascii=False)[:-1] + ', "annotations": [')
        for chunk in chunks:
            for entry in _annotations(chunk, image, categories):
                number += 1
                stream.write((",\n" if number > 1 else "\n") + json.dumps({"id": number, "image_id": 1, **entry}))
        about: dict[str, Any] = {**tail, "info": {"description": layer, **metadata_of(metadata)}}
        stream.write("\n], " + json.dumps(about, default=str, ensure_ascii=False)[1:] + "\n")
    return number


def _annotations(
    chunk: geopandas.GeoDataFrame, image: SourceImage, categories: dict[str, int]
) -> Iterator[dict[str, Any]]:
    shapes = image.pixel_shapes(chunk)
    bounds, areas = shapely.bounds(shapes), shapely.area(shapes)
    for shape, (x1, y1, x2, y2), area, name, score in zip(
        shapes, bounds.tolist(), areas.tolist(), chunk["class_name"], plain_cells(chunk["score"]), strict=True
    ):
        sides = [x1, y1, round(x2 - x1, _DECIMALS), round(y2 - y1, _DECIMALS)]
        rings = [shapely.get_coordinates(part.exterior)[:-1] for part in shapely.get_parts(shape)]
        yield {
            "category_id": categories[name],
            "bbox": sides,
            "area": round(area, _DECIMALS),
            "segmentation": [ring.ravel().tolist() for ring in rings],
            "iscrowd": 0,
            "score": score,
        }
