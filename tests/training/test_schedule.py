"""Learning rates and parameter groups against the oracle, and the schedule's properties."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rtmdet_geo.models import get_model
from rtmdet_geo.training.schedule import learning_rate, param_groups


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
