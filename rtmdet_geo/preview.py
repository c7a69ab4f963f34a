"""A picture of the scene with its detections, for a first look. What counts is the vector file.

The scene is read in strips as wide as itself and averaged down on the way, so memory depends on the picture and on one
strip, not on the scene.
"""

from __future__ import annotations

import colorsys
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from rtmdet_geo.boxes import boxes_to_polygons
from rtmdet_geo.errors import OutputError
from rtmdet_geo.outputs import check_folder, staged_output
from rtmdet_geo.polygons import outline_rings
from rtmdet_geo.stitch import outlines_of
from rtmdet_geo.structures import Detections

logger = logging.getLogger(__name__)

Image = NDArray[np.uint8]
Colour = tuple[int, int, int]

#: Pixels of the scene in memory at a time.
_STRIP_PIXELS = 16_000_000
#: Colour of pixels without data, and of the caption's ground.
_NODATA_GREY, _CAPTION_GREY = 96, 24
#: Most that the display contrast is raised, so that noise in an empty scene stays dark.
_MAX_GAIN = 4.0
_DISPLAY_GAMMA = 1.5
#: A box is drawn at least this large (px of the picture), so that its outline does not hide the object.
_MIN_DRAWN_PX = 7.0
#: Subpixel bits of OpenCV's drawing functions.
_SHIFT = 4
_WHITE = (255, 255, 255)
_FONT, _FONT_SCALE, _LINE_PX = cv2.FONT_HERSHEY_SIMPLEX, 0.45, 20


