"""Model files: written by the model-file contract, in fp32, fp16 or int8, and checked before they get their name.

A detector's file holds :class:`rtmdet_geo.models.decode.DetectionGraph`: uint8 ``images`` (N, C, H, W) in; fp32
``boxes`` (N, K, 5), ``scores`` (N, K), ``labels`` (N, K) out, of instances also ``kernels`` (N, K, 169),
``mask_priors`` (N, K, 3) and ``mask_features`` (N, 8, H / 8, W / 8); normalisation, decoding and top-K inside, NMS and
masks outside. A classifier's holds :class:`rtmdet_geo.models.classifier.ClassificationGraph`: ``scores`` (N, classes).
Opset 17, standard operators only (:mod:`rtmdet_geo.export.operators`); batch, height and width dynamic unless they are
fixed here. Batch norms are folded into the convolutions first.

Weights are traced with torch (:mod:`rtmdet_geo.export.trace`); a model file is rewritten without it. What either gives
on the same tiles is compared with what the new file gives (:mod:`rtmdet_geo.export.check`).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rtmdet_geo.backends import require_package
from rtmdet_geo.backends.contract import rows_per_level
from rtmdet_geo.catalog import CATALOG, read_spec
from rtmdet_geo.errors import ConfigError, OutputError
from rtmdet_geo.export.check import CheckBatch, FileReference, Reference, as_record, verify_export
from rtmdet_geo.export.tiles import check_files, cut_tiles, make_check_tiles, shipped_tiles
from rtmdet_geo.outputs import check_folder, check_not_input, staged_output
from rtmdet_geo.structures import FilePrecision, ModelSpec

if TYPE_CHECKING:
    import onnx
    from torch import nn

__all__ = ["export_engine", "export_model", "make_check_tiles"]

#: Height and width in px of the batch of three in the self-check when the file takes any size.
_CHECK_SHAPE = (128, 256)


class _Source(NamedTuple):
    """What a file is made of: a fp32 graph, what it says of itself, and whom the new file must equal."""

    proto: onnx.ModelProto
    spec: ModelSpec
    reference: Reference


def export_model(
    model: nn.Module | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    spec: ModelSpec | None = None,
    score_threshold: float | None = None,
    precision: FilePrecision = "fp32",
    half_weights: bool = False,
    tile_size: int | None = None,
    batch_size: int | None = None,
    verify: bool = True,
    verify_on: Sequence[str | os.PathLike[str]] = (),
    overwrite: bool = False,
) -> ModelSpec:
    """Write a model file (.onnx) and compare it with what it is made of.

    Args:
        model: an RTMDet of any kind or a CSPNeXtClassifier; or weights: a safetensors file written by training (its
            ModelSpec is inside), a name of published ones, another program's file (see
            :func:`rtmdet_geo.models.identify.load_network`); or a fp32 model file (.onnx), which needs no torch.
        out: file to write; written under a temporary name and renamed after the check.
        spec: what the file says of itself; needed with a module, replaces the file's own with a path. ``K``, the
            weights' SHA-256, the exporter, precision and differences are filled in here.
        score_threshold: default of detect that the file names; None is the spec's.
        precision: of the convolutions: "fp32"; "fp16", for engines on GPUs (see :mod:`rtmdet_geo.export.half`); "int8",
            for CPUs, calibrated on the tiles of ``verify_on`` or on those of the package.
        half_weights: store weights as fp16 numbers that are made fp32 again when the file is loaded: half the size,
            the same arithmetic. Weights from half-precision files are stored as they are, others are rounded.
        tile_size: fix H and W of the input to this many px (for engines that want static shapes); None leaves them
            dynamic, any multiple of 32 (classifiers: any side).
        batch_size: fix the number of images; None leaves it dynamic.
        verify: compare with torch, or with the model file that it is made of, on drawn tiles and on real ones.
        verify_on: scenes and pictures, or folders of such, whose tiles are the real ones; none: the package's.
        overwrite: replace an existing file.

    Returns:
        The ModelSpec as stored.

    Raises:
        ConfigError: an argument is out of range, the spec is missing or contradicts the network, a weight is beyond
            fp16's range.
        OutputError: ``out`` exists or cannot be written.
        ExportMismatchError: the file's numbers differ from the reference's; nothing is left under the final name.
        WeightsError, ModelFileError: the weights or model file is unreadable or does not fit.
        RasterError, BandError, ResolutionError: a file of ``verify_on`` cannot be read as the model needs it.
        MissingDependencyError: onnx or torch is not installed.
    """
    onnx = require_package("onnx", extra="export")
    from rtmdet_geo.export.graph import fix_size, write_metadata
    from rtmdet_geo.export.half import to_half
    from rtmdet_geo.export.operators import check_operators

    target = Path(out)
    _check_target(target, overwrite)
    _check_arguments(score_threshold, precision, half_weights)
    check_files(verify_on if verify else ())
    model = stored_file(model, half_weights=half_weights)
    if not isinstance(model, str | os.PathLike) or not is_model_file(model):
        source = _trace(model, spec, half_weights=half_weights)
    else:
        source = _read(model, spec, half_weights=half_weights, target=target)
    spec = _complete(source.spec, score_threshold, tile_size)
    proto = source.proto
    write_metadata(proto, spec)
    with staged_output(target) as staged:
        if precision == "int8":
            onnx.save(proto, staged)
            proto = _quantize(staged, spec, tile_size or spec.tile_size, verify_on)
        proto = fix_size(proto, tile_size, tile_size, batch=batch_size)
        if precision == "fp16":
            proto = to_half(proto)
        check_operators(proto)
        onnx.checker.check_model(proto, full_check=True)
        onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True)
        onnx.save(proto, staged)
        if verify:
            file = FileReference(staged)
            found = verify_export(source.reference, file, _check_batches(file, verify_on))
            write_metadata(proto, file.spec.model_copy(update={"differences": as_record(found, file.spec)}))
            onnx.save(proto, staged)
        spec = read_spec(staged)
    return spec


def export_engine(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    score_threshold: float | None = None,
    precision: FilePrecision | None = None,
    tile_size: int | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    compatible: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
    overwrite: bool = False,
) -> ModelSpec:
    """Build a TensorRT engine (.engine, its card beside it as .engine.json) for a GPU of this machine.

    Args:
        model: path or name that :func:`export_model` takes; weights become a model file first, compared with torch.
        out: file to write.
        score_threshold: default of detect that the card names; None is the model's.
        precision: of the convolutions, "fp16" or "fp32"; None is fp16.
        tile_size: side of the tiles in px; None is the model's.
        batch_size: most tiles at once; None is 8.
        device: "auto", "cuda" or "cuda:N".
        compatible: build for all GPUs of one generation.
        progress: called with phase, step and steps of the build, where TensorRT tells them (10 and later).
        overwrite: replace existing files.

    Returns:
        The ModelSpec as stored, with the differences from the model file in fp32.

    Raises:
        See :func:`export_model` and :func:`rtmdet_geo.backends.trt_build.build_engine`.
    """
    from rtmdet_geo.backends.contract import GPU_BATCH_SIZE
    from rtmdet_geo.backends.trt_build import build_engine, find_builder

    model = str(stored_file(model, half_weights=False))
    if is_model_file(model):
        read_spec(model)
    find_builder(out, device=device, overwrite=overwrite)  # before the work on weights
    settings: dict[str, Any] = {"max_batch": batch_size or GPU_BATCH_SIZE, "tile_size": tile_size, "device": device}
    settings |= {"precision": precision or "auto", "compatible": compatible}
    settings |= {"progress": progress, "overwrite": overwrite}
    if is_model_file(model) and score_threshold is None:
        return build_engine(model, out, **settings)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{Path(out).stem}.onnx"
        export_model(model, file, score_threshold=score_threshold)
        return build_engine(file, out, **settings)


def stored_file(model: nn.Module | str | os.PathLike[str], *, half_weights: bool) -> nn.Module | str | os.PathLike[str]:
    """Return the model file of a bundled model's name, which needs no torch; everything else as it is."""
    if half_weights or not isinstance(model, str | os.PathLike) or os.fspath(model) not in CATALOG:
        return model
    return CATALOG[os.fspath(model)].path


