"""A part of a data set - what trains, or what validates: images matched with their labels, and what is wrong with them.

Images and label files lie in one folder each, matched by name without ending; a COCO file names its images itself. An
image without a label file is background in ``yolo_obb``, as YOLO takes it, and not part of the data set in the other
formats, where an empty file says background; with a list of ids it must have one. Sizes come from the images' headers.
What the numbers of ``yolo_obb`` mean is said by ``classes.txt`` beside the label files, or else by the model's classes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rtmdet_geo.annotations.coco import image_labels, read_coco
from rtmdet_geo.annotations.dota import read_dota
from rtmdet_geo.annotations.findings import Findings
from rtmdet_geo.annotations.hrsc import HrscLevel, read_hrsc
from rtmdet_geo.annotations.label_sets import CLASS_LIST, read_class_list
from rtmdet_geo.annotations.labels import ImageLabels, make_labels
from rtmdet_geo.annotations.rbox import read_rbox
from rtmdet_geo.annotations.voc import read_voc
from rtmdet_geo.annotations.yolo import read_yolo
from rtmdet_geo.config import recipe_folder
from rtmdet_geo.errors import AnnotationError, ConfigError, DatasetNotFoundError
from rtmdet_geo.pictures import IMAGE_SUFFIXES, image_size, image_stem
from rtmdet_geo.structures import Kind

if TYPE_CHECKING:
    from rtmdet_geo.recipe_sections import DataSection, ModelSection

LabelFormat = Literal["coco", "dota", "hrsc", "yolo_obb", "rbox", "voc"]
Part = Literal["train", "val"]


@dataclass(frozen=True)
class PartSource:
    """Where a part of a data set lies.

    Attributes:
        format: of the label files.
        images: folder.
        labels: folder with a file per image, or the file (coco).
        ids: text file with one image name a line, with or without its ending, to take these only.
        classes: names of the model; None takes every class there is.
        kind: of the model.
        hrsc_level: level of HRSC2016's classes.
        with_outlines: labels of dota and yolo_obb keep their outlines, whatever the kind.
    """

    format: LabelFormat
    images: Path
    labels: Path
    ids: Path | None = None
    classes: tuple[str, ...] | None = None
    kind: Kind = "rotated"
    hrsc_level: HrscLevel = 1
    with_outlines: bool = False


@dataclass(frozen=True)
class LabelledFile:
    """An image file and its labels.

    Attributes:
        path: of the image.
        name: of the image below the folder of images.
        width: in px.
        height: in px.
        labels: as its file has them.
    """

    path: Path
    name: str
    width: int
    height: int
    labels: ImageLabels


def part_source(data: DataSection, model: ModelSection, part: Part) -> PartSource:
    """Return where a part of a recipe's data lies; paths are below ``data.root``.

    Raises:
        ConfigError: the format has no label files, or the section does not name the part.
    """
    if data.format == "chips" or data.format == "folders":
        raise ConfigError(f"data.format {data.format} has no label files of images")
    images, labels, ids = (
        (data.train_images, data.train_labels, data.train_ids)
        if part == "train"
        else (data.val_images, data.val_labels, data.val_ids)
    )
    if images is None or labels is None:
        raise ConfigError(f"data.{part}_images or data.{part}_labels is missing")
    root = Path(data.root)
    return PartSource(
        data.format,
        root / images,
        root / labels,
        None if ids is None else find_ids(ids, root),
        model.classes,
        model.object_kind,
        data.hrsc_level,
    )


def find_ids(ids: str, root: Path) -> Path:
    """Return the list of images of that name: below the data's root, or else one that comes with the recipes."""
    packaged = recipe_folder() / ids
    return packaged if packaged.is_file() and not (root / ids).is_file() else root / ids


def read_part(source: PartSource, findings: Findings) -> list[LabelledFile]:
    """Read all labels of a part and the headers of its images.

    Args:
        source: what to read.
        findings: takes note of files that are left out because something is wrong with them.

    Returns:
        Images in the order of their names (coco: of the file).

    Raises:
        DatasetNotFoundError: a folder or file is missing, or there are no images or no labels at all.
        AnnotationError: the COCO file as a whole, or the list of ids, cannot be read.
    """
    if not source.images.is_dir():
        raise DatasetNotFoundError(
            f"folder of images {str(source.images)!r} is missing: check the recipe's data section"
        )
    wanted = None if source.ids is None else read_ids(source.ids)
    pairs = _coco_pairs(source, wanted, findings) if source.format == "coco" else _pairs(source, wanted, findings)
    return [file for file in pairs if _has_stated_size(file, findings)]


