"""Scenes and GIS labels to training chips: ``.npy`` uint8 (C, H, W) files and one ``chips.json``.

Pixels come through :func:`rtmdet_geo.raster.open_scene`, so training sees exactly what inference sees. Training itself
needs neither GDAL nor this module.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray

from rtmdet_geo.annotations.coco import CocoLabels, object_outline, read_coco
from rtmdet_geo.annotations.outlines import Outline, as_outline, outline_to_lists, transform_outline
from rtmdet_geo.boxes import boxes_to_polygons, minimum_area_rectangle
from rtmdet_geo.errors import AnnotationError, OutputError
from rtmdet_geo.raster import Scene, open_scene, scene_stem
from rtmdet_geo.structures import StretchSpec, Tile
from rtmdet_geo.tiles import TileGrid

logger = logging.getLogger(__name__)

#: A box with less than this share of its area inside the chip is marked ``ignore``.
MIN_INSIDE_SHARE = 0.7
#: Sides below this many resampled px are raised to it: a one-pixel line of labels is still an object.
_MIN_SIDE_PX = 1e-3
_INDEX_NAME = "chips.json"


@dataclass(frozen=True, slots=True)
class _Object:
    """A label in source px: points (M, 2) float64 whose hull is the object, and its outline (() for a mere box)."""

    points: NDArray[np.float64]
    outline: Outline
    class_name: str | None
    ignore: bool


@dataclass(frozen=True, slots=True)
class _SceneObjects:
    """All labels of a scene in resampled px."""

    boxes: NDArray[np.float64]  # (N, 5), of least area
    labels: NDArray[np.int64]  # (N,)
    ignored: NDArray[np.bool_]  # (N,)
    outlines: list[Outline]


def cut_chips(
    scenes: Sequence[str | Path],
    labels: str | Path,
    out: str | Path,
    *,
    model_bands: Sequence[str] = ("red", "green", "blue"),
    optional_bands: Mapping[str, int] | None = None,
    stretch: StretchSpec | None = None,
    gsd_m: float | None = None,
    classes: Sequence[str] | None = None,
    chip_size: int = 1024,
    overlap: int = 200,
    class_column: str | None = None,
    bands: Sequence[int | str] | None = None,
    scene_gsd_m: float | None = None,
    nodata: float | None = None,
    keep_empty: bool = True,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Cut scenes and their labels into chips for training.

    Args:
        scenes: raster files; their stems name them and must differ.
        labels: a COCO json (images matched to scenes by file stem, masks or polygons in source px) or a vector layer in
            any CRS (polygons). Each object becomes the rectangle of least area around it, in resampled px, and its
            outline, holes and all, where the labels have one.
        out: folder to make: one ``.npy`` a chip, and ``chips.json``.
        model_bands: channels of the chips, in order.
        optional_bands: uint8 value of channels that a scene may lack.
        stretch: values to uint8; None is the default StretchSpec.
        gsd_m: metres per pixel of the chips; None: no resampling.
        classes: class names in label order; None takes those that the labels name, sorted.
        chip_size: side in resampled px; 0 makes each scene one chip.
        overlap: px that neighbouring chips share.
        class_column: column of the vector layer that names the class; without it all objects are of the one class.
        bands: ``--bidx`` for every scene.
        scene_gsd_m: ``--gsd`` for every scene.
        nodata: ``--nodata`` for every scene.
        keep_empty: whether chips without objects are written. Chips without a valid pixel never are.
        overwrite: whether an existing ``out`` is replaced; only a folder of chips is.
        progress: called with (scenes done, scenes in all).

    Returns:
        ``out``, ``num_scenes``, ``num_chips``, ``num_empty_chips``, ``num_invalid_chips``, ``num_boxes``,
        ``num_ignored``, ``num_by_class``, ``num_objects_outside`` (labels that lie on no chip).

    Raises:
        OutputError: ``out`` exists, holds other files than chips, or cannot be written.
        AnnotationError: labels are malformed, name a class that ``classes`` does not, or lie on none of the scenes.
        RasterError, BandError, ResolutionError: as :func:`rtmdet_geo.raster.open_scene`.
    """
    out = Path(out)
    stretch = stretch or StretchSpec()
    stems = [scene_stem(scene) for scene in scenes]
    if not stems:
        raise AnnotationError("no scenes were given; name at least one raster")
    if len(set(stems)) != len(stems):
        twice = sorted({stem for stem in stems if stems.count(stem) > 1})
        raise AnnotationError(
            f"scenes share the names {', '.join(twice)}; chips are named by them, so rename the files"
        )
    if (out.exists() or out.is_symlink()) and not overwrite:
        raise OutputError(f"folder {str(out)!r} exists; use --overwrite or another name")
    _check_replaceable(out)
    if chip_size != 0:
        TileGrid(chip_size, chip_size, chip_size, overlap)  # refuses sizes out of range before any work is done
    reader = _open_labels(Path(labels), stems, class_column, classes)
    class_names = reader.classes
    chips: list[dict[str, Any]] = []
    counts = dict.fromkeys(("empty_chips", "invalid_chips", "objects_outside"), 0)
    with ExitStack() as cleanup:
        folder = _temporary_folder(out)
        cleanup.callback(shutil.rmtree, folder, ignore_errors=True)
        for number, path in enumerate(scenes):
            with open_scene(
                path,
                bands=bands,
                model_bands=model_bands,
                optional_bands=optional_bands,
                stretch=stretch,
                model_gsd_m=gsd_m,
                gsd_m=scene_gsd_m,
                trained_gsd_m=(0.0, math.inf),  # whatever is cut is what will be trained on
                nodata=nodata,
            ) as scene:
                chips += _cut_scene(scene, reader, folder, chip_size, overlap, keep_empty, counts)
            if progress is not None:
                progress(number + 1, len(stems))
        if isinstance(reader, _LayerReader):
            reader.check_used()
        index = {
            "format_version": 1,
            "bands": list(model_bands),
            "optional_bands": dict(optional_bands or {}),
            "gsd_m": gsd_m,
            "stretch": stretch.model_dump(mode="json"),
            "classes": list(class_names),
            "chips": chips,  # last, see _index_text
        }
        try:
            (folder / _INDEX_NAME).write_text(_index_text(index), encoding="utf-8")
            _move_into_place(folder, out)
        except OSError as error:
            raise OutputError(f"cannot write chips to {str(out)!r}: {error.strerror or error}") from error
    ids = [label for chip in chips for label, ignore in zip(chip["labels"], chip["ignore"], strict=True) if not ignore]
    return {
        "out": str(out),
        "num_scenes": len(stems),
        "num_chips": len(chips),
        "num_boxes": len(ids),
        "num_ignored": sum(sum(chip["ignore"]) for chip in chips),
        "num_by_class": {name: ids.count(index) for index, name in enumerate(class_names)},
    } | {f"num_{name}": value for name, value in counts.items()}


