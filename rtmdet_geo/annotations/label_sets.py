"""Whole sets of label files, read with everything that another format can hold.

Unlike :mod:`rtmdet_geo.annotations.parts`, which reads for training, images need not be there, and nothing is passed
over: a label file that is wrong stops the reading.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from rtmdet_geo.annotations.angles import AngleConvention
from rtmdet_geo.annotations.coco import NO_ID, CocoLabels, image_labels, read_coco
from rtmdet_geo.annotations.dota import read_dota
from rtmdet_geo.annotations.hrsc import HrscLevel, read_hrsc
from rtmdet_geo.annotations.labels import ImageLabels, make_labels
from rtmdet_geo.annotations.rbox import read_rbox
from rtmdet_geo.annotations.voc import read_voc
from rtmdet_geo.annotations.yolo import read_yolo
from rtmdet_geo.class_names import KNOWN
from rtmdet_geo.errors import AnnotationError, ConfigError, DatasetNotFoundError, RasterError
from rtmdet_geo.pictures import IMAGE_SUFFIXES, image_size, image_stem
from rtmdet_geo.structures import Kind

#: Formats that are converted; "voc" and "rolabelimg" are read alike, "gis" is a vector layer over georeferenced images.
ConvertFormat = Literal["coco", "dota", "hrsc", "yolo_obb", "rbox", "voc", "rolabelimg", "gis"]
FORMATS: tuple[ConvertFormat, ...] = get_args(ConvertFormat)

#: Ending of label files, of formats with a file per image.
LABEL_SUFFIXES: dict[ConvertFormat, str] = {
    "dota": ".txt",
    "hrsc": ".xml",
    "yolo_obb": ".txt",
    "rbox": ".txt",
    "voc": ".xml",
    "rolabelimg": ".xml",
}
#: Names of classes by index, which labelling programs put beside YOLO's label files.
CLASS_LIST = "classes.txt"


@dataclass(frozen=True)
class SetImage:
    """An image and its labels.

    Attributes:
        name: of the image file; without an ending where neither labels nor images say it.
        size: width and height in px; None where neither labels nor images say it.
        labels: least-area boxes or enclosing ones, as the set was read for, and outlines.
    """

    name: str
    size: tuple[int, int] | None
    labels: ImageLabels

    @property
    def stem(self) -> str:
        """Name without folders and ending, by which label files are called."""
        return image_stem(self.name)


@dataclass(frozen=True)
class LabelSet:
    """Labelled images in order, and the names of all classes in label order."""

    images: tuple[SetImage, ...]
    classes: tuple[str, ...]


@dataclass(frozen=True)
class ReadOptions:
    """What files do not say of themselves.

    Attributes:
        kind: "horizontal" reads enclosing boxes without outlines (of a layer with them), others least-area boxes with
            all outlines there are.
        classes: names by index (yolo_obb), or of the only class (rbox without names).
        angle: convention of rbox.
        hrsc_level: of HRSC2016's classes.
        counts_from_one: Pascal VOC boxes name pixels, from 1 on.
        class_column: of a layer.
        layer: its name where a file has several.
    """

    kind: Kind = "rotated"
    classes: tuple[str, ...] | None = None
    angle: AngleConvention = field(default_factory=AngleConvention)
    hrsc_level: HrscLevel = 1
    counts_from_one: bool = False
    class_column: str | None = None
    layer: str | None = None


def read_label_set(
    source: Path,
    label_format: ConvertFormat,
    images: Path | None = None,
    options: ReadOptions | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LabelSet:
    """Read a folder of label files, one label file, a COCO file or a layer.

    Args:
        source: of the labels.
        label_format: of the source.
        images: folder of the images, whose headers say how large they are; needed by yolo_obb and gis. Every label
            file must have its image there. Images without a label file are background in yolo_obb and not part of the
            set in other formats.
        options: what the files do not say.
        progress: called with label files read and in all.

    Raises:
        DatasetNotFoundError: a folder or file is missing or empty.
        AnnotationError: a label file is malformed, has no image, or speaks of another size than the image has.
        ConfigError: images are needed, or names of classes.
    """
    options = options or ReadOptions()
    if not source.exists():
        raise DatasetNotFoundError(f"labels {str(source)!r} are missing: check the path")
    if images is not None and not images.is_dir():
        raise DatasetNotFoundError(f"folder of images {str(images)!r} is missing: check the path")
    if label_format == "gis":
        if images is None:
            raise ConfigError("a layer has no pixels: name the folder of its georeferenced images with --images")
        from rtmdet_geo.gis_convert import read_label_layer

        return read_label_layer(source, images, options, progress)
    if label_format == "coco":
        return _read_coco_set(source, images, options)
    return _read_files(source, label_format, images, options, progress)


def size_of_image(path: Path) -> tuple[int, int]:
    """Return width and height in px as a file's header has them; of GeoTIFFs with any bands and bits, too.

    Raises:
        AnnotationError: the file is missing or no image.
    """
    try:
        return image_size(path)
    except AnnotationError as error:
        if path.suffix.lower() not in (".tif", ".tiff") or not path.is_file():
            raise
        from rtmdet_geo.raster import describe_scene

        try:
            about = describe_scene(path)
        except RasterError:
            raise error from None
        return int(about["width"]), int(about["height"])


def images_by_stem(folder: Path) -> dict[str, Path]:
    """Return the image files of a folder by name without ending, sorted.

    Raises:
        DatasetNotFoundError: there are none.
        AnnotationError: two differ in the ending only.
    """
    found: dict[str, Path] = {}
    for name in sorted(os.listdir(folder)):
        stem, suffix = os.path.splitext(name)
        if suffix.lower() not in IMAGE_SUFFIXES or name.startswith("."):
            continue
        if stem in found:
            raise AnnotationError(
                f"images {found[stem].name!r} and {name!r} in {str(folder)!r} would share their labels"
            )
        found[stem] = folder / name
    if not found:
        raise DatasetNotFoundError(f"no images in {str(folder)!r}: it should hold {', '.join(sorted(IMAGE_SUFFIXES))}")
    return found


def _read_files(
    source: Path,
    label_format: ConvertFormat,
    images: Path | None,
    options: ReadOptions,
    progress: Callable[[int, int], None] | None,
) -> LabelSet:
    """Read a set with a file per image."""
    suffix = LABEL_SUFFIXES[label_format]
    paths = {source.stem: source} if source.is_file() else _label_files(source, suffix, label_format)
    pictures = None if images is None else images_by_stem(images)
    names = options.classes
    if label_format == "yolo_obb":
        if pictures is None:
            raise ConfigError("yolo_obb counts in shares of the images' sides: name their folder with --images")
        names = _yolo_classes(source, options.classes)
    stems = list(paths)
    if label_format == "yolo_obb" and source.is_dir():
        stems = sorted({*paths, *(pictures or {})})
    found = []
    for number, stem in enumerate(stems, 1):
        picture = None if pictures is None else pictures.get(stem)
        if pictures is not None and picture is None:
            raise AnnotationError(f"{paths[stem]}: {str(images)!r} has no image of that name")
        size = None if picture is None else size_of_image(picture)
        if stem in paths:
            labels = _read_one(paths[stem], label_format, size, names, options)
        else:
            labels = make_labels(picture or source, [], [], [])
        found.append(SetImage(stem if picture is None else picture.name, _agreed(labels, size), labels))
        if progress is not None:
            progress(number, len(stems))
    if label_format != "yolo_obb":
        names = tuple(sorted({name for image in found for name in image.labels.class_names}))
    return LabelSet(tuple(found), names or ())


def _label_files(folder: Path, suffix: str, label_format: str) -> dict[str, Path]:
    """Return the label files of a folder by name without ending, sorted."""
    names = [name for name in sorted(os.listdir(folder)) if name != CLASS_LIST and not name.startswith(".")]
    found = {Path(name).stem: folder / name for name in names if Path(name).suffix.lower() == suffix}
    if not found:
        raise DatasetNotFoundError(f"no label files (*{suffix}) in {str(folder)!r}: is the format {label_format}?")
    return found


def _yolo_classes(source: Path, classes: tuple[str, ...] | None) -> tuple[str, ...]:
    """Return the names that the numbers of YOLO files mean: of the list beside them, or the ones given."""
    path = (source if source.is_dir() else source.parent) / CLASS_LIST
    if path.is_file():
        return read_class_list(path)
    if classes is None:
        raise ConfigError(f"yolo_obb has numbers for classes: name them with --classes, or in {str(path)!r}")
    return classes


def find_classes(text: str) -> tuple[str, ...]:
    """Return names of classes: of a public list ("dota_v1.0"), of a file with one a line, or written with commas.

    Raises:
        AnnotationError: the file cannot be read, or there are no names or equal ones.
    """
    if text in KNOWN:
        return KNOWN[text]
    if Path(text).is_file():
        return read_class_list(Path(text))
    names = tuple(name.strip() for name in text.split(","))
    if not all(names) or len(set(names)) != len(names):
        raise AnnotationError(
            f"classes {text!r} are no different names, no file and none of the public lists {', '.join(KNOWN)}"
        )
    return names


def read_class_list(path: Path) -> tuple[str, ...]:
    """Return the names in a text file, one a line.

    Raises:
        AnnotationError: the file cannot be read, is empty, or has a name twice.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise AnnotationError(f"list of classes {str(path)!r} cannot be read: {error}") from error
    except UnicodeDecodeError as error:
        raise AnnotationError(f"{path} is not text ({error.reason} at byte {error.start})") from error
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        name = line.strip()
        if name and seen.setdefault(name, number) != number:
            raise AnnotationError(f"{path}:{number}: class {name!r} stands in line {seen[name]} already")
    if not seen:
        raise AnnotationError(f"{path} names no class; write one a line")
    return tuple(seen)


