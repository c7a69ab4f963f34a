"""Pascal VOC XML files, and those of labelImg, roLabelImg and labelImg2 with rotated boxes.

An ``object`` has either ``bndbox`` (``xmin ymin xmax ymax``) or ``robndbox`` (``cx cy w h angle``). Before a turn,
w lies along x; the angle, in rad, turns it clockwise on screen. roLabelImg writes angles in [0, pi), labelImg2 in
[0, 2 pi), whose front is the side that faces up at angle 0 (``libs/shape.py`` and ``libs/pascal_voc_io.py`` of both).
That is the convention of :mod:`rtmdet_geo.boxes`. Which end is the front is not kept.

Coordinates are continuous, as labelImg and its kin draw them: ``xmax - xmin`` is the width. The files of the Pascal VOC
challenge mean pixels instead, counted from 1, the last one included (http://host.robots.ox.ac.uk/pascal/VOC/); such
files are read with ``counts_from_one``.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rtmdet_geo.annotations.labels import (
    ImageLabels,
    enclosing_hboxes,
    hboxes_to_le90,
    make_labels,
    number_text,
    parse_difficult,
    parse_floats,
)
from rtmdet_geo.annotations.xml_files import add_fields, field_text, read_tree, stated_size, write_tree
from rtmdet_geo.boxes import boxes_to_hboxes, regularize_le90
from rtmdet_geo.errors import AnnotationError
from rtmdet_geo.structures import Kind

_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_ROTATED = ("cx", "cy", "w", "h", "angle")


def read_voc(path: Path, kind: Kind = "rotated", *, counts_from_one: bool = False) -> ImageLabels:
    """Read a file of boxes, rotated boxes, or both.

    Args:
        path: of the file.
        kind: of the model that the boxes are for, see :class:`rtmdet_geo.annotations.labels.ImageLabels`.
        counts_from_one: ``bndbox`` names pixels, from 1 on, as in the Pascal VOC challenge.

    Raises:
        AnnotationError: not XML, no annotation, or an object lacks a field; the message begins with the file.
    """
    root = read_tree(path)
    if root.tag != "annotation":
        raise AnnotationError(f"{path} is not of Pascal VOC: it needs annotation, not {root.tag!r}")
    boxes, names, difficult = [np.zeros((0, 5))], [], []
    for number, entry in enumerate(root.findall("object"), 1):
        place = f"{path}, object {number}"
        boxes.append(_box(entry, kind, counts_from_one, place))
        names.append(field_text(entry, "name", place))
        difficult.append(parse_difficult((entry.findtext("difficult") or "0").strip(), place))
    size = stated_size(root, ("size/width", "size/height"), path)
    numbers = range(1, len(names) + 1)
    return make_labels(path, np.concatenate(boxes), names, numbers, difficult=difficult, unit="object", size=size)


def _box(entry: ElementTree.Element, kind: Kind, counts_from_one: bool, place: str) -> NDArray[np.float64]:
    """Return the le90 box (1, 5) of an object."""
    rotated, upright = entry.find("robndbox"), entry.find("bndbox")
    if rotated is not None:
        box = parse_floats([field_text(rotated, field, place) for field in _ROTATED], place)
        if box[2] < 0 or box[3] < 0:
            raise AnnotationError(f"{place}: sides {box[2]:g} x {box[3]:g} px are negative")
        return regularize_le90([box]) if kind == "rotated" else hboxes_to_le90(boxes_to_hboxes([box]))
    if upright is None:
        raise AnnotationError(f"{place}: it has neither bndbox nor robndbox")
    left, top, right, bottom = parse_floats([field_text(upright, field, place) for field in _CORNERS], place)
    if counts_from_one:
        left, top = left - 1, top - 1
    if right < left or bottom < top:
        raise AnnotationError(f"{place}: sides {right - left:g} x {bottom - top:g} px are negative")
    return hboxes_to_le90([[left, top, right, bottom]])


def write_voc(
    path: Path, labels: ImageLabels, image_name: str, width: int, height: int, *, is_rotated: bool = False
) -> None:
    """Write a file of boxes, or of rotated boxes, with all digits; a crowd is difficult.

    Args:
        path: of the file.
        labels: outlines are not written.
        image_name: of the image.
        width: of the image in px.
        height: of the image in px.
        is_rotated: write ``robndbox``, the angle in [0, pi), w the long side; else ``bndbox``, the enclosing boxes.

    Raises:
        OutputError: the file cannot be written.
    """
    root = ElementTree.Element("annotation")
    add_fields(root, {"folder": "", "filename": image_name})
    add_fields(ElementTree.SubElement(root, "source"), {"database": "Unknown"})
    add_fields(ElementTree.SubElement(root, "size"), {"width": width, "height": height, "depth": 3})
    add_fields(root, {"segmented": 0})
    hboxes = enclosing_hboxes(labels)
    outside = np.any((hboxes < 0) | (hboxes > [width, height, width, height]), axis=1).tolist()
    boxes = labels.boxes.copy()
    boxes[:, 4] = np.where(boxes[:, 4] < 0, boxes[:, 4] + np.pi, boxes[:, 4])
    tag, fields, rows = ("robndbox", _ROTATED, boxes) if is_rotated else ("bndbox", _CORNERS, hboxes)
    for index, name in enumerate(labels.class_names):
        entry = ElementTree.SubElement(root, "object")
        is_difficult = labels.difficult[index] or labels.crowd[index]
        add_fields(
            entry,
            {
                "type": tag,
                "name": name,
                "pose": "Unspecified",
                "truncated": int(outside[index]),
                "difficult": int(is_difficult),
            },
        )
        texts = map(number_text, rows[index].tolist())
        add_fields(ElementTree.SubElement(entry, tag), dict(zip(fields, texts, strict=True)))
    write_tree(root, path)