def _index_text(index: dict[str, Any]) -> str:
    """The index as json, its last entry, the chips, one a line: outlines make too many numbers for one a line."""
    head = json.dumps(index | {"chips": []}, indent=1, allow_nan=False).removesuffix("[]\n}")
    lines = ",\n  ".join(json.dumps(chip, allow_nan=False) for chip in index["chips"])
    return f"{head}[\n  {lines}\n ]\n}}\n"


def _cut_scene(
    scene: Scene,
    reader: _CocoReader | _LayerReader,
    folder: Path,
    chip_size: int,
    overlap: int,
    keep_empty: bool,
    counts: dict[str, int],
) -> list[dict[str, Any]]:
    """Write the chips of one scene; return their entries of the index."""
    objects = _scene_objects(scene, reader)
    boxes, ignored = objects.boxes, objects.ignored
    polygons = shapely.polygons(boxes_to_polygons(boxes)) if len(boxes) else np.zeros(0, object)
    if chip_size == 0:
        tiles = [Tile(0, 0, 0, 0, scene.width, scene.height)]
    else:
        tiles = list(TileGrid(scene.width, scene.height, chip_size, overlap))
    entries = []
    seen = np.zeros(len(boxes), np.bool_)
    for tile in tiles:
        share = _share_inside(polygons, tile)
        seen |= share > 0
        chosen = np.flatnonzero(share > 0)
        if len(chosen) == 0 and not keep_empty:
            counts["empty_chips"] += 1
            continue
        pixels, valid = scene.read(tile.x, tile.y, tile.width, tile.height)
        if not valid.any():
            counts["invalid_chips"] += 1
            continue
        name = f"{scene.scene_id}_{tile.x}_{tile.y}.npy"
        try:
            np.save(folder / name, pixels, allow_pickle=False)
        except OSError as error:
            raise OutputError(f"cannot write chip {name!r}: {error.strerror or error}") from error
        counts["empty_chips"] += len(chosen) == 0
        entries.append(
            {
                "file": name,
                "scene": scene.scene_id,
                "x": tile.x,
                "y": tile.y,
                "width": tile.width,
                "height": tile.height,
                "valid_share": round(float(valid.mean()), 6),
                "boxes": (boxes[chosen] - [tile.x, tile.y, 0.0, 0.0, 0.0]).round(6).tolist(),
                "labels": objects.labels[chosen].tolist(),
                "ignore": (ignored[chosen] | (share[chosen] < MIN_INSIDE_SHARE)).tolist(),
                "outlines": [
                    outline_to_lists(transform_outline(objects.outlines[index], [[1, 0, -tile.x], [0, 1, -tile.y]]))
                    for index in chosen
                ],
                "stretch_record": scene.stretch_record,
                "acquired_at": scene.acquired_at,
                "source_size": [scene.source_width, scene.source_height],
                "scene_size": [scene.width, scene.height],
            }
        )
    counts["objects_outside"] += int((~seen).sum())
    return entries


