"""Prediction on images that are numpy arrays, for notebooks: pixels in, boxes and masks in px of the image out.

Two ways lead an image to a network. Models without a resolution of their own that find horizontal boxes or masks (the
published COCO ones) see the whole image, resized to their input with the sides' ratio kept and padded, as they were
trained and tested (:mod:`rtmdet_geo.preprocess`). Others see an image as :mod:`rtmdet_geo.detect` shows them a scene:
stretched as they say, at their resolution, in tiles.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from affine import Affine
from numpy.typing import NDArray

from rtmdet_geo.annotations.outlines import Outline, trace_mask, transform_outline
from rtmdet_geo.backends import Backend, open_backend
from rtmdet_geo.bands import Band
from rtmdet_geo.boxes import boxes_to_polygons
from rtmdet_geo.catalog import find_model
from rtmdet_geo.errors import BandError, ConfigError, SaturatedTileWarning
from rtmdet_geo.masks import CroppedMask, assemble_detections, crop_outline
from rtmdet_geo.merge import MAX_OVERLAP, merge_survivors
from rtmdet_geo.nms import nms_of_kind
from rtmdet_geo.preprocess import check_array, letterbox
from rtmdet_geo.scene import Scene
from rtmdet_geo.stitch import outlines_of
from rtmdet_geo.structures import Detections, Kind, ModelSpec
from rtmdet_geo.tile_loop import TileSettings, run_tiles
from rtmdet_geo.tiles import TileGrid
from rtmdet_geo.views import (
    Augmentation,
    View,
    augment,
    check_augmentation,
    find_augmentation,
    join,
    restore,
    show,
)

if TYPE_CHECKING:
    from shapely.geometry.base import BaseGeometry

Resize = Literal["auto", "letterbox", "none"]


@dataclass(frozen=True, slots=True)
class Prediction:
    """What :func:`predict` found in an image: N objects, best score first.

    Attributes:
        boxes: (N, 5) float64 cx, cy, w, h in px of the image, angle in rad (le90; 0 unless kind is "rotated").
        scores: (N,) float32 in [0, 1].
        labels: (N,) int64, index into the model's classes.
        class_names: N names, of each object's class.
        kind: "rotated", "horizontal" or "mask".
        masks: of kind "mask": N masks cropped to their objects, with their place in the image; else None.
    """

    boxes: NDArray[np.float64]
    scores: NDArray[np.float32]
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]
    kind: Kind
    masks: list[CroppedMask] | None = None

    def __len__(self) -> int:
        """Return N."""
        return len(self.boxes)

    def __str__(self) -> str:
        """Say the result in one line."""
        counts = ", ".join(f"{number} {name}" for name, number in Counter(self.class_names).most_common())
        number = f"{len(self)} object" + ("s" if len(self) != 1 else "")
        return f"{number} ({counts})" if counts else number

    def polygons(self) -> list[BaseGeometry]:
        """Return N shapely polygons in px of the image: the boxes' corners, or the edges of the masks' pixels.

        A mask may be several polygons with holes, and an empty one is an empty polygon.
        """
        import shapely

        from rtmdet_geo.polygons import outlines_to_polygons

        if self.masks is None:
            return list(shapely.polygons(boxes_to_polygons(self.boxes))) if len(self) else []
        outlines = [transform_outline(trace_mask(mask), [[1, 0, x], [0, 1, y]]) for mask, x, y in self.masks]
        found = iter(outlines_to_polygons([outline for outline in outlines if outline], tolerance=0))
        return [next(found) if outline else shapely.Polygon() for outline in outlines]


def load_model(
    name_or_path: str | os.PathLike[str] | None = None,
    *,
    backend: str = "auto",
    device: str = "auto",
    precision: str = "auto",
    compiled: bool = False,
    threads: int | None = None,
) -> Backend:
    """Open a model for :func:`predict`.

    Args:
        name_or_path: catalogue name or model file; None is the bundled model.
        backend: engine, see :func:`rtmdet_geo.backends.open_backend`.
        device: likewise.
        precision: likewise.
        compiled: likewise.
        threads: CPU threads of the engine; None is one per usable core.

    Raises:
        UnknownModelError, ModelFileError: no such model, or its file is corrupt or foreign.
        ConfigError: no such engine, device or precision.
        EngineError: the engine cannot be built or loaded on this machine.
        MissingDependencyError: the engine's package is not installed.

    Example:
        >>> load_model(threads=1).spec.classes
        ('ship',)
    """
    return open_backend(
        find_model(name_or_path), name=backend, threads=threads, device=device, precision=precision, compiled=compiled
    )


def predict(
    model: Backend | str | os.PathLike[str] | None,
    image: NDArray[np.uint8],
    *,
    channels: Sequence[str] = ("red", "green", "blue"),
    score_threshold: float | None = None,
    iou_threshold: float | None = None,
    max_detections: int | None = None,
    resize: Resize = "auto",
    gsd: float | None = None,
    classes: Sequence[str] | None = None,
    tta: str | Augmentation | None = None,
    multi_label: bool = False,
    mask_threshold: float = 0.5,
    max_overlap: float = MAX_OVERLAP,
) -> Prediction:
    """Find objects in one image.

    Args:
        model: what :func:`load_model` or :func:`rtmdet_geo.backends.open_backend` gave; a name or path is loaded for
            this call only.
        image: (H, W, C) uint8, or (H, W) for one band, which is repeated where the model wants several.
        channels: what the image's channels show, in their order; OpenCV reads ("blue", "green", "red"). They are
            brought into the model's order; one that it can do without is filled, others than it takes are ignored.
        score_threshold: keep objects with at least this score, in [0, 1]; None is the model's.
        iou_threshold: objects of a class that overlap by this much are one, in [0, 1]; None is the model's.
        max_detections: keep the best so many; None keeps all.
        resize: "letterbox" shows the model the whole image, resized to its input; "none" shows it tiles of the image
            at its own resolution, or resampled to the model's where ``gsd`` is given. "auto" is "letterbox" for models
            of horizontal boxes or masks that have no resolution (``ModelSpec.gsd_m``), else "none".
        gsd: metres per pixel on the ground of the image; None leaves its resolution as it is.
        classes: names of the classes to keep; None keeps all.
        tta: test-time augmentation: "none", "flips", "scales", "all" or an :class:`rtmdet_geo.views.Augmentation`.
        multi_label: several classes for one place are several objects (for evaluation).
        mask_threshold: a mask is where the probability is higher, in (0, 1).
        max_overlap: see :func:`rtmdet_geo.detect.detect_scene`; letterboxed images go by NMS alone, as published.

    Raises:
        ConfigError: the image is not uint8 of that shape, a value is outside its range, or the engine cannot do it.
        BandError: the image lacks a band of the model, or ``channels`` does not fit it.
        ResolutionError: ``gsd`` is too far from the model's.
        UnknownClassError: ``classes`` names what the model does not know.

    Example:
        >>> sea = np.full((64, 96, 4), 40, np.uint8)
        >>> print(predict(load_model(), sea, channels=("red", "green", "blue", "nir")))
        0 objects
    """
    augmentation = find_augmentation(tta)
    if model is None or isinstance(model, str | os.PathLike):
        model = open_backend(find_model(model), any_size=augmentation.scales != (1.0,))
    spec = model.spec
    is_letterboxed = _is_letterboxed(spec, resize, gsd)
    if max_detections is not None and max_detections < 1:
        raise ConfigError(f"max_detections={max_detections} must be at least 1")
    if isinstance(score_threshold, Mapping):
        raise ConfigError("predict takes one score_threshold; scores by class are for detect_scene")
    settings = TileSettings.of(
        model,
        score_threshold=score_threshold,
        iou_threshold=iou_threshold,
        mask_threshold=mask_threshold,
        max_overlap=max_overlap,
        classes=classes,
        multi_label=multi_label,
    )
    check_augmentation(model, augmentation)
    scene = array_scene(image, channels, spec, gsd)
    saturated_before = model.num_saturated
    look = _predict_whole if is_letterboxed else _predict_tiles
    found, masks = look(model, scene, settings, augmentation, max_detections)
    if model.num_saturated > saturated_before:
        warnings.warn(
            f"the image holds more candidates above score {settings.score_threshold:g} than the model returns, "
            "so some objects may be missing; raise score_threshold",
            SaturatedTileWarning,
            stacklevel=2,
        )
    return Prediction(
        found.boxes.astype(np.float64),
        found.scores,
        found.labels,
        tuple(spec.classes[label] for label in found.labels),
        found.kind,
        masks,
    )


def _is_letterboxed(spec: ModelSpec, resize: Resize, gsd: float | None) -> bool:
    """Say whether the model sees the whole image, resized to its input.

    Raises:
        ConfigError: ``resize`` is unknown, or ``gsd`` says nothing.
    """
    if resize not in ("auto", "letterbox", "none"):
        raise ConfigError(f"resize={resize!r} is unknown; choose 'auto', 'letterbox' or 'none'")
    is_letterboxed = resize == "letterbox" or (
        resize == "auto" and spec.gsd_m is None and spec.object_kind in ("horizontal", "mask")
    )
    if gsd is not None and (is_letterboxed or spec.gsd_m is None):
        why = (
            "the image is resized to the model's input" if is_letterboxed else "the model has no resolution of its own"
        )
        raise ConfigError(f"gsd={gsd} says nothing here, for {why}; leave it out")
    return is_letterboxed


def _predict_whole(
    model: Backend, scene: Scene, settings: TileSettings, augmentation: Augmentation, max_detections: int | None
) -> tuple[Detections, list[CroppedMask] | None]:
    """Return what the engine finds in the whole image, letterboxed, in px of the image."""
    height, width = scene.height, scene.width
    pixels, _ = scene.read(0, 0, width, height)
    parts = []
    for view, picture in _letterboxes(pixels, model, augmentation):
        (results,) = model.run([picture], score_threshold=settings.score_threshold, multi_label=settings.multi_label)
        parts.append(restore(results[0], view, height, width))
    found = join(parts)
    if settings.class_ids is not None:
        found = found.select(np.isin(found.labels, settings.class_ids))
    kept = nms_of_kind(found.boxes, found.scores, found.labels, kind=found.kind, iou_threshold=settings.iou_threshold)
    found = found.select(kept[:max_detections])
    if found.kind != "mask":
        return found, None
    return found, assemble_detections(found, height, width, threshold=settings.mask_threshold)


def _letterboxes(
    pixels: NDArray[np.uint8], model: Backend, augmentation: Augmentation
) -> Iterator[tuple[View, NDArray[np.uint8]]]:
    """Yield each view of an image (C, H, W) inside a padded square, (1, C, side, side)."""
    multiple = model.spec.stride_multiple
    for scale in augmentation.scales:
        side = model.fixed_tile_size or max(1, round(model.spec.tile_size * scale / multiple)) * multiple
        boxed = letterbox(pixels.transpose(1, 2, 0), side)
        height, width = boxed.content
        content = boxed.image[:height, :width].transpose(2, 0, 1)[None]
        mirrored = Augmentation(flips=augmentation.flips)
        for view, picture in show(content, mirrored, multiple=multiple, side=side):
            yield View(*boxed.scale_factor, view.flip_x, view.flip_y), picture


def _predict_tiles(
    model: Backend, scene: Scene, settings: TileSettings, augmentation: Augmentation, max_detections: int | None
) -> tuple[Detections, list[CroppedMask] | None]:
    """Return what the engine finds in tiles of the image at the model's resolution, in px of the image."""
    grid = TileGrid(scene.width, scene.height, settings.tile_size, settings.overlap)
    results = run_tiles(scene, grid, augment(model, augmentation), settings)
    found = merge_survivors(
        results.parts,
        grid,
        iou_threshold=settings.iou_threshold,
        max_overlap=settings.max_overlap,
        kind=model.spec.object_kind,
    )
    detections = found.detections.select(np.arange(len(found))[:max_detections])
    view = View(1 / scene.scale_x, 1 / scene.scale_y)
    in_image = restore(replace(detections, masks=None), view, scene.source_height, scene.source_width)
    if detections.kind != "mask":
        return in_image, None
    outlines = outlines_of(detections)  # None where nothing was found
    return in_image, [] if outlines is None else [_cut(outline, scene) for outline in outlines]


