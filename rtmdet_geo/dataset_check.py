"""Goes over a data set before training does: every label, every image, every byte.

What is looked for, and which of it is an error, stands in :mod:`rtmdet_geo.annotations.findings`.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from rtmdet_geo.annotations.chips import parse_chip
from rtmdet_geo.annotations.findings import MEANINGS, SEVERITIES, Findings
from rtmdet_geo.annotations.folders import FoldersSource, folders_source, list_folders
from rtmdet_geo.annotations.labels import make_labels
from rtmdet_geo.annotations.parts import LabelledFile, PartSource, part_source, read_part
from rtmdet_geo.annotations.usable import Usable, sift
from rtmdet_geo.config import Recipe
from rtmdet_geo.errors import AnnotationError, Cancelled, DatasetNotFoundError
from rtmdet_geo.pictures import decode_image, is_turned

#: Boxes of a class that agree to so many px (rad) are the same.
_SAME_BOX = 0.01


@dataclass(frozen=True)
class ChipsSource:
    """A folder of chips; ``classes`` of the model, None takes every class there is."""

    folder: Path
    classes: tuple[str, ...] | None = None


Source: TypeAlias = PartSource | ChipsSource | FoldersSource


class _Look(NamedTuple):
    """What a thread saw of an image: digest of the file (None: all pixels are equal, or broken), and its faults."""

    digest: bytes | None
    faults: tuple[tuple[str, str], ...]


def recipe_parts(recipe: Recipe) -> dict[str, Source]:
    """Return the parts of the data of a recipe, for a detector or classifier, by name."""
    data, model = recipe.data, recipe.model
    if data.format == "chips":
        return {"chips": ChipsSource(Path(data.chips or ""), model.classes)}
    source = folders_source if data.format == "folders" else part_source
    parts: dict[str, Source] = {"train": source(data, model, "train")}
    if data.val_images is not None:
        parts["val"] = source(data, model, "val")
    return parts


def check_dataset(
    parts: Mapping[str, Source],
    *,
    drop_unknown_classes: bool = False,
    examples: int = 5,
    threads: int = 8,
    progress: Callable[[int, int], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> dict[str, Any]:
    """Look for faults in labels and images; every image is decoded.

    Args:
        parts: what to check, by name ("train", "val"); files that are in two of them are an error.
        drop_unknown_classes: objects of unknown classes are left out by wish: a warning, no error; images in folders
            of unknown classes are not looked at then.
        examples: how many faults of each kind to keep.
        threads: that decode images.
        progress: called with images looked at and all images.
        cancelled: asked between images.

    Returns:
        ``errors`` and ``warnings``: numbers; ``faults``: of each kind found, ``kind``, ``severity``, ``meaning``,
        ``count``, ``examples`` (``part``, ``place``, ``text``); ``parts``: of each, numbers of ``images``,
        ``images_without_objects``, ``objects`` that training can take, and those by class in ``classes``.

    Raises:
        DatasetNotFoundError: a folder or file is missing or empty.
        AnnotationError: a COCO file, an index of chips or ``classes.txt`` cannot be read at all.
        Cancelled: ``cancelled`` said so.
    """
    findings = {name: Findings(examples) for name in parts}
    files, about = {}, {}
    for name, source in parts.items():
        if isinstance(source, FoldersSource):
            files[name], about[name] = _list_images(source, findings[name], drop_unknown_classes)
            continue
        if isinstance(source, PartSource):
            source = replace(source, with_outlines=True)
        files[name] = read_source(source, findings[name])
        usable = sift(files[name], source.classes, findings[name])
        _find_doubles(files[name], usable, findings[name])
        about[name] = _describe(files[name], usable)
    every = [(name, file) for name, found in files.items() for file in found]
    seen: dict[bytes, tuple[str, LabelledFile]] = {}
    for done, ((name, file), look) in enumerate(zip(every, _looks(every, threads), strict=True), 1):
        for kind, text in look.faults:
            findings[name].add(kind, str(file.path), text)
        if look.digest is not None:
            part, first = seen.setdefault(look.digest, (name, file))
            if first is not file:
                findings[name].add("double image", str(file.path), f"the same file as {str(first.path)!r} in {part}")
        if progress is not None:
            progress(done, len(every))
        if cancelled is not None and cancelled():
            raise Cancelled(f"stopped after {done} of {len(every)} images")
    return _summary(findings, about, drop_unknown_classes)


def read_source(source: PartSource | ChipsSource, findings: Findings) -> list[LabelledFile]:
    """Read all labels of a part, and the sizes of its images.

    Args:
        source: what to read.
        findings: takes note of files that are left out because something is wrong with them.

    Raises:
        DatasetNotFoundError, AnnotationError: as :func:`check_dataset`.
    """
    if isinstance(source, PartSource):
        return read_part(source, findings)
    return list(_read_chips(source.folder, findings))


def _read_chips(folder: Path, findings: Findings) -> Iterator[LabelledFile]:
    """Yield the chips of a folder that are well described; :func:`rtmdet_geo.training.chips.load_chips` is strict."""
    path = folder / "chips.json"
    if not path.is_file():
        raise DatasetNotFoundError(f"no chips in {str(folder)!r}: chips.json is missing")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        classes, entries = index["classes"], index["chips"]
    except (KeyError, TypeError, ValueError) as error:
        raise AnnotationError(f"{path} is not an index of chips ({error!r}): cut the chips again") from error
    for number, entry in enumerate(entries, 1):
        try:
            chip = _chip(path, entry, classes)
        except AnnotationError as error:
            findings.add("malformed labels", f"{path}, chip {number}", str(error))
            continue
        if chip.path.is_file():
            yield chip
        else:
            findings.add("labels without image", f"{path}, chip {number}", f"{str(chip.path)!r} is missing")


def _chip(path: Path, entry: Mapping[str, Any], classes: list[str]) -> LabelledFile:
    chip = parse_chip(entry, len(classes))
    names, numbers = [classes[label] for label in chip.labels], range(1, len(chip.labels) + 1)
    unit = f"{chip.file} object"
    found = make_labels(path, chip.boxes, names, numbers, crowd=chip.ignored, outlines=chip.outlines, unit=unit)
    return LabelledFile(path.parent / chip.file, chip.file, chip.width, chip.height, found)


def _list_images(
    source: FoldersSource, findings: Findings, drop_unknown_classes: bool
) -> tuple[list[LabelledFile], dict[str, Any]]:
    """Return the images in folders of classes, whose sizes are not known yet, and what the part holds."""
    root, found = source.images, list_folders(source)
    numbers = Counter(image.name.partition("/")[0] for image in found.images)
    for name in found.missing:
        findings.add("labels without image", str(source.ids), f"{name!r} is not in {str(root)!r}")
    for folder, name in found.unknown.items():
        text = f"{name!r} is no class of the model; the folder has {numbers[folder]} images"
        findings.add("unknown class", str(root / folder), text)
    for name in found.absent:
        findings.add("absent class", name, "no image is of this class")
    for name in found.stray:
        findings.add("image without labels", str(root / name), "it lies in no folder of a class")
    images = found.known if drop_unknown_classes else found.images
    files = [LabelledFile(root / image.name, image.name, 0, 0, make_labels(root, [], [], [])) for image in images]
    classes = Counter(image.class_name for image in found.known)
    about = {"images": len(files), "images_without_objects": 0, "objects": classes.total(), "classes": dict(classes)}
    return files, about


def _find_doubles(files: list[LabelledFile], usable: Usable, findings: Findings) -> None:
    """Take note of objects that have the class and the box of an earlier one in their image."""
    if not len(usable.owners):
        return
    names = np.array([name for file in files for name in file.labels.class_names])
    _, class_ids = np.unique(names, return_inverse=True)
    boxes = np.concatenate([file.labels.boxes for file in files])
    keys = np.column_stack([usable.owners, class_ids, np.rint(boxes / _SAME_BOX).astype(np.int64)])
    _, first, inverse = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    earlier = first[inverse.ravel()]
    for index in np.flatnonzero(earlier != np.arange(len(keys))):
        labels = files[usable.owners[index]].labels
        place, twin = (labels.place(int(usable.positions[number])) for number in (index, earlier[index]))
        findings.add("double object", place, f"{str(names[index])!r} has the box of {twin}")


def _describe(files: list[LabelledFile], usable: Usable) -> dict[str, Any]:
    """Return what a part holds, for the summary."""
    numbers = np.bincount(usable.labels[usable.kept], minlength=len(usable.classes))
    return {
        "images": len(files),
        "images_without_objects": len(files) - len(np.unique(usable.owners[usable.kept])),
        "objects": int(usable.kept.sum()),
        "classes": dict(zip(usable.classes, numbers.tolist(), strict=True)),
    }


def _looks(every: list[tuple[str, LabelledFile]], threads: int) -> Iterator[_Look]:
    """Look at every image in threads; in order."""
    pool = ThreadPoolExecutor(threads, thread_name_prefix="check")
    try:
        yield from pool.map(_look, [file for _, file in every])
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _look(file: LabelledFile) -> _Look:
    """Decode an image."""
    faults = []
    try:
        content = file.path.read_bytes()
        pixels = _load_chip(file, content) if file.path.suffix == ".npy" else decode_image(file.path)
        if file.path.suffix != ".npy" and is_turned(file.path):
            faults.append(("turned image", "it has an EXIF orientation"))
    except (AnnotationError, OSError) as error:
        return _Look(None, (("broken image", str(error)),))
    is_blank = pixels.size == 0 or pixels.min() == pixels.max()
    return _Look(None if is_blank else hashlib.blake2b(content).digest(), tuple(faults))


def _load_chip(file: LabelledFile, content: bytes) -> NDArray[np.uint8]:
    """Return the pixels (C, H, W) of a chip.

    Raises:
        AnnotationError: they are not what the index says.
    """
    try:
        pixels: NDArray[Any] = np.load(io.BytesIO(content), allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise AnnotationError(f"chip {str(file.path)!r} is broken ({error}): cut the chips again") from error
    if pixels.dtype != np.uint8 or pixels.shape[1:] != (file.height, file.width):
        raise AnnotationError(f"chip {str(file.path)!r} is {pixels.dtype} {pixels.shape}, not what chips.json says")
    return pixels


def _summary(findings: Mapping[str, Findings], about: dict[str, Any], drop_unknown_classes: bool) -> dict[str, Any]:
    """Return the result of :func:`check_dataset`."""
    faults = []
    numbers = {"error": 0, "warning": 0}
    for kind, usual in SEVERITIES.items():
        count = sum(found.counts[kind] for found in findings.values())
        if not count:
            continue
        severity = "warning" if kind == "unknown class" and drop_unknown_classes else usual
        numbers[severity] += count
        examples = [
            {"part": part, "place": example.place, "text": example.text}
            for part, found in findings.items()
            for example in found.examples.get(kind, ())
        ]
        limit = next(iter(findings.values())).limit
        faults.append(
            {
                "kind": kind,
                "severity": severity,
                "meaning": MEANINGS[kind],
                "count": count,
                "examples": examples[:limit],
            }
        )
    return {"errors": numbers["error"], "warnings": numbers["warning"], "faults": faults, "parts": about}