def _scene_objects(scene: Scene, reader: _CocoReader | _LayerReader) -> _SceneObjects:
    boxes, labels, ignored, outlines = [], [], [], []
    to_resampled = np.array([[1 / scene.scale_x, 0, 0], [0, 1 / scene.scale_y, 0]])
    for entry in reader.objects(scene):
        if len(entry.points) == 0:
            continue
        box = minimum_area_rectangle(entry.points / [scene.scale_x, scene.scale_y])
        box[2:4] = np.maximum(box[2:4], _MIN_SIDE_PX)
        boxes.append(box)
        labels.append(reader.label(entry.class_name))
        ignored.append(entry.ignore)
        outlines.append(transform_outline(entry.outline, to_resampled))
    return _SceneObjects(
        np.array(boxes, np.float64).reshape(-1, 5),
        np.array(labels, np.int64),
        np.array(ignored, np.bool_),
        outlines,
    )


def _share_inside(polygons: NDArray[Any], tile: Tile) -> NDArray[np.float64]:
    """Share of each polygon's area that lies inside the tile, (N,) in [0, 1]."""
    if len(polygons) == 0:
        return np.zeros(0)
    frame = shapely.box(tile.x, tile.y, tile.x + tile.width, tile.y + tile.height)
    return np.asarray(shapely.area(shapely.intersection(polygons, frame)) / shapely.area(polygons))


