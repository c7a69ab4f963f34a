"""What is wrong with a data set: kinds of faults, how many there are of each, and the first few."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning"]

#: Every kind of fault, in the order of reports. Errors are labels or images that cannot mean what they say; warnings
#: happen in sound data sets too.
SEVERITIES: dict[str, Severity] = {
    "broken image": "error",
    "malformed labels": "error",
    "labels without image": "error",
    "ambiguous image": "error",
    "other image size": "error",
    "unknown class": "error",
    "zero area": "error",
    "outside": "error",
    "double object": "error",
    "double image": "error",
    "partly outside": "warning",
    "image without labels": "warning",
    "absent class": "warning",
    "turned image": "warning",
}

#: What each kind is, and what training does about it.
MEANINGS: dict[str, str] = {
    "broken image": "it does not decode, is too large, or has more than 8 bits a channel; see data.on_bad_image",
    "malformed labels": "a label file or an object in it cannot be read; training refuses it",
    "labels without image": "labels of, or a list with, an image that is not there; training refuses it",
    "ambiguous image": "two images whose names differ in their ending only; training refuses it",
    "other image size": "the label file speaks of an image of another size; training refuses it",
    "unknown class": "a class that is not among the model's; data.unknown_classes says what training does",
    "zero area": "a box without area; training leaves it out",
    "outside": "a box of which the image shows nothing; training leaves it out",
    "double object": "the same box and class twice in an image",
    "double image": "the same file twice, under other names or in training and validation",
    "partly outside": "a box that sticks out of the image by more than a pixel; training takes it",
    "image without labels": "yolo_obb: training takes it as background; other formats: training leaves it out",
    "absent class": "a class of the model that no object has",
    "turned image": "it has an EXIF orientation, which training ignores: labels must count stored pixels",
}


@dataclass(frozen=True)
class Example:
    """One fault.

    Attributes:
        place: file, with line or number where there is one.
        text: what is wrong with it.
    """

    place: str
    text: str

    def __str__(self) -> str:
        """Return place and text."""
        return f"{self.place}: {self.text}"


class Findings:
    """Faults by kind: all are counted, the first ``limit`` of each kind are kept."""

    def __init__(self, limit: int = 5) -> None:
        """Keep ``limit`` examples of each kind."""
        self.limit = limit
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[Example]] = {}

    def add(self, kind: str, place: str, text: str) -> None:
        """Count a fault of a kind among :data:`SEVERITIES`."""
        assert kind in SEVERITIES, kind
        self.counts[kind] += 1
        kept = self.examples.setdefault(kind, [])
        if len(kept) < self.limit:
            kept.append(Example(place, text))

    def first(self, kinds: frozenset[str] | set[str]) -> tuple[str, int, Example] | None:
        """Return kind, number and first example of the first of some kinds that was found; None if none was."""
        for kind in SEVERITIES:
            if kind in kinds and self.counts[kind]:
                return kind, self.counts[kind], self.examples[kind][0]
        return None
