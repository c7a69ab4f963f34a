"""Labels of chips: entries of ``chips.json``, as :mod:`rtmdet_geo.gis_labels` writes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtmdet_geo.annotations.outlines import Outline, as_outline
from rtmdet_geo.errors import AnnotationError


@dataclass(frozen=True)
class ChipEntry:
    """One chip and its N objects.

    Attributes:
        file: of the pixels, beside ``chips.json``.
        scene: name of the scene that it was cut from.
        width: in px.
        height: in px.
        boxes: (N, 5) float64 cx, cy, w, h in px of the chip, angle in rad (le90).
        labels: N indices into the index's classes.
        ignored: (N,) bool: neither object nor background.
        outlines: N outlines in px, () for an object that has none; or nothing where no object has one.
    """

    file: str
    scene: str
    width: int
    height: int
    boxes: NDArray[np.float64]
    labels: tuple[int, ...]
    ignored: NDArray[np.bool_]
    outlines: tuple[Outline, ...]


def parse_chip(entry: Mapping[str, Any], num_classes: int) -> ChipEntry:
    """Read an entry of an index of chips that names so many classes.

    Raises:
        AnnotationError: a field is missing or of another kind, or the objects' fields do not fit together.
    """
    try:
        chip = ChipEntry(
            str(entry["file"]),
            str(entry["scene"]),
            int(entry["width"]),
            int(entry["height"]),
            np.array(entry["boxes"], np.float64).reshape(-1, 5),
            tuple(entry["labels"]),
            np.array(entry["ignore"], np.bool_),
            tuple(as_outline(parts) for parts in entry.get("outlines", ())),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise AnnotationError(f"it is not an entry of a chip ({error!r})") from error
    number = len(chip.boxes)
    if not number == len(chip.labels) == len(chip.ignored) or len(chip.outlines) not in (0, number):
        raise AnnotationError(
            f"{chip.file!r} has {number} boxes, {len(chip.labels)} labels, {len(chip.ignored)} marks to ignore and "
            f"{len(chip.outlines)} outlines"
        )
    if not np.isfinite(chip.boxes).all() or (chip.boxes[:, 2:4] <= 0).any():
        raise AnnotationError(f"{chip.file!r} has boxes that are not finite, or have no area")
    wrong = [label for label in chip.labels if not isinstance(label, int) or not 0 <= label < num_classes]
    if wrong:
        raise AnnotationError(f"{chip.file!r} has labels {wrong[:5]}, but the index has {num_classes} classes")
    return chip
