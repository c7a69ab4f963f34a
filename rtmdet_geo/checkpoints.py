"""Every published checkpoint: where it lies, what it was trained on, how to feed it, what it scored. No torch.

Tables: README of configs/rtmdet (and its folder classification) in MMDetection 3.x, README of configs/rotated_rtmdet in
MMRotate 1.x. OpenMMLab ends a file's name with the first eight digits of its SHA-256; downloads are checked by them.
"""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rtmdet_geo import class_names
from rtmdet_geo.cache import cache_dir, download
from rtmdet_geo.errors import UnknownModelError
from rtmdet_geo.variants import KINDS, NMS_IOU_THRESHOLDS, VARIANTS, Task

if TYPE_CHECKING:
    from rtmdet_geo.structures import ModelSpec

#: Mean and standard deviation of ImageNet's channels, red green blue, on the scale of uint8 (every published recipe).
_MEAN_RGB = (123.675, 116.28, 103.53)
_STD_RGB = (58.395, 57.12, 57.375)

_HOST = "https://download.openmmlab.com"

#: What to do about other classes or bands.
TRANSFER_HINT = "transfer=True (model.transfer in a recipe) fits them to other classes and bands"


@dataclass(frozen=True, slots=True)
class DataSet:
    """What checkpoints were trained on.

    Attributes:
        name: as its authors write it.
        classes: in label order.
        tested_on: where the published metric was measured.
        resolution: what a pixel covers, in words.
        terms: what its licence asks of users of the data.
    """

    name: str
    classes: tuple[str, ...]
    tested_on: str
    resolution: str
    terms: str


