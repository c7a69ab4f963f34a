"""LAMB: Adam whose step in every tensor is as long as the tensor itself times the learning rate.

You et al., "Large Batch Optimization for Deep Learning" (arXiv 1904.00962), algorithm 2, with bias correction. Two
habits are those of the optimiser that trained the published classifiers (mmpretrain 1.x ``Lamb``, which is timm's):
gradients are clipped by their global norm first, and parameters without weight decay (norms, biases) take Adam's step
as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class Lamb(Optimizer):
    """Layer-wise adaptive moments.

    With clipped gradient g, moments m and v as in Adam, and weight decay d: ``u = m' / (sqrt(v') + eps) + d * w``;
    ``w -= lr * |w| / |u| * u``, where the ratio of norms is 1 if either is 0 or d is 0. Nothing is read back from the
    device, and equal input gives equal bits. Parameters of a group must get their first gradient in the same step: the
    group counts steps for all of them.

    Args:
        params: parameters, or groups of them (``params``, ``weight_decay``, ``lr``, ...).
        lr: learning rate: length of a step relative to the tensor's.
        betas: decay of the moments m and v.
        eps: added to the root of v.
        weight_decay: d.
        max_grad_norm: gradients of all groups together are shortened to this norm; None takes them as they are.

    Raises:
        ValueError: a value is outside its range.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = 1.0,
    ) -> None:
        """Check the values; moments are made with the first step."""
        if lr < 0 or eps <= 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"lr={lr!r}, eps={eps!r}, weight_decay={weight_decay!r}, betas={betas!r}: out of range")
        if max_grad_norm is not None and max_grad_norm <= 0:
            raise ValueError(f"max_grad_norm={max_grad_norm!r} must be above 0; None does not clip")
        self.max_grad_norm = max_grad_norm
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": 0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take one step with the gradients there are; parameters without one stay.

        Args:
            closure: evaluates the loss anew, with gradients; returned is what it returns.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        divisor = self._clip_divisor()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                group["step"] += 1
                self._update(group, parameters, divisor)
        return loss

    def _clip_divisor(self) -> Tensor | None:
        """Return what gradients are divided by, a scalar of at least 1; None if they are not clipped."""
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if self.max_grad_norm is None or not grads:
            return None
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        return (norm / self.max_grad_norm).clamp(min=1.0)

    def _update(self, group: dict[str, Any], parameters: list[nn.Parameter], divisor: Tensor | None) -> None:
        """Move the parameters of one group."""
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] = {"mean": torch.zeros_like(parameter), "square": torch.zeros_like(parameter)}
        means = [self.state[parameter]["mean"] for parameter in parameters]
        squares = [self.state[parameter]["square"] for parameter in parameters]
        grads: Any = [parameter.grad for parameter in parameters]
        if divisor is not None:
            grads = torch._foreach_div(grads, divisor)
        (beta1, beta2), decay = group["betas"], group["weight_decay"]
        torch._foreach_lerp_(means, grads, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
        roots = torch._foreach_sqrt(squares)
        torch._foreach_div_(roots, math.sqrt(1 - beta2 ** group["step"]))
        torch._foreach_add_(roots, group["eps"])
        updates = torch._foreach_div(means, 1 - beta1 ** group["step"])
        torch._foreach_div_(updates, roots)
        if decay:
            torch._foreach_add_(updates, parameters, alpha=decay)
            norms = zip(torch._foreach_norm(parameters), torch._foreach_norm(updates), strict=True)
            torch._foreach_mul_(updates, [torch.where((w > 0) & (u > 0), w / u, 1.0) for w, u in norms])
        torch._foreach_add_(parameters, updates, alpha=-group["lr"])
