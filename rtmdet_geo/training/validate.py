"""Scoring of left-out chips with the network as it stands, by the same tiles, border rule and merge as ``detect``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rtmdet_geo.boxes import regularize_le90
from rtmdet_geo.config import Recipe
from rtmdet_geo.evaluation.masks import mask_iou
from rtmdet_geo.evaluation.rotated import Curve, Truth, precision_recall
from rtmdet_geo.masks import CroppedMask, crop_outline
from rtmdet_geo.merge import merge_survivors, tile_survivors
from rtmdet_geo.models.decode import Candidates, DetectionGraph, InstanceCandidates
from rtmdet_geo.models.heads import STRIDES
from rtmdet_geo.nms import rotated_iou
from rtmdet_geo.stitch import outlines_of
from rtmdet_geo.structures import PAD_VALUE, Detections, Kind, MaskKernels, MaskView
from rtmdet_geo.tiles import TileGrid
from rtmdet_geo.training.labelled import LabelledImage


@dataclass(frozen=True)
class Found:
    """What a network found on one chip: detections in chip px, and for models of instances a mask for each."""

    detections: Detections
    masks: list[CroppedMask] | None = None


def detect_chip(
    network: torch.nn.Module, chip: LabelledImage, recipe: Recipe, *, dropped: Sequence[str] = (), device: str = "cpu"
) -> Detections:
    """Run the network over one chip in tiles and merge; see :func:`find_objects`, masks are not assembled."""
    return _run(network, chip, recipe, dropped, device)


def find_objects(
    network: torch.nn.Module, chip: LabelledImage, recipe: Recipe, *, dropped: Sequence[str] = (), device: str = "cpu"
) -> Found:
    """Run the network over one chip in tiles and merge.

    Args:
        network: in eval mode; normalisation is added as in a model file.
        chip: pixels (C, H, W) uint8.
        recipe: tile size, overlap, normalisation, thresholds.
        dropped: names of bands to overwrite with their fill value, as if the scene lacked them.
        device: where the network is.

    Returns:
        Detections in chip px (frame "scene"), score at or above ``validation.score_threshold``, score order; each with
        its mask in chip px if the model gives masks.
    """
    detections = _run(network, chip, recipe, dropped, device, with_masks=True)
    if network.kind != "mask":
        return Found(detections)
    _, height, width = chip.pixels.shape
    outlines = outlines_of(detections)  # None where nothing was found
    return Found(detections, [] if outlines is None else [crop_outline(item, width, height) for item in outlines])


def _run(
    network: torch.nn.Module,
    chip: LabelledImage,
    recipe: Recipe,
    dropped: Sequence[str],
    device: str,
    *,
    with_masks: bool = False,
) -> Detections:
    """Return the merged detections of a chip."""
    model, section = recipe.model, recipe.validation
    graph = DetectionGraph(network, model.mean, model.std).to(device)
    _, height, width = chip.pixels.shape
    grid = TileGrid(width, height, model.tile_size, model.overlap)
    parts = []
    shape = grid.padded_shape(STRIDES[-1])
    for tile in grid:
        image = np.full((len(model.bands), *shape), PAD_VALUE, np.uint8)
        window = chip.pixels[:, tile.y : tile.y + tile.height, tile.x : tile.x + tile.width]
        image[:, : tile.height, : tile.width] = window
        for band in dropped:
            image[model.bands.index(band)] = model.optional_bands[band]
        with torch.inference_mode():
            candidates = graph(torch.from_numpy(image)[None].to(device))
        found = _above(candidates, graph.kind, section.score_threshold, with_masks=with_masks)
        parts.append(
            tile_survivors(
                found,
                tile,
                grid,
                iou_threshold=section.nms_iou_threshold,
                mask_threshold=section.mask_threshold,
                input_shape=shape,
            )
        )
    # average precision as published: nothing but NMS by boxes
    return merge_survivors(parts, grid, iou_threshold=section.nms_iou_threshold, max_overlap=1).detections


def _above(
    candidates: Candidates | InstanceCandidates, kind: Kind, threshold: float, *, with_masks: bool
) -> Detections:
    """Take the candidates of one image, as they come from the graph, from the threshold on."""
    keep = (candidates.scores[0] >= threshold) & (candidates.boxes[0, :, 2:4] > 0).all(dim=1)
    boxes, scores, labels, *more = (tensor[0, keep].float().cpu().numpy() for tensor in candidates[:5])
    if kind == "rotated":
        return Detections(regularize_le90(boxes), scores, labels)
    masks = None
    if isinstance(candidates, InstanceCandidates) and with_masks:
        view = MaskView(candidates.mask_features[0].float().cpu().numpy())
        kernels, priors = more
        masks = MaskKernels(kernels, priors, (view,), np.zeros(len(boxes), np.int64))
    return Detections(boxes, scores, labels, kind=kind, masks=masks)


def chip_masks(chip: LabelledImage) -> list[CroppedMask]:
    """Return the labelled masks of a chip in its px, one per object (a box's own pixels where there is no outline)."""
    _, height, width = chip.pixels.shape
    return [crop_outline(shape, width, height) for shape in chip.shapes]


def chip_truths(chips: Sequence[LabelledImage], kind: Kind) -> list[Truth]:
    """Return the labels of chips, boxes as a model of some kind should find them."""
    return [Truth(chip.boxes_of(kind), chip.labels, chip.ignored) for chip in chips]


def mask_overlaps(found: Sequence[Found], chips: Sequence[LabelledImage]) -> list[NDArray[Any]]:
    """Return per chip the mask IoU (D, G) of what was found with what is labelled.

    Raises:
        ValueError: something was found without masks.
    """
    overlaps = []
    for item, chip in zip(found, chips, strict=True):
        if item.masks is None:
            raise ValueError(f"scene {chip.scene!r} was searched by a model without masks")
        overlaps.append(mask_iou(item.masks, chip_masks(chip)))
    return overlaps


def validate(
    network: torch.nn.Module,
    chips: Sequence[LabelledImage],
    recipe: Recipe,
    *,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Score a network on left-out chips: by the IoU of boxes, for models of instances by that of masks.

    Args:
        network: put into eval mode for the time of the call.
        chips: left-out images with labels.
        recipe: see ``validation``.
        device: where the network is.
        progress: called with (chips done, chips in all).

    Returns:
        One row per (set of dropped bands, class, IoU threshold): ``bands``, ``class``, ``iou``, ``ap``, ``best_f1``,
        ``best_score``, ``num_objects``, and ``detections`` (per chip) for whoever pools several folds.
    """
    was_training = network.training
    network.eval()
    truths = chip_truths(chips, network.kind)
    rows = []
    runs = recipe.validation.drop_bands
    for run, dropped in enumerate(runs):
        found = []
        for number, chip in enumerate(chips, 1):
            found.append(find_objects(network, chip, recipe, dropped=dropped, device=device))
            if progress is not None:
                progress(run * len(chips) + number, len(runs) * len(chips))
        bands = "+".join(band for band in recipe.model.bands if band not in dropped)
        overlaps = mask_overlaps(found, chips) if network.kind == "mask" else None
        rows += _rows(bands, [item.detections for item in found], truths, overlaps, recipe)
    network.train(was_training)
    return rows


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
        recipe: see :func:`detect_chip`.
        dropped: see :func:`detect_chip`.
        device: where the network is.
        score_threshold: lowest score that alarms.
        max_iou: detections that overlap no label by more are false.
        limit: at most so many per chip, best scores first.

    Returns:
        (M, 4) float64: chip index, x, y in chip px, score.
    """
    rows = []
    for index, chip in enumerate(chips):
        found = detect_chip(network, chip, recipe, dropped=dropped, device=device)
        found = found.select(found.scores >= score_threshold)
        if len(found) and len(chip.boxes):
            labelled = chip.boxes_of(network.kind)
            found = found.select(rotated_iou(found.boxes, labelled).max(axis=1) <= max_iou)
        found = found.select(np.arange(min(limit, len(found))))
        rows.append(np.column_stack([np.full(len(found), index), found.boxes[:, :2], found.scores]))
    return np.concatenate(rows) if rows else np.zeros((0, 4))


def _rows(
    bands: str, found: list[Detections], truths: list[Truth], overlaps: list[NDArray[Any]] | None, recipe: Recipe
) -> list[dict[str, Any]]:
    rows = []
    for label, name in enumerate(recipe.model.classes):
        for iou in recipe.validation.iou_thresholds:
            curve: Curve = precision_recall(found, truths, label=label, iou_threshold=iou, overlaps=overlaps)
            f1, score = curve.best_f1
            rows.append(
                {
                    "bands": bands,
                    "class": name,
                    "iou": iou,
                    "ap": curve.average_precision,
                    "best_f1": f1,
                    "best_score": score,
                    "num_objects": curve.num_objects,
                    "detections": found,
                }
            )
    return rows
