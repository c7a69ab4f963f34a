"""Predictions of a classifier in a CSV file against images in folders of classes, or a CSV file of labels.

The first column of both files is the image: its path below the folder of the data set, ``ship/1.jpg``, or a name.
Labels have the class in the second. Predictions have one of two forms, told by the header: one column a class, named by
it and holding scores; or the names of the classes, the most probable first.
"""

from __future__ import annotations

import csv
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtmdet_geo.annotations.folders import FoldersSource, list_folders
from rtmdet_geo.errors import AnnotationError, DatasetNotFoundError
from rtmdet_geo.evaluation.classification import accuracy, accuracy_by_class, true_ranks
from rtmdet_geo.evaluation.report import EvaluationReport, count_confusion

logger = logging.getLogger(__name__)

Array = NDArray[Any]


def evaluate_classification(predictions: str | Path, labels: str | Path) -> EvaluationReport:
    """Score predicted classes of images.

    Args:
        predictions: CSV file with a header and a row for each image.
        labels: folder with a folder of images for each class (see :mod:`rtmdet_geo.annotations.folders`), or CSV file.

    Returns:
        ``top1``: share of images whose first class is the true one; ``top5``: whose first five have it, left out where
        predictions name fewer than five of more classes; ``top1_class_mean``: mean over classes. The first by class.

    Raises:
        DatasetNotFoundError: a file or folder is missing or empty.
        AnnotationError: a file is malformed, or they do not speak of the same images; it is named with the line.
    """
    truth = _read_labels(Path(labels))
    table = _Table.read(Path(predictions))
    _check_images(table, truth, Path(labels))
    guesses = _guess(table, [truth[name] for name in table.images])
    ranks, classes, true_labels = guesses.ranks, guesses.classes, guesses.true_labels
    rows = [row for row in accuracy_by_class(ranks, true_labels, classes) if row["num_images"]]
    figures = {"top1": accuracy(ranks)}
    if guesses.num_told >= min(5, len(classes)):
        figures["top5"] = accuracy(ranks, 5)
        for row in rows:
            row["top5"] = accuracy(ranks[true_labels == classes.index(row["class"])], 5)
    figures["top1_class_mean"] = float(np.mean([row["top1"] for row in rows]))
    is_hit = ranks == 0
    return EvaluationReport(
        f"classification of {len(ranks)} images, {len(classes)} classes",
        figures,
        tuple(rows),
        confusion=count_confusion(classes, true_labels, guesses.first),
        hit_scores=guesses.certainty[is_hit[: len(guesses.certainty)]],
        miss_scores=guesses.certainty[~is_hit[: len(guesses.certainty)]],
    )


@dataclass(frozen=True)
class _Guesses:
    """What was guessed of N images.

    Attributes:
        classes: names, in the order of labels.
        true_labels: (N,) int64.
        ranks: (N,) number of classes guessed before the true one; the number of classes where it is not named.
        first: (N,) int64 class that was guessed first.
        certainty: (N,) its score; (0,) where none is told.
        num_told: number of guesses that every image has.
    """

    classes: tuple[str, ...]
    true_labels: Array
    ranks: Array
    first: Array
    certainty: Array
    num_told: int


def _guess(table: _Table, true_classes: Sequence[str]) -> _Guesses:
    if table.has_scores(set(true_classes)):
        scores = table.scores()
        true_labels = np.array([table.header.index(name) for name in true_classes], np.int64)
        ranks = true_ranks(scores, true_labels)
        return _Guesses(table.header, true_labels, ranks, scores.argmax(axis=1), scores.max(axis=1), len(table.header))
    named = table.named()
    classes = tuple(sorted({*true_classes, *(name for row in named for name in row)}))
    label_of = {name: label for label, name in enumerate(classes)}
    places = [row.index(true) if true in row else len(classes) for row, true in zip(named, true_classes, strict=True)]
    true_labels = np.array([label_of[name] for name in true_classes], np.int64)
    first = np.array([label_of[row[0]] for row in named], np.int64)
    return _Guesses(classes, true_labels, np.array(places), first, np.zeros(0), min(map(len, named)))


