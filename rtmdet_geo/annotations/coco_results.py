"""COCO result files: a JSON list of what was found, ``image_id``, ``category_id``, ``score`` and ``bbox`` or a mask.

``bbox`` is x, y, width, height in px, ``segmentation`` a run-length mask of the whole image in either form. Format:
https://cocodataset.org/#format-results.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rtmdet_geo.annotations.coco import CocoLabels, decode_counts, encode_counts
from rtmdet_geo.errors import AnnotationError


@dataclass(frozen=True, slots=True)
class CocoResult:
    """One detection.

    Attributes:
        image_id: id of its image.
        class_name: name of its category.
        score: of the detection.
        hbox: x1, y1, x2, y2 in px; None where it has a mask only.
        mask: run lengths in the compressed text form, ``size`` and ``counts``; None where it has a box only.
    """

    image_id: int
    class_name: str
    score: float
    hbox: tuple[float, float, float, float] | None
    mask: dict[str, Any] | None


def read_coco_results(path: str | Path, labels: CocoLabels) -> list[CocoResult]:
    """Read a result file.

    Args:
        path: of the file.
        labels: whose images and categories the results are of.

    Returns:
        Detections in the order of the file; none if the list is empty.

    Raises:
        AnnotationError: not JSON, no list, or an entry is malformed, repeated, or of an image or category that the
            labels do not have; the message names the entry, counted from 0.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise AnnotationError(f"cannot read result file {str(path)!r}: {error.strerror or error}") from error
    except ValueError as error:
        raise AnnotationError(f"result file {str(path)!r} is not JSON: {error}") from error
    if not isinstance(content, list):
        raise AnnotationError(f"result file {str(path)!r} is no list of results; are these labels?")
    found: list[CocoResult] = []
    seen: dict[str, int] = {}
    ids: dict[Any, int] = {}
    for number, entry in enumerate(content):
        try:
            found.append(_result(entry, labels))
            first = seen.setdefault(json.dumps(entry, sort_keys=True), number)
            if first == number and "id" in entry:
                first = ids.setdefault(str(entry["id"]), number)
            if first != number:
                raise AnnotationError(f"it repeats entry {first}, or its id; leave one of them out")
        except (AnnotationError, KeyError, TypeError, ValueError) as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
            raise AnnotationError(f"result file {str(path)!r}, entry {number}: {reason}") from error
    return found


def _result(entry: Any, labels: CocoLabels) -> CocoResult:
    if not isinstance(entry, Mapping):
        raise AnnotationError(f"{entry!r} is no object")
    image_id, category_id, score = entry["image_id"], entry["category_id"], float(entry["score"])
    if image_id not in labels.images:
        raise AnnotationError(f"image_id {image_id!r} is not among the images of the labels")
    if category_id not in labels.categories:
        raise AnnotationError(f"category_id {category_id!r} is not among the categories of the labels")
    if not math.isfinite(score):
        raise AnnotationError(f"its score is {score}")
    if not (entry.get("bbox") or entry.get("segmentation")):
        raise AnnotationError("it has neither bbox nor segmentation")
    return CocoResult(
        image_id,
        labels.categories[category_id],
        score,
        _hbox(entry["bbox"]) if entry.get("bbox") else None,
        _mask(entry["segmentation"], labels.images[image_id]) if entry.get("segmentation") else None,
    )


def _hbox(values: Any) -> tuple[float, float, float, float]:
    if len(values) != 4:
        raise AnnotationError(f"its bbox has {len(values)} numbers, not x, y, width, height")
    x, y, width, height = map(float, values)
    if not all(map(math.isfinite, (x, y, width, height))) or width < 0 or height < 0:
        raise AnnotationError(f"its bbox is {values!r}: sides of {width:g} x {height:g} px")
    return x, y, x + width, y + height


def _mask(segmentation: Any, image: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(segmentation, Mapping):
        raise AnnotationError("its segmentation is no run-length mask; COCO takes no polygons as results")
    size, runs = [int(value) for value in segmentation["size"]], decode_counts(segmentation["counts"])
    stated = [image.get("height"), image.get("width")]
    if size != stated or int(np.sum(runs)) != math.prod(size):
        raise AnnotationError(f"its mask covers {int(np.sum(runs))} px and is of size {size}, the image of {stated}")
    return {"size": size, "counts": encode_counts(runs)}
