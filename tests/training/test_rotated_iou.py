"""Differentiable rotated IoU: values against shapely and the oracle, gradients against differences of the exact IoU."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import shapely
import shapely.affinity
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rtmdet_geo.training.rotated_iou import rotated_iou_aligned, rotated_iou_pairwise


def _polygon(box: np.ndarray) -> shapely.Polygon:
    centred = shapely.box(-box[2] / 2, -box[3] / 2, box[2] / 2, box[3] / 2)
    turned = shapely.affinity.rotate(centred, box[4], origin=(0, 0), use_radians=True)
    return shapely.affinity.translate(turned, box[0], box[1])


def exact_iou(box1: np.ndarray, box2: np.ndarray, *, grid_size: float | None = None) -> float:
    """The slow obvious reference, float64.

    Without a grid GEOS may find no intersection at all where edges nearly coincide (seen: the boxes 12, 0, 30, 29.375,
    0.625 and 12, 0, 30, 61.5, 0.625, one inside the other); with one, corners are rounded to it.
    """
    first, second = _polygon(box1), _polygon(box2)
    common = shapely.intersection(first, second, grid_size=grid_size).area
    return float(common / (first.area + second.area - common))


def _differences(box1: np.ndarray, box2: np.ndarray, step: float = 1e-6) -> np.ndarray:
    """Central finite differences (10,) of the exact IoU over both boxes."""
    both = np.concatenate((box1, box2))
    result = np.empty(10)
    for k in range(10):
        more, less = both.copy(), both.copy()
        more[k] += step
        less[k] -= step
        result[k] = (exact_iou(more[:5], more[5:]) - exact_iou(less[:5], less[5:])) / (2 * step)
    return result


def _gradients(boxes1: np.ndarray, boxes2: np.ndarray, dtype: torch.dtype = torch.float64) -> np.ndarray:
    first = torch.tensor(np.atleast_2d(boxes1), dtype=dtype, requires_grad=True)
    second = torch.tensor(np.atleast_2d(boxes2), dtype=dtype, requires_grad=True)
    rotated_iou_aligned(first, second).sum().backward()
    return torch.cat((first.grad, second.grad), dim=1).double().numpy()


def _random_boxes(rng: np.random.Generator, number: int, extent: float = 30) -> np.ndarray:
    return np.stack(
        (
            rng.random(number) * extent,
            rng.random(number) * extent,
            rng.random(number) * 30 + 1,
            rng.random(number) * 20 + 1,
            (rng.random(number) - 0.5) * 7,
        ),
        axis=1,
    )


def test_values_equal_shapely() -> None:
    rng = np.random.default_rng(1)
    boxes1, boxes2 = _random_boxes(rng, 500), _random_boxes(rng, 500)
    exact = np.array([exact_iou(a, b) for a, b in zip(boxes1, boxes2, strict=True)])
    assert (exact > 0).sum() > 100 and (exact == 0).sum() > 20
    double = rotated_iou_aligned(torch.tensor(boxes1), torch.tensor(boxes2))
    single = rotated_iou_aligned(torch.tensor(boxes1).float(), torch.tensor(boxes2).float())
    assert double.dtype == torch.float64 and single.dtype == torch.float32
    np.testing.assert_allclose(double.numpy(), exact, rtol=0, atol=1e-12)
    np.testing.assert_allclose(single.numpy(), exact, rtol=0, atol=1e-6)
    # Negative control: the comparison notices another angle convention.
    mirrored = torch.tensor(boxes1 * [1, 1, 1, 1, -1])
    assert np.abs(rotated_iou_aligned(mirrored, torch.tensor(boxes2)).numpy() - exact).max() > 0.01


def test_oracle_values(oracle_dir: Path) -> None:
    oracle = json.loads((oracle_dir / "ops.json").read_text())["box_iou_rotated"]
    for part in [oracle["random"], *oracle["near_duplicates"]]:
        if "iou_exact" not in part:
            continue
        exact = np.array(part["iou_exact"])
        boxes1, boxes2 = torch.tensor(part["boxes1"]), torch.tensor(part["boxes2"])
        if exact.ndim == 2:
            ours = rotated_iou_pairwise(boxes1.float(), boxes2.float())
        else:
            ours = rotated_iou_aligned(boxes1.float(), boxes2.float())
        np.testing.assert_allclose(ours.numpy(), exact, atol=2e-6, err_msg=part.get("name", "random"))
    for pair in oracle["pairs"]:
        iou = rotated_iou_aligned(torch.tensor([pair["box1"]]), torch.tensor([pair["box2"]])).item()
        is_empty = min(pair["box1"][2:4] + pair["box2"][2:4]) <= 0  # a negative size is empty here, see the module
        assert iou == pytest.approx(0.0 if is_empty else pair["iou_exact"], abs=2e-6), pair["name"]


def test_gradients_equal_differences_of_exact_iou() -> None:
    rng = np.random.default_rng(2)
    boxes1, boxes2 = _random_boxes(rng, 60, extent=15), _random_boxes(rng, 60, extent=15)
    ours = _gradients(boxes1, boxes2)
    single = _gradients(boxes1, boxes2, torch.float32)
    for i, (box1, box2) in enumerate(zip(boxes1, boxes2, strict=True)):
        expected = _differences(box1, box2)
        np.testing.assert_allclose(ours[i], expected, atol=1e-7)
        np.testing.assert_allclose(single[i], expected, atol=1e-4)


def test_gradcheck_of_the_layer() -> None:
    rng = np.random.default_rng(3)
    boxes1 = torch.tensor(_random_boxes(rng, 8, extent=10), requires_grad=True)
    boxes2 = torch.tensor(_random_boxes(rng, 8, extent=10), requires_grad=True)
    assert torch.autograd.gradcheck(rotated_iou_aligned, (boxes1, boxes2))


def test_hand_worked_gradient() -> None:
    # 4 x 2 boxes, the second 1 px further right: I = 3 * 2, U = 10.
    ours = _gradients(np.array([0.0, 0, 4, 2, 0]), np.array([1.0, 0, 4, 2, 0]))[0]
    # Moving box 1 right: I grows by 2 per px. dIoU = (2 * 10 + 6 * 2) / 100.
    assert ours[0] == pytest.approx(0.32)
    # Widening box 1: only its right side gains, I by 1 per px, U by 2 - 1. dIoU = (1 * 10 - 6 * 1) / 100.
    assert ours[2] == pytest.approx(0.04)
    # Shared long sides: the kink's mean. Outwards I is constant and U grows by 4, inwards I falls by 3, U by 1.
    assert ours[3] == pytest.approx(((0 * 10 - 6 * 4) / 100 + (3 * 10 - 6 * 1) / 100) / 2)
    assert ours[5] == pytest.approx(-0.32)


DEGENERATE = {
    "identical": ([5, 5, 10, 4, 0.3], [5, 5, 10, 4, 0.3]),
    "identical, other form": ([5, 5, 10, 4, 0.3], [5, 5, 4, 10, 0.3 + math.pi / 2]),
    "identical, half turn": ([5, 5, 10, 4, 0.3], [5, 5, 10, 4, 0.3 + math.pi]),
    "zero width": ([5, 5, 0, 4, 0.3], [5, 5, 10, 4, 0.3]),
    "zero both": ([5, 5, 0, 0, 0.3], [5, 5, 0, 0, 0.3]),
    "negative width": ([5, 5, -3, 4, 0.3], [5, 5, 10, 4, 0.3]),
    "negative both": ([5, 5, -3, -4, 0.3], [5, 5, 10, 4, 0.3]),
    "thousands of px away": ([5, 5, 10, 4, 0.3], [9000, -7000, 10, 4, 0.3]),
    "far from the origin": ([1e6, 1e6, 10, 4, 0.3], [1e6 + 1, 1e6, 10, 4, 0.31]),
    "huge": ([0, 0, 1e6, 1e6, 0.3], [5, 5, 10, 4, 0.3]),
    "denormal": ([5, 5, 1e-40, 1e-40, 0.3], [5, 5, 10, 4, 0.3]),
    "tiny": ([5, 5, 1e-7, 1e-7, 0.3], [5, 5, 1e-7, 1e-7, 0.4]),
    "needle": ([5, 5, 1e4, 1e-4, 0.3], [5, 5, 10, 4, 0.3]),
    "touching side": ([0, 0, 4, 2, 0], [4, 0, 4, 2, 0]),
    "touching corner": ([0, 0, 4, 2, 0], [4, 2, 4, 2, 0]),
    "nearly parallel": ([0, 0, 4, 2, 0], [0, 0, 4, 2, 1e-8]),
    "many turns": ([0, 0, 4, 2, 400.0], [0, 0, 4, 2, -300.0]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_boxes_have_finite_gradients(name: str, dtype: torch.dtype) -> None:
    box1, box2 = (torch.tensor([box], dtype=dtype, requires_grad=True) for box in DEGENERATE[name])
    iou = rotated_iou_aligned(box1, box2)
    iou.sum().backward()
    assert 0 <= iou.item() <= 1 and torch.isfinite(box1.grad).all() and torch.isfinite(box2.grad).all()
    if name.startswith("identical"):
        assert iou.item() == pytest.approx(1, abs=1e-6)
    if name == "identical":
        assert box1.grad.abs().max() < 1e-6  # the mean of the one-sided derivatives at the maximum


def test_not_a_number_is_not_hidden() -> None:
    boxes = torch.tensor([[0, 0, 4, 2, math.nan], [math.nan, 0, 4, 2, 0], [0, 0, math.nan, 2, 0]])
    assert rotated_iou_aligned(boxes, torch.tensor([[0.0, 0, 4, 2, 0]] * 3)).isnan().all()


# Rounded: between edges on one line (the kink's mean) and edges at an angle there are no angles of 1e-36, where the
# gradients of the two boxes may be those of different sides of the kink.
_box = st.tuples(st.floats(-50, 50), st.floats(-50, 50), st.floats(0.1, 80), st.floats(0.1, 80), st.floats(-7, 7)).map(
    lambda box: np.round(box, 6)
)


@settings(deadline=None, max_examples=60)
@given(_box, _box, st.floats(-1e3, 1e3), st.floats(-4, 4))
def test_symmetric_bounded_invariant(box1: np.ndarray, box2: np.ndarray, shift: float, turn: float) -> None:
    def iou(first: np.ndarray, second: np.ndarray) -> float:
        return rotated_iou_aligned(torch.tensor(first[None]), torch.tensor(second[None])).item()

    def move(box: np.ndarray) -> np.ndarray:
        x, y = box[0] * math.cos(turn) - box[1] * math.sin(turn), box[0] * math.sin(turn) + box[1] * math.cos(turn)
        return np.array([x + shift, y - shift, box[2], box[3], box[4] + turn])

    value = iou(box1, box2)
    assert 0 <= value <= 1 + 1e-12
    assert iou(box2, box1) == pytest.approx(value, abs=1e-9)
    assert iou(move(box1), move(box2)) == pytest.approx(value, abs=1e-9)
    assert iou(box1[[0, 1, 3, 2, 4]] + [0, 0, 0, 0, math.pi / 2], box2) == pytest.approx(value, abs=1e-9)
    assert value == pytest.approx(exact_iou(box1, box2, grid_size=1e-12), abs=1e-9)
    gradients = _gradients(box1, box2)[0]
    assert np.isfinite(gradients).all()
    # Moving or turning both boxes alike changes nothing.
    np.testing.assert_allclose(gradients[:2] + gradients[5:7], 0, atol=1e-8)


def test_half_precision_and_autocast_compute_in_float32() -> None:
    boxes1, boxes2 = torch.tensor([[0, 0, 4, 2, 0.5]] * 3), torch.tensor([[0.5, 0, 4, 2, 0.25]] * 3)
    expected = rotated_iou_aligned(boxes1, boxes2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(rotated_iou_aligned(boxes1, boxes2), expected)
    half = boxes1.bfloat16().requires_grad_()
    result = rotated_iou_aligned(half, boxes2)
    result.sum().backward()
    assert result.dtype == torch.float32 and torch.equal(result, expected) and half.grad.dtype == torch.bfloat16


def test_pairwise_equals_aligned_whatever_the_chunks() -> None:
    rng = np.random.default_rng(4)
    boxes1, boxes2 = torch.tensor(_random_boxes(rng, 23, 80)), torch.tensor(_random_boxes(rng, 31, 80))
    expected = rotated_iou_aligned(boxes1.repeat_interleave(31, 0), boxes2.repeat(23, 1)).view(23, 31)
    for pairs_per_chunk in (1, 50, 1 << 20):
        assert torch.allclose(
            rotated_iou_pairwise(boxes1, boxes2, pairs_per_chunk=pairs_per_chunk), expected, atol=1e-15
        )
    assert rotated_iou_pairwise(boxes1[:0], boxes2).shape == (0, 31)
    assert rotated_iou_pairwise(boxes1, boxes2[:0]).shape == (23, 0)
    assert rotated_iou_aligned(boxes1[:0], boxes2[:0]).shape == (0,)


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="two \\(N, 5\\)"):
        rotated_iou_aligned(torch.zeros(2, 5), torch.zeros(3, 5))
    with pytest.raises(ValueError, match="two \\(N, 5\\)"):
        rotated_iou_aligned(torch.zeros(2, 4), torch.zeros(2, 4))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_equals_cpu() -> None:
    rng = np.random.default_rng(5)
    boxes1, boxes2 = (torch.tensor(_random_boxes(rng, 200)).float() for _ in range(2))
    expected = rotated_iou_pairwise(boxes1, boxes2)
    assert torch.allclose(rotated_iou_pairwise(boxes1.cuda(), boxes2.cuda()).cpu(), expected, atol=1e-6)
