"""The pipeline on one page: scene -> tiles -> backend -> merge -> features -> files.

The only module that knows every stage. Tiles are read, run and forgotten one batch at a time, so memory holds pixels
and raw candidates of one batch, and of each tile what NMS left. Tiles without a valid pixel are not run, those beside
the area that is asked for not even read. Nothing appears under an output's final name before it is whole.
"""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rtmdet_geo.area import find_area
from rtmdet_geo.backends import Backend, open_backend
from rtmdet_geo.catalog import find_model
from rtmdet_geo.detect_checks import check_numbers, check_outputs, run_facts, warn_of
from rtmdet_geo.errors import Cancelled, ConfigError, RasterError
from rtmdet_geo.journal import check_journal, open_journal, partial_output
from rtmdet_geo.merge import MAX_OVERLAP, Merged
from rtmdet_geo.merge_methods import MergeMethod
from rtmdet_geo.merge_rows import RowMerger
from rtmdet_geo.polygons import SIMPLIFY_PX
from rtmdet_geo.preview_html import write_preview
from rtmdet_geo.pyramid import LongObjects, check_pyramid, make_levels
from rtmdet_geo.raster import open_scene
from rtmdet_geo.run_record import file_state, library_versions, model_record, scene_record
from rtmdet_geo.scene_features import FeatureMaker, join_features
from rtmdet_geo.stitch import Pieces
from rtmdet_geo.stretch_options import choose_stretch
from rtmdet_geo.structures import Detections
from rtmdet_geo.suppression import check_method
from rtmdet_geo.tile_loop import LiveResults, TileResults, TileSettings, run_tiles
from rtmdet_geo.tiles import TileGrid
from rtmdet_geo.vector import check_target_crs, write_feature_chunks
from rtmdet_geo.views import Augmentation, augment, find_augmentation

if TYPE_CHECKING:
    import geopandas

logger = logging.getLogger(__name__)


