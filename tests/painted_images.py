"""Labelled images whose objects are painted, and the check that a sample's labels lie where its pixels show them.

Objects are red (255, 0, 0) on black, padding is grey, so red minus green is what is seen of objects: 255 inside, 0
outside, and linear in between, whatever was interpolated or blended.
"""

from __future__ import annotations

import cv2
import numpy as np

from rtmdet_geo.annotations.outlines import Window, as_outline, fill_outline, outline_points, transform_outline
from rtmdet_geo.boxes import boxes_to_hboxes, boxes_to_polygons, minimum_area_rectangle
from rtmdet_geo.config import parse_recipe
from rtmdet_geo.training.labelled import LabelledImage

CLASSES = ("ship", "house", "tank")
NETWORKS = {"rotated": "rtmdet_r_test", "horizontal": "rtmdet_test", "mask": "rtmdet_ins_test"}
#: Where objects lie, in quarters of an image of 120 px.
_CENTRES = np.array([[32, 32], [88, 34], [30, 88], [86, 90]], float)
_SMOOTH = 8


def shape(kind, number, centre, angle):
    """Outline of an object: a rectangle, or a house that is L-shaped or has a courtyard."""
    wide, high = (34, 14) if kind == "rotated" else (30, 24)
    rings = [np.array([[0, 0], [wide, 0], [wide, high], [0, high]], float)]
    if kind == "mask":
        rings.append(np.array([[8, 7], [20, 7], [20, 17], [8, 17]], float))
        if number % 2:
            rings = [np.array([[0, 0], [30, 0], [30, 10], [12, 10], [12, 24], [0, 24]], float)]
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return as_outline([[(ring - (wide / 2, high / 2)) @ turn.T + centre for ring in rings]])


def paint(outlines, width, height):
    """(3, height, width) uint8 with red objects, anti-aliased."""
    fine = np.zeros((height * _SMOOTH, width * _SMOOTH), np.uint8)
    for outline in outlines:
        fine |= fill_outline(
            transform_outline(outline, _SMOOTH * np.eye(2, 3)), Window(0, 0, width * _SMOOTH, height * _SMOOTH)
        )
    image = np.zeros((3, height, width), np.uint8)
    image[0] = cv2.resize(255 * fine, (width, height), interpolation=cv2.INTER_AREA)
    return image


def painted_images(kind, count=6, seed=0, *, with_outlines=True):
    """Labelled images of about 120 px with up to four objects each that keep away from each other and the edges."""
    rng = np.random.default_rng(seed)
    images = []
    for number in range(count):
        width, height = (120, 120 - 8 * (number % 4)) if number % 2 else (120 - 8 * (number % 3), 120)
        inside = (_CENTRES + 22 < (width, height)).all(axis=1)
        centres = _CENTRES[inside] + rng.uniform(-3, 3, (inside.sum(), 2))
        angles = np.zeros(len(centres)) if kind == "horizontal" else rng.uniform(-1.5, 1.5, len(centres))
        outlines = tuple(shape(kind, *values) for values in zip(range(9), centres, angles, strict=False))
        boxes = np.array([minimum_area_rectangle(outline_points(outline)) for outline in outlines])
        pixels = paint(outlines, width, height)
        if number % 3 == 0:  # as decoders give them
            pixels = np.moveaxis(np.ascontiguousarray(np.moveaxis(pixels, 0, -1)), -1, 0)
        labels, ignored = rng.integers(0, 2, len(boxes)), np.zeros(len(boxes), bool)
        name = f"{number}.png"
        images.append(LabelledImage(name, name, pixels, boxes, labels, ignored, outlines if with_outlines else ()))
    return images


def image_recipe(kind, *, data=None, model=None, seed=0, **augment):
    """A recipe of whole images of 128 px that keeps everything as it is, but for what is asked."""
    plain = {"sampling": "images", "image_size": 128, "flip_prob": 0.0, "min_size_px": 0.0}
    return parse_recipe(
        {
            "name": "painted",
            "model": {"name": NETWORKS[kind], "classes": list(CLASSES)} | (model or {}),
            "data": {"format": "coco", "train_images": "images", "train_labels": "labels.json"} | (data or {}),
            "augment": plain | augment,
            "loop": {"seed": seed},
        }
    )


