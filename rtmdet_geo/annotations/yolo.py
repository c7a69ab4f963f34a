"""YOLO text files: one line an object, a class index and coordinates as shares of the image's width and height.

Nine words are an oriented box, ``class x1 y1 x2 y2 x3 y3 x4 y4`` (YOLO-OBB); five a box, ``class cx cy w h``; any other
odd number from seven on a polygon, ``class x1 y1 x2 y2 ...``. Format: https://docs.ultralytics.com/datasets/.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rtmdet_geo.annotations.angles import CornerOrder
from rtmdet_geo.annotations.labels import (
    ImageLabels,
    enclosing_hboxes,
    hboxes_to_le90,
    is_upright,
    make_labels,
    number_text,
    object_corners,
    parse_floats,
    quads_to_boxes,
    read_lines,
    write_lines,
)
from rtmdet_geo.annotations.outlines import Outline
from rtmdet_geo.boxes import minimum_area_rectangle
from rtmdet_geo.errors import AnnotationError
from rtmdet_geo.structures import Kind

#: Shares further out are pixels by mistake.
_MAX_SHARE = 10.0


def read_yolo(
    path: Path,
    width: int,
    height: int,
    classes: Sequence[str] | None,
    kind: Kind = "rotated",
    *,
    with_outlines: bool = False,
) -> ImageLabels:
    """Read a YOLO file.

    Args:
        path: of the file.
        width: of its image in px.
        height: of its image in px.
        classes: names by index; an index beyond them is named "class 7", and so is each where there are none.
        kind: of the model that the boxes are for, see :class:`rtmdet_geo.annotations.labels.ImageLabels`. Only models
            of masks get the outlines of oriented boxes and polygons,
        with_outlines: unless this says that all do.

    Raises:
        AnnotationError: a line is malformed; the message begins with file and line.
    """
    boxes, names, numbers = [], [], []
    outlines: list[Outline] = []
    has_outlines = with_outlines or kind == "mask"
    for number, words in read_lines(path):
        place = f"{path}:{number}"
        values = parse_floats(words, place, "a class index and shares of the image's sides")
        index = int(values[0])
        if index != values[0] or index < 0:
            raise AnnotationError(f"{place}: class {words[0]!r} is no index (0, 1, 2, ...)")
        if len(values) < 5 or len(values) % 2 == 0:
            raise AnnotationError(
                f"{place}: {len(values)} words, but YOLO has a class and 4 (box), 8 (oriented box) or pairs of numbers"
            )
        if max(map(abs, values[1:])) > _MAX_SHARE:
            raise AnnotationError(f"{place}: {max(values[1:], key=abs):g} is no share of the image's size (0 to 1)")
        points = np.array(values[1:]).reshape(-1, 2) * (width, height)
        if len(points) == 2 and (points[1] < 0).any():
            raise AnnotationError(f"{place}: sides {values[3]:g} x {values[4]:g} are negative")
        boxes.append(_box(points, kind))
        names.append(classes[index] if classes is not None and index < len(classes) else f"class {index}")
        numbers.append(number)
        outlines.append(((points,),) if has_outlines and len(points) > 2 else ())
    return make_labels(path, np.concatenate([np.zeros((0, 5)), *boxes]), names, numbers, outlines=outlines)


def _box(points: NDArray[np.float64], kind: Kind) -> NDArray[np.float64]:
    """Return the le90 box (1, 5) of centre and size (2, 2), a quadrilateral (4, 2) or a polygon (M, 2), in px."""
    if len(points) == 2:
        centre, size = points
        return hboxes_to_le90([[*(centre - size / 2), *(centre + size / 2)]])
    if kind != "rotated":
        return hboxes_to_le90([[*points.min(axis=0), *points.max(axis=0)]])
    return quads_to_boxes(points, kind) if len(points) == 4 else minimum_area_rectangle(points)[None]


def write_yolo(
    path: Path,
    labels: ImageLabels,
    width: int,
    height: int,
    classes: Sequence[str],
    kind: Kind = "rotated",
    *,
    corner_order: CornerOrder = "any",
) -> None:
    """Write a YOLO file, with all digits; it has no place for marks of difficult objects and crowds.

    Args:
        path: of the file.
        labels: objects.
        width: of the image in px.
        height: of the image in px.
        classes: names by index.
        kind: "rotated" writes oriented boxes, four corners each, "horizontal" the boxes around them; "mask" polygons,
            and boxes where an object has no outline.
        corner_order: of corners that are kept.

    Raises:
        AnnotationError: a class is not among ``classes``, or a mask's outline has more than one ring.
        OutputError: the file cannot be written.
    """
    index_of = {name: index for index, name in enumerate(classes)}
    corners, hboxes = object_corners(labels, corner_order), enclosing_hboxes(labels)
    lines = []
    for number, name in enumerate(labels.class_names):
        if name not in index_of:
            raise AnnotationError(f"{labels.place(number)}: class {name!r} is not among {', '.join(classes)}")
        points, outline = corners[number], labels.outlines[number] if labels.outlines else ()
        if kind == "mask" and outline:
            if len(outline) != 1 or len(outline[0]) != 1:
                raise AnnotationError(f"{labels.place(number)}: an outline of more than one ring is no YOLO polygon")
            points = outline[0][0]
        elif kind == "horizontal" or (kind == "mask" and is_upright(labels.boxes[number])):
            low, high = hboxes[number].reshape(2, 2)
            points = np.stack([(low + high) / 2, high - low])
        shares = (points / (width, height)).ravel().tolist()
        lines.append(" ".join([str(index_of[name]), *map(number_text, shares)]))
    write_lines(path, lines)