def detect_scene(
    scene: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
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
    stretch: str | None = None,
    stretch_from: str | os.PathLike[str] | None = None,
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
    merge: MergeMethod = "nms",
    class_agnostic: bool = False,
    pyramid: int = 0,
    max_overlap: float = MAX_OVERLAP,
    simplify_px: float = SIMPLIFY_PX,
    collect: bool = True,
    each: Callable[[geopandas.GeoDataFrame], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> geopandas.GeoDataFrame:
    """Detect objects in one scene.

    Args:
        scene: any raster that GDAL opens; several, or a folder of them, are one mosaic (:mod:`rtmdet_geo.mosaic`).
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
        stretch: how values become 8-bit, as :mod:`rtmdet_geo.stretch_options` spells it, such as "percentile:2,98";
            None is the model's.
        stretch_from: an earlier output or JSON summary: its limits are used, so equal values look equal.
        dst_crs: CRS of the geometries, such as "EPSG:4326"; None is the scene's.
        driver: name of its format, such as "GPKG"; None chooses by the output's ending.
        overwrite: replace existing outputs, and the journal of an unfinished run.
        resume: go on with an unfinished run that was to write ``output``, see :mod:`rtmdet_geo.journal`; without one,
            begin.
        preview: picture (.png) or page (.html) to write, of the scene with its detections.
        backend: engine, see :func:`rtmdet_geo.backends.open_backend`.
        device: likewise.
        precision: likewise.
        compiled: likewise.
        threads: CPU threads of the engine; None is one per usable core.
        multi_label: several classes for one place are several detections (for evaluation).
        tta: test-time augmentation: every tile is also looked at mirrored ("flips"), smaller and larger ("scales"), or
            both ("all"), or as an :class:`rtmdet_geo.views.Augmentation` says; None or "none": as it is.
        merge: what becomes of boxes of several tiles that overlap: "nms", the best one stays; "soft-nms", scores of the
            others decay; "wbf", they are averaged, see :func:`rtmdet_geo.merge.merge_survivors`.
        class_agnostic: objects of different classes in one place are one, too.
        pyramid: coarser levels that are looked at as well, each at twice the ground sample distance, for what is longer
            than ``overlap``, see :mod:`rtmdet_geo.pyramid`; boxes only.
        max_overlap: masks of a class that share so much of the smaller one are one object, in (0, 1]; 1 keeps all that
            NMS by boxes keeps, as the published evaluation does.
        simplify_px: how far a mask's edge may move to become a polygon of few corners, in px of the model's ground
            sample distance; 0 keeps the pixels' edges.
        collect: False: the result has no rows, and memory does not follow their number, unless ``preview`` needs them.
        each: called with the features of each tile row once they are final: at once where there is no output, which a
            cancelled run or one that fails cannot take back; else while it is written.
        progress: called with (tiles done, tiles in all).
        cancelled: asked before each tile; True ends the run with :class:`Cancelled`. What was found until then goes
            to ``NAME.partial.EXT``, and the journal stays for ``resume``.

    Returns:
        One row per detection with the schema of :mod:`rtmdet_geo.vector`, from the top of the scene, best score first
        in what became final together, as in ``output``. ``attrs["summary"]`` has
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
    paths: Sequence[Any] = scene if isinstance(scene, list | tuple) else [scene]
    if not all(isinstance(path, str | os.PathLike) for path in paths):
        raise ConfigError(f"a scene is a path, not {type(scene).__name__}; images in memory are for rtmdet_geo.predict")
    names = [os.fspath(path) for path in paths]
    check_outputs(names, output, preview, driver, overwrite)
    if output is not None:
        check_journal(output, resume=resume, overwrite=overwrite)
    elif resume:
        raise ConfigError("resume goes on with an output; give one")
    target_crs = check_target_crs(dst_crs, output, driver)
    check_numbers(simplify_px, min_length_m, max_length_m)
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
    spec, run_id = engine.spec, uuid.uuid4().hex
    check_method(merge, spec.object_kind)
    check_pyramid(pyramid, spec.object_kind)
    settings = TileSettings.of(
        engine,
        score_threshold=score_threshold,
        iou_threshold=iou_threshold,
        tile_size=tile_size,
        overlap=overlap,
        batch_size=batch_size,
        classes=classes,
        multi_label=multi_label,
        class_aware=not class_agnostic,
        max_overlap=max_overlap,
    )
    with open_scene(
        names if isinstance(scene, list | tuple) else names[0],
        bands=bands,
        model_bands=spec.bands,
        optional_bands=spec.optional_bands,
        stretch=choose_stretch(spec.stretch, stretch, stretch_from),
        model_gsd_m=spec.gsd_m,
        gsd_m=gsd,
        trained_gsd_m=spec.trained_gsd_m,
        nodata=nodata,
    ) as source:
        area = find_area(source, bounds=bounds, geographic=geographic, aoi=aoi)
        maker = FeatureMaker(
            source,
            spec,
            run_id,
            area=area,
            min_length_m=min_length_m,
            max_length_m=max_length_m,
            gsd=gsd,
            dst_crs=target_crs,
            simplify_px=simplify_px,
        )
        grid = TileGrid(source.width, source.height, settings.tile_size, settings.overlap)
        tiles = area.tiles(grid) if area is not None else list(grid)
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
            "merge": merge,
            "class_agnostic": class_agnostic,
            "pyramid": pyramid,
            "max_overlap": max_overlap,
            "simplify_px": simplify_px,
            "tta": asdict(augmentation),
            "backend": engine.name,
            "device": engine.device_name,
            "precision": getattr(model, "precision", "fp32"),
            "gsd": gsd,
            "nodata": nodata,
            "stretch": stretch or "model",
            "stretch_from": os.fspath(stretch_from) if stretch_from is not None else None,
            "bands": list(source.band_indexes),
        }
        record = {**scene_record(source), "model": model_record(spec, engine.path), "parameters": parameters}
        state = file_state(*source.files)
        merger = RowMerger(
            grid,
            iou_threshold=settings.iou_threshold,
            class_aware=settings.class_aware,
            max_overlap=settings.max_overlap,
            kind=spec.object_kind,
            method=merge,
            least_score=settings.score_threshold,
        )
        chunks: list[tuple[Merged, geopandas.GeoDataFrame]] = []  # of the result, or for the preview

        levels, long_objects = make_levels(source, grid, area, pyramid), LongObjects(grid)

        def finish_row(pieces: list[Pieces]) -> geopandas.GeoDataFrame:
            """Add a tile row, and return the features that are final by it."""
            merged = merger.add_row([*pieces, *long_objects.take(merger.num_rows)])
            merged, features = maker.make(merged.select(settings.is_enough(merged.detections)))
            if each is not None and len(features):
                each(features)
            if collect or preview is not None or not chunks:
                chunks.append((merged, features))
            return features

        def summarize(target: str | os.PathLike[str] | None, is_partial: bool = False) -> dict[str, Any]:
            """Return the facts about the run once the last row is finished."""
            return {
                "scene": source.path,
                "output": os.fspath(target) if target is not None else None,
                "preview": os.fspath(preview) if preview is not None and not is_partial else None,
                "run_id": run_id,
                "num_detections": maker.num_features,
                "num_by_class": {name: maker.num_by_class[name] for name in spec.classes},
                "num_tiles": results.num_tiles,
                "num_empty_tiles": results.num_empty_tiles,
                "num_saturated_tiles": results.num_saturated,
                **record,
                **({"partial": True} if is_partial else {}),
                "versions": library_versions(engine.name, "numba"),
            }

        def write(rows: Iterable[geopandas.GeoDataFrame], target: str | os.PathLike[str], is_partial: bool) -> None:
            write_feature_chunks(
                rows,
                target,
                driver=driver,
                overwrite=overwrite or is_partial,
                metadata=lambda: summarize(target, is_partial),
                geometry_type="MultiPolygon" if spec.kind == "mask" else "Polygon",
                style=maker.style(),
                image=maker.image(),
            )

        with ExitStack() as stack:
            results, journal = TileResults(), None
            if output is not None:
                facts = run_facts(record, source.path, state, grid, area)
                journal = stack.enter_context(open_journal(output, facts, resume=resume))
            num_done, num_all = 0, len(tiles) + sum(len(level.tiles) for level in levels)

            def advance(number: int, total: int) -> None:
                if progress is not None:
                    progress(num_done + number, num_all)

            try:
                for level in levels:
                    part = journal.part(level.first_index, len(level.grid)) if journal is not None else None
                    coarse = run_tiles(
                        level.scene,
                        level.grid,
                        engine,
                        settings,
                        tiles=level.tiles,
                        journal=part,
                        progress=advance,
                        cancelled=cancelled,
                    )
                    num_done += len(level.tiles)
                    long_objects.add(level, (part or coarse).rows(level.grid))
                if journal is None:
                    results = LiveResults(grid, tiles, finish_row)
                run_tiles(
                    source,
                    grid,
                    engine,
                    settings,
                    tiles=tiles,
                    results=results,
                    journal=journal.part(0, len(grid)) if journal is not None else None,
                    progress=advance,
                    cancelled=cancelled,
                )
                if cancelled is not None and cancelled():
                    raise Cancelled(f"stopped after all {results.num_tiles} tiles; nothing was written")
            except Cancelled as wish:
                if output is None or journal is None or not results.num_tiles:
                    raise
                partial = partial_output(output)
                write(map(finish_row, journal.rows(grid)), partial, is_partial=True)
                raise Cancelled(
                    f"stopped after {results.num_tiles} of {len(tiles)} tiles; {maker.num_features} detections of them "
                    f"are in {os.fspath(partial)!r}, --resume goes on",
                    os.fspath(partial),
                ) from wish
            if file_state(*source.files) != state:
                raise RasterError(f"scene {source.path!r} changed while it was read; run again with --overwrite")
            warn_of(source, grid, engine, results, settings)
            rows: Iterable[geopandas.GeoDataFrame] = map(finish_row, journal.rows(grid)) if journal is not None else ()
            if preview is not None:
                rows = list(rows)
                write_preview(
                    source,
                    Detections.concatenate([merged.detections for merged, _ in chunks], "scene", spec.object_kind),
                    join_features([features for _, features in chunks]),
                    preview,
                    classes=spec.classes,
                    summary=summarize(output),
                    overwrite=overwrite,
                )
            if output is not None:
                write(rows, output, is_partial=False)
                partial_output(output).unlink(missing_ok=True)
    found = join_features([features for _, features in chunks])
    if not collect:
        found = found.iloc[:0]
    found.attrs["summary"] = {**summarize(output), "seconds": time.perf_counter() - started}
    return found


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