def _read_one(
    path: Path,
    label_format: ConvertFormat,
    size: tuple[int, int] | None,
    names: Sequence[str] | None,
    options: ReadOptions,
) -> ImageLabels:
    with_outlines = options.kind != "horizontal"
    kind: Kind = "rotated" if with_outlines else "horizontal"
    if label_format == "dota":
        return read_dota(path, kind, with_outlines=with_outlines)
    if label_format == "hrsc":
        return read_hrsc(path, options.hrsc_level, kind)
    if label_format == "rbox":
        only = names[0] if names is not None and len(names) == 1 else "object"
        return read_rbox(path, only, kind, angle=options.angle)
    if label_format == "yolo_obb":
        assert size is not None
        labels = read_yolo(path, *size, names, kind, with_outlines=with_outlines)
        unknown = [index for index, name in enumerate(labels.class_names) if name not in (names or ())]
        if unknown:
            name = labels.class_names[unknown[0]]
            raise AnnotationError(f"{labels.place(unknown[0])}: {name} has no name; there are {len(names or ())}")
        return labels
    return read_voc(path, kind, counts_from_one=options.counts_from_one)


def _read_coco_set(source: Path, images: Path | None, options: ReadOptions) -> LabelSet:
    content = read_coco(source)
    _check_annotation_ids(source, content)
    with_outlines = options.kind != "horizontal"
    kind: Kind = "rotated" if with_outlines else "horizontal"
    found = []
    for image_id, image in content.images.items():
        name = str(image.get("file_name") or "")
        if not name:
            raise AnnotationError(f"{source}, image {image_id}: it has no file_name")
        labels = image_labels(source, image, content.objects[image_id], kind, with_outlines=with_outlines)
        found.append(SetImage(name, _agreed(labels, _picture_size(source, image_id, name, images)), labels))
    if not found:
        raise DatasetNotFoundError(f"label file {str(source)!r} names no images")
    return LabelSet(tuple(found), content.classes)