def _cut(outline: Outline, scene: Scene) -> CroppedMask:
    """Cut an outline in resampled px into the pixels of the image."""
    moved = transform_outline(outline, [[scene.scale_x, 0, 0], [0, scene.scale_y, 0]])
    return crop_outline(moved, scene.source_width, scene.source_height)


class _ArraySource:
    """An image in memory as a scene's file, see :class:`rtmdet_geo.scene.SceneSource`; no CRS, all pixels valid."""

    crs = None
    transform = Affine.identity()

    def __init__(self, image: NDArray[np.uint8], channels: Sequence[str | None]) -> None:
        """Take an image (H, W, C) and its channels' names."""
        self.image, self.channels = image, channels
        self.height, self.width = image.shape[:2]
        self.gsd_m: tuple[float, float] | None = None
        self.tags: dict[str, str] = {}

    def named_bands(self, sensor: str | None) -> list[Band]:
        """Return a band per channel."""
        return [Band(index, name, name or "", "undefined") for index, name in enumerate(self.channels, 1)]

    def dtype(self, index: int) -> np.dtype[Any]:
        """Return uint8."""
        return self.image.dtype

    def nodata(self, index: int) -> float | None:
        """Return None."""
        return None

    def scale_offset(self, index: int) -> tuple[float, float]:
        """Return 1 and 0."""
        return 1.0, 0.0

    def check_values(self, indexes: Sequence[int]) -> None:
        """Accept all; the image was checked."""

    def mask_kind(self, indexes: Sequence[int]) -> str:
        """Return "none"."""
        return "none"

    def read(
        self,
        indexes: Sequence[int],
        x: int,
        y: int,
        width: int,
        height: int,
        out_shape: tuple[int, int] | None,
        *,
        with_mask: bool,
    ) -> tuple[list[NDArray[Any]], NDArray[np.bool_] | None]:
        """Return one (h, w) array per band, decimated to ``out_shape`` where it is given."""
        window = self.image[y : y + height, x : x + width]
        if out_shape is not None:
            rows, columns = (  # the pixels at the cells' centres, as GDAL's nearest
                (2 * np.arange(size) + 1) * side // (2 * size)
                for size, side in zip(out_shape, (height, width), strict=True)
            )
            window = window[rows[:, None], columns]
        return [np.ascontiguousarray(window[..., index - 1]) for index in indexes], None

    def close(self) -> None:
        """Do nothing."""


