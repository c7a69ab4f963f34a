"""DOTA labelTxt files: one line an object, ``x1 y1 x2 y2 x3 y3 x4 y4 class difficult``, corners in px.

Format: https://captain-whu.github.io/DOTA/dataset.html. Two header lines ``imagesource:`` and ``gsd:`` may come first;
v1.5 and v2.0 add classes only. Corners may lie outside the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rtmdet_geo.annotations.angles import CornerOrder
from rtmdet_geo.annotations.labels import (
    ImageLabels,
    make_labels,
    number_text,
    object_corners,
    parse_difficult,
    parse_floats,
    quads_to_boxes,
    read_lines,
    single_word,
    write_lines,
)
from rtmdet_geo.errors import AnnotationError
from rtmdet_geo.structures import Kind

_HEADERS = ("imagesource:", "gsd:")
_LINE = "x1 y1 x2 y2 x3 y3 x4 y4 class [difficult]"


@dataclass(frozen=True)
class DotaObjects:
    """N objects of an image as their lines have them.

    Attributes:
        corners: (N, 8) float64 x1 y1 ... x4 y4 in px of the image.
        class_names: N names.
        difficult: N words, "0", "1" or "2".
        numbers: (N,) int64 lines of the file, from 1.
    """

    corners: NDArray[np.float64]
    class_names: tuple[str, ...]
    difficult: tuple[str, ...]
    numbers: NDArray[np.int64]

    def __len__(self) -> int:
        """Return N."""
        return len(self.corners)


def read_dota_objects(path: Path) -> DotaObjects:
    """Read a labelTxt file as it stands; a missing ``difficult`` is 0.

    Raises:
        AnnotationError: a line is malformed; the message begins with file and line.
    """
    corners: list[list[float]] = []
    names: list[str] = []
    numbers: list[int] = []
    difficult: list[str] = []
    for number, words in read_lines(path):
        if not names and words[0].lower().startswith(_HEADERS):
            continue
        place = f"{path}:{number}"
        if len(words) not in (9, 10):
            raise AnnotationError(f"{place}: {len(words)} words, but DOTA has {_LINE}")
        corners.append(parse_floats(words[:8], place, _LINE))
        names.append(words[8])
        numbers.append(number)
        difficult.append(words[9] if len(words) == 10 else "0")
        parse_difficult(difficult[-1], place)
    table = np.array(corners, np.float64).reshape(-1, 8)
    return DotaObjects(table, tuple(names), tuple(difficult), np.array(numbers, np.int64))


def read_dota_header(path: Path) -> tuple[str, ...]:
    """Return the header lines of a labelTxt file: ``imagesource:`` and ``gsd:``, or none.

    Raises:
        AnnotationError: the file is missing or not text.
    """
    lines = (" ".join(words) for _, words in read_lines(path))
    return tuple(takewhile(lambda line: line.lower().startswith(_HEADERS), lines))


def read_dota(path: Path, kind: Kind = "rotated", *, with_outlines: bool = False) -> ImageLabels:
    """Read a labelTxt file; a missing ``difficult`` is 0.

    Args:
        path: of the file.
        kind: of the model that the boxes are for, see :class:`rtmdet_geo.annotations.labels.ImageLabels`.
        with_outlines: keep the corners, as outlines in the order of the file.

    Raises:
        AnnotationError: a line is malformed; the message begins with file and line.
    """
    found = read_dota_objects(path)
    return make_labels(
        path,
        quads_to_boxes(found.corners, kind),
        found.class_names,
        found.numbers,
        difficult=[word != "0" for word in found.difficult],
        outlines=[((ring,),) for ring in found.corners.reshape(-1, 4, 2)] if with_outlines else (),
    )


def write_dota(path: Path, labels: ImageLabels, corner_order: CornerOrder = "any", header: Sequence[str] = ()) -> None:
    """Write a labelTxt file, with all digits; a crowd is difficult.

    Args:
        path: of the file.
        labels: objects with an outline of four corners keep them, others get those of their box, clockwise from the
            top left.
        corner_order: of corners that are kept.
        header: lines that come first.

    Raises:
        AnnotationError: the name of a class is not one word.
        OutputError: the file cannot be written.
    """
    corners = object_corners(labels, corner_order).reshape(-1, 8)
    difficult = labels.difficult | labels.crowd
    lines = [*header]
    for row, name, is_difficult in zip(corners.tolist(), labels.class_names, difficult, strict=True):
        lines.append(" ".join([*map(number_text, row), single_word(name, "DOTA"), str(int(is_difficult))]))
    write_lines(path, lines)
