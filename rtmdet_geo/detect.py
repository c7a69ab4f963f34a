"""The pipeline on one page: scene -> tiles -> backend -> merge -> features -> files.

The only module that knows every stage. Tiles are read, run and forgotten one batch at a time, so memory holds pixels
and raw candidates of one batch, and of each tile what NMS left. Tiles without a valid pixel are not run. Nothing
appears under an output's final name before it is whole.
"""

from __future__ import annotations

import logging
import math
import os
import platform
import time
import uuid
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from affine import Affine
from numpy.typing import NDArray
from shapely.affinity import affine_transform

from rtmdet_geo import __version__
from rtmdet_geo.backends import Backend, open_backend
from rtmdet_geo.catalog import file_sha256, find_model
from rtmdet_geo.errors import (
    Cancelled,
    ConfigError,
    NodataWarning,
    OutputError,
    SaturatedTileWarning,
    UnknownClassError,
)
from rtmdet_geo.merge import Merged, merge_survivors, tile_survivors
from rtmdet_geo.polygons import SIMPLIFY_PX, outlines_to_polygons
from rtmdet_geo.preview import check_preview, draw_preview
from rtmdet_geo.raster import Scene, open_scene
from rtmdet_geo.stitch import Pieces, outlines_of
from rtmdet_geo.structures import PAD_VALUE, Detections, ModelSpec, Tile
from rtmdet_geo.tiles import TileGrid
from rtmdet_geo.vector import build_features, check_output, driver_of, parse_crs, write_features

if TYPE_CHECKING:
    import geopandas

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DetectResult:
    """What :func:`detect_scene` found.

    Attributes:
        features: one row per detection with the schema of :mod:`rtmdet_geo.vector`, best score first.
        summary: facts about the run, ready for JSON; its keys are listed at :func:`detect_scene`.
    """

    features: geopandas.GeoDataFrame
    summary: dict[str, Any]

    def __len__(self) -> int:
        """Return the number of detections."""
        return len(self.features)

    def __str__(self) -> str:
        """Say the result in one line."""
        counts = ", ".join(f"{number} {name}" for name, number in self.summary["num_by_class"].items() if number)
        where = f" -> {self.summary['output']}" if self.summary["output"] else ""
        tiles = f"{self.summary['num_tiles']} tile" + ("s" if self.summary["num_tiles"] != 1 else "")
        return (
            f"{self.summary['scene']}: {len(self)} detections{f' ({counts})' if counts else ''} "
            f"in {tiles}, {self.summary['seconds']:.1f} s{where}"
        )


@dataclass(frozen=True, slots=True)
class _Plan:
    """Everything that is settled before the first tile."""

    spec: ModelSpec
    tile_size: int
    overlap: int
    batch_size: int
    score_threshold: float
    iou_threshold: float
    class_ids: tuple[int, ...] | None
    multi_label: bool
    simplify_px: float


@dataclass(slots=True)
class _Counts:
    """What the tile loop counts."""

    num_tiles: int = 0
    num_empty_tiles: int = 0
    parts: list[Pieces] = field(default_factory=list)


