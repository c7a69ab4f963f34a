"""Images in folders named by class: what classifiers learn from.

Below ``data.train_images`` (and ``data.val_images``) every folder is a class and holds its images, at any depth. What
class a folder is, is decided so:

- A file ``classes.txt`` beside the folders, or in the folder above, may say it: one line per folder, its name, white
  space, the class (``n01440764 tench``).
- Otherwise a folder is named as its class.
- Otherwise, where ``model.classes`` are ImageNet's 1000, folders are named by WordNet id, and the sorted ids are the
  classes in their order.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from numpy.typing import NDArray

from rtmdet_geo.class_names import IMAGENET
from rtmdet_geo.config import Recipe
from rtmdet_geo.errors import AnnotationError, DatasetNotFoundError
from rtmdet_geo.pictures import image_size
from rtmdet_geo.training.image_files import ImageCache, ImageFile

logger = logging.getLogger(__name__)

#: Files with these endings are images, others are passed over.
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"})
#: File that says which folder is which class.
CLASSES_FILE = "classes.txt"

_WORDNET_ID = re.compile(r"n\d{8}")
_NUM_SHOWN = 5


@dataclass(frozen=True, slots=True)
class ClassImage:
    """One image and its class; nothing is read before it is asked for.

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

    def read(self) -> NDArray[Any]:
        """Return (C, H, W) uint8, not to be written to.

        Raises:
            AnnotationError: the file is gone or does not decode.
        """
        path = self.root / self.name
        width, height = image_size(path)
        return ImageFile(path, width, height, self.bands, self.cache).read()


def load_class_images(recipe: Recipe, folder: Path | None = None) -> tuple[list[ClassImage], list[ClassImage]]:
    """List the images of a recipe of format "folders".

    Args:
        recipe: see ``data``.
        folder: taken for ``data.root``.

    Returns:
        Images to train on, and images left out to validate on (perhaps none).

    Raises:
        DatasetNotFoundError, AnnotationError: see :func:`load_folders`.
    """
    data, root = recipe.data, Path(recipe.data.root) if folder is None else folder
    cache = ImageCache(data.cache_mb * 1_000_000)

    def load(images: str | None, ids: str | None) -> list[ClassImage]:
        if images is None:
            return []
        found = load_folders(
            root / images, recipe.model.classes, recipe.model.bands, cache, unknown_classes=data.unknown_classes
        )
        return found if ids is None else _only(found, root / ids)

    return load(data.train_images, data.train_ids), load(data.val_images, data.val_ids)


