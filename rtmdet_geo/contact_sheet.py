"""Labels drawn into their images, many images on one sheet: whether labels are what they should be, at a glance."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from rtmdet_geo.annotations.findings import Findings
from rtmdet_geo.annotations.folders import FoldersSource, list_folders
from rtmdet_geo.annotations.labels import ImageLabels, enclosing_hboxes, hboxes_to_le90
from rtmdet_geo.annotations.outlines import Outline
from rtmdet_geo.annotations.parts import PartSource
from rtmdet_geo.annotations.usable import sift
from rtmdet_geo.boxes import boxes_to_polygons
from rtmdet_geo.dataset_check import Source, read_source
from rtmdet_geo.errors import AnnotationError, OutputError, UnknownClassError
from rtmdet_geo.outputs import staged_output
from rtmdet_geo.pictures import decode_image
from rtmdet_geo.polygons import outline_rings
from rtmdet_geo.preview import caption_strip, check_preview, class_colour, draw_rings, stretch_for_display
from rtmdet_geo.structures import Kind

logger = logging.getLogger(__name__)

Array = NDArray[Any]
Image = NDArray[np.uint8]

#: Grey of the sheet between images, and of objects that are marked difficult, crowd or to be ignored.
_GROUND, _IGNORED = 48, (150, 150, 150)
#: Objects of classes that the model does not know.
_UNKNOWN = (255, 255, 255)
#: Small images are magnified up to so many times.
_MAX_MAGNIFICATION = 4.0
#: Objects smaller than this on the sheet, px, have no dark seam.
_SEAM_PX = 12.0
_GAP_PX = 6


@dataclass(frozen=True)
class _Entry:
    """An image of a data set: its N objects' boxes (N, 5), labels (N,), whether ignored (N,), and outlines."""

    path: Path
    name: str
    boxes: Array
    labels: Array
    ignored: Array
    outlines: tuple[Outline, ...] = ()


@dataclass(frozen=True)
class _Window:
    """Part of an image that is shown, px."""

    x: int
    y: int
    width: int
    height: int


