"""Dynamic soft label assignment: oracle cases on both implementations, a slow obvious reference, memory."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rtmdet_geo.boxes import boxes_to_hboxes
from rtmdet_geo.models.decode import priors_with_stride
from rtmdet_geo.nms import rotated_iou
from rtmdet_geo.training.assign import DynamicSoftLabelAssigner, horizontal_iou, inside_boxes, mask_centers
from rtmdet_geo.training.assign_kernels import horizontal_overlaps


def _recipes(folder: Path) -> Any:
    spec = importlib.util.spec_from_file_location("oracle_recipes", folder / "recipes.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _mask_centers(case: dict[str, Any], folder: Path) -> torch.Tensor:
    """Centroids of the oracle's masks."""
    masks = np.stack([_recipes(folder).triangle_mask(box, *case["img_shape"]) for box in case["gt_bboxes"]])
    assert masks.sum((1, 2)).tolist() == case["mask_areas"]
    return mask_centers(torch.from_numpy(masks))


def _assign(case: dict[str, Any], parameters: dict[str, Any], folder: Path, **options: Any) -> Any:
    columns = 4 if case["kind"] == "hbb" else 5
    return DynamicSoftLabelAssigner(**parameters, **options).assign(
        torch.tensor(case["pred_bboxes"]),
        torch.tensor(case["pred_scores"]),
        torch.cat(priors_with_stride([tuple(size) for size in case["featmap_sizes"]])),
        torch.tensor(case["gt_bboxes"]).reshape(-1, columns),
        torch.tensor(case["gt_labels"], dtype=torch.int64),
        gt_centers=_mask_centers(case, folder) if "mask_areas" in case else None,
    )


@pytest.mark.parametrize(
    "options", [{}, {"use_numba": False}, {"max_pairs": 1}, {"use_numba": False, "max_pairs": 300}]
)
def test_oracle_assignments(oracle_dir: Path, options: dict[str, Any]) -> None:
    oracle = json.loads((oracle_dir / "assign.json").read_text())
    assert {case["kind"] for case in oracle["cases"]} == {"hbb", "rbb"}
    for case in oracle["cases"]:
        where = f"{case['name']} {case['kind']}"
        found = _assign(case, oracle["assigner"], oracle_dir, **options)
        expected = case["pos"]
        assert found.priors.tolist() == [row[0] for row in expected], where
        if "duplicate_gt" not in case["name"]:  # which of two equal ground truths wins says nothing
            assert [gt + 1 for gt in found.gts.tolist()] == [row[1] for row in expected], where
        labels = [case["gt_labels"][gt] for gt in found.gts.tolist()]
        assert labels == [row[2] for row in expected], where
        np.testing.assert_allclose(found.ious.numpy(), [row[3] for row in expected], atol=1e-5, err_msg=where)
        assert len(found.priors) == case["num_pos"]
        if case["background"]["max_overlap"]:  # -1e8 where there are candidates, 0 where there are none
            assert (found.num_candidates == 0) == (max(case["background"]["max_overlap"]) == 0), where


def test_oracle_notices_other_parameters(oracle_dir: Path) -> None:
    """Negative control: each parameter of the assigner matters to at least one case."""
    oracle = json.loads((oracle_dir / "assign.json").read_text())
    for change in ({"topk": 5}, {"soft_center_radius": 2.0}, {"iou_weight": 1.0}):
        results = [_assign(case, oracle["assigner"] | change, oracle_dir) for case in oracle["cases"]]
        assert any(
            [[p, g + 1] for p, g in zip(r.priors.tolist(), r.gts.tolist(), strict=True)]
            != [row[:2] for row in c["pos"]]
            for r, c in zip(results, oracle["cases"], strict=True)
        ), change


