"""The labels of one image as plain arrays: what every reader of label files returns."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rtmdet_geo.annotations.angles import CornerOrder, order_corners
from rtmdet_geo.annotations.outlines import Outline, outline_points
from rtmdet_geo.boxes import (
    as_boxes,
    boxes_to_polygons,
    hboxes_to_boxes,
    polygons_to_boxes,
    polygons_to_hboxes,
    regularize_le90,
)
from rtmdet_geo.errors import AnnotationError, OutputError
from rtmdet_geo.structures import Kind

#: Boxes whose sides lean by less (rad) from the axes are upright.
_UPRIGHT = 1e-12


@dataclass(frozen=True)
class ImageLabels:
    """N labelled objects of one image.

    Attributes:
        path: label file, for messages.
        boxes: (N, 5) float64 cx, cy, w, h in px, angle in rad (le90): of least area for models of rotated boxes, else
            enclosing and axis-aligned.
        class_names: N names.
        difficult: (N,) bool: so marked in the file.
        crowd: (N,) bool: a region of many objects, none of which is told from the others.
        numbers: (N,) int64: line, or id of the annotation, in the file.
        outlines: N outlines in px, () for an object that has none; or nothing where no object has one.
        unit: what ``numbers`` count.
        size: width and height in px of the image that the file speaks of; None where it does not say.
        areas: (N,) float64 px^2 as the file states them, nan where it does not; None where it states none.
    """

    path: Path
    boxes: NDArray[np.float64]
    class_names: tuple[str, ...]
    difficult: NDArray[np.bool_]
    crowd: NDArray[np.bool_]
    numbers: NDArray[np.int64]
    outlines: tuple[Outline, ...] = ()
    unit: str = "line"
    size: tuple[int, int] | None = None
    areas: NDArray[np.float64] | None = None

    def __len__(self) -> int:
        """Return N."""
        return len(self.boxes)

    def place(self, index: int) -> str:
        """Return where an object stands: ``labels/a.txt:3``, or ``all.json, annotation 17``."""
        number = int(self.numbers[index])
        return f"{self.path}:{number}" if self.unit == "line" else f"{self.path}, {self.unit} {number}"


def make_labels(
    path: Path,
    boxes: ArrayLike,
    class_names: Sequence[str],
    numbers: Sequence[int] | NDArray[np.int64],
    *,
    difficult: Sequence[bool] | NDArray[np.bool_] | None = None,
    crowd: Sequence[bool] | NDArray[np.bool_] | None = None,
    outlines: Sequence[Outline] = (),
    areas: Sequence[float] = (),
    unit: str = "line",
    size: tuple[int, int] | None = None,
) -> ImageLabels:
    """Return labels of plain lists; ``difficult`` and ``crowd`` are False where they are not given."""
    stated = np.asarray(areas, np.float64)
    return ImageLabels(
        path,
        np.asarray(boxes, np.float64).reshape(-1, 5),
        tuple(class_names),
        np.zeros(len(class_names), np.bool_) if difficult is None else np.asarray(difficult, np.bool_),
        np.zeros(len(class_names), np.bool_) if crowd is None else np.asarray(crowd, np.bool_),
        np.asarray(numbers, np.int64),
        tuple(outlines) if any(outlines) else (),
        unit,
        size,
        None if np.isnan(stated).all() else stated,
    )


def quads_to_boxes(quads: ArrayLike, kind: Kind) -> NDArray[np.float64]:
    """Return le90 boxes (N, 5) for models of some kind, of quadrilaterals (N, 8): least-area or enclosing ones."""
    quads = np.asarray(quads, np.float64).reshape(-1, 4, 2)
    return polygons_to_boxes(quads) if kind == "rotated" else hboxes_to_le90(polygons_to_hboxes(quads))


def hboxes_to_le90(hboxes: ArrayLike) -> NDArray[np.float64]:
    """Return horizontal boxes (N, 4) x1, y1, x2, y2 as le90 boxes (N, 5): w is the long side."""
    return regularize_le90(hboxes_to_boxes(hboxes))


def box_corners(boxes: ArrayLike) -> NDArray[np.float64]:
    """Return the corners of boxes (N, 5), (N, 4, 2) px, clockwise on screen from the top left.

    Corners of boxes along the axes are those of the enclosing box to the last digit.
    """
    boxes = as_boxes(boxes)
    corners = boxes_to_polygons(boxes)[:, [2, 1, 0, 3]]
    for upright, sides in ((np.cos(boxes[:, 4]), [3, 2]), (np.sin(boxes[:, 4]), [2, 3])):
        half = boxes[:, None, sides] / 2 * [[-1, -1], [1, -1], [1, 1], [-1, 1]]
        corners = np.where(np.abs(upright)[:, None, None] < _UPRIGHT, boxes[:, None, :2] + half, corners)
    return order_corners(corners, "top-left")


def is_upright(box: NDArray[np.float64]) -> bool:
    """Say whether the sides of a box (5,) run along the axes."""
    return bool(min(abs(math.sin(box[4])), abs(math.cos(box[4]))) < _UPRIGHT)


def four_corners(outline: Outline) -> NDArray[np.float64] | None:
    """Return the corners (4, 2) of an outline that is one ring of four; None of another."""
    if len(outline) != 1 or len(outline[0]) != 1 or len(outline[0][0]) != 4:
        return None
    return outline[0][0]


def object_corners(labels: ImageLabels, order: CornerOrder = "any") -> NDArray[np.float64]:
    """Return four corners of each object, (N, 4, 2) px: those of its outline where that has four, else its box's.

    Args:
        labels: N objects.
        order: of corners that outlines bring; those of boxes go clockwise from the top left.
    """
    corners = box_corners(labels.boxes)
    for index, outline in enumerate(labels.outlines):
        found = four_corners(outline)
        if found is not None:
            corners[index] = order_corners(found[None], order)[0]
    return corners


def enclosing_hboxes(labels: ImageLabels) -> NDArray[np.float64]:
    """Return the horizontal boxes around the objects' outlines, where they have one, else boxes: (N, 4) x1 y1 x2 y2."""
    hboxes = polygons_to_hboxes(box_corners(labels.boxes))
    for index, outline in enumerate(labels.outlines):
        if outline:
            points = outline_points(outline)
            hboxes[index] = [*points.min(axis=0), *points.max(axis=0)]
    return hboxes


