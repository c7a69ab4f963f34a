"""Every network that can be built: what it is for, its size and cost. Numbers only, no torch.

Parameters are trainable numbers, shared ones once. FLOPs are multiply-adds as OpenMMLab counts them, for one image of
``input_size``; ``rtmdet_geo.models.complexity`` counts the same on the networks themselves, and a test compares. For
RTMDet-Ins that rule runs the common tower of classes and distances twice, as the reference does; ours runs it once
outside of training and needs 8 to 12 % less.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rtmdet_geo.structures import Kind, ModelKind

Task = Literal["detection", "instances", "rotated", "classification"]
#: Titles of the tasks, in the order of listings.
TASKS: dict[Task, str] = {
    "detection": "axis-aligned boxes",
    "instances": "instance masks and axis-aligned boxes",
    "rotated": "oriented boxes",
    "classification": "classes of whole images",
}

#: What a model of each task gives.
KINDS: dict[Task, ModelKind] = {
    "detection": "horizontal",
    "instances": "mask",
    "rotated": "rotated",
    "classification": "classification",
}
#: Overlap from which on two results of one class are one object (test settings of the published recipes); a classifier
#: has no use for it.
NMS_IOU_THRESHOLDS: dict[ModelKind, float] = {"rotated": 0.1, "horizontal": 0.65, "mask": 0.6, "classification": 0.1}
#: Pixels per cell of RTMDet's three levels (Lyu et al. 2022, arXiv 2212.07784, section 3.2).
STRIDES = (8, 16, 32)
#: TensorRT's TopK takes no more.
MAX_TOP_K = 3840
#: Candidates kept per level, in model files too (``nms_pre`` of the published test configurations; theirs is 30,000 for
#: horizontal boxes, which is for torch only).
MAX_CANDIDATES: dict[Kind, int] = {"rotated": 2000, "mask": 1000, "horizontal": MAX_TOP_K}


@dataclass(frozen=True, slots=True)
class Variant:
    """One network.

    Attributes:
        name: of its builder in ``rtmdet_geo.models``.
        task: what it is for.
        params: trainable numbers with ``num_classes`` classes and 3 channels.
        flops: multiply-adds for one image of ``input_size``.
        input_size: side of the square input in px that ``flops`` and published figures are for.
        num_classes: classes of the published model.
        reference: OpenMMLab's name; "" for sizes of our own.
        published_params_m: published parameters in millions; None for sizes of our own.
        published_gflops: published FLOPs in 1e9; None for sizes of our own.
    """

    name: str
    task: Task
    params: int
    flops: int
    input_size: int
    num_classes: int
    reference: str = ""
    published_params_m: float | None = None
    published_gflops: float | None = None

    @property
    def is_ours(self) -> bool:
        """Whether the size is our own: no weights are published for it."""
        return not self.reference

    @property
    def is_for_tests(self) -> bool:
        """Whether it exists for tests only."""
        return self.name.endswith("_test")


def _variant(
    task: Task,
    family: str,
    reference: str,
    input_size: int,
    num_classes: int,
    size: str,
    params: int,
    flops: int,
    *published: float,
) -> Variant:
    name = f"{reference}_{size}" if published else ""
    return Variant(f"{family}_{size}", task, params, flops, input_size, num_classes, name, *published)


_detection = partial(_variant, "detection", "rtmdet", "rtmdet", 640, 80)
_instances = partial(_variant, "instances", "rtmdet_ins", "rtmdet-ins", 640, 80)
_rotated = partial(_variant, "rotated", "rtmdet_r", "rotated_rtmdet", 1024, 15)
_classifier = partial(_variant, "classification", "cspnext", "cspnext", 224, 1000)


#: Published figures: README of configs/rtmdet in MMDetection 3.x, of configs/rotated_rtmdet in MMRotate 1.x.
_ALL = (
    _detection("test", 558_208, 943_202_560),
    _detection("nano", 2_190_180, 3_639_536_640),
    _detection("tiny", 4_896_168, 8_089_002_240, 4.8, 8.1),
    _detection("s", 8_886_924, 14_834_933_760, 8.89, 14.8),
    _detection("m", 24_709_188, 39_205_493_760, 24.71, 39.27),
    _detection("l", 52_315_804, 80_120_995_840, 52.3, 80.23),
    _detection("x", 94_855_572, 141_513_600_000, 94.86, 141.67),
    _instances("test", 652_291, 1_405_039_360),
    _instances("nano", 2_531_431, 5_384_048_640),
    _instances("tiny", 5_638_187, 11_937_027_840, 5.6, 11.8),
    _instances("s", 10_183_311, 21_607_311_360, 10.18, 21.5),
    _instances("m", 27_575_111, 54_289_090_560, 27.58, 54.13),
    _instances("l", 57_365_663, 106_799_165_440, 57.37, 106.56),
    _instances("x", 102_703_767, 183_069_696_000, 102.7, 182.7),
    _rotated("test", 551_872, 2_370_524_416),
    _rotated("nano", 2_177_700, 9_228_997_632),
    _rotated("tiny", 4_877_544, 20_575_419_648, 4.88, 20.45),
    _rotated("s", 8_862_156, 37_800_726_528, 8.86, 37.62),
    _rotated("m", 24_672_132, 100_100_600_832, 24.67, 99.76),
    _rotated("l", 52_266_460, 204_755_255_296, 52.27, 204.21),
    _classifier("test", 393_916, 40_375_232),
    _classifier("tiny", 2_733_700, 339_201_984, 2.73, 0.34),
    _classifier("s", 4_891_320, 664_224_512, 4.89, 0.66),
    _classifier("m", 13_048_432, 1_926_465_792, 13.05, 1.93),
    _classifier("l", 27_163_912, 4_194_144_768, 27.16, 4.19),
    _classifier("x", 48_850_560, 7_756_275_200, 48.85, 7.76),
)
#: Every variant by its builder's name, in the order of listings.
VARIANTS: dict[str, Variant] = {variant.name: variant for variant in _ALL}