def _reference(boxes: Any, logits: Any, priors: Any, gt_boxes: Any, gt_labels: Any) -> dict[int, tuple[int, float]]:
    """Pair by pair in float64, straight from the module's text: {prior: (ground truth, IoU)}.

    Where single precision may decide otherwise - two costs are as good as equal, or boxes hardly touch and a rounding
    error is all that the logarithm of their IoU sees - the example is dropped.
    """

    def look_clear(first: tuple[int, int], second: tuple[int, int]) -> None:
        assume(cost[second] - cost[first] > 1e-3 and max(iou[first], iou[second]) > 1e-5)

    is_rotated = boxes.shape[1] == 5
    inside = []
    for x, y, *_ in priors:
        hits = 0
        for box in gt_boxes:
            if is_rotated:
                cx, cy, w, h, t = box
                u, v = (x - cx) * math.cos(t) + (y - cy) * math.sin(t), (y - cy) * math.cos(t) - (x - cx) * math.sin(t)
                hits += abs(u) < w / 2 - 0.01 and abs(v) < h / 2 - 0.01
            else:
                hits += box[0] < x < box[2] and box[1] < y < box[3]
        inside.append(hits > 0)
    candidates = [i for i, hit in enumerate(inside) if hit]
    if not candidates:
        return {}
    safe = boxes.copy()
    if is_rotated:
        safe[:, 2:4] = safe[:, 2:4].clip(1e-3)
    iou = rotated_iou(safe, gt_boxes) if is_rotated else _horizontal_iou(safe, gt_boxes)
    centers = gt_boxes[:, :2] if is_rotated else (gt_boxes[:, :2] + gt_boxes[:, 2:]) / 2
    cost = np.full(iou.shape, np.inf)
    for i in candidates:
        for j in range(len(gt_boxes)):
            total = 0.0
            for c in range(logits.shape[1]):
                p, target = 1 / (1 + math.exp(-logits[i, c])), iou[i, j] if c == gt_labels[j] else 0.0
                total += (math.log1p(math.exp(logits[i, c])) - logits[i, c] * target) * (target - p) ** 2
            total -= 3.0 * math.log(iou[i, j] + 1e-7)
            total += 10 ** (math.hypot(*(priors[i, :2] - centers[j])) / priors[i, 2] - 3.0)
            cost[i, j] = total
    wanted: dict[int, list[int]] = {}
    for j in range(len(gt_boxes)):
        k = max(1, int(sum(sorted(iou[candidates, j], reverse=True)[:13])))
        order = sorted(candidates, key=lambda i: cost[i, j])
        if len(order) > k:
            look_clear((order[k - 1], j), (order[k], j))
        for i in order[:k]:
            wanted.setdefault(i, []).append(j)
    for i, gts in wanted.items():
        if len(gts) > 1:
            best, second = np.argsort(cost[i])[:2].tolist()
            look_clear((i, best), (i, second))
    winners = {i: (gts[0] if len(gts) == 1 else int(cost[i].argmin())) for i, gts in wanted.items()}
    return {i: (winners[i], float(iou[i, winners[i]])) for i in sorted(winners)}


def _horizontal_iou(boxes1: np.ndarray, boxes2: np.ndarray) -> np.ndarray:
    """Pair by pair."""
    result = np.zeros((len(boxes1), len(boxes2)))
    for i, (x1, y1, x2, y2) in enumerate(boxes1):
        for j, (u1, v1, u2, v2) in enumerate(boxes2):
            common = max(min(x2, u2) - max(x1, u1), 0) * max(min(y2, v2) - max(y1, v1), 0)
            result[i, j] = common / max((x2 - x1) * (y2 - y1) + (u2 - u1) * (v2 - v1) - common, 1e-6)
    return result


def _flattened(boxes: np.ndarray) -> np.ndarray:
    """Horizontal boxes around rotated ones; a negative side stays one."""
    flat = boxes_to_hboxes(boxes)
    flip = boxes[:, 2] < 0
    flat[flip] = flat[flip][:, [2, 1, 0, 3]]
    return flat


