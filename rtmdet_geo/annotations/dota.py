"""DOTA labelTxt files: one line an object, ``x1 y1 x2 y2 x3 y3 x4 y4 class difficult``, corners in px.

Format: https://captain-whu.github.io/DOTA/dataset.html. Two header lines ``imagesource:`` and ``gsd:`` may come first;
v1.5 and v2.0 add classes only. Corners may lie outside the image.
"""

from __future__ import annotations

from pathlib import Path

from rtmdet_geo.annotations.labels import (
    ImageLabels,
    make_labels,
    parse_difficult,
    parse_floats,
    quads_to_boxes,
    read_lines,
)
from rtmdet_geo.errors import AnnotationError
from rtmdet_geo.structures import Kind

_HEADERS = ("imagesource:", "gsd:")


def read_dota(path: Path, kind: Kind = "rotated") -> ImageLabels:
    """Read a labelTxt file; a missing ``difficult`` is 0.

    Args:
        path: of the file.
        kind: of the model that the boxes are for, see :class:`rtmdet_geo.annotations.labels.ImageLabels`.

    Raises:
        AnnotationError: a line is malformed; the message begins with file and line.
    """
    quads: list[list[float]] = []
    names: list[str] = []
    numbers: list[int] = []
    difficult: list[bool] = []
    for number, words in read_lines(path):
        if not names and words[0].lower().startswith(_HEADERS):
            continue
        place = f"{path}:{number}"
        if len(words) not in (9, 10):
            raise AnnotationError(f"{place}: {len(words)} words, but DOTA has x1 y1 x2 y2 x3 y3 x4 y4 class difficult")
        quads.append(parse_floats(words[:8], place))
        names.append(words[8])
        numbers.append(number)
        difficult.append(parse_difficult(words[9], place) if len(words) == 10 else False)
    return make_labels(path, quads_to_boxes(quads, kind), names, numbers, difficult=difficult)
