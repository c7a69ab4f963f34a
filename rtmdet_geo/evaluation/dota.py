"""DOTA Task 1 (oriented) and Task 2 (horizontal): a folder of result files against a folder of labelTxt files.

What counts as a hit, and how precision becomes an average: :mod:`rtmdet_geo.evaluation.voc`.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rtmdet_geo.annotations.dota import read_dota
from rtmdet_geo.annotations.dota_results import Task, read_results
from rtmdet_geo.annotations.label_sets import read_class_list as read_class_file
from rtmdet_geo.annotations.labels import ImageLabels
from rtmdet_geo.boxes import boxes_to_polygons
from rtmdet_geo.class_names import KNOWN
from rtmdet_geo.errors import AnnotationError, Cancelled, DatasetNotFoundError
from rtmdet_geo.evaluation.report import EvaluationReport
from rtmdet_geo.evaluation.voc import Difficult, LabelledObjects, Points, Protocol, score_results, voc_report

logger = logging.getLogger(__name__)

#: Names of the lists of classes.
VERSIONS = ("v1.0", "v1.5", "v2.0")
_LOOKS_LIKE_LIST = re.compile(r"(dota_?)?v\d[\d.]*|.*\.txt")


def evaluate_dota(
    results: str | Path,
    labels: str | Path,
    *,
    classes: str | Path | Sequence[str] = "dota_v1.0",
    task: Task = 1,
    protocol: Protocol = "devkit",
    difficult: Difficult | None = None,
    points: Points = "11",
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> EvaluationReport:
    """Score DOTA result files.

    Args:
        results: folder or zip of ``Task1_<class>.txt`` or ``Task2_<class>.txt``, one for each class.
        labels: folder of labelTxt files of the whole images; each is an image that was searched.
        classes: "dota_v1.0", "dota_v1.5", "dota_v2.0" (or without "dota_"), a file with one name a line, names with
            commas, or a sequence of them.
        task: 1 oriented, 2 horizontal: enclosing boxes of the labelled corners.
        protocol: whose rules, see :mod:`rtmdet_geo.evaluation.voc`.
        difficult: what becomes of difficult objects; None: as the protocol does.
        points: "11" (Pascal VOC 2007, what DOTA's server reports) or "area" (2010); its figures come first.
        threads: classes scored at a time; None takes the cores there are.
        progress: called with the number of steps done, and of all: files read, then classes scored.
        cancelled: asked between steps whether to stop.

    Returns:
        Figures ``AP50_11``, ``AP75_11``, ``AP50_95_11``, the same ending in ``_area``, and by protocol "devkit" the
        same ending in ``_11_present`` and ``_area_present``, which are means over classes with objects; without these
        means per class.

    Raises:
        DatasetNotFoundError: a folder, a class's file or the file of classes is missing.
        AnnotationError: a file is malformed, or speaks of unknown classes or images; it is named with the line.
        ValueError: ``difficult`` is not the development kit's.
        Cancelled: the caller wished so.
    """
    names = read_class_list(classes)
    paths = label_files(Path(labels), "*.txt")
    steps = Steps(len(paths) + 2 * len(names), progress, cancelled)
    objects = read_objects(paths, lambda path: read_dota(path, with_outlines=True), steps)
    warn_of_other_classes(objects, names)
    scores = score_results(
        read_results(results, task, names, seen=lambda _: steps.take()),
        objects,
        names,
        task=task,
        protocol=protocol,
        difficult=difficult,
        threads=threads,
        progress=lambda *_: steps.take(),
        cancelled=cancelled,
    )
    absent = [name for name in names if name not in scores.present]
    if absent and protocol == "devkit":
        logger.warning(
            "no labelled object of %d of %d classes counts (%s): the development kit's mean takes them as 0, "
            "figures ending in _present leave them out",
            len(absent),
            len(names),
            ", ".join(absent),
        )
    way = "" if difficult is None else f", difficult objects: {difficult}"
    return voc_report(scores, f"DOTA task {task}, protocol {protocol}{way}", points=points)


def read_class_list(classes: str | Path | Sequence[str]) -> tuple[str, ...]:
    """Return the names that a version, a file with one name a line, names with commas, or a sequence stand for.

    A version is "v1.0" as well as "dota_v1.0".

    Raises:
        DatasetNotFoundError: it looks like a version or a file, but is none.
        AnnotationError: the file is empty, not text, or names a class twice.
    """
    if not isinstance(classes, str | Path):
        return tuple(classes)
    text, path = str(classes), Path(classes)
    if text.removeprefix("dota_") in VERSIONS:
        return KNOWN[f"dota_{text.removeprefix('dota_')}"]
    if not path.is_file():
        if isinstance(classes, Path) or len(path.parts) > 1 or _LOOKS_LIKE_LIST.fullmatch(text):
            raise DatasetNotFoundError(
                f"{text!r} is none of dota_{', dota_'.join(VERSIONS)}, and no file of class names"
            )
        return _named_classes(text)
    return read_class_file(path)


def _named_classes(text: str) -> tuple[str, ...]:
    """Return names that are written with commas."""
    names = tuple(name.strip() for name in text.split(","))
    if not all(names) or len(set(names)) < len(names):
        raise AnnotationError(f"classes {text!r}: a name is empty or there twice; write them as plane,ship")
    return names


class Steps:
    """Tells how many steps of a long evaluation are done, and hears whether to stop."""

    def __init__(
        self, number: int, progress: Callable[[int, int], None] | None, cancelled: Callable[[], bool] | None
    ) -> None:
        """Remember the number of all steps."""
        self.done, self.number = 0, number
        self._progress, self._cancelled = progress, cancelled

    def take(self) -> None:
        """Count a step.

        Raises:
            Cancelled: the caller wished so.
        """
        self.done += 1
        if self._progress is not None:
            self._progress(self.done, self.number)
        if self._cancelled is not None and self._cancelled():
            raise Cancelled("evaluation stopped")


def label_files(folder: Path, pattern: str) -> list[Path]:
    """Return the label files of a folder, by name.

    Raises:
        DatasetNotFoundError: the folder is missing or holds no such file.
    """
    if not folder.is_dir():
        fault = "is a file; give the folder that it lies in" if folder.exists() else "is missing"
        raise DatasetNotFoundError(f"folder of labels {str(folder)!r} {fault}")
    paths = sorted(folder.glob(pattern))
    if not paths:
        raise DatasetNotFoundError(f"no label files ({pattern}) in {str(folder)!r}")
    return paths


def read_objects(paths: Sequence[Path], read: Callable[[Path], ImageLabels], steps: Steps) -> LabelledObjects:
    """Read label files, one an image.

    Args:
        paths: of the files, at least one, in one folder.
        read: a reader that keeps the four corners of each object as its outline, or no outlines at all.
        steps: one is taken for each file.

    Raises:
        AnnotationError: a file is malformed.
        Cancelled: the caller wished so.
    """
    parts = []
    for path in paths:
        parts.append(read(path))
        steps.take()
    return LabelledObjects(
        tuple(path.stem for path in paths),
        np.repeat(np.arange(len(parts)), [len(part) for part in parts]),
        tuple(name for part in parts for name in part.class_names),
        np.concatenate([_corners(part) for part in parts]),
        np.concatenate([part.boxes for part in parts]),
        np.concatenate([part.difficult for part in parts]),
        repr(str(paths[0].parent)),
    )


def _corners(labels: ImageLabels) -> NDArray[np.float64]:
    """Return (N, 8) corners: those that were kept, or those of the boxes."""
    if not labels.outlines:
        return boxes_to_polygons(labels.boxes).reshape(-1, 8)
    return np.array([outline[0][0] for outline in labels.outlines]).reshape(-1, 8)


def warn_of_other_classes(objects: LabelledObjects, classes: Sequence[str]) -> None:
    """Log how many objects are of classes that are not scored."""
    others = Counter(name for name in objects.class_names if name not in set(classes))
    if others:
        counts = ", ".join(f"{number} {name}" for name, number in sorted(others.items()))
        logger.warning("labelled objects of classes that are not scored: %s", counts)
