"""Samples for classifiers: every epoch in a new order, every image augmented anew.

A sample is a pure function of (seed, iteration, position), as in :mod:`rtmdet_geo.training.crops`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtmdet_geo.config import Recipe
from rtmdet_geo.errors import AnnotationError
from rtmdet_geo.preprocess import crop_centre
from rtmdet_geo.recipe_sections import ClassificationAugment
from rtmdet_geo.training.classification_augment import Palette, augment_image
from rtmdet_geo.training.image_folders import ClassImage
from rtmdet_geo.training.labelled import Reader

logger = logging.getLogger(__name__)

Array = NDArray[Any]

#: What random numbers are for: equal lists of seeds give equal numbers, and these must have nothing in common.
_ORDER, _AUGMENT, _MIX = 1, 2, 3


@dataclass(frozen=True)
class ClassSample:
    """One image for a classifier.

    Attributes:
        image: (C, side, side) uint8.
        names: of the one image that it shows, for messages.
        label: index into ``model.classes``.
        number: of the sample among all of the training.
    """

    image: Array
    names: tuple[str, ...]
    label: int
    number: int


class ClassSampler:
    """Draws images of folders in random order, augmented by the recipe.

    Samples of the training are numbered; numbers of one epoch take images in the order of a permutation. With repeated
    augmentation (``augment.repeats`` r, arXiv 1902.05509) r numbers in a row take the same image, so that its copies
    meet in one step, and an epoch shows every r-th image of its permutation only: an epoch is as long with it as
    without it. Numbers of a step go round the processes in turn, so copies are spread over them.

    Args:
        images: what there is to learn from.
        recipe: see ``augment``, ``data.repeat``, ``data.on_bad_image``.
        samples_per_step: over all processes.
        samples_per_process: of these; process k draws positions from k times this number on.

    Attributes:
        epoch_length: samples of an epoch.
    """

    def __init__(
        self, images: Sequence[ClassImage], recipe: Recipe, *, samples_per_step: int, samples_per_process: int
    ) -> None:
        """Read nothing yet."""
        assert isinstance(recipe.augment, ClassificationAugment)
        self.images, self.section, self.seed = images, recipe.augment, recipe.loop.seed
        self.palette = Palette.of_model(recipe.model)
        self.samples_per_step, self.samples_per_process = samples_per_step, samples_per_process
        self.epoch_length = len(images) * recipe.data.repeat
        self._reader = Reader(images, skip=recipe.data.on_bad_image == "skip")

    @property
    def bad_images(self) -> set[str]:
        """Names of the images that did not decode and were replaced by the next ones."""
        return self._reader.bad_images

    def draw(self, iteration: int, position: int) -> ClassSample:
        """Return the sample at a position of an iteration's batch; the same arguments give the same sample.

        Raises:
            AnnotationError: an image does not decode and the recipe says to stop, or none does.
        """
        process, place = divmod(position, self.samples_per_process)
        num_processes = self.samples_per_step // self.samples_per_process
        number = iteration * self.samples_per_step + place * num_processes + process
        image, pixels = self._read(self._index(number))
        rng = np.random.default_rng([self.seed, number, _AUGMENT])
        return ClassSample(augment_image(rng, self.section, self.palette, pixels), (image.name,), image.label, number)

    def mixing(self, samples: Sequence[ClassSample]) -> np.random.Generator:
        """Return the random numbers that some samples are mixed by: others for every batch, the same when resumed."""
        return np.random.default_rng([self.seed, samples[0].number, _MIX])

    def _index(self, number: int) -> int:
        """Return which image a sample shows."""
        epoch, place = divmod(number, self.epoch_length)
        return int(_order(self.seed, epoch, self.epoch_length)[place // self.section.repeats]) % len(self.images)

    def _read(self, index: int) -> tuple[ClassImage, Array]:
        """Return an image and its pixels, or the next one that decodes."""
        for step in range(len(self.images)):
            place = (index + step) % len(self.images)
            pixels = self._reader.pixels(place)
            if pixels is not None:
                return self.images[place], pixels
        raise AnnotationError(f"none of {len(self.images)} images decodes: check them with 'rtmdet-geo data check'")


class CentreSampler:
    """Shows images as classifiers are tested: resized, and the centre cut out; each once, in order.

    Args:
        images: what was left out.
        recipe: see ``augment.eval_size``, ``augment.image_size`` and ``data.on_bad_image``.
        batch_size: images an iteration.

    Attributes:
        bad_images: names of images that did not decode.
    """

    def __init__(self, images: Sequence[ClassImage], recipe: Recipe, *, batch_size: int) -> None:
        """Read nothing yet."""
        assert isinstance(recipe.augment, ClassificationAugment)
        self.images, self.section, self.batch_size = images, recipe.augment, batch_size
        self.skips_bad = recipe.data.on_bad_image == "skip"
        self.bad_images: set[str] = set()

    def draw(self, iteration: int, position: int) -> ClassSample | None:
        """Return the sample at a position of an iteration's batch; None past the end, or of an image that is skipped.

        Raises:
            AnnotationError: an image does not decode and the recipe says to stop.
        """
        number = iteration * self.batch_size + position
        if number >= len(self.images):
            return None
        image = self.images[number]
        try:
            pixels = image.pixels
        except AnnotationError as error:
            if not self.skips_bad:
                raise
            logger.warning("%s; it is left out", error)
            self.bad_images.add(image.name)
            return None
        crop = crop_centre(np.moveaxis(pixels, 0, -1), self.section.image_size, self.section.eval_size)
        return ClassSample(np.ascontiguousarray(np.moveaxis(crop, -1, 0)), (image.name,), image.label, number)


@functools.lru_cache(maxsize=2)  # of the epochs that meet in one batch
def _order(seed: int, epoch: int, length: int) -> Array:
    """Return the permutation (length,) of an epoch."""
    order = np.random.default_rng([seed, epoch, _ORDER]).permutation(length)
    order.flags.writeable = False
    return order
