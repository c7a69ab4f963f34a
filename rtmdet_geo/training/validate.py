"""Scoring of left-out images with the network as it stands: which figures, and how they are worked out.

:mod:`rtmdet_geo.training.search` finds the objects, :mod:`rtmdet_geo.evaluation` scores them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from rtmdet_geo.boxes import boxes_to_hboxes
from rtmdet_geo.config import Recipe
from rtmdet_geo.errors import AnnotationError
from rtmdet_geo.evaluation.coco import CocoDetections, CocoScores, CocoTruth, evaluate_coco, run_lengths
from rtmdet_geo.evaluation.masks import mask_iou
from rtmdet_geo.evaluation.plots import NamedCurve
from rtmdet_geo.evaluation.rotated import Curve, Truth, match_images
from rtmdet_geo.masks import CroppedMask, crop_outline
from rtmdet_geo.nms import rotated_iou
from rtmdet_geo.structures import Detections, Kind
from rtmdet_geo.training.labelled import LabelledImage
from rtmdet_geo.training.processes import Processes
from rtmdet_geo.training.search import Found, detect_chip, search

logger = logging.getLogger(__name__)

Protocol = Literal["area", "voc07", "coco"]

#: IoU at which COCO's verdict on each class is told, besides that over all.
_COCO_ROWS = (0.5, 0.75)


@dataclass(frozen=True)
class Validation:
    """How good a network is on left-out images.

    Attributes:
        figures: means over the classes that have objects, by name: "AP50" or "mask AP50" for each IoU threshold, or
            COCO's twelve; of runs without some bands with the names of the others, as in "AP50 red+green+blue". The
            first decides which state of a network is the best. nan where nothing is labelled.
        rows: per (set of bands, class, IoU threshold): ``bands``, ``class``, ``measure``, ``iou``, ``ap``, ``best_f1``,
            ``best_score``, ``num_objects``. COCO's AP over all its thresholds has ``iou`` and best values nan.
        curves: per class with objects, all bands, at IoU 0.5 or the first threshold.
        num_images: images that were scored.
        left_out: names of images that do not decode.
    """

    figures: dict[str, float]
    rows: list[dict[str, Any]]
    curves: list[NamedCurve]
    num_images: int
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Seen:
    """What scoring needs of one image, small enough to be kept and sent.

    ``overlaps`` (D, G): IoU of masks; ``masks``: run lengths of the detections'. Both only where they are needed.
    """

    detections: Detections
    overlaps: NDArray[np.float64] | None = None
    masks: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class _Verdict:
    """What one set of bands comes to."""

    figures: dict[str, float]
    rows: list[dict[str, Any]] = field(default_factory=list)
    curves: list[NamedCurve] = field(default_factory=list)


def chip_masks(chip: LabelledImage) -> list[CroppedMask]:
    """Return the labelled masks of an image in its px, one per object (a box's own pixels where it has no outline)."""
    return [crop_outline(shape, chip.width, chip.height) for shape in chip.shapes]


def chip_truths(chips: Sequence[LabelledImage], kind: Kind) -> list[Truth]:
    """Return the labels of images, boxes as a model of some kind should find them."""
    return [Truth(chip.boxes_of(kind), chip.labels, chip.ignored) for chip in chips]


def mask_overlaps(found: Sequence[Found], chips: Sequence[LabelledImage]) -> list[NDArray[Any]]:
    """Return per image the mask IoU (D, G) of what was found with what is labelled.

    Raises:
        ValueError: something was found without masks.
    """
    overlaps = []
    for item, chip in zip(found, chips, strict=True):
        if item.masks is None:
            raise ValueError(f"scene {chip.scene!r} was searched by a model without masks")
        overlaps.append(mask_iou(item.masks, chip_masks(chip)))
    return overlaps


def average_of(curve: Curve, protocol: Protocol) -> float:
    """Return a curve's average precision by a protocol, "area" or "voc07"."""
    return curve.average_precision_11 if protocol == "voc07" else curve.average_precision


def validate(
    network: torch.nn.Module,
    images: Sequence[LabelledImage],
    recipe: Recipe,
    *,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
    processes: Processes | None = None,
) -> Validation:
    """Score a network on left-out images by the recipe's protocol; for models of instances by the IoU of masks.

    Ignored objects are neither hit nor miss; COCO's protocol takes them for crowds.

    Args:
        network: put into eval mode for the time of the call.
        images: left-out images with labels.
        recipe: see ``validation``; ``augment`` says whether images are searched whole, ``data.on_bad_image`` what
            becomes of one that does not decode.
        device: where the network is.
        progress: called with (images done, images in all), those of this process, once for each set of bands.
        processes: that share the search; each of them calls this with the same images. None: there is one.

    Returns:
        Figures, rows and curves, the same in every process.

    Raises:
        AnnotationError: an image does not decode and the recipe says to stop, or none does; in every process.
        MissingDependencyError: COCO's protocol without faster-coco-eval.
    """
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    processes = processes if processes is not None else Processes(torch.device(device))
    try:
        parts: list[_Verdict] = []
        bad: dict[str, None] = {}
        for run, dropped in enumerate(recipe.validation.drop_bands):
            seen = _search_share(network, images, recipe, dropped, device, processes, _step(progress, run, recipe))
            good, failed = _sort_out(images, seen, recipe)
            bad |= dict.fromkeys(failed)
            parts.append(_judge([entry for _, entry in good], [image for image, _ in good], recipe, dropped))
    finally:
        for module, was_training in modes:
            module.training = was_training
    figures = {name: value for part in parts for name, value in part.figures.items()}
    rows = [row for part in parts for row in part.rows]
    return Validation(figures, rows, parts[0].curves if parts else [], len(images) - len(bad), tuple(bad))


def _step(progress: Callable[[int, int], None] | None, run: int, recipe: Recipe) -> Callable[[int, int], None]:
    """Return how to tell that so many of this run's images are done."""

    def tell(done: int, number: int) -> None:
        if progress is not None:
            progress(run * number + done, len(recipe.validation.drop_bands) * number)

    return tell


def _search_share(
    network: torch.nn.Module,
    images: Sequence[LabelledImage],
    recipe: Recipe,
    dropped: Sequence[str],
    device: str,
    processes: Processes,
    tell: Callable[[int, int], None],
) -> list[_Seen | AnnotationError]:
    """Return what was seen in every image that was come to, in order: this process's own part and what it is sent."""
    mine = images[processes.rank :: processes.world]

    def keep(image: LabelledImage, found: Found) -> _Seen:
        return _keep(image, found, recipe)

    own: list[_Seen | AnnotationError] = []
    for entry in search(network, mine, recipe, then=keep, dropped=dropped, device=device):
        own.append(entry)
        tell(len(own), len(mine))
        if isinstance(entry, AnnotationError) and recipe.data.on_bad_image == "stop":
            break  # the others hear of it when all have come so far
    parts = processes.gather(own)
    if recipe.data.on_bad_image == "stop":
        for entry in (entry for part in parts for entry in part):
            if isinstance(entry, AnnotationError):
                raise entry
    return [parts[number % processes.world][number // processes.world] for number in range(len(images))]


def _keep(image: LabelledImage, found: Found, recipe: Recipe) -> _Seen:
    """Return what scoring needs of the masks, and forget them."""
    detections = replace(found.detections, masks=None)
    if found.masks is None:
        return _Seen(detections)
    if recipe.validation.protocol == "coco":
        return _Seen(detections, masks=[run_lengths(item, image.height, image.width) for item in found.masks])
    return _Seen(detections, overlaps=mask_iou(found.masks, chip_masks(image)))


def _sort_out(
    images: Sequence[LabelledImage], seen: Sequence[_Seen | AnnotationError], recipe: Recipe
) -> tuple[list[tuple[LabelledImage, _Seen]], list[str]]:
    """Return the images that could be searched, and the names of those that could not, which the log hears of.

    Raises:
        AnnotationError: none could be searched.
    """
    good, failed = [], []
    for image, entry in zip(images, seen, strict=True):
        if isinstance(entry, AnnotationError):
            logger.warning("validation leaves out %s: %s", image.name, entry)
            failed.append(image.name)
        else:
            good.append((image, entry))
    if failed and not good:
        raise AnnotationError(f"none of the {len(failed)} left-out images of {recipe.name!r} decodes; see the log")
    if failed:
        logger.warning("validation leaves out %d of %d images, which do not decode", len(failed), len(images))
    return good, failed


def _judge(seen: Sequence[_Seen], images: Sequence[LabelledImage], recipe: Recipe, dropped: Sequence[str]) -> _Verdict:
    """Score what was seen with one set of bands."""
    bands = "+".join(band for band in recipe.model.bands if band not in dropped)
    ending = f" {bands}" if dropped else ""
    kind = recipe.model.object_kind
    if recipe.validation.protocol == "coco":
        verdict = _judge_by_coco(seen, images, recipe, kind)
    else:
        verdict = _judge_by_curves(seen, images, recipe, kind)
    figures = {name + ending: value for name, value in verdict.figures.items()}
    return _Verdict(figures, [{"bands": bands} | row for row in verdict.rows], verdict.curves)


def _judge_by_curves(seen: Sequence[_Seen], images: Sequence[LabelledImage], recipe: Recipe, kind: Kind) -> _Verdict:
    """Average each class's curve at each IoU threshold of the recipe."""
    section, truths = recipe.validation, chip_truths(images, kind)
    detections = [entry.detections for entry in seen]
    overlaps = [entry.overlaps for entry in seen if entry.overlaps is not None] if kind == "mask" else None
    shown = 0.5 if 0.5 in section.iou_thresholds else section.iou_thresholds[0]
    averages: dict[str, list[float]] = {_measure(kind, iou): [] for iou in section.iou_thresholds}
    rows, curves = [], []
    for label, name in enumerate(recipe.model.classes):
        matches = match_images(detections, truths, label=label, overlaps=overlaps)
        for iou in section.iou_thresholds:
            curve = matches.curve(iou)
            measure, average = _measure(kind, iou), average_of(curve, section.protocol)
            averages[measure].append(average)
            rows.append(_row(name, measure, iou, average, curve))
            if iou == shown and curve.num_objects:
                curves.append(NamedCurve(name, measure, average, curve))
    return _Verdict({measure: _mean(values) for measure, values in averages.items()}, rows, curves)


def _judge_by_coco(seen: Sequence[_Seen], images: Sequence[LabelledImage], recipe: Recipe, kind: Kind) -> _Verdict:
    """Take COCO's twelve figures; of instances those of masks, then those of boxes."""
    classes = recipe.model.classes
    truths = [_coco_truth(image, kind) for image in images]
    found = [
        CocoDetections(boxes_to_hboxes(item.boxes), item.scores, item.labels, entry.masks)
        for entry in seen
        for item in (entry.detections,)
    ]
    figures: dict[str, float] = {}
    verdicts: list[CocoScores] = []
    for measure in ("masks", "boxes") if kind == "mask" else ("boxes",):
        verdicts.append(evaluate_coco(found, truths, num_classes=len(classes), measure=measure))
        prefix = "mask " if measure == "masks" else ""
        figures |= {prefix + name: value for name, value in verdicts[-1].figures.items()}
    first, rows, curves = verdicts[0], [], []
    for label, name in enumerate(classes):
        nothing = Curve(float("nan"), np.zeros(0), np.zeros(0), np.zeros(0), int(first.num_objects[label]))
        row = _row(name, _measure(kind), float("nan"), first.average_precision(label), nothing)
        rows.append(row | {"best_f1": float("nan"), "best_score": float("nan")})
        for iou in _COCO_ROWS:
            curve = first.curve(label, iou)
            rows.append(_row(name, _measure(kind, iou), iou, curve.average_precision, curve))
        if first.num_objects[label]:
            curve = first.curve(label, 0.5)
            curves.append(NamedCurve(name, _measure(kind, 0.5), curve.average_precision, curve))
    return _Verdict(figures, rows, curves)


def _coco_truth(image: LabelledImage, kind: Kind) -> CocoTruth:
    """Return an image's labels; an object is as large as its file says, else as its mask, or its box if it has none."""
    boxes, masks = image.boxes_of(kind), chip_masks(image)
    has_outline = np.array([bool(outline) for outline in image.outlines] or [False] * len(boxes), bool)
    pixels = np.array([np.count_nonzero(item.mask) for item in masks], float)
    areas = np.where(has_outline, pixels, boxes[:, 2] * boxes[:, 3])
    if image.areas is not None:
        areas = np.where(np.isnan(image.areas), areas, image.areas)
    packed = [run_lengths(item, image.height, image.width) for item in masks] if kind == "mask" else None
    return CocoTruth(boxes_to_hboxes(boxes), image.labels, image.ignored, areas, packed)


def _measure(kind: Kind, iou: float | None = None) -> str:
    """Return what average precision at an IoU is called: "AP50", "mask AP50"; over COCO's thresholds "AP"."""
    return ("mask AP" if kind == "mask" else "AP") + ("" if iou is None else str(round(iou * 100)))


def _row(name: str, measure: str, iou: float, average: float, curve: Curve) -> dict[str, Any]:
    f1, score = curve.best_f1
    return {
        "class": name,
        "measure": measure,
        "iou": iou,
        "ap": average,
        "best_f1": f1,
        "best_score": score,
        "num_objects": curve.num_objects,
    }


def _mean(values: Sequence[float]) -> float:
    """Return the mean of the numbers among values; nan where there are none."""
    numbers = [value for value in values if not np.isnan(value)]
    return float(np.mean(numbers)) if numbers else float("nan")


def find_false_alarms(
    network: torch.nn.Module,
    chips: Sequence[LabelledImage],
    recipe: Recipe,
    *,
    dropped: Sequence[str] = (),
    device: str = "cpu",
    score_threshold: float = 0.1,
    max_iou: float = 0.1,
    limit: int = 300,
) -> NDArray[np.float64]:
    """Return where the network sees objects that nobody labelled, to train on these places next.

    Args:
        network: in eval mode.
        chips: training images with labels.
        recipe: see :func:`rtmdet_geo.training.search.find_objects`.
        dropped: likewise.
        device: where the network is.
        score_threshold: lowest score that alarms.
        max_iou: detections that overlap no label by more are false.
        limit: at most so many per chip, best scores first.

    Returns:
        (M, 4) float64: chip index, x, y in chip px, score.

    Raises:
        AnnotationError: an image does not decode and the recipe says to stop.
    """
    rows = []
    for index, chip in enumerate(chips):
        try:
            found = detect_chip(network, chip, recipe, dropped=dropped, device=device)
        except AnnotationError as error:
            if recipe.data.on_bad_image == "stop":
                raise
            logger.warning("%s; it is not searched for false alarms", error)
            continue
        found = found.select(found.scores >= score_threshold)
        if len(found) and len(chip.boxes):
            labelled = chip.boxes_of(network.kind)
            found = found.select(rotated_iou(found.boxes, labelled).max(axis=1) <= max_iou)
        found = found.select(np.arange(min(limit, len(found))))
        rows.append(np.column_stack([np.full(len(found), index), found.boxes[:, :2], found.scores]))
    return np.concatenate(rows) if rows else np.zeros((0, 4))
