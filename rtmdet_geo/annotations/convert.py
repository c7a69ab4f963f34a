"""Sets of label files from one format to another: ``rtmdet-geo data convert``.

Images are not copied. What a target cannot hold is counted and said once, never dropped in silence:

=========== ============================ ================================ =========
target      an object                    difficult, crowd                 precision
=========== ============================ ================================ =========
dota        four corners                 difficult; a crowd is difficult  all digits
yolo_obb    corners, boxes or polygons   neither; crowds are left out     all digits
coco        outlines, corners or boxes   both                             all digits; outlines with holes to a pixel
hrsc        rotated boxes                difficult; a crowd is difficult  all digits
rbox        rotated boxes                difficult; a crowd is difficult  all digits
voc         enclosing boxes              difficult; a crowd is difficult  all digits
rolabelimg  rotated boxes                difficult; a crowd is difficult  all digits
gis         outlines, corners or boxes   both                             GPKG all digits, GeoJSON 1e-8 degrees
=========== ============================ ================================ =========
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from rtmdet_geo.annotations.angles import AngleConvention, CornerOrder
from rtmdet_geo.annotations.coco_writer import is_pixel_mask, is_plain, write_coco
from rtmdet_geo.annotations.dota import read_dota_header, write_dota
from rtmdet_geo.annotations.hrsc import HrscLevel, hrsc_class_id, write_hrsc
from rtmdet_geo.annotations.label_sets import (
    CLASS_LIST,
    LABEL_SUFFIXES,
    ConvertFormat,
    LabelSet,
    ReadOptions,
    SetImage,
    read_label_set,
)
from rtmdet_geo.annotations.labels import ImageLabels, box_corners, four_corners, object_corners, write_lines
from rtmdet_geo.annotations.outlines import Outline, outline_points
from rtmdet_geo.annotations.rbox import write_rbox
from rtmdet_geo.annotations.voc import write_voc
from rtmdet_geo.annotations.yolo import write_yolo
from rtmdet_geo.boxes import convex_hull
from rtmdet_geo.errors import AnnotationError, ConfigError, OutputError
from rtmdet_geo.outputs import check_folder, check_replaceable, staged_folder, staged_output
from rtmdet_geo.structures import Kind

logger = logging.getLogger(__name__)

#: Corners further (px) from those of the box make a quadrilateral that is no rectangle.
_SAME_PX = 0.01


@dataclass(frozen=True)
class _Target:
    """What a format can hold: shapes (its own first), corners of quadrilaterals, marks, and names of several words."""

    kinds: tuple[Kind, ...]
    has_corners: bool = False
    has_difficult: bool = True
    has_crowd: bool = False
    has_spaces: bool = True
    needs_size: bool = True


_TARGETS: dict[ConvertFormat, _Target] = {
    "dota": _Target(("rotated", "horizontal"), has_corners=True, has_spaces=False, needs_size=False),
    "yolo_obb": _Target(("rotated", "horizontal", "mask"), has_corners=True, has_difficult=False),
    "coco": _Target(("mask", "rotated", "horizontal"), has_corners=True, has_crowd=True),
    "hrsc": _Target(("rotated",), needs_size=False),
    "rbox": _Target(("rotated", "horizontal"), has_spaces=False, needs_size=False),
    "voc": _Target(("horizontal",)),
    "rolabelimg": _Target(("rotated", "horizontal")),
    "gis": _Target(("mask", "rotated", "horizontal"), has_corners=True, has_crowd=True),
}


#: Endings of targets that are one file.
_ENDINGS: dict[ConvertFormat, tuple[str, ...]] = {"coco": (".json",), "gis": (".gpkg", ".geojson", ".json")}


def convert_labels(
    source: str | Path,
    target: str | Path,
    *,
    from_format: ConvertFormat,
    to_format: ConvertFormat,
    images: str | Path | None = None,
    classes: Sequence[str] | None = None,
    kind: Kind | None = None,
    from_angle: AngleConvention | None = None,
    to_angle: AngleConvention | None = None,
    corner_order: CornerOrder = "any",
    hrsc_level: HrscLevel = 1,
    counts_from_one: bool = False,
    class_column: str | None = None,
    layer: str | None = None,
    dst_crs: Any = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Convert a set of labels; the target appears whole or not at all.

    Args:
        source: folder of label files, one label file, a COCO file or a layer.
        target: folder to make, or file: coco .json; gis .gpkg or .geojson; of other formats a folder, or a file with
            the ending of its label files where there is one image only.
        from_format: of the source.
        to_format: of the target.
        images: folder of the images. Formats that state sizes in px (coco, voc, rolabelimg) or count in shares
            (yolo_obb) need them unless the source states the sizes; gis needs georeferenced ones.
        classes: names of the target in label order; others in the labels are refused. They also name the numbers of a
            yolo_obb source without ``classes.txt``. None: the source's own list, or the names found, sorted.
        kind: what the target shall show: "rotated" quadrilaterals or rotated boxes, "horizontal" enclosing boxes,
            "mask" outlines; None: the most that the format can.
        from_angle: convention of an rbox source; None: rad, clockwise, any range.
        to_angle: convention of an rbox target; None: likewise, w the long side.
        corner_order: of corners that the source states; those of boxes go clockwise from the top left.
        hrsc_level: of the classes of an hrsc source.
        counts_from_one: ``bndbox`` of a voc source names pixels, from 1 on, as in the Pascal VOC challenge.
        class_column: column of a gis source that names the class; None: ``class_name`` if it is there.
        layer: of a gis source whose file holds several.
        dst_crs: of a gis target; None: that of the images.
        overwrite: replace a target; of folders only those that hold nothing but label files of the format.
        progress: called with label files read and in all.

    Returns:
        ``out``, ``num_images``, ``num_objects``, ``num_by_class``, ``num_difficult``, ``num_crowd``: of the target;
        ``changes``: number of objects, or files, by what the target could not hold.

    Raises:
        DatasetNotFoundError: a folder or file is missing or empty.
        AnnotationError: a label file is malformed; the message names file and line or object.
        ConfigError: an option does not go with the formats, or labels have classes that the target's list lacks.
        OutputError: the target exists, or cannot be written.
        RasterError: an image of a gis source or target cannot be opened.
    """
    source, target = Path(source), Path(target)
    folder = None if images is None else Path(images)
    about = _TARGETS[to_format]
    kind = kind or about.kinds[0]
    check_request(target, to_format, kind, folder)
    if classes is not None and (not classes or len(set(classes)) != len(classes)):
        raise ConfigError(f"classes {list(classes)!r} must be different names, at least one")
    _check_target(source, target, to_format, overwrite)
    options = ReadOptions(
        kind=kind,
        classes=None if classes is None else tuple(classes),
        angle=from_angle or AngleConvention(),
        hrsc_level=hrsc_level,
        counts_from_one=counts_from_one,
        class_column=class_column,
        layer=layer,
    )
    found = read_label_set(source, from_format, folder, options, progress)
    changes: Counter[str] = Counter()
    if kind == "horizontal":
        turned = replace(options, kind="rotated")  # of a layer outlines are there already
        changes += _count_enclosed(
            found if from_format == "gis" else read_label_set(source, from_format, folder, turned)
        )
    headers = {}
    if from_format == "dota":
        headers = {image.stem: read_dota_header(image.labels.path) for image in found.images}
    if to_format != "dota" and any(headers.values()):
        changes["files lost their header lines (imagesource, gsd)"] = sum(map(bool, headers.values()))
    fitted = LabelSet(
        tuple(replace(image, labels=_fit(image, to_format, kind, changes)) for image in found.images),
        found.classes,
    )
    if not about.has_spaces:
        fitted = _joined_names(fitted, changes)
    chosen = tuple(classes) if classes is not None else fitted.classes
    if not about.has_spaces:
        chosen = tuple(map(_hyphened, chosen))
    _check_classes(fitted, chosen, to_format)
    if about.needs_size and to_format != "gis":
        _check_sizes(fitted, to_format)
    writer = _Writer(to_format, kind, chosen, corner_order, to_angle or AngleConvention("le90"), headers)
    if to_format == "gis":
        from rtmdet_geo.gis_convert import write_label_layer

        assert folder is not None
        changes += write_label_layer(
            target, fitted, folder, chosen, corner_order=corner_order, dst_crs=dst_crs, overwrite=overwrite
        )
    else:
        writer.write(fitted, target)
    for text, number in changes.items():
        logger.warning("%s: %d %s", target, number, text)
    return _summary(target, fitted, chosen, changes)