@dataclass(frozen=True)
class _Table:
    """A CSV file of predictions: names of the columns after the first, images, their cells, and their lines."""

    path: Path
    header: tuple[str, ...]
    images: tuple[str, ...]
    cells: tuple[tuple[str, ...], ...]
    lines: tuple[int, ...]

    @classmethod
    def read(cls, path: Path) -> _Table:
        rows = _read_csv(path, "file of predictions")
        if not rows or len(rows[0][1]) < 2:
            raise AnnotationError(f"{path} has no header of image and classes")
        header = tuple(rows[0][1][1:])
        if len(set(header)) < len(header):
            raise AnnotationError(f"{path}:{rows[0][0]}: the header has the same name twice")
        seen: dict[str, int] = {}
        for number, row in rows[1:]:
            if len(row) != len(header) + 1:
                raise AnnotationError(f"{path}:{number}: {len(row)} cells, but the header has {len(header) + 1}")
            if seen.setdefault(row[0], number) != number:
                raise AnnotationError(f"{path}:{number}: image {row[0]!r} stands in line {seen[row[0]]} already")
        if not seen:
            raise AnnotationError(f"{path} has a header and no predictions")
        return cls(path, header, tuple(seen), tuple(tuple(row[1:]) for _, row in rows[1:]), tuple(seen.values()))

    def has_scores(self, classes: set[str]) -> bool:
        """Tell whether the cells are scores of the classes that the columns are named by, not names of classes.

        Raises:
            AnnotationError: they are numbers, but a class that is labelled has no column.
        """
        missing, others = sorted(classes - set(self.header)), [name for name in self.header if name not in classes]
        if missing:
            if all(cell in classes or _number(cell) is None for cell in self.cells[0]):
                return False
            which = f"column {others[0]!r} is no class of the labels, and none" if others else "no column"
            raise AnnotationError(f"{self.path}: {which} is class {missing[0]!r}; the labels have {_few(classes)}")
        if others:
            logger.warning("%s: no image is labelled %s, but these columns count as guesses", self.path, _few(others))
        return True

    def scores(self) -> Array:
        """Return the cells as numbers, (N, K)."""
        values = []
        for number, row in zip(self.lines, self.cells, strict=True):
            try:
                values.append([float(cell) for cell in row])
            except ValueError as error:
                at = next(at for at, cell in enumerate(row) if _number(cell) is None)
                place = f"{self.path}:{number}"
                raise AnnotationError(f"{place}: score {row[at]!r} of {self.header[at]!r} is no number") from error
            if not all(map(math.isfinite, values[-1])):
                raise AnnotationError(f"{self.path}:{number}: a score is not finite")
        return np.array(values, np.float64)

    def named(self) -> list[list[str]]:
        """Return the classes that each row names, without empty cells."""
        rows = []
        for number, row in zip(self.lines, self.cells, strict=True):
            rows.append([cell for cell in row if cell])
            if not rows[-1] or len(set(rows[-1])) < len(rows[-1]):
                raise AnnotationError(f"{self.path}:{number}: it names {'a class twice' if rows[-1] else 'no class'}")
        return rows


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None


def _few(names: Iterable[str]) -> str:
    """Return the first of some names."""
    found = sorted(names)
    return ", ".join(found[:10]) + (f" and {len(found) - 10} more" if len(found) > 10 else "")


def _read_csv(path: Path, what: str) -> list[tuple[int, list[str]]]:
    """Return the rows of a CSV file with the lines that they end in; cells without the white space around them."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.reader(stream, strict=True)
            rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if any(row)]
    except FileNotFoundError as error:
        raise DatasetNotFoundError(f"{what} {str(path)!r} is missing") from error
    except OSError as error:
        raise AnnotationError(f"cannot read {str(path)!r}: {error.strerror or error}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise AnnotationError(f"{path} is no CSV file: {error}") from error
    for sign, name in ((";", "semicolons"), ("\t", "tabs")):
        if rows and len(rows[0][1]) == 1 and sign in rows[0][1][0]:
            raise AnnotationError(f"{path}:{rows[0][0]}: its cells are parted by {name}; save it with commas")
    return rows


def _read_labels(path: Path) -> dict[str, str]:
    """Return the true class by image."""
    if path.is_dir():
        return dict(list_folders(FoldersSource(path)).images)
    found: dict[str, str] = {}
    for number, row in _read_csv(path, "file or folder of labels")[1:]:
        if len(row) != 2 or not row[1]:
            raise AnnotationError(f"{path}:{number}: it should be image,class")
        if found.setdefault(row[0], row[1]) != row[1]:
            raise AnnotationError(f"{path}:{number}: image {row[0]!r} is of class {found[row[0]]!r} before")
    if not found:
        raise DatasetNotFoundError(f"{str(path)!r} labels no image; the first line is its header")
    return found


def _check_images(table: _Table, truth: dict[str, str], labels: Path) -> None:
    unknown: Sequence[int] = [index for index, name in enumerate(table.images) if name not in truth]
    if unknown:
        raise AnnotationError(
            f"{table.path}:{table.lines[unknown[0]]}: image {table.images[unknown[0]]!r} has no label in "
            f"{str(labels)!r} ({len(unknown)} such images), which has names such as {next(iter(truth))!r}"
        )
    missing = sorted(set(truth) - set(table.images))
    if missing:
        raise AnnotationError(f"{table.path} has no prediction for {missing[0]!r} ({len(missing)} such images)")
