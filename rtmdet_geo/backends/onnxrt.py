"""onnxruntime on the CPU: opens a model file, checks it against the contract, turns its rows into Detections."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtmdet_geo.backends import require_package
from rtmdet_geo.boxes import regularize_le90
from rtmdet_geo.catalog import check_graph, read_spec
from rtmdet_geo.errors import ConfigError, ModelFileError, SaturatedTileWarning
from rtmdet_geo.structures import Detections, Kind, ModelSpec

logger = logging.getLogger(__name__)

#: Strides of RTMDet's three levels in px (Lyu et al. 2022, arXiv 2212.07784, section 3.2).
STRIDES = (8, 16, 32)
#: Rows of a level at most, by kind (nms_pre of the published test configurations; TensorRT's TopK ends at 3840).
MAX_ROWS_PER_LEVEL: dict[Kind, int] = {"rotated": 2000, "mask": 1000, "horizontal": 3840}
#: Output name -> sizes after the batch axis; None is K.
_OUTPUTS: dict[str, tuple[int | None, ...]] = {"boxes": (None, 5), "scores": (None,), "labels": (None,)}


def rows_per_level(kind: Kind, num_classes: int, height: int, width: int) -> list[tuple[int, bool]]:
    """Return for each level the rows that the graph keeps and whether that is fewer than it has (prior, class) pairs.

    Args:
        kind: of the model.
        num_classes: C.
        height: of the input in px, multiple of 32.
        width: likewise.

    Example:
        >>> rows_per_level("rotated", 1, 640, 640)
        [(2000, True), (1600, False), (400, False)]
    """
    pairs = [(height // stride) * (width // stride) * num_classes for stride in STRIDES]
    limit = MAX_ROWS_PER_LEVEL[kind]
    return [(min(number, limit), number > limit) for number in pairs]


def rows_to_detections(
    boxes: NDArray[np.float32],
    scores: NDArray[np.float32],
    labels: NDArray[Any],
    *,
    score_threshold: float,
    multi_label: bool,
    kind: Kind,
) -> Detections:
    """Turn one image's K rows into Detections of the tile frame, best score first.

    Kept are rows with score >= ``score_threshold``, finite numbers, and w > 0 and h > 0 (the reference's
    ``min_bbox_size=0``). Rotated boxes are regularised to le90.

    The graph's rows are (prior, class) pairs and do not name their prior. Pairs of one prior share one box to the last
    bit, so ``multi_label=False`` keeps of identical boxes the one with the best score. Two priors that predict the
    very same box would be one as well, which NMS would do anyway for equal classes.

    Args:
        boxes: (K, 5) float32 cx cy w h in px of the tile, angle in rad.
        scores: (K,) in [0, 1].
        labels: (K,), whole numbers of any dtype.
        score_threshold: in [0, 1].
        multi_label: keep every class of a prior.
        kind: of the model.
    """
    keep = (scores >= score_threshold) & (boxes[:, 2:4] > 0).all(axis=1) & np.isfinite(boxes).all(axis=1)
    order = np.flatnonzero(keep)
    order = order[np.argsort(-scores[order], kind="stable")]
    if not multi_label and len(order):
        rows = np.ascontiguousarray(boxes[order]).view(f"V{boxes.itemsize * boxes.shape[1]}").ravel()
        order = order[np.sort(np.unique(rows, return_index=True)[1])]
    chosen = regularize_le90(boxes[order]) if kind == "rotated" else boxes[order]
    return Detections(chosen, scores[order], labels[order].astype(np.int64), "tile", kind)


class OnnxRuntimeBackend:
    """A model file in an onnxruntime CPU session. See :class:`rtmdet_geo.backends.Backend` for the contract.

    Args:
        path: ``.onnx`` file that follows the model-file contract.
        threads: intra-operator threads; None is one per core that this process may use.

    Raises:
        ModelFileError: missing, corrupt or foreign file.
        MissingDependencyError: onnxruntime is not installed.
    """

    name = "onnxruntime"

    def __init__(self, path: str | os.PathLike[str], *, threads: int | None = None) -> None:
        """Open and check the file."""
        self.path = Path(path)
        onnxruntime = require_package("onnxruntime")
        if threads is not None and threads < 1:
            raise ConfigError(f"threads must be at least 1, not {threads}")
        self._session = _open_session(onnxruntime, self.path, threads or _usable_cores())
        height, width = _check_signature(self._session, self.path)
        self.spec: ModelSpec = read_spec(self.path)
        check_graph(self.path)
        if self.spec.kind == "mask":
            raise ModelFileError(f"{str(self.path)!r} is of kind 'mask', which this version cannot run")
        channels = self._session.get_inputs()[0].shape[1]
        if channels != len(self.spec.bands):
            raise ModelFileError(
                f"{str(self.path)!r} contradicts itself: input 'images' has {channels} channels, its model_spec "
                f"{len(self.spec.bands)} bands; export it again"
            )
        self.fixed_tile_size = height if isinstance(height, int) and height == width else None
        self.num_saturated = 0

    def run(
        self, batches: Iterable[NDArray[np.uint8]], *, score_threshold: float, multi_label: bool = False
    ) -> Iterator[list[Detections]]:
        """Yield for each uint8 (N, C, H, W) batch one Detections per image; ``num_saturated`` counts up meanwhile.

        Raises:
            ConfigError: a batch has another dtype, number of channels or side than the file takes.
            ModelFileError: a score is not finite.
        """
        for images in batches:
            boxes, scores, labels = self.raw(images)
            if not np.isfinite(scores).all():
                raise ModelFileError(
                    f"{str(self.path)!r} returns no numbers as scores; the file is damaged: copy or export it again"
                )
            self.num_saturated += self._count_saturated(scores, images.shape[2], images.shape[3], score_threshold)
            yield [
                rows_to_detections(
                    *rows, score_threshold=score_threshold, multi_label=multi_label, kind=self.spec.object_kind
                )
                for rows in zip(boxes, scores, labels, strict=True)
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

    def raw(self, images: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[Any]]:
        """Return the graph's own outputs boxes (N, K, 5), scores (N, K), labels (N, K); export checks itself so."""
        self._check_batch(images)
        boxes, scores, labels = self._session.run(["boxes", "scores", "labels"], {"images": images})
        return boxes, scores, labels

    def _check_batch(self, images: NDArray[np.uint8]) -> None:
        multiple = self.spec.stride_multiple
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] != len(self.spec.bands):
            raise ConfigError(
                f"a batch must be uint8 (N, {len(self.spec.bands)}, H, W), not {images.dtype} {images.shape}"
            )
        height, width = images.shape[2:]
        if self.fixed_tile_size is not None and (height, width) != (self.fixed_tile_size, self.fixed_tile_size):
            raise ConfigError(
                f"{self.path.name!r} takes tiles of {self.fixed_tile_size} x {self.fixed_tile_size} px only, "
                f"not {height} x {width}"
            )
        if height % multiple or width % multiple or not height or not width:
            raise ConfigError(f"tile sides must be multiples of {multiple} px, not {height} x {width}")

    def _count_saturated(self, scores: NDArray[np.float32], height: int, width: int, score_threshold: float) -> int:
        """Number of images of which a cut-off level's lowest row is still at or above the threshold."""
        levels = rows_per_level(self.spec.object_kind, len(self.spec.classes), height, width)
        if sum(rows for rows, _ in levels) != scores.shape[1]:  # another K than the contract's: judge all rows as one
            return int((scores.min(axis=1, initial=np.inf) >= score_threshold).sum())
        saturated = np.zeros(len(scores), bool)
        start = 0
        for rows, is_cut in levels:
            if is_cut:
                saturated |= scores[:, start : start + rows].min(axis=1) >= score_threshold
            start += rows
        return int(saturated.sum())