class _CocoReader:
    """Objects of a COCO file, matched to scenes by file stem."""

    def __init__(self, path: Path, stems: Sequence[str], classes: Sequence[str] | None) -> None:
        self.path = path
        self._labels: CocoLabels = read_coco(path)
        self._image_of: dict[str, int] = {}
        for image_id, image in self._labels.images.items():
            stem = scene_stem(str(image.get("file_name", "")))
            if stem in self._image_of and stem in stems:
                raise AnnotationError(f"label file {str(path)!r} has two images named {stem!r}; rename one")
            self._image_of[stem] = image_id
        missing = sorted(set(stems) - set(self._image_of))
        if missing:
            raise AnnotationError(
                f"label file {str(path)!r} has no image for scene {', '.join(missing)}; it has "
                f"{', '.join(sorted(self._image_of)[:10])}"
            )
        self.classes = tuple(classes) if classes is not None else self._labels.classes

    def label(self, name: str | None) -> int:
        """Class index of a name."""
        return _class_index(name, self.classes, self.path)

    def objects(self, scene: Scene) -> list[_Object]:
        """Objects of a scene in source px.

        Raises:
            AnnotationError: the file's image is of another size than the scene.
        """
        image_id = self._image_of[scene.scene_id]
        image = self._labels.images[image_id]
        size = image.get("width"), image.get("height")
        if None not in size and size != (scene.source_width, scene.source_height):
            raise AnnotationError(
                f"label file {str(self.path)!r} says {scene.scene_id!r} is {size[0]} x {size[1]} px, "
                f"the scene is {scene.source_width} x {scene.source_height} px; the labels are of another version"
            )
        return [
            _Object(entry.points, object_outline(entry), entry.class_name, entry.is_crowd)
            for entry in self._labels.objects[image_id]
        ]


class _LayerReader:
    """Polygons of a vector layer, brought to each scene's pixels."""

    def __init__(self, path: Path, class_column: str | None, classes: Sequence[str] | None) -> None:
        import geopandas

        self.path = path
        try:
            layer = geopandas.read_file(path)
        except Exception as error:  # pyogrio and GDAL raise many kinds; all mean the same here
            raise AnnotationError(
                f"label layer {str(path)!r} cannot be read: {' '.join(str(error).split())}"
            ) from error
        if class_column is not None and class_column not in layer.columns:
            raise AnnotationError(
                f"label layer {str(path)!r} has no column {class_column!r}; it has "
                f"{', '.join(str(name) for name in layer.columns if name != 'geometry')}"
            )
        geometries = layer.geometry if isinstance(layer, geopandas.GeoDataFrame) else None
        if geometries is None:
            raise AnnotationError(f"label layer {str(path)!r} has no geometries; give a layer of polygons")
        keep = ~(geometries.isna() | geometries.is_empty)
        if (~keep).any():
            logger.warning("%s: %d features without geometry are left out", path, int((~keep).sum()))
        self._layer = layer[keep]
        kinds = set(self._layer.geom_type.unique())
        if not kinds <= {"Polygon", "MultiPolygon"}:
            raise AnnotationError(
                f"label layer {str(path)!r} holds {', '.join(sorted(kinds))}; objects must be polygons"
            )
        if class_column is not None and self._layer[class_column].isna().any():
            number = int(self._layer[class_column].isna().sum())
            raise AnnotationError(
                f"label layer {str(path)!r} has {number} features without a value in {class_column!r}; name their class"
            )
        names = [None] * len(self._layer) if class_column is None else [str(v) for v in self._layer[class_column]]
        self._names: list[str | None] = list(names)
        self._num_near = 0
        found = sorted({name for name in names if name is not None})
        self.classes = tuple(classes) if classes is not None else tuple(found) or ("object",)
        if class_column is None and len(self.classes) != 1:
            raise AnnotationError(
                f"label layer {str(path)!r}: {len(self.classes)} classes need --class-column to tell objects apart"
            )

    def label(self, name: str | None) -> int:
        """Class index of a name; without a class column all are of class 0."""
        return 0 if name is None else _class_index(name, self.classes, self.path)

    def objects(self, scene: Scene) -> list[_Object]:
        """Objects that touch a scene, in source px; parts of a multipolygon are one object."""
        geometries = self._layer.geometry
        if scene.crs is not None:
            if self._layer.crs is None:
                raise AnnotationError(
                    f"label layer {str(self.path)!r} has no CRS; assign one, such as with ogr2ogr -a_srs"
                )
            geometries = geometries.to_crs(scene.crs.to_wkt())
        elif self._layer.crs is not None:
            raise AnnotationError(
                f"scene {scene.path!r} has no CRS, but label layer {str(self.path)!r} has; give labels in pixels"
            )
        if len(geometries) == 0:
            return []
        shapes = np.asarray(geometries.array)
        points, owner = shapely.get_coordinates(shapes, return_index=True)
        inverse = ~scene.transform
        to_pixels = np.array([[inverse.a, inverse.b, inverse.c], [inverse.d, inverse.e, inverse.f]])
        pixels = points @ to_pixels[:, :2].T + to_pixels[:, 2]
        splits = np.flatnonzero(np.diff(owner)) + 1
        objects = []
        for name, shape, part in zip(self._names, shapes, np.split(pixels, splits), strict=True):
            low, high = part.min(axis=0), part.max(axis=0)
            inside = np.isfinite(part).all() and low[0] < scene.source_width and low[1] < scene.source_height
            if inside and high[0] > 0 and high[1] > 0:
                objects.append(_Object(part, _outline_of(shape, to_pixels), name, ignore=False))
        self._num_near += len(objects)
        return objects

    def check_used(self) -> None:
        """Refuse a layer of which nothing lies on the scenes that were asked about.

        Raises:
            AnnotationError: there are objects, but not one touches a scene.
        """
        if self._names and self._num_near == 0:
            raise AnnotationError(
                f"none of the {len(self._names)} objects of {str(self.path)!r} lies on a scene; is it the layer of "
                "other scenes, or its CRS wrong?"
            )


