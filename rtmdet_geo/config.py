"""Recipes: one YAML file per dataset and task, read into frozen, typed objects.

``base: other.yaml`` inherits from one parent (two levels at most): mappings merge, lists and scalars replace. A table
``by_size:`` holds what differs between the sizes of a network: the row of the size in ``model.name`` is merged over the
other values of its file. ``KEY=VALUE`` overrides (``optim.lr=1e-3``) go last. An unknown key is an error that names its
nearest neighbour. Sections and their defaults stand in :mod:`rtmdet_geo.recipe_sections`.
"""

from __future__ import annotations

import copy
import difflib
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from rtmdet_geo.errors import ConfigError
from rtmdet_geo.recipe_sections import (
    AUGMENT_SECTIONS,
    DEFAULT_ITERATIONS,
    IMAGE_BANDS,
    AugmentSection,
    CardSection,
    CropAugment,
    DataSection,
    ImageAugment,
    LoopSection,
    ModelSection,
    OptimSection,
    Section,
    ValidationSection,
)
from rtmdet_geo.variants import KINDS, NMS_IOU_THRESHOLDS, VARIANTS

_MAX_BASE_DEPTH = 2


class Recipe(Section):
    """A whole training run."""

    name: str
    model: ModelSection
    data: DataSection
    augment: AugmentSection = Field(default_factory=CropAugment)
    optim: OptimSection = Field(default_factory=lambda: OptimSection(iterations=DEFAULT_ITERATIONS))
    loop: LoopSection = Field(default_factory=LoopSection)
    validation: ValidationSection = Field(default_factory=ValidationSection)
    card: CardSection = Field(default_factory=CardSection)

    @model_validator(mode="before")
    @classmethod
    def _sampling_of_the_format(cls, values: Any) -> Any:
        """Fill in ``augment.sampling``: crops of chips, whole images of the other formats, classes of folders."""
        if not isinstance(values, Mapping) or not isinstance(values.get("data"), Mapping):
            return values
        augment, of_data = values.get("augment", {}), values["data"].get("format", "chips")
        if not isinstance(augment, Mapping) or "sampling" in augment:
            return values
        sampling = {"chips": "crops", "folders": "classification"}.get(str(of_data), "images")
        return {**values, "augment": {**augment, "sampling": sampling}}

    @model_validator(mode="before")
    @classmethod
    def _nms_of_the_kind(cls, values: Any) -> Any:
        """Fill in the default of ``validation.nms_iou_threshold``; what is malformed is left to the sections."""
        if not isinstance(values, Mapping) or not isinstance(values.get("model"), Mapping):
            return values
        name = values["model"].get("name", ModelSection.model_fields["name"].default)
        validation = values.get("validation", {})
        variant = VARIANTS.get(name) if isinstance(name, str) else None
        if variant is None or variant.task == "classification" or not isinstance(validation, Mapping):
            return values
        threshold = NMS_IOU_THRESHOLDS[KINDS[variant.task]]
        return {**values, "validation": {"nms_iou_threshold": threshold, **validation}}

    @model_validator(mode="after")
    def _dropped_bands_have_fill_values(self) -> Recipe:
        dropped = set().union(*self.validation.drop_bands)
        if isinstance(self.augment, CropAugment):
            dropped |= set(self.augment.band_dropout)
        lacking = sorted(dropped - set(self.model.optional_bands))
        if lacking:
            raise ValueError(
                f"augment.band_dropout or validation.drop_bands names {', '.join(lacking)}, which has no fill value in "
                "model.optional_bands"
            )
        return self

    @model_validator(mode="after")
    def _sections_agree(self) -> Recipe:
        """Refuse sections that contradict each other."""
        model, data, augment = self.model, self.data, self.augment
        if model.name not in VARIANTS:
            return self  # refused by its own error where the network is built
        is_classifier = model.kind == "classification"
        if is_classifier != (augment.sampling == "classification") or is_classifier != (data.format == "folders"):
            raise ValueError(
                f"model.name {model.name}, augment.sampling {augment.sampling} and data.format {data.format} do not go "
                "together: classifiers take 'classification' and 'folders', detectors anything else"
            )
        if data.format != "chips" and not set(model.bands) <= set(IMAGE_BANDS):
            raise ValueError(
                f"model.bands: images have {', '.join(IMAGE_BANDS)}; for other bands cut chips from scenes"
            )
        if data.format != "chips" and (model.stretch.kind == "percentile" or model.stretch.dark_percent is not None):
            raise ValueError(
                "model.stretch: images are trained on as they are, so scenes cannot be stretched by percentiles later; "
                "take {kind: none}, or cut chips from scenes"
            )
        if isinstance(augment, CropAugment) and self.optim.epochs is not None:
            raise ValueError("optim.epochs: random crops know no epoch; give optim.iterations")
        if isinstance(augment, ImageAugment):
            unknown = sorted(set(augment.axis_aligned_classes) - set(model.classes))
            if unknown:
                raise ValueError(f"augment.axis_aligned_classes names {', '.join(unknown)}, not among model.classes")
        if self.validation.protocol == "coco" and model.kind not in ("horizontal", "mask"):
            raise ValueError(f"validation.protocol coco is for axis-aligned boxes and masks, {model.name} has neither")
        if self.loop.early_stop and not (self.validation.interval or self.validation.interval_epochs):
            raise ValueError("loop.early_stop counts validations: set validation.interval_epochs or .interval")
        idle = self._settings_without_effect()
        if idle:
            raise ValueError(f"{', '.join(idle)}: no effect with {augment.sampling} of {data.format}; leave them out")
        return self

    def _settings_without_effect(self) -> list[str]:
        """Name what is set, to no avail, because samples are made in another way."""
        data, validation, loop = self.data, self.validation, self.loop
        is_crops, is_chips = isinstance(self.augment, CropAugment), data.format == "chips"
        checks = {
            "data.repeat": is_crops and data.repeat > 1,
            "validation.interval_epochs": is_crops and validation.interval_epochs > 0,
            "optim.warmup_epochs": is_crops and self.optim.warmup_epochs is not None,
            "loop.mine_interval": not is_crops and loop.mine_interval > 0,
            "data.train_ids": is_chips and data.train_ids is not None,
            "data.val_ids": is_chips and data.val_ids is not None,
            "data.holdout": not is_chips and bool(data.holdout),
            "data.fold": not is_chips and data.fold is not None,
        }
        return [name for name, is_idle in checks.items() if is_idle]

    def with_data(self, folder: str | Path | None) -> Recipe:
        """Return the recipe with its data elsewhere: a folder for ``data.chips`` or ``data.root``; None: as it is."""
        if folder is None:
            return self
        key = "chips" if self.data.format == "chips" else "root"
        return self.model_copy(update={"data": self.data.model_copy(update={key: str(folder)})})

    def to_yaml(self) -> str:
        """Return the resolved recipe as YAML that :func:`load_recipe` reads back to an equal object."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def recipe_folder() -> Path:
    """Return the folder of the recipes that come with the package (wheel) or the clone."""
    packaged = Path(__file__).parent / "_configs"
    return packaged if packaged.is_dir() else Path(__file__).parent.parent / "configs"


def recipe_names() -> list[str]:
    """Return the names of the recipes that come with the package."""
    return sorted(path.stem for path in recipe_folder().glob("*.yaml"))


def find_recipe(name_or_path: str | Path) -> Path:
    """Return the file of a recipe given by path or by name (``sen2ships_r``).

    Raises:
        ConfigError: neither a file nor a known name.
    """
    path = Path(name_or_path)
    if path.is_file():
        return path
    packaged = recipe_folder() / f"{path.name.removesuffix('.yaml')}.yaml"
    if packaged.is_file():
        return packaged
    raise ConfigError(f"no recipe {str(name_or_path)!r}: give a YAML file or one of {', '.join(recipe_names())}")


def load_recipe(name_or_path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe, resolve ``base:``, apply ``KEY=VALUE`` overrides, and check every key and value.

    Args:
        name_or_path: a YAML file, or the name of a recipe that comes with the package.
        overrides: ``section.key=value`` strings; the value is read as YAML.

    Raises:
        ConfigError: unknown key (with the nearest known one), wrong type or range, malformed YAML or override.
    """
    path = find_recipe(name_or_path)
    overrides = list(overrides)
    layers = _read(path, depth=0)
    plain: dict[str, Any] = {}
    for layer in layers:
        plain = _merge(plain, layer.values)
    size = _size(_overridden(plain, overrides))
    values: dict[str, Any] = {}
    for layer in layers:  # a file goes before what its base says of a size
        values = _merge(_merge(values, layer.values), layer.by_size.get(size, {}))
    return parse_recipe(_overridden(values, overrides), source=str(path))


