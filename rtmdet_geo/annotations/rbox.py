"""Rotated boxes as text: one line an object, ``cx cy w h angle [class [difficult]]``, px and rad.

The angle is positive clockwise on screen (:mod:`rtmdet_geo.boxes`); w need not be the long side.
"""

from __future__ import annotations

from pathlib import Path

from rtmdet_geo.annotations.labels import (
    ImageLabels,
    hboxes_to_le90,
    make_labels,
    parse_difficult,
    parse_floats,
    read_lines,
)
from rtmdet_geo.boxes import boxes_to_hboxes, regularize_le90
from rtmdet_geo.errors import AnnotationError
from rtmdet_geo.structures import Kind


def read_rbox(path: Path, default_class: str, kind: Kind = "rotated") -> ImageLabels:
    """Read a file of rotated boxes.

    Args:
        path: of the file.
        default_class: name of objects whose line gives none.
        kind: of the model that the boxes are for, see :class:`rtmdet_geo.annotations.labels.ImageLabels`.

    Raises:
        AnnotationError: a line is malformed; the message begins with file and line.
    """
    boxes, names, numbers, difficult = [], [], [], []
    for number, words in read_lines(path):
        place = f"{path}:{number}"
        if not 5 <= len(words) <= 7:
            raise AnnotationError(f"{place}: {len(words)} words, but it should be cx cy w h angle [class [difficult]]")
        box = parse_floats(words[:5], place)
        if box[2] < 0 or box[3] < 0:
            raise AnnotationError(f"{place}: sides {box[2]:g} x {box[3]:g} px are negative")
        boxes.append(box)
        names.append(words[5] if len(words) > 5 else default_class)
        numbers.append(number)
        difficult.append(parse_difficult(words[6], place) if len(words) > 6 else False)
    found = regularize_le90(boxes) if kind == "rotated" else hboxes_to_le90(boxes_to_hboxes(boxes))
    return make_labels(path, found, names, numbers, difficult=difficult)
