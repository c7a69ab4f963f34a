"""The model-file contract: what comes out by kind, how many rows, and how rows become Detections.

All engines share it. An engine is a :class:`RowsBackend` that says how a batch becomes the graph's outputs; the rest is
here.
"""

from __future__ import annotations

import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rtmdet_geo.boxes import regularize_le90
from rtmdet_geo.catalog import SPEC_KEY, check_graph, read_metadata, read_spec
from rtmdet_geo.errors import (
    BatchHalvedWarning,
    ConfigError,
    DeviceMemoryError,
    ModelFileError,
    SaturatedTileWarning,
)
from rtmdet_geo.masks import NUM_KERNEL_PARAMETERS, NUM_MASK_FEATURES
from rtmdet_geo.structures import Detections, Kind, MaskKernels, MaskView, ModelKind, ModelSpec
from rtmdet_geo.variants import MAX_CANDIDATES, STRIDES

#: Images in a batch from which on a GPU is hardly quicker.
GPU_BATCH_SIZE = 8

#: Sizes of an output after its batch axis; words stand for sizes that depend on the image or the classes.
Sizes = tuple[int | str, ...]

_ROWS: dict[str, Sizes] = {"boxes": ("K", 5), "scores": ("K",), "labels": ("K",)}
#: Outputs of a model file by kind, in order, all fp32.
OUTPUTS: dict[ModelKind, dict[str, Sizes]] = {
    "rotated": _ROWS,
    "horizontal": _ROWS,
    "mask": {
        **_ROWS,
        "kernels": ("K", NUM_KERNEL_PARAMETERS),
        "mask_priors": ("K", 3),
        "mask_features": (NUM_MASK_FEATURES, "H/8", "W/8"),
    },
    "classification": {"scores": ("classes",)},
}


class Port(NamedTuple):
    """An input or output of a model file as an engine sees it.

    Attributes:
        name: in the graph.
        type: "uint8", "fp32", or what the engine calls another type.
        sizes: of the axes; what is no number is dynamic.
    """

    name: str
    type: str
    sizes: tuple[int | str | None, ...]


def check_model_file(path: Path, inputs: Sequence[Port], outputs: Sequence[Port]) -> ModelSpec:
    """Compare an opened file with the contract and return what it says of itself.

    Args:
        path: of the file.
        inputs: of its graph.
        outputs: of its graph.

    Raises:
        ModelFileError: it is foreign (the message names all that it lacks), damaged, or contradicts itself.
    """
    metadata = read_metadata(path)
    spec = read_spec(path) if SPEC_KEY in metadata else None
    missing = missing_parts(inputs, outputs, spec.kind if spec is not None else None)
    if missing or spec is None:
        raise ModelFileError(
            f"{str(path)!r} does not follow the model-file contract; it lacks {'; '.join(missing)}; "
            "if it is an RTMDet of another program, export the weights that it was made from with `rtmdet-geo export`"
        )
    check_graph(path)
    channels = inputs[0].sizes[1]
    if channels != len(spec.bands):
        raise ModelFileError(
            f"{str(path)!r} contradicts itself: input 'images' has {channels} channels, its {SPEC_KEY} "
            f"{len(spec.bands)} bands; export it again"
        )
    return spec


def missing_parts(inputs: Sequence[Port], outputs: Sequence[Port], kind: ModelKind | None) -> list[str]:
    """Return what a file lacks of the contract, in words.

    Args:
        inputs: of its graph.
        outputs: of its graph.
        kind: what its ModelSpec says; None: it has none, which is one of the things that it lacks.
    """
    missing = []
    if len(inputs) != 1 or inputs[0][:2] != ("images", "uint8") or len(inputs[0].sizes) != 4:
        found = ", ".join(f"{port.name} {port.type} ({', '.join(map(str, port.sizes))})" for port in inputs)
        missing.append(f"input 'images' uint8 (N, C, H, W) (it has {found})")
    ports = {port.name: port for port in outputs}
    for name, sizes in OUTPUTS[kind or "rotated"].items():
        port = ports.get(name)
        wanted = ("N", *sizes)
        if port is None or port.type != "fp32" or not _is_shape(port.sizes, wanted):
            missing.append(f"output {name!r} fp32 ({', '.join(map(str, wanted))})")
    if kind is None:
        missing.append(f"metadata key {SPEC_KEY!r}")
    return missing


