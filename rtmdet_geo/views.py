"""Test-time augmentation: an engine looks at several views of a picture. numpy and OpenCV.

A view shows the picture resized and mirrored. What the engine finds in it goes back to the px of the picture, and the
raw candidates of all views go into one NMS, where the highest score wins; scores are not averaged. So does mmdet 3.x
(``DetTTAModel``, models/test_time_augs/det_tta.py), but for an NMS in each view before the common one. Its views for
RTMDet (configs/rtmdet/rtmdet_tta.py) are half, full and one and a half size, each also mirrored left to right. Seen
from above, objects may be mirrored top to bottom too; sizes vary less here: scenes come at the resolution of the model.

A view is mirrored before it is padded: grey lies at the right and at the bottom, as in training. Tiles at the end of a
scene come with their padding, which a mirrored view then shows at the other side.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

import cv2
import numpy as np
from numpy.typing import NDArray

from rtmdet_geo.boxes import flip_boxes, regularize_le90, rescale_boxes
from rtmdet_geo.errors import ConfigError, SaturatedTileWarning
from rtmdet_geo.structures import PAD_VALUE, Detections, MaskKernels, MaskView

if TYPE_CHECKING:
    from rtmdet_geo.backends import Backend
    from rtmdet_geo.structures import ModelSpec

Flip = Literal["none", "horizontal", "vertical", "diagonal"]
#: "horizontal" mirrors x, "vertical" y, "diagonal" both.
FLIPS: tuple[Flip, ...] = get_args(Flip)
#: A picture is resized by no more than this, up or down.
_MAX_SCALE = 8.0


@dataclass(frozen=True, slots=True)
class View:
    """How a picture is shown: mirrored, then resized, then padded.

    Attributes:
        scale_x: px of the view per px of the picture along x, exactly the ratio of the two widths.
        scale_y: likewise, heights.
        flip_x: left and right are changed.
        flip_y: top and bottom are changed.
    """

    scale_x: float = 1.0
    scale_y: float = 1.0
    flip_x: bool = False
    flip_y: bool = False


@dataclass(frozen=True, slots=True)
class Augmentation:
    """The views of test-time augmentation: every flip at every scale.

    Attributes:
        scales: factors of the sides.
        flips: see :data:`FLIPS`.

    Raises:
        ConfigError: a scale is outside 1/8 to 8, a flip is unknown, there is none, or one is named twice.

    Example:
        >>> Augmentation(scales=(1.0, 1.5), flips=("none", "horizontal")).num_views
        4
    """

    scales: tuple[float, ...] = (1.0,)
    flips: tuple[Flip, ...] = ("none",)

    def __post_init__(self) -> None:
        """Check the values."""
        for name, values in (("scales", self.scales), ("flips", self.flips)):
            if not values or len(set(values)) != len(values):
                raise ConfigError(f"{name}={values!r} of the augmentation must name one or more, each once")
        for scale in self.scales:
            if not (math.isfinite(scale) and 1 / _MAX_SCALE <= scale <= _MAX_SCALE):
                raise ConfigError(f"scale {scale!r} of the augmentation must be in 1/{_MAX_SCALE:g} to {_MAX_SCALE:g}")
        for flip in self.flips:
            if flip not in FLIPS:
                raise ConfigError(f"flip {flip!r} of the augmentation is unknown; choose from {', '.join(FLIPS)}")

    @property
    def num_views(self) -> int:
        """How many times the engine runs."""
        return len(self.scales) * len(self.flips)

    @property
    def is_plain(self) -> bool:
        """Whether the picture as it is is the only view."""
        return self.scales == (1.0,) and self.flips == ("none",)


_SCALES = (0.75, 1.0, 1.25)
#: What ``tta`` takes as text.
PRESETS: dict[str, Augmentation] = {
    "none": Augmentation(),
    "flips": Augmentation(flips=FLIPS),
    "scales": Augmentation(scales=_SCALES),
    "all": Augmentation(scales=_SCALES, flips=FLIPS),
}


def find_augmentation(tta: str | Augmentation | None) -> Augmentation:
    """Return the augmentation of that name; None is none, an Augmentation stays what it is.

    Raises:
        ConfigError: no such name.
    """
    if isinstance(tta, Augmentation):
        return tta
    if tta is None:
        return PRESETS["none"]
    if tta not in PRESETS:
        raise ConfigError(f"test-time augmentation {tta!r} is unknown; choose from {', '.join(PRESETS)}")
    return PRESETS[tta]


def check_augmentation(engine: Backend, augmentation: Augmentation) -> None:
    """Check that an engine can run all views.

    Raises:
        ConfigError: it takes one size only and there are others, or it makes views already.
    """
    if isinstance(engine, AugmentedBackend):
        raise ConfigError("the engine augments at test time already; give the engine itself")
    if engine.fixed_tile_size is not None and augmentation.scales != (1.0,):
        raise ConfigError(
            f"model {engine.spec.name!r} takes tiles of {engine.fixed_tile_size} px only, so views cannot be resized; "
            "use tta 'flips', or a model file of dynamic size"
        )


def pad(images: NDArray[np.uint8], shape: tuple[int, int]) -> NDArray[np.uint8]:
    """Extend images (..., h, w) to (..., *shape) at the bottom and the right with grey, as in training; contiguous."""
    height, width = images.shape[-2:]
    if (height, width) == shape:
        return np.ascontiguousarray(images)
    padded = np.full((*images.shape[:-2], *shape), PAD_VALUE, np.uint8)
    padded[..., :height, :width] = images
    return padded


def show(
    images: NDArray[np.uint8], augmentation: Augmentation, *, multiple: int, side: int | None = None
) -> Iterator[tuple[View, NDArray[np.uint8]]]:
    """Yield each view of images of one size and how it shows them; one view is in memory at a time.

    Images are averaged down and interpolated up (OpenCV's ``INTER_AREA`` and ``INTER_LINEAR``).

    Args:
        images: (N, C, H, W) uint8.
        augmentation: which views.
        multiple: views are padded to multiples of it.
        side: views are padded to this side instead.
    """
    height, width = images.shape[2:]
    for scale in augmentation.scales:
        resized = _resize(images, max(1, round(height * scale)), max(1, round(width * scale)))
        new_height, new_width = resized.shape[2:]
        raised = -(-new_height // multiple) * multiple, -(-new_width // multiple) * multiple
        for flip in augmentation.flips:
            flip_x, flip_y = flip in ("horizontal", "diagonal"), flip in ("vertical", "diagonal")
            mirrored = resized[:, :, :: -1 if flip_y else 1, :: -1 if flip_x else 1]
            view = View(new_width / width, new_height / height, flip_x, flip_y)
            yield view, pad(mirrored, raised if side is None else (side, side))


def _resize(images: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    if images.shape[2:] == (height, width):
        return images
    method = cv2.INTER_AREA if height < images.shape[2] else cv2.INTER_LINEAR
    resized = np.empty((*images.shape[:2], height, width), np.uint8)
    for planes, source in zip(resized, images, strict=True):
        for channel, plane in enumerate(source):
            planes[channel] = cv2.resize(np.ascontiguousarray(plane), (width, height), interpolation=method)
    return resized


def restore(detections: Detections, view: View, height: int, width: int) -> Detections:
    """Return what was found in a view in the px of the picture that it shows.

    Where a view's two scales differ, rotated boxes keep the direction of their long side (``boxes.rescale_boxes``).

    Args:
        detections: in px of the view; masks are those of one plain view.
        view: how it shows the picture.
        height: of the picture in px.
        width: likewise.

    Raises:
        ValueError: the masks are polygons, or those of views already.
    """
    boxes = rescale_boxes(detections.boxes, 1 / view.scale_x, 1 / view.scale_y)
    if view.flip_x:
        boxes = flip_boxes(boxes, width, height, "horizontal")
    if view.flip_y:
        boxes = flip_boxes(boxes, width, height, "vertical")
    if detections.kind == "rotated":
        boxes = regularize_le90(boxes)
    else:
        boxes[:, 4] = 0.0  # and not -0
    return replace(detections, boxes=boxes, masks=_seen_in(detections.masks, view))


def _seen_in(masks: MaskKernels | NDArray[np.object_] | None, view: View) -> MaskKernels | None:
    if masks is None:
        return None
    if not isinstance(masks, MaskKernels):
        raise ValueError("polygons cannot be taken back to the picture that a view shows; pass detections of a tile")
    for seen in masks.views:
        if (seen.step_x, seen.step_y, seen.flip_x, seen.flip_y) != (1.0, 1.0, False, False):
            raise ValueError("views of views have no masks; pass what an engine found in one view")
    views = tuple(MaskView(seen.features, view.scale_x, view.scale_y, view.flip_x, view.flip_y) for seen in masks.views)
    return replace(masks, views=views)


class AugmentedBackend:
    """An engine that shows another one several views of each tile; a :class:`rtmdet_geo.backends.Backend` itself.

    Masks of its detections say which view they come from; :func:`rtmdet_geo.masks.assemble_detections` makes them,
    given the height and width of the tile with its padding.

    Attributes:
        num_saturated: images of which some view is saturated, each counted once; in batches of several images, those
            of the view with the most.

    Args:
        engine: runs the views, one batch of one view at a time.
        augmentation: which views.

    Raises:
        ConfigError: the engine takes one size only and views have others, or augments already.
    """

    def __init__(self, engine: Backend, augmentation: Augmentation) -> None:
        """Check that the engine can run all views."""
        check_augmentation(engine, augmentation)
        self.engine, self.augmentation = engine, augmentation
        self.name: str = engine.name
        self.path, self.device_name = engine.path, engine.device_name
        self.spec: ModelSpec = engine.spec
        self.fixed_tile_size: int | None = engine.fixed_tile_size
        self.best_batch_size: int = getattr(engine, "best_batch_size", 1)
        self.num_saturated = 0

    def run(
        self, batches: Iterable[NDArray[np.uint8]], *, score_threshold: float, multi_label: bool = False
    ) -> Iterator[list[Detections]]:
        """Yield for each uint8 (N, C, H, W) batch one Detections per image: all views' candidates, best score first."""
        for images in batches:
            found: list[list[Detections]] = [[] for _ in images]
            num_saturated = 0
            for view, pictures in show(images, self.augmentation, multiple=self.spec.stride_multiple):
                before = self.engine.num_saturated
                (results,) = self.engine.run([pictures], score_threshold=score_threshold, multi_label=multi_label)
                num_saturated = max(num_saturated, self.engine.num_saturated - before)
                for parts, detections in zip(found, results, strict=True):
                    parts.append(restore(detections, view, *images.shape[2:]))
            self.num_saturated += num_saturated
            yield [join(parts) for parts in found]

    def predict(
        self, images: NDArray[np.uint8], *, score_threshold: float, multi_label: bool = False
    ) -> list[Detections]:
        """Return one Detections per image of one uint8 (N, C, H, W) batch; warns when an image is saturated."""
        before = self.num_saturated
        (result,) = self.run([images], score_threshold=score_threshold, multi_label=multi_label)
        if self.num_saturated > before:
            warnings.warn(
                f"{self.num_saturated - before} of {len(images)} images hold more candidates above score "
                f"{score_threshold:g} than the model returns; raise score_threshold",
                SaturatedTileWarning,
                stacklevel=2,
            )
        return result


def join(parts: list[Detections]) -> Detections:
    """Return the detections of all views of one picture, one view at least, best score first."""
    joined = Detections.concatenate(parts, parts[0].frame, parts[0].kind)
    return joined.select(np.argsort(-joined.scores, kind="stable"))


def augment(engine: Backend, tta: str | Augmentation | None) -> Backend:
    """Return the engine with test-time augmentation; the engine itself where there is none to be done.

    Raises:
        ConfigError: the name is unknown, or as :class:`AugmentedBackend`.
    """
    augmentation = find_augmentation(tta)
    return engine if augmentation.is_plain else AugmentedBackend(engine, augmentation)
