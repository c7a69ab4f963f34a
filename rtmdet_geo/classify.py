"""What a whole image shows, and what each cell of a grid over a scene shows.

An ordinary image is resized and cropped as the published classifiers were tested (:func:`preprocess.crop_centre`). A
scene is cut into chips instead, and every chip is seen whole. A chip that ends with the scene is filled up with its own
mirror image, so that neither its scale nor its contents are another's. Pixels without data get the model's mean, which
normalisation turns into zeros.

One batch of chips is read, run and forgotten at a time. Nothing appears under the output's name before it is whole.
"""

from __future__ import annotations

import math
import os
import time
import uuid
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rtmdet_geo.backends.classify import Classifier, open_classifier
from rtmdet_geo.cells import build_cells, cell_batches, count_cells
from rtmdet_geo.errors import BandError, Cancelled, ConfigError, NodataWarning, NotGeoreferencedWarning
from rtmdet_geo.outputs import check_not_input
from rtmdet_geo.preprocess import check_array, crop_centre, resize_bicubic
from rtmdet_geo.raster import Scene, open_scene
from rtmdet_geo.run_record import library_versions, model_record, scene_record
from rtmdet_geo.structures import ModelSpec, Tile
from rtmdet_geo.vector import check_output, check_target_crs, write_features

if TYPE_CHECKING:
    import geopandas

#: Classes that the one line about a run names.
_NUM_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Classification:
    """The most probable classes of one image, best first.

    Attributes:
        labels: (k,) int64, indexes into ``ModelSpec.classes``.
        class_names: their k names.
        scores: (k,) float32 probabilities.
    """

    labels: NDArray[np.int64]
    class_names: tuple[str, ...]
    scores: NDArray[np.float32]

    def __len__(self) -> int:
        """Return k."""
        return len(self.labels)

    def __str__(self) -> str:
        """Say the classes in one line."""
        return "; ".join(f"{name} {score:.3f}" for name, score in zip(self.class_names, self.scores, strict=True))


@dataclass(frozen=True, slots=True)
class _Plan:
    """Everything that is settled before the first chip."""

    spec: ModelSpec
    chip_size: int
    overlap: int
    batch_size: int
    top_k: int
    score_threshold: float

    @property
    def stride(self) -> int:
        """Side of a cell in px."""
        return self.chip_size - self.overlap

    @property
    def before(self) -> int:
        """Px of a chip to the left of and above its cell."""
        return self.overlap // 2


@dataclass(slots=True)
class _Found:
    """What the loop over the chips gathers, one entry per cell."""

    num_chips: int = 0
    num_empty_chips: int = 0
    cells: list[Tile] = field(default_factory=list)
    valid_shares: list[float] = field(default_factory=list)
    labels: list[NDArray[np.int64]] = field(default_factory=list)
    scores: list[NDArray[np.float32]] = field(default_factory=list)


def classify_image(
    classifier: Classifier | str | os.PathLike[str],
    image: NDArray[np.uint8],
    *,
    channels: Sequence[str] = ("red", "green", "blue"),
    top_k: int = 5,
) -> Classification:
    """Name what an ordinary image shows.

    Args:
        classifier: see :func:`rtmdet_geo.backends.classify.open_classifier`; a name or path is opened for this call
            only.
        image: (height, width, C) uint8.
        channels: names of its C channels in order; they are put in the model's.
        top_k: classes to return, at least 1; all if the model has fewer.

    Raises:
        BandError: the image lacks a channel of the model, or ``channels`` does not name each of its channels.
        ConfigError: ``top_k`` is below 1, the model finds objects, or the image is not (height, width, C) uint8.
        ValueError: the image is empty.

    Example:
        >>> classifier = open_classifier("cspnext_tiny_imagenet")  # doctest: +SKIP
        >>> print(classify_image(classifier, image, top_k=1))  # doctest: +SKIP
    """
    _check_top_k(top_k)
    if isinstance(classifier, str | os.PathLike):
        classifier = open_classifier(classifier)
    spec = classifier.spec
    if spec.kind != "classification":
        raise ConfigError(f"model {spec.name!r} finds objects and does not classify; use it with rtmdet_geo.predict")
    image = check_array(image, instead="classify_file")
    if image.dtype != np.uint8 or image.ndim != 3:
        raise ConfigError(f"the image is {image.dtype} {image.shape}; give (height, width, channels) uint8, stretched")
    if image.shape[2] != len(channels):
        raise BandError(f"the image has {image.shape[2]} channels, channels= names {len(channels)}: {list(channels)}")
    pixels = crop_centre(image, spec.tile_size)
    planes = []
    for band in spec.bands:
        if band in channels:
            planes.append(pixels[:, :, list(channels).index(band)])
        elif band in spec.optional_bands:
            planes.append(np.full(pixels.shape[:2], spec.optional_bands[band], np.uint8))
        else:
            raise BandError(
                f"model {spec.name!r} wants channel {band!r}, the image has {', '.join(channels)}; "
                "name the image's channels with channels="
            )
    labels, scores = _best(classifier.predict(np.stack(planes)[None]), top_k)
    return Classification(labels[0], tuple(spec.classes[label] for label in labels[0]), scores[0])


