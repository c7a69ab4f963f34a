"""Losses and assignments of whole models against the reference's, and the criterion's conventions."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from rtmdet_geo.boxes import boxes_to_hboxes, boxes_to_polygons
from rtmdet_geo.models import HorizontalOutputs, InstanceOutputs, RotatedOutputs, get_model
from rtmdet_geo.training.criterion import CRITERIA, InstanceCriterion, RotatedCriterion, Target, make_criterion
from rtmdet_geo.training.mask_loss import dynamic_masks

#: Golden numbers of each kind.
ORACLE_FILES = {"rotated": "loss_rot.json", "horizontal": "loss_det.json", "mask": "loss_ins.json"}


def _our_name(reference: str) -> str:
    return reference.replace("rotated_rtmdet", "rtmdet_r").replace("rtmdet-ins", "rtmdet_ins")


def _recipes(folder: Path) -> Any:
    spec = importlib.util.spec_from_file_location("oracle_recipes", folder / "recipes.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _network(case: dict[str, Any], folder: Path) -> torch.nn.Module:
    recipes = _recipes(folder)
    network = get_model(_our_name(case["model"]), num_classes=case["num_classes"])
    values = recipes.weights(case["model"], folder, case["weight_overrides"])
    state = {key: torch.from_numpy(value) for key, value in values.items()}
    missing, unexpected = network.load_state_dict(state, strict=False)
    assert not unexpected and all(key.endswith("num_batches_tracked") for key in missing)
    return network.train(case["mode"] == "train")


def _targets(case: dict[str, Any], kind: str, folder: Path) -> list[Target]:
    targets = []
    for gt in case["gt"]:
        boxes = torch.tensor(gt["bboxes"], dtype=torch.float32).reshape(-1, CRITERIA[kind].columns)
        masks = np.zeros((len(boxes), *case["img_shape"]), np.uint8)
        for mask, box in zip(masks, gt["bboxes"], strict=True):
            if kind == "mask":
                mask[:] = _recipes(folder).ellipse_mask(box, *case["img_shape"])
        labels = torch.tensor(gt["labels"], dtype=torch.int64)
        targets.append(Target(boxes, labels, masks=torch.from_numpy(masks) if kind == "mask" else None))
    return targets


def _check_assignments(found: list[Any], expected: list[dict[str, Any]], where: str, *, allowed: int) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        pairs = dict(zip(ours.priors.tolist(), zip(ours.gts.tolist(), ours.ious.tolist(), strict=True), strict=True))
        golden = dict(zip(theirs["priors"], zip(theirs["gt"], theirs["iou"], strict=True), strict=True))
        assert len(pairs.keys() ^ golden.keys()) <= allowed, where
        both = sorted(pairs.keys() & golden.keys())
        assert sum(pairs[key][0] != golden[key][0] for key in both) <= allowed, where
        atol = 1e-3 if allowed else 2e-5
        np.testing.assert_allclose([pairs[k][1] for k in both], [golden[k][1] for k in both], atol=atol, err_msg=where)


def _check_gradients(network: torch.nn.Module, case: dict[str, Any], where: str) -> None:
    """The oracle's norms; a parameter has a gradient or none as the reference's has."""
    parameters = dict(network.named_parameters(remove_duplicate=False))
    missing = {name for name, parameter in network.named_parameters() if parameter.grad is None}
    assert missing == set(case["grad_none"]), where
    names = list(case["grad_l2"])
    norms = [float(parameters[name].grad.double().norm()) for name in names]
    rtol = 1e-3 if case["mode"] == "eval" else 5e-2
    np.testing.assert_allclose(norms, list(case["grad_l2"].values()), rtol=rtol, err_msg=f"{where} {names}")


@pytest.mark.parametrize("kind", ORACLE_FILES)
def test_oracle_losses_assignments_and_gradients(oracle_dir: Path, kind: str) -> None:
    cases = json.loads((oracle_dir / ORACLE_FILES[kind]).read_text())["cases"]
    assert cases
    for case in cases:
        where = f"{kind} {case['case']}"
        network, targets = _network(case, oracle_dir), _targets(case, kind, oracle_dir)
        assert network.kind == kind
        criterion = make_criterion(network.kind, case["num_classes"])
        outputs = network(torch.from_numpy(_recipes(oracle_dir).realise(case["input"])))
        per_level, total = criterion.losses_per_level(outputs, targets), criterion(outputs, targets)
        rtol = 1e-4 if case["mode"] == "eval" else 1e-3
        assert set(total) == set(case["losses"]) and set(per_level) == set(case["losses_per_level"])
        for name, expected in case["losses_per_level"].items():
            found = per_level[name].detach().numpy()
            np.testing.assert_allclose(found, expected, rtol=rtol, err_msg=f"{where} {name}")
        for name, expected in case["losses"].items():
            np.testing.assert_allclose(total[name].item(), expected, rtol=rtol, err_msg=f"{where} {name}")
        allowed = 0 if case["mode"] == "eval" else 2
        _check_assignments(criterion.assignments(outputs, targets), case["assignment"], where, allowed=allowed)
        if "grad_l2" in case:
            sum(total.values()).backward()
            _check_gradients(network, case, where)


@pytest.mark.parametrize("kind", ORACLE_FILES)
def test_oracle_notices_another_weight(oracle_dir: Path, kind: str) -> None:
    """Negative control: with another factor of a loss the numbers differ."""
    case = json.loads((oracle_dir / ORACLE_FILES[kind]).read_text())["cases"][0]
    with torch.no_grad():
        outputs = _network(case, oracle_dir)(torch.from_numpy(_recipes(oracle_dir).realise(case["input"])))
        for name in set(case["losses"]) - {"loss_cls"}:
            criterion = CRITERIA[kind](case["num_classes"], **{f"{name}_weight": 1.9})
            losses = criterion(outputs, _targets(case, kind, oracle_dir))
            assert float(losses[name]) != pytest.approx(case["losses"][name], rel=1e-2)


OUTPUTS = {"rotated": RotatedOutputs, "horizontal": HorizontalOutputs, "mask": InstanceOutputs}
KINDS = list(OUTPUTS)
SIDE = 64


def _outputs(kind: str, num_images: int = 2, num_classes: int = 3, seed: int = 0) -> Any:
    """Leaf tensors with gradients, boxes of a plausible size, for images of 64 px."""
    rng = torch.Generator().manual_seed(seed)
    shapes = [(num_images, SIDE // stride, SIDE // stride) for stride in (8, 16, 32)]
    cls = [torch.randn(n, num_classes, h, w, generator=rng) - 3 for n, h, w in shapes]
    reg = [torch.rand(n, 4, h, w, generator=rng) * 12 + 2 for n, h, w in shapes]
    if kind == "rotated":
        parts = [cls, reg, [torch.randn(n, 1, h, w, generator=rng) * 0.3 for n, h, w in shapes]]
    elif kind == "horizontal":
        parts = [cls, reg]
    else:
        kernel = [torch.randn(n, 169, h, w, generator=rng) * 0.4 for n, h, w in shapes]
        parts = [cls, reg, kernel, torch.randn(num_images, 8, SIDE // 8, SIDE // 8, generator=rng)]
    return OUTPUTS[kind](
        *(
            [level.requires_grad_() for level in part] if isinstance(part, list) else part.requires_grad_()
            for part in parts
        )
    )


def _mapped(outputs: Any, function: Any) -> Any:
    """The outputs with every tensor changed."""
    parts = ([function(level) for level in part] if isinstance(part, list) else function(part) for part in outputs)
    return type(outputs)(*parts)


def _leaves(outputs: Any) -> list[torch.Tensor]:
    return [level for part in outputs for level in (part if isinstance(part, list) else [part])]


def _target(kind: str, *boxes: list[float], labels: list[int] | None = None) -> Target:
    """Objects given as rotated boxes; for other kinds the boxes around them, and their pixels."""
    rotated = np.array(boxes, float).reshape(-1, 5)
    wanted = rotated if kind == "rotated" else boxes_to_hboxes(rotated)
    masks = np.zeros((len(rotated), SIDE, SIDE), np.uint8)
    for mask, polygon in zip(masks, boxes_to_polygons(rotated), strict=True):
        cv2.fillPoly(mask, [np.round(polygon).astype(np.int32)], 1)
    return Target(
        torch.tensor(wanted, dtype=torch.float32),
        torch.tensor(labels if labels is not None else [0] * len(boxes), dtype=torch.int64),
        masks=torch.from_numpy(masks) if kind == "mask" else None,
    )


def _empty(kind: str) -> Target:
    return _target(kind)


def _fleet(kind: str) -> Target:
    return _target(kind, *[[x, y, 22, 16, 0.2] for x in (12, 34, 52) for y in (10, 32, 54)], labels=[0, 1, 2] * 3)


def _ships(kind: str) -> Target:
    return _target(kind, [20, 20, 30, 12, 0.4], [44, 40, 12, 28, -2.0], labels=[1, 2])


def _loss_names(kind: str) -> set[str]:
    return {"loss_cls", "loss_bbox"} | ({"loss_mask"} if kind == "mask" else set())


@pytest.mark.parametrize("kind", KINDS)
def test_backward_reaches_every_output_and_only_positives_learn_boxes(kind: str) -> None:
    outputs, criterion, targets = _outputs(kind), make_criterion(kind, 3), [_ships(kind), _empty(kind)]
    losses = criterion(outputs, targets)
    assert set(losses) == _loss_names(kind) and all(loss.shape == () for loss in losses.values())
    sum(losses.values()).backward()
    assert all(level.grad is not None and level.grad.isfinite().all() for level in _leaves(outputs))
    assert all((level.grad != 0).all() for level in outputs.cls)
    found = criterion.assignments(outputs, targets)
    num_learning = sum(int((image.ious > 0).sum()) for image in found)
    assert sum(int((level.grad != 0).any(1).sum()) for level in outputs.reg) == num_learning > 0
    if kind == "mask":
        positives = sum(len(image.priors) for image in found)
        assert sum(int((level.grad != 0).any(1).sum()) for level in outputs.kernel) == positives
        assert outputs.mask_features.grad[0].any() and not outputs.mask_features.grad[1].any()
    assert sum(float(level.grad[1].abs().sum()) for level in outputs.reg) == 0  # the empty image


@pytest.mark.parametrize("kind", KINDS)
def test_empty_batch_gives_zero_gradients_for_all_but_classes(kind: str) -> None:
    outputs = _outputs(kind)
    losses = make_criterion(kind, 3)(outputs, [_empty(kind), _empty(kind)])
    assert losses["loss_cls"].item() > 0
    assert all(losses[name].item() == 0 for name in _loss_names(kind) - {"loss_cls"})
    sum(losses.values()).backward()
    assert all(level.grad is not None for level in _leaves(outputs))
    assert all(not level.grad.any() for level in _leaves(outputs)[3:])


@pytest.mark.parametrize("kind", KINDS)
def test_background_loss_by_hand(kind: str) -> None:
    """Logits 0 without any object: ln 2 / 4 for each prior and class, divided by the average factor 1."""
    outputs = _outputs(kind, num_images=1)
    with torch.no_grad():
        for level in outputs.cls:
            level.zero_()
    per_level = make_criterion(kind, 3).losses_per_level(outputs, [_empty(kind)])
    np.testing.assert_allclose(
        per_level["loss_cls"].detach().numpy(), [count * 3 * np.log(2) / 4 for count in (64, 16, 4)], rtol=1e-6
    )


def test_angle_convention_of_the_targets_does_not_matter() -> None:
    outputs, criterion = _outputs("rotated", 1), RotatedCriterion(3)
    boxes, labels = _ships("rotated")[:2]
    turned = torch.stack((*boxes[:, :2].T, boxes[:, 3], boxes[:, 2], boxes[:, 4] + 3 * np.pi / 2), dim=1).float()
    first, second = criterion(outputs, [(boxes, labels)]), criterion(outputs, [(turned, labels)])
    for name in first:
        assert first[name].item() == pytest.approx(second[name].item(), rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_ignore_boxes_silence_background_only(kind: str) -> None:
    outputs, criterion, ships = _outputs(kind, 1), make_criterion(kind, 3), _ships(kind)
    plain = criterion.losses_per_level(outputs, [ships])
    nothing_ignored = criterion.losses_per_level(outputs, [ships._replace(ignored=torch.zeros(0, 5))])
    around = torch.tensor([[32.0, 32, 500, 500, 0.1]])
    everywhere = criterion.losses_per_level(outputs, [ships._replace(ignored=around)])
    assert all(torch.equal(plain[name], nothing_ignored[name]) for name in plain)
    assert all(torch.equal(plain[name], everywhere[name]) for name in _loss_names(kind) - {"loss_cls"})
    assert 0 < everywhere["loss_cls"].sum() < plain["loss_cls"].sum()  # positives still count
    everywhere["loss_cls"].sum().backward()
    learning = sum(int((level.grad != 0).any(1).sum()) for level in outputs.cls)
    assert learning == len(criterion.assignments(outputs, [ships])[0].priors)
    # By hand: one prior (8 px level, row 1, column 1, at 8, 8) ignored.
    outputs, empty = _outputs(kind, 1), _empty(kind)
    before = criterion(outputs, [empty])["loss_cls"]
    logits = outputs.cls[0][0, :, 1, 1]
    expected = (torch.nn.functional.softplus(logits) * logits.sigmoid() ** 2).sum()
    for box in ([9.0, 9, 4, 4, 0], [7.0, 7, 11, 11]):  # rotated and horizontal boxes do
        after = criterion(outputs, [empty._replace(ignored=torch.tensor([box]))])["loss_cls"]
        assert (before - after).item() == pytest.approx(expected.item(), rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_outputs_give_float32_losses(kind: str) -> None:
    outputs = _outputs(kind)
    half = _mapped(outputs, lambda level: level.bfloat16())
    rounded = _mapped(half, lambda level: level.float())
    criterion, targets = make_criterion(kind, 3), [_ships(kind), _ships(kind)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = criterion(half, targets)
    for name, expected in criterion(rounded, targets).items():
        assert losses[name].dtype == torch.float32 and losses[name].item() == pytest.approx(expected.item(), rel=1e-6)
    sum(losses.values()).backward()
    assert all(level.grad.isfinite().all() for level in _leaves(outputs))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "case", ["crowded", "zero size", "negative size", "identical", "huge", "far", "degenerate ground truth"]
)
def test_hard_cases_have_finite_losses_and_gradients(case: str, kind: str) -> None:
    outputs, target = _outputs(kind, 1), _ships(kind)
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
        target = _target(kind, *boxes.tolist(), labels=rng.integers(0, 3, 150).tolist())
    elif case == "identical":
        target = _target(kind, *[[30, 30, 30, 20, 0.3]] * 5)
    elif case == "degenerate ground truth":
        target = _target(kind, [20, 20, 0, 10, 0.3], [20, 20, 0, 0, 0], [30, 30, -5, 9, 0], [900, 900, 20, 9, 0])
        if kind == "mask":
            target = target._replace(masks=torch.zeros_like(target.masks))
    losses = make_criterion(kind, 3)(outputs, [target])
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert all(level.grad.isfinite().all() for level in _leaves(outputs))


@pytest.mark.parametrize("kind", KINDS)
def test_not_a_number_reaches_the_loss(kind: str) -> None:
    outputs = _outputs(kind, 1)
    with torch.no_grad():
        outputs.reg[0].fill_(np.nan)
        outputs.cls[1].fill_(np.nan)
    losses = make_criterion(kind, 3)(outputs, [_ships(kind)])
    assert not losses["loss_cls"].isfinite()


@pytest.mark.parametrize("kind", KINDS)
def test_learning_lowers_the_loss(kind: str) -> None:
    """The whole criterion is good for its purpose: free outputs learn the ships."""
    outputs, criterion, target = _outputs(kind, 1), make_criterion(kind, 3), _ships(kind)
    leaves = _leaves(outputs)
    scales = [*[1.0] * 3, *[20.0] * 3, *[0.1 if kind == "rotated" else 1.0] * 4][: len(leaves)]
    history = []
    for _ in range(120):
        losses = criterion(outputs, [target])
        gradients = torch.autograd.grad(sum(losses.values()), leaves)
        history.append({name: loss.item() for name, loss in losses.items()})
        with torch.no_grad():
            for leaf, gradient, scale in zip(leaves, gradients, scales, strict=True):
                leaf -= scale * gradient
    found = criterion.assignments(outputs, [target])[0]
    assert history[-1]["loss_bbox"] < 0.5 * history[0]["loss_bbox"] and found.ious.max() > 0.8
    if kind == "mask":
        assert history[-1]["loss_mask"] < 0.3 * history[0]["loss_mask"]


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_targets_are_refused(kind: str) -> None:
    outputs, criterion, ships = _outputs(kind, 2), make_criterion(kind, 3), _ships(kind)
    with pytest.raises(ValueError, match="1 targets for a batch of 2"):
        criterion(outputs, [ships])
    with pytest.raises(ValueError, match="3 classes"):
        criterion(outputs, [ships, _target(kind, [20, 20, 30, 12, 0.4], labels=[3])])
    with pytest.raises(ValueError, match=r"target 1: boxes .* take boxes \(G, [45]\)"):
        criterion(outputs, [ships, ships._replace(boxes=torch.zeros(2, 9 - criterion.columns))])
    if kind == "mask":
        with pytest.raises(ValueError, match="target 0: masks None"):
            criterion(outputs, [ships._replace(masks=None), ships])
        with pytest.raises(ValueError, match=r"masks are \(32, 64\) px"):
            criterion(outputs, [ships._replace(masks=ships.masks[:, ::2]), ships])


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="'classification'; there are rotated, horizontal, mask"):
        make_criterion("classification", 3)  # type: ignore[arg-type]


def test_masks_in_portions_are_the_same_masks() -> None:
    """Portions save memory; losses and gradients are those of all masks at once."""
    target, results = _fleet("mask"), []
    for max_masks in (1000, 4):
        outputs = _outputs("mask", 1)
        losses = InstanceCriterion(3, max_masks=max_masks)(outputs, [target])
        losses["loss_mask"].backward()
        gradients = [*outputs.kernel, outputs.mask_features]
        results.append((losses["loss_mask"].item(), [level.grad for level in gradients]))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    for first, second in zip(results[0][1], results[1][1], strict=True):
        assert torch.allclose(first, second, atol=1e-7)


def test_dynamic_masks_are_three_convolutions() -> None:
    """Prior by prior and cell by cell, straight from the module's text."""
    rng = np.random.default_rng(0)
    kernels, features = rng.normal(0, 0.5, (3, 169)), rng.normal(0, 1, (8, 4, 5))
    priors = np.array([[8.0, 16, 8], [0, 32, 16], [32, 0, 32]])
    ours = dynamic_masks(*(torch.tensor(part, dtype=torch.float32) for part in (kernels, priors, features)))
    for k, ((px, py, stride), kernel) in enumerate(zip(priors, kernels, strict=True)):
        w1, w2, w3, b1, b2, b3 = np.split(kernel, np.cumsum([80, 64, 8, 8, 8]))
        for row in range(4):
            for column in range(5):
                where = [(px - column * 8) / (stride * 8), (py - row * 8) / (stride * 8)]
                values = np.concatenate((where, features[:, row, column]))
                values = np.maximum(w1.reshape(8, 10) @ values + b1, 0)
                values = np.maximum(w2.reshape(8, 8) @ values + b2, 0)
                assert ours[k, row, column].item() == pytest.approx((w3 @ values + b3).item(), abs=1e-4)


