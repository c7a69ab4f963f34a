"""Images in folders named by class, what classifiers learn from: which image is of which class.

Every folder in the folder of images is a class and holds its images, at any depth; what begins with a dot is passed
over. What class a folder is, is decided so:

- A file ``classes.txt`` beside the folders, or in the folder above, may say it: one line per folder, its name, white
  space, the class (``n01440764 tench``).
- Otherwise a folder is named as its class.
- Otherwise, where ``model.classes`` are ImageNet's 1000, folders are named by WordNet id, and the sorted ids are the
  classes in their order.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rtmdet_geo.annotations.parts import Part, find_ids, read_ids
from rtmdet_geo.class_names import IMAGENET
from rtmdet_geo.errors import AnnotationError, ConfigError, DatasetNotFoundError
from rtmdet_geo.pictures import IMAGE_SUFFIXES

if TYPE_CHECKING:
    from rtmdet_geo.recipe_sections import DataSection, ModelSection

#: File that says which folder is which class.
CLASSES_FILE = "classes.txt"
#: A folder's name that is the id of a class of ImageNet.
WORDNET_ID = re.compile(r"n\d{8}")


@dataclass(frozen=True)
class FoldersSource:
    """Where images in folders of classes lie.

    Attributes:
        images: folder of the folders.
        ids: text file with one image a line, ``class/file.jpg``, with or without its ending, to take these only.
        classes: names of the model; None takes every class there is.
    """

    images: Path
    ids: Path | None = None
    classes: tuple[str, ...] | None = None


class FolderImage(NamedTuple):
    """An image: folder and file, "n01440764/1.jpg", and the class of the folder."""

    name: str
    class_name: str


@dataclass(frozen=True)
class Listing:
    """What lies in folders of classes.

    Attributes:
        images: in order of their names; those of unknown classes too.
        classes: names of the model's, or every class there is, sorted.
        unknown: classes of the folders that are none of these, by folder.
        stray: names of images that lie in no folder.
        missing: names in the list of ids that are not there.
    """

    images: tuple[FolderImage, ...]
    classes: tuple[str, ...]
    unknown: dict[str, str]
    stray: tuple[str, ...]
    missing: tuple[str, ...]

    @property
    def known(self) -> list[FolderImage]:
        """Images of the classes."""
        classes = set(self.classes)
        return [image for image in self.images if image.class_name in classes]

    @property
    def absent(self) -> list[str]:
        """Classes without an image."""
        present = {image.class_name for image in self.images}
        return [name for name in self.classes if name not in present]


def folders_source(data: DataSection, model: ModelSection, part: Part) -> FoldersSource:
    """Return where a part of a recipe's images lies; paths are below ``data.root``.

    Raises:
        ConfigError: the section does not name the part.
    """
    images, ids = (data.train_images, data.train_ids) if part == "train" else (data.val_images, data.val_ids)
    if images is None:
        raise ConfigError(f"data.{part}_images is missing")
    root = Path(data.root)
    return FoldersSource(root / images, None if ids is None else find_ids(ids, root), model.classes)


def list_folders(source: FoldersSource) -> Listing:
    """List the images in folders of classes; no image is opened.

    Raises:
        DatasetNotFoundError: the folder or the list of ids is missing or empty.
        AnnotationError: ``classes.txt`` is malformed.
    """
    root = source.images
    if not root.is_dir():
        raise DatasetNotFoundError(f"folder of images {str(root)!r} is missing: check the recipe's data section")
    entries = sorted(entry for entry in root.iterdir() if not entry.name.startswith("."))
    folders = [entry.name for entry in entries if entry.is_dir()]
    class_of = _classes_of(root, folders, source.classes)
    images = [FolderImage(name, class_of[folder]) for folder in folders for name in _files(root, folder)]
    if not images:
        raise DatasetNotFoundError(
            f"no images in folders of classes below {str(root)!r}: a folder for each class should hold "
            f"{', '.join(sorted(IMAGE_SUFFIXES))} files"
        )
    missing: list[str] = []
    if source.ids is not None:
        images, missing = _only(images, read_ids(source.ids))
    classes = source.classes if source.classes is not None else tuple(sorted(set(class_of.values())))
    return Listing(
        tuple(images),
        classes,
        {folder: name for folder, name in class_of.items() if name not in set(classes)},
        tuple(entry.name for entry in entries if entry.is_file() and entry.suffix.lower() in IMAGE_SUFFIXES),
        tuple(missing),
    )


def _files(root: Path, folder: str) -> list[str]:
    """Return the images below a folder, "folder/sub/file.jpg", sorted."""
    names = []
    for path, folders, files in os.walk(root / folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inner = Path(path).relative_to(root).as_posix()
        names += [f"{inner}/{name}" for name in files if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES]
    return sorted(name for name in names if not name.rpartition("/")[2].startswith("."))


def _only(images: list[FolderImage], wanted: Sequence[str]) -> tuple[list[FolderImage], list[str]]:
    """Return the images that are wanted by name, with or without ending, and the names that none has."""
    keys = [{image.name, os.path.splitext(image.name)[0]} for image in images]
    names = set(wanted)
    kept = [image for image, own in zip(images, keys, strict=True) if names & own]
    return kept, sorted(names.difference(*keys))


def _classes_of(root: Path, folders: Sequence[str], classes: Sequence[str] | None) -> dict[str, str]:
    """Return the class of each folder, or its own name where nothing says its class."""
    for place in (root, root.parent):
        if (place / CLASSES_FILE).is_file():
            told = _read_classes(place / CLASSES_FILE)
            return {folder: told.get(folder, folder) for folder in folders}
    if classes == IMAGENET and len(folders) == len(IMAGENET) and all(map(WORDNET_ID.fullmatch, folders)):
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
