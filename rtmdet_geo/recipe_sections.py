"""The sections of a recipe: frozen, typed, closed. Every default of training stands here and nowhere else.

:mod:`rtmdet_geo.config` reads them from YAML. Numbers of published recipes stand in the recipes (``configs/``).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

from rtmdet_geo import class_names
from rtmdet_geo.checkpoints import CHECKPOINTS, Checkpoint
from rtmdet_geo.errors import ConfigError
from rtmdet_geo.structures import Kind, ModelKind, StretchSpec
from rtmdet_geo.variants import KINDS, NMS_IOU_THRESHOLDS, VARIANTS

#: Length of a training whose recipe does not say it.
DEFAULT_ITERATIONS = 2000
#: What image files show.
IMAGE_BANDS = ("red", "green", "blue")


class Section(BaseModel):
    """A part of a recipe: frozen, and closed to keys that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSection(Section):
    """Which network, what it starts from, what goes in, what comes out.

    ``weights``: what to start from: published weights or a bundled model by name, or a file. They are loaded strictly,
    except that ``weights_parts`` loads these parts of the network only, and ``transfer`` fits to other classes (their
    layers start anew) and other bands (kernels by name, of new bands the mean). ``weights_bands``: channels in order
    that the weights are for, where a file of another program does not say them.

    ``classes``: names in label order, or the name of a public list (:data:`rtmdet_geo.class_names.KNOWN`).
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
    def kind(self) -> ModelKind:
        """What the network named gives: "rotated" or "horizontal" boxes, "mask" or "classification".

        Raises:
            ConfigError: no such network.
        """
        if self.name not in VARIANTS:
            near = difflib.get_close_matches(self.name, VARIANTS, n=3, cutoff=0.5)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ConfigError(f"model.name {self.name!r} is no network{hint}")
        return KINDS[VARIANTS[self.name].task]

    @property
    def object_kind(self) -> Kind:
        """What the detector named finds.

        Raises:
            ConfigError: no such network, or one that finds no objects.
        """
        if self.kind == "classification":
            raise ConfigError(f"model.name {self.name!r} is no detector: it classifies whole images")
        return self.kind

    @property
    def size(self) -> str:
        """The size in the network's name: "tiny", "s", "m", ..."""
        return self.name.rpartition("_")[2]

    @field_validator("classes", mode="before")
    @classmethod
    def _known_classes(cls, value: Any) -> Any:
        """Take the name of a list of public classes for the list."""
        if not isinstance(value, str):
            return value
        if value not in class_names.KNOWN:
            raise ValueError(
                f"no list of classes {value!r}: write them out or take one of {', '.join(class_names.KNOWN)}"
            )
        return class_names.KNOWN[value]

    @model_validator(mode="after")
    def _one_value_per_band(self) -> ModelSection:
        if len(self.mean) != len(self.bands) or len(self.std) != len(self.bands):
            raise ValueError(f"mean and std need one value for each of the {len(self.bands)} bands")
        if min(self.std) <= 0:
            raise ValueError(f"std must be above 0, not {list(self.std)}")
        unknown = sorted(set(self.optional_bands) - set(self.bands))
        if unknown:
            raise ValueError(f"optional_bands names {', '.join(unknown)}, but bands are {', '.join(self.bands)}")
        return self

    @field_validator("classes")
    @classmethod
    def _classes_differ(cls, classes: tuple[str, ...]) -> tuple[str, ...]:
        twice = sorted({name for name in classes if classes.count(name) > 1})
        if twice or not classes:
            raise ValueError(
                f"each class must be named once; {', '.join(twice)}" if twice else "name at least one class"
            )
        return classes

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


#: Label formats that training reads; "folders" is for classifiers: one folder of images per class.
DataFormat: TypeAlias = Literal["chips", "coco", "dota", "hrsc", "yolo_obb", "rbox", "voc", "folders"]


