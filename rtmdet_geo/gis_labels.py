"""Scenes and GIS labels to training chips: ``.npy`` uint8 (C, H, W) files and one ``chips.json``.

Pixels come through :func:`rtmdet_geo.raster.open_scene`, so training sees exactly what inference sees. Training itself
needs neither GDAL nor this module.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray

from rtmdet_geo.annotations.coco import CocoLabels, object_outline, read_coco
from rtmdet_geo.annotations.outlines import Outline, outline_to_lists, transform_outline
from rtmdet_geo.boxes import boxes_to_polygons, minimum_area_rectangle
from rtmdet_geo.errors import AnnotationError, OutputError
from rtmdet_geo.label_layers import LabelLayer, RasterPlace
from rtmdet_geo.outputs import check_replaceable, staged_folder
from rtmdet_geo.raster import Scene, open_scene, scene_stem
from rtmdet_geo.structures import StretchSpec, Tile
from rtmdet_geo.tiles import TileGrid

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
    layer: str | None = None,
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
        layer: name of the vector layer, where the file holds several.
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
    check_replaceable(out, "chips", lambda entry: entry.name == _INDEX_NAME or entry.suffix == ".npy")
    if chip_size != 0:
        TileGrid(chip_size, chip_size, chip_size, overlap)  # refuses sizes out of range before any work is done
    reader = _open_labels(Path(labels), stems, class_column, classes, layer)
    class_names = reader.classes
    chips: list[dict[str, Any]] = []
    counts = dict.fromkeys(("empty_chips", "invalid_chips", "objects_outside"), 0)
    with staged_folder(out) as folder:
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

    def __init__(
        self, path: Path, class_column: str | None, classes: Sequence[str] | None, layer: str | None = None
    ) -> None:
        self._layer = LabelLayer(path, class_column, layer_name=layer)
        self.classes = tuple(classes) if classes is not None else tuple(self._layer.sorted_classes()) or ("object",)
        if class_column is None and len(self.classes) != 1:
            raise AnnotationError(
                f"label layer {str(path)!r}: {len(self.classes)} classes need --class-column to tell objects apart"
            )

    def label(self, name: str | None) -> int:
        """Class index of a name; without a class column all are of class 0."""
        return 0 if name is None else _class_index(name, self.classes, self._layer.path)

    def objects(self, scene: Scene) -> list[_Object]:
        """Objects that touch a scene, in source px."""
        crs = None if scene.crs is None else scene.crs.to_wkt()
        place = RasterPlace(scene.path, crs, scene.transform, scene.source_width, scene.source_height)
        names = self._layer.class_names
        return [
            _Object(points, outline, names[row], ignore=False) for row, points, outline in self._layer.objects(place)
        ]

    def check_used(self) -> None:
        """Refuse a layer of which nothing lies on the scenes, see :meth:`LabelLayer.check_used`."""
        self._layer.check_used()


def _open_labels(
    path: Path, stems: Sequence[str], class_column: str | None, classes: Sequence[str] | None, layer: str | None
) -> _CocoReader | _LayerReader:
    if classes is not None and (len(classes) == 0 or len(set(classes)) != len(classes)):
        raise AnnotationError(f"classes {list(classes)!r} must be different names, at least one")
    if not path.exists():
        raise AnnotationError(f"label file {str(path)!r} does not exist; check the path")
    if path.suffix.lower() == ".json" and _looks_like_coco(path):
        return _CocoReader(path, stems, classes)
    return _LayerReader(path, class_column, classes, layer)


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
