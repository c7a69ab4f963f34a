"""Random crops of large images.

A crop is a pure function of (seed, iteration, position in the batch): any thread may draw it, and a resumed run sees
the crops that an unbroken run would have seen. Where an image does not decode and the recipe says to go on, image and
place are drawn anew from the same random numbers.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rtmdet_geo.annotations.outlines import mask_bounds
from rtmdet_geo.config import Recipe
from rtmdet_geo.errors import AnnotationError
from rtmdet_geo.recipe_sections import CropAugment
from rtmdet_geo.structures import Kind
from rtmdet_geo.training import augment
from rtmdet_geo.training.chips import check_outlines
from rtmdet_geo.training.labelled import LabelledImage, Reader, Sample

logger = logging.getLogger(__name__)

Array = NDArray[Any]

#: A crop is given up when so many images in a row do not decode.
_TRIES = 100
#: Objects whose box is narrower (px) are left out whatever the recipe says: a loss cannot learn from no area.
_MIN_SIDE_PX = 1e-3


class _Labels(NamedTuple):
    """What a crop shows: N objects, whole or cut."""

    names: tuple[str, ...]  # of the images
    boxes: Array  # (N, 5) or (N, 4), as in Sample
    labels: Array  # (N,)
    cut: Array  # (N,) bool: to be ignored
    masks: Array | None  # (N, H, W) uint8


class CropSampler:
    """Draws training crops from chips by the recipe's augmentation, with labels of the recipe's kind of model."""

    def __init__(self, chips: list[LabelledImage], recipe: Recipe) -> None:
        """Weigh scenes by the square root of their number of objects, so that one full harbour does not rule.

        Raises:
            ConfigError: masks are to be learnt from objects without outlines.
        """
        self.chips = chips
        self.kind: Kind = recipe.model.object_kind
        if self.kind == "mask":
            check_outlines(chips)
        assert isinstance(recipe.augment, CropAugment)
        self.section = recipe.augment
        self.seed = recipe.loop.seed
        self.num_bands = len(recipe.model.bands)
        bands, fill = recipe.model.bands, recipe.model.optional_bands
        self.dropout = {bands.index(band): share for band, share in self.section.band_dropout.items()}
        self.fill = {bands.index(band): value for band, value in fill.items()}
        objects = np.array([(~chip.ignored).sum() for chip in chips], float)
        self.object_weight = np.sqrt(objects) / np.sqrt(objects).sum()
        area = np.array([chip.width * chip.height for chip in chips], float)
        self.area_weight = area / area.sum()
        #: (M, 4) chip index, x, y (chip px), score of false alarms; what :func:`validate.find_false_alarms` returns.
        self.false_alarms: Array = np.zeros((0, 4))
        self._reader = Reader(chips, skip=recipe.data.on_bad_image == "skip")

    @property
    def bad_images(self) -> set[str]:
        """Names of the images that did not decode and were replaced by others."""
        return self._reader.bad_images

    def draw(self, iteration: int, position: int) -> Sample:
        """Return the crop at a position of an iteration's batch; see :meth:`labelled.Sampler.draw`."""
        rng = np.random.default_rng([self.seed, iteration, position])
        size = self.section.crop_size
        image, found = (
            self._mosaic(rng, size) if rng.random() < self.section.mosaic_prob else self._crop(rng, size, size)
        )
        image = augment.random_tones(rng, self.section, image)
        image = augment.drop_bands(rng, image, self.dropout, self.fill)
        boxes, whole = found.boxes.astype(np.float32), ~found.cut
        masks = None if found.masks is None else found.masks[whole]
        return Sample(image, found.names, boxes[whole], found.labels[whole], boxes[found.cut], masks)

    def _mosaic(self, rng: np.random.Generator, size: int) -> tuple[Array, _Labels]:
        """Four crops around a random point, as YOLO's mosaic but each cut at its final size."""
        split_x, split_y = (int(size * rng.uniform(0.35, 0.65)) for _ in range(2))
        image = np.empty((self.num_bands, size, size), np.uint8)
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
        boxes, labels, cut = (np.concatenate([part[field] for part in parts]) for field in range(1, 4))
        masks = [part.masks for part in parts if part.masks is not None]
        names = tuple(name for part in parts for name in part.names)
        return image, _Labels(names, boxes, labels, cut, np.concatenate(masks) if masks else None)

    def _crop(self, rng: np.random.Generator, width: int, height: int) -> tuple[Array, _Labels]:
        """Cut one crop: around a random object, or anywhere.

        Raises:
            AnnotationError: the image does not decode and the recipe says to stop, or :data:`_TRIES` in a row do not.
        """
        for _ in range(_TRIES):
            index, centre = self._look_at(rng, width, height)
            pixels = self._reader.pixels(index)
            if pixels is not None:
                break
        else:
            raise AnnotationError(
                f"{_TRIES} images in a row do not decode ({len(self.bad_images)} of {len(self.chips)} so far): "
                "check them with 'rtmdet-geo data check'"
            )
        matrix = augment.random_similarity(rng, self.section, (centre[0], centre[1]), (width, height))
        found = self._labels(self.chips[index], matrix, (width, height))
        return augment.warp_crop(pixels, matrix, (width, height)), found

    def _labels(self, chip: LabelledImage, matrix: Array, size: tuple[int, int]) -> _Labels:
        """What a crop shows of a chip's objects; those of which it shows too little are cut, specks are left out."""
        boxes = augment.transform_boxes(chip.boxes, matrix)
        share = augment.visible_share(boxes, size)
        seen = np.flatnonzero(share > 0.05)
        boxes, cut, masks = boxes[seen], chip.ignored[seen] | (share[seen] < self.section.min_visible), None
        if self.kind == "rotated":
            sides = boxes[:, 2:4]
        else:
            shapes = chip.shapes_of(seen)
            boxes = augment.crop_bounds(shapes, matrix, size)
            if self.kind == "mask":
                masks = augment.crop_masks(shapes, matrix, size)
                for box, mask, is_cut in zip(boxes, masks, cut, strict=True):
                    if not is_cut:  # the box is the mask's, as in the reference; a mask without pixels teaches nothing
                        bounds = mask_bounds(mask)
                        box[:] = 0 if bounds is None else bounds
            sides = boxes[:, 2:] - boxes[:, :2]
        large = sides.min(axis=1, initial=np.inf) >= max(self.section.min_size_px, _MIN_SIDE_PX)
        return _Labels(
            (chip.name,), boxes[large], chip.labels[seen][large], cut[large], None if masks is None else masks[large]
        )

    def _look_at(self, rng: np.random.Generator, width: int, height: int) -> tuple[int, Array]:
        """Choose a chip, by index, and the centre of a crop in it: near an object, near a false alarm, or anywhere."""
        draw = rng.random()
        jitter = rng.uniform(-0.45, 0.45, 2) * (width, height)
        if draw < self.section.object_crop_prob:
            index = int(rng.choice(len(self.chips), p=self.object_weight))
            chip = self.chips[index]
            return index, chip.boxes[rng.choice(np.flatnonzero(~chip.ignored)), :2] + jitter
        if draw < self.section.object_crop_prob + self.section.false_alarm_crop_prob and len(self.false_alarms):
            weight = self.false_alarms[:, 3]
            row = self.false_alarms[rng.choice(len(weight), p=weight / weight.sum())]
            return int(row[0]), row[1:3] + jitter
        tries = []
        for _ in range(self.section.background_tries):
            index = int(rng.choice(len(self.chips), p=self.area_weight))
            chip = self.chips[index]
            centre = rng.random(2) * (chip.width, chip.height)
            x0, y0 = np.maximum(centre.astype(int) - (width // 2, height // 2), 0)
            pixels = self._reader.pixels(index)
            liveliness = -1.0 if pixels is None else float(pixels[0, y0 : y0 + height : 8, x0 : x0 + width : 8].std())
            tries.append((liveliness, index, centre))
        _, index, centre = max(tries, key=lambda item: item[0])
        return index, centre
