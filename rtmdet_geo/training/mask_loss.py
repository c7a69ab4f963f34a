"""Masks of positives from their dynamic kernels, and the dice loss on them.

RTMDet (arXiv 2212.07784), section 3.4, as mmdet 3.3 ``RTMDetInsHead.loss_mask_by_feat`` behaves (checked by golden
numbers): masks are computed at the features' stride 8, enlarged to stride 4, and compared with every fourth pixel of
the ground truth from the third on. The layout of a kernel is that of :mod:`rtmdet_geo.masks`.

The first layer sees coordinates relative to the prior, (prior - cell) / (8 * stride). They are linear in the cell, so
the prior's part goes into the bias and all priors share one set of inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from rtmdet_geo.masks import COORDINATE_RANGE, KERNEL_LAYERS
from rtmdet_geo.models.decode import level_priors
from rtmdet_geo.models.heads import STRIDES
from rtmdet_geo.training.losses import dice_loss

#: Masks are compared at one pixel in so many, along either axis.
LOSS_STRIDE = 4


def dynamic_masks(kernels: Tensor, priors: Tensor, features: Tensor) -> Tensor:
    """Apply each prior's three 1 x 1 convolutions to the mask features of its image; gradients flow.

    Args:
        kernels: (K, 169) float32, see :data:`rtmdet_geo.masks.KERNEL_LAYERS`.
        priors: (K, 3 or more) x, y, stride in px.
        features: (8, h, w) float32 at stride 8.

    Returns:
        (K, h, w) float32 logits.
    """
    number, (_, height, width) = len(kernels), features.shape
    sizes = [inputs * outputs for inputs, outputs in KERNEL_LAYERS] + [outputs for _, outputs in KERNEL_LAYERS]
    parts = kernels.split(sizes, dim=1)
    weights = [
        part.reshape(number, outputs, inputs) for part, (inputs, outputs) in zip(parts, KERNEL_LAYERS, strict=False)
    ]
    biases = [part.unsqueeze(-1) for part in parts[len(KERNEL_LAYERS) :]]
    slopes = weights[0][:, :, :2] / (COORDINATE_RANGE * priors[:, 2, None, None])  # per px, (K, 8, 2)
    cells = level_priors(height, width, STRIDES[0], device=features.device)
    inputs = torch.cat((-cells.T, features.flatten(1)))  # (10, h * w)
    first = torch.cat((slopes, weights[0][:, :, 2:]), dim=2)
    values = (first.flatten(0, 1) @ inputs).view(number, first.shape[1], height * width)
    values = (values + (biases[0] + (slopes * priors[:, None, :2]).sum(-1, keepdim=True))).relu()
    values = torch.baddbmm(biases[1], weights[1], values).relu()
    return torch.baddbmm(biases[2], weights[2], values).view(number, height, width)


def mask_losses(
    kernels: Tensor, priors: Tensor, features: Tensor, masks: Tensor, gts: Tensor, *, max_masks: int = 256
) -> Tensor:
    """Dice losses of the positives of one image.

    Args:
        kernels: (K, 169) float32 of the positives.
        priors: (K, 3 or more) x, y, stride in px.
        features: (8, h, w) float32 of the image.
        masks: (G, 8 h, 8 w) bool or uint8 ground truth, 0 or 1.
        gts: (K,) int64, the ground truth of each positive.
        max_masks: masks held at once. More are computed in portions and once more for the gradient, so that memory
            does not grow with K (a positive of a 1024 px tile takes about 2 MB).

    Returns:
        (K,) float32 in [0, 1].

    Raises:
        ValueError: the masks are not of the image's size.
    """
    height, width = features.shape[1] * STRIDES[0], features.shape[2] * STRIDES[0]
    if masks.shape[1:] != (height, width):
        raise ValueError(f"masks are {tuple(masks.shape[1:])} px, the image is {(height, width)} px (height, width)")
    start = LOSS_STRIDE // 2
    sampled = masks[:, start::LOSS_STRIDE, start::LOSS_STRIDE]

    def portion(kernels: Tensor, priors: Tensor, features: Tensor, gts: Tensor) -> Tensor:
        logits = dynamic_masks(kernels, priors, features).unsqueeze(1)
        logits = functional.interpolate(logits, scale_factor=STRIDES[0] // LOSS_STRIDE, mode="bilinear")
        return dice_loss(logits.squeeze(1), sampled[gts], reduction="none")

    if len(kernels) <= max_masks:
        return portion(kernels, priors, features, gts)
    losses = [
        checkpoint(portion, *parts, features, chosen, use_reentrant=False)
        for *parts, chosen in zip(kernels.split(max_masks), priors.split(max_masks), gts.split(max_masks), strict=True)
    ]
    return torch.cat(losses)