def is_model_file(model: str | os.PathLike[str]) -> bool:
    """Say whether a path is one of a model file (.onnx)."""
    return os.fspath(model).lower().endswith(".onnx")


def _check_target(target: Path, overwrite: bool) -> None:
    if target.suffix.lower() != ".onnx":
        raise OutputError(f"{str(target)!r} must end in .onnx")
    check_folder(target, overwrite)


def _check_arguments(score_threshold: float | None, precision: FilePrecision, half_weights: bool) -> None:
    if precision not in ("fp32", "fp16", "int8"):
        raise ConfigError(f"precision {precision!r} is unknown; choose fp32, fp16 or int8")
    if score_threshold is not None and not 0 <= score_threshold <= 1:
        raise ConfigError(f"score_threshold={score_threshold!r} must be in [0, 1]")
    if half_weights and precision != "fp32":
        raise ConfigError(f"half weights are for fp32 files; those of a {precision} file are small already")


def _trace(model: nn.Module | str | os.PathLike[str], spec: ModelSpec | None, *, half_weights: bool) -> _Source:
    require_package("torch", extra="export")
    from rtmdet_geo.export.trace import trace_model

    return _Source(*trace_model(model, spec, half_weights=half_weights))


def _read(path: str | os.PathLike[str], spec: ModelSpec | None, *, half_weights: bool, target: Path) -> _Source:
    """Return a fp32 model file's graph, and what it says of itself."""
    import onnx

    if half_weights:
        raise ConfigError("half weights are made from weights (.safetensors, .pth); a model file has lost its norms")
    check_not_input(target, path, "source")
    reference = FileReference(path)
    own = reference.spec
    if own.precision != "fp32":
        raise ConfigError(f"{os.fspath(path)!r} is {own.precision} already; export weights or a fp32 model file")
    graph = {"kind", "classes", "bands", "mean", "std"}
    if spec is not None and spec.model_dump(include=graph) != own.model_dump(include=graph):
        raise ConfigError(f"the spec is not that of {os.fspath(path)!r}: kind, classes, bands, mean or std differ")
    kept = own.model_dump(include={"weights_sha256", "exporter"}) | {"differences": {}, "precision": "fp32"}
    return _Source(onnx.load(os.fspath(path)), (spec or own).model_copy(update=kept), reference)