def _usable_cores() -> int:
    """Cores that this process may run on; onnxruntime itself would count the whole machine's."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _open_session(onnxruntime: Any, path: Path, threads: int) -> Any:
    if not path.is_file():
        raise ModelFileError(f"model file {str(path)!r} is not there")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors only: optimiser remarks are none of the user's business
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions have no common base but Exception
        logger.debug("onnxruntime cannot open %s", path, exc_info=True)
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelFileError(
            f"{str(path)!r} is no readable ONNX file ({reason}); it may be truncated: copy or export it again"
        ) from error


def _check_signature(session: Any, path: Path) -> tuple[Any, Any]:
    """Return the input's H and W (int, or a name when dynamic).

    Raises:
        ModelFileError: naming every part of the contract that the file lacks.
    """
    missing = []
    inputs = session.get_inputs()
    image = inputs[0]
    if len(inputs) != 1 or image.name != "images" or image.type != "tensor(uint8)" or len(image.shape) != 4:
        found = ", ".join(f"{item.name} {item.type} {item.shape}" for item in inputs)
        missing.append(f"input 'images' uint8 (N, C, H, W) (it has {found})")
    outputs = {item.name: item for item in session.get_outputs()}
    for name, sizes in _OUTPUTS.items():
        item = outputs.get(name)
        if item is None or len(item.shape) != 1 + len(sizes) or item.type != "tensor(float)":
            shape = ", ".join(["N", *("K" if size is None else str(size) for size in sizes)])
            missing.append(f"output {name!r} fp32 ({shape})")
    if "model_spec" not in session.get_modelmeta().custom_metadata_map:
        missing.append("metadata key 'model_spec'")
    if missing:
        raise ModelFileError(
            f"{str(path)!r} does not follow the model-file contract; it lacks {'; '.join(missing)}; "
            "export the model with `rtmdet-geo export`"
        )
    return image.shape[2], image.shape[3]
