"""What DOTA's evaluation server takes: a zip with one text file a class and nothing else, made and checked.

The server (https://captain-whu.github.io/DOTA/evaluation.html) wants ``Task1_<class>.txt`` of every class, for Task 2
``Task2_<class>.txt``, without folders. It refuses a zip that lacks a class, and says little about why. A class of which
nothing was found gets an empty file, so that none is missing; :func:`check_submission` still names it, because on whole
test sets it means that something is wrong.
"""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from rtmdet_geo.annotations.dota_results import LINES, Task
from rtmdet_geo.class_names import DOTA_V1
from rtmdet_geo.dota.rules import parse_patch_name
from rtmdet_geo.errors import AnnotationError, DatasetNotFoundError, OutputError
from rtmdet_geo.outputs import check_folder, check_replaceable, staged_folder, staged_output

#: What is said of the file of a class of which nothing was found.
EMPTY_FILE = "it is empty: nothing was found of this class, which the server may refuse"
#: Faulty lines of one file that are named; the others are counted.
_EXAMPLES = 3
#: Zips know no earlier time; with one time for all, equal results are equal files.
_ZIP_TIME = (1980, 1, 1, 0, 0, 0)


class Finding(NamedTuple):
    """One fault of a submission.

    Attributes:
        place: zip, file in it, line where there is one: ``task1.zip:Task1_ship.txt:3``.
        text: what is wrong, and what to do.
    """

    place: str
    text: str

    def __str__(self) -> str:
        """Return place and text."""
        return f"{self.place}: {self.text}"