def _check_annotation_ids(source: Path, content: CocoLabels) -> None:
    """Refuse annotations that share an id: programs that keep them by id lose all but one.

    Raises:
        AnnotationError: two do; annotations without id may be any number.
    """
    counts = Counter(entry.annotation_id for entries in content.objects.values() for entry in entries)
    counts.pop(NO_ID, None)
    twice = [annotation_id for annotation_id, number in counts.items() if number > 1]
    if twice:
        raise AnnotationError(
            f"{source}: {counts[twice[0]]} annotations have the id {twice[0]} ({len(twice)} ids are not unique): "
            "number them anew"
        )


def _picture_size(source: Path, image_id: int, name: str, images: Path | None) -> tuple[int, int] | None:
    if images is None:
        return None
    if not (images / name).is_file():
        raise AnnotationError(f"{source}, image {image_id}: {str(images / name)!r} is missing")
    return size_of_image(images / name)


def _agreed(labels: ImageLabels, size: tuple[int, int] | None) -> tuple[int, int] | None:
    """Return the size of an image by its labels and by its header.

    Raises:
        AnnotationError: they differ.
    """
    stated = labels.size
    if stated is not None and size is not None and stated != size:
        raise AnnotationError(
            f"{labels.path} says {stated[0]} x {stated[1]} px, the image is {size[0]} x {size[1]} px: the labels are "
            "of another version"
        )
    return size or stated
