"""Losses and assignments of whole models against the reference's, and the criterion's conventions."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rtmdet_geo.models import RotatedOutputs, get_model
from rtmdet_geo.training.criterion import RotatedCriterion

REFERENCE_NAMES = {
    "rotated_rtmdet_tiny": "rtmdet_r_tiny",
    "rotated_rtmdet_s": "rtmdet_r_s",
    "rotated_rtmdet_m": "rtmdet_r_m",
    "rotated_rtmdet_l": "rtmdet_r_l",
}


def _recipes(folder: Path) -> Any:
    spec = importlib.util.spec_from_file_location("oracle_recipes", folder / "recipes.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _network(case: dict[str, Any], folder: Path) -> torch.nn.Module:
    recipes = _recipes(folder)
    network = get_model(REFERENCE_NAMES[case["model"]], num_classes=case["num_classes"])
    values = recipes.weights(case["model"], folder, case["weight_overrides"])
    state = {key: torch.from_numpy(value) for key, value in values.items()}
    missing, unexpected = network.load_state_dict(state, strict=False)
    assert not unexpected and all(key.endswith("num_batches_tracked") for key in missing)
    return network.train(case["mode"] == "train")


def _targets(case: dict[str, Any]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [
        (torch.tensor(gt["bboxes"], dtype=torch.float32).reshape(-1, 5), torch.tensor(gt["labels"], dtype=torch.int64))
        for gt in case["gt"]
    ]


def test_oracle_losses_and_assignments(oracle_dir: Path) -> None:
    cases = json.loads((oracle_dir / "loss_rot.json").read_text())["cases"]
    assert cases
    for case in cases:
        network, targets = _network(case, oracle_dir), _targets(case)
        criterion = RotatedCriterion(case["num_classes"])
        with torch.no_grad():
            outputs = network(torch.from_numpy(_recipes(oracle_dir).realise(case["input"])))
            per_level = criterion.losses_per_level(outputs, targets)
            total = criterion(outputs, targets)
            assignments = criterion.assignments(outputs, targets)
        rtol = 1e-4 if case["mode"] == "eval" else 1e-3
        for name, expected in case["losses_per_level"].items():
            np.testing.assert_allclose(per_level[name].numpy(), expected, rtol=rtol, err_msg=f"{case['case']} {name}")
        for name, expected in case["losses"].items():
            np.testing.assert_allclose(float(total[name]), expected, rtol=rtol, err_msg=f"{case['case']} {name}")
        for found, expected in zip(assignments, case["assignment"], strict=True):
            pairs = zip(found.gts.tolist(), found.ious.tolist(), strict=True)
            ours = dict(zip(found.priors.tolist(), pairs, strict=True))
            theirs = dict(zip(expected["priors"], zip(expected["gt"], expected["iou"], strict=True), strict=True))
            allowed = 0 if case["mode"] == "eval" else 2
            assert len(ours.keys() ^ theirs.keys()) <= allowed, case["case"]
            both = sorted(ours.keys() & theirs.keys())
            atol = 1e-3 if allowed else 2e-5
            assert sum(ours[key][0] != theirs[key][0] for key in both) <= allowed
            np.testing.assert_allclose([ours[k][1] for k in both], [theirs[k][1] for k in both], atol=atol)


def test_oracle_notices_another_averaging(oracle_dir: Path) -> None:
    """Negative control: without the box loss's factor 2 the numbers differ."""
    case = json.loads((oracle_dir / "loss_rot.json").read_text())["cases"][0]
    with torch.no_grad():
        outputs = _network(case, oracle_dir)(torch.from_numpy(_recipes(oracle_dir).realise(case["input"])))
        losses = RotatedCriterion(case["num_classes"], loss_bbox_weight=1.9)(outputs, _targets(case))
    assert float(losses["loss_bbox"]) != pytest.approx(case["losses"]["loss_bbox"], rel=1e-2)