class DataSection(Section):
    """Where images and labels lie, which of them train and which validate.

    ``format: chips`` reads the folder ``chips`` (of ``rtmdet-geo data chips``), whose scenes ``fold`` and ``holdout``
    keep out of training; ``fold`` names the fold of scenes to leave out and score, null trains on all.

    Every other format reads ``train_images`` and ``train_labels``, and ``val_*`` likewise where they are given: paths
    below ``root``. Labels are a file (coco) or a folder with one file per image; classifiers ("folders") have none:
    each folder below ``train_images`` is a class. ``train_ids``: text file with one image name a line, to take a part,
    below ``root`` or one that comes with the recipes (``splits/``). ``repeat``: an epoch shows every image so often.
    ``difficult``: objects so marked teach like others ("keep"), are neither object nor background ("ignore"), or do not
    exist ("drop"). ``unknown_classes``: "error" refuses labels whose class is not in ``model.classes``, "drop" leaves
    them out. ``empty_images``: images without objects teach what is background ("keep"), or are not trained on
    ("drop"), as in OpenMMLab's recipes. ``hrsc_level``: 1 takes every ship as one class, 2 and 3 its class at that
    level. ``on_bad_image``: a file that does not decode stops the run, or is counted and replaced by the next image
    ("skip"). ``cache_mb``: memory for decoded images, in MB.
    """

    format: DataFormat = "chips"
    chips: str | None = None
    holdout: tuple[str, ...] = ()
    folds: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    fold: str | None = None
    root: str = "."
    train_images: str | None = None
    train_labels: str | None = None
    train_ids: str | None = None
    val_images: str | None = None
    val_labels: str | None = None
    val_ids: str | None = None
    repeat: int = Field(1, ge=1)
    difficult: Literal["keep", "ignore", "drop"] = "keep"
    unknown_classes: Literal["error", "drop"] = "error"
    empty_images: Literal["keep", "drop"] = "keep"
    hrsc_level: Literal[1, 2, 3] = 1
    on_bad_image: Literal["stop", "skip"] = "stop"
    cache_mb: int = Field(2048, ge=0)

    @model_validator(mode="after")
    def _fold_exists(self) -> DataSection:
        if self.fold is not None and self.fold not in self.folds:
            raise ValueError(f"fold {self.fold!r} is not among folds {sorted(self.folds)}")
        return self

    @model_validator(mode="after")
    def _sources_are_named(self) -> DataSection:
        if self.format == "chips":
            if self.chips is None:
                raise ValueError("chips is missing: the folder of chips; or say format and train_images")
            return self
        if self.train_images is None:
            raise ValueError(f"train_images is missing: format {self.format} needs it")
        if self.format != "folders" and (self.train_labels is None or (self.val_images and self.val_labels is None)):
            raise ValueError(f"train_labels or val_labels is missing: format {self.format} needs labels with images")
        return self


class CropAugment(Section):
    """Random crops of large images (``sampling: crops``); lengths in px of the model's ground sample distance.

    A crop looks at an object (``object_crop_prob``), at a false alarm of the network as it was when last mined
    (``false_alarm_crop_prob``), or at the liveliest of ``background_tries`` random places.
    """

    sampling: Literal["crops"] = "crops"
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


class ImageAugment(Section):
    """Whole images as OpenMMLab's recipes take them (``sampling: images``).

    Strong stage: mosaic of four images, each fitted into ``image_size``; resize by a factor between ``scale_min`` and
    ``scale_max``; rotation; crop to ``image_size``; HSV jitter; flip; mixup with an earlier sample. Images smaller than
    ``image_size`` are padded. In the last ``weak_epochs`` epochs mosaic and mixup rest. ``mosaic_cache`` and
    ``mixup_cache``: partners come from so many of the last samples; with ``random_pop`` a sample leaves that cache at
    random, without it the oldest leaves. ``axis_aligned_classes``: classes whose boxes have to stay parallel to the
    image's edges; images that show one turn by 90, 180 or 270 degrees only. ``image_sizes``: each batch takes one of
    these sizes instead of ``image_size``, drawn anew every ``image_sizes_interval`` iterations. An object is kept if at
    least ``min_visible`` of it is in the crop (0: if any is; of a rotated box the centre) and its sides are at least
    ``min_size_px``.
    """

    sampling: Literal["images"] = "images"
    image_size: int = Field(640, ge=32, multiple_of=32)
    image_sizes: tuple[int, ...] = ()
    image_sizes_interval: int = Field(10, gt=0)
    mosaic_prob: float = Field(0.0, ge=0, le=1)
    mosaic_cache: int = Field(40, ge=4)
    mosaic_random_pop: bool = True
    mixup_prob: float = Field(0.0, ge=0, le=1)
    mixup_cache: int = Field(20, ge=2)
    mixup_random_pop: bool = True
    scale_min: float = Field(1.0, gt=0)
    scale_max: float = Field(1.0, gt=0)
    hue_delta: int = Field(0, ge=0, le=90)
    saturation_delta: int = Field(0, ge=0, le=255)
    value_delta: int = Field(0, ge=0, le=255)
    flip_prob: float = Field(0.5, ge=0, le=1)
    flip_directions: tuple[Literal["horizontal", "vertical", "diagonal"], ...] = ("horizontal",)
    rotate_prob: float = Field(0.0, ge=0, le=1)
    max_rotation_deg: float = Field(180.0, ge=0, le=180)
    axis_aligned_classes: tuple[str, ...] = ()
    weak_epochs: int = Field(0, ge=0)
    min_visible: float = Field(0.0, ge=0, le=1)
    min_size_px: float = Field(1.0, ge=0)

    @field_validator("image_sizes")
    @classmethod
    def _sizes_fit_the_strides(cls, sizes: tuple[int, ...]) -> tuple[int, ...]:
        wrong = [size for size in sizes if size < 32 or size % 32]
        if wrong:
            raise ValueError(f"sizes must be multiples of 32 px, not {wrong}")
        return sizes

    @model_validator(mode="after")
    def _scales_are_ordered(self) -> ImageAugment:
        if self.scale_min > self.scale_max:
            raise ValueError(f"scale_min {self.scale_min} is above scale_max {self.scale_max}")
        if self.flip_prob > 0 and not self.flip_directions:
            raise ValueError("flip_directions is empty: name some, or set flip_prob to 0")
        return self


