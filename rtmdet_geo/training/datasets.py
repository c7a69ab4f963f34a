"""Chips on disk and the random crops that training draws from them.

A folder of chips holds ``chips.json`` (index, written by gis_labels.py) and one ``.npy`` uint8 (C, H, W) file a chip.
A crop is a pure function of (seed, iteration, position in the batch): any thread may draw it, and a resumed run sees
the crops that an unbroken run would have seen.
"""

from __future__ import annotations

import json
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtmdet_geo.config import AugmentSection, ModelSection, Recipe
from rtmdet_geo.errors import AnnotationError, ConfigError, DatasetNotFoundError, RTMDetGeoError
from rtmdet_geo.structures import StretchSpec
from rtmdet_geo.training import augment

Array = NDArray[Any]


@dataclass(frozen=True)
class Chip:
    """One image with its labels. boxes (N, 5) float64 chip px, labels (N,) int64, ignored (N,) bool; pixels CHW."""

    scene: str
    pixels: Array
    boxes: Array
    labels: Array
    ignored: Array


@dataclass(frozen=True)
class Sample:
    """One training crop. image (C, H, W) uint8, boxes (N, 5) float32 px le90, labels (N,) int64, ignored (M, 5)."""

    image: Array
    boxes: Array
    labels: Array
    ignored: Array


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
    if order != list(range(len(pixels))):
        pixels = pixels[order]
    return Chip(entry["scene"], pixels, boxes, labels, ignored)


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
        raise ConfigError(f"data.folds names scenes without chips: {', '.join(unknown)}; chips have {sorted(scenes)}")
    left_out = set(data.folds[data.fold]) if data.fold else set()
    training = [chip for chip in chips if chip.scene not in left_out and chip.scene not in data.holdout]
    if not any((~chip.ignored).any() for chip in training):
        raise ConfigError("no labelled object is left to train on: check data.holdout, data.fold and the chips")
    return training, [chip for chip in chips if chip.scene in left_out]


class CropSampler:
    """Draws training crops from chips by the recipe's augmentation."""

    def __init__(self, chips: list[Chip], recipe: Recipe) -> None:
        """Weigh scenes by the square root of their number of objects, so that one full harbour does not rule.

        Raises:
            ConfigError: ``augment.band_dropout`` names a band without a fill value.
        """
        self.chips = chips
        self.section: AugmentSection = recipe.augment
        self.seed = recipe.loop.seed
        bands, fill = recipe.model.bands, recipe.model.optional_bands
        lacking = set(recipe.augment.band_dropout) - set(fill)
        if lacking:
            raise ConfigError(f"augment.band_dropout needs a fill value in model.optional_bands for {sorted(lacking)}")
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
        image, boxes, labels, cut = (
            self._mosaic(rng, size) if rng.random() < self.section.mosaic_prob else self._crop(rng, size, size)
        )
        image = augment.random_tones(rng, self.section, image)
        image = augment.drop_bands(rng, image, self.dropout, self.fill)
        return Sample(image, boxes[~cut].astype(np.float32), labels[~cut], boxes[cut].astype(np.float32))

    def _mosaic(self, rng: np.random.Generator, size: int) -> tuple[Array, Array, Array, Array]:
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
            part, boxes, labels, cut = self._crop(rng, width, height)
            image[:, y : y + height, x : x + width] = part
            boxes[:, :2] += (x, y)
            parts.append((boxes, labels, cut))
        boxes, labels, cut = (np.concatenate(column) for column in zip(*parts, strict=True))
        return image, boxes, labels, cut

    def _crop(self, rng: np.random.Generator, width: int, height: int) -> tuple[Array, Array, Array, Array]:
        """Cut one crop: around a random object, or anywhere. Gives image, boxes, labels, which boxes to ignore."""
        section = self.section
        chip, centre = self._look_at(rng, width, height)
        matrix = augment.random_similarity(rng, section, (centre[0], centre[1]), (width, height))
        boxes = augment.transform_boxes(chip.boxes, matrix)
        share = augment.visible_share(boxes, (width, height))
        seen = (share > 0.05) & (boxes[:, 2:4].min(axis=1, initial=np.inf) >= section.min_size_px)
        cut = chip.ignored[seen] | (share[seen] < section.min_visible)
        return augment.warp_crop(chip.pixels, matrix, (width, height)), boxes[seen], chip.labels[seen], cut

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