def check_request(target: Path, to_format: ConvertFormat, kind: Kind | None, images: Path | None) -> None:
    """Refuse what needs no file to be seen as wrong; see :func:`convert_labels`.

    Raises:
        ConfigError: the target cannot hold the kind, or wants images.
        OutputError: the target has no ending of its format.
    """
    kinds = _TARGETS[to_format].kinds
    if kind is not None and kind not in kinds:
        raise ConfigError(f"{to_format} cannot hold kind {kind!r}; it can hold {', '.join(kinds)}")
    if to_format == "gis" and images is None:
        raise ConfigError("a layer lies on the ground: name the folder of the georeferenced images with --images")
    endings = _ENDINGS.get(to_format)
    if endings is not None and target.suffix.lower() not in endings:
        raise OutputError(f"output {str(target)!r} should end in {' or '.join(endings)}")


def _check_target(source: Path, target: Path, to_format: ConvertFormat, overwrite: bool) -> None:
    """Refuse early what could not be written, or would replace something else than labels.

    Raises:
        OutputError: the target exists, is the source, or holds other files.
    """
    if target.exists() and source.exists() and os.path.samefile(target, source):
        raise OutputError(f"output {str(target)!r} is the source itself; give another name")
    suffix = LABEL_SUFFIXES.get(to_format)
    if suffix is None:
        check_folder(target, overwrite)
    elif target.suffix.lower() == suffix:
        check_folder(target, overwrite)
    elif target.exists() and not overwrite:
        raise OutputError(f"output {str(target)!r} exists; add --overwrite to replace it")
    else:
        check_replaceable(
            target, "labels", lambda entry: entry.name == CLASS_LIST or entry.name.lower().endswith(suffix)
        )


