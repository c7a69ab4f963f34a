"""torch -> ONNX by the model-file contract, and the check that both give the same numbers.

The exported graph computes what :class:`rtmdet_geo.models.decode.DetectionGraph` does (opset 17, dynamic batch):
uint8 ``images`` (N, C, H, W) in; fp32 ``boxes`` (N, K, 5), ``scores`` (N, K), ``labels`` (N, K) out; normalisation,
decoding and top-K inside, NMS outside, standard operators only. Batch norms are folded into the convolutions first.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rtmdet_geo import __version__
from rtmdet_geo.backends import require_package
from rtmdet_geo.backends.onnxrt import MAX_ROWS_PER_LEVEL, STRIDES, OnnxRuntimeBackend, rows_per_level
from rtmdet_geo.catalog import GRAPH_SHA256_KEY, SPEC_KEY
from rtmdet_geo.errors import ConfigError, ExportMismatchError, OutputError
from rtmdet_geo.models.decode import DetectionGraph, decode_distances, flatten_level
from rtmdet_geo.models.weights import build_from_weights, fuse_batch_norm, weights_sha256
from rtmdet_geo.outputs import check_folder, staged_output
from rtmdet_geo.structures import ModelSpec

if TYPE_CHECKING:
    import onnx

logger = logging.getLogger(__name__)

OPSET = 17
OUTPUT_NAMES = ("boxes", "scores", "labels")
#: Rows with scores above this are compared box by box; below, ranks may differ between engines.
CHECK_SCORE = 0.05
#: ... and so many rows of every image at least.
NUM_CHECK_ROWS = 100
#: Largest difference allowed between torch and the exported graph: boxes in px and rad, scores.
BOX_TOLERANCE = 0.02
SCORE_TOLERANCE = 2e-4
#: Side in px of the batch of three in the self-check when the file takes any size.
_CHECK_SIDE = 256
#: Largest finite fp16 number.
_FP16_MAX = 65504.0


def export_model(
    model: nn.Module | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    spec: ModelSpec | None = None,
    half_weights: bool = False,
    tile_size: int | None = None,
    verify: bool = True,
    overwrite: bool = False,
) -> ModelSpec:
    """Write a model file (.onnx) and check it against torch.

    Args:
        model: a rotated RTMDet, or a safetensors file written by training (its ModelSpec is inside).
        out: file to write; written under a temporary name and renamed after the check.
        spec: what the file says of itself; needed with a module, replaces the file's own with a path. ``K``, the
            weights' SHA-256 and the exporter are filled in here.
        half_weights: store convolution weights as fp16 with a cast to fp32, so that the file has half the size and
            the arithmetic stays fp32. onnxruntime folds the casts when it loads the file.
        tile_size: fix H and W of the input to this many px (for engines that want static shapes); None leaves them
            dynamic, any multiple of 32.
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
    target = Path(out)
    _check_target(target, overwrite)
    network, spec = _load(model, spec)
    _check_spec(network, spec, tile_size)
    sha256 = weights_sha256(network.state_dict())
    network = fuse_batch_norm(network).cpu()
    if half_weights:
        _round_to_half(network)
    limit = MAX_ROWS_PER_LEVEL[spec.object_kind]
    graph = DetectionGraph(network, spec.mean, spec.std, limit=limit).eval()

    side = tile_size or spec.tile_size
    levels = rows_per_level(spec.object_kind, len(spec.classes), side, side)
    spec = spec.model_copy(
        update={
            "tile_size": side,
            "overlap": min(spec.overlap, side // 2),
            "max_detections": sum(rows for rows, _ in levels),
            "weights_sha256": sha256,
            "exporter": f"rtmdet-geo {__version__}, torch {torch.__version__}",
        }
    )
    with staged_output(target) as staged:
        _trace(graph, staged, channels=len(spec.bands), side=side, is_fixed=tile_size is not None)
        proto = onnx.load(staged)
        if tile_size is None:
            _make_top_k_dynamic(proto, limit)
        if half_weights:
            _store_half(proto)
        _write_metadata(proto, spec)
        onnx.checker.check_model(proto, full_check=True)
        onnx.save(proto, staged)
        if verify:
            verify_export(graph, staged, batches=[(1, side), (3, tile_size or min(side, _CHECK_SIDE))])
    return spec


def verify_export(
    graph: nn.Module, path: str | os.PathLike[str], *, batches: Sequence[tuple[int, int]], seed: int = 0
) -> tuple[float, float]:
    """Compare a model file in onnxruntime with the torch graph it came from.

    Scores are compared rank by rank. Boxes are compared for every row with a score above CHECK_SCORE and for the
    NUM_CHECK_ROWS best: the file must return the same label with (nearly) the same box somewhere, since rows of equal
    score may swap ranks between engines.

    Args:
        graph: uint8 (N, C, H, W) -> boxes, scores, labels.
        path: model file.
        batches: (images, side in px) of each batch of random tiles to run.
        seed: of the tiles.

    Returns:
        Largest difference of boxes (px and rad; per 100 px of size where boxes are larger than that) and of scores.

    Raises:
        ExportMismatchError: a difference exceeds BOX_TOLERANCE or SCORE_TOLERANCE, or the shapes differ.
    """
    backend = OnnxRuntimeBackend(path)
    worst_box = worst_score = 0.0
    for number, side in batches:
        tiles = make_check_tiles(number, len(backend.spec.bands), side, seed=seed + number)
        with torch.inference_mode():
            outputs: tuple[Tensor, ...] = graph(torch.from_numpy(tiles))
        expected = [output.float().numpy() for output in outputs]
        found = [np.asarray(output, np.float32) for output in backend.raw(tiles)]
        for name, one, other in zip(OUTPUT_NAMES, expected, found, strict=True):
            if one.shape != other.shape:
                raise ExportMismatchError(f"output {name!r} at batch {number}: torch {one.shape}, file {other.shape}")
            if not np.isfinite(other).all():
                raise ExportMismatchError(f"output {name!r} at batch {number} is not finite in the file")
        levels = rows_per_level(backend.spec.object_kind, len(backend.spec.classes), side, side)
        worst_score = max(worst_score, float(np.abs(expected[1] - found[1]).max(initial=0.0)))
        for image in range(number):
            rows = [output[image] for output in expected], [output[image] for output in found]
            worst_box = max(worst_box, _box_difference(*rows, levels))
    logger.info("export check: boxes differ by at most %.2g px, scores by %.2g", worst_box, worst_score)
    if worst_box > BOX_TOLERANCE or worst_score > SCORE_TOLERANCE:
        raise ExportMismatchError(
            f"the exported graph differs from torch by {worst_box:.3g} px (allowed {BOX_TOLERANCE:g}) and "
            f"{worst_score:.3g} in score (allowed {SCORE_TOLERANCE:g}); nothing was written"
        )
    return worst_box, worst_score


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
    network, own_spec = build_from_weights(model)
    return network, spec if spec is not None else own_spec


def _check_target(target: Path, overwrite: bool) -> None:
    if target.suffix.lower() != ".onnx":
        raise OutputError(f"{str(target)!r} must end in .onnx")
    check_folder(target, overwrite)


def _check_spec(network: Any, spec: ModelSpec, tile_size: int | None) -> None:
    if spec.kind != "rotated":
        raise ConfigError(f"models of kind {spec.kind!r} cannot be exported by this version")
    for what, built, stated in (
        ("classes", getattr(network, "num_classes", len(spec.classes)), len(spec.classes)),
        ("bands", getattr(network, "in_channels", len(spec.bands)), len(spec.bands)),
    ):
        if built != stated:
            raise ConfigError(f"the network has {built} {what}, its spec names {stated}; pass the spec it was built by")
    side = tile_size or spec.tile_size
    if side < spec.stride_multiple or side % spec.stride_multiple:
        raise ConfigError(f"tile size {side} px must be a multiple of {spec.stride_multiple}")


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


def _trace(graph: DetectionGraph, path: Path, *, channels: int, side: int, is_fixed: bool) -> None:
    """Write the plain ONNX graph; tracing by TorchScript, whose graphs TensorRT and opset 17 readers take."""
    axes: dict[str, dict[int, str]] = {"images": {0: "batch"} if is_fixed else {0: "batch", 2: "height", 3: "width"}}
    axes |= {name: {0: "batch"} if is_fixed else {0: "batch", 1: "rows"} for name in OUTPUT_NAMES}
    images = torch.zeros((2, channels, side, side), dtype=torch.uint8)  # batch 1 would be taken for broadcasting
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer's remarks; verify_export is what decides
        torch.onnx.export(
            _ExportGraph(graph),
            (images,),
            str(path),
            opset_version=OPSET,
            input_names=["images"],
            output_names=list(OUTPUT_NAMES),
            dynamic_axes=axes,
            dynamo=False,
        )


class _ExportGraph(nn.Module):
    """What :class:`DetectionGraph` computes, written so that batch, height and width stay symbols in a traced graph.

    A prior's point follows from its index and the level's width by whole-number arithmetic: nothing is baked that
    depends on the traced image but TopK's k, which :func:`_make_top_k_dynamic` replaces.
    """

    def __init__(self, graph: DetectionGraph) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        graph = self.graph
        outputs = graph.model((images.to(torch.float32) - graph.mean) / graph.std)
        parts = []
        for cls, reg, angle, stride in zip(*outputs, STRIDES, strict=True):
            num_classes, width = int(cls.shape[1]), cls.shape[3]
            pairs = flatten_level(cls).flatten(1)
            best, index = pairs.topk(min(int(pairs.shape[1]), graph.limit), dim=1)
            priors = torch.div(index, num_classes, rounding_mode="trunc")
            rows = torch.div(priors, width, rounding_mode="trunc")
            points = torch.stack((priors - rows * width, rows), dim=-1).to(torch.float32) * stride
            raw = flatten_level(torch.cat((reg, angle), dim=1)).gather(1, priors.unsqueeze(-1).repeat(1, 1, 5))
            labels = (index - priors * num_classes).to(torch.float32)
            parts.append((decode_distances(points, raw), best.sigmoid(), labels))
        boxes, scores, labels = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
        return boxes, scores, labels


def _make_top_k_dynamic(proto: onnx.ModelProto, limit: int) -> None:
    """Let every TopK take k = min(pairs, limit) of the image at hand; the tracer wrote the traced image's k."""
    from onnx import TensorProto, helper

    nodes = []
    graph = proto.graph
    graph.initializer.append(helper.make_tensor("top_k_limit", TensorProto.INT64, [1], [limit]))
    for node in graph.node:
        if node.op_type == "TopK":
            prefix = f"{node.name}/limit"
            pairs, k = f"{prefix}/pairs", f"{prefix}/k"
            nodes.append(helper.make_node("Shape", [node.input[0]], [pairs], name=pairs, start=1, end=2))
            nodes.append(helper.make_node("Min", [pairs, "top_k_limit"], [k], name=k))
            node.input[1] = k
        nodes.append(node)
    rewritten = [copy.deepcopy(node) for node in nodes]
    del graph.node[:]
    graph.node.extend(rewritten)


def _store_half(proto: onnx.ModelProto) -> None:
    """Replace fp32 initialisers of two or more axes that fp16 holds exactly by fp16 ones with a Cast to fp32."""
    from onnx import TensorProto, helper, numpy_helper

    graph = proto.graph
    casts, tensors = [], []
    for tensor in graph.initializer:
        values = numpy_helper.to_array(tensor)
        is_weight = values.dtype == np.float32 and values.ndim >= 2 and values.size > 1
        if is_weight and np.array_equal(values.astype(np.float16).astype(np.float32), values):
            half = f"{tensor.name}.fp16"
            tensors.append(numpy_helper.from_array(values.astype(np.float16), half))
            casts.append(helper.make_node("Cast", [half], [tensor.name], name=f"{half}/cast", to=TensorProto.FLOAT))
        else:
            tensors.append(copy.deepcopy(tensor))
    nodes = [*casts, *(copy.deepcopy(node) for node in graph.node)]
    del graph.initializer[:]
    graph.initializer.extend(tensors)
    del graph.node[:]
    graph.node.extend(nodes)


def _write_metadata(proto: onnx.ModelProto, spec: ModelSpec) -> None:
    """Store the ModelSpec, and the keys that the QGIS plugin Deepness reads (its ``model_base.py``).

    Deepness wants the resolution in cm, the overlap in per cent, and mean and std for pixels divided by 255; our graph
    normalises by itself, so those two say "leave the pixels as they are".
    """
    from onnx import helper

    channels = len(spec.bands)
    metadata: dict[str, str] = {
        SPEC_KEY: spec.model_dump_json(),
        "model_type": json.dumps("Detector"),
        "class_names": json.dumps({str(index): name for index, name in enumerate(spec.classes)}),
        "tile_size": json.dumps(spec.tile_size),
        "tiles_overlap": json.dumps(round(100 * spec.overlap / spec.tile_size)),
        "standardization_mean": json.dumps([0.0] * channels),
        "standardization_std": json.dumps([1 / 255] * channels),
        "det_conf": json.dumps(spec.score_threshold),
        "det_iou_thresh": json.dumps(spec.iou_threshold),
        "det_type": json.dumps("RTMDet_rotated"),
        GRAPH_SHA256_KEY: json.dumps(hashlib.sha256(proto.graph.SerializeToString()).hexdigest()),
    }
    if spec.gsd_m is not None:
        metadata["resolution"] = json.dumps(spec.gsd_m * 100)
    helper.set_model_props(proto, metadata)
    proto.producer_name, proto.producer_version = "rtmdet-geo", __version__
    proto.doc_string = f"{spec.name}: {spec.architecture}, {', '.join(spec.classes)}"


def _box_difference(
    expected: list[NDArray[np.float32]], found: list[NDArray[np.float32]], levels: list[tuple[int, bool]]
) -> float:
    """Largest distance from an expected row of one image to the nearest found row of the same label.

    Rows whose score ties with the last row of a level that was cut off are left out: another pair may stand there.
    """
    boxes, scores, labels = expected
    other_boxes, _, other_labels = found
    is_checked = scores >= min(CHECK_SCORE, float(np.sort(scores)[-NUM_CHECK_ROWS:].min()))
    start = 0
    for rows, is_cut in levels:
        level = slice(start, start + rows)
        if is_cut:
            is_checked[level] &= scores[level] > scores[level].min() + 1e-6
        start += rows
    worst = 0.0
    for row in np.flatnonzero(is_checked):
        difference = np.abs(other_boxes[other_labels == labels[row]] - boxes[row])
        difference[:, 4] = np.minimum(difference[:, 4] % np.pi, np.pi - difference[:, 4] % np.pi)
        worst = max(
            worst, float(difference.max(axis=1).min(initial=np.inf)) / max(1.0, float(boxes[row, 2:4].max()) / 100)
        )
    return worst
