"""Parameters and multiply-adds of a network, counted on shapes alone (torch's meta device: no memory, no arithmetic).

The rule is that of OpenMMLab's published figures (mmengine's ``get_model_complexity_info``, after fvcore): one
multiply-add counts as one; convolutions, linear layers, batch norms, average pooling and upsampling are counted, and
activations, additions and max pooling are not.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True, slots=True)
class Complexity:
    """What one forward pass costs.

    Attributes:
        params: trainable numbers, each once even where layers share them.
        flops: multiply-adds for the whole batch.
        by_operator: the same by the kind of operator: conv, linear, batch_norm, avg_pool, upsample.
        input_shape: (N, C, H, W) that was counted.
    """

    params: int
    flops: int
    by_operator: dict[str, int]
    input_shape: tuple[int, int, int, int]


def count_parameters(model: nn.Module) -> int:
    """Return the number of trainable numbers, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def count_complexity(
    model: nn.Module, height: int, width: int | None = None, *, batch_size: int = 1, training: bool = False
) -> Complexity:
    """Count parameters and multiply-adds of one forward pass; the model itself is neither run nor changed.

    Published figures of RTMDet-Ins are those of ``training=True``: the reference always runs the tower that classes
    and distances have in common twice, ours does so in training only.

    Args:
        model: takes float images (N, C, H, W); ``model.in_channels`` says C, 3 without.
        height: of the images, px.
        width: of the images, px; None: the same.
        batch_size: N.
        training: count the forward pass of training (forward only) instead of evaluation.

    Returns:
        See :class:`Complexity`.

    Example:
        >>> from rtmdet_geo.models import rtmdet_r_test
        >>> count_complexity(rtmdet_r_test(num_classes=1), 64).by_operator["linear"]
        0
    """
    shape = (batch_size, int(getattr(model, "in_channels", 3)), height, height if width is None else width)
    ghost = copy.deepcopy(model).to("meta").train(training)
    with torch.no_grad(), _Counter() as counter:
        ghost(torch.empty(shape, device="meta"))
    return Complexity(count_parameters(model), sum(counter.counts.values()), counter.counts, shape)


def _conv(inputs: list[Any], outputs: int) -> int:
    """Outputs x kernel; the weight is (out, in / groups, height, width)."""
    return outputs * math.prod(inputs[1].shape[1:])


def _addmm(inputs: list[Any], outputs: int) -> int:
    """Bias + (n, k) x (k, m)."""
    return outputs * int(inputs[1].shape[1])


def _mm(inputs: list[Any], outputs: int) -> int:
    """(n, k) x (k, m)."""
    return outputs * int(inputs[0].shape[1])


def _batch_norm(inputs: list[Any], outputs: int) -> int:
    """Scale and shift: 2 an element, 1 without weights."""
    return outputs * (1 if inputs[1] is None else 2)


def _average(inputs: list[Any], outputs: int) -> int:
    return int(inputs[0].numel())


#: Name of the operator -> kind, and the count from its arguments and the number of (first) outputs.
_RULES: dict[str, tuple[str, Callable[[list[Any], int], int]]] = {
    "aten::convolution": ("conv", _conv),
    "aten::addmm": ("linear", _addmm),
    "aten::mm": ("linear", _mm),
    "aten::native_batch_norm": ("batch_norm", _batch_norm),
    "aten::_native_batch_norm_legit": ("batch_norm", _batch_norm),
    "aten::_native_batch_norm_legit_no_training": ("batch_norm", _batch_norm),
    "aten::_batch_norm_with_update": ("batch_norm", _batch_norm),
    "aten::_batch_norm_no_update": ("batch_norm", _batch_norm),
    "aten::cudnn_batch_norm": ("batch_norm", _batch_norm),
    "aten::_adaptive_avg_pool2d": ("avg_pool", _average),
    "aten::mean": ("avg_pool", _average),  # which an average over the whole map becomes
    "aten::upsample_nearest2d": ("upsample", lambda inputs, outputs: outputs),
    "aten::upsample_bilinear2d": ("upsample", lambda inputs, outputs: 4 * outputs),  # four neighbours
}


class _Counter(TorchDispatchMode):
    """Sees every operator that reaches a device."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = {kind: 0 for kind, _ in _RULES.values()}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        rule = _RULES.get(function.name().partition(".")[0])
        if rule is not None:
            first: Tensor = result[0] if isinstance(result, tuple) else result
            self.counts[rule[0]] += rule[1](list(args), int(first.numel()))
        return result
