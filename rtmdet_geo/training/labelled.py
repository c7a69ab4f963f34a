"""An image with its labels, and what training makes of it: what datasets, samplers and the loop share."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rtmdet_geo.annotations.outlines import Outline, clip_outline, outline_points
from rtmdet_geo.boxes import boxes_to_polygons, hboxes_to_boxes
from rtmdet_geo.errors import AnnotationError
from rtmdet_geo.structures import Kind

logger = logging.getLogger(__name__)

Array = NDArray[Any]


class PixelSource(Protocol):
    """Pixels that are decoded when they are asked for."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W), known without decoding."""

    def read(self) -> Array:
        """Return (C, H, W) uint8, not to be written to.

        Raises:
            AnnotationError: the file is gone or does not decode.
        """


@dataclass(frozen=True)
class LabelledImage:
    """One image with its labels.

    Attributes:
        name: of its file, for messages.
        scene: name of the scene that it was cut from; images that are no chips are scenes of their own.
        source: (C, H, W) uint8, perhaps a memory map, or what decodes to it.
        boxes: (N, 5) float64 px, le90.
        labels: (N,) int64.
        ignored: (N,) bool: neither object nor background.
        outlines: N outlines in px, () for an object that has none; or nothing where no object has one.
        areas: (N,) float64 px^2 as the label file states them, nan where it does not; None where it states none.
    """

    name: str
    scene: str
    source: Array | PixelSource
    boxes: Array
    labels: Array
    ignored: Array
    outlines: tuple[Outline, ...] = ()
    areas: Array | None = None

    @property
    def pixels(self) -> Array:
        """(C, H, W) uint8, not to be written to; decoded now if need be.

        Raises:
            AnnotationError: see :meth:`PixelSource.read`.
        """
        return self.source if isinstance(self.source, np.ndarray) else self.source.read()

    @property
    def height(self) -> int:
        """In px."""
        return int(self.source.shape[1])

    @property
    def width(self) -> int:
        """In px."""
        return int(self.source.shape[2])

    @property
    def shapes(self) -> list[Outline]:
        """N outlines as :meth:`shapes_of` returns them."""
        return self.shapes_of(np.arange(len(self.boxes)))

    def shapes_of(self, rows: Array) -> list[Outline]:
        """Return the outlines of the objects (K,) asked for, of the box where there is none.

        They are cut off at the image's edges, beyond which nothing is known. They are not kept: for a large data set
        that would be more memory than all labels take.
        """
        corners = boxes_to_polygons(self.boxes[rows])
        outlines = [self.outlines[row] for row in rows] if self.outlines else [()] * len(corners)
        whole = [outline or ((box,),) for outline, box in zip(outlines, corners, strict=True)]
        return [clip_outline(outline, self.width, self.height) or outline for outline in whole]

    def boxes_of(self, kind: Kind) -> Array:
        """Return the boxes that a model of some kind should find, (N, 5): rotated, or with angle 0 and w along x."""
        if kind == "rotated":
            return self.boxes
        points = [outline_points(shape) for shape in self.shapes]
        corners = [np.concatenate((part.min(axis=0), part.max(axis=0))) for part in points]
        return hboxes_to_boxes(np.array(corners).reshape(-1, 4))


class HasPixels(Protocol):
    """An image with a name."""

    @property
    def name(self) -> str:
        """Of its file, for messages."""

    @property
    def pixels(self) -> Array:
        """(C, H, W) uint8, decoded now if need be."""


class Reader:
    """Pixels of labelled images, of which some may not decode; several threads may read.

    Args:
        images: by index.
        skip: whether one that does not decode is passed over (``data.on_bad_image``).
    """

    def __init__(self, images: Sequence[HasPixels], *, skip: bool) -> None:
        """Read nothing yet."""
        self._images, self._skip = images, skip
        self._bad: set[int] = set()
        self._lock = threading.Lock()

    def pixels(self, index: int) -> Array | None:
        """Return an image's pixels; None if it does not decode and is to be passed over, which the log says once.

        Raises:
            AnnotationError: it does not decode and is not to be passed over.
        """
        if index in self._bad:
            return None
        try:
            return self._images[index].pixels
        except AnnotationError as error:
            if not self._skip:
                raise
            with self._lock:
                is_new = index not in self._bad
                self._bad.add(index)
            if is_new:
                logger.warning("%s; another image takes its place (%d so far)", error, len(self._bad))
            return None

    @property
    def bad_images(self) -> set[str]:
        """Names of the images that did not decode."""
        with self._lock:
            return {self._images[index].name for index in self._bad}


@dataclass(frozen=True)
class Sample:
    """One training image.

    Attributes:
        image: (C, H, W) uint8.
        names: of the images that it shows, for messages.
        boxes: (N, 5) float32 px le90 for rotated models, else (N, 4) x1, y1, x2, y2 within the image.
        labels: (N,) int64.
        ignored: (M, 5) or (M, 4) likewise: regions in which nothing is known.
        masks: (N, H, W) uint8, 0 or 1, for models of instances; else None.
    """

    image: Array
    names: tuple[str, ...]
    boxes: Array
    labels: Array
    ignored: Array
    masks: Array | None = None


class Sampler(Protocol):
    """Makes the samples of a training; a sample is a pure function of seed, iteration and position.

    Attributes:
        bad_images: names of images that did not decode.
    """

    @property
    def bad_images(self) -> set[str]:
        """Names of images that did not decode and were replaced by others."""

    def draw(self, iteration: int, position: int) -> Any:
        """Return the sample at a position of an iteration's batch; the same arguments give the same sample.

        Of detectors a :class:`Sample`; in any case something with an ``image`` and ``names``.

        Args:
            iteration: step of the optimiser, from 0.
            position: in [0, samples of a step over all processes).

        Raises:
            AnnotationError: an image does not decode and the recipe says to stop.
        """
