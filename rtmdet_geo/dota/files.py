"""Folders of images and label files: matched by name, refused where they do not fit."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rtmdet_geo.annotations.label_sets import CLASS_LIST
from rtmdet_geo.errors import AnnotationError, DatasetNotFoundError
from rtmdet_geo.pictures import IMAGE_SUFFIXES, decode_image, image_size

#: Px that an image may have; DOTA-v2.0's largest have 29,200 x 27,620.
MAX_PIXELS = 2**30


def find_images(folder: str | os.PathLike[str]) -> dict[str, Path]:
    """Return the image files of a folder by name without ending, in the order of names.

    Raises:
        DatasetNotFoundError: there is no such folder, or no image in it.
        AnnotationError: two differ in their ending only.
    """
    found = _by_stem(Path(folder), IMAGE_SUFFIXES, "images")
    if not found:
        raise DatasetNotFoundError(
            f"no images in {str(folder)!r}: it should hold {', '.join(sorted(IMAGE_SUFFIXES))} files"
        )
    return found


def find_labels(folder: str | os.PathLike[str], images: Iterable[str], image_folder: str) -> dict[str, Path]:
    """Return the label files of a folder by name without ending; there is one for each image, and no other.

    Raises:
        DatasetNotFoundError: there is no such folder.
        AnnotationError: an image has no labels, or labels have no image.
    """
    found = _by_stem(Path(folder), {".txt"}, "labels")
    stems = list(images)
    orphans = sorted(set(found) - set(stems))
    if orphans:
        raise AnnotationError(
            f"labels {str(found[orphans[0]])!r} have no image in {image_folder!r} ({_more(orphans)} without image): "
            "add it, or remove the labels"
        )
    bare = [stem for stem in stems if stem not in found]
    if bare:
        raise AnnotationError(
            f"image {bare[0]!r} of {image_folder!r} has no labels {bare[0]}.txt in {str(folder)!r} "
            f"({_more(bare)} without labels): an empty one says that nothing is in it; leave labels out if all lack"
        )
    return found


def _more(names: list[str]) -> str:
    return f"{len(names)} file" + "s" * (len(names) > 1)


def _by_stem(folder: Path, suffixes: Iterable[str], what: str) -> dict[str, Path]:
    if not folder.is_dir():
        raise DatasetNotFoundError(f"folder of {what} {str(folder)!r} is missing")
    found: dict[str, Path] = {}
    for name in sorted(os.listdir(folder)):
        stem, suffix = os.path.splitext(name)
        if suffix.lower() not in suffixes or name.startswith(".") or name == CLASS_LIST:
            continue
        if stem in found:
            raise AnnotationError(
                f"{str(folder / name)!r} and {found[stem].name!r} differ in their ending only: remove or rename one"
            )
        found[stem] = folder / name
    return found


def large_image_size(path: Path) -> tuple[int, int]:
    """Return width and height in px of an image, see :func:`rtmdet_geo.pictures.image_size`; it may be large."""
    return image_size(path, max_pixels=MAX_PIXELS)


def decode_large(path: Path) -> NDArray[np.uint8]:
    """Decode an image, (H, W) or (H, W, 3) RGB, see :func:`rtmdet_geo.pictures.decode_image`; it may be large."""
    return decode_image(path, max_pixels=MAX_PIXELS)


def stamp(path: Path | None) -> list[int] | None:
    """Return size in bytes and time of a file, by which a changed one is known."""
    if path is None:
        return None
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]