COCO = DataSet(
    "COCO 2017 train",
    class_names.COCO,
    "COCO val2017",
    "photographs from the ground",
    "COCO: annotations CC BY 4.0, photographs under the terms of Flickr and their authors",
)
DOTA = DataSet(
    "DOTA-v1.0 trainval",
    class_names.DOTA_V1,
    "DOTA-v1.0 test",
    "aerial and satellite images of many ground sample distances, from below a metre upwards",
    "DOTA: images and annotations for academic purposes only, any commercial use is prohibited; Google Earth's terms",
)
HRSC = DataSet(
    "HRSC2016 trainval",
    class_names.HRSC,
    "HRSC2016 test",
    "Google Earth images of 0.4 to 2 m per pixel",
    "HRSC2016: for research (doi:10.5220/0006120603240331); Google Earth's terms",
)
IMAGENET = DataSet(
    "ImageNet-1k train",
    class_names.IMAGENET,
    "ImageNet-1k val",
    "photographs from the ground",
    "ImageNet: images for non-commercial research and education only",
)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One published file.

    Attributes:
        name: what ``weights=`` and ``rtmdet-geo models download`` take.
        variant: builder whose network it fits.
        url: of the .pth file.
        data: what it was trained on last.
        metrics: published, in percent.
        recipe: what distinguishes it from the other files of its variant.
        pretraining: what it was trained on before.
        input_size: side in px that it was trained and measured at.
        licence: of code and weights as published; ``data.terms`` are another matter.
        sha256: first digits of the file's SHA-256; "" takes them from its name.
    """

    name: str
    variant: str
    url: str
    data: DataSet
    metrics: dict[str, float]
    recipe: str
    pretraining: str
    input_size: int
    licence: str = "Apache-2.0"
    sha256: str = ""

    def __post_init__(self) -> None:
        """Take the hash from the file's name."""
        if not self.sha256:
            object.__setattr__(self, "sha256", Path(self.file_name).stem.rpartition("-")[2])

    @property
    def file_name(self) -> str:
        """Last part of the URL."""
        return self.url.rpartition("/")[2]

    @property
    def task(self) -> Task:
        """What its network is for."""
        return VARIANTS[self.variant].task

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in label order."""
        return self.data.classes

    @property
    def bands(self) -> tuple[str, ...]:
        """Input channels in order.

        Detectors were trained on blue, green, red (``bgr_to_rgb=False`` in their recipes), classifiers on red, green,
        blue (``to_rgb=True`` in MMPretrain's imagenet_bs256_rsb_a12.py, which theirs begin with).
        """
        return ("red", "green", "blue") if self.task == "classification" else ("blue", "green", "red")

    @property
    def path(self) -> Path:
        """Where the downloaded file lies, or would."""
        return cache_dir() / "checkpoints" / self.file_name

    @property
    def converted_path(self) -> Path:
        """Where the same weights lie as safetensors with their ModelSpec, once they were used."""
        return self.path.with_suffix(".safetensors")

    @property
    def is_cached(self) -> bool:
        """Whether it can be used without network."""
        return self.converted_path.is_file() or self.path.is_file()

    def misfit(
        self,
        architecture: str,
        num_classes: int,
        bands: Sequence[str] | int,
        *,
        parts: Sequence[str] | None = None,
        transfer: bool = False,
    ) -> str:
        """Say why these weights cannot go into a network; "" if nothing that is known before reading them forbids it.

        Args:
            architecture: name of the network's builder.
            num_classes: of the network.
            bands: names of its channels in order, or their number.
            parts: of the network that are to be loaded; None: all.
            transfer: other classes and bands are to be fitted.
        """
        wanted = set(parts) if parts is not None else {"backbone", "neck", "bbox_head", "head"}
        is_same_size = architecture.rpartition("_")[2] == self.variant.rpartition("_")[2]
        has_head = bool(wanted & {"bbox_head", "head"})
        if not is_same_size or (has_head and architecture != self.variant):
            fitting = [item.name for item in CHECKPOINTS.values() if item.variant == architecture]
            hint = f"published for it: {', '.join(fitting)}" if fitting else "none are published for it"
            if is_same_size:
                hint += "; parts=['backbone'] (model.weights_parts in a recipe) takes a part of them"
            return f"{self.name!r} are weights of {self.variant}, not of {architecture}; {hint}"
        if parts is not None and "neck" in wanted and self.task == "classification":
            return f"{self.name!r} are weights of a classifier, which has no neck; take its backbone"
        if transfer:
            return ""
        if has_head and num_classes != len(self.classes):
            return f"{self.name!r} has {len(self.classes)} classes, the network {num_classes}; {TRANSFER_HINT}"
        is_other = bands != len(self.bands) if isinstance(bands, int) else tuple(bands) != self.bands
        if is_other and "backbone" in wanted:
            here = f"{bands} bands" if isinstance(bands, int) else ", ".join(bands)
            return f"{self.name!r} is for bands {', '.join(self.bands)}, the network for {here}; {TRANSFER_HINT}"
        return ""

    def spec(self) -> ModelSpec:
        """Return what a model file made from these weights says of itself.

        Pixels: 8-bit scenes are taken as they are, like the images that were trained on; deeper integers as reflectance
        x 10,000, of which 0 to 0.3 is shown. ``gsd_m`` is None: the training images were never resampled to one.
        """
        from rtmdet_geo.structures import ModelSpec

        order = 1 if self.bands[0] == "red" else -1
        is_classifier = self.task == "classification"
        return ModelSpec(
            name=self.name,
            architecture=self.variant,
            kind=KINDS[self.task],
            classes=self.classes,
            bands=self.bands,
            mean=_MEAN_RGB[::order],
            std=_STD_RGB[::order],
            tile_size=self.input_size,
            overlap=0 if is_classifier else 200,
            score_threshold=0.0 if is_classifier else 0.3,
            iou_threshold=NMS_IOU_THRESHOLDS[KINDS[self.task]],
            training_data=f"{self.data.name} ({self.recipe}), after {self.pretraining}; {self.data.resolution}",
            metrics={f"{name} (%), {self.data.tested_on}, published": value for name, value in self.metrics.items()},
            limits=f"thresholds are not tuned. {self.data.terms}",
            licence=self.licence,
            attribution=f"OpenMMLab, {self.url}; Lyu et al., arXiv:2212.07784",
        )


def find_checkpoint(name: str) -> Checkpoint:
    """Return a published checkpoint by name.

    Raises:
        UnknownModelError: no such name; the message lists near ones.

    Example:
        >>> find_checkpoint("rtmdet_tiny_coco").sha256
        '78e30dcc'
    """
    if name in CHECKPOINTS:
        return CHECKPOINTS[name]
    of_variant = [checkpoint.name for checkpoint in CHECKPOINTS.values() if checkpoint.variant == name]
    near = of_variant or difflib.get_close_matches(name, CHECKPOINTS, n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "see `rtmdet-geo models list`"
    raise UnknownModelError(f"no published weights are named {name!r}; {hint}")


def download_checkpoint(
    name: str,
    *,
    progress: Callable[[int, int], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> Path:
    """Fetch a published checkpoint into the cache unless it is there.

    Args:
        name: see :data:`CHECKPOINTS`.
        progress: called with (bytes here, bytes in all, 0 unknown).
        cancelled: True stops; what came so far is kept.
        sleep: called with seconds to wait before another attempt.

    Returns:
        Path of the .pth file.

    Raises:
        UnknownModelError: no such name.
        DownloadError, ChecksumError, OutputError, Cancelled: see :func:`rtmdet_geo.cache.download`.
    """
    checkpoint = find_checkpoint(name)
    return download(
        checkpoint.url,
        checkpoint.path,
        sha256=checkpoint.sha256,
        progress=progress,
        cancelled=cancelled,
        sleep=sleep,
    )


def _coco(variant: str, stem: str, metrics: dict[str, float], recipe: str = "300 epochs, batch 256") -> Checkpoint:
    folder = stem.split("_coco_")[0] + "_coco"
    url = f"{_HOST}/mmdetection/v3.0/rtmdet/{folder}/{stem}.pth"
    return Checkpoint(f"{variant}_coco", variant, url, COCO, metrics, recipe, "ImageNet-1k", 640)


def _rotated(
    variant: str,
    suffix: str,
    stem: str,
    metrics: dict[str, float],
    recipe: str,
    *,
    data: DataSet = DOTA,
    pretraining: str = "ImageNet-1k",
    input_size: int = 1024,
) -> Checkpoint:
    url = f"{_HOST}/mmrotate/v1.0/rotated_rtmdet/{stem.rpartition('-')[0]}/{stem}.pth"
    return Checkpoint(f"{variant}_{suffix}", variant, url, data, metrics, recipe, pretraining, input_size)


def _imagenet(size: str, stem: str, top1: float, top5: float) -> Checkpoint:
    url = f"{_HOST}/mmdetection/v3.0/rtmdet/cspnext_rsb_pretrain/{stem}.pth"
    metrics = {"top-1": top1, "top-5": top5}
    variant = f"cspnext_{size}"
    return Checkpoint(
        f"{variant}_imagenet", variant, url, IMAGENET, metrics, "600 epochs, batch 2048", "random initialisation", 224
    )


def _ap(whole: float, at_50: float, at_75: float) -> dict[str, float]:
    return {"mAP": whole, "mAP50": at_50, "mAP75": at_75}


_RR = "36 epochs, random rotation"
_MS = "36 epochs, multi-scale and random rotation"

_ALL = (
    _coco("rtmdet_tiny", "rtmdet_tiny_8xb32-300e_coco_20220902_112414-78e30dcc", {"box AP": 41.1}),
    _coco("rtmdet_s", "rtmdet_s_8xb32-300e_coco_20220905_161602-387a891e", {"box AP": 44.6}),
    _coco("rtmdet_m", "rtmdet_m_8xb32-300e_coco_20220719_112220-229f527c", {"box AP": 49.4}),
    _coco("rtmdet_l", "rtmdet_l_8xb32-300e_coco_20220719_112030-5a0be7c4", {"box AP": 51.5}),
    _coco("rtmdet_x", "rtmdet_x_8xb32-300e_coco_20220715_230555-cc79b9ae", {"box AP": 52.8}),
    _coco(
        "rtmdet_ins_tiny",
        "rtmdet-ins_tiny_8xb32-300e_coco_20221130_151727-ec670f7e",
        {"mask AP": 35.4, "box AP": 40.5},
    ),
    _coco("rtmdet_ins_s", "rtmdet-ins_s_8xb32-300e_coco_20221121_212604-fdc5d7ec", {"mask AP": 38.7, "box AP": 44.0}),
    _coco("rtmdet_ins_m", "rtmdet-ins_m_8xb32-300e_coco_20221123_001039-6eba602e", {"mask AP": 42.1, "box AP": 48.8}),
    _coco("rtmdet_ins_l", "rtmdet-ins_l_8xb32-300e_coco_20221124_103237-78d1d652", {"mask AP": 43.7, "box AP": 51.2}),
    _coco(
        "rtmdet_ins_x",
        "rtmdet-ins_x_8xb16-300e_coco_20221124_111313-33d4595b",
        {"mask AP": 44.6, "box AP": 52.4},
        "300 epochs, batch 128",
    ),
    _rotated("rtmdet_r_tiny", "dota", "rotated_rtmdet_tiny-3x-dota-9d821076", _ap(47.37, 75.36, 50.64), _RR),
    _rotated("rtmdet_r_tiny", "dota_ms", "rotated_rtmdet_tiny-3x-dota_ms-f12286ff", _ap(53.59, 79.82, 58.87), _MS),
    _rotated(
        "rtmdet_r_tiny",
        "hrsc",
        "rotated_rtmdet_tiny-9x-hrsc-9f2e3ca6",
        {"mAP50 VOC07": 90.6, "mAP50 VOC12": 97.1},
        "36 epochs of three repeats, random rotation",
        data=HRSC,
        input_size=800,
    ),
    _rotated("rtmdet_r_s", "dota", "rotated_rtmdet_s-3x-dota-11f6ccf5", _ap(48.16, 76.93, 50.59), _RR),
    _rotated("rtmdet_r_s", "dota_ms", "rotated_rtmdet_s-3x-dota_ms-20ead048", _ap(54.43, 79.98, 60.07), _MS),
    _rotated("rtmdet_r_m", "dota", "rotated_rtmdet_m-3x-dota-beeadda6", _ap(50.56, 78.24, 54.47), _RR),
    _rotated("rtmdet_r_m", "dota_ms", "rotated_rtmdet_m-3x-dota_ms-c71eb375", _ap(55.00, 80.26, 61.26), _MS),
    _rotated("rtmdet_r_l", "dota", "rotated_rtmdet_l-3x-dota-23992372", _ap(51.01, 78.85, 55.21), _RR),
    _rotated("rtmdet_r_l", "dota_ms", "rotated_rtmdet_l-3x-dota_ms-2738da34", _ap(55.52, 80.54, 61.47), _MS),
    _rotated(
        "rtmdet_r_l",
        "dota_ms_coco",
        "rotated_rtmdet_l-coco_pretrain-3x-dota_ms-06d248a2",
        _ap(56.74, 81.33, 63.45),
        _MS,
        pretraining="COCO 2017",
    ),
    _rotated(
        "rtmdet_r_l",
        "dota_100e",
        "rotated_rtmdet_l-100e-aug-dota-bc59fd88",
        _ap(54.59, 80.16, 61.16),
        "100 epochs, mosaic, mixup, random rotation",
    ),
    _imagenet("tiny", "cspnext-tiny_imagenet_600e-3a2dd350", 69.44, 89.45),
    _imagenet("s", "cspnext-s_imagenet_600e-ea671761", 74.41, 92.23),
    _imagenet("m", "cspnext-m_8xb256-rsb-a1-600e_in1k-ecb3bbd9", 79.27, 94.79),
    _imagenet("l", "cspnext-l_8xb256-rsb-a1-600e_in1k-6a760974", 81.30, 95.62),
    _imagenet("x", "cspnext-x_8xb256-rsb-a1-600e_in1k-b3f78edd", 82.10, 95.69),
)
#: Every published checkpoint by name, in the order of listings.
CHECKPOINTS: dict[str, Checkpoint] = {checkpoint.name: checkpoint for checkpoint in _ALL}