def read_ids(path: Path) -> list[str]:
    """Return the names of images in a list, one a line.

    Raises:
        DatasetNotFoundError: there is no such file, or no name in it.
    """
    if not path.is_file():
        raise DatasetNotFoundError(f"list of images {str(path)!r} is missing: check the recipe's data section")
    names = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    if not names:
        raise DatasetNotFoundError(f"list of images {str(path)!r} is empty")
    return names


def _pairs(source: PartSource, wanted: list[str] | None, findings: Findings) -> Iterator[LabelledFile]:
    """Yield the images of a folder with their label files; yolo_obb: also those without."""
    if source.format == "yolo_obb" and (source.labels / CLASS_LIST).is_file():
        source = replace(source, classes=read_class_list(source.labels / CLASS_LIST))
    images = _by_stem(source.images, IMAGE_SUFFIXES, findings)
    if not images:
        raise DatasetNotFoundError(
            f"no images in {str(source.images)!r}: it should hold {', '.join(sorted(IMAGE_SUFFIXES))} files"
        )
    suffix = ".xml" if source.format in ("hrsc", "voc") else ".txt"
    if not source.labels.is_dir():
        raise DatasetNotFoundError(
            f"folder of labels {str(source.labels)!r} is missing: check the recipe's data section"
        )
    labels = _by_stem(source.labels, {suffix}, findings)
    if not labels:
        raise DatasetNotFoundError(
            f"no label files (*{suffix}) in {str(source.labels)!r}: is the format {source.format}?"
        )
    if wanted is None:
        if not set(labels) & set(images):
            raise _strangers(source, min(images.values()).name, min(labels.values()).name)
        stems = sorted(images)
        for stem in sorted(set(labels) - set(images)):
            findings.add("labels without image", str(labels[stem]), f"{str(source.images)!r} has no image of that name")
    else:
        stems = list(dict.fromkeys(image_stem(name) for name in wanted))
    for stem in stems:
        if stem not in images:
            findings.add("labels without image", str(source.ids), f"{stem!r} is not in {str(source.images)!r}")
        elif stem in labels or source.format == "yolo_obb":
            yield from _read_pair(source, images[stem], labels.get(stem), findings)
        elif wanted is None:
            findings.add("image without labels", str(images[stem]), f"{str(source.labels)!r} has no {stem}{suffix}")
        else:
            findings.add(
                "malformed labels", str(source.ids), f"{stem!r} has no {stem}{suffix} in {str(source.labels)!r}"
            )


def _strangers(source: PartSource, image: str, label: str) -> DatasetNotFoundError:
    """Return the error of folders that do not belong together, with a name from each."""
    return DatasetNotFoundError(
        f"no image in {str(source.images)!r} (such as {image!r}) has the name of one in {str(source.labels)!r} (such "
        f"as {label!r}): name the two folders that belong together"
    )


def _by_stem(folder: Path, suffixes: frozenset[str] | set[str], findings: Findings) -> dict[str, Path]:
    """Return the files of a folder by name without ending; of several that differ in the ending only, the first."""
    found: dict[str, Path] = {}
    for name in sorted(os.listdir(folder)):
        stem, suffix = os.path.splitext(name)
        if suffix.lower() not in suffixes or name.startswith(".") or name == CLASS_LIST:
            continue
        if stem in found:
            findings.add("ambiguous image", str(folder / name), f"it shares its labels with {found[stem].name}")
        else:
            found[stem] = folder / name
    return found


def _read_pair(source: PartSource, image: Path, labels: Path | None, findings: Findings) -> Iterator[LabelledFile]:
    size = _size(image, findings)
    if size is None:
        return
    if labels is None:
        findings.add("image without labels", str(image), f"{str(source.labels)!r} has no {image.stem}.txt")
    try:
        found = make_labels(image, [], [], []) if labels is None else _read_labels(source, labels, size)
    except AnnotationError as error:
        findings.add("malformed labels", *_placed(labels or image, error))
        return
    yield LabelledFile(image, image.name, *size, found)


