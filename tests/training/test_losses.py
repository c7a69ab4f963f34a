"""Quality focal, rotated IoU, GIoU and dice loss: oracle, hand-worked numbers, half precision."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rtmdet_geo.training.losses import dice_loss, giou_loss, quality_focal_loss, reduce_loss, rotated_iou_loss


def test_oracle_quality_focal_loss(oracle_dir: Path) -> None:
    case = json.loads((oracle_dir / "ops.json").read_text())["losses"]["qfl"]
    arguments = (torch.tensor(case["logits"]), torch.tensor(case["label"]), torch.tensor(case["score"]))
    weight, beta = torch.tensor(case["weight"]), case["beta"]
    none = quality_focal_loss(*arguments, beta=beta, reduction="none")
    np.testing.assert_allclose(none.numpy(), case["none"], rtol=1e-5)
    assert quality_focal_loss(*arguments, beta=beta).item() == pytest.approx(case["mean"], rel=1e-5)
    averaged = quality_focal_loss(*arguments, weight=weight, beta=beta, average_factor=1.0)
    assert averaged.item() == pytest.approx(case["mean_avg1"], rel=1e-5)
    # Negative control: another exponent is noticed.
    assert quality_focal_loss(*arguments, beta=beta + 0.1).item() != pytest.approx(case["mean"], rel=1e-3)


def test_oracle_rotated_iou_loss(oracle_dir: Path) -> None:
    case = json.loads((oracle_dir / "ops.json").read_text())["losses"]["rotated_iou"]
    predictions, targets = torch.tensor(case["pred"]), torch.tensor(case["target"])
    weight, factor = torch.tensor(case["weight"]), case["loss_weight"]
    for mode in ("linear", "log", "square"):
        none = factor * rotated_iou_loss(predictions, targets, mode=mode, epsilon=case["eps"], reduction="none")
        np.testing.assert_allclose(none.numpy(), case[mode]["none"], rtol=1e-5, atol=3e-6, err_msg=mode)
        averaged = rotated_iou_loss(
            predictions, targets, weight=weight, mode=mode, epsilon=case["eps"], average_factor=1.0
        )
        assert factor * averaged.item() == pytest.approx(case[mode]["mean_avg1"], rel=1e-5), mode


def test_oracle_giou_loss(oracle_dir: Path) -> None:
    case = json.loads((oracle_dir / "ops.json").read_text())["losses"]["giou"]
    boxes, weight = (torch.tensor(case["pred"]), torch.tensor(case["target"])), torch.tensor(case["weight"])
    factor, epsilon = case["loss_weight"], case["eps"]
    none = giou_loss(*boxes, epsilon=epsilon, reduction="none")
    np.testing.assert_allclose(1 - none.numpy(), case["giou"], rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(factor * none.numpy(), case["none"], rtol=1e-5, atol=2e-6)
    averaged = giou_loss(*boxes, weight=weight, epsilon=epsilon, average_factor=1.0)
    assert factor * averaged.item() == pytest.approx(case["mean_avg1"], rel=1e-5)
    assert giou_loss(*boxes, weight=0 * weight, average_factor=1.0).item() == case["zero_weight"]
    # Negative control: plain IoU is another loss.
    assert np.abs(none.numpy() - (1 - np.array(case["iou"]))).max() > 0.1


def test_oracle_dice_loss(oracle_dir: Path) -> None:
    case = json.loads((oracle_dir / "ops.json").read_text())["losses"]["dice"]
    masks = torch.tensor(case["logits"]), torch.tensor(case["mask"])
    none = dice_loss(*masks, epsilon=case["eps"], reduction="none")
    np.testing.assert_allclose(case["loss_weight"] * none.numpy(), case["none"], rtol=1e-5)
    averaged = dice_loss(*masks, epsilon=case["eps"], average_factor=case["mean_avg"]["avg_factor"])
    assert case["loss_weight"] * averaged.item() == pytest.approx(case["mean_avg"]["value"], rel=1e-5)
    # Negative control: the logits themselves are no probabilities.
    assert dice_loss(masks[0].sigmoid(), masks[1]).item() != pytest.approx(averaged.item(), rel=1e-3)


def test_quality_focal_loss_by_hand() -> None:
    # Logit 0 is probability 1/2, BCE ln 2 for any target. Background: ln 2 / 4 for each of two classes.
    logits = torch.zeros(3, 2)
    loss = quality_focal_loss(logits, torch.tensor([2, 0, -1]), torch.tensor([0.9, 1.0, 0.9]), reduction="none")
    assert loss[0].item() == pytest.approx(math.log(2) / 2)  # the score of background does not count
    assert loss[1].item() == pytest.approx(math.log(2) / 2)  # |1 - .5|² and |0 - .5|²
    assert loss[2].item() == pytest.approx(math.log(2) / 2)
    # The loss is 0 and flat where the probability equals the soft label.
    exact = torch.tensor([[math.log(0.7 / 0.3)]], requires_grad=True)
    found = quality_focal_loss(exact, torch.tensor([0]), torch.tensor([0.7]), reduction="sum")
    found.backward()
    assert found.item() == pytest.approx(0, abs=1e-12) and exact.grad.abs().item() < 1e-6


def test_quality_focal_loss_other_exponent_equals_power() -> None:
    logits, labels, scores = (
        torch.randn(5, 3, generator=torch.Generator().manual_seed(0)),
        torch.arange(5),
        torch.rand(5),
    )
    square = quality_focal_loss(logits, labels, scores, beta=2.0, reduction="none")
    almost = quality_focal_loss(logits, labels, scores, beta=2.0 + 1e-9, reduction="none")
    assert torch.allclose(square, almost, atol=1e-6)


@pytest.mark.parametrize(("mode", "expected"), [("linear", 0.4), ("square", 1 - 0.36), ("log", -math.log(0.6))])
def test_rotated_iou_loss_by_hand(mode: str, expected: float) -> None:
    predictions = torch.tensor([[0.0, 0, 4, 2, 0], [50.0, 0, 4, 2, 0]], requires_grad=True)
    targets = torch.tensor([[1.0, 0, 4, 2, 0], [1.0, 0, 4, 2, 0]])  # IoU 6 / 10 and 0
    loss = rotated_iou_loss(predictions, targets, mode=mode, reduction="none")
    floor = {"linear": 1 - 1e-6, "square": 1 - 1e-12, "log": -math.log(1e-6)}[mode]
    np.testing.assert_allclose(loss.detach().numpy(), [expected, floor], rtol=1e-5)
    loss.sum().backward()
    assert predictions.grad[0, 0] < 0  # descending moves the box to the right, onto its target
    assert torch.equal(predictions.grad[1], torch.zeros(5))


def test_giou_loss_by_hand() -> None:
    # 4 x 4 boxes: half over each other (IoU 8 / 24, enclosing 24), and one box apart (union 32, enclosing 48).
    predictions = torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 4]], requires_grad=True)
    loss = giou_loss(predictions, torch.tensor([[2.0, 0, 6, 4], [8, 0, 12, 4]]), reduction="none")
    np.testing.assert_allclose(loss.detach().numpy(), [1 - 1 / 3, 1 + 16 / 48], rtol=1e-6)
    loss.sum().backward()
    assert (predictions.grad[:, 2] < 0).all()  # descending moves both to the right, the one that is apart as well


_side = st.floats(0.5, 60)
_hbox = st.tuples(st.floats(-50, 50), st.floats(-50, 50), _side, _side).map(
    lambda b: [b[0], b[1], b[0] + b[2], b[1] + b[3]]
)


@settings(deadline=None, max_examples=60)
@given(_hbox, _hbox, st.floats(-200, 200), st.floats(0.2, 5))
def test_giou_is_symmetric_bounded_and_knows_no_frame(
    first: list[float], second: list[float], shift: float, scale: float
) -> None:
    boxes = torch.tensor([first]), torch.tensor([second])
    value = giou_loss(*boxes).item()
    assert -1e-6 <= value <= 2
    assert giou_loss(boxes[1], boxes[0]).item() == pytest.approx(value, abs=1e-4)
    assert giou_loss(*(scale * (box + shift) for box in boxes)).item() == pytest.approx(value, abs=2e-3)
    assert giou_loss(boxes[0], boxes[0]).item() == pytest.approx(0, abs=1e-6)


def test_dice_loss_by_hand() -> None:
    sure = 20.0  # sigmoid 1 - 2e-9
    logits = torch.tensor([[[sure, sure], [-sure, -sure]], [[sure, sure], [-sure, -sure]], [[-sure, -sure]] * 2])
    targets = torch.tensor([[[1, 1], [0, 0]], [[1, 0], [1, 0]], [[0, 0], [0, 0]]])
    loss = dice_loss(logits, targets, reduction="none")
    # Equal masks; one of two pixels hit: 1 - 2 * 1 / (2 + 2); empty and empty: nothing in common.
    np.testing.assert_allclose(loss.numpy(), [0, 0.5, 1], atol=1e-5)


@pytest.mark.parametrize(("loss", "columns"), [(giou_loss, 4), (dice_loss, 6)])
def test_overlap_losses_of_nothing_keep_the_gradient(loss: Any, columns: int) -> None:
    nothing = torch.zeros(0, columns, requires_grad=True)
    value = loss(nothing, torch.zeros(0, columns), average_factor=1.0)
    value.backward()
    assert value.item() == 0 and nothing.grad.shape == (0, columns)
    with pytest.raises(ValueError, match="takes two"):
        loss(torch.zeros(2, columns), torch.zeros(3, columns))


def test_descent_reaches_the_target() -> None:
    """The gradient is good for its purpose: from a rough start the box ends on its target."""
    target = torch.tensor([[30.0, 20, 40, 12, 0.9]])
    box = torch.tensor([[26.0, 24, 30, 18, 0.5]], requires_grad=True)
    for step in range(200):
        loss = rotated_iou_loss(box, target)
        (gradient,) = torch.autograd.grad(loss, box)
        with torch.no_grad():
            box -= gradient.sign() * torch.tensor([0.4, 0.4, 0.4, 0.4, 0.02]) * (1 - step / 200)
    assert loss.item() < 0.03


def test_reductions() -> None:
    loss, weight = torch.tensor([1.0, 2, 3]), torch.tensor([1.0, 0, 2])
    assert reduce_loss(loss).item() == 2
    assert reduce_loss(loss, weight, reduction="sum").item() == 7
    assert reduce_loss(loss, weight, average_factor=2).item() == pytest.approx(3.5)
    assert reduce_loss(loss, weight, average_factor=0).item() == pytest.approx(7 / torch.finfo(torch.float32).eps)
    assert reduce_loss(loss, weight, reduction="none").tolist() == [1, 0, 6]
    with pytest.raises(ValueError, match="average_factor"):
        reduce_loss(loss, reduction="sum", average_factor=1)
    with pytest.raises(ValueError, match="median"):
        reduce_loss(loss, reduction="median")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cubic"):
        rotated_iou_loss(torch.zeros(1, 5), torch.zeros(1, 5), mode="cubic")  # type: ignore[arg-type]


def test_half_precision_gives_float32() -> None:
    logits = torch.randn(6, 3, generator=torch.Generator().manual_seed(1)).bfloat16()
    labels, scores = torch.tensor([0, 1, 2, 3, 3, 0]), torch.rand(6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = quality_focal_loss(logits, labels, scores)
        boxes = torch.tensor([[10.0, 10, 8, 4, 0.3]])
        box_loss = rotated_iou_loss(boxes.bfloat16(), boxes)
        flat_loss = giou_loss(boxes[:, :4].bfloat16(), boxes[:, :4])
        mask_loss = dice_loss(logits, (logits > 0).byte())
    assert loss.dtype == box_loss.dtype == flat_loss.dtype == mask_loss.dtype == torch.float32
    assert loss.item() == pytest.approx(quality_focal_loss(logits.float(), labels, scores).item())
    # Extreme logits stay finite.
    assert torch.isfinite(quality_focal_loss(torch.tensor([[1e4, -1e4, 0.0]]), torch.tensor([1]), torch.tensor([0.5])))
