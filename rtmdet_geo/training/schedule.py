"""Learning rate and parameter groups: linear warm-up, flat half, cosine half; AdamW without decay where it hurts.

RTMDet (arXiv 2212.07784), section 4.1, as mmengine 0.10 composes ``LinearLR`` and ``CosineAnnealingLR`` (checked by
golden numbers).
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm)


def learning_rate(
    iteration: int,
    *,
    base_lr: float,
    total_iterations: int,
    warmup_iterations: int = 1000,
    start_factor: float = 1e-5,
    eta_min: float = 0.0,
    cosine_begin: int | None = None,
    cosine_length: int | None = None,
) -> float:
    """Return the learning rate of one iteration: a pure function, so that a resumed training needs no scheduler state.

    The warm-up factor runs from ``start_factor`` at iteration 0 to 1 at iteration ``warmup_iterations - 1``; from
    ``cosine_begin`` to the end the rate falls along half a cosine to ``eta_min``. Where the two overlap, each
    iteration multiplies the rate by the warm-up's growth and then its distance from ``eta_min`` by the cosine's.

    Args:
        iteration: 0-based; the rate the optimizer's step of this iteration uses.
        base_lr: rate of the flat part.
        total_iterations: length of the training; from there on the cosine stands still.
        warmup_iterations: length of the warm-up; 0 or 1 for none.
        start_factor: first factor of the warm-up, > 0.
        eta_min: rate the cosine falls to.
        cosine_begin: first iteration of the cosine; half of ``total_iterations`` by default.
        cosine_length: iterations from the top of the cosine to its bottom; the rest of the training by default. The
            published recipes take ``max_epochs // 2`` epochs, one less than the rest when the number of epochs is odd.

    Returns:
        The rate.

    Raises:
        ValueError: a negative iteration, or no iterations at all.
    """
    if iteration < 0 or total_iterations < 1:
        raise ValueError(f"iteration {iteration} of {total_iterations}; iterations count from 0 and need a length >= 1")
    begin = total_iterations // 2 if cosine_begin is None else cosine_begin
    length = max(1, total_iterations - begin if cosine_length is None else cosine_length)

    def warmup(index: int) -> float:
        if index >= warmup_iterations - 1:
            return 1.0
        return start_factor + (1 - start_factor) * index / (warmup_iterations - 1)

    def cosine(index: int) -> float:
        return (1 + math.cos(math.pi * (min(index, total_iterations - 1) - begin) / length)) / 2

    if iteration <= begin:
        return base_lr * warmup(iteration)
    rate, index = base_lr * warmup(begin), begin
    while index < min(iteration, warmup_iterations - 1):  # the overlap, step by step: it has no closed form
        index += 1
        rate *= warmup(index) / warmup(index - 1)
        rate = eta_min + (rate - eta_min) * (cosine(index) / cosine(index - 1))
    return eta_min + (rate - eta_min) * (cosine(iteration) / cosine(index))


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split a model's trainable parameters for AdamW.

    Biases and parameters of norm layers get no weight decay. A tensor registered under several names enters once.

    Args:
        model: the network.
        weight_decay: decay of all other parameters.

    Returns:
        Two groups, ``params`` with ``weight_decay`` and ``params`` without; in registration order.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen or not parameter.requires_grad:
                continue
            seen.add(id(parameter))
            (plain if isinstance(module, _NORMS) or name == "bias" else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