def check_submission(
    path: str | os.PathLike[str],
    classes: Sequence[str] = DOTA_V1,
    image_ids: Iterable[str] | None = None,
    *,
    task: Task = 1,
) -> list[Finding]:
    """Look for what the evaluation server would refuse or count wrong.

    Args:
        path: zip file.
        classes: all of the data set's.
        image_ids: names of its images without ending; None: any name will do.
        task: 1 oriented, 2 horizontal.

    Returns:
        Faults: files that are missing, empty, twice there, in folders, of other names; lines that do not parse, name
        patches or unknown images, or stand there twice. None found: an empty list.

    Raises:
        DatasetNotFoundError: there is no such file.
        AnnotationError: it is no zip, or damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise DatasetNotFoundError(f"submission {str(path)!r} is missing")
    known = None if image_ids is None else frozenset(image_ids)
    findings: list[Finding] = []
    try:
        with zipfile.ZipFile(path) as archive:
            members = _members(archive, path, classes, task, findings)
            for name in classes:
                file = f"Task{task}_{name}.txt"
                place = f"{path}:{file}"
                if file not in members:
                    findings.append(Finding(str(path), f"{file} is missing: add it, the server wants every class"))
                else:
                    findings += _check_lines(archive.read(members[file]), place, known, task)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise AnnotationError(f"submission {str(path)!r} is no zip file that can be read ({error})") from error
    return findings


def _members(
    archive: zipfile.ZipFile, path: Path, classes: Sequence[str], task: Task, findings: list[Finding]
) -> dict[str, zipfile.ZipInfo]:
    """Return the files of classes by name; note what else there is."""
    wanted = {f"Task{task}_{name}.txt" for name in classes}
    by_lower = {name.lower(): name for name in wanted}
    found: dict[str, zipfile.ZipInfo] = {}
    members = archive.infolist()
    nested = [member for member in members if member.is_dir() or len(PurePosixPath(member.filename).parts) > 1]
    if nested:
        number = f" ({len(nested)} entries)" if len(nested) > 1 else ""
        text = f"folders are not taken{number}: pack the files, not the folder they lie in"
        findings.append(Finding(f"{path}:{nested[0].filename}", text))
    for member in members:
        file = PurePosixPath(member.filename)
        place = f"{path}:{member.filename}"
        if member in nested:
            continue
        if file.name in found:
            findings.append(Finding(place, "it is there twice: leave one out"))
        elif file.name in wanted:
            found[file.name] = member
        else:
            near = by_lower.get(file.name.lower())
            hint = f"should it be {near!r}?" if near else f"leave it out, files are Task{task}_<class>.txt"
            findings.append(Finding(place, f"a file of this name is not taken; {hint}"))
    for member in nested:  # they are there, only not where they should be
        name = PurePosixPath(member.filename).name
        if name in wanted and not member.is_dir():
            found.setdefault(name, member)
    return found


def _check_lines(content: bytes, place: str, known: frozenset[str] | None, task: Task) -> list[Finding]:
    """Return the faults of one file."""
    try:
        lines = content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        return [Finding(place, f"it is not text ({error.reason} at byte {error.start})")]
    findings: list[Finding] = []
    num_faults, num_rows = 0, 0
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        num_rows += 1
        first = seen.setdefault(line, number)
        fault = f"the same as line {first}" if first != number else _line_fault(line, known, task)
        if fault is not None:
            num_faults += 1
            if num_faults <= _EXAMPLES:
                findings.append(Finding(f"{place}:{number}", fault))
    if num_faults > _EXAMPLES:
        findings.append(Finding(place, f"and {num_faults - _EXAMPLES} more lines with faults"))
    if not num_rows:
        findings.append(Finding(place, EMPTY_FILE))
    return findings


def _line_fault(line: str, known: frozenset[str] | None, task: Task) -> str | None:
    """Say what is wrong with a line; None if nothing is."""
    words = line.strip().split(" ")
    if len(words) != len(LINES[task].split()):
        return f"{len(words)} words parted by single spaces, but task {task} has {LINES[task]}"
    values = []
    for word in words[1:]:
        try:
            values.append(float(word))
        except ValueError:
            return f"{word!r} is no number; task {task} has {LINES[task]}"
    if not all(map(math.isfinite, values)):
        return "a number is not finite"
    if not 0 <= values[0] <= 1:
        return f"score {words[1]} is not in [0, 1]"
    if known is not None:
        return None if words[0] in known else f"image {words[0]!r} is not in the data set"
    return _patch_fault(words[0])


def _patch_fault(image: str) -> str | None:
    try:
        parse_patch_name(image)
    except AnnotationError:
        return None
    return f"{image!r} is a patch, not an image: merge first (rtmdet-geo data merge)"


def check_output(out: str | os.PathLike[str], *, overwrite: bool) -> None:
    """Check that results could be written to a folder, or to a zip file if ``out`` ends so.

    Raises:
        OutputError: ``out`` exists and ``overwrite`` is False, or is of the other kind, or a folder that holds other
            things than results, or its folder is missing.
    """
    path = Path(out)
    if _is_zip(out):
        check_folder(out, overwrite)
        return
    if not path.parent.is_dir():
        raise OutputError(f"folder {str(path.parent)!r} of the output does not exist; make it first")
    if path.exists() and not path.is_dir():
        raise OutputError(f"output {str(path)!r} is a file, and no .zip; give the name of a folder or of a .zip file")
    if path.exists() and not overwrite:
        raise OutputError(f"output {str(path)!r} exists; add --overwrite to replace it")
    check_replaceable(path, "results", lambda entry: entry.name.startswith("Task") and entry.suffix == ".txt")


def write_texts(out: str | os.PathLike[str], texts: Mapping[str, str], task: Task, *, overwrite: bool = False) -> None:
    """Write result files by class into a new folder, or into a zip file if ``out`` ends so; whole, or not at all.

    Raises:
        OutputError: see :func:`check_output`, or the operating system refuses.
    """
    check_output(out, overwrite=overwrite)
    if not _is_zip(out):
        with staged_folder(out, overwrite=overwrite) as folder:
            for name, text in texts.items():
                (folder / f"Task{task}_{name}.txt").write_text(text, encoding="utf-8", newline="\n")
        return
    with staged_output(out) as staged, zipfile.ZipFile(staged, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in texts.items():
            member = zipfile.ZipInfo(f"Task{task}_{name}.txt", _ZIP_TIME)
            member.compress_type, member.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            archive.writestr(member, text)


def _is_zip(out: str | os.PathLike[str]) -> bool:
    return os.fspath(out).lower().endswith(".zip")