def _is_shape(shape: tuple[int | str | None, ...], wanted: Sizes) -> bool:
    """Say whether a shape, whose dynamic sizes are no numbers, can be the wanted one."""
    known = [pair for pair in zip(shape, wanted, strict=False) if all(isinstance(size, int) for size in pair)]
    return len(shape) == len(wanted) and all(given == size for given, size in known)


def fixed_side(port: Port) -> int | None:
    """Return the side in px of the square images that an input demands; None: it has no fixed side."""
    height, width = port.sizes[2:]
    return height if isinstance(height, int) and height == width else None


def fixed_batch(port: Port) -> int | None:
    """Return the number of images that an input demands; None: any."""
    number = port.sizes[0]
    return number if isinstance(number, int) else None


def rows_per_level(
    kind: Kind, num_classes: int, height: int, width: int, *, limit: int | None = None
) -> list[tuple[int, bool]]:
    """Return for each level the rows that the graph keeps and whether that is fewer than it has (prior, class) pairs.

    Args:
        kind: of the model.
        num_classes: C; 1 where a prior enters with its best class only.
        height: of the input in px, multiple of 32.
        width: likewise.
        limit: rows kept per level; None is a model file's.

    Example:
        >>> rows_per_level("rotated", 1, 640, 640)
        [(2000, True), (1600, False), (400, False)]
    """
    pairs = [(height // stride) * (width // stride) * num_classes for stride in STRIDES]
    most = MAX_CANDIDATES[kind] if limit is None else limit
    return [(min(number, most), number > most) for number in pairs]


def count_saturated(scores: NDArray[np.float32], levels: list[tuple[int, bool]], score_threshold: float) -> int:
    """Return the number of images of which a cut-off level's lowest row is still at or above the threshold.

    Args:
        scores: (N, K).
        levels: see :func:`rows_per_level`; where their rows are not K, all rows are judged as one level.
        score_threshold: in [0, 1].
    """
    if sum(rows for rows, _ in levels) != scores.shape[1]:
        return int((scores.min(axis=1, initial=np.inf) >= score_threshold).sum())
    saturated = np.zeros(len(scores), bool)
    start = 0
    for rows, is_cut in levels:
        if is_cut:
            saturated |= scores[:, start : start + rows].min(axis=1) >= score_threshold
        start += rows
    return int(saturated.sum())


def rows_to_detections(
    boxes: NDArray[np.float32],
    scores: NDArray[np.float32],
    labels: NDArray[Any],
    kernels: NDArray[np.float32] | None = None,
    mask_priors: NDArray[np.float32] | None = None,
    mask_features: NDArray[np.float32] | None = None,
    *,
    score_threshold: float,
    multi_label: bool,
    kind: Kind,
) -> Detections:
    """Turn one image's K rows into Detections of the tile frame, best score first.

    Kept are rows with score >= ``score_threshold``, finite numbers, and w > 0 and h > 0 (the reference's
    ``min_bbox_size=0``). Rotated boxes are regularised to le90.

    The graph's rows are (prior, class) pairs. With ``multi_label=False`` only the best of a prior's rows stays. Rows of
    kind "mask" name their prior. The others do not, but pairs of one prior share one box to the last bit, so of
    identical boxes the one with the best score stays. Two priors that predict the very same box would be one as well,
    which NMS would do anyway for equal classes.

    Args:
        boxes: (K, 5) float32 cx cy w h in px of the tile, angle in rad.
        scores: (K,) in [0, 1].
        labels: (K,), whole numbers of any dtype.
        kernels: (K, 169), kind "mask" only.
        mask_priors: (K, 3) x, y, stride in px, kind "mask" only.
        mask_features: (8, h, w) of the image, kind "mask" only; copied, so that detections keep no batch alive.
        score_threshold: in [0, 1].
        multi_label: keep every class of a prior.
        kind: of the model.

    Raises:
        ValueError: of kind "mask" without the numbers that masks are made of.
    """
    keep = (scores >= score_threshold) & (boxes[:, 2:4] > 0).all(axis=1) & np.isfinite(boxes).all(axis=1)
    order = np.flatnonzero(keep)
    order = order[np.argsort(-scores[order], kind="stable")]
    if not len(order):
        return Detections.empty("tile", kind)
    if not multi_label:
        origin = np.ascontiguousarray((boxes if mask_priors is None else mask_priors)[order])
        rows = origin.view(f"V{origin.itemsize * origin.shape[1]}").ravel()
        order = order[np.sort(np.unique(rows, return_index=True)[1])]
    masks = None
    if kind == "mask":
        if kernels is None or mask_priors is None or mask_features is None:
            raise ValueError("instances need kernels, mask_priors and mask_features beside their boxes")
        views = (MaskView(mask_features.copy()),)
        masks = MaskKernels(kernels[order], mask_priors[order], views, np.zeros(len(order), np.int64))
    chosen = regularize_le90(boxes[order]) if kind == "rotated" else boxes[order]
    return Detections(chosen, scores[order], labels[order].astype(np.int64), "tile", kind, masks)


def refuse_classifier(spec: ModelSpec, path: str | os.PathLike[str]) -> None:
    """Refuse a model that finds no objects.

    Raises:
        ModelFileError: of kind "classification".
    """
    if spec.kind == "classification":
        raise ModelFileError(
            f"{os.fspath(path)!r} classifies whole images and finds no objects; run it with `rtmdet-geo classify`, or "
            "choose a detector"
        )


class RowsBackend(ABC):
    """An engine whose graph gives rows by the contract; see :class:`rtmdet_geo.backends.Backend`.

    Args:
        path: of the opened file, for messages.
        spec: what it says of itself.
        fixed_tile_size: side in px that it demands; None: any multiple of ``spec.stride_multiple``.
        fixed_batch_size: number of images that its graph demands; batches are cut and filled to it. None: any.
    """

    name: str
    device_name: str = "cpu"
    precision: str = "fp32"
    best_batch_size: int = 1

    def __init__(
        self,
        path: Path,
        spec: ModelSpec,
        *,
        fixed_tile_size: int | None = None,
        fixed_batch_size: int | None = None,
    ) -> None:
        """Remember what was opened."""
        self.path = path
        self.spec = spec
        self.fixed_tile_size = fixed_tile_size
        self.num_saturated = 0
        self._fixed_batch_size = fixed_batch_size
        if fixed_batch_size is not None:
            self.best_batch_size = fixed_batch_size
        self._most_images: int | None = None  # a batch may have, once memory was too small for a larger one

    @abstractmethod
    def _forward(self, images: NDArray[np.uint8], multi_label: bool) -> tuple[NDArray[Any], ...]:
        """Return the outputs for a batch that was checked.

        Raises:
            DeviceMemoryError: the device's memory is too small for so many images.
        """

    def raw(self, images: NDArray[np.uint8], *, multi_label: bool = True) -> tuple[NDArray[Any], ...]:
        """Return the graph's own outputs, in the order of :data:`OUTPUTS`.

        A batch that the device's memory is too small for is halved, and so are those after it.

        Args:
            images: uint8 (N, C, H, W).
            multi_label: False allows a graph that can to return one row a prior.

        Raises:
            ConfigError: the batch has another dtype, number of channels or side than the model takes.
            DeviceMemoryError: one image alone is too much.
        """
        self.check_batch(images)
        if self._fixed_batch_size is not None:
            return self._raw_filled(images, self._fixed_batch_size, multi_label)
        if self._most_images is not None and len(images) > self._most_images:
            return self._raw_in_parts(images, self._most_images, multi_label)
        try:
            return self._forward(images, multi_label)
        except DeviceMemoryError:
            if len(images) == 1:
                raise
            if self._most_images is None:
                warnings.warn(
                    f"the memory of {self.device_name} is too small for {len(images)} tiles of {images.shape[2]} x "
                    f"{images.shape[3]} px at once; going on with smaller batches (a lower batch size saves the try)",
                    BatchHalvedWarning,
                    stacklevel=2,
                )
        self._most_images = (len(images) + 1) // 2
        return self._raw_in_parts(images, self._most_images, multi_label)

    def _too_large(self, shape: tuple[int, ...]) -> DeviceMemoryError:
        """Return the error of a batch (N, C, H, W) that the device's memory is too small for."""
        number, _, height, width = shape
        elsewhere = "" if self.device_name == "cpu" else ", or choose device 'cpu'"
        return DeviceMemoryError(
            f"the memory of {self.device_name} is too small for {number} tiles of {height} x {width} px at once; lower "
            f"batch_size or tile_size{elsewhere}"
        )

    def _raw_filled(self, images: NDArray[np.uint8], size: int, multi_label: bool) -> tuple[NDArray[Any], ...]:
        """Return the outputs of a batch that is run ``size`` images at a time, the last filled up with black ones."""
        parts = []
        for start in range(0, len(images), size):
            part = images[start : start + size]
            filled = np.pad(part, ((0, size - len(part)), (0, 0), (0, 0), (0, 0)))
            parts.append([output[: len(part)] for output in self._forward(filled, multi_label)])
        return tuple(np.concatenate(outputs) for outputs in zip(*parts, strict=True))

    def _raw_in_parts(self, images: NDArray[np.uint8], size: int, multi_label: bool) -> tuple[NDArray[Any], ...]:
        """Return the outputs of a batch that is run ``size`` images at a time."""
        parts = [
            self.raw(images[start : start + size], multi_label=multi_label) for start in range(0, len(images), size)
        ]
        return tuple(np.concatenate(outputs) for outputs in zip(*parts, strict=True))

    def stream(
        self, batches: Iterable[NDArray[np.uint8]], *, multi_label: bool = True
    ) -> Iterator[tuple[tuple[int, ...], tuple[NDArray[Any], ...]]]:
        """Yield for each batch, in order, its shape and what :meth:`raw` gives; engines may overlap copies and runs."""
        for images in batches:
            yield images.shape, self.raw(images, multi_label=multi_label)

    def rows_per_level(self, height: int, width: int, *, multi_label: bool) -> list[tuple[int, bool]]:
        """Return the rows of each level of :meth:`raw`, see :func:`rows_per_level`."""
        return rows_per_level(self.spec.object_kind, len(self.spec.classes), height, width)

    def run(
        self, batches: Iterable[NDArray[np.uint8]], *, score_threshold: float, multi_label: bool = False
    ) -> Iterator[list[Detections]]:
        """Yield for each uint8 (N, C, H, W) batch one Detections per image; ``num_saturated`` counts up meanwhile.

        Raises:
            ConfigError: a batch has another dtype, number of channels or side than the model takes.
            DeviceMemoryError: one image alone is too much for the device.
            ModelFileError: a score is not finite.
        """
        for shape, outputs in self.stream(batches, multi_label=multi_label):
            scores = outputs[1]
            if not np.isfinite(scores).all():
                raise ModelFileError(
                    f"{str(self.path)!r} returns no numbers as scores; the file is damaged: copy or export it again"
                )
            levels = self.rows_per_level(shape[2], shape[3], multi_label=multi_label)
            self.num_saturated += count_saturated(scores, levels, score_threshold)
            yield [
                rows_to_detections(
                    *rows, score_threshold=score_threshold, multi_label=multi_label, kind=self.spec.object_kind
                )
                for rows in zip(*outputs, strict=True)
            ]

    def predict(
        self, images: NDArray[np.uint8], *, score_threshold: float, multi_label: bool = False
    ) -> list[Detections]:
        """Return one Detections per image of one uint8 (N, C, H, W) batch; warns when an image is saturated."""
        before = self.num_saturated
        result = next(iter(self.run([images], score_threshold=score_threshold, multi_label=multi_label)))
        if self.num_saturated > before:
            warnings.warn(
                f"{self.num_saturated - before} of {len(images)} images hold more candidates above score "
                f"{score_threshold:g} than the model returns; raise score_threshold",
                SaturatedTileWarning,
                stacklevel=2,
            )
        return result

    def check_batch(self, images: NDArray[np.uint8]) -> None:
        """Refuse a batch that the model cannot take.

        Raises:
            ConfigError: another dtype, number of channels or side.
        """
        multiple = self.spec.stride_multiple
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] != len(self.spec.bands):
            raise ConfigError(
                f"a batch must be uint8 (N, {len(self.spec.bands)}, H, W), not {images.dtype} {images.shape}"
            )
        if not len(images):
            raise ConfigError("a batch must hold one image at least")
        height, width = images.shape[2:]
        if self.fixed_tile_size is not None and (height, width) != (self.fixed_tile_size, self.fixed_tile_size):
            raise ConfigError(
                f"{self.path.name!r} takes tiles of {self.fixed_tile_size} x {self.fixed_tile_size} px only, "
                f"not {height} x {width}"
            )
        if height % multiple or width % multiple or not height or not width:
            raise ConfigError(f"tile sides must be multiples of {multiple} px, not {height} x {width}")
