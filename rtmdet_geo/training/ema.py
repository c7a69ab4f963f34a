"""Exponential moving average of a model's weights, the model that is evaluated and shipped.

As mmengine 0.10 ``ExpMomentumEMA`` behaves (checked by golden numbers), oddities included: the first update copies, a
tensor registered under several names is averaged once per name, integer buffers keep their first value.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn


class ModelEMA:
    """Average of a model: ``average += momentum_t * (model - average)`` after each step.

    The momentum is ``(1 - momentum) * exp(-(1 + t) / gamma) + momentum``: near 1 at first, so that the random start is
    forgotten.

    Args:
        model: the network that is trained; copied.
        momentum: weight of the newest model, late in the training.
        gamma: updates after which the momentum's excess has fallen to 1 / e.

    Attributes:
        module: the averaged network, in eval mode, without gradients.
        steps: updates so far.
    """

    def __init__(self, model: nn.Module, *, momentum: float = 2e-4, gamma: float = 2000.0) -> None:
        """Copy the model."""
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self.momentum = momentum
        self.gamma = gamma
        self.steps = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the model after an optimizer step; parameters and buffers.

        Args:
            model: the network, with the names of the copy.
        """
        averages, sources = self.module.state_dict(), model.state_dict()
        if self.steps == 0:
            for name, average in averages.items():
                average.copy_(sources[name])
        else:
            excess = (1 - self.momentum) * math.exp(-(1 + self.steps) / self.gamma)
            for batch_averages, batch_sources in _without_aliases(averages, sources):
                torch._foreach_lerp_(batch_averages, batch_sources, excess + self.momentum)
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed training needs: ``steps`` and ``module`` (tensors are not copied)."""
        return {"steps": self.steps, "module": self.module.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved :meth:`state_dict`; names and shapes must fit exactly."""
        self.module.load_state_dict(state["module"])
        self.steps = int(state["steps"])


def _without_aliases(
    averages: dict[str, Tensor], sources: dict[str, Tensor]
) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Split floating tensors into rounds in which none occurs twice: a tensor with k names is in k rounds."""
    rounds: list[tuple[list[Tensor], list[Tensor]]] = []
    names_so_far: dict[int, int] = {}
    for name, average in averages.items():
        if not average.is_floating_point():
            continue
        index = names_so_far.get(average.data_ptr(), 0)
        names_so_far[average.data_ptr()] = index + 1
        if index == len(rounds):
            rounds.append(([], []))
        rounds[index][0].append(average)
        rounds[index][1].append(sources[name])
    return rounds