def load_folders(
    root: Path,
    classes: Sequence[str],
    bands: tuple[str, ...],
    cache: ImageCache,
    *,
    unknown_classes: Literal["error", "drop"] = "error",
) -> list[ClassImage]:
    """List the images below a folder of class folders; the module's text says what class a folder is.

    Args:
        root: folder of the folders.
        classes: names in label order. A class without images is warned of.
        bands: channels of the pixels, some of red, green, blue.
        cache: keeps decoded images.
        unknown_classes: what to do with folders that are none of the classes.

    Returns:
        Images in order of their names.

    Raises:
        DatasetNotFoundError: the folder is missing, or holds no image of a class.
        AnnotationError: a folder is no class, or ``classes.txt`` is malformed.
    """
    if not root.is_dir():
        raise DatasetNotFoundError(f"no folder {str(root)!r} of images by class (data.root, data.train_images)")
    entries = sorted(root.iterdir())
    folders = [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    stray = [entry.name for entry in entries if entry.is_file() and entry.suffix.lower() in SUFFIXES]
    if stray:
        logger.warning("%s: %s in no class folder, left out", root, _shown(stray))
    class_of = _classes_of(root, folders, classes)
    numbers = {name: label for label, name in enumerate(classes)}
    unknown = [folder for folder in folders if class_of[folder] not in numbers]
    if unknown and unknown_classes == "error":
        raise AnnotationError(_explain_unknown(root, unknown, class_of, classes))
    if unknown:
        logger.warning("%s: folders of no class, left out: %s", root, _shown(unknown))
    images = [
        ClassImage(name, numbers[class_of[folder]], root, bands, cache)
        for folder in folders
        if class_of[folder] in numbers
        for name in _files(root, folder)
    ]
    if not images:
        raise DatasetNotFoundError(
            f"{str(root)!r} holds no image of a class: a folder for each ({_shown(list(classes))}) is expected there"
        )
    present = {image.label for image in images}
    absent = [name for label, name in enumerate(classes) if label not in present]
    if absent:
        logger.warning("%s: classes without an image: %s", root, _shown(absent))
    return images


def _files(root: Path, folder: str) -> list[str]:
    """Return the images below a folder, "folder/sub/file.jpg", sorted."""
    names = []
    for path, folders, files in os.walk(root / folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inner = Path(path).relative_to(root).as_posix()
        names += [f"{inner}/{name}" for name in files if os.path.splitext(name)[1].lower() in SUFFIXES]
    return sorted(name for name in names if not name.rpartition("/")[2].startswith("."))


def _classes_of(root: Path, folders: Sequence[str], classes: Sequence[str]) -> dict[str, str]:
    """Return the class of each folder, or its own name where nothing says its class."""
    for place in (root, root.parent):
        if (place / CLASSES_FILE).is_file():
            told = _read_classes(place / CLASSES_FILE)
            return {folder: told.get(folder, folder) for folder in folders}
    if tuple(classes) == IMAGENET and len(folders) == len(IMAGENET) and all(map(_WORDNET_ID.fullmatch, folders)):
        return dict(zip(sorted(folders), IMAGENET, strict=True))
    return {folder: folder for folder in folders}


def _read_classes(path: Path) -> dict[str, str]:
    """Read ``classes.txt``.

    Raises:
        AnnotationError: a line is not a folder and a class, or names a folder again.
    """
    told: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        folder, *rest = line.split(maxsplit=1)
        if not rest or folder in told:
            problem = "names a folder again" if folder in told else "is not 'folder class'"
            raise AnnotationError(f"{str(path)!r}, line {number}: {line.strip()!r} {problem}")
        told[folder] = rest[0].strip()
    return told


def _explain_unknown(root: Path, unknown: Sequence[str], class_of: dict[str, str], classes: Sequence[str]) -> str:
    """Say what to do about folders that are no class."""
    if all(map(_WORDNET_ID.fullmatch, unknown)):
        hint = f"a file {CLASSES_FILE} beside them says which class each is ('n01440764 tench')"
    else:
        near = difflib.get_close_matches(class_of[unknown[0]], classes, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        hint += f"add them to model.classes, name them in {CLASSES_FILE}, or say data.unknown_classes: drop"
    return f"{str(root)!r} has folders that are no class of the recipe: {_shown(unknown)}; {hint}"


def _only(images: list[ClassImage], ids: Path) -> list[ClassImage]:
    """Take the images that a file names, one a line, with or without their ending.

    Raises:
        DatasetNotFoundError: the file is missing, or names an image that is not there.
    """
    if not ids.is_file():
        raise DatasetNotFoundError(f"no file {str(ids)!r} of image names (data.train_ids, data.val_ids)")
    wanted = {line.strip() for line in ids.read_text(encoding="utf-8").splitlines() if line.strip()}
    keys = [{image.name, os.path.splitext(image.name)[0]} for image in images]
    missing = sorted(wanted.difference(*keys))
    if missing or not wanted:
        problem = f"names images that are not there: {_shown(missing)}" if missing else "names no image"
        raise DatasetNotFoundError(f"{str(ids)!r} {problem}; names are 'class/file.jpg', one a line")
    return [image for image, names in zip(images, keys, strict=True) if wanted & names]


def _shown(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NUM_SHOWN} more" if len(names) > _NUM_SHOWN else ""
    return ", ".join(names[:_NUM_SHOWN]) + more