def _read_labels(source: PartSource, path: Path, size: tuple[int, int]) -> ImageLabels:
    if source.format == "dota":
        return read_dota(path, source.kind, with_outlines=source.with_outlines)
    if source.format == "hrsc":
        return read_hrsc(path, source.hrsc_level, source.kind)
    if source.format == "yolo_obb":
        return read_yolo(path, *size, source.classes, source.kind, with_outlines=source.with_outlines)
    if source.format == "voc":
        return read_voc(path, source.kind)
    return read_rbox(path, source.classes[0] if source.classes else "object", source.kind)


def _coco_pairs(source: PartSource, wanted: list[str] | None, findings: Findings) -> Iterator[LabelledFile]:
    """Yield the images that a COCO file names."""
    if not source.labels.is_file():
        raise DatasetNotFoundError(f"label file {str(source.labels)!r} is missing: check the recipe's data section")

    def note(error: AnnotationError) -> None:
        findings.add("malformed labels", str(source.labels), _without(f"label file {str(source.labels)!r}, ", error))

    content = read_coco(source.labels, note)
    if not content.images:
        raise DatasetNotFoundError(f"label file {str(source.labels)!r} names no images")
    unseen = None if wanted is None else {image_stem(name) for name in wanted}
    stems = {image_stem(str(image.get("file_name", ""))) for image in content.images.values()}
    for stem in sorted((unseen or set()) - stems):
        findings.add("labels without image", str(source.ids), f"{stem!r} is not among the images of {source.labels}")
    files = sorted(name for name in os.listdir(source.images) if Path(name).suffix.lower() in IMAGE_SUFFIXES)
    names = [str(image.get("file_name") or "") for image in content.images.values()]
    if wanted is None and files and any(names) and not any((source.images / name).is_file() for name in names if name):
        raise _strangers(source, files[0], next(filter(None, names)))
    for image_id, image in content.images.items():
        name = str(image.get("file_name") or "")
        if not name:
            findings.add("malformed labels", f"{source.labels}, image {image_id}", "it has no file_name")
            continue
        if unseen is not None and image_stem(name) not in unseen:
            continue
        path = source.images / name
        if not path.is_file():
            findings.add("labels without image", f"{source.labels}, image {image_id}", f"{str(path)!r} is missing")
            continue
        size = _size(path, findings)
        if size is not None:
            yield LabelledFile(
                path, name, *size, image_labels(source.labels, image, content.objects[image_id], source.kind)
            )
    named = {str(image.get("file_name")) for image in content.images.values()}
    for name in sorted(set(os.listdir(source.images)) - named) if wanted is None else ():
        if Path(name).suffix.lower() in IMAGE_SUFFIXES:
            findings.add("image without labels", str(source.images / name), f"{source.labels} does not name it")


def _size(image: Path, findings: Findings) -> tuple[int, int] | None:
    try:
        return image_size(image)
    except AnnotationError as error:
        findings.add("broken image", str(image), str(error))
        return None


def _has_stated_size(file: LabelledFile, findings: Findings) -> bool:
    stated = file.labels.size
    if stated is None or stated == (file.width, file.height):
        return True
    hint = ", turned by 90 degrees" if stated == (file.height, file.width) else ""
    findings.add(
        "other image size",
        str(file.path),
        f"it is {file.width} x {file.height} px, {file.labels.path} says {stated[0]} x {stated[1]} px{hint}",
    )
    return False


def _placed(path: Path, error: AnnotationError) -> tuple[str, str]:
    """Return the place, with a line where there is one, and the text of an error in a label file."""
    found = re.fullmatch(rf"({re.escape(str(path))}(?::\d+)?): (.*)", str(error), re.DOTALL)
    return (found[1], found[2]) if found else (str(path), str(error))


def _without(place: str, error: AnnotationError) -> str:
    """Return an error's message without the place that it begins with."""
    return str(error).removeprefix(place).removeprefix(": ")
