"""Labels in px of georeferenced images to polygons on the ground, and back: the GIS side of ``data convert``.

A layer has a feature per object: its outline, or the corners of its box, and the columns of :data:`COLUMNS`. Corners
keep their order in a GeoPackage; GeoJSON turns them counter-clockwise on the ground (RFC 7946, 3.1.6).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pandas as pd
import pyproj
import shapely
from affine import Affine
from numpy.typing import NDArray

from rtmdet_geo.annotations.angles import CornerOrder, order_corners
from rtmdet_geo.annotations.label_sets import LabelSet, ReadOptions, SetImage, images_by_stem
from rtmdet_geo.annotations.labels import ImageLabels, box_corners, four_corners, hboxes_to_le90, make_labels
from rtmdet_geo.annotations.outlines import Outline
from rtmdet_geo.boxes import minimum_area_rectangle
from rtmdet_geo.errors import AnnotationError, ConfigError
from rtmdet_geo.label_layers import LabelLayer, RasterPlace
from rtmdet_geo.polygons import outlines_to_polygons
from rtmdet_geo.raster import describe_scene
from rtmdet_geo.structures import Kind
from rtmdet_geo.vector import (
    WGS84,
    check_target_crs,
    map_coordinates,
    parse_crs,
    pixel_to_world,
    project_points,
    text_column,
    write_features,
)
from rtmdet_geo.vector_formats import driver_of

logger = logging.getLogger(__name__)

#: Attributes of a feature; ``scene_id`` is the name of its image without ending.
COLUMNS = ("id", "class_id", "class_name", "scene_id", "difficult", "crowd")
#: What a column of yes and no may say; layers of other programs have words or numbers.
_FLAGS = {"0": False, "1": True, "2": True, "false": False, "true": True}
#: What the way over the ground takes off a coordinate in px, at most.
_ROUNDING_PX = 1e-6


def raster_place(path: Path) -> RasterPlace:
    """Return where a raster lies.

    Raises:
        RasterError: it cannot be opened.
        AnnotationError: only control points place it, so that its pixels are not those of the ground.
    """
    about = describe_scene(path)
    if about["warped_from"] is not None:
        raise AnnotationError(
            f"image {str(path)!r} is placed by {about['warped_from']} only, and its labels count pixels before it is "
            "warped: give it a geotransform"
        )
    return RasterPlace(str(path), about["crs"], Affine(*about["transform"]), about["width"], about["height"])


def write_label_layer(
    target: Path,
    labels: LabelSet,
    images: Path,
    classes: Sequence[str],
    *,
    corner_order: CornerOrder = "any",
    dst_crs: Any = None,
    overwrite: bool = False,
) -> Counter[str]:
    """Write labels as polygons in the CRS of their images.

    Args:
        target: .gpkg or .geojson; GeoJSON is always EPSG:4326.
        labels: of images that are found in the folder by name.
        images: folder of georeferenced images.
        classes: names in the order of ``class_id``.
        corner_order: of outlines with four corners, in a GeoPackage.
        dst_crs: of the layer; None: that of the images, which must then have one in common.
        overwrite: whether an existing file is replaced.

    Returns:
        Numbers of objects that were left out or changed, by what happened to them.

    Raises:
        AnnotationError: an image has no CRS, or another size than its labels say.
        ConfigError: the images have several CRSs, or a polygon cannot be expressed in the target's.
        RasterError: an image is missing or cannot be opened.
        OutputError: the file exists, or cannot be written.
    """
    target_crs = check_target_crs(dst_crs, target)
    if target_crs is None and driver_of(target) == "GeoJSON":
        target_crs = parse_crs(WGS84)
    frames, changes = [], Counter[str]()
    for image in labels.images:
        place = _place_of(image, images)
        own_crs = parse_crs(place.crs)
        if target_crs is None:
            target_crs = own_crs
            logger.info("the layer has the CRS of %s", place.path)
        elif dst_crs is None and driver_of(target) != "GeoJSON" and own_crs != target_crs:
            raise ConfigError(f"images have several coordinate systems ({place.path!r} another): choose --dst-crs")
        assert own_crs is not None and target_crs is not None
        shapes, kept = _polygons(image.labels, corner_order, changes)
        frames.append(_frame(image, kept, _project(shapes, place, own_crs, target_crs), classes, target_crs))
    if not frames:
        raise AnnotationError("there are no images to place labels by")
    layer = pd.concat(frames, ignore_index=True)
    layer["id"] = np.arange(1, len(layer) + 1)
    is_multi = bool((layer.geom_type == "MultiPolygon").any())
    write_features(
        layer,
        target,
        layer="labels",
        overwrite=overwrite,
        metadata={"classes": list(classes)},
        geometry_type="MultiPolygon" if is_multi else "Polygon",
    )
    return changes


def _place_of(image: SetImage, folder: Path) -> RasterPlace:
    place = raster_place(folder / image.name)
    if place.crs is None:
        raise AnnotationError(f"image {place.path!r} has no CRS, so its labels have no place on the ground")
    if image.size is not None and image.size != (place.width, place.height):
        raise AnnotationError(
            f"{image.labels.path} says {image.size[0]} x {image.size[1]} px, {place.path!r} is {place.width} x "
            f"{place.height} px: the labels are of another version"
        )
    return place


def _polygons(
    labels: ImageLabels, corner_order: CornerOrder, changes: Counter[str]
) -> tuple[NDArray[np.object_], NDArray[np.intp]]:
    """Return polygons in px, and which objects they are of: all that have an area."""
    corners = box_corners(labels.boxes)
    outlines: list[Outline] = []
    for index in range(len(labels)):
        outline = labels.outlines[index] if labels.outlines else ()
        four = four_corners(outline)
        if four is not None:
            outline = ((order_corners(four[None], corner_order)[0],),)
        outlines.append(outline or ((corners[index],),))
    crossed = [len(part) == 1 and not shapely.is_valid(shapely.Polygon(part[0])) for (part, *_) in outlines]
    shapes = outlines_to_polygons(outlines, tolerance=0)
    has_area = shapely.area(shapes) > 0
    if not has_area.all():
        changes["objects without area were left out"] += int((~has_area).sum())
    repaired = int((np.array(crossed, np.bool_) & has_area).sum())
    if repaired:
        changes["outlines that cross themselves became several polygons"] += repaired
    return shapes[has_area], np.flatnonzero(has_area)


def _project(
    shapes: NDArray[np.object_], place: RasterPlace, own_crs: pyproj.CRS, target_crs: pyproj.CRS
) -> NDArray[Any]:
    """Return polygons in px as polygons on the ground, corners in their order.

    Raises:
        ConfigError: one cannot be expressed in the target's CRS.
    """
    placed = map_coordinates(shapes, lambda points: pixel_to_world(points, place.transform))
    if own_crs != target_crs:
        placed = map_coordinates(placed, lambda points: project_points(points, own_crs, target_crs))
    if not np.isfinite(shapely.get_coordinates(placed)).all():
        raise ConfigError(f"some objects of {place.path!r} lie where {target_crs.name!r} is not defined")
    return placed


def _frame(
    image: SetImage, kept: NDArray[np.intp], shapes: NDArray[Any], classes: Sequence[str], crs: pyproj.CRS
) -> geopandas.GeoDataFrame:
    names = [image.labels.class_names[index] for index in kept]
    number_of = {name: number for number, name in enumerate(classes)}
    columns = {
        "id": np.arange(len(kept), dtype=np.int64),
        "class_id": np.array([number_of[name] for name in names], np.int64),
        "class_name": pd.Series(names, dtype="str"),
        "scene_id": text_column(image.stem, len(kept)),
        "difficult": image.labels.difficult[kept],
        "crowd": image.labels.crowd[kept],
    }
    return geopandas.GeoDataFrame({name: columns[name] for name in COLUMNS}, geometry=shapes, crs=crs)


def read_label_layer(
    source: Path, images: Path, options: ReadOptions, progress: Callable[[int, int], None] | None = None
) -> LabelSet:
    """Read polygons as labels in px of georeferenced images.

    Where the layer has a column ``scene_id`` that names images (without ending), a feature belongs to the one that it
    names; else to all that it touches.

    Args:
        source: the layer, in any CRS.
        images: folder of the images; each is part of the set, with or without objects.
        options: kind of boxes, and the column that names the class (``class_name`` where there is one); without it all
            are of the only class of ``options.classes``, or "object".
        progress: called with images done and in all.

    Raises:
        AnnotationError: the layer cannot be read, has no CRS, other features than polygons, or lies on no image.
        RasterError: an image cannot be opened.
    """
    layer = LabelLayer(source, options.class_column, "class_name", options.layer)
    only = options.classes[0] if options.classes is not None and len(options.classes) == 1 else "object"
    names = [name or only for name in layer.class_names]
    if options.classes is None and None in layer.class_names:
        logger.warning(
            "%s: no column 'class_name', so every object is of class %r (--class-column names another column)",
            *(source, only),
        )
    paths = images_by_stem(images)
    places = {stem: raster_place(path) for stem, path in paths.items()}
    if layer.table.crs is not None:
        places = _with_crs(places, images)
    scene_ids = layer.table["scene_id"].astype(str).to_numpy() if "scene_id" in layer.table else None
    if scene_ids is not None and not np.isin(scene_ids, list(paths)).any():
        scene_ids = None
    used = np.zeros(len(layer), np.bool_)
    flags = {name: _flags(layer, name) for name in ("difficult", "crowd")}
    found = []
    for number, (stem, place) in enumerate(places.items(), 1):
        objects = list(layer.objects(place, None if scene_ids is None else scene_ids == stem))
        rows = np.array([entry.row for entry in objects], np.int64)
        used[rows] = True
        outlines = [_cleaned(entry.outline) for entry in objects]
        labels = make_labels(
            source,
            _boxes([entry.points for entry in objects], options.kind),
            [names[row] for row in rows],
            (rows + 1).tolist(),
            difficult=flags["difficult"][rows],
            crowd=flags["crowd"][rows],
            outlines=outlines,
            unit="feature",
            size=(place.width, place.height),
        )
        found.append(SetImage(paths[stem].name, (place.width, place.height), labels))
        if progress is not None:
            progress(number, len(places))
    layer.check_used()
    if not used.all():
        logger.warning("%s: %d features lie on none of the images and are left out", source, int((~used).sum()))
    return LabelSet(tuple(found), tuple(sorted(set(names))))


def _with_crs(places: dict[str, RasterPlace], folder: Path) -> dict[str, RasterPlace]:
    """Return the images that lie on the ground; the log hears of others.

    Raises:
        AnnotationError: there are none.
    """
    bare = [Path(place.path).name for place in places.values() if place.crs is None]
    if len(bare) == len(places):
        raise AnnotationError(f"none of the {len(bare)} images in {str(folder)!r} has a CRS: give georeferenced ones")
    if bare:
        logger.warning(
            "%s: %d of %d images have no CRS and are left out, such as %s", folder, len(bare), len(places), bare[0]
        )
    return {stem: place for stem, place in places.items() if place.crs is not None}


def _flags(layer: LabelLayer, column: str) -> NDArray[np.bool_]:
    """Return a column of yes and no; False where it is missing or null.

    Raises:
        AnnotationError: a value is neither a number 0, 1 or 2, as in DOTA, nor true or false.
    """
    if column not in layer.table:
        return np.zeros(len(layer), np.bool_)
    values = layer.table[column]
    words = [str(value).strip().lower().removesuffix(".0") for value in values.where(values.notna(), False)]
    unknown = [word for word in words if word not in _FLAGS]
    if unknown:
        raise AnnotationError(
            f"label layer {str(layer.path)!r}: column {column!r} says {unknown[0]!r}; give {', '.join(_FLAGS)}"
        )
    return np.array([_FLAGS[word] for word in words], np.bool_)


def _cleaned(outline: Outline) -> Outline:
    """Return an outline whose rings do not repeat their first point; of a mask: along the edges of pixels again."""
    rings = [[ring[:-1] if (ring[0] == ring[-1]).all() else ring for ring in part] for part in outline]
    if all((np.abs(ring - np.rint(ring)) < _ROUNDING_PX).all() for part in rings for ring in part):
        rings = [[np.rint(ring) for ring in part] for part in rings]
    return tuple(map(tuple, rings))


def _boxes(points: Sequence[NDArray[np.float64]], kind: Kind) -> NDArray[np.float64]:
    if kind == "horizontal":
        return hboxes_to_le90([[*part.min(axis=0), *part.max(axis=0)] for part in points])
    return np.array([minimum_area_rectangle(part) for part in points]).reshape(-1, 5)
