"""The reference's post-processing put together from our parts, and the comparison with its golden results.

Candidates, score threshold, rescale, least size, NMS, limit; masks come after it (tests/test_masks.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import recipes
import torch

from rtmdet_geo.boxes import boxes_to_hboxes, rescale_boxes
from rtmdet_geo.models import HorizontalOutputs, InstanceOutputs, RotatedOutputs
from rtmdet_geo.models.decode import decode_horizontal, decode_instances, decode_rotated
from rtmdet_geo.nms import nms_horizontal, nms_rotated

OUTPUTS = {"rot": RotatedOutputs, "det": HorizontalOutputs, "ins": InstanceOutputs}


class Found(NamedTuple):
    """What is left of one image, best first; boxes (N, 5) float64. Instances: kernels, priors, and the features too."""

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    kernels: np.ndarray | None = None
    mask_priors: np.ndarray | None = None
    mask_features: np.ndarray | None = None


def cases_of(oracle_dir: Path, file: str, family: str) -> list[dict[str, Any]]:
    """Return the cases of a family; there must be some."""
    cases = [case for case in json.loads((oracle_dir / file).read_text())["cases"] if case["family"] == family]
    assert cases
    return cases


def raw_outputs(case: dict[str, Any]) -> Any:
    """Return the raw outputs of a case from tensor recipes named cls.0, reg.0, angle.0, mask_feat, ..."""
    made = {name: torch.from_numpy(recipes.realise(recipe)) for name, recipe in case["raw"].items()}
    levels = sorted({int(name.split(".")[1]) for name in made if "." in name})
    kind = OUTPUTS[case["family"]]
    fields = [
        made["mask_feat"] if field == "mask_features" else [made[f"{field}.{level}"] for level in levels]
        for field in kind._fields
    ]
    return kind(*fields)


def one_image(outputs: Any, image: int) -> Any:
    """Return the outputs of one image as a batch of one."""
    chosen = slice(image, image + 1)
    return type(outputs)(
        *(f[chosen] if isinstance(f, torch.Tensor) else [level[chosen] for level in f] for f in outputs)
    )


def detect(outputs: Any, case: dict[str, Any], image: int) -> Found:
    """Post-process one image of a case."""
    config, meta = case["test_cfg"], case["img_metas"][image]
    single = one_image(outputs, image)
    if case["family"] == "rot":
        candidates: tuple[torch.Tensor, ...] = decode_rotated(single, limit=config["nms_pre"])
    else:
        decode = decode_instances if case["family"] == "ins" else decode_horizontal
        candidates = decode(single, limit=config["nms_pre"], image_shape=tuple(meta["img_shape"]))
    rows = [part[0].numpy() for part in candidates[:5]]
    rows[0] = rows[0].astype(np.float64)
    rows = [part[rows[1] > config["score_thr"]] for part in rows]
    if case["rescale"]:
        scale_x, scale_y = meta["scale_factor"]
        rows[0] = rescale_boxes(rows[0], 1 / scale_x, 1 / scale_y, follow="h")  # rotated ones as the reference
    is_large = (rows[0][:, 2:4] > config["min_bbox_size"]).all(axis=1)
    rows = [part[is_large] for part in rows]
    threshold = config["nms"]["iou_threshold"]
    if case["family"] == "rot":
        kept = nms_rotated(*rows[:3], iou_threshold=threshold)
    else:
        kept = nms_horizontal(boxes_to_hboxes(rows[0]), *rows[1:3], iou_threshold=threshold)
    rows = [part[kept[: config["max_per_img"]]] for part in rows]
    features = [part[0].numpy() for part in candidates[5:]]
    return Found(*rows, *features)


def check_found(found: Found, golden: dict[str, Any], num_classes: int, where: object) -> np.ndarray:
    """Compare with the golden result of an image; boxes to 1e-3 px.

    Equal scores may swap places, so rows are paired: each golden row has one partner of ours with the same score, label
    and box.

    Returns:
        Our row of each golden row.
    """
    boxes, scores, labels = found[:3]
    columns = len(golden["bboxes"][0]) if golden["bboxes"] else 5
    theirs = np.asarray(golden["bboxes"], np.float64).reshape(-1, columns)
    if columns == 4:
        boxes = boxes_to_hboxes(boxes)
    assert len(boxes) == golden["num"], where
    assert np.bincount(labels, minlength=num_classes).tolist() == golden["label_hist"], where
    np.testing.assert_allclose(scores.sum(dtype=np.float64), golden["score_sum"], rtol=1e-5, err_msg=str(where))
    np.testing.assert_allclose(np.abs(boxes).sum(), golden["bbox_abs_sum"], rtol=1e-5, err_msg=str(where))
    np.testing.assert_allclose(scores[: len(theirs)], golden["scores"], atol=1e-6, err_msg=str(where))
    is_same = np.abs(scores[None] - np.asarray(golden["scores"])[:, None]) < 2e-6
    is_same &= labels[None] == np.asarray(golden["labels"])[:, None]
    distance = np.where(is_same, np.abs(boxes[None] - theirs[:, None]).max(axis=2), np.inf)
    for row in np.flatnonzero(~(distance < 1e-3).any(axis=1)):
        raise AssertionError(f"{where}: no partner of golden row {row}: {golden['scores'][row]} {theirs[row]}")
    partners = distance.argmin(axis=1) if len(theirs) else np.zeros(0, np.int64)
    assert len(set(partners.tolist())) == len(theirs), where
    return partners