def classify_file(
    classifier: Classifier,
    path: str | os.PathLike[str],
    *,
    bands: Sequence[int | str] | None = None,
    nodata: float | None = None,
    top_k: int = 5,
) -> Classification:
    """Name what an image file shows as a whole, any raster that GDAL opens; it is stretched as a scene would be.

    An orientation that a camera wrote beside the pixels (EXIF) is not applied.

    Args:
        classifier: see :func:`rtmdet_geo.backends.classify.open_classifier`.
        path: image file.
        bands: 1-based numbers or names of the file's bands, in the order of the model's; None chooses by name.
        nodata: value of pixels without data, if the file does not say.
        top_k: see :func:`classify_image`.

    Raises:
        RasterError, BandError: the file cannot be read, or lacks a band.
        ConfigError: ``top_k`` is below 1.
    """
    _check_top_k(top_k)
    spec = classifier.spec
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)  # a photograph needs no place on Earth
        source = open_scene(
            Path(path),
            bands=bands,
            model_bands=spec.bands,
            optional_bands=spec.optional_bands,
            stretch=spec.stretch,
            nodata=nodata,
        )
    with source:
        pixels, valid = source.read(0, 0, source.width, source.height)
    if not valid.any():
        warnings.warn(f"image {source.path!r} holds no valid pixel", NodataWarning, stacklevel=2)
    _fill_invalid(pixels, valid, spec)
    return classify_image(classifier, pixels.transpose(1, 2, 0), channels=spec.bands, top_k=top_k)


