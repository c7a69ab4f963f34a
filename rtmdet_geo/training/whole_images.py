"""Samples of whole images as OpenMMLab's recipes make them: mosaic, resize, rotation, crop, HSV, flip, mixup.

Every sample is a pure function of seed, iteration and position. An epoch is a permutation of the images; samples are
numbered over all steps and positions. The reference (mmdet 3.x ``CachedMosaic``, ``CachedMixUp``) takes partners from
a cache of its worker's last N samples; here a partner is the sample of k samples back in the process's own sequence, k
drawn from the ages in such a cache: uniform in 1..N if the oldest leaves, geometric with mean N if a random one does.
(The reference's cache holds the new sample, too, which may so be its own partner.) Before the start of the training lie
epochs with negative numbers.

What else differs from the reference: sizes and shifts are not rounded to whole px, pixels are interpolated once
(framing.py), what a rotation leaves open is PAD_VALUE instead of black, and where the reference gives up a crop that
shows no object and takes another image, the same images are framed anew. Its CachedMixUp can scale the partner; its
recipes for RTMDet do not (``ratio_range=(1.0, 1.0)``), nor does this.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from rtmdet_geo.config import Recipe
from rtmdet_geo.errors import AnnotationError, ConfigError
from rtmdet_geo.recipe_sections import IMAGE_BANDS, ImageAugment
from rtmdet_geo.structures import Kind
from rtmdet_geo.training import augment
from rtmdet_geo.training.chips import check_outlines
from rtmdet_geo.training.framed_labels import (
    FramedObjects,
    frame_objects,
    holds_centres,
    join_objects,
    make_sample,
    move_objects,
)
from rtmdet_geo.training.framing import Framing, compose, draw_view, flip_matrix, place_images, render
from rtmdet_geo.training.labelled import LabelledImage, Reader, Sample, Sampler
from rtmdet_geo.training.thread_cache import ThreadCache

logger = logging.getLogger(__name__)

Array = NDArray[Any]

#: Images of a mosaic.
_MOSAIC = 4
#: A framing without objects is drawn anew, and a mixup partner without objects replaced, so often.
_TRIES = 10
#: Finished samples kept for mixup, in lengths of its cache: with random pop that holds 95 % of all partners.
_MEMO_LENGTHS = 3
#: What a random number is for; part of its seed.
_FRAMES, _MIXES, _ORDERS, _SIZES = range(4)


class _Framed(NamedTuple):
    """A sample before mixup."""

    image: Array  # (C, side, side) uint8, not to be written to
    objects: FramedObjects


class ImageSampler(Sampler):
    """Draws samples of whole images by the recipe's augmentation, with labels of the recipe's kind of model."""

    epoch_length: int

    def __init__(
        self,
        images: Sequence[LabelledImage],
        recipe: Recipe,
        *,
        iterations: int,
        samples_per_step: int,
        samples_per_process: int,
    ) -> None:
        """Prepare to draw; nothing is decoded yet.

        Args:
            images: of the training set.
            recipe: with ``augment.sampling: images``.
            iterations: steps of the whole training.
            samples_per_step: over all processes.
            samples_per_process: of a step; process r draws positions r * samples_per_process and up.

        Raises:
            ConfigError: there is no image, the weak stage is the whole training, masks are to be learnt from objects
                without outlines, or HSV jitter is asked for of bands other than red, green and blue.
        """
        if not isinstance(recipe.augment, ImageAugment):
            raise ConfigError(f"whole images need augment.sampling images, not {recipe.augment.sampling}")
        if not images:
            raise ConfigError("there is no image to train on: check the data section")
        self.images = images
        self.section = recipe.augment
        self.kind: Kind = recipe.model.object_kind
        self.seed = recipe.loop.seed
        self.epoch_length = len(images) * recipe.data.repeat
        self.samples_per_step, self.samples_per_process = samples_per_step, samples_per_process
        #: First iteration of the weak stage, whose epochs are whole steps; ``iterations`` if there is none.
        self.weak_from = max(0, iterations - self.section.weak_epochs * -(-self.epoch_length // samples_per_step))
        if self.weak_from == 0 and (self.section.mosaic_prob > 0 or self.section.mixup_prob > 0):
            raise ConfigError(
                f"augment.weak_epochs {self.section.weak_epochs} covers the whole training of {iterations} iterations, "
                "so mosaic and mixup would never be seen: lower it, or set their probabilities to 0"
            )
        if self.section.weak_epochs:
            logger.info("mosaic and mixup rest from iteration %d on", self.weak_from)
        if self.kind == "mask":
            check_outlines(list(images))
        self._colours = _colour_order(self.section, recipe.model.bands)
        classes = self.section.axis_aligned_classes
        self._axis_aligned = np.array([recipe.model.classes.index(name) for name in classes], np.int64)
        self._reader = Reader(images, skip=recipe.data.on_bad_image == "skip")
        self._order = lru_cache(maxsize=4)(self._draw_order)
        self._memo: ThreadCache[_Framed] = ThreadCache(_MEMO_LENGTHS * self.section.mixup_cache, lambda framed: 1)

    @property
    def bad_images(self) -> set[str]:
        """Names of the images that did not decode and were replaced by the next ones."""
        return self._reader.bad_images

    def draw(self, iteration: int, position: int) -> Sample:
        """Return the sample at a position of a step; see :meth:`labelled.Sampler.draw`."""
        if iteration >= self.weak_from:
            framed = self._frame(iteration, position)
            return make_sample(framed.image, framed.objects, self.kind, self.section)
        framed = self._framed(iteration, position)
        rng = self._rng(_MIXES, iteration, position)
        image, objects = framed.image.copy(), framed.objects
        if rng.random() < self.section.mixup_prob:
            partner = self._mixup_partner(rng, iteration, position, image.shape[1])
            if partner is not None:
                rows = (-1, image.shape[2])  # OpenCV blends planes one below the other
                image = cv2.addWeighted(image.reshape(rows), 0.5, partner.image.reshape(rows), 0.5, 0)
                image = image.reshape(framed.image.shape)
                objects = join_objects([objects, partner.objects])
        return make_sample(image, objects, self.kind, self.section)

    def earlier(self, iteration: int, position: int, steps: int) -> tuple[int, int]:
        """Return iteration and position of the sample that the same process draws so many samples before.

        Example: with 4 samples a step in 2 processes, (5, 2) is the first that process 1 draws in step 5; one sample
        before it drew (4, 3), the last of its two in step 4.
        """
        first = position - position % self.samples_per_process
        back, within = divmod(iteration * self.samples_per_process + position - first - steps, self.samples_per_process)
        return back, first + within

    def side(self, iteration: int) -> int:
        """Return the side in px of the samples of a step."""
        if not self.section.image_sizes:
            return self.section.image_size
        rng = self._rng(_SIZES, iteration // self.section.image_sizes_interval)
        return self.section.image_sizes[rng.integers(len(self.section.image_sizes))]

    def image_index(self, iteration: int, position: int) -> int:
        """Return which image a sample shows, with three partners or alone, if it decodes."""
        epoch, place = divmod(iteration * self.samples_per_step + position, self.epoch_length)
        return int(self._order(epoch)[place])

    def _rng(self, purpose: int, *numbers: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, purpose, *(number % 2**32 for number in numbers)])

    def _draw_order(self, epoch: int) -> Array:
        """Return the image of each sample of an epoch."""
        return np.asarray(self._rng(_ORDERS, epoch).permutation(self.epoch_length) % len(self.images))

    def _framed(self, iteration: int, position: int) -> _Framed:
        """Return a sample of the strong stage before mixup, remembered if it may be a partner."""
        if self.section.mixup_prob == 0:
            return self._frame(iteration, position)
        return self._memo.get((iteration, position), lambda: self._frame(iteration, position))

    def _frame(self, iteration: int, position: int) -> _Framed:
        """Make a sample before mixup."""
        rng = self._rng(_FRAMES, iteration, position)
        places = [(iteration, position)]
        if iteration < self.weak_from and rng.random() < self.section.mosaic_prob:
            ages = _ages(rng, self.section.mosaic_cache, self.section.mosaic_random_pop, _MOSAIC - 1)
            places += [self.earlier(iteration, position, age) for age in ages]
        decoded = [self._decode(*place) for place in places]
        images, side = [image for image, _ in decoded], self.side(iteration)
        for _ in range(_TRIES):
            framing = self._draw_framing(rng, images, side)
            groups = [
                frame_objects(image, framing, index, self.kind, self.section) for index, image in enumerate(images)
            ]
            objects = join_objects(groups)
            if not objects.is_empty or self.kind == "mask" or all(image.ignored.all() for image in images):
                break  # as in the reference, masks may be learnt from a crop without any
        pixels = render([pixels for _, pixels in decoded], framing, side)
        if self._colours is not None:
            columns, rows = (int(np.ceil(length)) for length in framing.shown)
            shown = pixels[:rows, :columns]
            shown[:] = augment.jitter_hsv(rng, self.section, shown, self._colours)
        image = np.empty((pixels.shape[2], side, side), np.uint8)
        for band, plane in enumerate(image):
            cv2.extractChannel(pixels, band, plane)
        return _Framed(image, objects)

    def _draw_framing(self, rng: np.random.Generator, images: Sequence[LabelledImage], side: int) -> Framing:
        placements, frame = place_images(rng, self.section, [(image.width, image.height) for image in images], side)
        quarter_turns = len(self._axis_aligned) > 0 and any(
            holds_centres(image.boxes[np.isin(image.labels, self._axis_aligned)], placement, frame)
            for image, placement in zip(images, placements, strict=True)
        )
        view, shown = draw_view(rng, self.section, frame, side, quarter_turns=quarter_turns)
        return Framing(placements, frame, view, shown)

    def _decode(self, iteration: int, position: int) -> tuple[LabelledImage, Array]:
        """Return a sample's image and its pixels; the next that decodes of the epoch if the recipe says so.

        Raises:
            AnnotationError: the image does not decode and the recipe says to stop, or none of all images decodes.
        """
        epoch, place = divmod(iteration * self.samples_per_step + position, self.epoch_length)
        order = self._order(epoch)
        for step in range(self.epoch_length):
            index = int(order[(place + step) % self.epoch_length])
            pixels = self._reader.pixels(index)
            if pixels is not None:
                return self.images[index], pixels
        raise AnnotationError(f"none of {len(self.images)} images decodes: check them with 'rtmdet-geo data check'")

    def _mixup_partner(self, rng: np.random.Generator, iteration: int, position: int, side: int) -> _Framed | None:
        """Return an earlier sample, perhaps mirrored, to blend with one of a side in px; None if all lack objects."""
        for age in _ages(rng, self.section.mixup_cache, self.section.mixup_random_pop, _TRIES):
            framed = self._framed(*self.earlier(iteration, position, age))
            if not framed.objects.is_empty:
                break
        else:
            return None
        matrix = np.eye(2, 3) * (side / framed.image.shape[1])
        planes = framed.image
        if planes.shape[1] != side:
            planes = np.stack([cv2.resize(plane, (side, side), interpolation=cv2.INTER_LINEAR) for plane in planes])
        if rng.random() < 0.5:
            matrix = compose(flip_matrix("horizontal", (side, side)), matrix)
            planes = cv2.flip(planes.reshape(-1, side), 1).reshape(planes.shape)
        return _Framed(planes, move_objects(framed.objects, matrix, self.kind))


def _ages(rng: np.random.Generator, cache: int, random_pop: bool, count: int) -> list[int]:
    """Draw how many samples ago partners were seen."""
    ages = rng.geometric(1 / cache, count) if random_pop else rng.integers(1, cache + 1, count)
    return [int(age) for age in ages]


def _colour_order(section: ImageAugment, bands: tuple[str, ...]) -> tuple[int, ...] | None:
    """Return where red, green and blue are among the bands; None if their tones stay.

    Raises:
        ConfigError: HSV jitter of other bands.
    """
    if not (section.hue_delta or section.saturation_delta or section.value_delta):
        return None
    if set(bands) != set(IMAGE_BANDS) or len(bands) != len(IMAGE_BANDS):
        raise ConfigError(
            f"augment.hue_delta, saturation_delta and value_delta need bands {', '.join(IMAGE_BANDS)}, model.bands are "
            f"{', '.join(bands)}: set the deltas to 0"
        )
    return tuple(bands.index(band) for band in IMAGE_BANDS)
