"""The images and labels that a recipe's data section names, in every format of detectors."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

import numpy as np

from rtmdet_geo.annotations.findings import MEANINGS, Findings
from rtmdet_geo.annotations.parts import LabelledFile, Part, part_source, read_part
from rtmdet_geo.annotations.usable import Usable, sift
from rtmdet_geo.config import Recipe
from rtmdet_geo.errors import AnnotationError, ConfigError
from rtmdet_geo.recipe_sections import DataSection, ModelSection
from rtmdet_geo.training.chips import load_chips, split_chips
from rtmdet_geo.training.image_files import ImageCache, ImageFile
from rtmdet_geo.training.labelled import LabelledImage

logger = logging.getLogger(__name__)

#: Faults that training does not pass over.
_REFUSED = frozenset({"malformed labels", "labels without image", "ambiguous image", "other image size"})
#: What happens to the rest, for the log.
_WHAT_HAPPENS = {
    "broken image": "left out",
    "unknown class": "objects left out",
    "zero area": "objects left out",
    "outside": "objects left out",
}


def load_datasets(recipe: Recipe) -> tuple[list[LabelledImage], list[LabelledImage]]:
    """Return (images to train on, images left out to validate on) of a recipe for detectors.

    ``data.repeat`` is left to the sampler. Both parts share one cache of ``data.cache_mb``.

    Args:
        recipe: with ``data.format`` anything but "folders".

    Raises:
        DatasetNotFoundError: a folder or file is missing or empty.
        AnnotationError: labels or images are not what they should be.
        ConfigError: data and recipe do not fit, or there is no object to train on.
    """
    data = recipe.data
    if data.format == "chips":
        return split_chips(load_chips(Path(data.chips or ""), recipe.model), recipe)
    cache = ImageCache.of_recipe(data)
    training = load_images(data, recipe.model, "train", cache)
    if not any((~image.ignored).any() for image in training):
        raise ConfigError(
            f"no labelled object is left to train on in {data.train_labels!r} below {data.root!r}: "
            "check model.classes, data.difficult and data.train_ids"
        )
    left_out = load_images(data, recipe.model, "val", cache) if data.val_images is not None else []
    return training, left_out


def load_images(
    data: DataSection, model: ModelSection, part: Part, cache: ImageCache | None = None
) -> list[LabelledImage]:
    """Read labels and image headers of a part; pixels are decoded when they are asked for.

    Objects without area or outside their image are left out, as are those of classes that are not the model's where
    ``data.unknown_classes`` is "drop"; the log says how many. Boxes partly outside stay. Regions of crowds are ignored.
    Images to train on of which no object is left stay as background, unless ``data.empty_images`` is "drop".

    Args:
        data: with a format of image files: coco, dota, hrsc, yolo_obb, rbox or voc.
        model: classes, bands and kind of network.
        part: which of the section's paths to read.
        cache: for decoded images; None makes one of ``data.cache_mb``.

    Returns:
        Images in the order of their names (coco: of the file). Rotated models get least-area boxes, others enclosing
        ones, models of masks outlines too.

    Raises:
        DatasetNotFoundError: a folder or file is missing or empty.
        AnnotationError: a label file is malformed, labels have no image, or an image is not readable and
            ``data.on_bad_image`` is "stop".
        ConfigError: the format is none of these, or labels have classes that are not the model's.
    """
    source = part_source(data, model, part)
    findings = Findings()
    files = read_part(source, findings)
    usable = sift(files, model.classes, findings)
    _refuse(data, files, usable, findings)
    _report(part, files, usable, findings)
    if cache is None:
        cache = ImageCache.of_recipe(data)
    images = [_labelled_image(file, *usable.of_image(index), data, model, cache) for index, file in enumerate(files)]
    if part == "val" or data.empty_images == "keep":
        return images
    return [image for image in images if not image.ignored.all()]


def _refuse(data: DataSection, files: list[LabelledFile], usable: Usable, findings: Findings) -> None:
    """Raise the first fault that training does not pass over."""
    refused = _REFUSED | ({"broken image"} if data.on_bad_image == "stop" else set())
    fault = findings.first(refused)
    if fault is not None:
        kind, number, example = fault
        more = f" (and {number - 1} more faults of this kind: 'rtmdet-geo data check' lists them)" if number > 1 else ""
        raise AnnotationError(f"{kind}: {example}{more}")
    if data.unknown_classes == "error" and findings.counts["unknown class"]:
        names = [name for file in files for name in file.labels.class_names]
        unknown = Counter(name for name, label in zip(names, usable.labels, strict=True) if label < 0)
        counted = ", ".join(f"{name!r} ({number})" for name, number in unknown.most_common(10))
        raise ConfigError(
            f"{sum(unknown.values())} objects have classes that are not in model.classes: {counted}; the first is at "
            f"{findings.examples['unknown class'][0].place}. Add them to model.classes, or set "
            "data.unknown_classes=drop to leave them out"
        )


def _report(part: Part, files: list[LabelledFile], usable: Usable, findings: Findings) -> None:
    """Log how much there is, and each kind of fault that was passed over with its first example."""
    background = len(files) - len(np.unique(usable.owners[usable.kept]))
    logger.info(
        "%s: %d images (%d of them without objects), %d objects", part, len(files), background, usable.kept.sum()
    )
    for kind, number in findings.counts.items():
        if kind == "absent class":
            continue
        is_loss = kind in _WHAT_HAPPENS or kind == "image without labels"
        logger.log(
            logging.WARNING if is_loss else logging.INFO,
            "%s: %d x %s (%s), such as %s",
            part,
            number,
            kind,
            _WHAT_HAPPENS.get(kind, MEANINGS[kind]),
            findings.examples[kind][0],
        )
    absent = sorted(set(range(len(usable.classes))) - set(usable.labels[usable.kept].tolist()))
    if absent:
        logger.log(
            logging.WARNING if part == "train" else logging.INFO,
            "%s: no object of %d of the %d classes: %s",
            part,
            len(absent),
            len(usable.classes),
            ", ".join(usable.classes[label] for label in absent[:10]) + (", ..." if len(absent) > 10 else ""),
        )


def _labelled_image(
    file: LabelledFile,
    positions: np.ndarray,
    labels: np.ndarray,
    data: DataSection,
    model: ModelSection,
    cache: ImageCache,
) -> LabelledImage:
    """Return an image with those of its objects that stand at ``positions`` (K,)."""
    found = file.labels
    if data.difficult == "drop":
        easy = ~found.difficult[positions]
        positions, labels = positions[easy], labels[easy]
    ignored = found.crowd[positions]
    if data.difficult == "ignore":
        ignored = ignored | found.difficult[positions]
    return LabelledImage(
        file.name,
        file.name,
        ImageFile(file.path, file.width, file.height, model.bands, cache),
        found.boxes[positions],
        labels,
        ignored,
        tuple(found.outlines[position] for position in positions) if found.outlines else (),
        None if found.areas is None else found.areas[positions],
    )
