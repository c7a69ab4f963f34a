"""COCO json label files: boxes, polygons and run-length masks, decoded without pycocotools.

Pixel coordinates are continuous with the origin at the outer corner of the top-left pixel: pixel (row, column) of a
mask covers ``[column, column + 1] x [row, row + 1]``. Run lengths go down the columns first and start with background.
Format: https://cocodataset.org/#format-data; the text form of the counts packs each number in 5-bit groups, low first,
as character codes from 48 up, bit 5 set while more follow; from the fourth count on, numbers are differences to the
count two before.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtmdet_geo.annotations.labels import ImageLabels, hboxes_to_le90, make_labels
from rtmdet_geo.annotations.outlines import Outline, Window, as_outline, fill_outline, trace_mask
from rtmdet_geo.boxes import minimum_area_rectangle
from rtmdet_geo.errors import AnnotationError
from rtmdet_geo.structures import Kind

#: Stands for the id of an annotation that has none.
NO_ID = -1


@dataclass(frozen=True, slots=True)
class CocoObject:
    """One labelled object.

    Attributes:
        image_id: id of its image.
        class_name: name of its category.
        points: (M, 2) float64 x, y in px: corners of the mask's or the polygons' outline (not in drawing order);
            their hull is the object's hull.
        is_crowd: the annotation's ``iscrowd``: a region of many objects, none of which is told from the others.
        annotation_id: id of the annotation, for messages; :data:`NO_ID` where it has none.
        segmentation: polygons or run lengths as the file has them; None where it has a box only. See
            :func:`object_outline` and :func:`object_mask`.
        hbox: x1, y1, x2, y2 in px, the annotation's ``bbox``; None where it has a segmentation only.
        area: px^2, the annotation's ``area``; nan where it has none above 0.
        is_difficult: the annotation's ``difficult``, which COCO does not have, but conversions write.
    """

    image_id: int
    class_name: str
    points: NDArray[np.float64]
    is_crowd: bool
    annotation_id: int
    segmentation: Mapping[str, Any] | Sequence[Sequence[float]] | None = None
    hbox: tuple[float, float, float, float] | None = None
    area: float = float("nan")
    is_difficult: bool = False


@dataclass(frozen=True, slots=True)
class CocoLabels:
    """A COCO label file.

    Attributes:
        images: by image id: ``file_name``, ``width``, ``height`` and what else the file says.
        classes: category names in order of their ids.
        objects: by image id (every image has an entry, perhaps empty).
        categories: names by category id, rising.
    """

    images: dict[int, dict[str, Any]]
    classes: tuple[str, ...]
    objects: dict[int, list[CocoObject]]
    categories: dict[int, str] = field(default_factory=dict)


def decode_counts(counts: str | bytes | Sequence[int]) -> NDArray[np.int64]:
    """Run lengths of a COCO mask, from the compressed text form or a plain list.

    Returns:
        (R,) int64, lengths of runs that alternate background, object, background, ...

    Raises:
        AnnotationError: the text ends inside a number, holds other characters, or a run is negative.

    Example:
        >>> decode_counts("52T2").tolist()
        [5, 2, 68]
    """
    if not isinstance(counts, (str, bytes)):
        runs = np.asarray(list(counts), np.int64)
    else:
        codes = counts.encode("ascii", "replace") if isinstance(counts, str) else counts
        values: list[int] = []
        number = shift = 0
        for code in codes:
            chunk = code - 48
            if not 0 <= chunk < 64:
                raise AnnotationError(f"run-length text holds {chr(code)!r}, which the COCO format does not use")
            number |= (chunk & 31) << shift
            shift += 5
            if chunk & 32:
                continue
            if chunk & 16:
                number -= 1 << shift
            if len(values) > 2:
                number += values[-2]
            values.append(number)
            number = shift = 0
        if shift:
            raise AnnotationError("run-length text ends inside a number")
        runs = np.asarray(values, np.int64)
    if (runs < 0).any():
        raise AnnotationError("run-length mask holds a negative run")
    return runs


def encode_counts(runs: Sequence[int] | NDArray[np.int64]) -> str:
    """Compressed text form of run lengths, the inverse of :func:`decode_counts`."""
    values = [int(run) for run in runs]
    text = []
    for index, value in enumerate(values):
        number = value - values[index - 2] if index > 2 else value
        more = True
        while more:
            chunk = number & 31
            number >>= 5
            more = number != (-1 if chunk & 16 else 0)
            text.append(chr((chunk | (32 if more else 0)) + 48))
    return "".join(text)


def decode_mask(segmentation: Mapping[str, Any]) -> NDArray[np.bool_]:
    """Mask of a run-length segmentation ``{"size": [height, width], "counts": ...}``.

    Returns:
        (height, width) bool.

    Raises:
        AnnotationError: keys are missing or the runs do not sum to height x width.
    """
    runs, height, width = _runs(segmentation)
    flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return flat.reshape(width, height).T


def encode_mask(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """Run-length segmentation (compressed text form) of a (height, width) mask."""
    height, width = mask.shape
    flat = np.asarray(mask, np.bool_).T.ravel()
    changes = np.flatnonzero(np.diff(np.concatenate([[False], flat, [False]]).astype(np.int8)))
    ends = np.concatenate([[0], changes, [flat.size]])
    runs = np.diff(ends)
    if len(runs) > 1 and runs[-1] == 0:
        runs = runs[:-1]
    return {"size": [height, width], "counts": encode_counts(runs)}


def object_outline(entry: CocoObject) -> Outline:
    """Return an object's outline in px: its polygons as parts, or the edges of its run-length mask's pixels.

    Returns:
        The outline; () where the file gives a box only, or polygons of fewer than three corners.

    Raises:
        AnnotationError: the segmentation is malformed.
    """
    if entry.segmentation is None:
        return ()
    if isinstance(entry.segmentation, Mapping):
        return trace_mask(decode_mask(entry.segmentation))
    try:
        return as_outline([[ring] for ring in entry.segmentation])
    except (TypeError, ValueError) as error:
        raise AnnotationError(f"annotation {entry.annotation_id}: malformed polygon ({error})") from error


def object_mask(entry: CocoObject, height: int, width: int) -> NDArray[np.bool_]:
    """Return an object's mask, from polygons (a pixel is inside if its centre is) or run lengths, crowd or not.

    Args:
        entry: an object of a label file.
        height: of its image in px.
        width: of its image in px.

    Returns:
        (height, width) bool; where the file gives a box only, all False.

    Raises:
        AnnotationError: the segmentation is malformed, or a run-length mask is of another size.
    """
    if isinstance(entry.segmentation, Mapping):
        mask = decode_mask(entry.segmentation)
        if mask.shape != (height, width):
            raise AnnotationError(
                f"annotation {entry.annotation_id}: its mask is {mask.shape[0]} x {mask.shape[1]} px, "
                f"the image is {height} x {width} px"
            )
        return mask
    return fill_outline(object_outline(entry), Window(0, 0, width, height)).astype(np.bool_)


def mask_corner_points(segmentation: Mapping[str, Any]) -> NDArray[np.float64]:
    """Pixel corners whose hull is the hull of the mask: four per column that the object touches.

    Returns:
        (M, 2) float64 x, y in px; (0, 2) for an empty mask.
    """
    runs, height, _ = _runs(segmentation)
    ends = np.cumsum(runs)
    starts, stops = (ends - runs)[1::2], ends[1::2]  # object runs, as offsets down the columns
    keep = stops > starts
    starts, stops = starts[keep], stops[keep]
    if starts.size == 0:
        return np.zeros((0, 2))
    offsets = np.concatenate([np.arange(start, stop) for start, stop in zip(starts, stops, strict=True)])
    columns, rows = offsets // height, offsets % height
    touched, first = np.unique(columns, return_index=True)  # offsets rise, so rows rise within a column
    last = np.append(first[1:], len(columns)) - 1
    top, bottom = rows[first].astype(np.float64), rows[last] + 1.0
    left, right = touched.astype(np.float64), touched + 1.0
    return np.concatenate(
        [np.column_stack(pair) for pair in ((left, top), (left, bottom), (right, top), (right, bottom))]
    )


def image_labels(
    path: Path,
    image: Mapping[str, Any],
    objects: Sequence[CocoObject],
    kind: Kind,
    *,
    with_outlines: bool = False,
) -> ImageLabels:
    """Return the objects of an image as arrays.

    Args:
        path: label file, for messages.
        image: its entry among :attr:`CocoLabels.images`.
        objects: of the image.
        kind: of the model that the labels are for. Rotated boxes are least rectangles around the points; others get the
            annotations' own ``bbox``, or the bounds of the points. Only models of masks get outlines,
        with_outlines: unless this says that all do.

    Raises:
        AnnotationError: a segmentation is malformed; the message names the annotation.
    """
    outlines = []
    for entry in objects if kind == "mask" or with_outlines else ():
        try:
            outlines.append(object_outline(entry))
        except AnnotationError as error:
            raise AnnotationError(f"label file {str(path)!r}: {error}") from error
    return make_labels(
        path,
        _boxes(objects, kind),
        [entry.class_name for entry in objects],
        [entry.annotation_id for entry in objects],
        difficult=[entry.is_difficult for entry in objects],
        crowd=[entry.is_crowd for entry in objects],
        outlines=outlines,
        areas=[entry.area for entry in objects],
        unit="annotation",
        size=_stated_size(image),
    )


def _boxes(objects: Sequence[CocoObject], kind: Kind) -> NDArray[np.float64]:
    """Return the objects' le90 boxes (N, 5); sides of 0 where one has no points."""
    if kind == "rotated":
        found = [minimum_area_rectangle(entry.points) if len(entry.points) else np.zeros(5) for entry in objects]
        return np.array(found).reshape(-1, 5)
    return hboxes_to_le90([entry.hbox or _bounds(entry.points) for entry in objects])