def show_data(
    parts: Mapping[str, Source],
    output: str | os.PathLike[str],
    *,
    number: int = 16,
    classes: Sequence[str] = (),
    crop_px: int = 0,
    cell_px: int = 384,
    kind: Kind | None = None,
    seed: int = 0,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Draw some images of a data set with their labels onto one sheet.

    Rotated boxes and outlines are drawn in the colour of their class, objects that are marked difficult, crowd or to be
    ignored in grey, those of unknown classes in white.

    Args:
        parts: by name, see :func:`rtmdet_geo.dataset_check.recipe_parts`.
        output: PNG file.
        number: images to draw at most; which ones, ``seed`` says.
        classes: only images that show one of these.
        crop_px: show a square of so many px around one of the objects; 0: whole images.
        cell_px: long side of each image on the sheet.
        kind: "mask" draws outlines, and boxes of objects that have none, "rotated" rotated boxes, "horizontal" the
            boxes around them; None: outlines where the labels hold some, else boxes as they are.
        seed: same seed, same images.
        overwrite: replace an existing file.
        progress: called with images drawn and all images to draw.

    Returns:
        ``out``, ``images`` (names of those drawn), ``objects`` (drawn, by class), ``seed``.

    Raises:
        DatasetNotFoundError, AnnotationError: as :func:`rtmdet_geo.dataset_stats.data_stats`; or no image shows one of
            the classes.
        UnknownClassError: no class has that name.
        OutputError: ``output`` is no .png, exists, or cannot be written.
    """
    check_preview(output, overwrite)
    class_names, entries = _read(parts, kind)
    wanted = _wanted(classes, class_names)
    shown = [entry for entry in entries if wanted is None or np.isin(entry.labels, wanted).any()]
    if not shown:
        raise AnnotationError(f"no image shows an object of class {', '.join(classes)}" if classes else "no images")
    random = np.random.default_rng(seed)
    chosen = np.sort(random.permutation(len(shown))[:number])
    cells, counts = [], np.zeros(len(class_names) + 1, np.int64)
    for done, index in enumerate(chosen, 1):
        entry = shown[index]
        cell, drawn = _draw_cell(entry, wanted, crop_px, cell_px, np.random.default_rng([seed, int(index)]))
        counts += np.bincount(drawn % len(counts), minlength=len(counts))  # -1 is the last
        cells.append(cell)
        if progress is not None:
            progress(done, len(chosen))
    sheet = _lay_out(cells)
    legend = [
        (f"{class_names[label]}: {counts[label]}", class_colour(int(label)))
        for label in np.argsort(-counts[:-1], kind="stable")
        if counts[label]
    ]
    legend += [(f"unknown class: {counts[-1]}", _UNKNOWN)] if counts[-1] else []
    title = f"{len(chosen)} of {len(shown)} images, {int(counts.sum())} objects"
    _write(_stacked(sheet, caption_strip(title, legend, sheet.shape[1])), output)
    objects = {name: int(count) for name, count in zip(class_names, counts, strict=False) if count}
    names = [shown[index].name for index in chosen]
    return {"out": str(output), "images": names, "objects": objects, "seed": seed}


def _read(parts: Mapping[str, Source], kind: Kind | None) -> tuple[tuple[str, ...], list[_Entry]]:
    """Return class names of all parts together, and the images."""
    read: list[tuple[tuple[str, ...], list[_Entry]]] = [
        _read_folders(source) if isinstance(source, FoldersSource) else _read_objects(source, kind)
        for source in parts.values()
    ]
    names = tuple(dict.fromkeys(name for classes, _ in read for name in classes))
    entries = []
    for classes, found in read:
        new_label = np.array([*(names.index(name) for name in classes), -1], np.int64)
        entries += [
            _Entry(one.path, one.name, one.boxes, new_label[one.labels], one.ignored, one.outlines) for one in found
        ]
    return names, entries


def _read_objects(source: Any, kind: Kind | None) -> tuple[tuple[str, ...], list[_Entry]]:
    if isinstance(source, PartSource):
        has_outlines = source.format in ("coco", "yolo_obb")
        source = replace(source, kind=kind or ("mask" if has_outlines else source.kind))
    findings = Findings()
    files = read_source(source, findings)
    usable = sift(files, source.classes, findings)
    if findings.counts.total():
        logger.warning("%d faults in labels or images; `data check` names them", findings.counts.total())
    ends = np.cumsum([len(file.labels) for file in files])
    labels = np.split(usable.labels, ends[:-1]) if files else []
    return usable.classes, [
        _Entry(
            file.path,
            file.name,
            _upright(file.labels) if kind == "horizontal" else file.labels.boxes,
            own,
            file.labels.difficult | file.labels.crowd,
            file.labels.outlines if kind in (None, "mask") else (),
        )
        for file, own in zip(files, labels, strict=True)
    ]


def _upright(labels: ImageLabels) -> Array:
    """Return the boxes around objects, (N, 5)."""
    return hboxes_to_le90(enclosing_hboxes(labels)) if len(labels) else labels.boxes


def _read_folders(source: FoldersSource) -> tuple[tuple[str, ...], list[_Entry]]:
    """Return images that are an object as a whole: their boxes are nan."""
    listing = list_folders(source)
    return listing.classes, [
        _Entry(
            source.images / image.name,
            image.name,
            np.full((1, 5), math.nan),
            np.array([listing.classes.index(image.class_name)]),
            np.zeros(1, bool),
        )
        for image in listing.known
    ]


def _wanted(classes: Sequence[str], known: Sequence[str]) -> list[int] | None:
    unknown = [name for name in classes if name not in known]
    if unknown:
        raise UnknownClassError(f"no object is of class {unknown[0]!r}; there are {', '.join(known) or 'none'}")
    return [known.index(name) for name in classes] or None


def _draw_cell(
    entry: _Entry, wanted: list[int] | None, crop_px: int, cell_px: int, random: np.random.Generator
) -> tuple[Image, Array]:
    """Return a square with an image and its caption, and the labels of the objects drawn."""
    try:
        pixels = _pixels(entry.path)
    except (AnnotationError, OSError) as error:
        logger.warning("%s", error)
        blank = np.full((cell_px, cell_px, 3), _GROUND, np.uint8)
        caption = caption_strip(_fitted(f"{entry.name}: cannot be read", cell_px), [], cell_px)
        return _stacked(blank, caption), np.zeros(0, np.int64)
    height, width = pixels.shape[:2]
    window = _window(entry, width, height, wanted, crop_px, random)
    part = np.ascontiguousarray(pixels[window.y : window.y + window.height, window.x : window.x + window.width])
    scale = min(cell_px / max(window.width, window.height), _MAX_MAGNIFICATION)
    size = max(1, round(window.width * scale)), max(1, round(window.height * scale))
    scales = np.array([size[0] / window.width, size[1] / window.height])
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    picture = np.ascontiguousarray(cv2.resize(part, size, interpolation=method), np.uint8)
    if entry.path.suffix == ".npy":  # chips are dark, as scenes are
        picture = stretch_for_display(picture, np.asarray(picture.any(axis=2)))
    drawn = _draw_objects(picture, entry, np.array([window.x, window.y]), scales)
    cell = np.full((cell_px, cell_px, 3), _GROUND, np.uint8)
    left, top = (cell_px - size[0]) // 2, (cell_px - size[1]) // 2
    cell[top : top + size[1], left : left + size[0]] = picture
    text = f"{entry.name} {width}x{height}" + (f" +{window.x}+{window.y}" if crop_px else "")
    return _stacked(cell, caption_strip(_fitted(text, cell_px), [], cell_px)), drawn


def _pixels(path: Path) -> Image:
    """Return an image (H, W, 3) red green blue; of chips the first three channels, not read yet.

    Raises:
        AnnotationError: it does not decode.
    """
    if path.suffix != ".npy":
        image = decode_image(path)
        return image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)
    try:
        chip = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise AnnotationError(f"chip {str(path)!r} is broken ({error}): cut the chips again") from error
    channels: Image = np.moveaxis(chip[:3] if len(chip) >= 3 else chip[[0, 0, 0]], 0, 2)
    return channels


def _window(
    entry: _Entry, width: int, height: int, wanted: list[int] | None, crop_px: int, random: np.random.Generator
) -> _Window:
    """Return the whole image, or a square around one of its objects."""
    if not crop_px:
        return _Window(0, 0, width, height)
    of_class = np.ones(len(entry.labels), bool) if wanted is None else np.isin(entry.labels, wanted)
    centres = entry.boxes[of_class & np.isfinite(entry.boxes).all(axis=1), :2]
    x, y = centres[random.integers(len(centres))] if len(centres) else (width / 2, height / 2)
    across, down = min(crop_px, width), min(crop_px, height)
    left, top = (
        int(np.clip(round(middle - side / 2), 0, whole - side))
        for middle, side, whole in ((x, across, width), (y, down, height))
    )
    return _Window(left, top, across, down)


def _draw_objects(picture: Image, entry: _Entry, origin: Array, scales: Array) -> Array:
    """Draw what the picture shows of an image's objects; return their labels."""
    is_box = np.asarray(np.isfinite(entry.boxes).all(axis=1))
    corners = (boxes_to_polygons(np.where(is_box[:, None], entry.boxes, 0)) - origin) * scales
    low, high = corners.min(axis=1), corners.max(axis=1)
    is_seen = np.asarray((high > 0).all(axis=1) & (low < [picture.shape[1], picture.shape[0]]).all(axis=1))
    for index in np.flatnonzero(is_seen & is_box):
        label = int(entry.labels[index])
        colour = _IGNORED if entry.ignored[index] else class_colour(label) if label >= 0 else _UNKNOWN
        rings = [corners[index]]
        if entry.outlines and entry.outlines[index]:
            rings = [(ring - origin) * scales for ring in outline_rings(entry.outlines[index])]
        draw_rings(picture, rings, colour, has_seam=bool((high - low)[index].max() >= _SEAM_PX))
    return np.asarray(entry.labels[is_seen | ~is_box])


def _fitted(text: str, width: int) -> str:
    """Return the end of a text that is too long for a strip."""
    limit = max(8, width // 9)
    return text if len(text) <= limit else "..." + text[3 - limit :]


def _stacked(upper: Image, lower: Image) -> Image:
    """Return two pictures, one below the other, as wide as the wider one."""
    width = max(upper.shape[1], lower.shape[1])
    both = [np.pad(one, ((0, 0), (0, width - one.shape[1]), (0, 0)), constant_values=_GROUND) for one in (upper, lower)]
    return np.concatenate(both)


def _lay_out(cells: Sequence[Image]) -> Image:
    """Return cells of one size in rows, about as many rows as columns."""
    columns = math.ceil(math.sqrt(len(cells)))
    height, width = (max(cell.shape[axis] for cell in cells) for axis in (0, 1))
    rows = math.ceil(len(cells) / columns)
    step_y, step_x = height + _GAP_PX, width + _GAP_PX
    sheet = np.full((rows * step_y + _GAP_PX, columns * step_x + _GAP_PX, 3), _GROUND, np.uint8)
    for index, cell in enumerate(cells):
        y, x = _GAP_PX + index // columns * step_y, _GAP_PX + index % columns * step_x
        sheet[y : y + cell.shape[0], x : x + cell.shape[1]] = cell
    return sheet


def _write(sheet: Image, output: str | os.PathLike[str]) -> None:
    is_encoded, data = cv2.imencode(".png", sheet[..., ::-1])
    if not is_encoded:
        raise OutputError(f"cannot encode the sheet {str(output)!r} as PNG; draw fewer or smaller images")
    with staged_output(output) as staged:
        staged.write_bytes(data.tobytes())