def seen_objects(sample, share):
    """(H, W) bool: where the pixels show objects, which make up ``share`` of the sample's light."""
    return sample.image[0].astype(int) - sample.image[1] >= 127 * share


def grown(mask, pixels=1):
    """A mask with a border of so many pixels, corners included."""
    return cv2.dilate(mask.astype(np.uint8), np.ones((2 * pixels + 1,) * 2, np.uint8)).astype(bool)


def labelled_area(sample):
    """(N, H, W) bool: where each label says its object is."""
    if sample.masks is not None:
        return sample.masks.astype(bool)
    corners = (
        boxes_to_polygons(sample.boxes)
        if sample.boxes.shape[1] == 5
        else sample.boxes[:, [[0, 1], [2, 1], [2, 3], [0, 3]]]
    )
    size = sample.image.shape[1:]
    return np.array([fill_outline(((box.astype(float),),), Window(0, 0, *size)) for box in corners], bool).reshape(
        -1, *size
    )


def check_labels_are_where_pixels_are(sample, *, share=1.0, all_labelled=True):
    """Compare labels and pixels to one pixel; return how many objects were compared.

    Args:
        sample: of painted images.
        share: of the light that an object keeps: a half after mixup.
        all_labelled: whether every object that is seen is labelled; else only those away from edges and padding.
    """
    seen, areas = seen_objects(sample, share), labelled_area(sample)
    said = areas.any(axis=0)
    cores = np.array([~grown(~area) for area in areas], bool).reshape(areas.shape)
    padding, inner = grown(sample.image[1] > 0), np.zeros_like(seen)
    inner[1:-1, 1:-1] = True  # of pixels at the border half may be seen, and one neighbour is not known
    assert not (inner & ~seen & ~padding & cores.any(axis=0)).any(), "a label covers ground"
    lost = inner & seen & ~grown(said)
    if all_labelled:
        assert not lost.any(), "an object has no label"
    _, components = cv2.connectedComponents(seen.astype(np.uint8), connectivity=8)
    is_rim = grown(padding, 2) | ~inner
    whole = set(range(1, components.max() + 1)) - set(components[is_rim].tolist())
    assert not set(components[lost].tolist()) & whole, "an object amid the sample has no label"
    if share == 1 and sample.masks is None:
        for box in sample.boxes.astype(float):
            _check_extent(box, sample, components, whole)
    return len(areas)


def _check_extent(box, sample, components, whole):
    """Corners of a box lie within a pixel of those that the pixels say, if nothing cuts the object off."""
    bounds = boxes_to_hboxes([box])[0] if len(box) == 5 else box
    x0, y0, x1, y1 = np.concatenate((np.floor(bounds[:2]), np.ceil(bounds[2:]))).astype(int).clip(0)
    row, column = (y0 + y1) // 2, (x0 + x1) // 2
    if row >= len(components) or column >= len(components) or components[row, column] not in whole:
        return
    middle = components[row, column]
    if len(box) == 4:
        rows, columns = np.nonzero(components == middle)
        found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        np.testing.assert_allclose(box, found, atol=1.0)
        return
    light = np.where(grown(components == middle, 2), sample.image[0].astype(float) - sample.image[1], 0)
    gaps = np.linalg.norm(boxes_to_polygons([box])[0][:, None] - boxes_to_polygons([_rectangle(light)])[0], axis=2)
    assert gaps.min(axis=1).max() <= 1.0, f"a corner is {gaps.min(axis=1).max():.2f} px off"


def _rectangle(light):
    """The evenly lit rectangle (5,) that has an image's moments: a side of length s has variance s * s / 12."""
    rows, columns = np.indices(light.shape) + 0.5
    mean = np.array([(columns * light).sum(), (rows * light).sum()]) / light.sum()
    x, y = columns - mean[0], rows - mean[1]
    xx, xy, yy = ((product * light).sum() / light.sum() for product in (x * x, x * y, y * y))
    (low, high), axes = np.linalg.eigh([[xx, xy], [xy, yy]])
    return [*mean, np.sqrt(12 * high), np.sqrt(12 * low), np.arctan2(axes[1, 1], axes[0, 1])]
