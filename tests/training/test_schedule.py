"""Learning rates and parameter groups against the oracle, and the schedule's properties."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rtmdet_geo.errors import ConfigError
from rtmdet_geo.models import get_model
from rtmdet_geo.models.classifier import get_classifier
from rtmdet_geo.recipe_sections import OptimSection
from rtmdet_geo.training.schedule import (
    freeze_parts,
    keep_norms_frozen,
    learning_rate,
    param_groups,
    scheduled_rate,
)


def test_oracle_learning_rates(oracle_dir: Path) -> None:
    cases = json.loads((oracle_dir / "schedule.json").read_text())["lr"]
    assert cases
    for case in cases:
        total = case["max_epochs"] * case["iters_per_epoch"]
        arguments = {
            "base_lr": case["base_lr"],
            "total_iterations": total,
            "warmup_iterations": case["warmup_iters"],
            "start_factor": case["start_factor"],
            "eta_min": case["eta_min"],
            "cosine_begin": case["max_epochs"] // 2 * case["iters_per_epoch"],
            "cosine_length": case["max_epochs"] // 2 * case["iters_per_epoch"],
        }
        for iteration, expected in [*case["lr"], [total, case["lr_after_last"]]]:
            ours = learning_rate(iteration, **arguments)
            assert ours == pytest.approx(expected, rel=1e-9), (case["max_epochs"], iteration)
        # Negative control: one iteration later is another rate.
        iteration, expected = case["lr"][1]
        assert learning_rate(iteration + 1, **arguments) != pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("reference, name", [("rotated_rtmdet_tiny", "rtmdet_r_tiny")], ids=["rotated_rtmdet_tiny"])
def test_oracle_param_groups(oracle_dir: Path, reference: str, name: str) -> None:
    cases = {case["model"]: case for case in json.loads((oracle_dir / "schedule.json").read_text())["param_groups"]}
    model = get_model(name, num_classes=15)
    aliases = {}  # every name of a shared tensor
    for key, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), set()).add(key)
    decayed, plain = param_groups(model, weight_decay=0.05)
    assert decayed["weight_decay"] == 0.05 and plain["weight_decay"] == 0
    for group, expected in ((decayed, cases[reference]["decay"]), (plain, cases[reference]["no_decay"])):
        assert len(group["params"]) == len(expected)
        assert all(aliases[id(parameter)] & set(expected) for parameter in group["params"])
    case = cases[reference]
    assert len(decayed["params"]) + len(plain["params"]) == case["num_groups"]
    optimizer = torch.optim.AdamW([decayed, plain], lr=1e-3)
    assert list(optimizer.defaults["betas"]) == case["betas"] and optimizer.defaults["eps"] == case["eps"]


def test_param_groups_by_hand() -> None:
    shared = nn.Conv2d(3, 3, 1)
    model = nn.ModuleDict(
        {"a": shared, "b": shared, "bn": nn.BatchNorm2d(3), "gn": nn.GroupNorm(1, 3), "ln": nn.LayerNorm(3),
         "frozen": nn.Linear(3, 3).requires_grad_(False)}
    )  # fmt: skip
    decayed, plain = param_groups(model, weight_decay=0.1)
    assert [id(p) for p in decayed["params"]] == [id(shared.weight)]
    assert len(plain["params"]) == 7  # the shared bias once, three norms


def test_schedule_by_hand() -> None:
    def rate(iteration: int) -> float:
        return learning_rate(
            iteration, base_lr=2.0, total_iterations=100, warmup_iterations=11, start_factor=0.5, eta_min=1.0
        )

    assert [rate(0), rate(5), rate(10), rate(30), rate(50)] == pytest.approx([1.0, 1.5, 2.0, 2.0, 2.0])
    assert rate(75) == pytest.approx(1.5)
    assert 1.0 < rate(99) < 1.002 and rate(100) == rate(10_000) == rate(99)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 400), st.integers(0, 500), st.floats(0, 0.5))
def test_rates_stay_between_their_limits(total: int, warmup: int, floor: float) -> None:
    arguments = {"base_lr": 1.0, "total_iterations": total, "warmup_iterations": warmup, "eta_min": floor}
    rates = [learning_rate(i, **arguments) for i in range(total)]
    assert all(0 < rate <= 1 + 1e-12 for rate in rates)
    if warmup <= total // 2:
        top = max(0, warmup - 1)
        assert all(a < b for a, b in itertools.pairwise(rates[: top + 1]))
        assert all(a >= b for a, b in itertools.pairwise(rates[top:]))


def test_impossible_iterations_are_refused() -> None:
    with pytest.raises(ValueError, match="-1"):
        learning_rate(-1, base_lr=1, total_iterations=10)
    with pytest.raises(ValueError, match="of 0"):
        learning_rate(0, base_lr=1, total_iterations=0)


def rates(optim: OptimSection, total: int, epoch: int | None = None, base_lr: float = 1.0) -> list[float]:
    return [
        scheduled_rate(optim, i, total_iterations=total, iterations_per_epoch=epoch, base_lr=base_lr)
        for i in range(total)
    ]


def test_flat_cosine_of_a_recipe_is_the_published_schedule() -> None:
    optim = OptimSection(epochs=12, warmup_iterations=20, lr_min_factor=0.1)
    ours = rates(optim, total=120, epoch=10, base_lr=2.0)
    arguments = {"base_lr": 2.0, "total_iterations": 120, "warmup_iterations": 20, "eta_min": 0.2}
    assert ours == [learning_rate(i, **arguments, cosine_begin=60, cosine_length=60) for i in range(120)]


def test_cosine_by_hand() -> None:
    """Three epochs of 10 iterations, one to warm up: 1e-4 to 1 in 10 iterations, then half a cosine of 20."""
    optim = OptimSection(epochs=3, schedule="cosine", warmup_epochs=1, warmup_factor=1e-4, lr_min_factor=0.25)
    found = rates(optim, total=30, epoch=10, base_lr=4.0)
    assert found[0] == pytest.approx(4e-4)
    assert found[3] == pytest.approx(4 * (1e-4 + (1 - 1e-4) * 3 / 9))
    assert found[9] == found[10] == pytest.approx(4.0)
    assert found[20] == pytest.approx((4 + 1) / 2)
    assert found[15] == pytest.approx(1 + 3 * (1 + math.cos(math.pi / 4)) / 2)
    assert 1 < found[29] < 1.02


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 300), st.integers(0, 400), st.floats(0, 1))
def test_cosine_rises_then_falls(total: int, warmup: int, floor: float) -> None:
    found = rates(OptimSection(schedule="cosine", warmup_iterations=warmup, lr_min_factor=floor), total)
    top = min(max(0, warmup - 1), total - 1)
    assert all(a < b for a, b in itertools.pairwise(found[: top + 1]))
    assert all(a >= b for a, b in itertools.pairwise(found[top:]))
    assert max(found) == pytest.approx(1.0) or warmup > total
    assert min(found[top:]) >= min(floor, found[top]) - 1e-12


def test_warmup_in_epochs_needs_epochs() -> None:
    with pytest.raises(ConfigError, match="warmup_iterations"):
        rates(OptimSection(warmup_epochs=1), 10)


def names_of(model: nn.Module, group: dict) -> set[str]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)] for parameter in group["params"]}


@pytest.mark.parametrize("name", ["rtmdet_r_test", "rtmdet_ins_test", "cspnext_test"])
def test_layer_decay_slows_stages_by_their_depth(name: str) -> None:
    model = get_classifier(name) if name.startswith("cspnext") else get_model(name)
    depths = {"head": 0, "bbox_head": 0, "neck": 1}
    first = 1 if name.startswith("cspnext") else 2
    order = ("stage4", "stage3", "stage2", "stage1", "stem")
    depths |= {f"backbone.{stage}": first + number for number, stage in enumerate(order)}
    groups = param_groups(model, 0.05, layer_decay=0.5)
    seen = set()
    for group in groups:
        for parameter in names_of(model, group):
            stage = next(stage for stage in depths if parameter.startswith(f"{stage}."))
            assert group["lr_scale"] == 0.5 ** depths[stage], parameter
            seen.add(parameter)
    assert seen == {parameter for parameter, _ in model.named_parameters()}
    # The same parameters decay as without stages.
    for decay in (0.05, 0.0):
        whole = next(group for group in param_groups(model, 0.05) if group["weight_decay"] == decay)
        parts = [names_of(model, group) for group in groups if group["weight_decay"] == decay]
        assert set().union(*parts) == names_of(model, whole)
    torch.optim.AdamW(groups, lr=1e-3)


def test_without_layer_decay_there_are_two_groups_of_one_rate() -> None:
    groups = param_groups(get_model("rtmdet_r_test"), 0.05)
    assert [(group["weight_decay"], group["lr_scale"]) for group in groups] == [(0.05, 1.0), (0.0, 1.0)]


def test_frozen_parts_neither_learn_nor_average() -> None:
    torch.manual_seed(0)
    model = get_classifier("cspnext_test", num_classes=3)
    frozen = ("backbone.stem", "backbone.stage1")
    freeze_parts(model, frozen)
    optimizer = torch.optim.SGD(param_groups(model, 0.0), lr=0.1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    keep_norms_frozen(model, frozen, norm_eval=False)
    model(torch.randn(4, 3, 64, 64)).square().sum().backward()
    optimizer.step()
    for name, value in model.state_dict().items():
        is_frozen = name.startswith(frozen)
        assert torch.equal(value, before[name]) is is_frozen, name
    # Negative control: after train() alone the frozen part's averages move.
    model.train()
    model(torch.randn(4, 3, 64, 64))
    assert not torch.equal(
        model.state_dict()["backbone.stem.0.bn.running_mean"], before["backbone.stem.0.bn.running_mean"]
    )


def test_norm_eval_keeps_all_averages_but_learns_scales() -> None:
    torch.manual_seed(0)
    model = get_classifier("cspnext_test", num_classes=3).train()
    keep_norms_frozen(model, (), norm_eval=True)
    before = {name: value.clone() for name, value in model.named_buffers()}
    model(torch.randn(4, 3, 64, 64)).square().sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    assert model.get_parameter("backbone.stem.0.bn.weight").grad is not None and model.training


def test_unknown_parts_are_named() -> None:
    model = get_model("rtmdet_r_test")
    for wrong in ("backbon", "", "backbone.stage5"):
        with pytest.raises(ConfigError, match=r"no part .*backbone\.stage1, .*neck.*bbox_head"):
            freeze_parts(model, [wrong])
    with pytest.raises(ConfigError, match="nothing to train"):
        freeze_parts(model, ["backbone", "neck", "bbox_head"])
