"""Chips on disk: ``chips.json`` (index, written by gis_labels.py) and one ``.npy`` uint8 (C, H, W) file a chip."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np

from rtmdet_geo.annotations.chips import ChipEntry, parse_chip
from rtmdet_geo.config import Recipe
from rtmdet_geo.errors import AnnotationError, ConfigError, DatasetNotFoundError, RTMDetGeoError
from rtmdet_geo.recipe_sections import ModelSection
from rtmdet_geo.structures import StretchSpec
from rtmdet_geo.training.labelled import LabelledImage

logger = logging.getLogger(__name__)


def load_chips(folder: Path, model: ModelSection) -> list[LabelledImage]:
    """Read the index of a folder of chips; pixels stay on disk as memory maps.

    Args:
        folder: holds ``chips.json``.
        model: what the chips must agree with: bands, classes, gsd_m, stretch.

    Returns:
        Chips in index order, bands in the model's order, labels as indices into ``model.classes``.

    Raises:
        DatasetNotFoundError: no folder, no index, or a chip that the index names is gone.
        AnnotationError: index or chip is malformed.
        ConfigError: chips were cut for another model.
    """
    index_path = folder / "chips.json"
    if not index_path.is_file():
        raise DatasetNotFoundError(
            f"no chips in {str(folder)!r} (chips.json is missing): cut them with 'rtmdet-geo data chips', or name "
            "their folder with --data or --set data.chips=FOLDER"
        )
    try:
        index = json.loads(index_path.read_text(encoding="utf-8"))
        _check_fits(index, model, index_path)
        order = [index["bands"].index(band) for band in model.bands]
        label_of = {position: _class_index(name, model, index_path) for position, name in enumerate(index["classes"])}
        return [
            _read_chip(folder, _entry(index_path, number, entry, len(label_of)), order, label_of)
            for number, entry in enumerate(index["chips"], 1)
        ]
    except RTMDetGeoError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:  # ValueError: JSON, text, numbers, stretch
        raise AnnotationError(f"{index_path} is not an index of chips ({error!r}): cut the chips again") from error


def _check_fits(index: dict[str, Any], model: ModelSection, path: Path) -> None:
    missing = [band for band in model.bands if band not in index["bands"]]
    if missing:
        raise ConfigError(f"{path}: chips have bands {index['bands']}, the recipe also wants {missing}")
    gsd_m = index["gsd_m"]
    if model.gsd_m is not None and (gsd_m is None or abs(gsd_m / model.gsd_m - 1) > 0.01):
        found = "at the scenes' own resolution" if gsd_m is None else f"at {gsd_m} m a pixel"
        raise ConfigError(f"{path}: chips were cut {found}, the recipe wants {model.gsd_m} m: cut them with --recipe")
    if StretchSpec.model_validate(index["stretch"]) != model.stretch:
        raise ConfigError(f"{path}: chips were stretched by {index['stretch']}, not as the recipe's model.stretch says")


def _class_index(name: str, model: ModelSection, path: Path) -> int:
    if name not in model.classes:
        raise ConfigError(f"{path}: class {name!r} is not among the recipe's {list(model.classes)}")
    return model.classes.index(name)


def _entry(path: Path, number: int, entry: dict[str, Any], num_classes: int) -> ChipEntry:
    try:
        return parse_chip(entry, num_classes)
    except AnnotationError as error:
        raise AnnotationError(f"{path}, chip {number}: {error}: cut the chips again") from error


def _read_chip(folder: Path, entry: ChipEntry, order: list[int], label_of: dict[int, int]) -> LabelledImage:
    path = folder / entry.file
    try:
        pixels = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise DatasetNotFoundError(
            f"chip {str(path)!r} is named in chips.json but missing: cut the chips again"
        ) from error
    except (ValueError, OSError, EOFError) as error:
        raise AnnotationError(f"chip {str(path)!r} is broken ({error}): cut the chips again") from error
    if pixels.dtype != np.uint8 or pixels.shape[1:] != (entry.height, entry.width) or len(pixels) <= max(order):
        raise AnnotationError(f"chip {str(path)!r} is {pixels.dtype} {pixels.shape}, not what chips.json says")
    labels = np.array([label_of[label] for label in entry.labels], np.int64)
    if order != list(range(len(pixels))):
        pixels = pixels[order]
    return LabelledImage(entry.file, entry.scene, pixels, entry.boxes, labels, entry.ignored, entry.outlines)


def check_outlines(chips: list[LabelledImage]) -> None:
    """Refuse chips that cannot teach masks.

    Raises:
        ConfigError: an object that is not ignored has no outline.
    """
    for chip in chips:
        outlines = chip.outlines or ((),) * len(chip.boxes)
        missing = sum(not outline and not ignored for outline, ignored in zip(outlines, chip.ignored, strict=True))
        if missing:
            raise ConfigError(
                f"{missing} objects of scene {chip.scene!r} have a box but no outline to learn masks from: cut chips "
                "from labels with polygons or masks, or take a model of boxes (rtmdet_*, rtmdet_r_*)"
            )


def split_chips(chips: list[LabelledImage], recipe: Recipe) -> tuple[list[LabelledImage], list[LabelledImage]]:
    """Return (training chips, left-out chips) by the recipe's ``data.fold``; ``data.holdout`` is in neither.

    Raises:
        ConfigError: a named scene has no chips, or nothing is left to train on.
    """
    data = recipe.data
    scenes = {chip.scene for chip in chips}
    named = set().union(*map(set, data.folds.values())) if data.folds else set()
    unknown = sorted(named - scenes)
    if unknown:
        raise ConfigError(
            f"data.folds names scenes without chips: {', '.join(unknown)}; chips have {sorted(scenes)}; to leave none "
            "out, set data.folds={} and data.fold=null"
        )
    absent = sorted(set(data.holdout) - scenes)
    if absent:
        logger.warning("data.holdout names scenes without chips: %s; chips have %s", ", ".join(absent), sorted(scenes))
    left_out = set(data.folds[data.fold]) if data.fold else set()
    training = [chip for chip in chips if chip.scene not in left_out and chip.scene not in data.holdout]
    if not any((~chip.ignored).any() for chip in training):
        raise ConfigError("no labelled object is left to train on: check data.holdout, data.fold and the chips")
    return training, [chip for chip in chips if chip.scene in left_out]