def _outputs(num_images: int = 2, num_classes: int = 3, size: int = 64, seed: int = 0) -> RotatedOutputs:
    """Leaf tensors with gradients, boxes of a plausible size."""
    rng = torch.Generator().manual_seed(seed)
    shapes = [(num_images, size // stride, size // stride) for stride in (8, 16, 32)]
    cls = [torch.randn(n, num_classes, h, w, generator=rng) - 3 for n, h, w in shapes]
    reg = [torch.rand(n, 4, h, w, generator=rng) * 12 + 2 for n, h, w in shapes]
    angle = [torch.randn(n, 1, h, w, generator=rng) * 0.3 for n, h, w in shapes]
    return RotatedOutputs(*([level.requires_grad_() for level in levels] for levels in (cls, reg, angle)))


def _target(*boxes: list[float], labels: list[int] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    labels = labels if labels is not None else [0] * len(boxes)
    return torch.tensor(boxes, dtype=torch.float32).reshape(-1, 5), torch.tensor(labels, dtype=torch.int64)


EMPTY = _target()
FLEET = _target(*[[x, y, 22, 16, 0.2] for x in (12, 34, 52) for y in (10, 32, 54)], labels=[0, 1, 2] * 3)
SHIPS = _target([20, 20, 30, 12, 0.4], [44, 40, 12, 28, -2.0], labels=[1, 2])


def _leaves(outputs: RotatedOutputs) -> list[torch.Tensor]:
    return [level for levels in outputs for level in levels]


def test_backward_reaches_every_output_and_only_positives_learn_boxes() -> None:
    outputs, criterion = _outputs(), RotatedCriterion(3)
    losses = criterion(outputs, [SHIPS, EMPTY])
    assert set(losses) == {"loss_cls", "loss_bbox"} and all(loss.shape == () for loss in losses.values())
    sum(losses.values()).backward()
    assert all(level.grad is not None and level.grad.isfinite().all() for level in _leaves(outputs))
    assert all((level.grad != 0).all() for level in outputs.cls)
    learning = sum(int((level.grad != 0).any(1).sum()) for level in outputs.reg)
    found = criterion.assignments(outputs, [SHIPS, EMPTY])
    assert learning == sum(int((image.ious > 0).sum()) for image in found) > 0
    assert sum(float(level.grad[1].abs().sum()) for level in outputs.reg) == 0  # the empty image


def test_empty_batch_gives_zero_gradients_for_boxes() -> None:
    outputs = _outputs()
    losses = RotatedCriterion(3)(outputs, [EMPTY, EMPTY])
    assert losses["loss_bbox"].item() == 0 and losses["loss_cls"].item() > 0
    sum(losses.values()).backward()
    assert all(level.grad is not None for level in _leaves(outputs))
    assert all(not level.grad.any() for level in (*outputs.reg, *outputs.angle))


def test_background_loss_by_hand() -> None:
    """Logits 0 without any object: ln 2 / 4 for each prior and class, divided by the average factor 1."""
    outputs = _outputs(num_images=1)
    with torch.no_grad():
        for level in outputs.cls:
            level.zero_()
    per_level = RotatedCriterion(3).losses_per_level(outputs, [EMPTY])
    np.testing.assert_allclose(
        per_level["loss_cls"].detach().numpy(), [count * 3 * np.log(2) / 4 for count in (64, 16, 4)], rtol=1e-6
    )


def test_angle_convention_of_the_targets_does_not_matter() -> None:
    outputs, criterion = _outputs(1), RotatedCriterion(3)
    boxes, labels = SHIPS
    turned = torch.stack((*boxes[:, :2].T, boxes[:, 3], boxes[:, 2], boxes[:, 4] + 3 * np.pi / 2), dim=1).float()
    first, second = criterion(outputs, [(boxes, labels)]), criterion(outputs, [(turned, labels)])
    for name in first:
        assert first[name].item() == pytest.approx(second[name].item(), rel=1e-4)


def test_ignore_boxes_silence_background_only() -> None:
    outputs, criterion = _outputs(1), RotatedCriterion(3)
    plain = criterion.losses_per_level(outputs, [SHIPS])
    nothing_ignored = criterion.losses_per_level(outputs, [(*SHIPS, torch.zeros(0, 5))])
    everywhere = criterion.losses_per_level(outputs, [(*SHIPS, torch.tensor([[32.0, 32, 500, 500, 0.1]]))])
    assert all(torch.equal(plain[name], nothing_ignored[name]) for name in plain)
    assert torch.equal(plain["loss_bbox"], everywhere["loss_bbox"])
    assert 0 < everywhere["loss_cls"].sum() < plain["loss_cls"].sum()  # positives still count
    everywhere["loss_cls"].sum().backward()
    learning = sum(int((level.grad != 0).any(1).sum()) for level in outputs.cls)
    assert learning == len(criterion.assignments(outputs, [SHIPS])[0].priors)
    # By hand: one prior (8 px level, row 1, column 1, at 8, 8) ignored.
    outputs = _outputs(1)
    before = criterion(outputs, [EMPTY])["loss_cls"]
    after = criterion(outputs, [(*EMPTY, torch.tensor([[9.0, 9, 4, 4, 0]]))])["loss_cls"]
    logits = outputs.cls[0][0, :, 1, 1]
    expected = (torch.nn.functional.softplus(logits) * logits.sigmoid() ** 2).sum()
    assert (before - after).item() == pytest.approx(expected.item(), rel=1e-3)


def test_half_precision_outputs_give_float32_losses() -> None:
    outputs = _outputs()
    half = RotatedOutputs(*([level.bfloat16() for level in levels] for levels in outputs))
    rounded = RotatedOutputs(*([level.float() for level in levels] for levels in half))
    criterion, targets = RotatedCriterion(3), [SHIPS, SHIPS]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = criterion(half, targets)
    for name, expected in criterion(rounded, targets).items():
        assert losses[name].dtype == torch.float32 and losses[name].item() == pytest.approx(expected.item(), rel=1e-6)
    sum(losses.values()).backward()
    assert all(level.grad.isfinite().all() for level in _leaves(outputs))


@pytest.mark.parametrize(
    "case", ["crowded", "zero size", "negative size", "identical", "huge", "far", "degenerate ground truth"]
)
def test_hard_cases_have_finite_losses_and_gradients(case: str) -> None:
    outputs, target = _outputs(1), SHIPS
    with torch.no_grad():
        for level in outputs.reg:
            if case == "zero size":
                level.zero_()
            elif case == "negative size":
                level.neg_()
            elif case == "huge":
                level.mul_(1e5)
            elif case == "far":
                level[:, 0] -= 9000
                level[:, 2] += 9000
    if case == "crowded":
        rng = np.random.default_rng(0)
        boxes = np.column_stack((rng.random((150, 2)) * 64, rng.random((150, 2)) * 20 + 3, rng.random(150) * 3))
        target = _target(*boxes.tolist(), labels=rng.integers(0, 3, 150).tolist())
    elif case == "identical":
        target = _target(*[[30, 30, 30, 20, 0.3]] * 5)
    elif case == "degenerate ground truth":
        target = _target([20, 20, 0, 10, 0.3], [20, 20, 0, 0, 0], [30, 30, -5, 9, 0], [900, 900, 20, 9, 0])
    losses = RotatedCriterion(3)(outputs, [target])
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert all(level.grad.isfinite().all() for level in _leaves(outputs))


def test_not_a_number_reaches_the_loss() -> None:
    outputs = _outputs(1)
    with torch.no_grad():
        outputs.reg[0].fill_(np.nan)
        outputs.cls[1].fill_(np.nan)
    losses = RotatedCriterion(3)(outputs, [SHIPS])
    assert not losses["loss_cls"].isfinite()


def test_learning_lowers_the_loss() -> None:
    """The whole criterion is good for its purpose: free outputs learn the ships."""
    outputs, criterion = _outputs(1), RotatedCriterion(3)
    leaves = _leaves(outputs)
    scales = [*[1.0] * 3, *[20.0] * 3, *[0.1] * 3]
    history = []
    for _ in range(120):
        losses = criterion(outputs, [SHIPS])
        gradients = torch.autograd.grad(sum(losses.values()), leaves)
        history.append(losses["loss_bbox"].item())
        with torch.no_grad():
            for leaf, gradient, scale in zip(leaves, gradients, scales, strict=True):
                leaf -= scale * gradient
    found = criterion.assignments(outputs, [SHIPS])[0]
    assert history[-1] < 0.5 * history[0] and found.ious.max() > 0.8


def test_wrong_targets_are_refused() -> None:
    outputs, criterion = _outputs(2), RotatedCriterion(3)
    with pytest.raises(ValueError, match="1 targets for a batch of 2"):
        criterion(outputs, [SHIPS])
    with pytest.raises(ValueError, match="3 classes"):
        criterion(outputs, [SHIPS, _target([20, 20, 30, 12, 0.4], labels=[3])])


def _distributed_worker(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    outputs = _outputs(2)
    part = RotatedOutputs(*([level[rank : rank + 1].detach() for level in levels] for levels in outputs))
    losses = RotatedCriterion(3)(part, [(FLEET, SHIPS)[rank]])
    torch.save({name: loss.item() for name, loss in losses.items()}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_average_to_the_loss_of_one(tmp_path: Path) -> None:
    """With the average factor shared, the mean of the processes' losses is that of the whole batch."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_criterion as t; "
        f"t._distributed_worker(int(sys.argv[1]), {str(tmp_path)!r})"
    )
    workers = [
        subprocess.Popen([sys.executable, "-c", code, str(rank)], env=os.environ | {"OMP_NUM_THREADS": "1"})
        for rank in range(2)
    ]
    assert [worker.wait(timeout=250) for worker in workers] == [0, 0]
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    outputs, criterion = _outputs(2), RotatedCriterion(3)
    sum_iou = sum(float(image.ious.sum()) for image in criterion.assignments(outputs, [FLEET, SHIPS]))
    assert sum_iou > 2  # else the clamp at 1 hides the averaging
    for name, expected in criterion(outputs, [FLEET, SHIPS]).items():
        assert (parts[0][name] + parts[1][name]) / 2 == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_equals_cpu() -> None:
    outputs, criterion = _outputs(2), RotatedCriterion(3)
    expected = criterion(outputs, [SHIPS, EMPTY])
    on_gpu = RotatedOutputs(*([level.detach().cuda().requires_grad_() for level in levels] for levels in outputs))
    found = criterion(on_gpu, [tuple(part.cuda() for part in target) for target in (SHIPS, EMPTY)])
    sum(found.values()).backward()
    sum(expected.values()).backward()
    for name, loss in expected.items():
        assert found[name].item() == pytest.approx(loss.item(), rel=1e-4)
    for ours, theirs in zip(_leaves(on_gpu), _leaves(outputs), strict=True):
        assert torch.allclose(ours.grad.cpu(), theirs.grad, atol=1e-4)