def _scene(seed: int, num_gts: int, size: int = 96) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    priors = torch.cat(priors_with_stride([(size // s, size // s) for s in (8, 16, 32)])).numpy().astype(np.float64)

    def near(points: np.ndarray, spread: float) -> np.ndarray:
        n = len(points)
        return np.column_stack(
            (
                points + rng.normal(0, spread, (n, 2)),
                rng.uniform(8, 50, n),
                rng.uniform(5, 25, n),
                rng.uniform(-2, 2, n),
            )
        )

    gt_boxes = near(rng.uniform(0, size, (num_gts, 2)), 0)
    boxes = near(priors[:, :2], 4)
    boxes[::7, 2] *= -1  # networks without exp predict negative sizes
    if num_gts:  # some predictions are good
        lucky = rng.integers(0, len(priors), 3 * num_gts)
        boxes[lucky] = gt_boxes[rng.integers(0, num_gts, len(lucky))] + rng.normal(0, 0.3, (len(lucky), 5)) * [
            1,
            1,
            1,
            1,
            0.1,
        ]
    return boxes, rng.normal(-2, 2, (len(priors), 3)), priors, gt_boxes, rng.integers(0, 3, num_gts)


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 10**6), st.integers(0, 12), st.booleans(), st.booleans(), st.sampled_from([1, 200, 10**6]))
def test_equals_slow_reference(seed: int, num_gts: int, is_rotated: bool, use_numba: bool, max_pairs: int) -> None:
    arrays = [values.astype(np.float32).astype(np.float64) for values in _scene(seed, num_gts)[:4]]
    if not is_rotated:
        arrays[0], arrays[3] = (_flattened(arrays[k]).astype(np.float32).astype(np.float64) for k in (0, 3))
    labels = _scene(seed, num_gts)[4]
    expected = _reference(*arrays, labels)
    assigner = DynamicSoftLabelAssigner(use_numba=use_numba, max_pairs=max_pairs)
    found = assigner.assign(
        *(torch.tensor(a, dtype=torch.float32) for a in arrays), torch.tensor(labels, dtype=torch.int64)
    )
    ours = dict(zip(found.priors.tolist(), zip(found.gts.tolist(), found.ious.tolist(), strict=True), strict=True))
    assert ours.keys() == expected.keys()
    assert all(ours[i][0] == expected[i][0] and abs(ours[i][1] - expected[i][1]) < 1e-5 for i in ours)


@pytest.mark.parametrize("use_numba", [True, False])
def test_by_hand(use_numba: bool) -> None:
    """Three priors in a row in one box; k = int(sum of IoUs), the cheapest first."""
    priors = torch.tensor([[0.0, 0, 8, 8], [8, 0, 8, 8], [16, 0, 8, 8], [99, 99, 8, 8]])
    gt_boxes, labels = torch.tensor([[8.0, 0, 40, 20, 0]]), torch.tensor([0])
    logits = torch.zeros(4, 1)
    perfect = gt_boxes.repeat(4, 1)
    assigner = DynamicSoftLabelAssigner(use_numba=use_numba)
    found = assigner.assign(perfect, logits, priors, gt_boxes, labels)
    assert found.num_candidates == 3  # the fourth prior's box is perfect, but it lies outside
    assert found.priors.tolist() == [0, 1, 2] and found.ious.tolist() == pytest.approx([1, 1, 1])
    # IoUs .5, .5, .5 add up to 1.5: one prior, the central one.
    half = perfect * torch.tensor([1, 1, 0.5, 1, 1])
    assert assigner.assign(half, logits, priors, gt_boxes, labels).priors.tolist() == [1]
    # A hopeless prediction everywhere: still one.
    away = perfect + torch.tensor([500.0, 0, 0, 0, 0])
    found = assigner.assign(away, logits, priors, gt_boxes, labels)
    assert found.priors.tolist() == [1] and found.ious.tolist() == [0]
    # The class cost decides among equals: prior 2's probability .5 is its soft label, cost 0; the others' is .32.
    logits = torch.tensor([[-3.0], [-3.0], [0.0], [0.0]])
    assert assigner.assign(half, logits, priors, gt_boxes, labels).priors.tolist() == [2]


@pytest.mark.parametrize("use_numba", [True, False])
def test_conflict_goes_to_the_lowest_cost(use_numba: bool) -> None:
    priors = torch.tensor([[0.0, 0, 8, 8]])
    gt_boxes = torch.tensor([[2.0, 0, 30, 20, 0], [0.0, 0, 30, 20, 0]])
    found = DynamicSoftLabelAssigner(use_numba=use_numba).assign(
        torch.tensor([[0.0, 0, 30, 20, 0]]), torch.zeros(1, 2), priors, gt_boxes, torch.tensor([0, 1])
    )
    assert found.priors.tolist() == [0] and found.gts.tolist() == [1] and found.ious.tolist() == pytest.approx([1])


def test_inside_margin() -> None:
    points = torch.tensor([[4.98, 0.0], [4.995, 0.0], [5.0, 0.0]])
    assert inside_boxes(points, torch.tensor([[0.0, 0, 10, 10, 0]])).squeeze(1).tolist() == [True, False, False]
    assert inside_boxes(points, torch.tensor([[-5.0, -5, 5, 5]])).squeeze(1).tolist() == [True, True, False]


@pytest.mark.parametrize("use_numba", [True, False])
def test_nothing_in_nothing_out(use_numba: bool) -> None:
    boxes, logits, priors, _, _ = (torch.tensor(a) for a in _scene(0, 0))
    found = DynamicSoftLabelAssigner(use_numba=use_numba).assign(
        boxes, logits, priors, torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64)
    )
    assert found.num_candidates == len(found.priors) == len(found.gts) == len(found.ious) == 0
    assert found.priors.dtype == found.gts.dtype == torch.int64 and found.ious.dtype == torch.float32


def test_horizontal_overlaps_of_torch_and_numba_are_the_obvious_ones() -> None:
    boxes, _, _, gt_boxes, _ = _scene(4, 9)
    first, second = _flattened(boxes).astype(np.float32), _flattened(gt_boxes).astype(np.float32)
    expected = _horizontal_iou(first, second)
    assert (expected > 0.3).sum() > 10 and (boxes[:, 2] < 0).any()
    np.testing.assert_allclose(horizontal_overlaps(first, second), expected, atol=1e-6)
    np.testing.assert_allclose(horizontal_iou(torch.tensor(first), torch.tensor(second)).numpy(), expected, atol=1e-6)


def test_mask_centers_by_hand() -> None:
    masks = torch.zeros(3, 6, 9, dtype=torch.uint8)
    masks[0, 2, 7] = 1
    masks[1, 1:4, 2:4] = 1
    centers = mask_centers(masks)
    assert centers.dtype == torch.float32 and centers.tolist() == [[7, 2], [2.5, 2], [0, 0]]
    assert torch.equal(mask_centers(masks.bool()), centers) and mask_centers(masks[:0]).shape == (0, 2)


def test_the_mask_decides_where_the_centre_is() -> None:
    """Two priors in one box, alike but for the distance from the mask's centroid."""
    priors = torch.tensor([[8.0, 8, 8, 8], [24, 8, 8, 8]])
    gt_boxes, labels = torch.tensor([[0.0, 0, 32, 16]]), torch.tensor([0])
    poor = torch.tensor([[0.0, 0, 8, 16], [24, 0, 32, 16]])  # IoU 1/4 each: one prior is taken
    for rows, expected in ((slice(0, 8), [0]), (slice(24, 32), [1])):
        mask = torch.zeros(1, 16, 32, dtype=torch.uint8)
        mask[:, :, rows] = 1
        found = DynamicSoftLabelAssigner().assign(
            poor, torch.zeros(2, 1), priors, gt_boxes, labels, gt_centers=mask_centers(mask)
        )
        assert found.priors.tolist() == expected


@pytest.mark.parametrize("is_rotated", [True, False])
@pytest.mark.parametrize("use_numba", [True, False])
def test_broken_predictions_do_not_crash(use_numba: bool, is_rotated: bool) -> None:
    arrays = list(_scene(1, 5))
    if not is_rotated:
        arrays[0], arrays[3] = _flattened(arrays[0]), _flattened(arrays[3])
    boxes, logits, priors, gt_boxes, labels = (torch.tensor(a) for a in arrays)
    boxes[::2] = math.nan
    boxes[1::4, 0] = math.inf
    logits[::3] = math.nan
    found = DynamicSoftLabelAssigner(use_numba=use_numba).assign(boxes, logits, priors, gt_boxes, labels)
    assert found.ious.isfinite().all() and len(found.priors) <= found.num_candidates


@pytest.mark.parametrize("label", [-1, 3])
def test_labels_outside_the_classes_are_refused(label: int) -> None:
    boxes, logits, priors, gt_boxes, labels = (torch.tensor(a) for a in _scene(2, 4))
    labels[2] = label
    with pytest.raises(ValueError, match="3 classes"):
        DynamicSoftLabelAssigner().assign(boxes, logits, priors, gt_boxes, labels)


MEMORY_SCRIPT = """
import resource, sys, torch
from rtmdet_geo.models.decode import priors_with_stride
from rtmdet_geo.training.assign import DynamicSoftLabelAssigner
generator = torch.Generator().manual_seed(0)
def boxes_at(points):
    sizes = torch.rand(len(points), 3, generator=generator) * torch.tensor([40.0, 20, 3]) + torch.tensor([10.0, 6, 0])
    return torch.cat((points, sizes), dim=1)
priors = torch.cat(priors_with_stride([(128, 128), (64, 64), (32, 32)]))
gt_boxes = boxes_at(torch.rand(2000, 2, generator=generator) * 1024)
labels = torch.randint(15, (2000,), generator=generator)
boxes = boxes_at(priors[:, :2] + torch.rand(len(priors), 2, generator=generator) * 8)
logits = torch.rand(len(priors), 15, generator=generator) * 6 - 5
if sys.argv[2] == "horizontal":
    flat = lambda boxes: torch.cat((boxes[:, :2] - boxes[:, 2:4] / 2, boxes[:, :2] + boxes[:, 2:4] / 2), dim=1)
    gt_boxes, boxes = flat(gt_boxes), flat(boxes)
assigner = DynamicSoftLabelAssigner(use_numba=sys.argv[1] == "numba")
assigner.assign(boxes[:2000], logits[:2000], priors[:2000], gt_boxes[:30], labels[:30])  # loaded and compiled
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = assigner.assign(boxes, logits, priors, gt_boxes, labels)
extra = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20  # KiB -> GiB
print(extra, len(priors), len(found.priors), len(set(found.gts.tolist())))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
@pytest.mark.parametrize("kind", ["rotated", "horizontal"])
@pytest.mark.parametrize("how", ["numba", "torch"])
def test_two_thousand_boxes_within_two_gigabytes(how: str, kind: str) -> None:
    """A 1024 px tile with 2,000 boxes of 15 classes; all pairs and classes at once would take 2.6 GB a float."""
    result = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT, how, kind],
        capture_output=True, text=True, timeout=200, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    extra, num_priors, num_positive, num_gts = map(float, result.stdout.split())
    assert num_priors == 21504 and num_positive > 3000 and num_gts > 1000
    assert extra < 2, f"{extra:.2f} GiB"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_equals_cpu() -> None:
    arrays = [torch.tensor(a) for a in _scene(3, 10)]
    expected = DynamicSoftLabelAssigner().assign(*arrays)
    found = DynamicSoftLabelAssigner().assign(*(a.cuda() for a in arrays))
    assert torch.equal(found.priors.cpu(), expected.priors) and torch.equal(found.gts.cpu(), expected.gts)
    assert torch.allclose(found.ious.cpu(), expected.ious, atol=1e-5)
