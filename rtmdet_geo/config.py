"""Recipes: one YAML file per dataset and task, read into frozen, typed objects.

``base: other.yaml`` inherits from one parent (two levels at most): mappings merge, lists and scalars replace. Values
may be changed with ``KEY=VALUE`` overrides (``optim.lr=1e-3``). An unknown key is an error that names its nearest
neighbour. Defaults live here and nowhere else.
"""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from rtmdet_geo.checkpoints import CHECKPOINTS, Checkpoint
from rtmdet_geo.errors import ConfigError
from rtmdet_geo.structures import Kind, StretchSpec
from rtmdet_geo.variants import KINDS, NMS_IOU_THRESHOLDS, VARIANTS

_MAX_BASE_DEPTH = 2


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSection(_Section):
    """Which network, what it starts from, what goes in, what comes out.

    ``weights``: what to start from: published weights or a bundled model by name, or a file. They are loaded strictly,
    except that ``weights_parts`` loads these parts of the network only, and ``transfer`` fits to other classes (their
    layers start anew) and other bands (kernels by name, of new bands the mean). ``weights_bands``: channels in order
    that the weights are for, where a file of another program does not say them.
    """

    name: str = "rtmdet_r_tiny"
    weights: str | None = None
    weights_parts: tuple[str, ...] | None = None
    weights_bands: tuple[str, ...] | None = None
    transfer: bool = False
    classes: tuple[str, ...]
    bands: tuple[str, ...] = ("red", "green", "blue")
    optional_bands: dict[str, int] = Field(default_factory=dict)
    mean: tuple[float, ...] = (123.675, 116.28, 103.53)
    std: tuple[float, ...] = (58.395, 57.12, 57.375)
    gsd_m: float | None = Field(None, gt=0)
    trained_gsd_m: tuple[float, float] | None = None
    stretch: StretchSpec = Field(default_factory=StretchSpec)
    tile_size: int = Field(1024, ge=32, multiple_of=32)
    overlap: int = Field(200, ge=0)
    score_threshold: float = Field(0.3, ge=0, le=1)

    @property
    def kind(self) -> Kind:
        """What the network named finds: "rotated", "horizontal" or "mask".

        Raises:
            ConfigError: no such network, or one that finds no objects.
        """
        kind = KINDS[VARIANTS[self.name].task] if self.name in VARIANTS else None
        if kind is None or kind == "classification":
            near = difflib.get_close_matches(
                self.name, [n for n in VARIANTS if n.startswith("rtmdet")], n=3, cutoff=0.5
            )
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ConfigError(f"model.name {self.name!r} is no detector{hint}")
        return kind

    @model_validator(mode="after")
    def _one_value_per_band(self) -> ModelSection:
        if len(self.mean) != len(self.bands) or len(self.std) != len(self.bands):
            raise ValueError(f"mean and std need one value for each of the {len(self.bands)} bands")
        unknown = sorted(set(self.optional_bands) - set(self.bands))
        if unknown:
            raise ValueError(f"optional_bands names {', '.join(unknown)}, but bands are {', '.join(self.bands)}")
        return self

    @model_validator(mode="after")
    def _weights_can_be_loaded_so(self) -> ModelSection:
        asked = {
            "weights_parts": self.weights_parts is not None,
            "weights_bands": self.weights_bands is not None,
            "transfer": self.transfer,
        }
        if self.weights is None and any(asked.values()):
            names = [name for name, is_given in asked.items() if is_given]
            raise ValueError(f"{' and '.join(names)}: there are no weights to load; name them with weights")
        if self.weights_parts is not None:
            _check_parts(self.weights_parts, self.name)
        if self.weights_bands is not None and not self.transfer and self.weights_bands != self.bands:
            raise ValueError(
                f"weights_bands {', '.join(self.weights_bands)} are not bands {', '.join(self.bands)}; transfer: true "
                "fits weights to other bands"
            )
        if self.weights in CHECKPOINTS:
            self._check_published(CHECKPOINTS[self.weights])
        return self

    def _check_published(self, checkpoint: Checkpoint) -> None:
        """Refuse published weights that cannot be loaded as the recipe says."""
        if self.weights_bands is not None and self.weights_bands != checkpoint.bands:
            raise ValueError(f"{checkpoint.name!r} is for bands {', '.join(checkpoint.bands)}; leave weights_bands out")
        reason = checkpoint.misfit(
            self.name, len(self.classes), self.bands, parts=self.weights_parts, transfer=self.transfer
        )
        if reason and self.name in VARIANTS:
            raise ValueError(reason)


def _check_parts(parts: tuple[str, ...], network: str) -> None:
    """Refuse parts that a network does not have, that are named twice, or none."""
    is_classifier = network in VARIANTS and VARIANTS[network].task == "classification"
    known = ("backbone", "head") if is_classifier else ("backbone", "neck", "bbox_head")
    if not parts or len(set(parts)) != len(parts) or not set(parts) <= set(known):
        raise ValueError(
            f"weights_parts must name some of {', '.join(known)}, each once, not {list(parts)!r}; null loads them all"
        )


class DataSection(_Section):
    """Where chips lie and which scenes train. ``fold`` names the fold of scenes to leave out; null trains on all."""

    chips: str
    holdout: tuple[str, ...] = ()
    folds: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    fold: str | None = None

    @model_validator(mode="after")
    def _fold_exists(self) -> DataSection:
        if self.fold is not None and self.fold not in self.folds:
            raise ValueError(f"fold {self.fold!r} is not among folds {sorted(self.folds)}")
        return self


