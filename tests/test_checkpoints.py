"""Published weights: what their descriptions say, and which networks they are refused for before they are fetched."""

from __future__ import annotations

import pytest

from rtmdet_geo.checkpoints import CHECKPOINTS
from rtmdet_geo.structures import StretchSpec

BGR, RGB = ("blue", "green", "red"), ("red", "green", "blue")
#: By data set: bands, side in px, kind, number of classes, score and IoU thresholds (published test settings, RECIPES).
EXPECTED = {
    "COCO 2017 train": (BGR, 640, {"horizontal": 0.65, "mask": 0.6}, 80, 0.3),
    "DOTA-v1.0 trainval": (BGR, 1024, {"rotated": 0.1}, 15, 0.3),
    "HRSC2016 trainval": (BGR, 800, {"rotated": 0.1}, 1, 0.3),
    "ImageNet-1k train": (RGB, 224, {"classification": 0.1}, 1000, 0.0),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_spec(name):
    checkpoint = CHECKPOINTS[name]
    spec = checkpoint.spec()
    bands, side, thresholds, num_classes, score = EXPECTED[checkpoint.data.name]
    assert (spec.bands, spec.tile_size, len(spec.classes), spec.score_threshold) == (bands, side, num_classes, score)
    assert spec.iou_threshold == thresholds[spec.kind] and spec.overlap < spec.tile_size
    assert dict(zip(spec.bands, spec.mean, strict=True)) == {"red": 123.675, "green": 116.28, "blue": 103.53}
    assert dict(zip(spec.bands, spec.std, strict=True)) == {"red": 58.395, "green": 57.12, "blue": 57.375}
    assert spec.gsd_m is None and spec.trained_gsd_m is None and not spec.optional_bands
    assert spec.stretch == StretchSpec(kind="fixed", low=0.0, high=0.3, default_scale=1e-4, dark_percent=None)


DOTA = CHECKPOINTS["rtmdet_r_tiny_dota"]
IMAGENET = CHECKPOINTS["cspnext_tiny_imagenet"]


@pytest.mark.parametrize(
    ("checkpoint", "arguments", "keywords"),
    [
        (DOTA, ("rtmdet_r_tiny", 15, 3), {}),
        (DOTA, ("rtmdet_r_tiny", 15, BGR), {}),
        (DOTA, ("rtmdet_r_tiny", 2, (*RGB, "nir")), {"transfer": True}),
        (DOTA, ("rtmdet_r_tiny", 2, BGR), {"parts": ["backbone", "neck"]}),
        (DOTA, ("rtmdet_r_tiny", 15, 4), {"parts": ["neck", "bbox_head"]}),
        (DOTA, ("rtmdet_ins_tiny", 2, BGR), {"parts": ["backbone", "neck"]}),
        (DOTA, ("cspnext_tiny", 2, BGR), {"parts": ["backbone"]}),
        (IMAGENET, ("rtmdet_r_tiny", 2, RGB), {"parts": ["backbone"]}),
        (IMAGENET, ("cspnext_tiny", 1000, RGB), {}),
    ],
)
def test_what_may_fit(checkpoint, arguments, keywords):
    assert checkpoint.misfit(*arguments, **keywords) == ""


@pytest.mark.parametrize(
    ("checkpoint", "arguments", "keywords", "reason"),
    [
        (DOTA, ("rtmdet_r_tiny", 2, BGR), {}, "has 15 classes, the network 2; transfer=True"),
        (DOTA, ("rtmdet_r_tiny", 2, 3), {"parts": ["bbox_head"]}, "has 15 classes, the network 2; transfer=True"),
        (DOTA, ("rtmdet_r_tiny", 15, RGB), {}, "is for bands blue, green, red, the network for red, green, blue; tr"),
        (DOTA, ("rtmdet_r_tiny", 15, 4), {"parts": ["backbone"]}, "the network for 4 bands; transfer=True"),
        (DOTA, ("rtmdet_tiny", 15, BGR), {}, "not of rtmdet_tiny; published for it: rtmdet_tiny_coco; parts=['backbo"),
        (DOTA, ("rtmdet_tiny", 15, BGR), {"parts": ["neck", "bbox_head"], "transfer": True}, "not of rtmdet_tiny"),
        (DOTA, ("rtmdet_r_s", 15, BGR), {"transfer": True}, "not of rtmdet_r_s; published for it: rtmdet_r_s_dota,"),
        (DOTA, ("rtmdet_r_s", 15, BGR), {"parts": ["backbone"]}, "not of rtmdet_r_s; published for it"),
        (IMAGENET, ("rtmdet_r_tiny", 15, RGB), {"parts": ["backbone", "neck"]}, "a classifier, which has no neck"),
        (IMAGENET, ("rtmdet_r_tiny", 15, RGB), {"transfer": True}, "parts=['backbone'] (model.weights_parts in a rec"),
    ],
)
def test_what_cannot_fit(checkpoint, arguments, keywords, reason):
    found = checkpoint.misfit(*arguments, **keywords)
    assert found.startswith(repr(checkpoint.name)) and reason in found and "\n" not in found


def test_advice_for_another_size_is_no_part_of_it():
    assert "parts=" not in DOTA.misfit("rtmdet_r_s", 15, BGR)
