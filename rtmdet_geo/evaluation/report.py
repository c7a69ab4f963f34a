"""What an evaluation found, whoever did it: figures, rows of a table, curves, confusion; as text, JSON and CSV."""

from __future__ import annotations

import csv
import io
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rtmdet_geo.charts import require_matplotlib
from rtmdet_geo.errors import OutputError
from rtmdet_geo.evaluation.rotated import Curve
from rtmdet_geo.outputs import check_folder, check_not_among, staged_output

logger = logging.getLogger(__name__)

Array = NDArray[Any]

#: What the last row and column of a confusion matrix are called.
BACKGROUND = "background"
#: Stands in tables where there is no number.
_NOTHING = "-"


@dataclass(frozen=True)
class Confusion:
    """What was labelled as which class, and what it was taken for.

    Attributes:
        names: of the C classes.
        matrix: (C+1, C+1) int64, rows labelled, columns predicted; the last of each is background: the last column
            counts objects that were missed, the last row false alarms; the last of both is 0.

    Raises:
        ValueError: the matrix has another shape.
    """

    names: tuple[str, ...]
    matrix: Array

    def __post_init__(self) -> None:
        """Check the shape."""
        size = len(self.names) + 1
        if self.matrix.shape != (size, size):
            raise ValueError(f"{len(self.names)} classes need a matrix of ({size}, {size}), not {self.matrix.shape}")


def count_confusion(names: Sequence[str], labelled: ArrayLike, predicted: ArrayLike) -> Confusion:
    """Count pairs of classes.

    Args:
        names: of the C classes.
        labelled: (P,) integers, class of the labelled object of each pair; -1 where a prediction has no object.
        predicted: (P,) integers, class that was predicted; -1 where an object was missed.

    Example:
        >>> count_confusion(["plane", "ship"], [0, 1, -1], [0, -1, 0]).matrix.tolist()
        [[1, 0, 0], [0, 0, 1], [1, 0, 0]]
    """
    size = len(names) + 1
    rows, columns = (np.asarray(values, np.int64) % size for values in (labelled, predicted))
    counts = np.bincount(rows * size + columns, minlength=size * size)
    return Confusion(tuple(names), counts.reshape(size, size).astype(np.int64))


@dataclass(frozen=True)
class EvaluationReport:
    """How good predictions are.

    Attributes:
        protocol: how it was worked out, such as "dota task 1, devkit".
        figures: over all classes, by name; the first is the one that counts. nan where nothing is labelled.
        rows: of the table, mostly one a class; a name of a column may be missing in some.
        curves: precision over recall by class name.
        confusion: of classes, or None.
        hit_scores, miss_scores: (H,), (M,) scores of the predictions that found an object, and of those that did not.
    """

    protocol: str
    figures: dict[str, float]
    rows: tuple[dict[str, Any], ...] = ()
    curves: dict[str, Curve] = field(default_factory=dict)
    confusion: Confusion | None = None
    hit_scores: Array = field(default_factory=lambda: np.zeros(0))
    miss_scores: Array = field(default_factory=lambda: np.zeros(0))