def array_scene(
    image: NDArray[np.uint8], channels: Sequence[str], spec: ModelSpec, gsd: float | None = None, *, name: str = "image"
) -> Scene:
    """Return an image as a model sees it: its bands, stretched.

    Args:
        image: see :func:`predict`; so are ``channels`` and ``gsd``.
        channels: what the image's channels show, in their order.
        spec: of the model.
        gsd: metres per pixel; None leaves its resolution as it is.
        name: of the scene, for messages.

    Raises:
        ConfigError: the image is not uint8 of that shape.
        BandError: it lacks a band of the model, or ``channels`` does not fit it.
    """
    array = check_array(image, instead="detect_scene")
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or 0 in array.shape:
        raise ConfigError(f"the image is {array.dtype} {array.shape}; give (height, width, channels) uint8, stretched")
    array = array.reshape(*array.shape[:2], -1)
    number = array.shape[2]
    names = [channels] if isinstance(channels, str) else list(channels)
    is_grey = number == 1 and len(names) > 1
    if not is_grey and (len(names) != number or len(set(names)) != number):
        raise BandError(f"the image has {number} channels, but channels={tuple(names)!r}; name each of them once")
    missing = [band for band in spec.bands if band not in names and band not in spec.optional_bands]
    if missing and not is_grey:
        raise BandError(
            f"the image has {', '.join(names)}, but model {spec.name!r} also needs {', '.join(missing)}; "
            "say what its channels show with channels=(...), or choose another model"
        )
    return Scene(
        name,
        _ArraySource(array, [None] if is_grey else names),
        bands=None,
        model_bands=spec.bands,
        optional_bands=spec.optional_bands,
        stretch=spec.stretch,
        model_gsd_m=spec.gsd_m if gsd is not None else None,
        gsd_m=gsd,
        trained_gsd_m=spec.trained_gsd_m,
        nodata=None,
    )