class ReadableScene(Protocol):
    """What a preview needs of :class:`rtmdet_geo.raster.Scene`."""

    @property
    def width(self) -> int:
        """Width in resampled px."""

    @property
    def height(self) -> int:
        """Height in resampled px."""

    @property
    def scene_id(self) -> str:
        """Name for the caption."""

    def read(self, x: int, y: int, width: int, height: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """Return pixels uint8 (C, height, width) and valid bool (height, width) of a window in resampled px."""


def class_colour(label: int) -> tuple[int, int, int]:
    """Return the bright colour of a class, (red, green, blue) 0..255; neighbours are a golden angle apart."""
    red, green, blue = colorsys.hsv_to_rgb((0.14 + label * 0.381966) % 1.0, 0.85 if label % 2 == 0 else 0.6, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def _block_means(values: NDArray[np.float32], block: int) -> NDArray[np.float32]:
    """Return means over block x block cells of (H, W, K); cells at the right and lower border may be smaller."""
    rows, columns = np.arange(0, values.shape[0], block), np.arange(0, values.shape[1], block)
    sums = np.add.reduceat(np.add.reduceat(values, rows, axis=0), columns, axis=1)
    heights = np.diff(np.append(rows, values.shape[0]))[:, None, None]
    widths = np.diff(np.append(columns, values.shape[1]))[None, :, None]
    return np.asarray(sums / (heights * widths), np.float32)


def read_overview(scene: ReadableScene, max_size: int) -> tuple[Image, NDArray[np.bool_]]:
    """Return the scene averaged down so that its longer side is at most ``max_size`` px.

    Red, green and blue are the first three channels; with fewer the first stands for all.

    Returns:
        (height, width, 3) uint8 red green blue, 0 where nothing is valid; and (height, width) bool valid.
    """
    longest = max(scene.width, scene.height)
    block = max(1, longest // max_size)
    rows = max(1, _STRIP_PIXELS // (scene.width * block)) * block
    strips = []
    for y in range(0, scene.height, rows):
        pixels, valid = scene.read(0, y, scene.width, min(rows, scene.height - y))
        channels = pixels[:3] if len(pixels) >= 3 else pixels[[0, 0, 0]]
        strip = np.empty((*valid.shape, 4), np.float32)
        strip[..., 3] = valid
        strip[..., :3] = np.moveaxis(channels, 0, 2)
        strip[..., :3] *= strip[..., 3:]
        strips.append(_block_means(strip, block))
    image = np.concatenate(strips)
    scale = max_size / longest
    if scale < 1:
        size = (max(1, round(scene.width * scale)), max(1, round(scene.height * scale)))
        image = np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.float32)
    share = image[..., 3]
    colour = image[..., :3] / np.maximum(share, 1e-6)[..., None]  # mean of the valid pixels only
    valid = share >= 0.5
    return np.where(valid[..., None], np.clip(np.rint(colour), 0, 255), 0).astype(np.uint8), valid


def stretch_for_display(image: Image, valid: NDArray[np.bool_]) -> Image:
    """Raise contrast and gamma mildly, alike in all colours, so that dark water shows; grey where nothing is valid."""
    display = np.full_like(image, _NODATA_GREY)
    if valid.any():
        low, high = (float(value) for value in np.percentile(image[valid], (0.5, 99.5)))
        low = min(low, 40.0) / 2  # water keeps its texture and does not become black
        span = max(high - low, 255.0 / _MAX_GAIN)
        levels = np.clip((np.arange(256) - low) / span, 0, 1) ** (1 / _DISPLAY_GAMMA)
        display[valid] = np.rint(255 * levels).astype(np.uint8)[image[valid]]
    return display


def _ascii(text: str) -> str:
    """Return text in the characters that OpenCV's fonts have."""
    return text.encode("ascii", "replace").decode("ascii")


def _put_text(image: Image, text: str, x: int, y: int, colour: tuple[int, int, int]) -> None:
    cv2.putText(image, _ascii(text), (x, y), _FONT, _FONT_SCALE, colour, 1, cv2.LINE_AA)


def _text_width(text: str) -> int:
    return int(cv2.getTextSize(_ascii(text), _FONT, _FONT_SCALE, 1)[0][0])


def _draw_boxes(image: Image, detections: Detections, scale: tuple[float, float], with_scores: bool) -> None:
    """Draw boxes in class colours on a dark seam, or masks' edges; best scores come last, on top."""
    corners = boxes_to_polygons(_at_least_drawable(detections.boxes, scale)) * scale
    outlines = outlines_of(detections)
    for index in np.argsort(detections.scores, kind="stable"):
        colour = class_colour(int(detections.labels[index]))
        rings = [corners[index]]
        if outlines is not None:
            rings = [ring * scale for ring in outline_rings(outlines[index])]
        is_large = bool(np.ptp(corners[index], axis=0).max() >= 3 * _MIN_DRAWN_PX)
        draw_rings(image, rings, colour, has_seam=outlines is None and is_large)
        if with_scores:
            right, top = corners[index].max(axis=0)[0], corners[index].min(axis=0)[1]
            _put_text(image, f"{detections.scores[index]:.2f}", round(right) + 2, max(10, round(top)), colour)


def draw_rings(image: Image, rings: Sequence[NDArray[np.float64]], colour: Colour, *, has_seam: bool = False) -> None:
    """Draw closed lines (M, 2) px into an image (H, W, 3); a dark seam tells them from bright ground."""
    # OpenCV counts from the centre of the first pixel, boxes from its corner
    lines = [np.rint((ring - 0.5) * 2**_SHIFT).astype(np.int32).reshape(-1, 1, 2) for ring in rings]
    if has_seam:
        cv2.polylines(image, lines, True, (0, 0, 0), 3, cv2.LINE_AA, _SHIFT)
    cv2.polylines(image, lines, True, colour, 1, cv2.LINE_AA, _SHIFT)


def _at_least_drawable(boxes: NDArray[Any], scale: tuple[float, float]) -> NDArray[np.float64]:
    drawn = np.array(boxes, np.float64)
    drawn[:, 2:4] = np.maximum(drawn[:, 2:4], _MIN_DRAWN_PX / min(scale))
    return drawn


def _caption(detections: Detections, classes: Sequence[str], scene_id: str, width: int) -> Image:
    """Return a strip with the number of detections and one coloured entry per class found, most frequent first."""
    number = len(detections)
    labels, counts = np.unique(detections.labels, return_counts=True)
    entries = [
        (f"{classes[labels[index]]} {counts[index]}", class_colour(int(labels[index])))
        for index in np.argsort(-counts, kind="stable")
    ]
    return caption_strip(f"{scene_id}: {number} detection{'' if number == 1 else 's'}", entries, width)


def caption_strip(title: str, entries: Sequence[tuple[str, Colour]], width: int) -> Image:
    """Return a strip (H, W, 3) red green blue, at least ``width`` px wide: a title, and entries with colours."""
    texts = [(title, _WHITE), *entries]
    width = max(width, max(_text_width(text) for text, _ in texts) + 36)
    placed, x, line = [], 8, 0
    for position, (text, colour) in enumerate(texts):
        needed = _text_width(text) + (0 if position == 0 else 16)
        if x > 8 and x + needed > width - 8:
            x, line = 8, line + 1
        placed.append((text, colour, x, line))
        x += needed + 16
    strip = np.full(((line + 1) * _LINE_PX + 6, width, 3), _CAPTION_GREY, np.uint8)
    for position, (text, colour, x, line) in enumerate(placed):
        base = (line + 1) * _LINE_PX - 4
        if position > 0:
            cv2.rectangle(strip, (x, base - 9), (x + 9, base), colour, -1)
            x += 16
        _put_text(strip, text, x, base, colour)
    return strip


def draw_preview(
    scene: ReadableScene,
    detections: Detections,
    path: str | os.PathLike[str],
    *,
    classes: Sequence[str],
    max_size: int = 1600,
    with_scores: bool = False,
    overwrite: bool = True,
) -> None:
    """Write a PNG of the scene with the outlines of its detections and a caption below.

    Args:
        scene: open scene; its first three channels are red, green and blue.
        detections: frame "scene", in **resampled** px, as :func:`rtmdet_geo.merge.merge_detections` gives them.
        path: PNG file; written to a temporary name and renamed.
        classes: class names in label order.
        max_size: longer side of the picture in px; a smaller scene is drawn 1:1.
        with_scores: write the score beside each box.
        overwrite: replace an existing file.

    Raises:
        OutputError: the extension is not .png, the folder is missing or not writable, the file exists and
            ``overwrite`` is False, or writing failed.
        ValueError: the detections are in tile px, or ``max_size`` is less than 1.
    """
    check_preview(path, overwrite)
    if detections.frame != "scene":
        raise ValueError("a preview needs detections in scene px; merge them first")
    if max_size < 1:
        raise ValueError(f"max_size {max_size!r} must be at least 1 px")
    overview, valid = read_overview(scene, max_size)
    image = stretch_for_display(overview, valid)
    height, width = image.shape[:2]
    _draw_boxes(image, detections, (width / scene.width, height / scene.height), with_scores)
    caption = _caption(detections, classes, scene.scene_id, width)
    canvas = np.full((height + len(caption), caption.shape[1], 3), _CAPTION_GREY, np.uint8)
    left = math.floor((caption.shape[1] - width) / 2)
    canvas[:height, left : left + width] = image
    canvas[height:] = caption
    is_encoded, data = cv2.imencode(".png", canvas[..., ::-1])
    if not is_encoded:
        raise OutputError(f"cannot encode the preview {str(path)!r} as PNG; try a smaller picture")
    with staged_output(path) as staged:
        staged.write_bytes(data.tobytes())
    logger.info("drew %d detections to %s (%d x %d px)", len(detections), path, width, height)


def check_preview(path: str | os.PathLike[str], overwrite: bool = True, endings: Sequence[str] = (".png",)) -> None:
    """Check before a long run that a preview could be written to ``path``.

    Args:
        path: of the preview.
        overwrite: whether an existing file may be replaced.
        endings: that it may have, in lower case.

    Raises:
        OutputError: it has another ending, or what draw_preview names, as far as it can be known without writing.
    """
    if Path(path).suffix.lower() not in endings:
        raise OutputError(f"the preview {str(path)!r} must be a {' or '.join(endings)} file")
    check_folder(path, overwrite)