def _fit(image: SetImage, to_format: ConvertFormat, kind: Kind, changes: Counter[str]) -> ImageLabels:
    """Return labels as a target can hold them; count what it cannot."""
    target, labels = _TARGETS[to_format], image.labels
    if not target.has_crowd and labels.crowd.any():
        number = int(labels.crowd.sum())
        if target.has_difficult:
            changes["crowd regions became difficult objects"] += number
            none = np.zeros(len(labels), np.bool_)
            labels = replace(labels, difficult=labels.difficult | labels.crowd, crowd=none)
        else:
            changes["crowd regions were left out"] += number
            labels = _select(labels, ~labels.crowd)
    if not target.has_difficult and labels.difficult.any():
        changes["marks of difficult objects were left out"] += int(labels.difficult.sum())
        labels = replace(labels, difficult=np.zeros(len(labels), np.bool_))
    if not labels.outlines:
        return labels
    if kind == "horizontal":
        return replace(labels, outlines=())
    if kind == "rotated":
        kept = [_rotated_outline(labels, index, target.has_corners, changes) for index in range(len(labels))]
        return replace(labels, outlines=tuple(kept) if any(kept) else (), areas=None)
    if to_format == "yolo_obb":
        return replace(labels, outlines=tuple(_one_ring(outline, changes) for outline in labels.outlines))
    if to_format == "coco" and image.size is not None:
        size = image.size
        holed = [not is_plain(outline) and not is_pixel_mask(outline, *size) for outline in labels.outlines]
        changes.update({"outlines with holes were cut into pixels": sum(holed)} if any(holed) else {})
    return labels


def _count_enclosed(found: LabelSet) -> Counter[str]:
    """Count the objects of a set, read with outlines, of whose shape an enclosing box says less."""
    changes: Counter[str] = Counter()
    for image in found.images:
        corners = object_corners(image.labels)
        ends = np.stack([corners.min(axis=1), corners.max(axis=1)])[:, :, None]
        is_upright = (np.abs(corners - ends) < _SAME_PX).any(axis=0).all(axis=(1, 2))
        outlines = image.labels.outlines or [()] * len(image.labels)
        is_quad = np.array([not outline or four_corners(outline) is not None for outline in outlines], np.bool_)
        changes["outlines became enclosing boxes"] += int((~is_quad).sum())
        changes["rotated boxes became enclosing boxes"] += int((is_quad & ~is_upright).sum())
    return +changes


def _select(labels: ImageLabels, kept: Any) -> ImageLabels:
    """Return the labels of which ``kept`` (N,) bool says so."""
    indices = np.flatnonzero(kept).tolist()
    return replace(
        labels,
        boxes=labels.boxes[indices],
        class_names=tuple(labels.class_names[index] for index in indices),
        difficult=labels.difficult[indices],
        crowd=labels.crowd[indices],
        numbers=labels.numbers[indices],
        outlines=tuple(labels.outlines[index] for index in indices) if labels.outlines else (),
        areas=None if labels.areas is None else labels.areas[indices],
    )


def _rotated_outline(labels: ImageLabels, index: int, has_corners: bool, changes: Counter[str]) -> Outline:
    """Return an outline that a format of quadrilaterals, or of rotated boxes, can hold; () leaves the box."""
    outline = labels.outlines[index]
    if not outline:
        return ()
    corners = four_corners(outline)
    if corners is None:
        changes["outlines became rectangles of least area"] += 1
        return ()
    if has_corners:
        return outline
    box = box_corners(labels.boxes[index : index + 1])[0]
    gaps = np.hypot(*np.moveaxis(corners[:, None] - box, -1, 0)).min(axis=1)
    if gaps.max() > _SAME_PX:
        changes["quadrilaterals became rectangles of least area"] += 1
    return ()


def _one_ring(outline: Outline, changes: Counter[str]) -> Outline:
    """Return an outline of a single ring: the convex hull of one that has more."""
    if not outline or (len(outline) == 1 and len(outline[0]) == 1):
        return outline
    changes["outlines in several rings became their convex hulls"] += 1
    return ((convex_hull(outline_points(outline)),),)


