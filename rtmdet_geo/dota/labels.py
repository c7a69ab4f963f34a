"""DOTA labelTxt files with their corners and words as they stand; boxes are :mod:`rtmdet_geo.annotations.dota`'s."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rtmdet_geo.annotations.labels import parse_difficult, parse_floats, read_lines
from rtmdet_geo.errors import AnnotationError

_HEADERS = ("imagesource:", "gsd:")


@dataclass(frozen=True)
class Objects:
    """N labelled quadrilaterals of an image.

    Attributes:
        corners: (N, 8) float64 x1 y1 ... x4 y4 in px of the image.
        class_names: N names.
        difficult: N words, "0", "1" or "2".
    """

    corners: NDArray[np.float64]
    class_names: tuple[str, ...]
    difficult: tuple[str, ...]

    def __len__(self) -> int:
        """Return N."""
        return len(self.corners)


def read_objects(path: Path) -> Objects:
    """Read a labelTxt file; a missing ``difficult`` is 0.

    Raises:
        AnnotationError: a line is malformed; the message begins with file and line.
    """
    corners: list[list[float]] = []
    names: list[str] = []
    difficult: list[str] = []
    for number, words in read_lines(path):
        if not names and words[0].lower().startswith(_HEADERS):
            continue
        place = f"{path}:{number}"
        if len(words) not in (9, 10):
            raise AnnotationError(f"{place}: {len(words)} words, but DOTA has x1 y1 x2 y2 x3 y3 x4 y4 class difficult")
        corners.append(parse_floats(words[:8], place))
        names.append(words[8])
        difficult.append(words[9] if len(words) == 10 else "0")
        parse_difficult(difficult[-1], place)
    return Objects(np.array(corners, np.float64).reshape(-1, 8), tuple(names), tuple(difficult))
