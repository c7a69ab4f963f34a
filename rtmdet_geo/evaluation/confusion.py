"""What detections take objects for: they look at objects of any class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtmdet_geo.evaluation.report import Confusion, count_confusion
from rtmdet_geo.evaluation.rotated import ClassMatches

Array = NDArray[Any]

#: IoU from which on a detection has seen an object.
CONFUSION_IOU = 0.5


def confuse_classes(
    names: Sequence[str], matches: ClassMatches, labels: Array, predicted: Array, *, is_strict: bool = False
) -> Confusion:
    """Count which classes objects have, and which they were taken for.

    Args:
        names: of the classes.
        matches: of detections with objects of any class; leave out detections that are not sure.
        labels: (G,) int64 classes of the objects.
        predicted: (D,) int64 classes of the detections, in the order in which they were matched.
        is_strict: an IoU of exactly 0.5 does not do.
    """
    is_hit, is_counted = matches.judge(CONFUSION_IOU, is_strict=is_strict)
    taken, hits = predicted[matches.order], matches.best[is_hit]
    missed = np.setdiff1d(np.flatnonzero(~matches.ignored), hits)
    false_alarms = taken[is_counted & ~is_hit]
    return count_confusion(
        names,
        np.concatenate([labels[hits], labels[missed], np.full(len(false_alarms), -1)]),
        np.concatenate([taken[is_hit], np.full(len(missed), -1), false_alarms]),
    )
