"""HRSC2016: ships found, as a Task 1 result file, against its XML files or text files of rotated boxes.

By MMRotate's rules, which published figures follow (:mod:`rtmdet_geo.evaluation.voc`): VOC07 is the mean precision at
11 recalls, VOC12 the area under the curve.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from rtmdet_geo.annotations.dota_results import read_result_file, read_results
from rtmdet_geo.annotations.hrsc import read_hrsc
from rtmdet_geo.annotations.labels import ImageLabels
from rtmdet_geo.annotations.rbox import read_rbox
from rtmdet_geo.class_names import HRSC
from rtmdet_geo.errors import DatasetNotFoundError
from rtmdet_geo.evaluation.dota import Steps, label_files, read_objects, warn_of_other_classes
from rtmdet_geo.evaluation.report import EvaluationReport
from rtmdet_geo.evaluation.voc import Difficult, score_results, voc_report

VocPoints = Literal["voc07", "voc12"]


def evaluate_hrsc(
    results: str | Path,
    labels: str | Path,
    *,
    points: VocPoints = "voc07",
    difficult: Difficult = "count",
    progress: Callable[[int, int], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> EvaluationReport:
    """Score ships found in HRSC2016.

    Args:
        results: file with a line ``image score x1 y1 ... x4 y4`` a ship, or the folder or zip of ``Task1_ship.txt``.
        labels: folder of HRSC2016's XML files, or of text files ``cx cy w h angle``; each is an image that was
            searched.
        points: whose figures come first.
        difficult: what becomes of difficult ships; published figures count them.
        progress: called with the number of label files read, and of all.
        cancelled: asked between them whether to stop.

    Returns:
        Figures ``AP50_voc07``, ``AP75_voc07``, ``AP50_95_voc07``, and the same ending in ``_voc12``.

    Raises:
        DatasetNotFoundError: a file or folder is missing, or the folder of labels holds both kinds.
        AnnotationError: a file is malformed, or speaks of an image without labels; it is named with the line.
        Cancelled: the caller wished so.
    """
    folder, path = Path(labels), Path(results)
    (ship,) = HRSC
    path = path / f"Task1_{ship}.txt" if path.is_dir() else path
    if not path.is_file():
        raise DatasetNotFoundError(f"result file {str(path)!r} is missing")
    is_xml = any(folder.glob("*.xml"))
    if is_xml and any(folder.glob("*.txt")):
        raise DatasetNotFoundError(f"{str(folder)!r} holds .xml and .txt files; leave one kind of labels in it")

    def read_text(file: Path) -> ImageLabels:
        return read_rbox(file, ship)

    read: Callable[[Path], ImageLabels] = read_hrsc if is_xml else read_text
    paths = label_files(folder, "*.xml" if is_xml else "*.txt")
    objects = read_objects(paths, read, Steps(len(paths), progress, cancelled))
    warn_of_other_classes(objects, HRSC)
    found = read_results(path, 1, HRSC) if zipfile.is_zipfile(path) else {ship: read_result_file(path, 1)}
    scores = score_results(found, objects, HRSC, protocol="mmrotate", difficult=difficult)
    title = f"HRSC2016, difficult ships: {difficult}"
    return voc_report(
        scores, title, points="11" if points == "voc07" else "area", suffixes={"11": "voc07", "area": "voc12"}
    )