def _complete(spec: ModelSpec, score_threshold: float | None, tile_size: int | None) -> ModelSpec:
    """Return the spec with what the caller asked for."""
    if score_threshold is not None:
        spec = spec.model_copy(update={"score_threshold": score_threshold})
    side = tile_size or spec.tile_size
    if spec.kind != "classification" and (side < spec.stride_multiple or side % spec.stride_multiple):
        raise ConfigError(f"tile size {side} px must be a multiple of {spec.stride_multiple}")
    changes: dict[str, object] = {"overlap": min(spec.overlap, side // 2)}
    if spec.kind != "classification":
        levels = rows_per_level(spec.kind, len(spec.classes), side, side)
        changes["max_detections"] = sum(rows for rows, _ in levels)
    return spec.model_copy(update=changes)


def _real_tiles(
    spec: ModelSpec, side: int | None, paths: Sequence[str | os.PathLike[str]]
) -> Iterable[NDArray[np.uint8]]:
    """Return (C, side, side) tiles; None is the size of the model for those cut out here, else what they have."""
    return cut_tiles(paths, spec, side or spec.tile_size) if paths else shipped_tiles(spec, side)


def _check_batches(file: FileReference, paths: Sequence[str | os.PathLike[str]]) -> list[CheckBatch]:
    """Return the tiles to compare on: drawn ones at batch 1 and 3, and real ones."""
    side, channels = file.spec.tile_size, len(file.spec.bands)
    height, width = (side, side) if file.is_fixed else _CHECK_SHAPE
    drawn = [make_check_tiles(number, channels, max(side, width), seed=number) for number in (1, 3)]
    cuts = [drawn[0][:, :, :side, :side], drawn[1][:, :, :height, :width]]
    real = _real_tiles(file.spec, side if file.is_fixed else None, paths)
    return [CheckBatch(tiles) for tiles in cuts] + [CheckBatch(tile[None], is_real=True) for tile in real]


def _quantize(path: Path, spec: ModelSpec, side: int, paths: Sequence[str | os.PathLike[str]]) -> onnx.ModelProto:
    """Replace a fp32 model file by an int8 one, calibrated on real tiles of a side in px, and return its graph."""
    import onnx

    from rtmdet_geo.export.quantize import quantize_model

    quantized = path.with_name(f"{path.stem}.int8{path.suffix}")
    tiles = (np.ascontiguousarray(tile[None]) for tile in _real_tiles(spec, side, paths))
    quantize_model(path, quantized, calibration=tiles)
    os.replace(quantized, path)
    return onnx.load(path)
