"""Mixup and CutMix: images of a batch mixed with each other, and their targets in the same proportion. torch.

Mixup: arXiv 1710.09412. CutMix: arXiv 1905.04899. As mmpretrain 1.x does it: one draw and one permutation per batch.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def mix_batch(
    rng: np.random.Generator, images: Tensor, targets: Tensor, *, mixup_alpha: float, cutmix_alpha: float
) -> tuple[Tensor, Tensor]:
    """Mix a batch by Mixup or CutMix; where both are wanted, by either with equal probability.

    Args:
        rng: source of randomness.
        images: (N, C, H, W) floating, normalised; not changed.
        targets: (N, K) floating, shares of the classes.
        mixup_alpha: shares of the first image follow Beta(alpha, alpha); 0 for no Mixup.
        cutmix_alpha: likewise for CutMix.

    Returns:
        Images and targets, of the shapes given.
    """
    alphas = {"mixup": mixup_alpha, "cutmix": cutmix_alpha}
    choices = [name for name, alpha in alphas.items() if alpha > 0]
    if not choices:
        return images, targets
    choice = choices[rng.integers(len(choices))]
    share = float(rng.beta(alphas[choice], alphas[choice]))
    partners = torch.from_numpy(rng.permutation(len(images))).to(images.device)
    if choice == "mixup":
        return mixup(images, targets, partners, share)
    return cutmix(rng, images, targets, partners, share)


def mixup(images: Tensor, targets: Tensor, partners: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Return ``share`` of every image and target plus the rest of its partner's.

    Args:
        images: (N, C, H, W).
        targets: (N, K).
        partners: (N,) int64, indexes of other images.
        share: in [0, 1].
    """
    return torch.lerp(images[partners], images, share), torch.lerp(targets[partners], targets, share)


def cutmix(
    rng: np.random.Generator, images: Tensor, targets: Tensor, partners: Tensor, share: float
) -> tuple[Tensor, Tensor]:
    """Put a rectangle of its partner into every image, the same for all; targets follow the pixels.

    The rectangle's sides are those of the image times sqrt(1 - share), about a random point, and it is cut off at the
    edges; targets are mixed by what is left of it.

    Args:
        rng: source of the point.
        images: (N, C, H, W).
        targets: (N, K).
        partners: (N,) int64, indexes of other images.
        share: of the first image's pixels before the rectangle is cut off, in [0, 1].
    """
    height, width = images.shape[2:]
    sides = []
    for length in (height, width):
        centre, half = int(rng.integers(length)), int(length * math.sqrt(1 - share)) // 2
        sides.append(slice(max(centre - half, 0), min(centre + half, length)))
    rows, columns = sides
    mixed = images.clone()
    mixed[:, :, rows, columns] = images[partners][:, :, rows, columns]
    cut = (rows.stop - rows.start) * (columns.stop - columns.start) / (height * width)
    return mixed, torch.lerp(targets, targets[partners], cut)