class ClassificationAugment(Section):
    """Images for classifiers (``sampling: classification``), as in "ResNet strikes back" (arXiv 2110.00476).

    Random resized crop to ``image_size`` of ``crop_area_min`` to all of the area, flip, RandAugment
    (``randaugment_num`` operations of ``randaugment_magnitude``, spread ``randaugment_std``), then Mixup or CutMix of
    the batch, each with its own beta distribution (0: never). ``label_smoothing`` moves that share of the target to all
    classes. Each image appears ``repeats`` times in a row, differently augmented (repeated augmentation, arXiv
    1902.05509); an epoch is as long as without, and shows that part of the images. Validation resizes the short side to
    ``eval_size`` and cuts ``image_size`` out of the centre. Files of weights have ``image_size`` for their tile size.
    """

    sampling: Literal["classification"] = "classification"
    image_size: int = Field(224, ge=32, multiple_of=32)
    eval_size: int = Field(236, ge=32)
    crop_area_min: float = Field(0.08, gt=0, le=1)
    flip_prob: float = Field(0.5, ge=0, le=1)
    randaugment_num: int = Field(2, ge=0)
    randaugment_magnitude: float = Field(7.0, ge=0, le=10)
    randaugment_std: float = Field(0.5, ge=0)
    mixup_alpha: float = Field(0.0, ge=0)
    cutmix_alpha: float = Field(0.0, ge=0)
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    repeats: int = Field(1, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _eval_size_of_the_image_size(cls, values: Any) -> Any:
        """Validate at the published ratio of 236 px to 224 px unless told otherwise."""
        if not isinstance(values, Mapping) or "eval_size" in values or not isinstance(values.get("image_size"), int):
            return values
        return {**values, "eval_size": round(values["image_size"] * 236 / 224)}

    @model_validator(mode="after")
    def _crop_fits(self) -> ClassificationAugment:
        if self.image_size > self.eval_size:
            raise ValueError(f"eval_size {self.eval_size} px is below image_size {self.image_size} px, cut out of it")
        return self


def _sampling(value: Any) -> str:
    sampling = value.get("sampling", "crops") if isinstance(value, Mapping) else getattr(value, "sampling", None)
    return str(sampling)


#: Sections of the ways to make samples, by their ``sampling``.
AUGMENT_SECTIONS: dict[str, type[Section]] = {
    "crops": CropAugment,
    "images": ImageAugment,
    "classification": ClassificationAugment,
}
#: How training makes samples of images; ``sampling`` says which.
AugmentSection: TypeAlias = Annotated[
    Annotated[CropAugment, Tag("crops")]
    | Annotated[ImageAugment, Tag("images")]
    | Annotated[ClassificationAugment, Tag("classification")],
    Discriminator(_sampling),
]


class OptimSection(Section):
    """Optimiser and schedule; the defaults are of AdamW with the flat-cosine schedule (arXiv 2212.07784, section 4.1).

    The length is ``iterations``, or ``epochs`` where images are sampled whole. ``batch_size`` is that of one process
    and one step of ``accumulate``: the optimiser sees batch_size x accumulate x processes samples. ``lr`` is for
    ``lr_for_batch`` samples and scaled linearly to the batch there is; null takes it as it stands. ``schedule``:
    "flat_cosine" falls from half of the training on, "cosine" from the end of the warm-up; both end at
    ``lr_min_factor`` x lr. Warm-up is ``warmup_iterations`` or ``warmup_epochs`` long and begins at ``warmup_factor``
    x lr. ``freeze``: parts whose parameters stay as they are, by name ("backbone", "backbone.stage1"), their batch
    norms too. ``layer_decay``: factor on the rate for every stage further from the head. ``norm_eval``: batch norms
    keep their averages.
    """

    optimizer: Literal["adamw", "lamb"] = "adamw"
    lr: float = Field(1e-3, gt=0, le=1000)
    lr_for_batch: int | None = Field(None, gt=0)
    lr_min_factor: float = Field(0.05, ge=0, le=1)
    weight_decay: float = Field(0.05, ge=0)
    schedule: Literal["flat_cosine", "cosine"] = "flat_cosine"
    warmup_iterations: int = Field(100, ge=0)
    warmup_epochs: int | None = Field(None, ge=0)
    warmup_factor: float = Field(1e-5, gt=0, le=1)
    iterations: int | None = Field(None, gt=0)
    epochs: int | None = Field(None, gt=0)
    batch_size: int = Field(8, gt=0)
    accumulate: int = Field(1, gt=0)
    clip_grad_norm: float | None = Field(35.0, gt=0)
    ema_momentum: float = Field(2e-4, gt=0, lt=1)
    ema_gamma: int = Field(2000, gt=0)
    freeze: tuple[str, ...] = ()
    layer_decay: float = Field(1.0, gt=0, le=1)
    norm_eval: bool = False

    @model_validator(mode="before")
    @classmethod
    def _some_length(cls, values: Any) -> Any:
        given = isinstance(values, Mapping) and any(values.get(key) is not None for key in ("iterations", "epochs"))
        return values if given or not isinstance(values, Mapping) else {**values, "iterations": DEFAULT_ITERATIONS}

    @model_validator(mode="after")
    def _one_length(self) -> OptimSection:
        if self.iterations is not None and self.epochs is not None:
            raise ValueError("iterations and epochs are both given: set one of them to null")
        return self


class LoopSection(Section):
    """How training runs: what it writes and when, on how many threads and in which numbers.

    ``mine_interval``: iterations between searches for false alarms (0: never), ``workers``: threads that prepare
    samples. ``precision``: numbers of the forward pass; "auto" is bf16 on CUDA and fp32 on CPU, "fp16" scales the loss.
    ``deterministic``: only operations that give the same bits again. ``sync_bn``: batch statistics over all processes
    (CUDA). ``early_stop``: validations without improvement before training ends (0: never).
    """

    seed: int = Field(0, ge=0)
    log_interval: int = Field(20, gt=0)
    checkpoint_interval: int = Field(200, gt=0)
    mine_interval: int = Field(0, ge=0)
    workers: int = Field(1, ge=0)
    channels_last: bool = True
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    compile: bool = False
    deterministic: bool = False
    sync_bn: bool = True
    early_stop: int = Field(0, ge=0)
    tensorboard: bool = True


class ValidationSection(Section):
    """How left-out images are scored, over detections at or above the score, and when.

    ``protocol``: "area" is the area under the whole curve, "voc07" the mean of 11 points (HRSC2016, DOTA), each at
    every IoU of ``iou_thresholds``; "coco" is COCO's own. The IoU is that of the model's kind: of boxes, or of masks.
    ``nms_iou_threshold``: the kind's own when not given (:data:`rtmdet_geo.variants.NMS_IOU_THRESHOLDS`).
    ``mask_threshold``: probability above which a pixel belongs to a mask. ``max_detections``: best so many per image.

    Besides the end of the training, validation runs every ``interval_epochs`` epochs, every ``late_interval_epochs`` in
    the last ``late_epochs``, or every ``interval`` iterations (0: not so). ``best.safetensors`` is the state with the
    highest first figure.
    """

    protocol: Literal["area", "voc07", "coco"] = "area"
    interval: int = Field(0, ge=0)
    interval_epochs: int = Field(0, ge=0)
    late_epochs: int = Field(0, ge=0)
    late_interval_epochs: int = Field(1, ge=1)
    score_threshold: float = Field(0.05, ge=0, le=1)
    max_detections: int = Field(2000, gt=0)
    iou_thresholds: tuple[float, ...] = Field((0.25, 0.5), min_length=1)
    nms_iou_threshold: float = Field(NMS_IOU_THRESHOLDS["rotated"], ge=0, le=1)
    mask_threshold: float = Field(0.5, gt=0, lt=1)
    drop_bands: tuple[tuple[str, ...], ...] = Field(((),), min_length=1)


class CardSection(Section):
    """What the model card says; travels inside every file made from this recipe."""

    training_data: str = ""
    limits: str = ""
    licence: str = ""
    attribution: str = ""
    metrics: dict[str, float] = Field(default_factory=dict)