def _bounds(points: NDArray[np.float64]) -> tuple[float, float, float, float]:
    """Return x1, y1, x2, y2 around points (M, 2); zeros for none."""
    if len(points) == 0:
        return 0.0, 0.0, 0.0, 0.0
    (x1, y1), (x2, y2) = points.min(axis=0).tolist(), points.max(axis=0).tolist()
    return x1, y1, x2, y2


def _stated_size(image: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return an image's width and height in px; None where the file leaves them open."""
    width, height = image.get("width"), image.get("height")
    return (int(width), int(height)) if width and height else None


def read_coco(path: str | Path, on_error: Callable[[AnnotationError], None] | None = None) -> CocoLabels:
    """Read a COCO label file.

    Args:
        path: of the file.
        on_error: takes the error of a malformed annotation, which is left out then; None raises it.

    Raises:
        AnnotationError: not json, not COCO, or an annotation that points nowhere; the message names the annotation.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise AnnotationError(f"cannot read label file {str(path)!r}: {error.strerror or error}") from error
    except ValueError as error:
        raise AnnotationError(f"label file {str(path)!r} is not json: {error}") from error
    if not isinstance(content, dict) or not {"images", "annotations", "categories"} <= set(content):
        raise AnnotationError(f"label file {str(path)!r} is not COCO: it needs images, annotations and categories")
    try:
        images = {int(image["id"]): dict(image) for image in content["images"]}
        categories = {
            int(entry["id"]): str(entry["name"]) for entry in sorted(content["categories"], key=lambda e: int(e["id"]))
        }
        objects: dict[int, list[CocoObject]] = {image_id: [] for image_id in images}
    except (KeyError, TypeError, ValueError) as error:
        raise AnnotationError(
            f"label file {str(path)!r} has a malformed image or category ({error!r}); each needs id and name"
        ) from error
    _check_unique(path, content)
    for number, annotation in enumerate(content["annotations"]):
        label = annotation.get("id", number) if isinstance(annotation, dict) else number
        try:
            entry = _object(annotation, categories, images)
        except (AnnotationError, KeyError, TypeError, ValueError) as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
            malformed = AnnotationError(f"label file {str(path)!r}, annotation {label!r}: {reason}")
            if on_error is None:
                raise malformed from error
            on_error(malformed)
            continue
        objects[entry.image_id].append(entry)
    return CocoLabels(images, tuple(categories.values()), objects, categories)


def _check_unique(path: str | Path, content: Mapping[str, Any]) -> None:
    """Refuse images or categories that share an id, for annotations would belong to any of them.

    Raises:
        AnnotationError: two do.
    """
    for part in ("images", "categories"):
        counts = Counter(int(entry["id"]) for entry in content[part])
        (entry_id, number), *_ = counts.most_common(1) or [(0, 0)]
        if number > 1:
            raise AnnotationError(f"label file {str(path)!r}: {number} of the {part} have the id {entry_id}")


def _object(
    annotation: Mapping[str, Any], categories: Mapping[int, str], images: Mapping[int, dict[str, Any]]
) -> CocoObject:
    image_id, category_id = int(annotation["image_id"]), int(annotation["category_id"])
    if image_id not in images:
        raise AnnotationError(f"image_id {image_id} is not among the images")
    if category_id not in categories:
        raise AnnotationError(f"category_id {category_id} is not among the categories")
    return CocoObject(
        image_id,
        categories[category_id],
        _points(annotation),
        bool(annotation.get("iscrowd", 0)),
        int(annotation.get("id", NO_ID)),
        annotation.get("segmentation") or None,
        _hbox(annotation) if annotation.get("bbox") else None,
        _area(annotation),
        bool(annotation.get("difficult", 0)),
    )


def _area(annotation: Mapping[str, Any]) -> float:
    """Return an annotation's ``area``; nan where it is missing or no area."""
    area = float(annotation.get("area") or 0)
    return area if 0 < area < float("inf") else float("nan")


def _hbox(annotation: Mapping[str, Any]) -> tuple[float, float, float, float]:
    """Return an annotation's ``bbox`` as x1, y1, x2, y2."""
    x, y, width, height = (float(value) for value in annotation["bbox"])
    if not np.isfinite((x, y, width, height)).all():
        raise AnnotationError("its bbox is not finite")
    if width < 0 or height < 0:
        raise AnnotationError(f"its bbox has sides of {width:g} x {height:g} px")
    return x, y, x + width, y + height


def _points(annotation: Mapping[str, Any]) -> NDArray[np.float64]:
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, Mapping):
        return mask_corner_points(segmentation)
    if segmentation:
        points = np.concatenate([np.asarray(ring, np.float64).reshape(-1, 2) for ring in segmentation])
    elif "bbox" in annotation:
        x1, y1, x2, y2 = _hbox(annotation)
        points = np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2]])
    else:
        raise AnnotationError("it has neither segmentation nor bbox")
    if not np.isfinite(points).all():
        raise AnnotationError("its coordinates are not finite")
    return points


def _runs(segmentation: Mapping[str, Any]) -> tuple[NDArray[np.int64], int, int]:
    try:
        height, width = (int(value) for value in segmentation["size"])
        runs = decode_counts(segmentation["counts"])
    except (KeyError, TypeError) as error:
        raise AnnotationError(f"run-length segmentation needs size and counts ({error!r})") from error
    if int(runs.sum()) != height * width:
        raise AnnotationError(f"run-length mask covers {int(runs.sum())} px, but its size is {height} x {width}")
    return runs, height, width
