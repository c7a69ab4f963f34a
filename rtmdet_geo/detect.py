"""The pipeline on one page: scene -> tiles -> backend -> merge -> features -> files.

The only module that knows every stage. Tiles are read, run and forgotten one batch at a time, so memory holds pixels
and raw candidates of one batch, and of each tile what NMS left. Tiles without a valid pixel are not run, those beside
the area that is asked for not even read. Nothing appears under an output's final name before it is whole.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import time
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import shapely
from affine import Affine
from shapely.affinity import affine_transform

from rtmdet_geo.area import Area, find_area
from rtmdet_geo.backends import Backend, open_backend
from rtmdet_geo.catalog import find_model
from rtmdet_geo.errors import (
    Cancelled,
    ConfigError,
    NodataWarning,
    OutputError,
    PaddedTileWarning,
    RasterError,
    SaturatedTileWarning,
)
from rtmdet_geo.journal import check_journal, open_journal, partial_output
from rtmdet_geo.merge import MAX_OVERLAP, Merged, merge_survivors
from rtmdet_geo.outputs import check_not_input
from rtmdet_geo.polygons import SIMPLIFY_PX, outlines_to_polygons
from rtmdet_geo.preview import check_preview, draw_preview
from rtmdet_geo.raster import Scene, open_scene
from rtmdet_geo.run_record import file_state, library_versions, model_record, scene_record
from rtmdet_geo.stitch import outlines_of
from rtmdet_geo.structures import ModelSpec
from rtmdet_geo.tile_loop import TileResults, TileSettings, run_tiles
from rtmdet_geo.tiles import TileGrid
from rtmdet_geo.vector import build_features, check_output, check_target_crs, write_features
from rtmdet_geo.views import Augmentation, augment, find_augmentation

if TYPE_CHECKING:
    import geopandas

logger = logging.getLogger(__name__)


def detect_scene(
    scene: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    model: str | os.PathLike[str] | Backend | None = None,
    bands: Sequence[int | str] | None = None,
    score_threshold: float | Mapping[str, float] | None = None,
    iou_threshold: float | None = None,
    tile_size: int | None = None,
    overlap: int | None = None,
    batch_size: int | None = None,
    classes: Sequence[str] | None = None,
    bounds: Sequence[float] | None = None,
    geographic: bool = False,
    aoi: str | os.PathLike[str] | None = None,
    min_length_m: float | None = None,
    max_length_m: float | None = None,
    gsd: float | None = None,
    nodata: float | None = None,
    dst_crs: Any = None,
    driver: str | None = None,
    overwrite: bool = False,
    resume: bool = False,
    preview: str | os.PathLike[str] | None = None,
    backend: str = "auto",
    device: str = "auto",
    precision: str = "auto",
    compiled: bool = False,
    threads: int | None = None,
    multi_label: bool = False,
    tta: str | Augmentation | None = None,
    max_overlap: float = MAX_OVERLAP,
    simplify_px: float = SIMPLIFY_PX,
    progress: Callable[[int, int], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> geopandas.GeoDataFrame:
    """Detect objects in one scene.

    Args:
        scene: any raster that GDAL opens.
        output: vector file to write, of any format of :mod:`rtmdet_geo.vector_formats`; None writes none.
        model: catalogue name, model file, or weights (a file, or published ones by name), or what
            :func:`rtmdet_geo.load_model` opened; None is the bundled model of ships.
        bands: 1-based numbers or names of the scene's bands, in the order of the model's; None chooses by name.
        score_threshold: keep detections with at least this score, in [0, 1]; None is the model's. By class, such as
            ``{"ship": 0.5, "*": 0.3}``: "*" is all that are not named, the model's if it is left out.
        iou_threshold: detections of a class that overlap by this much are one, in [0, 1]; None is the model's.
        tile_size: side of a tile in px of the model's ground sample distance; None is the model's.
        overlap: px that neighbouring tiles share; objects longer than it may be cut; None is the model's.
        batch_size: tiles per call of the engine; None is the engine's own: 1 on a CPU, 8 on a GPU.
        classes: names of the classes to keep; None keeps all.
        bounds: west, south, east, north in the scene's CRS (px without one): only tiles that touch them are read, and
            objects are kept whose centre lies inside. The stretch is that of the whole scene all the same.
        geographic: the bounds are in degrees of longitude and latitude.
        aoi: file of polygons in any CRS, holes respected, that bound the search likewise; with bounds: both do.
        min_length_m: keep objects that are so long at least, in metres on the ground.
        max_length_m: likewise, at most.
        gsd: metres per pixel on the ground of the scene, if the file does not say or says it wrongly.
        nodata: value of pixels without data, if the file does not say.
        dst_crs: CRS of the geometries, such as "EPSG:4326"; None is the scene's.
        driver: name of its format, such as "GPKG"; None chooses by the output's ending.
        overwrite: replace existing outputs, and the journal of an unfinished run.
        resume: go on with an unfinished run that was to write ``output``, see :mod:`rtmdet_geo.journal`; without one,
            begin.
        preview: PNG to draw.
        backend: engine, see :func:`rtmdet_geo.backends.open_backend`.
        device: likewise.
        precision: likewise.
        compiled: likewise.
        threads: CPU threads of the engine; None is one per usable core.
        multi_label: several classes for one place are several detections (for evaluation).
        tta: test-time augmentation: every tile is also looked at mirrored ("flips"), smaller and larger ("scales"), or
            both ("all"), or as an :class:`rtmdet_geo.views.Augmentation` says; None or "none": as it is.
        max_overlap: masks of a class that share so much of the smaller one are one object, in (0, 1]; 1 keeps all that
            NMS by boxes keeps, as the published evaluation does.
        simplify_px: how far a mask's edge may move to become a polygon of few corners, in px of the model's ground
            sample distance; 0 keeps the pixels' edges.
        progress: called with (tiles done, tiles in all).
        cancelled: asked before each tile; True ends the run with :class:`Cancelled`. What was found until then goes
            to ``NAME.partial.EXT``, and the journal stays for ``resume``.

    Returns:
        One row per detection with the schema of :mod:`rtmdet_geo.vector`, best score first. ``attrs["summary"]`` has
        facts about the run, ready for JSON: ``scene``, ``output``, ``preview``, ``run_id``, ``num_detections``,
        ``num_by_class``, ``num_tiles``, ``num_empty_tiles``, ``num_saturated_tiles``, ``width``, ``height`` (source
        px), ``crs``, ``gsd_x_m``, ``gsd_y_m``, ``stretch``, ``model``, ``parameters``, ``seconds``, ``versions``.
        :func:`describe_run` says it in one line.

    Raises:
        RasterError, BandError, ResolutionError: the scene cannot be read, lacks a band, or is too coarse or fine.
        UnknownModelError, ModelFileError: no such model, or its file is corrupt or foreign.
        UnknownClassError: ``classes`` or ``score_threshold`` names what the model does not know.
        AnnotationError: ``aoi`` cannot be read, or holds no polygons.
        OutputError: an output exists, or cannot be written.
        ConfigError: a value is outside its range, the area outside the scene, or the run to go on with another one.
        Cancelled: ``cancelled`` answered True; no output was touched.

    Example:
        >>> ships = detect_scene("tests/data/casablanca.tif")  # doctest: +SKIP
        >>> ships[["class_name", "score", "length_m"]]  # doctest: +SKIP
    """
    started = time.perf_counter()
    if not isinstance(scene, str | os.PathLike):
        raise ConfigError(f"a scene is a path, not {type(scene).__name__}; images in memory are for rtmdet_geo.predict")
    _check_outputs(scene, output, preview, driver, overwrite)
    if output is not None:
        check_journal(output, resume=resume, overwrite=overwrite)
    elif resume:
        raise ConfigError("resume goes on with an output; give one")
    target_crs = check_target_crs(dst_crs, output, driver)
    if not (math.isfinite(simplify_px) and simplify_px >= 0):
        raise ConfigError(f"simplify_px={simplify_px!r} must be at least 0")
    _check_lengths(min_length_m, max_length_m)
    augmentation = find_augmentation(tta)
    if isinstance(model, Backend):
        if (backend, device, precision, compiled, threads) != ("auto", "auto", "auto", False, None):
            raise ConfigError(
                "the model is open already: backend, device, precision, compiled and threads belong into load_model"
            )
    elif not (model is None or isinstance(model, str | os.PathLike)):
        raise ConfigError(f"a model is a name, a path or what load_model opened, not {type(model).__name__}")
    else:
        model = open_backend(
            find_model(model),
            name=backend,
            threads=threads,
            device=device,
            precision=precision,
            compiled=compiled,
            batch_size=batch_size,
            tile_size=tile_size,
            any_size=augmentation.scales != (1.0,),
        )
    engine = augment(model, augmentation)
    settings = TileSettings.of(
        engine,
        score_threshold=score_threshold,
        iou_threshold=iou_threshold,
        tile_size=tile_size,
        overlap=overlap,
        batch_size=batch_size,
        classes=classes,
        multi_label=multi_label,
        max_overlap=max_overlap,
    )
    spec, run_id = engine.spec, uuid.uuid4().hex
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
        if (min_length_m, max_length_m) != (None, None) and source.gsd_x_m is None:
            raise ConfigError(
                f"scene {source.path!r} has no CRS that leads to metres on the ground; leave the least and greatest "
                "length out"
            )
        grid = TileGrid(source.width, source.height, settings.tile_size, settings.overlap)
        area = find_area(source, bounds=bounds, geographic=geographic, aoi=aoi)
        tiles = area.tiles(grid) if area is not None else None
        parameters = {
            "score_threshold": settings.score_record(spec),
            "iou_threshold": settings.iou_threshold,
            "tile_size": settings.tile_size,
            "overlap": settings.overlap,
            "batch_size": settings.batch_size,
            "classes": settings.class_names(spec),
            "bounds": [float(value) for value in bounds] if bounds is not None else None,
            "geographic": geographic,
            "aoi": os.fspath(aoi) if aoi is not None else None,
            "min_length_m": min_length_m,
            "max_length_m": max_length_m,
            "multi_label": multi_label,
            "max_overlap": max_overlap,
            "simplify_px": simplify_px,
            "tta": asdict(augmentation),
            "backend": engine.name,
            "device": engine.device_name,
            "precision": getattr(model, "precision", "fp32"),
            "gsd": gsd,
            "nodata": nodata,
            "bands": list(source.band_indexes),
        }
        record = {**scene_record(source), "model": model_record(spec, engine.path), "parameters": parameters}
        state, results = file_state(source.path), TileResults()

        def finish(
            target: str | os.PathLike[str] | None, picture: str | os.PathLike[str] | None, **more: Any
        ) -> geopandas.GeoDataFrame:
            """Merge what the tiles left, and write it."""
            merged = merge_survivors(
                results.parts,
                grid,
                iou_threshold=settings.iou_threshold,
                max_overlap=settings.max_overlap,
                kind=spec.object_kind,
            )
            if area is not None:
                merged = merged.select(area.holds(merged.detections.boxes[:, :2]))
            features = _make_features(source, merged, spec, simplify_px, gsd, target_crs, run_id)
            if (min_length_m, max_length_m) != (None, None):
                merged, features = _of_length(merged, features, min_length_m, max_length_m)
            num_by_class = features["class_name"].value_counts()
            summary: dict[str, Any] = {
                "scene": source.path,
                "output": os.fspath(target) if target is not None else None,
                "preview": os.fspath(picture) if picture is not None else None,
                "run_id": run_id,
                "num_detections": len(features),
                "num_by_class": {name: int(num_by_class.get(name, 0)) for name in spec.classes},
                "num_tiles": results.num_tiles,
                "num_empty_tiles": results.num_empty_tiles,
                "num_saturated_tiles": results.num_saturated,
                **record,
                **more,
                "versions": library_versions(engine.name, "numba"),
            }
            if picture is not None:
                draw_preview(source, merged.detections, picture, classes=spec.classes, overwrite=overwrite)
            if target is not None:
                write_features(
                    features,
                    target,
                    driver=driver,
                    overwrite=overwrite or bool(more),
                    metadata=summary,
                    geometry_type="MultiPolygon" if spec.kind == "mask" else "Polygon",
                )
            features.attrs["summary"] = summary
            return features

        with ExitStack() as stack:
            journal = None
            if output is not None:
                facts = _facts(record, source.path, state, grid, area)
                journal = stack.enter_context(open_journal(output, facts, resume=resume))
            try:
                run_tiles(
                    source,
                    grid,
                    engine,
                    settings,
                    tiles=tiles,
                    results=results,
                    journal=journal,
                    progress=progress,
                    cancelled=cancelled,
                )
                if cancelled is not None and cancelled():
                    raise Cancelled(f"stopped after all {results.num_tiles} tiles; nothing was written")
            except Cancelled as wish:
                if output is None or not results.num_tiles:
                    raise
                partial = partial_output(output)
                features = finish(partial, None, partial=True)
                raise Cancelled(
                    f"stopped after {results.num_tiles} of {len(grid if tiles is None else tiles)} tiles; "
                    f"{len(features)} detections of them are in {os.fspath(partial)!r}, --resume goes on",
                    os.fspath(partial),
                ) from wish
            if file_state(source.path) != state:
                raise RasterError(f"scene {source.path!r} changed while it was read; run again with --overwrite")
            _warn(source, grid, engine, results, settings)
            features = finish(output, preview)
            if output is not None:
                partial_output(output).unlink(missing_ok=True)
    features.attrs["summary"]["seconds"] = time.perf_counter() - started
    return features


def describe_run(features: geopandas.GeoDataFrame) -> str:
    """Say in one line what :func:`detect_scene` found."""
    summary = features.attrs["summary"]
    counts = ", ".join(f"{number} {name}" for name, number in summary["num_by_class"].items() if number)
    where = f" -> {summary['output']}" if summary["output"] else ""
    tiles = f"{summary['num_tiles']} tile" + ("s" if summary["num_tiles"] != 1 else "")
    return (
        f"{summary['scene']}: {summary['num_detections']} detections{f' ({counts})' if counts else ''} "
        f"in {tiles}, {summary['seconds']:.1f} s{where}"
    )


def _facts(
    record: Mapping[str, Any], path: str, state: dict[str, int] | None, grid: TileGrid, area: Area | None
) -> dict[str, Any]:
    """Return what must be the same when a run is gone on with, ready for JSON."""
    free = {"batch_size", "device", "bounds", "geographic", "aoi", "min_length_m", "max_length_m", "simplify_px"}
    return {
        "scene": os.path.abspath(path) if state is not None else path,
        "scene_file": state,
        "scene_stretch": record["stretch"],
        "area_sha256": hashlib.sha256(shapely.to_wkb(area.shape)).hexdigest() if area is not None else None,
        "model_sha256": record["model"]["sha256"],
        **{name: value for name, value in record["parameters"].items() if name not in free},
        "size": [grid.width, grid.height],
    }


def _check_outputs(
    scene: str | os.PathLike[str],
    output: str | os.PathLike[str] | None,
    preview: str | os.PathLike[str] | None,
    driver: str | None,
    overwrite: bool,
) -> None:
    """Refuse before any work what could not be written at the end, or would replace what is read."""
    for path in (output, preview):
        if path is not None:
            check_not_input(path, scene)
    if output is not None and preview is not None and os.path.abspath(output) == os.path.abspath(preview):
        raise OutputError(f"output and preview are both {os.fspath(output)!r}; give two names")
    if output is not None:
        check_output(output, overwrite, driver=driver)
    if preview is not None:
        check_preview(preview, overwrite)


def _check_lengths(min_length_m: float | None, max_length_m: float | None) -> None:
    for name, value in (("min_length_m", min_length_m), ("max_length_m", max_length_m)):
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise ConfigError(f"{name}={value!r} must be at least 0 m")
    if min_length_m is not None and max_length_m is not None and min_length_m > max_length_m:
        raise ConfigError(f"min_length_m={min_length_m!r} must not exceed max_length_m={max_length_m!r}")


def _warn(source: Scene, grid: TileGrid, engine: Backend, results: TileResults, settings: TileSettings) -> None:
    if results.num_empty_tiles == results.num_tiles:
        where = "" if results.num_tiles == len(grid) else " in the area asked for"
        warnings.warn(f"scene {source.path!r} holds no valid pixel{where}", NodataWarning, stacklevel=3)
    fixed = engine.fixed_tile_size
    if fixed is not None and grid.padded_shape(engine.spec.stride_multiple) != (fixed, fixed):
        warnings.warn(
            f"scene {source.path!r} is smaller than the tiles of {fixed} px that the model file takes only; "
            "grey fills them up, which moves scores a little: a file for any size does without",
            PaddedTileWarning,
            stacklevel=3,
        )
    if results.num_saturated:
        warnings.warn(
            f"{results.num_saturated} of {results.num_tiles} tiles hold more candidates above score "
            f"{settings.score_threshold:g} than the model returns, so some may be missing; raise the score or lower "
            "the tile size",
            SaturatedTileWarning,
            stacklevel=3,
        )


def _make_features(
    source: Scene,
    merged: Merged,
    spec: ModelSpec,
    simplify_px: float,
    gsd: float | None,
    dst_crs: Any,
    run_id: str,
) -> geopandas.GeoDataFrame:
    """Resampled px -> geometries in the scene's CRS (source px without one) and attributes."""
    boxes, transform = merged.detections.boxes, source.transform
    outlines = outlines_of(merged.detections)
    polygons = outlines_to_polygons(outlines, tolerance=simplify_px) if outlines is not None else None
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
        gsd_m=gsd if gsd is not None else source.mean_gsd_m,
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


def _of_length(
    merged: Merged, features: geopandas.GeoDataFrame, least: float | None, most: float | None
) -> tuple[Merged, geopandas.GeoDataFrame]:
    """Keep what is so long on the ground, in both: rows agree, for both go by score, label and box."""
    keep = features["length_m"].between(0 if least is None else least, math.inf if most is None else most).to_numpy()
    kept = features[keep].reset_index(drop=True)
    return merged.select(keep), kept.assign(id=np.arange(1, len(kept) + 1, dtype=np.int64))
