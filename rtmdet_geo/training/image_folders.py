"""Images in folders named by class, as classifiers read them; :mod:`rtmdet_geo.annotations.folders` lists them."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from numpy.typing import NDArray

from rtmdet_geo.annotations.folders import (
    CLASSES_FILE,
    WORDNET_ID,
    FoldersSource,
    Listing,
    folders_source,
    list_folders,
)
from rtmdet_geo.config import Recipe
from rtmdet_geo.errors import AnnotationError, DatasetNotFoundError
from rtmdet_geo.training.image_files import ImageCache, read_image

logger = logging.getLogger(__name__)

_NUM_SHOWN = 5


@dataclass(frozen=True, slots=True)
class ClassImage:
    """One image and its class; nothing is opened before it is asked for.

    Attributes:
        name: folder and file, "tench/1.jpg".
        label: index into ``model.classes``.
        root: folder of the classes' folders.
        bands: channels of the pixels, in order.
        cache: keeps decoded images.
    """

    name: str
    label: int
    root: Path
    bands: tuple[str, ...]
    cache: ImageCache

    @property
    def pixels(self) -> NDArray[Any]:
        """(C, H, W) uint8, not to be written to; decoded now if need be.

        Raises:
            AnnotationError: the file is gone or does not decode.
        """
        return read_image(self.root / self.name, self.bands, self.cache)


def load_class_images(recipe: Recipe) -> tuple[list[ClassImage], list[ClassImage]]:
    """List the images of a recipe of format "folders".

    Args:
        recipe: see ``data``.

    Returns:
        Images to train on, and images left out to validate on (perhaps none).

    Raises:
        DatasetNotFoundError, AnnotationError: see :func:`load_folders`.
    """
    data, model = recipe.data, recipe.model
    cache = ImageCache.of_recipe(data)
    training = load_folders(folders_source(data, model, "train"), model.bands, cache, data.unknown_classes)
    if data.val_images is None:
        return training, []
    return training, load_folders(folders_source(data, model, "val"), model.bands, cache, data.unknown_classes)


def load_folders(
    source: FoldersSource,
    bands: tuple[str, ...],
    cache: ImageCache,
    unknown_classes: Literal["error", "drop"] = "error",
) -> list[ClassImage]:
    """List the images in folders of classes; the log hears of classes without images and of what is left out.

    Args:
        source: where they lie, and which classes there are.
        bands: channels of the pixels, some of red, green, blue.
        cache: keeps decoded images.
        unknown_classes: what to do with folders that are none of the classes.

    Returns:
        Images in order of their names.

    Raises:
        DatasetNotFoundError: the folder or the list of ids is missing, the list names an image that is not there, or
            there is no image of a class.
        AnnotationError: a folder is no class, or ``classes.txt`` is malformed.
    """
    root, found = source.images, list_folders(source)
    if found.stray:
        logger.warning("%s: %s in no class folder, left out", root, _shown(found.stray))
    if found.unknown and unknown_classes == "error":
        raise AnnotationError(_explain_unknown(root, found))
    if found.unknown:
        logger.warning("%s: folders of no class, left out: %s", root, _shown(list(found.unknown)))
    if found.missing:
        raise DatasetNotFoundError(
            f"{str(source.ids)!r} names images that are not there: {_shown(found.missing)}; names are "
            "'class/file.jpg', one a line"
        )
    numbers = {name: label for label, name in enumerate(found.classes)}
    images = [ClassImage(image.name, numbers[image.class_name], root, bands, cache) for image in found.known]
    if not images:
        raise DatasetNotFoundError(
            f"{str(root)!r} holds no image of a class: a folder for each ({_shown(found.classes)}) is expected there"
        )
    if found.absent:
        logger.warning("%s: classes without an image: %s", root, _shown(found.absent))
    return images


def _explain_unknown(root: Path, found: Listing) -> str:
    """Say what to do about folders that are no class."""
    unknown = list(found.unknown)
    if all(map(WORDNET_ID.fullmatch, unknown)):
        hint = f"a file {CLASSES_FILE} beside them says which class each is ('n01440764 tench')"
    else:
        near = difflib.get_close_matches(found.unknown[unknown[0]], found.classes, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        hint += f"add them to model.classes, name them in {CLASSES_FILE}, or say data.unknown_classes: drop"
    return f"{str(root)!r} has folders that are no class of the recipe: {_shown(unknown)}; {hint}"


def _shown(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NUM_SHOWN} more" if len(names) > _NUM_SHOWN else ""
    return ", ".join(names[:_NUM_SHOWN]) + more