def _distributed_worker(rank: int, folder: str, kind: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    part = _mapped(_outputs(kind, 2), lambda level: level[rank : rank + 1].detach())
    losses = make_criterion(kind, 3)(part, [(_fleet, _ships)[rank](kind)])
    torch.save({name: loss.item() for name, loss in losses.items()}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", ["rotated", "mask"])
def test_two_processes_average_to_the_loss_of_one(tmp_path: Path, kind: str) -> None:
    """With the average factors shared, the mean of the processes' losses is that of the whole batch."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_criterion as t; "
        f"t._distributed_worker(int(sys.argv[1]), {str(tmp_path)!r}, {kind!r})"
    )
    workers = [
        subprocess.Popen([sys.executable, "-c", code, str(rank)], env=os.environ | {"OMP_NUM_THREADS": "1"})
        for rank in range(2)
    ]
    assert [worker.wait(timeout=250) for worker in workers] == [0, 0]
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    outputs, criterion, targets = _outputs(kind, 2), make_criterion(kind, 3), [_fleet(kind), _ships(kind)]
    sum_iou = sum(float(image.ious.sum()) for image in criterion.assignments(outputs, targets))
    assert sum_iou > 2  # else the clamp at 1 hides the averaging
    for name, expected in criterion(outputs, targets).items():
        assert (parts[0][name] + parts[1][name]) / 2 == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_gpu_equals_cpu(kind: str) -> None:
    outputs, criterion, targets = _outputs(kind, 2), make_criterion(kind, 3), [_ships(kind), _empty(kind)]
    expected = criterion(outputs, targets)
    on_gpu = _mapped(outputs, lambda level: level.detach().cuda().requires_grad_())
    moved = [Target(*(None if part is None else part.cuda() for part in target)) for target in targets]
    found = criterion(on_gpu, moved)
    sum(found.values()).backward()
    sum(expected.values()).backward()
    for name, loss in expected.items():
        assert found[name].item() == pytest.approx(loss.item(), rel=1e-4)
    for ours, theirs in zip(_leaves(on_gpu), _leaves(outputs), strict=True):
        assert torch.allclose(ours.grad.cpu(), theirs.grad, atol=1e-4)