def number_text(value: float) -> str:
    """Return the shortest text that is read back as the same float64; whole numbers have no ".0"."""
    return repr(float(value) + 0.0).removesuffix(".0")


def single_word(class_name: str, format_name: str) -> str:
    """Return a class name that can stand in a line of words.

    Raises:
        AnnotationError: it is empty or has white space.
    """
    if len(class_name.split()) != 1 or class_name != class_name.strip():
        raise AnnotationError(f"class {class_name!r} is not one word, but lines of {format_name} are words: rename it")
    return class_name


def write_lines(path: Path, lines: Sequence[str]) -> None:
    """Write a text file, UTF-8, one line each.

    Raises:
        OutputError: the operating system refuses.
    """
    try:
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")
    except OSError as error:
        raise OutputError(f"cannot write label file {str(path)!r}: {error.strerror or error}") from error


def read_lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the number, from 1, and the words of every line of a text file that is not blank.

    Raises:
        AnnotationError: the file is missing or not text.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise AnnotationError(f"cannot read label file {str(path)!r}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise AnnotationError(f"label file {str(path)!r} is not text ({error.reason} at byte {error.start})") from error
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if words:
            yield number, words


def parse_floats(words: Sequence[str], place: str, expected: str = "") -> list[float]:
    """Return words as finite numbers.

    Args:
        words: to parse.
        place: where they stand.
        expected: what should stand there, for the message.

    Raises:
        AnnotationError: one is none; the message begins with ``place``.
    """
    values = []
    hint = f"; it should be {expected}" if expected else ""
    for word in words:
        try:
            values.append(float(word))
        except ValueError as error:
            raise AnnotationError(f"{place}: {word!r} is no number{hint}") from error
        if not math.isfinite(values[-1]):
            raise AnnotationError(f"{place}: {word!r} is not finite: correct the object, or leave it out")
    return values


def parse_difficult(word: str, place: str) -> bool:
    """Return the mark of difficult objects: 0 is no; 1, and the 2 of objects cut by a split tool, are yes.

    Raises:
        AnnotationError: it is another word.
    """
    if word not in ("0", "1", "2"):
        raise AnnotationError(f"{place}: difficult is {word!r}, not 0, 1 or 2")
    return word != "0"
