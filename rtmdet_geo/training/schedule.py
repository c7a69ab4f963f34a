"""Learning rate and parameter groups: warm-up and cosine; no decay where it hurts; what is frozen or learns slowly.

RTMDet (arXiv 2212.07784), section 4.1: linear warm-up, flat half, cosine half, as mmengine 0.10 composes ``LinearLR``
and ``CosineAnnealingLR`` (checked by golden numbers). Its classifiers: warm-up, then cosine to the end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from rtmdet_geo.errors import ConfigError
from rtmdet_geo.recipe_sections import OptimSection

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


def warmup_length(optim: OptimSection, iterations_per_epoch: int | None) -> int:
    """Return the iterations of the warm-up.

    Raises:
        ConfigError: a warm-up in epochs where there are none.
    """
    if optim.warmup_epochs is None:
        return optim.warmup_iterations
    if iterations_per_epoch is None:
        raise ConfigError("optim.warmup_epochs: random crops know no epoch; give optim.warmup_iterations")
    return optim.warmup_epochs * iterations_per_epoch


def scheduled_rate(
    optim: OptimSection, iteration: int, *, total_iterations: int, iterations_per_epoch: int | None, base_lr: float
) -> float:
    """Return the learning rate of one iteration as a recipe has it; see :func:`learning_rate`.

    The published classifiers' cosine takes one step an epoch; ours moves with every iteration, as the warm-up does.

    Args:
        optim: schedule, warm-up and last rate.
        iteration: 0-based.
        total_iterations: length of the training.
        iterations_per_epoch: for a warm-up in epochs; None where there is no such thing.
        base_lr: rate of the flat part, for the batch there is.

    Raises:
        ConfigError: see :func:`warmup_length`.
        ValueError: see :func:`learning_rate`.
    """
    warmup = warmup_length(optim, iterations_per_epoch)
    return learning_rate(
        iteration,
        base_lr=base_lr,
        total_iterations=total_iterations,
        warmup_iterations=warmup,
        start_factor=optim.warmup_factor,
        eta_min=base_lr * optim.lr_min_factor,
        cosine_begin=warmup if optim.schedule == "cosine" else None,
    )


def param_groups(model: nn.Module, weight_decay: float, *, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """Split a model's trainable parameters for the optimiser.

    Biases and parameters of norm layers get no weight decay. A tensor registered under several names enters once. With
    ``layer_decay`` below 1 a stage learns the more slowly the further it is from the output: head ``layer_decay ** 0``,
    neck ``** 1``, backbone's stage 4 ``** 2`` and so on to its stem; classifiers have no neck, so stage 4 is ``** 1``.

    Args:
        model: the network.
        weight_decay: decay of all other parameters.
        layer_decay: factor on the learning rate from stage to stage, in (0, 1].

    Returns:
        Groups with ``params``, ``weight_decay`` and ``lr_scale`` (to multiply the scheduled rate with), parameters in
        registration order: with decay and without; so for each stage from the head on where ``layer_decay`` is below 1.
    """
    stages = _stages(model) if layer_decay < 1 else [""]
    scales = [layer_decay**depth for depth in range(len(stages))]
    groups: list[dict[str, Any]] = [
        {"params": [], "weight_decay": decay, "lr_scale": scale} for scale in scales for decay in (weight_decay, 0.0)
    ]
    seen: set[int] = set()
    for path, module in model.named_modules():
        depth = next((depth for depth, stage in enumerate(stages) if f"{path}.".startswith(f"{stage}.")), 0)
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen or not parameter.requires_grad:
                continue
            seen.add(id(parameter))
            is_plain = isinstance(module, _NORMS) or name == "bias"
            groups[2 * depth + is_plain]["params"].append(parameter)
    return groups


def freeze_parts(model: nn.Module, names: Sequence[str]) -> None:
    """Keep the parameters of some parts as they are: they get no gradients.

    Their batch norms would go on averaging all the same: call :func:`keep_norms_frozen` whenever ``model.train()`` was.

    Args:
        model: the network.
        names: dotted names of modules ("backbone", "backbone.stage1").

    Raises:
        ConfigError: the network has no such part, or nothing would be left to train.
    """
    for name in names:
        _part(model, name).requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(f"optim.freeze {', '.join(names)} leaves nothing to train; freeze less")


def keep_norms_frozen(model: nn.Module, names: Sequence[str], norm_eval: bool) -> None:
    """Put norm layers of frozen parts back into eval mode, which ``model.train()`` takes them out of.

    In eval mode a batch norm uses its averages and leaves them alone.

    Args:
        model: the network, just put into train mode.
        names: frozen parts, see :func:`freeze_parts`.
        norm_eval: so for all norm layers, frozen or not; theirs keep learning scale and shift.

    Raises:
        ConfigError: the network has no such part.
    """
    for part in [model] if norm_eval else [_part(model, name) for name in names]:
        for module in part.modules():
            if isinstance(module, _NORMS):
                module.eval()


def _part(model: nn.Module, name: str) -> nn.Module:
    """Return the module of a dotted name.

    Raises:
        ConfigError: there is none; the message names those there are, two levels deep.
    """
    modules = dict(model.named_modules())
    if not name or name not in modules:
        outer = [path for path in modules if path and path.count(".") < 2]
        known = [path for path in outer if next(modules[path].parameters(), None) is not None]
        raise ConfigError(f"optim.freeze: the network has no part {name!r}; it has {', '.join(known)}")
    return modules[name]


def _stages(model: nn.Module) -> list[str]:
    """Return the dotted names of a network's stages from its output to its input; [""] of a network without children.

    Children are registered in the order of the computation: a backbone's stem, its stages, neck, head.
    """
    names = []
    for part, module in model.named_children():
        inner = [stage for stage, _ in module.named_children()] if part == "backbone" else []
        names += [f"{part}.{stage}" for stage in inner] or [part]
    return names[::-1] or [""]
