"""Scoring of left-out chips with the network as it stands, by the same tiles, border rule and merge as ``detect``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rtmdet_geo.boxes import regularize_le90
from rtmdet_geo.config import Recipe
from rtmdet_geo.evaluation.rotated import Curve, Truth, precision_recall
from rtmdet_geo.merge import merge_detections
from rtmdet_geo.models.decode import DetectionGraph
from rtmdet_geo.models.heads import STRIDES
from rtmdet_geo.nms import rotated_iou
from rtmdet_geo.structures import PAD_VALUE, Detections
from rtmdet_geo.tiles import TileGrid
from rtmdet_geo.training.datasets import Chip


def detect_chip(
    network: torch.nn.Module, chip: Chip, recipe: Recipe, *, dropped: Sequence[str] = (), device: str = "cpu"
) -> Detections:
    """Run the network over one chip in tiles and merge.

    Args:
        network: in eval mode; normalisation is added as in a model file.
        chip: pixels (C, H, W) uint8.
        recipe: tile size, overlap, normalisation, thresholds.
        dropped: names of bands to overwrite with their fill value, as if the scene lacked them.
        device: where the network is.

    Returns:
        Detections in chip px (frame "scene"), score at or above ``validation.score_threshold``, score order.
    """
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
            boxes, scores, labels = graph(torch.from_numpy(image)[None].to(device))
        parts.append((tile, _above(boxes[0], scores[0], labels[0], section.score_threshold)))
    return merge_detections(parts, grid, iou_threshold=section.nms_iou_threshold).detections


def _above(boxes: torch.Tensor, scores: torch.Tensor, labels: torch.Tensor, threshold: float) -> Detections:
    keep = scores >= threshold
    arrays: list[NDArray[Any]] = [tensor[keep].float().cpu().numpy() for tensor in (boxes, scores, labels)]
    valid = (arrays[0][:, 2:4] > 0).all(axis=1)
    return Detections(regularize_le90(arrays[0][valid]), arrays[1][valid], arrays[2][valid])


def validate(
    network: torch.nn.Module,
    chips: Sequence[Chip],
    recipe: Recipe,
    *,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Score a network on left-out chips.

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
    truths = [Truth(chip.boxes, chip.labels, chip.ignored) for chip in chips]
    rows = []
    runs = recipe.validation.drop_bands
    for run, dropped in enumerate(runs):
        found = []
        for number, chip in enumerate(chips, 1):
            found.append(detect_chip(network, chip, recipe, dropped=dropped, device=device))
            if progress is not None:
                progress(run * len(chips) + number, len(runs) * len(chips))
        bands = "+".join(band for band in recipe.model.bands if band not in dropped)
        rows += _rows(bands, found, truths, recipe)
    network.train(was_training)
    return rows


def find_false_alarms(
    network: torch.nn.Module,
    chips: Sequence[Chip],
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
            found = found.select(rotated_iou(found.boxes, chip.boxes).max(axis=1) <= max_iou)
        found = found.select(np.arange(min(limit, len(found))))
        rows.append(np.column_stack([np.full(len(found), index), found.boxes[:, :2], found.scores]))
    return np.concatenate(rows) if rows else np.zeros((0, 4))


def _rows(bands: str, found: list[Detections], truths: list[Truth], recipe: Recipe) -> list[dict[str, Any]]:
    rows = []
    for label, name in enumerate(recipe.model.classes):
        for iou in recipe.validation.iou_thresholds:
            curve: Curve = precision_recall(found, truths, label=label, iou_threshold=iou)
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