class AugmentSection(_Section):
    """Random changes of a training crop; lengths in px of the model's ground sample distance.

    A crop looks at an object (``object_crop_prob``), at a false alarm of the network as it was when last mined
    (``false_alarm_crop_prob``), or at the liveliest of ``background_tries`` random places.
    """

    crop_size: int = Field(512, ge=32, multiple_of=32)
    object_crop_prob: float = Field(0.5, ge=0, le=1)
    false_alarm_crop_prob: float = Field(0.0, ge=0, le=1)
    background_tries: int = Field(3, ge=1)
    mosaic_prob: float = Field(0.3, ge=0, le=1)
    max_rotation_deg: float = Field(180.0, ge=0, le=180)
    flip_prob: float = Field(0.5, ge=0, le=1)
    scale_min: float = Field(0.75, gt=0)
    scale_max: float = Field(1.35, gt=0)
    gain: float = Field(0.2, ge=0, lt=1)
    band_gain: float = Field(0.08, ge=0, lt=1)
    offset: float = Field(12.0, ge=0)
    gamma: float = Field(0.2, ge=0)
    noise: float = Field(2.0, ge=0)
    blur_prob: float = Field(0.1, ge=0, le=1)
    band_dropout: dict[str, float] = Field(default_factory=dict)
    min_visible: float = Field(0.6, ge=0, le=1)
    min_size_px: float = Field(2.0, ge=0)


class OptimSection(_Section):
    """AdamW with the flat-cosine schedule (arXiv 2212.07784, section 4.1)."""

    lr: float = Field(1e-3, gt=0)
    lr_min_factor: float = Field(0.05, ge=0, le=1)
    weight_decay: float = Field(0.05, ge=0)
    warmup_iterations: int = Field(100, ge=0)
    iterations: int = Field(2000, gt=0)
    batch_size: int = Field(8, gt=0)
    clip_grad_norm: float = Field(35.0, gt=0)
    ema_momentum: float = Field(2e-4, gt=0, lt=1)
    ema_gamma: int = Field(2000, gt=0)


class LoopSection(_Section):
    """How often to write and to mine false alarms (0: never), and how many threads prepare crops."""

    seed: int = 0
    log_interval: int = Field(20, gt=0)
    checkpoint_interval: int = Field(200, gt=0)
    mine_interval: int = Field(0, ge=0)
    workers: int = Field(1, ge=0)
    channels_last: bool = True


class ValidationSection(_Section):
    """How left-out scenes are scored: all-point AP at each IoU, over detections at or above the score.

    The IoU is that of the model's kind: of boxes, or of masks. ``nms_iou_threshold``: the kind's own when not given
    (:data:`rtmdet_geo.variants.NMS_IOU_THRESHOLDS`). ``mask_threshold``: probability above which a pixel belongs to a
    mask.
    """

    score_threshold: float = Field(0.05, ge=0, le=1)
    iou_thresholds: tuple[float, ...] = (0.25, 0.5)
    nms_iou_threshold: float = Field(NMS_IOU_THRESHOLDS["rotated"], ge=0, le=1)
    mask_threshold: float = Field(0.5, gt=0, lt=1)
    drop_bands: tuple[tuple[str, ...], ...] = ((),)


class CardSection(_Section):
    """What the model card says; travels inside every file made from this recipe."""

    training_data: str = ""
    limits: str = ""
    licence: str = ""
    attribution: str = ""
    metrics: dict[str, float] = Field(default_factory=dict)


class Recipe(_Section):
    """A whole training run."""

    name: str
    model: ModelSection
    data: DataSection
    augment: AugmentSection = Field(default_factory=AugmentSection)
    optim: OptimSection = Field(default_factory=OptimSection)
    loop: LoopSection = Field(default_factory=LoopSection)
    validation: ValidationSection = Field(default_factory=ValidationSection)
    card: CardSection = Field(default_factory=CardSection)

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
        dropped = set(self.augment.band_dropout).union(*self.validation.drop_bands)
        lacking = sorted(dropped - set(self.model.optional_bands))
        if lacking:
            raise ValueError(
                f"augment.band_dropout or validation.drop_bands names {', '.join(lacking)}, which has no fill value in "
                "model.optional_bands"
            )
        return self

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
    values = _read(path, depth=0)
    for override in overrides:
        _apply_override(values, override)
    return parse_recipe(values, source=str(path))


def parse_recipe(values: Mapping[str, Any], *, source: str = "recipe") -> Recipe:
    """Validate a mapping as a recipe.

    Raises:
        ConfigError: see :func:`load_recipe`.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{source}: {_explain(error)}") from error


def _read(path: Path, depth: int) -> dict[str, Any]:
    if depth > _MAX_BASE_DEPTH:
        raise ConfigError(f"{path}: 'base:' goes deeper than {_MAX_BASE_DEPTH} levels; write the values out")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping of sections, not {type(values).__name__}")
    base = values.pop("base", None)
    if base is None:
        return values
    parent = path.parent / str(base)
    if not parent.is_file():
        raise ConfigError(f"{path}: base {base!r} is not a file beside it")
    return _merge(_read(parent, depth + 1), values)


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
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = _known_keys(first["loc"][:-1])
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known keys: {', '.join(known)}"
        return f"unknown key {where!r}{hint}"
    if first["type"] == "value_error":  # of our own validators: the message says all, the input is a whole section
        message = first["msg"].removeprefix("Value error, ")
        return f"{where}: {message}" if where else message
    if first["type"] == "missing":  # its input is the whole section
        return f"{where} is missing"
    return f"{where}: {first['msg']} (got {first.get('input')!r})"


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    model: Any = Recipe
    for part in location:
        annotation = model.model_fields[str(part)].annotation
        candidates = [annotation, *typing.get_args(annotation)]
        model = next(item for item in candidates if isinstance(item, type) and issubclass(item, BaseModel))
    return list(model.model_fields)
