"""Is the built engine what was asked for: its precision by TensorRT's inspector, its numbers by onnxruntime's."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtmdet_geo.backends.contract import OUTPUTS, rows_per_level
from rtmdet_geo.backends.onnxrt import open_model_file
from rtmdet_geo.backends.trt_run import Lane
from rtmdet_geo.errors import EngineError
from rtmdet_geo.structures import ModelSpec

logger = logging.getLogger(__name__)

#: Largest differences by precision: of boxes in px, of scores. int8 is judged by its AP, on labelled data.
TOLERANCES = {"fp32": (0.05, 1e-3), "fp16": (0.5, 0.01), "int8": (np.inf, np.inf)}
#: Rows are compared whose score is so much above the model's threshold.
SCORE_MARGIN = 0.02
#: Tiles that a new engine is tried on.
NUM_TILES = 3


def check_layers(description: str, precision: str, half_nodes: Mapping[str, str]) -> dict[str, int]:
    """Compare the built layers with the precision that was asked for.

    Args:
        description: JSON of TensorRT's engine inspector, in detail.
        precision: of the engine.
        half_nodes: operators of the graph's nodes in fp16, by their names.

    Returns:
        Numbers of layers in all, of convolutions, and of convolutions by precision.

    Raises:
        EngineError: a convolution of the trunk is computed in fp32, or nothing shows that any is not.
    """
    layers = [layer for layer in json.loads(description).get("Layers", []) if isinstance(layer, dict)]
    trunk = {name for name, operator in half_nodes.items() if operator == "Conv"}
    counts = {"layers": len(layers), "convolutions": 0, "fp32": 0, "fp16": 0, "int8": 0}
    downgraded = []
    for layer in layers:
        if not _is_convolution(layer):
            continue
        counts["convolutions"] += 1
        found = _precision_of(layer)
        if found is not None:
            counts[found] += 1
        if precision == "fp16" and found == "fp32" and trunk.intersection(_names_in(layer)):
            downgraded.append(layer.get("Name", "?"))
    if downgraded:
        raise EngineError(
            f"fp16 was asked for, but TensorRT computes {len(downgraded)} of {counts['convolutions']} convolutions in "
            f"fp32, such as {downgraded[0]!r}; take precision fp32, or another version of TensorRT"
        )
    if precision != "fp32" and not counts[precision] and not _is_anywhere(layers, precision):
        raise EngineError(
            f"{precision} was asked for, but TensorRT shows no layer of the engine in it ({counts}); take precision "
            "fp32, or another version of TensorRT"
        )
    return counts


def _is_convolution(layer: dict[str, Any]) -> bool:
    return layer.get("ParameterType") == "Convolution" or "conv" in str(layer.get("LayerType", "")).lower()


def _precision_of(layer: dict[str, Any]) -> str | None:
    """Return what a convolution computes in: by its tensors, where they are known, else by its weights.

    What goes in decides, and fp32 sums may come out; a conversion may be fused to either side.
    """
    tensors = {_named(text) for text in _formats(layer)}
    for precision in ("int8", "fp16", "fp32"):
        if precision in tensors:
            return precision
    weights = layer.get("Weights")
    return _named(str(weights.get("Type", ""))) if isinstance(weights, dict) else None


def _is_anywhere(layers: list[dict[str, Any]], precision: str) -> bool:
    """Say whether any layer has a tensor of that precision: compilers may hide convolutions in larger layers."""
    return any(_named(text) == precision for layer in layers for text in _formats(layer))


def _formats(layer: dict[str, Any]) -> Iterator[str]:
    """Yield what is said of the types of a layer's tensors; TensorRT 11 has one field for layout and one for type."""
    for side in ("Inputs", "Outputs"):
        for tensor in layer.get(side) or []:
            if isinstance(tensor, dict):
                yield from (str(value) for key, value in tensor.items() if "type" in key.lower())


def _named(text: str) -> str | None:
    """Return the precision that a phrase such as "Row major linear FP16 format" or "Half" names; None: another."""
    phrase = text.lower()
    for precision, words in (
        ("fp16", ("fp16", "half", "float16")),
        ("int8", ("int8",)),
        ("fp32", ("fp32", "float32", "float")),
    ):
        if any(re.search(rf"(?<![a-z]){word}(?![0-9])", phrase) for word in words):
            return precision
    return None


def _names_in(layer: dict[str, Any]) -> set[str]:
    """Return the names of the graph's nodes that a layer does the work of."""
    text = str(layer.get("Name", ""))
    nodes = re.findall(r"\[ONNX Layer: ([^\]]*)\]", str(layer.get("Metadata", "")))
    return {text, *re.split(r"[\s+,()]+", text), *nodes}


