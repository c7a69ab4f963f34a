"""What was found in patches becomes what is found in images: moved by the patches' names, doubles suppressed.

* "devkit": DOTA_devkit (ResultMerge.py). Names are ``image__rate__x___y``; corners are moved and divided by the rate.
  Task 1 suppresses by the IoU of quadrilaterals, Task 2 by that of boxes whose pixels are counted (a pixel wider and
  higher than their corners say). Numbers are written as Python prints them.
* "bboxtoolkit": MMRotate's ``DOTAMetric.merge_results``. Names are ``image__size__x___y``; boxes are only moved, in
  float32. Scores are rounded to two decimals, coordinates written with two.

Within a class and image, whatever overlaps something better by more than a threshold is left out. Images are in the
order in which they first appear, detections in that of their scores; of equal ones the devkit's last line comes first.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rtmdet_geo.annotations.dota_results import ResultRows, Task, read_results
from rtmdet_geo.dota.rules import PatchName, Tool, find_tool, parse_patch_name
from rtmdet_geo.dota.submission import check_output, write_texts
from rtmdet_geo.errors import ConfigError
from rtmdet_geo.nms import nms_horizontal
from rtmdet_geo.quads import nms_polygons

FloatArray = NDArray[np.float64]


class PatchBoxes(NamedTuple):
    """Rotated boxes found in one patch.

    Attributes:
        name: of the patch.
        boxes: (N, 5) cx, cy, w, h in px of the patch, angle in rad.
        scores: (N,).
        labels: (N,) indexes of classes.
    """

    name: str
    boxes: NDArray[Any]
    scores: NDArray[Any]
    labels: NDArray[Any]


def merge_results(
    results: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    task: Task = 1,
    tool: Tool | None = None,
    iou_threshold: float = 0.1,
    classes: Sequence[str] | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Merge a folder of result files over patches into one over images.

    Args:
        results: folder of ``Task1_<class>.txt`` files (Task 2 likewise) whose images are patches.
        out: folder to make, or ``.zip`` file to submit.
        task: 1 oriented, 2 horizontal.
        tool: whose rules and names of patches, see the module's text; None: as the names say.
        iou_threshold: in [0, 1].
        classes: names that there must be a file for; None takes the files there are.
        overwrite: replace an earlier output.
        progress: called with classes done and all classes.

    Returns:
        ``out``, ``task``, ``tool``, ``classes``, ``images``, ``patches``, ``before`` and ``after``: detections.

    Raises:
        AnnotationError: a line is malformed, or its image is no patch; file and line are named.
        ConfigError: a value is outside its range, or patches are not named as the tool names them.
        DatasetNotFoundError: the folder is missing or lacks a file.
        OutputError: ``out`` exists or cannot be written.
    """
    _check(tool, iou_threshold)
    check_output(out, overwrite=overwrite)
    by_class = read_results(Path(results), task, classes)
    patches = dict.fromkeys(patch for rows in by_class.values() for patch in rows.image_ids)
    tool = find_tool(patches, tool)
    merged = {}
    for done, (name, rows) in enumerate(by_class.items(), 1):
        merged[name] = merge_rows(rows, tool=tool, iou_threshold=iou_threshold)
        if progress is not None:
            progress(done, len(by_class))
    write_texts(out, result_texts(merged, tool), task, overwrite=overwrite)
    return {
        "out": os.fspath(out),
        "task": task,
        "tool": tool,
        "classes": len(merged),
        "images": len({image for rows in merged.values() for image in rows.image_ids}),
        "patches": len(patches),
        "before": sum(map(len, by_class.values())),
        "after": sum(map(len, merged.values())),
    }


