"""Chips on disk and the random crops that training draws from them.

A folder of chips holds ``chips.json`` (index, written by gis_labels.py) and one ``.npy`` uint8 (C, H, W) file a chip.
A crop is a pure function of (seed, iteration, position in the batch): any thread may draw it, and a resumed run sees
the crops that an unbroken run would have seen.
"""

from __future__ import annotations

import json
import logging
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rtmdet_geo.annotations.outlines import Outline, as_outline, clip_outline, mask_bounds, outline_points
from rtmdet_geo.boxes import boxes_to_polygons, hboxes_to_boxes
from rtmdet_geo.config import AugmentSection, ModelSection, Recipe
from rtmdet_geo.errors import AnnotationError, ConfigError, DatasetNotFoundError, RTMDetGeoError
from rtmdet_geo.structures import Kind, StretchSpec
from rtmdet_geo.training import augment

logger = logging.getLogger(__name__)

Array = NDArray[Any]

#: Objects whose box is narrower (px) are left out whatever the recipe says: a loss cannot learn from no area.
_MIN_SIDE_PX = 1e-3


@dataclass(frozen=True)
class Chip:
    """One image with its labels.

    Attributes:
        scene: name of the scene that it was cut from.
        pixels: (C, H, W) uint8, perhaps a memory map.
        boxes: (N, 5) float64 chip px, le90.
        labels: (N,) int64.
        ignored: (N,) bool.
        outlines: N outlines in chip px, () for an object that has none; or nothing where no object has one.
    """

    scene: str
    pixels: Array
    boxes: Array
    labels: Array
    ignored: Array
    outlines: tuple[Outline, ...] = ()

    @cached_property
    def shapes(self) -> tuple[Outline, ...]:
        """N outlines cut off at the chip's edges, beyond which nothing is known; of the box where there is none."""
        corners = boxes_to_polygons(self.boxes)
        outlines = self.outlines or ((),) * len(corners)
        whole = [outline or ((box,),) for outline, box in zip(outlines, corners, strict=True)]
        _, height, width = self.pixels.shape
        return tuple(clip_outline(outline, width, height) or outline for outline in whole)

    def boxes_of(self, kind: Kind) -> Array:
        """Return the boxes that a model of some kind should find, (N, 5): rotated, or with angle 0 and w along x."""
        if kind == "rotated":
            return self.boxes
        points = [outline_points(shape) for shape in self.shapes]
        corners = [np.concatenate((part.min(axis=0), part.max(axis=0))) for part in points]
        return hboxes_to_boxes(np.array(corners).reshape(-1, 4))


@dataclass(frozen=True)
class Sample:
    """One training crop.

    Attributes:
        image: (C, H, W) uint8.
        boxes: (N, 5) float32 px le90 for rotated models, else (N, 4) x1, y1, x2, y2 within the crop.
        labels: (N,) int64.
        ignored: (M, 5) or (M, 4) likewise: regions in which nothing is known.
        masks: (N, H, W) uint8, 0 or 1, for models of instances; else None.
    """

    image: Array
    boxes: Array
    labels: Array
    ignored: Array
    masks: Array | None = None


class _Labels(NamedTuple):
    """What a crop shows: N objects, whole or cut."""

    boxes: Array  # (N, 5) or (N, 4), as in Sample
    labels: Array  # (N,)
    cut: Array  # (N,) bool: to be ignored
    masks: Array | None  # (N, H, W) uint8


def load_chips(folder: Path, model: ModelSection) -> list[Chip]:
    """Read the index of a folder of chips; pixels stay on disk as memory maps.

    Args:
        folder: holds ``chips.json``.
        model: what the chips must agree with: bands, classes, gsd_m, stretch.

    Returns:
        Chips in index order, bands in the model's order, labels as indices into ``model.classes``.

    Raises:
        DatasetNotFoundError: no folder, no index, or a chip that the index names is gone.
        AnnotationError: index or chip is malformed.
        ConfigError: chips were cut for another model.
    """
    index_path = folder / "chips.json"
    if not index_path.is_file():
        raise DatasetNotFoundError(
            f"no chips in {str(folder)!r} (chips.json is missing): cut them with 'rtmdet-geo data chips', or name "
            "their folder with --data or --set data.chips=FOLDER"
        )
    try:
        index = json.loads(index_path.read_text(encoding="utf-8"))
        _check_fits(index, model, index_path)
        order = [index["bands"].index(band) for band in model.bands]
        label_of = {position: _class_index(name, model, index_path) for position, name in enumerate(index["classes"])}
        return [_read_chip(folder, entry, order, label_of) for entry in index["chips"]]
    except RTMDetGeoError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:  # ValueError: JSON, text, numbers, stretch
        raise AnnotationError(f"{index_path} is not an index of chips ({error!r}): cut the chips again") from error


