"""DOTA result files: what was found, one text file a class, as the benchmark's server takes them.

``Task1_<class>.txt`` has a line ``image score x1 y1 x2 y2 x3 y3 x4 y4`` for every oriented object,
``Task2_<class>.txt`` a line ``image score x1 y1 x2 y2`` for every horizontal one: the image's name without ending,
corners in px. An empty file says that nothing of the class was found. Format:
https://captain-whu.github.io/DOTA/tasks.html.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rtmdet_geo.errors import AnnotationError, DatasetNotFoundError
from rtmdet_geo.outputs import staged_folder

Task = Literal[1, 2]

#: What stands in a line of each task.
LINES = {1: "image score x1 y1 x2 y2 x3 y3 x4 y4", 2: "image score x1 y1 x2 y2"}


@dataclass(frozen=True)
class ResultRows:
    """D detections of one class.

    Attributes:
        image_ids: D names of images.
        scores: (D,) float64.
        polygons: (D, 8) float64 corners in px of Task 1; None for Task 2.
        hboxes: (D, 4) float64 x1 y1 x2 y2 in px of Task 2; None for Task 1.
        path: file that they were read from, for messages; None if from none.
        lines: (D,) int64: their lines in the file, from 1; None if from none.
    """

    image_ids: tuple[str, ...]
    scores: NDArray[np.float64]
    polygons: NDArray[np.float64] | None = None
    hboxes: NDArray[np.float64] | None = None
    path: Path | None = None
    lines: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        """Return D."""
        return len(self.image_ids)

    def place(self, index: int) -> str:
        """Return where a detection stands: ``results/Task1_ship.txt:3``."""
        if self.path is None or self.lines is None:
            return f"detection {index}"
        return f"{self.path}:{self.lines[index]}"


def read_results(
    folder: str | Path,
    task: Task,
    classes: Sequence[str] | None = None,
    *,
    seen: Callable[[str], None] | None = None,
) -> dict[str, ResultRows]:
    """Read a folder of result files, or a zip of them; files of other names are passed over.

    Args:
        folder: of the files, or the zip.
        task: 1 oriented, 2 horizontal.
        classes: names that there must be a file for, and no other; None takes what there is.
        seen: called with the name of each class after its file was read.

    Returns:
        Detections by name of the class, in the order of ``classes``, or of the names.

    Raises:
        DatasetNotFoundError: the folder is missing or holds no result file, or a class has none.
        AnnotationError: a line is malformed or repeated, or a file is of a class that is not among ``classes``; the
            message begins with the file, and the line where there is one. Or the zip cannot be read.
    """
    folder = Path(folder)
    start = f"Task{task}_"
    if folder.is_dir():
        files = {path.stem.removeprefix(start): path for path in sorted(folder.glob(f"{start}*.txt"))}
    elif folder.is_file():
        files = _files_in_zip(folder, start)
    else:
        raise DatasetNotFoundError(f"folder of results {str(folder)!r} is missing; give the folder of {start}*.txt")
    if not files:
        raise DatasetNotFoundError(f"no result files ({start}<class>.txt) in {str(folder)!r}: is it task {task}?")
    if classes is not None:
        _check_classes(files, classes, folder, start)
    found = {}
    for name in files if classes is None else classes:
        content = _content(files[name]) if folder.is_dir() else _unpacked(folder, files[name])
        found[name] = _read_rows(content, files[name], task)
        if seen is not None:
            seen(name)
    return found


def _check_classes(files: Mapping[str, Path], classes: Sequence[str], folder: Path, start: str) -> None:
    unknown = sorted(set(files) - set(classes))
    if unknown:
        raise AnnotationError(
            f"{files[unknown[0]]}: class {unknown[0]!r} is not among {', '.join(classes)}; "
            "rename the file or name other classes"
        )
    missing = [name for name in classes if name not in files]
    if missing:
        raise DatasetNotFoundError(
            f"{str(folder)!r} has no {start}{missing[0]}.txt ({len(missing)} of {len(classes)} classes have no file); "
            "an empty file says that nothing was found"
        )


def read_result_file(path: str | Path, task: Task) -> ResultRows:
    """Read the result file of one class.

    Raises:
        AnnotationError: as :func:`read_results`.
    """
    return _read_rows(_content(Path(path)), Path(path), task)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise AnnotationError(f"cannot read result file {str(path)!r}: {error.strerror or error}") from error


def _files_in_zip(path: Path, start: str) -> dict[str, Path]:
    """Return the result files of a zip by class, as paths below it; folders in the zip do not matter."""
    found: dict[str, Path] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if not name.startswith("__MACOSX/")]
    except (zipfile.BadZipFile, OSError) as error:
        raise AnnotationError(
            f"results {str(path)!r} are neither a folder nor a zip ({error}); give the folder of {start}*.txt, or a zip"
        ) from error
    for name in sorted(names):
        file = PurePosixPath(name)
        if not (file.name.startswith(start) and file.suffix == ".txt"):
            continue
        if found.setdefault(file.stem.removeprefix(start), path / name) != path / name or names.count(name) > 1:
            raise AnnotationError(f"{path}: {file.name} is there twice; leave one out")
    return found


def _unpacked(archive: Path, member: Path) -> bytes:
    """Return the content of a file in a zip."""
    try:
        with zipfile.ZipFile(archive) as opened:
            return opened.read(member.relative_to(archive).as_posix())
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OSError, zlib.error) as error:
        raise AnnotationError(f"{member} cannot be read: {error}; is the zip whole, and without password?") from error


def _lines(content: bytes, path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the number, from 1, and the words of every line that is not blank."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise AnnotationError(
            f"result file {str(path)!r} is not text ({error.reason} at byte {error.start})"
        ) from error
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if words:
            yield number, words


def _read_rows(content: bytes, path: Path, task: Task) -> ResultRows:
    num_words = len(LINES[task].split())
    image_ids: list[str] = []
    values: list[list[float]] = []
    seen: dict[str, int] = {}
    names: dict[str, str] = {}  # one text for each image
    for number, words in _lines(content, path):
        if len(words) != num_words:
            raise AnnotationError(f"{path}:{number}: {len(words)} words, but task {task} has {LINES[task]}")
        first = seen.setdefault(" ".join(words), number)
        if first != number:
            raise AnnotationError(f"{path}:{number}: the same as line {first}; leave one of them out")
        image_ids.append(names.setdefault(words[0], words[0]))
        try:
            values.append(list(map(float, words[1:])))
        except ValueError as error:
            wrong = next(word for word in words[1:] if not _is_number(word))
            raise AnnotationError(f"{path}:{number}: {wrong!r} is no number; a line is {LINES[task]}") from error
    table = np.array(values, np.float64).reshape(-1, num_words - 1)
    lines = np.fromiter(seen.values(), np.int64, len(seen))
    corners = np.ascontiguousarray(table[:, 1:])
    rows = ResultRows(
        tuple(image_ids),
        np.ascontiguousarray(table[:, 0]),
        polygons=corners if task == 1 else None,
        hboxes=corners if task == 2 else None,
        path=path,
        lines=lines,
    )
    _check_rows(
        rows,
        "score or coordinates are not finite; write the results again",
        np.asarray(~np.isfinite(table).all(axis=1)),
    )
    if task == 2:
        _check_rows(
            rows, "x2 < x1 or y2 < y1; give x1 y1 x2 y2", np.asarray((corners[:, 2:] < corners[:, :2]).any(axis=1))
        )
    return rows


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _check_rows(rows: ResultRows, fault: str, is_bad: NDArray[np.bool_]) -> None:
    """Raise AnnotationError for the first row that has a fault."""
    if is_bad.any():
        raise AnnotationError(f"{rows.place(int(np.argmax(is_bad)))}: {fault}")


def write_results(
    folder: str | Path, rows: Mapping[str, ResultRows], task: Task, classes: Sequence[str], *, overwrite: bool = False
) -> None:
    """Write a folder of result files, one for each class: the whole folder appears, or nothing.

    Numbers are written with all their digits; round them first where the file should be small.

    Args:
        folder: to make.
        rows: detections by class; a class without gets an empty file.
        task: 1 oriented, 2 horizontal.
        classes: names of the files.
        overwrite: replace a folder that is there.

    Raises:
        AnnotationError: detections are of a class that is not among ``classes``, lack the task's corners, or a number
            of them is not finite.
        OutputError: the folder exists and ``overwrite`` is False, or cannot be written.
    """
    unknown = sorted(set(rows) - set(classes))
    if unknown:
        raise AnnotationError(f"class {unknown[0]!r} is not among {', '.join(classes)}")
    texts = {name: "".join(_lines_of(name, rows[name], task)) if name in rows else "" for name in classes}
    with staged_folder(folder, overwrite=overwrite) as staged:
        for name, text in texts.items():
            (staged / f"Task{task}_{name}.txt").write_text(text, encoding="utf-8", newline="\n")


def _lines_of(name: str, rows: ResultRows, task: Task) -> list[str]:
    corners = rows.polygons if task == 1 else rows.hboxes
    if corners is None:
        raise AnnotationError(f"detections of class {name!r} have no corners of task {task}")
    table = np.column_stack([rows.scores, corners])
    if not np.isfinite(table).all():
        raise AnnotationError(f"detection {int(np.argmin(np.isfinite(table).all(axis=1)))} of {name!r} is not finite")
    return [f"{image} {' '.join(map(str, row))}\n" for image, row in zip(rows.image_ids, table.tolist(), strict=True)]
