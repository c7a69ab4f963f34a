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

from rtmdet_geo.backends.contract import OUTPUTS
from rtmdet_geo.backends.trt_run import Lane
from rtmdet_geo.errors import EngineError, ExportMismatchError
from rtmdet_geo.export.check import (
    CheckBatch,
    FileReference,
    Outputs,
    as_record,
    verify_export,
)
from rtmdet_geo.export.tiles import make_check_tiles, shipped_tiles
from rtmdet_geo.structures import ModelSpec

logger = logging.getLogger(__name__)

#: A fp16 engine may be off by so many times what a fp16 file may: kernels that TensorRT chooses sum in fp16.
HALF_SLACK = 4.0


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
    layers = _layers_of(description)
    trunk = {name for name, operator in half_nodes.items() if operator == "Conv"}
    counts = {"layers": len(layers), "convolutions": 0, "fp32": 0, "fp16": 0}
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
    if precision == "fp16" and not counts["fp16"] and not _is_anywhere(layers, "fp16"):
        raise EngineError(
            f"fp16 was asked for, but TensorRT shows no layer of the engine in it ({counts}); take precision fp32, or "
            "another version of TensorRT"
        )
    return counts


def _layers_of(description: str) -> list[dict[str, Any]]:
    """Return the layers that an inspector describes; none where it gives names only, or no JSON, which is logged."""
    try:
        described = json.loads(description, strict=False)  # names of fused nodes are joined by a control character
    except ValueError as error:
        logger.warning("what TensorRT's inspector says of the engine is no JSON (%s)", error)
        return []
    return [layer for layer in described.get("Layers", []) if isinstance(layer, dict)]


def _is_convolution(layer: dict[str, Any]) -> bool:
    """Say whether a layer is a convolution, whatever is fused to it; conversions of types are none."""
    kind = str(layer.get("LayerType", "")).lower()
    return layer.get("ParameterType") == "Convolution" or re.search("conv(?!er)", kind) is not None


def _precision_of(layer: dict[str, Any]) -> str | None:
    """Return what a convolution computes in: by its tensors, where they are known, else by its weights.

    What goes in decides, and fp32 sums may come out; a conversion may be fused to either side.
    """
    tensors = {_named(text) for text in _formats(layer)}
    for precision in ("fp16", "fp32"):
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
    for precision, words in (("fp16", ("fp16", "half", "float16")), ("fp32", ("fp32", "float32", "float"))):
        if any(re.search(rf"(?<![a-z]){word}(?![0-9])", phrase) for word in words):
            return precision
    return None


def _names_in(layer: dict[str, Any]) -> set[str]:
    """Return the names of the graph's nodes that a layer does the work of."""
    text = str(layer.get("Name", ""))
    nodes = re.findall(r"\[ONNX Layer: ([^\]]*)\]", str(layer.get("Metadata", "")))
    return {text, *re.split(r"[\s+,()]+", text), *nodes}


def check_numbers(lane: Lane, model_file: Path, spec: ModelSpec, image_size: tuple[int, int]) -> dict[str, float]:
    """Compare an engine with onnxruntime on real tiles and a drawn one, each alone and as many at once as it takes.

    Args:
        lane: that runs the engine.
        model_file: that it was built from.
        spec: of the engine: its precision says what is allowed.
        image_size: height and width of its images in px.

    Returns:
        The largest differences, see :func:`rtmdet_geo.export.check.as_record`.

    Raises:
        EngineError: they are too large, or a number is not finite.
    """
    height, width = image_size
    drawn = make_check_tiles(1, len(spec.bands), max(image_size), seed=0)
    tiles = np.ascontiguousarray(np.stack([*shipped_tiles(spec, max(image_size)), *drawn])[:, :, :height, :width])
    together = [tiles[start : start + lane.capacity] for start in range(0, len(tiles), lane.capacity)]
    batches = [CheckBatch(images, is_real=True) for images in (*together, *(tile[None] for tile in tiles))]
    built: Any = _Built(lane, spec)
    try:
        found = verify_export(
            _Remembered(model_file), built, batches, slack=HALF_SLACK if spec.precision == "fp16" else 1.0
        )
    except ExportMismatchError as error:
        raise EngineError(
            f"the {spec.precision} engine does not compute what its model file does ({error}); take another precision, "
            "or another version of TensorRT"
        ) from error
    return as_record(found, spec)


class _Built:
    """An engine as a function of pixels, in the shape of :class:`rtmdet_geo.export.check.FileReference`."""

    def __init__(self, lane: Lane, spec: ModelSpec) -> None:
        self._lane = lane
        self.spec = spec

    def __call__(self, images: NDArray[np.uint8]) -> Outputs:
        return dict(zip(OUTPUTS[self.spec.kind], self._lane.submit(images).results(), strict=True))


class _Remembered(FileReference):
    """A model file in onnxruntime that runs each tile once, however often and in what company it is asked for."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._known: dict[bytes, Outputs] = {}

    def __call__(self, images: NDArray[np.uint8]) -> Outputs:
        parts = []
        for image in images:
            key = image.tobytes()
            if key not in self._known:
                self._known[key] = super().__call__(image[None])
            parts.append(self._known[key])
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