def merge_rows(rows: ResultRows, *, tool: Tool = "devkit", iou_threshold: float = 0.1) -> ResultRows:
    """Merge the detections of one class.

    Args:
        rows: over patches; Task 1 or 2, whichever corners it has.
        tool: see the module's text.
        iou_threshold: in [0, 1].

    Returns:
        Detections over images, in the order of the tool's files.

    Raises:
        AnnotationError: an image is no patch; file and line are named.
        ConfigError: a value is outside its range.
    """
    _check(tool, iou_threshold)
    corners = rows.polygons if rows.polygons is not None else rows.hboxes
    if corners is None:
        raise ConfigError("rows without polygons or hboxes cannot be merged")
    patches = _patches(rows)
    find_tool(dict.fromkeys(rows.image_ids), tool)
    shifts = np.array([(patch.x, patch.y) for patch in patches], np.float64).reshape(-1, 2)
    moved = corners + np.tile(shifts, corners.shape[1] // 2)
    if tool == "devkit":
        moved /= np.array([float(patch.scale) for patch in patches]).reshape(-1, 1)
    return _suppress([patch.image for patch in patches], rows.scores, moved, tool, iou_threshold)


def merge_boxes(
    patches: Iterable[PatchBoxes], classes: Sequence[str], *, tool: Tool = "bboxtoolkit", iou_threshold: float = 0.1
) -> dict[str, ResultRows]:
    """Merge rotated boxes that were found in patches.

    Args:
        patches: in any order; that of images follows from it.
        classes: names in label order.
        tool: see the module's text.
        iou_threshold: in [0, 1].

    Returns:
        Task 1 detections over images by class; every class is there.

    Raises:
        AnnotationError: a name is no patch's.
        ConfigError: a value is outside its range.
    """
    _check(tool, iou_threshold)
    found = [(parse_patch_name(patch.name), patch) for patch in patches]
    images = np.array([name.image for name, patch in found for _ in range(len(patch.labels))], dtype=object)
    labels = np.concatenate([np.zeros(0, np.int64), *(np.asarray(patch.labels, np.int64) for _, patch in found)])
    scores = np.concatenate([np.zeros(0), *(np.asarray(patch.scores, np.float32) for _, patch in found)])
    corners = np.concatenate([np.zeros((0, 8)), *(_place(name, patch.boxes, tool) for name, patch in found)])
    order = list(dict.fromkeys(name.image for name, _ in found))
    merged = {}
    for label, name in enumerate(classes):
        own = np.flatnonzero(labels == label)
        merged[name] = _suppress(images[own].tolist(), scores[own], corners[own], tool, iou_threshold, order)
    return merged


def result_texts(by_class: Mapping[str, ResultRows], tool: Tool | None = None) -> dict[str, str]:
    """Return the texts of result files by class.

    Args:
        by_class: Task 1 or 2 detections.
        tool: as whose files; None: scores with six decimals and coordinates with two at most.
    """
    return {name: "".join(f"{line}\n" for line in _lines(rows, tool)) for name, rows in by_class.items()}


def _lines(rows: ResultRows, tool: Tool | None) -> list[str]:
    corners = rows.polygons if rows.polygons is not None else rows.hboxes
    if corners is None:
        raise ConfigError("rows without polygons or hboxes cannot be written")
    scores, numbers = rows.scores.tolist(), corners.tolist()
    if tool == "bboxtoolkit":
        words = [
            [str(round(score, 2)), *(f"{value:.2f}" for value in row)]
            for score, row in zip(scores, numbers, strict=True)
        ]
    else:
        if tool is None:
            scores, numbers = np.round(rows.scores, 6).tolist(), np.round(corners, 2).tolist()
        words = [[str(score), *map(str, row)] for score, row in zip(scores, numbers, strict=True)]
    return [" ".join([image, *row]) for image, row in zip(rows.image_ids, words, strict=True)]


def _check(tool: Tool | None, iou_threshold: float) -> None:
    if tool not in (None, "devkit", "bboxtoolkit"):
        raise ConfigError(f"tool={tool!r} is unknown; choose 'devkit' or 'bboxtoolkit'")
    if not 0 <= iou_threshold <= 1:
        raise ConfigError(f"iou_threshold={iou_threshold!r} must be in [0, 1]")


def _patches(rows: ResultRows) -> list[PatchName]:
    """Return each detection's patch; the first line with a wrong one is named."""
    known: dict[str, PatchName] = {}
    for index, name in enumerate(rows.image_ids):
        if name not in known:
            known[name] = parse_patch_name(name, rows.place(index))
    return [known[name] for name in rows.image_ids]


def _place(patch: PatchName, boxes: NDArray[Any], tool: Tool) -> FloatArray:
    """Return corners (N, 8) in px of the image of boxes (N, 5) in px of a patch, in float32 as MMRotate's are.

    The corners begin where both of the box's own axes are positive, and go against the second (mmrotate
    structures/bbox/rotated_boxes.py ``rbox2corner``).
    """
    boxes = np.asarray(boxes, np.float32).reshape(-1, 5)
    if tool == "bboxtoolkit":
        boxes = boxes.copy()
        boxes[:, :2] += np.array([patch.x, patch.y], np.float32)
    centre, width, height, angle = boxes[:, :2], boxes[:, 2:3], boxes[:, 3:4], boxes[:, 4:5]
    cos, sin = np.cos(angle), np.sin(angle)
    along = np.hstack([width / 2 * cos, width / 2 * sin])
    across = np.hstack([-height / 2 * sin, height / 2 * cos])
    corners = np.hstack(
        [centre + along + across, centre + along - across, centre - along - across, centre - along + across]
    ).astype(np.float64)
    if tool == "bboxtoolkit":
        return corners
    return np.asarray((corners + np.array([patch.x, patch.y] * 4)) / float(patch.scale))


def _suppress(
    images: Sequence[str],
    scores: NDArray[Any],
    corners: FloatArray,
    tool: Tool,
    iou_threshold: float,
    order: Sequence[str] = (),
) -> ResultRows:
    """Return what is left of detections of one class, image by image.

    Args:
        images: D names.
        scores: (D,).
        corners: (D, 8) or (D, 4) in px of the images.
        tool: decides what comes first of equal scores, and how boxes count.
        iou_threshold: in [0, 1].
        order: of the images; others follow as they appear.
    """
    by_image: dict[str, list[int]] = {image: [] for image in order}
    for index, image in enumerate(images):
        by_image.setdefault(image, []).append(index)
    kept: list[NDArray[np.int64]] = [np.zeros(0, np.int64)]
    for indexes in by_image.values():
        own = np.array(indexes[:: -1 if tool == "devkit" else 1], np.int64)
        own = own[np.argsort(-scores[own], kind="stable")]
        ranks = -np.arange(len(own), dtype=np.float64)
        if corners.shape[1] == 8:
            kept.append(own[np.sort(nms_polygons(corners[own], ranks, iou_threshold))])
        else:
            wider = corners[own] + (np.array([0, 0, 1, 1]) if tool == "devkit" else 0)
            kept.append(own[np.sort(nms_horizontal(wider, ranks, iou_threshold=iou_threshold))])
    chosen = np.concatenate(kept)
    found = np.ascontiguousarray(corners[chosen])
    return ResultRows(
        tuple(images[index] for index in chosen.tolist()),
        np.asarray(scores[chosen], np.float64),
        polygons=found if corners.shape[1] == 8 else None,
        hboxes=found if corners.shape[1] == 4 else None,
    )
