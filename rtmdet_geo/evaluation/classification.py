"""Accuracy of classifiers: the share of images whose class is the best guess, or among the best five. numpy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def true_ranks(scores: Array, labels: Array) -> Array:
    """Return how many classes are guessed before the true one, for each image.

    Of equal scores the lower label comes first, as in :func:`rtmdet_geo.classify.classify_image`; a score that is not
    a number counts as better than the true class's, and a true class without a number comes last.

    Args:
        scores: (N, K) floating, higher is better.
        labels: (N,) int64, the true classes.

    Returns:
        (N,) int64: 0 where the best guess is true.

    Example:
        >>> true_ranks(np.array([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2]]), np.array([0, 2])).tolist()
        [0, 2]
    """
    truth = np.take_along_axis(scores, labels[:, None], axis=1)
    is_before = ~(scores <= truth) | ((scores == truth) & (np.arange(scores.shape[1]) < labels[:, None]))
    is_before[np.arange(len(labels)), labels] = False
    return np.asarray(is_before.sum(axis=1))


def accuracy(ranks: Array, k: int = 1) -> float:
    """Return the share of images whose true class is among the best k guesses; nan without images.

    Args:
        ranks: (N,) of :func:`true_ranks`.
        k: number of guesses.
    """
    return float((ranks < k).mean()) if len(ranks) else math.nan


def accuracy_by_class(ranks: Array, labels: Array, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Return a row per class: ``class``, ``num_images``, ``top1`` (nan without images).

    Args:
        ranks: (N,) of :func:`true_ranks`.
        labels: (N,) int64, the true classes.
        classes: names in label order.
    """
    return [
        {"class": name, "num_images": int((labels == label).sum()), "top1": accuracy(ranks[labels == label])}
        for label, name in enumerate(classes)
    ]