def _outline_of(shape: Any, to_pixels: NDArray[np.float64]) -> Outline:
    """Outline of a Polygon or MultiPolygon, in source px."""
    rings = [[shapely.get_coordinates(ring) for ring in shapely.get_rings(part)] for part in shapely.get_parts(shape)]
    return transform_outline(as_outline(rings), to_pixels)


def _open_labels(
    path: Path, stems: Sequence[str], class_column: str | None, classes: Sequence[str] | None
) -> _CocoReader | _LayerReader:
    if classes is not None and (len(classes) == 0 or len(set(classes)) != len(classes)):
        raise AnnotationError(f"classes {list(classes)!r} must be different names, at least one")
    if not path.exists():
        raise AnnotationError(f"label file {str(path)!r} does not exist; check the path")
    if path.suffix.lower() == ".json" and _looks_like_coco(path):
        return _CocoReader(path, stems, classes)
    return _LayerReader(path, class_column, classes)


def _looks_like_coco(path: Path) -> bool:
    """Whether a json file is no GeoJSON: GeoJSON has a ``type`` at the top."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return True  # let the COCO reader say what is wrong
    return not (isinstance(content, dict) and content.get("type") in ("FeatureCollection", "Feature"))


def _class_index(name: str | None, classes: Sequence[str], path: Path) -> int:
    if name is None or name not in classes:
        raise AnnotationError(f"labels {str(path)!r} name class {name!r}, but the classes are {', '.join(classes)}")
    return list(classes).index(name)


def _check_replaceable(out: Path) -> None:
    """Refuse to replace anything but an earlier folder of chips.

    Raises:
        OutputError: ``out`` is a file, or holds something that is not a chip.
    """
    if not (out.exists() or out.is_symlink()):
        return
    if out.is_symlink() or not out.is_dir():
        raise OutputError(f"{str(out)!r} is no folder of chips; give another name")
    foreign = sorted(
        path.name for path in out.iterdir() if path.is_dir() or not (path.name == _INDEX_NAME or path.suffix == ".npy")
    )
    if foreign:
        raise OutputError(
            f"folder {str(out)!r} holds other files than chips ({', '.join(foreign[:3])}), which would be "
            "deleted; give another name"
        )


def _temporary_folder(out: Path) -> Path:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        folder.chmod(0o755)  # mkdtemp's folders are private
    except OSError as error:
        raise OutputError(f"cannot write to {str(out.parent)!r}: {error.strerror or error}") from error
    return folder


def _move_into_place(folder: Path, out: Path) -> None:
    """Rename ``folder`` to ``out``; what was there is moved aside first and deleted last."""
    old: Path | None = None
    if out.exists():
        old = folder.with_name(folder.name + ".old")
        out.rename(old)
    folder.rename(out)
    if old is not None:
        shutil.rmtree(old)