def parse_recipe(values: Mapping[str, Any], *, source: str = "recipe") -> Recipe:
    """Validate a mapping as a recipe.

    Raises:
        ConfigError: see :func:`load_recipe`.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{source}: {_explain(error)}") from error


class _Layer(NamedTuple):
    """One file of a recipe: what it says of every size, and what of each."""

    values: dict[str, Any]
    by_size: dict[str, dict[str, Any]]


def _read(path: Path, depth: int) -> list[_Layer]:
    """Return a recipe file with the files that it is based on, the outermost base first."""
    if depth > _MAX_BASE_DEPTH:
        raise ConfigError(f"{path}: 'base:' goes deeper than {_MAX_BASE_DEPTH} levels; write the values out")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping of sections, not {type(values).__name__}")
    base, by_size = values.pop("base", None), values.pop("by_size", None)
    layer = _Layer(values, _checked_rows(by_size or {}, path))
    if base is None:
        return [layer]
    parent = path.parent / str(base)
    if not parent.is_file():
        raise ConfigError(f"{path}: base {base!r} is not a file beside it")
    return [*_read(parent, depth + 1), layer]


def _checked_rows(by_size: Any, path: Path) -> dict[str, dict[str, Any]]:
    """Refuse a ``by_size:`` table that is no mapping of sizes to sections."""
    sizes = {name.rpartition("_")[2] for name in VARIANTS}
    if not isinstance(by_size, dict) or not all(isinstance(row, dict) for row in by_size.values()):
        raise ConfigError(f"{path}: by_size must map sizes to sections, such as 'tiny: {{optim: {{lr: 1e-3}}}}'")
    unknown = sorted(str(size) for size in by_size if size not in sizes)
    if unknown:
        raise ConfigError(f"{path}: by_size names {', '.join(unknown)}; sizes are {', '.join(sorted(sizes))}")
    return by_size


def _size(values: Mapping[str, Any]) -> str:
    """Return the size in ``model.name``: "tiny", "s", ..."""
    model = values.get("model")
    name = model.get("name", ModelSection.model_fields["name"].default) if isinstance(model, dict) else ""
    return str(name).rpartition("_")[2]


def _overridden(values: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Return values with ``KEY=VALUE`` overrides applied; the values given stay as they are."""
    changed = copy.deepcopy(dict(values))
    for override in overrides:
        _apply_override(changed, override)
    return changed


