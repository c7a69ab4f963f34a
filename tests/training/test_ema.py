"""The weight average against the oracle's trace; aliases, buffers, exact resume."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from rtmdet_geo.models import get_model
from rtmdet_geo.training.ema import ModelEMA


class Toy(nn.Module):
    """Oracle README, section i: a vector, one tensor under two names, a batch norm's buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(3))
        self.shared = nn.Parameter(torch.zeros(2))
        self.alias = self.shared
        self.bn = nn.BatchNorm1d(2)

    @torch.no_grad()
    def set_to(self, t: int, phase: float) -> None:
        self.a.copy_(torch.tensor([math.sin(0.1 * t + phase), math.cos(0.07 * t), 0.01 * t]))
        self.shared.copy_(torch.tensor([math.sin(0.05 * t), 1 - 0.02 * t]))
        self.bn.running_mean.copy_(torch.tensor([0.5 * t, -0.25]))
        self.bn.num_batches_tracked.fill_(t)


def test_oracle_trace(oracle_dir: Path) -> None:
    cases = json.loads((oracle_dir / "schedule.json").read_text())["ema"]
    assert cases
    for case in cases:
        assert case["update_buffers"]
        model = Toy()
        ema = ModelEMA(model, momentum=case["momentum"], gamma=case["gamma"])
        trace = {row["update"]: row for row in case["trace"]}
        for t in range(1, max(trace) + 1):
            model.set_to(t, case["phase"])
            ema.update(model)
            if t in trace:
                row, average = trace[t], ema.module
                np.testing.assert_allclose(average.a.numpy(), row["a"], rtol=2e-5, atol=1e-6)
                np.testing.assert_allclose(average.shared.numpy(), row["shared"], rtol=2e-5, atol=1e-6)
                np.testing.assert_allclose(average.bn.running_mean.numpy(), row["running_mean"], rtol=2e-5)
                assert int(average.bn.num_batches_tracked) == row["num_batches_tracked"]
        assert ema.steps == max(trace)


def test_shared_tensors_are_averaged_once_per_name() -> None:
    """By hand: with a constant momentum m a name leaves (1 - m) of the distance, two names (1 - m)²."""
    model = Toy()
    ema = ModelEMA(model, momentum=0.25, gamma=1e-3)
    ema.update(model)
    with torch.no_grad():
        model.a.fill_(1)
        model.shared.fill_(1)
    ema.update(model)
    assert ema.module.a.tolist() == pytest.approx([0.25] * 3)
    assert ema.module.shared.tolist() == pytest.approx([1 - 0.75**2] * 2)
    assert ema.module.shared is ema.module.alias


def test_average_is_apart_from_the_model_and_without_gradients() -> None:
    model = get_model("rtmdet_r_test", num_classes=2).train()
    ema = ModelEMA(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    ema.update(model)
    ema.module.get_parameter(next(name for name, _ in ema.module.named_parameters())).fill_(7)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.training and not ema.module.training
    assert not any(parameter.requires_grad for parameter in ema.module.parameters())
    assert ema.module.state_dict().keys() == model.state_dict().keys()


def test_resume_is_exact() -> None:
    def run(ema: ModelEMA, model: Toy, first: int, last: int) -> None:
        for t in range(first, last):
            model.set_to(t, 0.3)
            ema.update(model)

    model = Toy()
    whole = ModelEMA(model, momentum=0.01, gamma=20)
    run(whole, model, 1, 40)
    model = Toy()
    first = ModelEMA(model, momentum=0.01, gamma=20)
    run(first, model, 1, 17)
    state = {
        "steps": first.state_dict()["steps"],
        "module": {k: v.clone() for k, v in first.state_dict()["module"].items()},
    }
    second = ModelEMA(Toy(), momentum=0.01, gamma=20)
    second.load_state_dict(state)
    run(second, model, 17, 40)
    for key, value in whole.module.state_dict().items():
        assert torch.equal(value, second.module.state_dict()[key]), key
    # Negative control: the number of steps is part of the state.
    third = ModelEMA(Toy(), momentum=0.01, gamma=20)
    third.load_state_dict(state | {"steps": 3})
    run(third, model, 17, 40)
    assert not torch.equal(third.module.a, whole.module.a)