def check_numbers(lane: Lane, model_file: Path, spec: ModelSpec, tile_size: int, precision: str) -> dict[str, float]:
    """Compare an engine with onnxruntime on tiles that look like scenes, one by one and as a batch.

    Args:
        lane: that runs the engine.
        model_file: in fp32, or in the engine's own precision.
        spec: of the model file.
        tile_size: side of the tiles in px.
        precision: of the engine.

    Returns:
        The largest differences: "boxes_px" and "scores".

    Raises:
        EngineError: they exceed TOLERANCES, an output is not finite, or a tile's result depends on its batch.
    """
    session, _ = open_model_file(model_file)
    names = list(OUTPUTS[spec.kind])
    tiles = check_tiles(NUM_TILES, len(spec.bands), tile_size)
    expected = dict(zip(names, _run_session(session, names, tiles, lane.engine.min_batch), strict=True))
    allowed = TOLERANCES[precision]
    worst = {"boxes_px": 0.0, "scores": 0.0}
    for size in sorted({lane.engine.min_batch, min(NUM_TILES, lane.capacity)}):
        parts = [lane.submit(tiles[start : start + size]).results() for start in range(0, NUM_TILES, size)]
        found = {name: np.concatenate(values) for name, values in zip(names, zip(*parts, strict=True), strict=True)}
        unfit = [name for name, values in found.items() if not np.isfinite(values).all()]
        if unfit:
            raise EngineError(
                f"the engine returns numbers in {', '.join(unfit)} that are not finite; take precision fp32, or "
                "another version of TensorRT"
            )
        boxes, scores = compare_rows(expected, found, spec, tile_size, allowed)
        worst = {"boxes_px": max(worst["boxes_px"], boxes), "scores": max(worst["scores"], scores)}
    logger.info("engine check: boxes differ by %.3g px, scores by %.3g", worst["boxes_px"], worst["scores"])
    if worst["boxes_px"] > allowed[0] or worst["scores"] > allowed[1]:
        raise EngineError(
            f"the {precision} engine differs from the model file by {worst['boxes_px']:.3g} px and "
            f"{worst['scores']:.3g} in scores (allowed: {allowed[0]:g} px, {allowed[1]:g}); nothing was kept: take "
            "precision fp32, or another version of TensorRT"
        )
    return worst


def _run_session(session: Any, names: list[str], tiles: NDArray[np.uint8], batch: int) -> list[NDArray[np.float32]]:
    """Return onnxruntime's outputs for all tiles; a model file of a fixed batch size gets full batches."""
    padded = np.concatenate([tiles, np.zeros((-len(tiles) % batch, *tiles.shape[1:]), np.uint8)])
    parts = [session.run(names, {"images": padded[start : start + batch]}) for start in range(0, len(padded), batch)]
    return [np.concatenate(values)[: len(tiles)] for values in zip(*parts, strict=True)]


_Outputs = dict[str, NDArray[np.float32]]


def compare_rows(
    expected: _Outputs, found: _Outputs, spec: ModelSpec, side: int, allowed: tuple[float, float]
) -> tuple[float, float]:
    """Return how far the rows of two engines are apart, px of boxes and scores, inf where a row has no partner.

    Every row of one that is clearly above the model's score threshold must have a partner in the other, of the same
    label (of instances, the same prior too): the one that is nearest by box and score, in parts of what is allowed.
    Rows of a cut-off level that tie with its last one are left out, since another may stand there.

    Args:
        expected: outputs by name.
        found: likewise, of the same images.
        spec: of the model.
        side: of the images in px.
        allowed: px and score that count as equally far.
    """
    levels = rows_per_level(spec.object_kind, len(spec.classes), side, side)
    scale = np.array([allowed[0] if np.isfinite(allowed[0]) else 1.0, allowed[1] if np.isfinite(allowed[1]) else 0.02])
    worst = np.zeros(2)
    for image in range(len(expected["scores"])):
        one, other = ({name: values[image] for name, values in side.items()} for side in (expected, found))
        for mine, theirs in ((one, other), (other, one)):
            for row in np.flatnonzero(_is_compared(mine["scores"], levels, spec.score_threshold, scale[1])):
                worst = np.maximum(worst, _distance(mine, theirs, int(row), scale))
    return float(worst[0]), float(worst[1])


def _is_compared(
    scores: NDArray[np.float32], levels: list[tuple[int, bool]], threshold: float, step: float
) -> NDArray[np.bool_]:
    chosen = scores >= threshold + SCORE_MARGIN
    start = 0
    for rows, is_cut in levels:
        level = slice(start, start + rows)
        if is_cut:
            chosen[level] &= scores[level] > scores[level].min() + 2 * step
        start += rows
    return chosen


def _distance(mine: _Outputs, theirs: _Outputs, row: int, scale: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the distances in px and score from a row to its partner; inf, inf without one."""
    is_partner = theirs["labels"] == mine["labels"][row]
    if "mask_priors" in mine:
        is_partner &= (theirs["mask_priors"] == mine["mask_priors"][row]).all(axis=1)
    partners = np.flatnonzero(is_partner)
    if not len(partners):
        return np.full(2, np.inf)
    box = mine["boxes"][row].astype(np.float64)
    difference = np.abs(theirs["boxes"][partners] - box)
    turned = np.minimum(difference[:, 4] % np.pi, np.pi - difference[:, 4] % np.pi)
    px = np.maximum(difference[:, :4].max(axis=1), turned * box[2:4].max() / 2)
    score = np.abs(theirs["scores"][partners] - mine["scores"][row])
    distances = np.column_stack([px, score])
    nearest: NDArray[np.float64] = distances[(distances / scale).max(axis=1).argmin()]
    return nearest


def check_tiles(number: int, channels: int, side: int) -> NDArray[np.uint8]:
    """Return uint8 (number, channels, side, side): smooth ground, bright oblong blobs, noise; always the same."""
    generator = np.random.default_rng(8)
    rows, columns = np.mgrid[0:side, 0:side].astype(np.float32)
    tiles = np.empty((number, channels, side, side), np.uint8)
    for tile in tiles:
        grey = 45 + generator.normal(0, 20) * (rows + columns - side) / side
        for _ in range(12):
            x, y = generator.uniform(0, side, 2)
            angle = generator.uniform(0, np.pi)
            along = (columns - x) * np.cos(angle) + (rows - y) * np.sin(angle)
            across = (rows - y) * np.cos(angle) - (columns - x) * np.sin(angle)
            grey = grey + 150 * (
                (np.abs(along) < generator.uniform(6, 24)) & (np.abs(across) < generator.uniform(2, 6))
            )
        gains = generator.uniform(0.7, 1.3, (channels, 1, 1))
        tile[:] = (grey * gains + generator.normal(0, 4, (channels, side, side))).clip(0, 255)
    return tiles
