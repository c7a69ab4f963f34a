"""torch -> ONNX by the model-file contract, and the check that both give the same numbers.

A detector's file holds :class:`rtmdet_geo.models.decode.DetectionGraph`: uint8 ``images`` (N, C, H, W) in; fp32
``boxes`` (N, K, 5), ``scores`` (N, K), ``labels`` (N, K) out, of instances also ``kernels`` (N, K, 169),
``mask_priors`` (N, K, 3) and ``mask_features`` (N, 8, H / 8, W / 8); normalisation, decoding and top-K inside, NMS and
masks outside. A classifier's holds :class:`rtmdet_geo.models.classifier.ClassificationGraph`: ``scores`` (N, classes).
Opset 17, standard operators only, dynamic batch, height and width. Batch norms are folded into the convolutions first.
What is rewritten in the traced graph: :mod:`rtmdet_geo.onnx_graph`.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rtmdet_geo import __version__
from rtmdet_geo.backends import require_package
from rtmdet_geo.backends.contract import OUTPUTS, rows_per_level
from rtmdet_geo.backends.onnxrt import open_model_file
from rtmdet_geo.errors import ConfigError, ExportMismatchError, OutputError
from rtmdet_geo.models.classifier import ClassificationGraph
from rtmdet_geo.models.decode import DetectionGraph
from rtmdet_geo.models.identify import load_network
from rtmdet_geo.models.weights import fuse_batch_norm, weights_sha256
from rtmdet_geo.outputs import check_folder, staged_output
from rtmdet_geo.structures import ModelSpec
from rtmdet_geo.variants import MAX_CANDIDATES

logger = logging.getLogger(__name__)

OPSET = 17
#: Rows with scores above this are compared one by one; below, ranks may differ between engines.
CHECK_SCORE = 0.05
#: ... and so many rows of every image at least.
NUM_CHECK_ROWS = 100
#: Height and width in px of the batch of three in the self-check when the file takes any size.
_CHECK_SHAPE = (128, 256)
#: Largest finite fp16 number.
_FP16_MAX = 65504.0


class Differences(NamedTuple):
    """How far a file is from torch at most.

    Attributes:
        boxes: px and rad; per 100 px of size where boxes are larger than that.
        scores: probabilities.
        kernels: of instances, as a part of the largest number in any kernel of the batch.
        mask_features: likewise.
    """

    boxes: float = 0.0
    scores: float = 0.0
    kernels: float = 0.0
    mask_features: float = 0.0


#: Largest differences allowed between torch and the exported graph.
TOLERANCES = Differences(boxes=0.02, scores=2e-4, kernels=1e-3, mask_features=1e-3)


def export_model(
    model: nn.Module | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    spec: ModelSpec | None = None,
    score_threshold: float | None = None,
    half_weights: bool = False,
    tile_size: int | None = None,
    verify: bool = True,
    overwrite: bool = False,
) -> ModelSpec:
    """Write a model file (.onnx) and check it against torch.

    Args:
        model: an RTMDet of any kind or a CSPNeXtClassifier; or weights: a safetensors file written by training (its
            ModelSpec is inside), a name of published ones, another program's file (see
            :func:`rtmdet_geo.models.identify.load_network`).
        out: file to write; written under a temporary name and renamed after the check.
        spec: what the file says of itself; needed with a module, replaces the file's own with a path. ``K``, the
            weights' SHA-256 and the exporter are filled in here.
        score_threshold: default of detect that the file names; None is the spec's.
        half_weights: store convolution weights as fp16 with a cast to fp32, so that the file has half the size and
            the arithmetic stays fp32. onnxruntime folds the casts when it loads the file.
        tile_size: fix H and W of the input to this many px (for engines that want static shapes); None leaves them
            dynamic, any multiple of 32 (classifiers: any side).
        verify: compare with torch at batch 1 and 3.
        overwrite: replace an existing file.

    Returns:
        The ModelSpec as stored.

    Raises:
        ConfigError: the spec is missing or contradicts the network, or ``tile_size`` is no multiple of 32.
        OutputError: ``out`` exists or cannot be written.
        ExportMismatchError: the graph's numbers differ from torch's; nothing is left under the final name.
        WeightsError: the weights file is unreadable or does not fit.
        MissingDependencyError: onnx is not installed.
    """
    onnx = require_package("onnx", extra="export")
    from rtmdet_geo import onnx_graph

    target = Path(out)
    _check_target(target, overwrite)
    network, spec = _load(model, spec)
    if score_threshold is not None:
        if not 0 <= score_threshold <= 1:
            raise ConfigError(f"score_threshold={score_threshold!r} must be in [0, 1]")
        spec = spec.model_copy(update={"score_threshold": score_threshold})
    _check_spec(network, spec, tile_size)
    sha256 = weights_sha256(network.state_dict())
    network = fuse_batch_norm(network).cpu()
    if half_weights:
        _round_to_half(network)
    graph_type = ClassificationGraph if spec.kind == "classification" else DetectionGraph
    graph = graph_type(network, spec.mean, spec.std).eval()
    side = tile_size or spec.tile_size
    spec = _complete(spec, side, sha256)
    with staged_output(target) as staged:
        _trace(graph, staged, spec, is_fixed=tile_size is not None)
        proto = onnx.load(staged)
        onnx_graph.declare_outputs(proto, _output_shapes(spec, is_fixed=tile_size is not None))
        if tile_size is None and spec.kind != "classification":
            onnx_graph.make_top_k_dynamic(proto, MAX_CANDIDATES[spec.kind])
        if half_weights:
            onnx_graph.store_half(proto)
        onnx_graph.write_metadata(proto, spec)
        onnx.checker.check_model(proto, full_check=True)
        onnx.save(proto, staged)
        if verify:
            verify_export(
                graph, staged, batches=[(1, side, side), (3, side, side) if tile_size else (3, *_CHECK_SHAPE)]
            )
    return spec


def verify_export(
    graph: nn.Module, path: str | os.PathLike[str], *, batches: Sequence[tuple[int, int, int]], seed: int = 0
) -> Differences:
    """Compare a model file in onnxruntime with the torch graph it came from.

    Scores are compared rank by rank, mask features number by number. The rest is compared for every row with a score
    above CHECK_SCORE and for the NUM_CHECK_ROWS best: the file must return the same label with (nearly) the same box
    somewhere, since rows of equal score may swap ranks between engines; of instances, the row of the same label and
    prior, with the same box and kernel.

    Args:
        graph: uint8 (N, C, H, W) -> the outputs of the file's kind, see ``OUTPUTS`` of the contract.
        path: model file.
        batches: (images, height, width in px) of each batch of tiles to run.
        seed: of the tiles.

    Returns:
        The largest differences; 0 for what the kind does not have.

    Raises:
        ExportMismatchError: a difference exceeds TOLERANCES, or the shapes differ.
    """
    session, spec = open_model_file(path)
    names = list(OUTPUTS[spec.kind])
    compare: Callable[..., Differences] = _compare_rows if spec.kind != "classification" else _compare_probabilities
    worst = Differences()
    for number, height, width in batches:
        tiles = make_check_tiles(number, len(spec.bands), max(height, width), seed=seed + number)
        tiles = np.ascontiguousarray(tiles[:, :, :height, :width])
        with torch.inference_mode():
            outputs: Tensor | tuple[Tensor, ...] = graph(torch.from_numpy(tiles))
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        expected = {name: output.float().numpy() for name, output in zip(names, outputs, strict=True)}
        found = dict(zip(names, session.run(names, {"images": tiles}), strict=True))
        for name, values in found.items():
            if expected[name].shape != values.shape:
                raise ExportMismatchError(
                    f"output {name!r} at batch {number}: torch {expected[name].shape}, file {values.shape}"
                )
            for engine, numbers in (("torch", expected[name]), ("the file", values)):
                if not np.isfinite(numbers).all():
                    raise ExportMismatchError(f"output {name!r} at batch {number} is not finite in {engine}")
        here = compare(expected, found, spec, height, width)
        worst = Differences(*map(max, worst, here))
    logger.info("export check: largest differences %s", _in_words(worst))
    if any(value > allowed for value, allowed in zip(worst, TOLERANCES, strict=True)):
        raise ExportMismatchError(
            f"the exported graph differs from torch by {_in_words(worst)} (allowed: {_in_words(TOLERANCES)}); "
            "nothing was written"
        )
    return worst


def _in_words(differences: Differences) -> str:
    units = {"boxes": " px"}
    return ", ".join(f"{name} {value:.3g}{units.get(name, '')}" for name, value in differences._asdict().items())


def make_check_tiles(number: int, channels: int, side: int, *, seed: int) -> NDArray[np.uint8]:
    """Return uint8 (number, channels, side, side) tiles that look like scenes: smooth ground, bright blobs, noise."""
    generator = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:side, 0:side].astype(np.float32)
    tiles = np.empty((number, channels, side, side), np.float32)
    for index in range(number):
        slope = generator.normal(0, 40 / side, 2)
        ground = 45 + slope[0] * (rows - side / 2) + slope[1] * (columns - side / 2)
        for _ in range(12):
            x, y = generator.uniform(0, side, 2)
            long_px, short_px = generator.uniform(6, 24), generator.uniform(2, 6)
            angle = generator.uniform(0, np.pi)
            along = (columns - x) * np.cos(angle) + (rows - y) * np.sin(angle)
            across = (rows - y) * np.cos(angle) - (columns - x) * np.sin(angle)
            ground = ground + 150 * ((np.abs(along) < long_px) & (np.abs(across) < short_px))
        gains = generator.uniform(0.7, 1.3, (channels, 1, 1))
        tiles[index] = ground * gains + generator.normal(0, 4, (channels, side, side))
    return tiles.clip(0, 255).astype(np.uint8)


def _load(model: nn.Module | str | os.PathLike[str], spec: ModelSpec | None) -> tuple[nn.Module, ModelSpec]:
    """Return the network and its spec."""
    if isinstance(model, nn.Module):
        if spec is None:
            raise ConfigError("export_model needs spec= when it gets a network instead of a weights file")
        return model, spec
    network, own_spec = load_network(model)
    return network, spec if spec is not None else own_spec


def _check_target(target: Path, overwrite: bool) -> None:
    if target.suffix.lower() != ".onnx":
        raise OutputError(f"{str(target)!r} must end in .onnx")
    check_folder(target, overwrite)


def _check_spec(network: nn.Module, spec: ModelSpec, tile_size: int | None) -> None:
    kind = getattr(network, "kind", spec.kind)
    if kind != spec.kind:
        raise ConfigError(
            f"the network is of kind {kind!r}, its spec says {spec.kind!r}; pass the spec it was built by"
        )
    for what, built, stated in (
        ("classes", getattr(network, "num_classes", len(spec.classes)), len(spec.classes)),
        ("bands", getattr(network, "in_channels", len(spec.bands)), len(spec.bands)),
    ):
        if built != stated:
            raise ConfigError(f"the network has {built} {what}, its spec names {stated}; pass the spec it was built by")
    side = tile_size or spec.tile_size
    if spec.kind != "classification" and (side < spec.stride_multiple or side % spec.stride_multiple):
        raise ConfigError(f"tile size {side} px must be a multiple of {spec.stride_multiple}")


def _complete(spec: ModelSpec, side: int, sha256: str) -> ModelSpec:
    """Return the spec with what export alone knows."""
    changes: dict[str, Any] = {
        "tile_size": side,
        "overlap": min(spec.overlap, side // 2),
        "weights_sha256": sha256,
        "exporter": f"rtmdet-geo {__version__}, torch {torch.__version__}",
    }
    if spec.kind != "classification":
        levels = rows_per_level(spec.kind, len(spec.classes), side, side)
        changes["max_detections"] = sum(rows for rows, _ in levels)
    return spec.model_copy(update=changes)


def _round_to_half(network: nn.Module) -> None:
    """Round convolution weights to fp16 in place, so that torch computes what the file will hold.

    Raises:
        ConfigError: a weight is beyond fp16's range.
    """
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim < 2:
                continue
            if parameter.abs().max() > _FP16_MAX:
                raise ConfigError(f"weight {name!r} exceeds the range of fp16; export without half weights")
            parameter.copy_(parameter.half().float())


def _trace(graph: nn.Module, path: Path, spec: ModelSpec, *, is_fixed: bool) -> None:
    """Write the plain ONNX graph; tracing by TorchScript, whose graphs TensorRT and opset 17 readers take."""
    outputs = _output_shapes(spec, is_fixed=is_fixed)
    axes = {"images": {0: "batch"} if is_fixed else {0: "batch", 2: "height", 3: "width"}}
    for name, shape in outputs.items():
        axes[name] = {axis: size for axis, size in enumerate(shape) if isinstance(size, str)}
    side = spec.tile_size
    images = torch.zeros((2, len(spec.bands), side, side), dtype=torch.uint8)  # batch 1 would be taken for broadcasting
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer's remarks; verify_export is what decides
        torch.onnx.export(
            _FloatLabels(graph),
            (images,),
            str(path),
            opset_version=OPSET,
            input_names=["images"],
            output_names=list(outputs),
            dynamic_axes=axes,
            dynamo=False,
        )


def _output_shapes(spec: ModelSpec, *, is_fixed: bool) -> dict[str, list[int | str]]:
    """Return the outputs' shapes: numbers, or names where they depend on the images."""
    side = spec.tile_size
    known: dict[int | str, int | str] = {"K": "rows", "H/8": "feature_height", "W/8": "feature_width"}
    if is_fixed:
        known = {"K": spec.max_detections, "H/8": side // 8, "W/8": side // 8}
    known["classes"] = len(spec.classes)
    return {name: ["batch", *(known.get(size, size) for size in sizes)] for name, sizes in OUTPUTS[spec.kind].items()}


class _FloatLabels(nn.Module):
    """A graph whose whole-number outputs, the labels, come out as fp32 like all others (the model-file contract)."""

    def __init__(self, graph: nn.Module) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        outputs = self.graph(images)
        return tuple(output.float() for output in ((outputs,) if isinstance(outputs, Tensor) else outputs))


_Outputs = dict[str, NDArray[np.float32]]


def _compare_probabilities(
    expected: _Outputs, found: _Outputs, spec: ModelSpec, height: int, width: int
) -> Differences:
    """Return how far a classifier's file is from torch on one batch."""
    return Differences(scores=float(np.abs(expected["scores"] - found["scores"]).max(initial=0.0)))


def _compare_rows(expected: _Outputs, found: _Outputs, spec: ModelSpec, height: int, width: int) -> Differences:
    """Return how far a detector's file is from torch on one batch of images (height, width)."""
    levels = rows_per_level(spec.object_kind, len(spec.classes), height, width)
    boxes, kernels = 0.0, 0.0
    for image in range(len(expected["scores"])):
        mine, others = ({name: values[image] for name, values in side.items()} for side in (expected, found))
        for row in np.flatnonzero(_is_compared(mine["scores"], levels)):
            here = _distance_to_row(mine, others, int(row))
            boxes, kernels = max(boxes, here[0]), max(kernels, here[1])
    scores = float(np.abs(expected["scores"] - found["scores"]).max(initial=0.0))
    if spec.kind != "mask":
        return Differences(boxes, scores)
    features = float(np.abs(expected["mask_features"] - found["mask_features"]).max())
    return Differences(
        boxes, scores, kernels / _largest(expected["kernels"]), features / _largest(expected["mask_features"])
    )


def _largest(values: NDArray[np.float32]) -> float:
    """Return the largest absolute value, what differences are compared with; never 0."""
    return float(np.abs(values).max(initial=np.finfo(np.float32).tiny))


def _is_compared(scores: NDArray[np.float32], levels: list[tuple[int, bool]]) -> NDArray[np.bool_]:
    """Say which of one image's rows must be in the file too.

    Rows whose score ties with the last row of a level that was cut off are left out: another pair may stand there.
    """
    is_checked = scores >= CHECK_SCORE
    is_checked[np.argsort(-scores, kind="stable")[:NUM_CHECK_ROWS]] = True
    start = 0
    for rows, is_cut in levels:
        level = slice(start, start + rows)
        if is_cut:
            is_checked[level] &= scores[level] > scores[level].min() + 1e-6
        start += rows
    return is_checked


def _distance_to_row(expected: _Outputs, found: _Outputs, row: int) -> tuple[float, float]:
    """Return the distances of box and kernel from one expected row to its partner in the file; inf without one."""
    box = expected["boxes"][row]
    partners = np.flatnonzero(found["labels"] == expected["labels"][row])
    if "mask_priors" in expected:
        is_same = (found["mask_priors"][partners] == expected["mask_priors"][row]).all(axis=1)
        partners = partners[is_same]
    if not len(partners):
        return float("inf"), float("inf")
    difference = np.abs(found["boxes"][partners] - box)
    difference[:, 4] = np.minimum(difference[:, 4] % np.pi, np.pi - difference[:, 4] % np.pi)
    distances = difference.max(axis=1) / max(1.0, float(box[2:4].max()) / 100)
    nearest = int(distances.argmin())
    kernel = 0.0
    if "kernels" in expected:
        kernel = float(np.abs(found["kernels"][partners[nearest]] - expected["kernels"][row]).max())
    return float(distances[nearest]), kernel
