"""Which labelled objects training can take: of a known class, with area, in the image."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rtmdet_geo.annotations.findings import Findings
from rtmdet_geo.annotations.outlines import clip_outline, outline_points
from rtmdet_geo.annotations.parts import LabelledFile
from rtmdet_geo.boxes import boxes_to_hboxes, boxes_to_polygons

#: Boxes with a shorter side in px have no area.
MIN_SIDE_PX = 1e-3
#: Boxes may stick out of the image by so many px and count as inside: what rounding does.
OUTSIDE_TOLERANCE_PX = 1.0


@dataclass(frozen=True)
class Usable:
    """The objects of a part that training can take, as places in a flat list over all images.

    Attributes:
        owners: (M,) int64: image of each of all M objects.
        positions: (M,) int64: place of each in its image's labels.
        labels: (M,) int64: its class, -1 for an unknown one.
        kept: (M,) bool: it is of a known class, has area, and the image shows some of it.
        classes: names of the classes.
    """

    owners: NDArray[np.int64]
    positions: NDArray[np.int64]
    labels: NDArray[np.int64]
    kept: NDArray[np.bool_]
    classes: tuple[str, ...]

    def of_image(self, index: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return positions and labels (K,) of an image's usable objects."""
        begin, end = np.searchsorted(self.owners, [index, index + 1])
        kept = self.kept[begin:end]
        return self.positions[begin:end][kept], self.labels[begin:end][kept]


def sift(files: list[LabelledFile], classes: tuple[str, ...] | None, findings: Findings) -> Usable:
    """Find the objects that training can take.

    Args:
        files: of a part.
        classes: names in label order; None takes every class there is, sorted.
        findings: takes note of objects of unknown classes, without area, outside and partly outside, and of classes
            that no object has.
    """
    counts = [len(file.labels) for file in files]
    owners = np.repeat(np.arange(len(files)), counts)
    positions = np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts, counts)
    names = [name for file in files for name in file.labels.class_names]
    if classes is None:
        classes = tuple(sorted(set(names)))
    label_of = {name: label for label, name in enumerate(classes)}
    labels = np.array([label_of.get(name, -1) for name in names], np.int64)
    boxes = np.concatenate([file.labels.boxes for file in files] or [np.zeros((0, 5))])
    crowd = np.concatenate([file.labels.crowd for file in files] or [np.zeros(0, np.bool_)])
    sizes = np.array([(file.width, file.height) for file in files], np.float64).reshape(-1, 2)[owners]

    has_area = boxes[:, 2:4].min(axis=1, initial=np.inf) >= MIN_SIDE_PX
    hboxes = boxes_to_hboxes(boxes)
    is_beyond = (hboxes[:, :2] < -OUTSIDE_TOLERANCE_PX) | (hboxes[:, 2:] > sizes + OUTSIDE_TOLERANCE_PX)
    sticks_out = np.asarray(is_beyond.any(axis=1))
    is_outside = np.asarray(((hboxes[:, 2:] <= 0) | (hboxes[:, :2] >= sizes)).any(axis=1))
    for index in np.flatnonzero(sticks_out & ~is_outside & (boxes[:, 4] != 0)):  # a tilted box may pass a corner by
        is_outside[index] = not clip_outline(((boxes_to_polygons(boxes[index : index + 1])[0],),), *sizes[index])

    for index in np.flatnonzero(sticks_out & ~is_outside):  # the box around an outline may be larger than the outline
        found = files[owners[index]].labels.outlines
        outline = found[positions[index]] if found else ()
        if outline:
            points = outline_points(outline)
            low, high = points.min(axis=0) + OUTSIDE_TOLERANCE_PX, points.max(axis=0) - OUTSIDE_TOLERANCE_PX
            sticks_out[index] = bool((low < 0).any() or (high > sizes[index]).any())

    def note(kind: str, indices: NDArray[np.intp]) -> None:
        for index in indices:
            file = files[owners[index]]
            cx, cy, width, height = boxes[index, :4]
            what = f"{names[index]!r} of {width:.4g} x {height:.4g} px at {cx:.5g}, {cy:.5g}"
            place = file.labels.place(int(positions[index]))
            findings.add(kind, place, f"{what} in {file.name} of {file.width} x {file.height} px")

    note("unknown class", np.flatnonzero(labels < 0))
    note("zero area", np.flatnonzero(~has_area))
    note("outside", np.flatnonzero(has_area & is_outside))
    note("partly outside", np.flatnonzero(has_area & sticks_out & ~is_outside & ~crowd))
    present = set(labels.tolist())
    for label, name in enumerate(classes):
        if label not in present:
            findings.add("absent class", name, "no object is of this class")
    return Usable(owners, positions, labels, (labels >= 0) & has_area & ~is_outside, classes)