def detect_scene(
    scene: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    model: str | os.PathLike[str] | None = None,
    bands: Sequence[int | str] | None = None,
    score_threshold: float | None = None,
    iou_threshold: float | None = None,
    tile_size: int | None = None,
    overlap: int | None = None,
    batch_size: int = 1,
    classes: Sequence[str] | None = None,
    gsd: float | None = None,
    nodata: float | None = None,
    dst_crs: Any = None,
    driver: str | None = None,
    overwrite: bool = False,
    preview: str | os.PathLike[str] | None = None,
    backend: str = "auto",
    threads: int | None = None,
    multi_label: bool = False,
    simplify_px: float = SIMPLIFY_PX,
    progress: Callable[[int, int], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> DetectResult:
    """Detect objects in one scene.

    Args:
        scene: any raster that GDAL opens.
        output: vector file to write (.gpkg, .geojson); None writes none.
        model: catalogue name or model file; None is the bundled model.
        bands: 1-based numbers or names of the scene's bands, in the order of the model's; None chooses by name.
        score_threshold: keep detections with at least this score, in [0, 1]; None is the model's.
        iou_threshold: detections of a class that overlap by this much are one, in [0, 1]; None is the model's.
        tile_size: side of a tile in px of the model's ground sample distance; None is the model's.
        overlap: px that neighbouring tiles share; objects longer than it may be cut; None is the model's.
        batch_size: tiles per call of the engine.
        classes: names of the classes to keep; None keeps all.
        gsd: metres per pixel on the ground of the scene, if the file does not say or says it wrongly.
        nodata: value of pixels without data, if the file does not say.
        dst_crs: CRS of the geometries, such as "EPSG:4326"; None is the scene's.
        driver: "GPKG" or "GeoJSON"; None chooses by the output's suffix.
        overwrite: replace existing outputs.
        preview: PNG to draw.
        backend: engine, see :func:`rtmdet_geo.backends.open_backend`.
        threads: CPU threads of the engine; None is one per usable core.
        multi_label: several classes for one place are several detections (for evaluation).
        simplify_px: how far a mask's edge may move to become a polygon of few corners, in px of the model's ground
            sample distance; 0 keeps the pixels' edges.
        progress: called with (tiles done, tiles in all).
        cancelled: asked between batches; True ends the run with :class:`Cancelled`.

    Returns:
        Features and a summary with the keys ``scene``, ``output``, ``preview``, ``run_id``, ``num_detections``,
        ``num_by_class``, ``num_tiles``, ``num_empty_tiles``, ``num_saturated_tiles``, ``width``, ``height`` (source
        px), ``crs``, ``gsd_x_m``, ``gsd_y_m``, ``stretch``, ``model``, ``parameters``, ``seconds``, ``versions``.

    Raises:
        RasterError, BandError, ResolutionError: the scene cannot be read, lacks a band, or is too coarse or fine.
        UnknownModelError, ModelFileError: no such model, or its file is corrupt or foreign.
        UnknownClassError: ``classes`` names what the model does not know.
        OutputError: an output exists, or cannot be written.
        ConfigError: a value is outside its range.
        Cancelled: ``cancelled`` answered True; no output was touched.

    Example:
        >>> result = detect_scene("tests/data/casablanca.tif")  # doctest: +SKIP
        >>> result.features[["class_name", "score", "length_m"]]  # doctest: +SKIP
    """
    started = time.perf_counter()
    _check_outputs(scene, output, preview, driver, overwrite)
    target_crs = parse_crs(dst_crs)
    if target_crs is not None and target_crs != "EPSG:4326" and output and driver_of(output, driver) == "GeoJSON":
        raise ConfigError(f"GeoJSON is always EPSG:4326, not {dst_crs}: leave --dst-crs out, or write a .gpkg")
    model_path = find_model(model)
    engine = open_backend(model_path, name=backend, threads=threads)
    plan = _make_plan(
        engine,
        score_threshold,
        iou_threshold,
        tile_size,
        overlap,
        batch_size,
        classes,
        multi_label=multi_label,
        simplify_px=simplify_px,
    )
    spec, run_id = plan.spec, uuid.uuid4().hex
    with open_scene(
        Path(scene) if isinstance(scene, os.PathLike) else scene,
        bands=bands,
        model_bands=spec.bands,
        optional_bands=spec.optional_bands,
        stretch=spec.stretch,
        model_gsd_m=spec.gsd_m,
        gsd_m=gsd,
        trained_gsd_m=spec.trained_gsd_m,
        nodata=nodata,
    ) as source:
        if target_crs is not None and not source.is_georeferenced:
            raise ConfigError(f"scene {source.path!r} has no CRS, so it cannot be projected; leave --dst-crs out")
        grid = TileGrid(source.width, source.height, plan.tile_size, plan.overlap)
        saturated_before = engine.num_saturated
        counts = _run_tiles(source, grid, engine, plan, progress, cancelled)
        num_saturated = engine.num_saturated - saturated_before
        _warn(source, counts, num_saturated, plan)
        merged = merge_survivors(counts.parts, grid, iou_threshold=plan.iou_threshold)
        features = _make_features(source, merged, plan, gsd, target_crs, run_id)
        num_by_class = features["class_name"].value_counts()
        summary: dict[str, Any] = {
            "scene": source.path,
            "output": os.fspath(output) if output is not None else None,
            "preview": os.fspath(preview) if preview is not None else None,
            "run_id": run_id,
            "num_detections": len(features),
            "num_by_class": {name: int(num_by_class.get(name, 0)) for name in spec.classes},
            "num_tiles": counts.num_tiles,
            "num_empty_tiles": counts.num_empty_tiles,
            "num_saturated_tiles": num_saturated,
            "width": source.source_width,
            "height": source.source_height,
            "crs": source.crs.to_string() if source.crs is not None else None,
            "gsd_x_m": source.gsd_x_m,
            "gsd_y_m": source.gsd_y_m,
            "stretch": source.stretch_record,
            "model": {
                "name": spec.name,
                "architecture": spec.architecture,
                "path": str(model_path),
                "sha256": file_sha256(model_path),
                "weights_sha256": spec.weights_sha256,
                "licence": spec.licence,
                "attribution": spec.attribution,
            },
            "parameters": {
                "score_threshold": plan.score_threshold,
                "iou_threshold": plan.iou_threshold,
                "tile_size": plan.tile_size,
                "overlap": plan.overlap,
                "batch_size": plan.batch_size,
                "classes": list(classes) if classes is not None else list(spec.classes),
                "multi_label": multi_label,
                "simplify_px": simplify_px,
                "backend": engine.name,
                "gsd": gsd,
                "nodata": nodata,
                "bands": list(source.band_indexes),
            },
            "versions": _versions(),
        }
        if cancelled is not None and cancelled():
            raise Cancelled(_cancel_message(counts.num_tiles, len(grid), output))
        if preview is not None:
            draw_preview(source, merged.detections, preview, classes=spec.classes, overwrite=overwrite)
        if output is not None:
            write_features(
                features,
                output,
                driver=driver,
                overwrite=overwrite,
                metadata=summary,
                geometry_type="MultiPolygon" if spec.kind == "mask" else "Polygon",
            )
    summary["seconds"] = time.perf_counter() - started
    return DetectResult(features, summary)


def _check_outputs(
    scene: str | os.PathLike[str],
    output: str | os.PathLike[str] | None,
    preview: str | os.PathLike[str] | None,
    driver: str | None,
    overwrite: bool,
) -> None:
    """Refuse before any work what could not be written at the end, or would replace what is read."""
    for path in (output, preview):
        if path is not None and os.path.exists(path) and os.path.exists(scene) and os.path.samefile(path, scene):
            raise OutputError(f"output {os.fspath(path)!r} is the scene itself; give another name")
    if output is not None and preview is not None and os.path.abspath(output) == os.path.abspath(preview):
        raise OutputError(f"output and preview are both {os.fspath(output)!r}; give two names")
    if output is not None:
        check_output(output, overwrite, driver=driver)
    if preview is not None:
        check_preview(preview, overwrite)


def _make_plan(
    engine: Backend,
    score_threshold: float | None,
    iou_threshold: float | None,
    tile_size: int | None,
    overlap: int | None,
    batch_size: int,
    classes: Sequence[str] | None,
    *,
    multi_label: bool,
    simplify_px: float,
) -> _Plan:
    """Fill in the model's defaults and check every value."""
    spec = engine.spec
    score = spec.score_threshold if score_threshold is None else score_threshold
    iou = spec.iou_threshold if iou_threshold is None else iou_threshold
    for name, value in (("score_threshold", score), ("iou_threshold", iou)):
        if not (math.isfinite(value) and 0 <= value <= 1):
            raise ConfigError(f"{name}={value!r} must be in [0, 1]")
    size = spec.tile_size if tile_size is None else tile_size
    if size < spec.stride_multiple or size % spec.stride_multiple:
        raise ConfigError(f"tile_size={size} px must be a multiple of {spec.stride_multiple}")
    if engine.fixed_tile_size is not None and size != engine.fixed_tile_size:
        raise ConfigError(f"model {spec.name!r} takes tiles of {engine.fixed_tile_size} px only; leave tile_size out")
    shared = min(spec.overlap, size // 2) if overlap is None else overlap
    if not 0 <= shared < size:
        raise ConfigError(f"overlap={shared} px must be at least 0 and below tile_size={size} px")
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size} must be at least 1")
    class_ids = None
    if classes is not None:
        unknown = [name for name in classes if name not in spec.classes]
        if unknown:
            raise UnknownClassError(
                f"model {spec.name!r} knows no class {unknown[0]!r}; it knows {', '.join(spec.classes)}"
            )
        class_ids = tuple(spec.classes.index(name) for name in classes)
    if not (math.isfinite(simplify_px) and simplify_px >= 0):
        raise ConfigError(f"simplify_px={simplify_px!r} must be at least 0")
    return _Plan(spec, size, shared, batch_size, score, iou, class_ids, multi_label, simplify_px)


def _run_tiles(
    source: Scene,
    grid: TileGrid,
    engine: Backend,
    plan: _Plan,
    progress: Callable[[int, int], None] | None,
    cancelled: Callable[[], bool] | None,
) -> _Counts:
    """Read, run and filter every tile.

    Raises:
        Cancelled: the caller's wish.
    """
    counts = _Counts()
    in_flight: deque[tuple[Tile, NDArray[np.bool_]]] = deque()
    # As little padding as the engine takes: channel attention averages over the whole input, grey included.
    fixed = engine.fixed_tile_size
    shape = (fixed, fixed) if fixed is not None else grid.padded_shape(plan.spec.stride_multiple)
    if progress is not None:
        progress(0, len(grid))

    def batches() -> Iterator[NDArray[np.uint8]]:
        images: list[NDArray[np.uint8]] = []
        for tile in grid:
            if cancelled is not None and cancelled():
                raise Cancelled(_cancel_message(counts.num_tiles, len(grid), None))
            pixels, valid = source.read(tile.x, tile.y, tile.width, tile.height)
            if not valid.any():
                finish(tile, None)
                counts.num_empty_tiles += 1
                continue
            images.append(_pad(pixels, shape))
            in_flight.append((tile, valid))
            if len(images) == plan.batch_size:
                yield np.stack(images)
                images = []
        if images:
            yield np.stack(images)

    def finish(tile: Tile, detections: Detections | None) -> None:
        if detections is not None and len(detections):
            counts.parts.append(
                tile_survivors(detections, tile, grid, iou_threshold=plan.iou_threshold, input_shape=shape)
            )
        counts.num_tiles += 1
        if progress is not None:
            progress(counts.num_tiles, len(grid))

    for found in engine.run(batches(), score_threshold=plan.score_threshold, multi_label=plan.multi_label):
        for detections in found:
            tile, valid = in_flight.popleft()
            finish(tile, _filter(detections, valid, plan.class_ids))
    return counts


def _pad(pixels: NDArray[np.uint8], shape: tuple[int, int]) -> NDArray[np.uint8]:
    """Extend (C, h, w) to (C, *shape) at the right and the bottom with grey, as in training."""
    channels, height, width = pixels.shape
    if (height, width) == shape:
        return pixels
    padded = np.full((channels, *shape), PAD_VALUE, np.uint8)
    padded[:, :height, :width] = pixels
    return padded


def _filter(detections: Detections, valid: NDArray[np.bool_], class_ids: tuple[int, ...] | None) -> Detections:
    """Keep detections of the wanted classes whose centre lies on a valid pixel (valid: (h, w), tile px)."""
    height, width = valid.shape
    columns, rows = np.floor(detections.boxes[:, 0]), np.floor(detections.boxes[:, 1])
    keep = (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
    keep[keep] = valid[rows[keep].astype(np.intp), columns[keep].astype(np.intp)]
    if class_ids is not None:
        keep &= np.isin(detections.labels, class_ids)
    return detections.select(keep)


def _warn(source: Scene, counts: _Counts, num_saturated: int, plan: _Plan) -> None:
    if counts.num_empty_tiles == counts.num_tiles:
        warnings.warn(f"scene {source.path!r} holds no valid pixel", NodataWarning, stacklevel=3)
    if num_saturated:
        warnings.warn(
            f"{num_saturated} of {counts.num_tiles} tiles hold more candidates above score {plan.score_threshold:g} "
            "than the model returns, so some may be missing; raise the score or lower the tile size",
            SaturatedTileWarning,
            stacklevel=3,
        )


def _make_features(
    source: Scene, merged: Merged, plan: _Plan, gsd: float | None, dst_crs: Any, run_id: str
) -> geopandas.GeoDataFrame:
    """Resampled px -> geometries in the scene's CRS (source px without one) and attributes."""
    spec, measured = plan.spec, None
    if source.gsd_x_m is not None and source.gsd_y_m is not None:
        measured = math.sqrt(source.gsd_x_m * source.gsd_y_m)
    boxes, transform = merged.detections.boxes, source.transform
    outlines = outlines_of(merged.detections)
    polygons = outlines_to_polygons(outlines, tolerance=plan.simplify_px) if outlines is not None else None
    if source.is_georeferenced:  # a rectangle on the ground is none in pixels of unequal sides: go straight to the CRS
        a, b, c, d, e, f = tuple(transform)[:6]
        x, y = source.scale_x, source.scale_y
        transform = Affine(a * x, b * y, c, d * x, e * y, f)
    else:
        boxes = source.to_source(boxes)
        if polygons is not None:
            polygons = np.array(
                [affine_transform(item, [source.scale_x, 0, 0, source.scale_y, 0, 0]) for item in polygons]
            )
    return build_features(
        boxes,
        merged.detections.scores,
        merged.detections.labels,
        merged.num_merged,
        merged.on_edge,
        transform=transform,
        crs=source.crs,
        classes=spec.classes,
        gsd_m=gsd if gsd is not None else measured,
        scene_id=source.scene_id,
        acquired_at=source.acquired_at,
        sensor=source.sensor,
        model=spec.name,
        model_sha=spec.weights_sha256,
        run_id=run_id,
        dst_crs=dst_crs,
        kind=spec.object_kind,
        polygons=polygons,
    )


def _cancel_message(num_done: int, num_tiles: int, output: str | os.PathLike[str] | None) -> str:
    where = f" to {os.fspath(output)!r}" if output is not None else ""
    return f"stopped after {num_done} of {num_tiles} tiles; nothing was written{where}"


def _versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    versions = {"rtmdet_geo": __version__, "python": platform.python_version()}
    for package in ("numpy", "onnxruntime", "rasterio", "numba"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            logger.debug("%s is not installed as a package", package)
    return versions
