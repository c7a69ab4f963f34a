"""Rotated boxes as text: one line an object, ``cx cy w h angle [class [difficult]]``, px and rad.

The angle is positive clockwise on screen (:mod:`rtmdet_geo.boxes`); w need not be the long side. Files that follow
another convention (:mod:`rtmdet_geo.annotations.angles`) are read and written by its name.
"""

from __future__ import annotations

from pathlib import Path

from rtmdet_geo.annotations.angles import (
    AngleConvention,
    boxes_from_convention,
    boxes_to_convention,
    convention_fault,
)
from rtmdet_geo.annotations.labels import (
    ImageLabels,
    hboxes_to_le90,
    make_labels,
    number_text,
    parse_difficult,
    parse_floats,
    read_lines,
    single_word,
    write_lines,
)
from rtmdet_geo.boxes import boxes_to_hboxes, regularize_le90
from rtmdet_geo.errors import AnnotationError
from rtmdet_geo.structures import Kind

_OWN = AngleConvention()
_LINE = "cx cy w h angle [class [difficult]]"


def read_rbox(path: Path, default_class: str, kind: Kind = "rotated", *, angle: AngleConvention = _OWN) -> ImageLabels:
    """Read a file of rotated boxes.

    Args:
        path: of the file.
        default_class: name of objects whose line gives none.
        kind: of the model that the boxes are for, see :class:`rtmdet_geo.annotations.labels.ImageLabels`.
        angle: convention of the file.

    Raises:
        AnnotationError: a line is malformed, or does not follow the convention; the message begins with file and line.
    """
    boxes, names, numbers, difficult = [], [], [], []
    for number, words in read_lines(path):
        place = f"{path}:{number}"
        if not 5 <= len(words) <= 7:
            raise AnnotationError(f"{place}: {len(words)} words, but it should be {_LINE}")
        box = parse_floats(words[:5], place, _LINE)
        if box[2] < 0 or box[3] < 0:
            raise AnnotationError(f"{place}: sides {box[2]:g} x {box[3]:g} px are negative")
        fault = convention_fault(box[2], box[3], box[4], angle)
        if fault is not None:
            raise AnnotationError(
                f"{place}: {fault}: state another convention, such as any,deg,cw (data convert --from-angle)"
            )
        boxes.append(box)
        names.append(words[5] if len(words) > 5 else default_class)
        numbers.append(number)
        difficult.append(parse_difficult(words[6], place) if len(words) > 6 else False)
    turned = boxes_from_convention(boxes, angle)
    found = regularize_le90(turned) if kind == "rotated" else hboxes_to_le90(boxes_to_hboxes(turned))
    return make_labels(path, found, names, numbers, difficult=difficult)


def write_rbox(path: Path, labels: ImageLabels, *, angle: AngleConvention = _OWN) -> None:
    """Write a file of rotated boxes, with all digits, every line with class and difficult; a crowd is difficult.

    Args:
        path: of the file.
        labels: outlines are not written.
        angle: convention of the file.

    Raises:
        AnnotationError: the name of a class is not one word.
        OutputError: the file cannot be written.
    """
    boxes, difficult = boxes_to_convention(labels.boxes, angle), labels.difficult | labels.crowd
    lines = []
    for row, name, is_difficult in zip(boxes.tolist(), labels.class_names, difficult, strict=True):
        lines.append(" ".join([*map(number_text, row), single_word(name, "rbox"), str(int(is_difficult))]))
    write_lines(path, lines)