def _hyphened(name: str) -> str:
    return "-".join(name.split())


def _joined_names(found: LabelSet, changes: Counter[str]) -> LabelSet:
    """Return the set with hyphens for white space in names of classes, as DOTA writes them.

    Raises:
        ConfigError: two names become one.
    """
    new = {name: _hyphened(name) for name in found.classes}
    spaced = {name for name, word in new.items() if name != word}
    if not spaced:
        return found
    if len(set(new.values())) != len(new):
        raise ConfigError(f"names of classes fall together with hyphens for spaces: {', '.join(sorted(spaced))}")
    images = []
    for image in found.images:
        names = image.labels.class_names
        changes["objects got hyphens for the spaces in their class's name"] += sum(name in spaced for name in names)
        images.append(replace(image, labels=replace(image.labels, class_names=tuple(new[name] for name in names))))
    return LabelSet(tuple(images), tuple(new.values()))


def _check_classes(found: LabelSet, classes: Sequence[str], to_format: ConvertFormat) -> None:
    """Refuse labels of classes that the target does not have.

    Raises:
        ConfigError: there are some; the message names and counts them.
    """
    counts: Counter[str] = Counter()
    first = ""
    for image in found.images:
        for index, name in enumerate(image.labels.class_names):
            if name not in classes or (to_format == "hrsc" and hrsc_class_id(name) is None):
                counts[name] += 1
                first = first or image.labels.place(index)
    if counts:
        named = ", ".join(f"{name!r} ({number})" for name, number in counts.most_common(10))
        lacking = "HRSC2016 does not have" if to_format == "hrsc" else "the list of classes lacks"
        remedy = "rename them, or name more classes"
        if to_format == "hrsc":
            remedy = "rename them to ship or one of its kinds; --classes ship names objects whose labels name no class"
        raise ConfigError(
            f"{sum(counts.values())} objects have classes that {lacking}: {named}; the first is at {first}: {remedy}"
        )


def _check_sizes(found: LabelSet, to_format: ConvertFormat) -> None:
    for image in found.images:
        if image.size is None:
            raise ConfigError(
                f"{to_format} wants the sizes of images, which {str(image.labels.path)!r} does not state: name the "
                "folder of the images with --images"
            )


@dataclass(frozen=True)
class _Writer:
    """Writes sets of one format but gis."""

    to_format: ConvertFormat
    kind: Kind
    classes: tuple[str, ...]
    corner_order: CornerOrder
    angle: AngleConvention
    headers: Mapping[str, Sequence[str]]

    def write(self, found: LabelSet, target: Path) -> None:
        """Write a file or a folder, whole or not at all."""
        if self.to_format == "coco":
            with staged_output(target) as staged:
                write_coco(staged, found.images, self.classes, self.kind, corner_order=self.corner_order)
            return
        suffix = LABEL_SUFFIXES[self.to_format]
        if target.suffix.lower() == suffix:
            if len(found.images) != 1:
                raise OutputError(f"{len(found.images)} images do not go into one file {str(target)!r}: name a folder")
            with staged_output(target) as staged:
                self._write_one(staged, found.images[0])
            return
        stems = Counter(image.stem for image in found.images)
        twice = sorted(stem for stem, number in stems.items() if number > 1)
        if twice:
            raise AnnotationError(f"images share the names {', '.join(twice[:5])}, by which label files are called")
        with staged_folder(target) as folder:
            for image in found.images:
                self._write_one(folder / (image.stem + suffix), image)
            if self.to_format == "yolo_obb":
                write_lines(folder / CLASS_LIST, self.classes)

    def _write_one(self, path: Path, image: SetImage) -> None:
        labels, (width, height) = image.labels, image.size or (0, 0)
        if self.to_format == "dota":
            write_dota(path, labels, self.corner_order, self.headers.get(image.stem, ()))
        elif self.to_format == "rbox":
            write_rbox(path, labels, angle=self.angle)
        elif self.to_format == "hrsc":
            write_hrsc(path, labels, image.name, image.size)
        elif self.to_format == "yolo_obb":
            order = self.corner_order
            write_yolo(path, labels, width, height, self.classes, self.kind, corner_order=order)
        else:
            write_voc(path, labels, image.name, width, height, is_rotated=self.to_format == "rolabelimg")


def _summary(target: Path, found: LabelSet, classes: Sequence[str], changes: Counter[str]) -> dict[str, Any]:
    counts = Counter(name for image in found.images for name in image.labels.class_names)
    return {
        "out": str(target),
        "num_images": len(found.images),
        "num_objects": counts.total(),
        "num_by_class": {name: counts[name] for name in classes},
        "num_difficult": sum(int(image.labels.difficult.sum()) for image in found.images),
        "num_crowd": sum(int(image.labels.crowd.sum()) for image in found.images),
        "changes": dict(changes),
    }
