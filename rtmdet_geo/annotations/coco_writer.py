"""COCO json label files: what :mod:`rtmdet_geo.annotations.coco` reads, written.

Outlines are polygons with all digits. An outline of whole pixels (a traced mask) is written as run lengths, which say
the same exactly, and so is one with holes, which polygons cannot say: it is cut into pixels then. Difficult objects get
``"difficult": 1``, which COCO does not have and other programs pass over.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtmdet_geo.annotations.angles import CornerOrder, order_corners
from rtmdet_geo.annotations.coco import encode_mask
from rtmdet_geo.annotations.label_sets import SetImage
from rtmdet_geo.annotations.labels import ImageLabels, enclosing_hboxes, four_corners, object_corners
from rtmdet_geo.annotations.outlines import Outline, Window, fill_outline
from rtmdet_geo.errors import AnnotationError, OutputError
from rtmdet_geo.structures import Kind


def write_coco(
    path: Path,
    images: Sequence[SetImage],
    classes: Sequence[str],
    kind: Kind = "mask",
    *,
    corner_order: CornerOrder = "any",
) -> None:
    """Write a COCO label file; ids of images, annotations and categories count from 1.

    Args:
        path: of the file.
        images: whose sizes are known.
        classes: names of the categories, in order.
        kind: "mask" writes outlines, and the corners of boxes where an object has none; "rotated" four corners each;
            "horizontal" boxes only.
        corner_order: of corners that outlines bring.

    Raises:
        AnnotationError: a class is not among ``classes``, or the size of an image is not known.
        OutputError: the file cannot be written.
    """
    category_of = {name: number for number, name in enumerate(classes, 1)}
    entries: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, image in enumerate(images, 1):
        if image.size is None:
            raise AnnotationError(f"{image.labels.path}: the size of its image is not known; COCO wants it")
        entries.append({"id": image_id, "file_name": image.name, "width": image.size[0], "height": image.size[1]})
        for index, shape in enumerate(_shapes(image, kind, corner_order)):
            name = image.labels.class_names[index]
            if name not in category_of:
                raise AnnotationError(f"{image.labels.place(index)}: class {name!r} is not among {', '.join(classes)}")
            head = {"id": len(annotations) + 1, "image_id": image_id, "category_id": category_of[name]}
            annotations.append(head | shape)
    categories = [{"id": number, "name": name} for name, number in category_of.items()]
    content = {"images": entries, "annotations": annotations, "categories": categories}
    try:
        path.write_text(json.dumps(content, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot write label file {str(path)!r}: {error.strerror or error}") from error


def _shapes(image: SetImage, kind: Kind, corner_order: CornerOrder) -> list[dict[str, Any]]:
    """Return the fields of each annotation that say where and what it is."""
    labels = image.labels
    width, height = image.size or (0, 0)
    corners = object_corners(labels, corner_order)
    shapes = []
    for index, (x1, y1, x2, y2) in enumerate(enclosing_hboxes(labels).tolist()):
        shape: dict[str, Any] = {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1), "iscrowd": 0}
        if kind != "horizontal":
            outline = _outline(labels, index, kind, corners[index], corner_order)
            shape["segmentation"], shape["area"] = _segmentation(outline, width, height)
        if labels.areas is not None and np.isfinite(labels.areas[index]) and kind == "mask":
            shape["area"] = float(labels.areas[index])
        shape["iscrowd"] = int(labels.crowd[index])
        if labels.difficult[index]:
            shape["difficult"] = 1
        shapes.append(shape)
    return shapes


def _outline(
    labels: ImageLabels, index: int, kind: Kind, corners: NDArray[np.float64], corner_order: CornerOrder
) -> Outline:
    outline = labels.outlines[index] if labels.outlines else ()
    if kind == "rotated" or not outline:
        return ((corners,),)
    four = four_corners(outline)
    return outline if four is None else ((order_corners(four[None], corner_order)[0],),)


def _segmentation(outline: Outline, width: int, height: int) -> tuple[Any, float]:
    """Return an outline as polygons, or as run lengths where it has holes or follows pixels; and its area in px^2."""
    if is_pixel_mask(outline, width, height) or not is_plain(outline):
        mask = fill_outline(outline, Window(0, 0, width, height)).astype(np.bool_)
        return encode_mask(mask), float(mask.sum())
    rings = [part[0] for part in outline]
    return [ring.ravel().tolist() for ring in rings], float(sum(map(_ring_area, rings)))


def is_plain(outline: Outline) -> bool:
    """Say whether no part of an outline has a second ring."""
    return all(len(part) == 1 for part in outline)


def is_pixel_mask(outline: Outline, width: int, height: int) -> bool:
    """Say whether an outline follows the edges of pixels in an image, and is more than one rectangle."""
    if four_corners(outline) is not None:
        return False
    for part in outline:
        for ring in part:
            steps = np.roll(ring, -1, axis=0) - ring
            inside = (ring >= 0).all() and (ring <= (width, height)).all()
            if not inside or (ring != np.rint(ring)).any() or (steps.all(axis=1)).any():
                return False
    return True


def _ring_area(ring: NDArray[np.float64]) -> float:
    x, y = (ring - ring[0]).T
    return abs(float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))) / 2