def _check_fits(index: dict[str, Any], model: ModelSection, path: Path) -> None:
    missing = [band for band in model.bands if band not in index["bands"]]
    if missing:
        raise ConfigError(f"{path}: chips have bands {index['bands']}, the recipe also wants {missing}")
    gsd_m = index["gsd_m"]
    if model.gsd_m is not None and (gsd_m is None or abs(gsd_m / model.gsd_m - 1) > 0.01):
        found = "at the scenes' own resolution" if gsd_m is None else f"at {gsd_m} m a pixel"
        raise ConfigError(f"{path}: chips were cut {found}, the recipe wants {model.gsd_m} m: cut them with --recipe")
    if StretchSpec.model_validate(index["stretch"]) != model.stretch:
        raise ConfigError(f"{path}: chips were stretched by {index['stretch']}, not as the recipe's model.stretch says")


def _class_index(name: str, model: ModelSection, path: Path) -> int:
    if name not in model.classes:
        raise ConfigError(f"{path}: class {name!r} is not among the recipe's {list(model.classes)}")
    return model.classes.index(name)


def _read_chip(folder: Path, entry: dict[str, Any], order: list[int], label_of: dict[int, int]) -> Chip:
    path = folder / entry["file"]
    try:
        pixels = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise DatasetNotFoundError(
            f"chip {str(path)!r} is named in chips.json but missing: cut the chips again"
        ) from error
    except (ValueError, OSError, EOFError) as error:
        raise AnnotationError(f"chip {str(path)!r} is broken ({error}): cut the chips again") from error
    if pixels.dtype != np.uint8 or pixels.shape[1:] != (entry["height"], entry["width"]) or len(pixels) <= max(order):
        raise AnnotationError(f"chip {str(path)!r} is {pixels.dtype} {pixels.shape}, not what chips.json says")
    boxes = np.array(entry["boxes"], float).reshape(-1, 5)
    labels = np.array([label_of[label] for label in entry["labels"]], np.int64)
    ignored = np.array(entry["ignore"], bool)
    if not (len(boxes) == len(labels) == len(ignored)) or not np.isfinite(boxes).all() or (boxes[:, 2:4] <= 0).any():
        raise AnnotationError(
            f"labels of chip {entry['file']!r} in chips.json are not finite boxes with one label each"
        )
    outlines = tuple(as_outline(parts) for parts in entry.get("outlines", ()))
    if outlines and len(outlines) != len(boxes):
        raise AnnotationError(f"chip {entry['file']!r} in chips.json has {len(boxes)} boxes, {len(outlines)} outlines")
    if order != list(range(len(pixels))):
        pixels = pixels[order]
    return Chip(entry["scene"], pixels, boxes, labels, ignored, outlines)


def check_outlines(chips: list[Chip]) -> None:
    """Refuse chips that cannot teach masks.

    Raises:
        ConfigError: an object that is not ignored has no outline.
    """
    for chip in chips:
        outlines = chip.outlines or ((),) * len(chip.boxes)
        missing = sum(not outline and not ignored for outline, ignored in zip(outlines, chip.ignored, strict=True))
        if missing:
            raise ConfigError(
                f"{missing} objects of scene {chip.scene!r} have a box but no outline to learn masks from: cut chips "
                "from labels with polygons or masks, or take a model of boxes (rtmdet_*, rtmdet_r_*)"
            )