def report_text(report: EvaluationReport) -> str:
    """Return the report as lines of text: protocol, the table of rows, the figures below it."""
    blocks = [report.protocol]
    if report.rows:
        blocks.append(format_table(report.rows))
    if report.figures:
        width = max(map(len, report.figures))
        blocks.append("\n".join(f"{name:<{width}}  {_cell(value)}" for name, value in report.figures.items()))
    return "\n\n".join(blocks)


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as aligned columns below their names: numbers to the right, text to the left."""
    columns = column_names(rows)
    cells = [[_cell(row.get(name)) for name in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    is_text = [any(isinstance(row.get(name), str) for row in rows) for name in columns]
    lines = [
        "  ".join(
            f"{cell:<{width}}" if left else f"{cell:>{width}}"
            for cell, width, left in zip(line, widths, is_text, strict=True)
        ).rstrip()
        for line in [columns, *cells]
    ]
    return "\n".join(lines)


def report_json(report: EvaluationReport) -> dict[str, Any]:
    """Return the report as plain objects that ``json.dumps`` takes: nan is None. Curves and scores are left out."""
    content: dict[str, Any] = {"protocol": report.protocol, "figures": report.figures, "rows": list(report.rows)}
    if report.confusion is not None:
        names = [*report.confusion.names, BACKGROUND]
        content["confusion"] = {"names": names, "matrix": report.confusion.matrix}
    plain: dict[str, Any] = _plain(content)
    return plain


def report_csv(report: EvaluationReport) -> str:
    """Return the rows as CSV with a header (RFC 4180); without rows the figures, one row. nan is empty."""
    return rows_csv(report.rows or (report.figures,))


def rows_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as CSV with a header (RFC 4180); nan and what a row does not have is empty."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, column_names(rows), restval="")
    writer.writeheader()
    writer.writerows({name: "" if value is None else value for name, value in _plain(row).items()} for row in rows)
    return stream.getvalue()


def confusion_csv(confusion: Confusion) -> str:
    """Return a confusion matrix as CSV: a row a labelled class, a column a predicted one, background last."""
    names = [*confusion.names, BACKGROUND]
    stream = io.StringIO()
    writer = csv.writer(stream)
    writer.writerow(["labelled", *names])
    writer.writerows([name, *row] for name, row in zip(names, confusion.matrix.tolist(), strict=True))
    return stream.getvalue()


def column_names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names of columns in order of first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row))


def check_report_outputs(
    *,
    csv: str | os.PathLike[str] | None = None,
    plots: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    sources: Sequence[str | os.PathLike[str]] = (),
) -> None:
    """Check before a long run that :func:`write_report` could write there, and would not write over its sources.

    Raises:
        OutputError: as :func:`write_report`, as far as it can be known without writing; or an output is a source.
        MissingDependencyError: plots are asked for without matplotlib.
    """
    from rtmdet_geo.evaluation.plots import CONFUSION_TABLE, PICTURES

    check_files(csv, plots, (*PICTURES, CONFUSION_TABLE), overwrite, sources)


def check_files(
    csv: str | os.PathLike[str] | None,
    plots: str | os.PathLike[str] | None,
    pictures: Sequence[str],
    overwrite: bool,
    sources: Sequence[str | os.PathLike[str]] = (),
) -> None:
    """Check before a long run that a CSV file and pictures in a folder, which need not be there, could be written.

    Raises:
        OutputError: a file exists and ``overwrite`` is False, or is one of the sources; or its folder is not writable,
            or is a file.
        MissingDependencyError: pictures are asked for without matplotlib.
    """
    if csv is not None:
        check_not_among(csv, sources)
        check_folder(csv, overwrite)
    if plots is not None:
        require_matplotlib()
        folder = Path(plots)
        if folder.exists() and not folder.is_dir():
            raise OutputError(f"folder of plots {str(plots)!r} is a file; give another name")
        for name in pictures if folder.is_dir() else ():
            check_folder(folder / name, overwrite)


def write_report(
    report: EvaluationReport,
    *,
    csv: str | os.PathLike[str] | None = None,
    plots: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> list[Path]:
    """Write the table and the pictures of a report.

    Args:
        report: what to write.
        csv: file for the rows.
        plots: folder for the pictures, made if it is not there: ``precision_recall.png``, ``confusion.png``,
            ``scores.png``, those that there is something to draw for, and ``confusion.csv``, the numbers by name.
        overwrite: replace files that are there.

    Returns:
        The files written.

    Raises:
        OutputError: a file exists and ``overwrite`` is False, then none is written; or one cannot be written.
        MissingDependencyError: plots are asked for without matplotlib.
    """
    check_report_outputs(csv=csv, plots=plots, overwrite=overwrite)
    contents: dict[Path, bytes] = {}
    if csv is not None:
        contents[Path(csv)] = report_csv(report).encode()
    if plots is not None:
        from rtmdet_geo.evaluation.plots import CONFUSION_TABLE, draw_report

        drawn = draw_report(report)
        if not drawn:
            logger.warning("nothing was labelled or predicted: there is nothing to draw into %r", os.fspath(plots))
        if report.confusion is not None and report.confusion.matrix.any():
            drawn[CONFUSION_TABLE] = confusion_csv(report.confusion).encode()
        contents |= {Path(plots) / name: picture for name, picture in drawn.items()}
        plots = plots if drawn else None
    write_files(contents, None if plots is None else Path(plots), overwrite)
    return list(contents)


def write_files(contents: Mapping[Path, bytes], folder: Path | None, overwrite: bool) -> None:
    """Write files, each whole or not at all; ``folder``, where some of them lie, is made if it is not there.

    Raises:
        OutputError: a file exists and ``overwrite`` is False, before any is written; or one cannot be written.
    """
    for path in contents:
        if path.parent != folder or folder.is_dir():
            check_folder(path, overwrite)
    try:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make folder {str(folder)!r}: {error.strerror or error}") from error
    for path, content in contents.items():
        with staged_output(path) as staged:
            staged.write_bytes(content)


def _cell(value: Any) -> str:
    """Return a value as a table shows it."""
    value = value.item() if hasattr(value, "item") else value
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return _NOTHING
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) <= 1 else f"{value:.2f}"
    return str(value)


def _plain(value: Any) -> Any:
    """Turn arrays, numpy numbers and tuples into what JSON has; a number that is not finite becomes None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value