def classify_scene(
    scene: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    model: str | os.PathLike[str],
    chip_size: int | None = None,
    overlap: int = 0,
    gsd: float | None = None,
    bands: Sequence[int | str] | None = None,
    top_k: int = 5,
    score_threshold: float = 0.0,
    dst_crs: Any = None,
    driver: str | None = None,
    batch_size: int = 8,
    overwrite: bool = False,
    nodata: float | None = None,
    backend: str = "auto",
    threads: int | None = None,
    device: str = "auto",
    progress: Callable[[int, int], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> geopandas.GeoDataFrame:
    """Name what each cell of a grid over a scene shows; optionally write the cells as polygons.

    Cells have a side of ``chip_size - overlap`` px and cover the scene from its top left corner once; the last ones end
    with the scene. Cells without a valid pixel are left out.

    Args:
        scene: file, URL or GDAL virtual path.
        output: vector file to write, of any format of :mod:`rtmdet_geo.vector_formats`.
        model: model file, weights file or name of published weights, see
            :func:`rtmdet_geo.backends.classify.open_classifier`.
        chip_size: side of what the model sees at once, in px of its ground sample distance (of the scene where it has
            none); resized to the model's own side. None: the model's own side.
        overlap: px that neighbouring chips share: each shows ``overlap // 2`` px around its cell.
        gsd: metres per pixel on the ground of the scene, if the file does not say or says it wrongly.
        bands: 1-based numbers or names of the scene's bands, in the order of the model's; None chooses by name.
        top_k: classes to tell per cell, at least 1; all if the model has fewer.
        score_threshold: leave out cells whose best class has a lower probability, in [0, 1].
        dst_crs: CRS of the geometries, such as "EPSG:4326"; None is the scene's.
        driver: name of its format, such as "GPKG"; None chooses by the output's ending.
        batch_size: chips per call of the engine.
        overwrite: replace an existing output.
        nodata: value of pixels without data, if the file does not say.
        backend: engine, see open_classifier.
        threads: CPU threads of the engine, see open_classifier.
        device: see open_classifier.
        progress: called with (chips done, chips in all).
        cancelled: asked between batches; True ends the run with :class:`Cancelled`.

    Returns:
        Cells row by row with the columns of :func:`rtmdet_geo.cells.build_cells`. Their ``attrs["summary"]`` has facts
        about the run, ready for JSON: ``scene``, ``output``, ``run_id``, ``num_cells``, ``num_by_class`` (classes that
        occur, most frequent first), ``num_chips``, ``num_empty_chips``, ``width``, ``height`` (source px), ``crs``,
        ``gsd_x_m``, ``gsd_y_m``, ``stretch``, ``model``, ``parameters``, ``seconds``, ``versions``.

    Raises:
        RasterError, BandError, ResolutionError: the scene cannot be read, lacks a band, or is too coarse or fine.
        UnknownModelError, ModelFileError, WeightsError: see open_classifier.
        OutputError: the output exists, or cannot be written.
        ConfigError: a value is outside its range, or the engine does not run the model.
        Cancelled: ``cancelled`` answered True; no output was touched.
    """
    started = time.perf_counter()
    if output is not None:
        check_not_input(output, scene)
        check_output(output, overwrite, driver=driver)
    target_crs = check_target_crs(dst_crs, output, driver)
    classifier = open_classifier(model, backend=backend, threads=threads, device=device)
    plan = _make_plan(classifier.spec, chip_size, overlap, batch_size, top_k, score_threshold)
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
        found = _classify_cells(source, classifier, plan, progress, cancelled)
        features = _make_features(source, found, plan, gsd, target_crs, run_id)
    num_by_class = features["class_name"].value_counts()
    summary: dict[str, Any] = {
        "scene": source.path,
        "output": os.fspath(output) if output is not None else None,
        "run_id": run_id,
        "num_cells": len(features),
        "num_by_class": {str(name): int(number) for name, number in num_by_class.items()},
        "num_chips": found.num_chips,
        "num_empty_chips": found.num_empty_chips,
        **scene_record(source),
        "model": model_record(spec, classifier.path),
        "parameters": {
            "chip_size": plan.chip_size,
            "overlap": plan.overlap,
            "batch_size": plan.batch_size,
            "top_k": plan.top_k,
            "score_threshold": plan.score_threshold,
            "backend": classifier.name,
            "gsd": gsd,
            "nodata": nodata,
            "bands": list(source.band_indexes),
        },
        "versions": library_versions(classifier.name, "pillow"),
    }
    if cancelled is not None and cancelled():
        raise Cancelled("stopped after the last chip; nothing was written")
    if output is not None:
        write_features(features, output, driver=driver, layer="classification", overwrite=overwrite, metadata=summary)
    summary["seconds"] = time.perf_counter() - started
    features.attrs["summary"] = summary
    return features


def describe_cells(features: geopandas.GeoDataFrame) -> str:
    """Say in one line what :func:`classify_scene` found."""
    summary = features.attrs["summary"]
    counts = [f"{number} {name}" for name, number in summary["num_by_class"].items()]
    more = [f"{len(counts) - _NUM_SHOWN} more classes"] if len(counts) > _NUM_SHOWN else []
    where = f" -> {summary['output']}" if summary["output"] else ""
    listed = f" ({', '.join(counts[:_NUM_SHOWN] + more)})" if counts else ""
    size = summary["parameters"]["chip_size"]
    return f"{summary['scene']}: {summary['num_cells']} cells{listed} of {size} px, {summary['seconds']:.1f} s{where}"


def _check_top_k(top_k: int) -> None:
    if top_k < 1:
        raise ConfigError(f"top_k={top_k} must be at least 1")


def _make_plan(
    spec: ModelSpec, chip_size: int | None, overlap: int, batch_size: int, top_k: int, score_threshold: float
) -> _Plan:
    """Fill in the model's defaults and check every value."""
    _check_top_k(top_k)
    size = spec.tile_size if chip_size is None else chip_size
    if size < 1:
        raise ConfigError(f"chip_size={size} px must be at least 1")
    if not 0 <= overlap < size:
        raise ConfigError(f"overlap={overlap} px must be at least 0 and below chip_size={size} px")
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size} must be at least 1")
    if not (math.isfinite(score_threshold) and 0 <= score_threshold <= 1):
        raise ConfigError(f"score_threshold={score_threshold!r} must be in [0, 1]")
    return _Plan(spec, size, overlap, batch_size, min(top_k, len(spec.classes)), score_threshold)


def _best(scores: NDArray[np.float32], top_k: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return labels and scores (N, k) of each row's best classes; of equal scores the lower label comes first."""
    labels = np.argsort(-scores, axis=1, kind="stable")[:, :top_k]
    return labels, np.take_along_axis(scores, labels, axis=1)


def _fill_invalid(pixels: NDArray[np.uint8], valid: NDArray[np.bool_], spec: ModelSpec) -> None:
    """Give pixels (C, h, w) without data the model's mean, in place."""
    if not valid.all():
        pixels[:, ~valid] = np.clip(np.round(spec.mean), 0, 255).astype(np.uint8)[:, None]


def _classify_cells(
    source: Scene,
    classifier: Classifier,
    plan: _Plan,
    progress: Callable[[int, int], None] | None,
    cancelled: Callable[[], bool] | None,
) -> _Found:
    """Read, run and rank every chip.

    Raises:
        Cancelled: the caller's wish.
    """
    found = _Found()
    total = count_cells(source.width, source.height, plan.stride)
    if progress is not None:
        progress(0, total)
    for cells in cell_batches(source.width, source.height, plan.stride, plan.batch_size):
        if cancelled is not None and cancelled():
            raise Cancelled(f"stopped after {found.num_chips} of {total} chips; nothing was written")
        chips, shares = _read_chips(source, cells, plan)
        kept = [index for index, share in enumerate(shares) if share > 0]
        if kept:
            labels, scores = _best(classifier.predict(np.stack([chips[index] for index in kept])), plan.top_k)
            for index, label, score in zip(kept, labels, scores, strict=True):
                if score[0] >= plan.score_threshold:
                    found.cells.append(cells[index])
                    found.valid_shares.append(shares[index])
                    found.labels.append(label)
                    found.scores.append(score)
        found.num_chips += len(cells)
        found.num_empty_chips += len(cells) - len(kept)
        if progress is not None:
            progress(found.num_chips, total)
    if found.num_empty_chips == found.num_chips:
        warnings.warn(f"scene {source.path!r} holds no valid pixel", NodataWarning, stacklevel=3)
    return found


def _read_chips(source: Scene, cells: list[Tile], plan: _Plan) -> tuple[list[NDArray[np.uint8]], list[float]]:
    """Return the model's inputs (C, side, side) around neighbouring cells of one row, and each cell's valid share."""
    left, top = max(cells[0].x - plan.before, 0), max(cells[0].y - plan.before, 0)
    right = min(cells[-1].x - plan.before + plan.chip_size, source.width)
    bottom = min(cells[0].y - plan.before + plan.chip_size, source.height)
    pixels, valid = source.read(left, top, right - left, bottom - top)
    _fill_invalid(pixels, valid, plan.spec)
    chips, shares = [], []
    for cell in cells:
        inside = (slice(cell.y - top, cell.y - top + cell.height), slice(cell.x - left, cell.x - left + cell.width))
        shares.append(float(valid[inside].mean()))
        start = cell.x - plan.before
        chips.append(_to_input(pixels[:, :, max(start, 0) - left : start + plan.chip_size - left], plan))
    return chips, shares


def _to_input(chip: NDArray[np.uint8], plan: _Plan) -> NDArray[np.uint8]:
    """Fill (C, h, w) up to a square with its mirror image and resize it to the model's side."""
    _, height, width = chip.shape
    size, side = plan.chip_size, plan.spec.tile_size
    if (height, width) != (size, size):
        chip = np.pad(chip, ((0, 0), (0, size - height), (0, size - width)), mode="symmetric")
    if size != side:
        chip = resize_bicubic(chip.transpose(1, 2, 0), side, side).transpose(2, 0, 1)
    return chip


def _make_features(
    source: Scene, found: _Found, plan: _Plan, gsd: float | None, dst_crs: Any, run_id: str
) -> geopandas.GeoDataFrame:
    """Cells in resampled px -> polygons in the scene's CRS (source px without one) and attributes."""
    spec, number = plan.spec, len(found.cells)
    edges = np.array([(cell.x, cell.y, cell.x + cell.width, cell.y + cell.height) for cell in found.cells], np.float64)
    edges = edges.reshape(-1, 2, 2) * (source.source_width, source.source_height) / (source.width, source.height)
    return build_cells(
        edges.reshape(-1, 4),
        np.stack(found.labels) if number else np.zeros((0, plan.top_k)),
        np.stack(found.scores) if number else np.zeros((0, plan.top_k)),
        np.array(found.valid_shares),
        transform=source.transform,
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
    )
