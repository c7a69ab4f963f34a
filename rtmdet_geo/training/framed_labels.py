"""What a sample of whole images shows of their objects: boxes and outlines follow a framing; masks are cut at the end.

What the reference keeps (mmdet 3.x ``RandomCrop``, mmrotate 1.x ``RotatedBoxes.is_inside``): rotated boxes whole, if
their centre is in the mosaic and in the sample; horizontal boxes and masks cut off at the sample's edges.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rtmdet_geo.annotations.outlines import (
    Outline,
    clip_outline,
    fill_outline,
    mask_bounds,
    outline_points,
    pixel_window,
    transform_outline,
    visible_bounds,
)
from rtmdet_geo.boxes import boxes_to_hboxes
from rtmdet_geo.recipe_sections import ImageAugment
from rtmdet_geo.structures import Kind
from rtmdet_geo.training import augment
from rtmdet_geo.training.framing import Framing
from rtmdet_geo.training.labelled import LabelledImage, Sample

Array = NDArray[Any]

#: Objects whose box is narrower (px) are left out whatever the recipe says: a loss cannot learn from no area.
_MIN_SIDE_PX = 1e-3
#: Outlines may reach this share of their box's sides beyond it, in files that say both.
_BOX_MARGIN = 0.1


class FramedObjects(NamedTuple):
    """Objects of a sample, in its px.

    Attributes:
        names: of the images that it shows.
        boxes: (N, 5) float64 le90 for rotated models, else (N, 4) x1, y1, x2, y2 within what is shown.
        labels: (N,) int64.
        cut: (N,) bool: neither object nor background.
        outlines: N outlines cut off at the edges of what is shown, for models of masks; else none.
    """

    names: tuple[str, ...]
    boxes: Array
    labels: Array
    cut: Array
    outlines: tuple[Outline, ...]

    @property
    def is_empty(self) -> bool:
        """Whether there is no object to learn."""
        return bool(self.cut.all())


def join_objects(groups: Sequence[FramedObjects]) -> FramedObjects:
    """Return the objects of all groups, in order."""
    boxes, labels, cut = (np.concatenate([group[field] for group in groups]) for field in (1, 2, 3))
    names = tuple(name for group in groups for name in group.names)
    return FramedObjects(names, boxes, labels, cut, tuple(outline for group in groups for outline in group.outlines))


def frame_objects(
    image: LabelledImage, framing: Framing, index: int, kind: Kind, section: ImageAugment
) -> FramedObjects:
    """Return what a sample shows of an image's objects.

    Args:
        image: whose boxes and outlines to move.
        framing: how the sample shows it.
        index: of the image's placement in ``framing``.
        kind: of boxes.
        section: ``min_visible``: objects of which less is seen are cut; ``min_size_px``: smaller ones are left out.
    """
    boxes = augment.transform_boxes(image.boxes, framing.matrix(index))
    bounds = boxes_to_hboxes(boxes)
    margin = 0.0 if kind == "rotated" else _BOX_MARGIN * (bounds[:, 2:] - bounds[:, :2]) + 1
    is_near = (bounds[:, 2:] > -margin).all(axis=1) & (bounds[:, :2] < np.add(framing.shown, margin)).all(axis=1)
    rows = np.flatnonzero(is_near)
    boxes, cut = boxes[rows], image.ignored[rows]
    if section.min_visible > 0:
        cut = cut | (_share_seen(image.boxes[rows], boxes, framing, index) < section.min_visible)
    outlines: tuple[Outline, ...] = ()
    if kind == "rotated":
        is_inside = centres_inside(image.boxes[rows], framing, index)
        if section.min_visible > 0:
            cut, is_inside = cut | ~is_inside, np.ones(len(rows), bool)
        sides = np.where((is_inside | cut)[:, None], boxes[:, 2:4], 0.0)
    else:
        outlines = framing.outlines_in_sample(image.shapes_of(rows), index)
        boxes = np.array([_bounds(outline, framing.shown) for outline in outlines]).reshape(-1, 4)
        sides = boxes[:, 2:] - boxes[:, :2]
    large = np.flatnonzero(sides.min(axis=1, initial=np.inf) >= max(section.min_size_px, _MIN_SIDE_PX))
    seen = tuple(clip_outline(outlines[row], *framing.shown) for row in large) if kind == "mask" else ()
    return FramedObjects((image.name,), boxes[large], image.labels[rows][large], cut[large], seen)


def centres_inside(boxes: Array, framing: Framing, index: int) -> Array:
    """Say which boxes (N, 5) of an image have their centre in the frame and in what the sample shows: (N,) bool."""
    return _inside(boxes[:, :2], framing.placements[index], framing.frame) & _inside(
        boxes[:, :2], framing.matrix(index), framing.shown
    )


def holds_centres(boxes: Array, placement: Array, frame: tuple[float, float]) -> bool:
    """Say whether any box (N, 5) of an image has its centre in the frame."""
    return bool(_inside(boxes[:, :2], placement, frame).any())


def move_objects(objects: FramedObjects, matrix: Array, kind: Kind) -> FramedObjects:
    """Return objects moved by uniform scale, shift and perhaps flips (2, 3)."""
    if kind == "rotated":
        boxes = augment.transform_boxes(objects.boxes, matrix)
    else:
        corners = objects.boxes.reshape(-1, 2, 2) @ matrix[:, :2].T + matrix[:, 2]
        boxes = np.concatenate((corners.min(axis=1), corners.max(axis=1)), axis=1)
    outlines = tuple(transform_outline(outline, matrix) for outline in objects.outlines)
    return objects._replace(boxes=boxes, outlines=outlines)


def make_sample(image: Array, objects: FramedObjects, kind: Kind, section: ImageAugment) -> Sample:
    """Return a finished sample: masks are cut from outlines now, and then their bounds are the boxes.

    Args:
        image: (C, side, side) uint8.
        objects: that it shows.
        kind: of boxes.
        section: ``min_size_px``: objects whose mask is smaller are left out.
    """
    whole = np.flatnonzero(~objects.cut)
    boxes, labels, ignored = objects.boxes[whole], objects.labels[whole], objects.boxes[objects.cut]
    masks = None
    if kind == "mask":
        masks = np.zeros((len(whole), *image.shape[1:]), np.uint8)
        boxes = np.array([_cut_mask(objects.outlines[row], mask) for row, mask in zip(whole, masks, strict=True)])
        boxes = boxes.reshape(-1, 4)
        large = (boxes[:, 2:] - boxes[:, :2]).min(axis=1, initial=np.inf) >= max(section.min_size_px, _MIN_SIDE_PX)
        if not large.all():
            boxes, labels, masks = boxes[large], labels[large], masks[large]
    return Sample(image, objects.names, boxes.astype(np.float32), labels, ignored.astype(np.float32), masks)


def _inside(points: Array, matrix: Array, size: tuple[float, float]) -> Array:
    moved = points @ matrix[:, :2].T + matrix[:, 2]
    return np.asarray(((moved >= 0) & (moved <= size)).all(axis=1))


def _share_seen(source: Array, boxes: Array, framing: Framing, index: int) -> Array:
    """Return the share (N,) of boxes (N, 5), of the image and of the sample, that frame and sample both leave."""
    share = augment.visible_share(boxes, framing.shown)
    if framing.is_turned:  # an upper bound where a box crosses both edges
        share = np.minimum(
            share, augment.visible_share(augment.transform_boxes(source, framing.placements[index]), framing.frame)
        )
    return share


def _bounds(outline: Outline, size: tuple[float, float]) -> Array:
    """Return x1, y1, x2, y2 of what width x height px show of an outline; zeros for nothing."""
    points = outline_points(outline)
    if not len(points):
        return np.zeros(4)
    low, high = points.min(axis=0), points.max(axis=0)
    if (low >= 0).all() and (high <= size).all():
        return np.concatenate((low, high))
    seen = visible_bounds(outline, *size)
    return np.zeros(4) if seen is None else seen


def _cut_mask(outline: Outline, mask: Array) -> Array:
    """Cut an outline into the pixels of an empty mask (H, W); return its bounds x1, y1, x2, y2, zeros for none."""
    window = pixel_window(outline, mask.shape[1], mask.shape[0])
    part = fill_outline(outline, window)
    mask[window.y : window.y + window.height, window.x : window.x + window.width] = part
    bounds = mask_bounds(part)
    return np.zeros(4) if bounds is None else bounds + np.tile((window.x, window.y), 2)