def _merge(parent: dict[str, Any], child: dict[str, Any]) -> dict[str, Any]:
    merged = dict(parent)
    for key, value in child.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _apply_override(values: dict[str, Any], override: str) -> None:
    dotted, separator, text = override.partition("=")
    if not separator or not dotted:
        raise ConfigError(f"override {override!r} is not KEY=VALUE, such as optim.lr=1e-3")
    *sections, key = dotted.strip().split(".")
    target = values
    for section in sections:
        target = target.setdefault(section, {})
        if not isinstance(target, dict):
            raise ConfigError(f"override {override!r}: {section!r} is a value, not a section")
    try:
        target[key] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not YAML") from error


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    location = [str(part) for part in first["loc"]]
    where = ".".join(part for number, part in enumerate(location) if not _is_tag(location, number))
    if first["type"] == "extra_forbidden":
        known = _known_keys(location[:-1])
        near = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known keys: {', '.join(known)}"
        return f"unknown key {where!r}{hint}"
    if first["type"] == "value_error":  # of our own validators: the message says all, the input is a whole section
        message = first["msg"].removeprefix("Value error, ")
        return f"{where}: {message}" if where else message
    if first["type"] == "missing":  # its input is the whole section
        return f"{where} is missing"
    return f"{where}: {first['msg']} (got {first.get('input')!r})"


def _is_tag(location: list[str], number: int) -> bool:
    """Say whether a part of a place is pydantic's tag of the kind of augmentation, not a key."""
    return number == 1 and location[0] == "augment" and location[1] in AUGMENT_SECTIONS


def _known_keys(location: list[str]) -> list[str]:
    model: Any = Recipe
    for number, part in enumerate(location):
        if _is_tag(location, number):
            model = AUGMENT_SECTIONS[part]
            continue
        annotation = model.model_fields[part].annotation
        candidates = [annotation, *typing.get_args(annotation)]
        model = next((item for item in candidates if isinstance(item, type) and issubclass(item, BaseModel)), None)
    return list(model.model_fields)