def split_chips(chips: list[Chip], recipe: Recipe) -> tuple[list[Chip], list[Chip]]:
    """Return (training chips, left-out chips) by the recipe's ``data.fold``; ``data.holdout`` is in neither.

    Raises:
        ConfigError: a named scene has no chips, or nothing is left to train on.
    """
    data = recipe.data
    scenes = {chip.scene for chip in chips}
    named = set().union(*map(set, data.folds.values())) if data.folds else set()
    unknown = sorted(named - scenes)
    if unknown:
        raise ConfigError(
            f"data.folds names scenes without chips: {', '.join(unknown)}; chips have {sorted(scenes)}; to leave none "
            "out, set data.folds={} and data.fold=null"
        )
    absent = sorted(set(data.holdout) - scenes)
    if absent:
        logger.warning("data.holdout names scenes without chips: %s; chips have %s", ", ".join(absent), sorted(scenes))
    left_out = set(data.folds[data.fold]) if data.fold else set()
    training = [chip for chip in chips if chip.scene not in left_out and chip.scene not in data.holdout]
    if not any((~chip.ignored).any() for chip in training):
        raise ConfigError("no labelled object is left to train on: check data.holdout, data.fold and the chips")
    return training, [chip for chip in chips if chip.scene in left_out]


class CropSampler:
    """Draws training crops from chips by the recipe's augmentation, with labels of the recipe's kind of model."""

    def __init__(self, chips: list[Chip], recipe: Recipe) -> None:
        """Weigh scenes by the square root of their number of objects, so that one full harbour does not rule.

        Raises:
            ConfigError: masks are to be learnt from objects without outlines.
        """
        self.chips = chips
        self.kind: Kind = recipe.model.kind
        if self.kind == "mask":
            check_outlines(chips)
        self.section: AugmentSection = recipe.augment
        self.seed = recipe.loop.seed
        bands, fill = recipe.model.bands, recipe.model.optional_bands
        self.dropout = {bands.index(band): share for band, share in recipe.augment.band_dropout.items()}
        self.fill = {bands.index(band): value for band, value in fill.items()}
        objects = np.array([(~chip.ignored).sum() for chip in chips], float)
        self.object_weight = np.sqrt(objects) / np.sqrt(objects).sum()
        area = np.array([chip.pixels.shape[1] * chip.pixels.shape[2] for chip in chips], float)
        self.area_weight = area / area.sum()
        #: (M, 4) chip index, x, y (chip px), score of false alarms; what :func:`validate.find_false_alarms` returns.
        self.false_alarms: Array = np.zeros((0, 4))

    def draw(self, iteration: int, position: int) -> Sample:
        """Return the crop at a position of an iteration's batch; the same arguments give the same crop."""
        rng = np.random.default_rng([self.seed, iteration, position])
        size = self.section.crop_size
        image, found = (
            self._mosaic(rng, size) if rng.random() < self.section.mosaic_prob else self._crop(rng, size, size)
        )
        image = augment.random_tones(rng, self.section, image)
        image = augment.drop_bands(rng, image, self.dropout, self.fill)
        boxes, whole = found.boxes.astype(np.float32), ~found.cut
        masks = None if found.masks is None else found.masks[whole]
        return Sample(image, boxes[whole], found.labels[whole], boxes[found.cut], masks)

    def _mosaic(self, rng: np.random.Generator, size: int) -> tuple[Array, _Labels]:
        """Four crops around a random point, as YOLO's mosaic but each cut at its final size."""
        split_x, split_y = (int(size * rng.uniform(0.35, 0.65)) for _ in range(2))
        image = np.empty((len(self.chips[0].pixels), size, size), np.uint8)
        parts = []
        for x, y, width, height in (
            (0, 0, split_x, split_y),
            (split_x, 0, size - split_x, split_y),
            (0, split_y, split_x, size - split_y),
            (split_x, split_y, size - split_x, size - split_y),
        ):
            part, found = self._crop(rng, width, height)
            image[:, y : y + height, x : x + width] = part
            found.boxes[:, :4] += (x, y, 0, 0) if self.kind == "rotated" else (x, y, x, y)
            if found.masks is not None:
                room = ((0, 0), (y, size - y - height), (x, size - x - width))
                found = found._replace(masks=np.pad(found.masks, room))
            parts.append(found)
        boxes, labels, cut = (np.concatenate([part[field] for part in parts]) for field in range(3))
        masks = [part.masks for part in parts if part.masks is not None]
        return image, _Labels(boxes, labels, cut, np.concatenate(masks) if masks else None)

    def _crop(self, rng: np.random.Generator, width: int, height: int) -> tuple[Array, _Labels]:
        """Cut one crop: around a random object, or anywhere."""
        chip, centre = self._look_at(rng, width, height)
        matrix = augment.random_similarity(rng, self.section, (centre[0], centre[1]), (width, height))
        found = self._labels(chip, matrix, (width, height))
        return augment.warp_crop(chip.pixels, matrix, (width, height)), found

    def _labels(self, chip: Chip, matrix: Array, size: tuple[int, int]) -> _Labels:
        """What a crop shows of a chip's objects; those of which it shows too little are cut, specks are left out."""
        boxes = augment.transform_boxes(chip.boxes, matrix)
        share = augment.visible_share(boxes, size)
        seen = np.flatnonzero(share > 0.05)
        boxes, cut, masks = boxes[seen], chip.ignored[seen] | (share[seen] < self.section.min_visible), None
        if self.kind == "rotated":
            sides = boxes[:, 2:4]
        else:
            shapes = [chip.shapes[index] for index in seen]
            boxes = augment.crop_bounds(shapes, matrix, size)
            if self.kind == "mask":
                masks = augment.crop_masks(shapes, matrix, size)
                for box, mask, is_cut in zip(boxes, masks, cut, strict=True):
                    if not is_cut:  # the box is the mask's, as in the reference; a mask without pixels teaches nothing
                        bounds = mask_bounds(mask)
                        box[:] = 0 if bounds is None else bounds
            sides = boxes[:, 2:] - boxes[:, :2]
        large = sides.min(axis=1, initial=np.inf) >= max(self.section.min_size_px, _MIN_SIDE_PX)
        return _Labels(boxes[large], chip.labels[seen][large], cut[large], None if masks is None else masks[large])

    def _look_at(self, rng: np.random.Generator, width: int, height: int) -> tuple[Chip, Array]:
        """Choose a chip and the centre of a crop in it: near an object, near a false alarm, or anywhere."""
        draw = rng.random()
        jitter = rng.uniform(-0.45, 0.45, 2) * (width, height)
        if draw < self.section.object_crop_prob:
            chip = self.chips[rng.choice(len(self.chips), p=self.object_weight)]
            return chip, chip.boxes[rng.choice(np.flatnonzero(~chip.ignored)), :2] + jitter
        if draw < self.section.object_crop_prob + self.section.false_alarm_crop_prob and len(self.false_alarms):
            weight = self.false_alarms[:, 3]
            index, x, y, _ = self.false_alarms[rng.choice(len(weight), p=weight / weight.sum())]
            return self.chips[int(index)], np.array([x, y]) + jitter
        tries = []
        for _ in range(self.section.background_tries):
            chip = self.chips[rng.choice(len(self.chips), p=self.area_weight)]
            centre = rng.random(2) * (chip.pixels.shape[2], chip.pixels.shape[1])
            x0, y0 = np.maximum(centre.astype(int) - (width // 2, height // 2), 0)
            window = chip.pixels[0, y0 : y0 + height : 8, x0 : x0 + width : 8]
            tries.append((float(window.std()), chip, centre))
        _, chip, centre = max(tries, key=lambda item: item[0])
        return chip, centre


class BatchLoader:
    """Prepares the next batches in threads while the network is busy (OpenCV and numba leave the interpreter lock)."""

    def __init__(self, sampler: CropSampler, *, batch_size: int, workers: int) -> None:
        """``workers`` threads; 0 draws crops when they are asked for."""
        self.sampler, self.batch_size = sampler, batch_size
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="crops") if workers else None
        self._ahead: dict[tuple[int, int], Future[Sample]] = {}

    def batch(self, iteration: int) -> list[Sample]:
        """Return the samples of one iteration and begin with the next one."""
        if self._pool is None:
            return [self.sampler.draw(iteration, position) for position in range(self.batch_size)]
        for step in (iteration, iteration + 1):
            for position in range(self.batch_size):
                if (step, position) not in self._ahead:
                    self._ahead[step, position] = self._pool.submit(self.sampler.draw, step, position)
        return [self._ahead.pop((iteration, position)).result() for position in range(self.batch_size)]

    def forget(self) -> None:
        """Give up crops drawn ahead, because the sampler has changed since."""
        for future in self._ahead.values():
            future.cancel()
        self._ahead.clear()

    def close(self) -> None:
        """Stop the threads; crops not yet begun are given up."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
