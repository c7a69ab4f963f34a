"""A model over labelled images, scored by the labels' own protocol: result files are written and evaluated.

What the model is shown, and what is kept of what it finds, are the published test settings:

* dota: patches of the model's size, see :mod:`rtmdet_geo.dota.inference`; score .05, NMS .1, 2,000 a patch.
* hrsc, rbox: whole images, resized to the model's input; score .05, NMS .1, 2,000.
* coco: whole images; boxes score .001, NMS .65, 300; masks .05, .6, 100. (A model file keeps fewer candidates a level
  than the published 30,000, see :mod:`rtmdet_geo.variants`; weights run by torch can keep more.)
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from rtmdet_geo.annotations.coco import CocoLabels, read_coco
from rtmdet_geo.annotations.dota_results import ResultRows, write_results
from rtmdet_geo.backends import Backend
from rtmdet_geo.boxes import boxes_to_hboxes, boxes_to_polygons
from rtmdet_geo.class_names import HRSC
from rtmdet_geo.dota.files import decode_large, find_images
from rtmdet_geo.dota.inference import run_dota
from rtmdet_geo.dota.submission import check_output
from rtmdet_geo.errors import Cancelled, ConfigError, DatasetNotFoundError, UnknownClassError
from rtmdet_geo.evaluation.coco import run_lengths
from rtmdet_geo.evaluation.coco_files import evaluate_coco_results
from rtmdet_geo.evaluation.dota import evaluate_dota
from rtmdet_geo.evaluation.hrsc import evaluate_hrsc
from rtmdet_geo.evaluation.report import EvaluationReport
from rtmdet_geo.evaluation.voc import Protocol
from rtmdet_geo.images import Prediction, load_model, predict
from rtmdet_geo.outputs import check_folder, check_not_input, staged_output

EvaluatedFormat = Literal["dota", "hrsc", "rbox", "coco"]

#: Score threshold, IoU threshold and number of detections of the published tests, by kind of the model.
_TEST_SETTINGS = {"rotated": (0.05, 0.1, 2000), "horizontal": (0.001, 0.65, 300), "mask": (0.05, 0.6, 100)}
_SUFFIXES = {"dota": ".txt", "hrsc": ".xml", "rbox": ".txt"}


def evaluate_model(
    model: Backend | str | os.PathLike[str] | None,
    images: str | os.PathLike[str],
    labels: str | os.PathLike[str],
    *,
    label_format: EvaluatedFormat = "dota",
    protocol: Protocol = "devkit",
    rates: Sequence[float] = (1.0,),
    batch_size: int | None = None,
    results: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> EvaluationReport:
    """Run a model over labelled images and score what it finds.

    Args:
        model: what :func:`rtmdet_geo.load_model` gave; a name or path is loaded.
        images: folder of images; those without labels are left out.
        labels: folder of labelTxt ("dota"), XML ("hrsc") or text files ("rbox": cx cy w h angle, ships), or the COCO
            file. Classes are matched by name.
        label_format: of the labels; decides the protocol.
        protocol: whose rules count for DOTA, see :func:`rtmdet_geo.evaluation.dota.evaluate_dota`.
        rates: DOTA images are cut at these scales.
        batch_size: DOTA patches per call of the engine; None is the engine's own.
        results: keep the result files there: a folder to make, of COCO a ``.json`` file; None forgets them.
        overwrite: replace an earlier ``results``.
        progress: called with images (DOTA: patches) done and all.
        cancelled: asked between images.

    Returns:
        The report of ``evaluate_dota`` (Task 1, of models of horizontal boxes Task 2), ``evaluate_hrsc`` or
        ``evaluate_coco_results`` (masks of models that find them).

    Raises:
        ConfigError: the model's kind does not go with the labels.
        UnknownClassError: model and labels have no class in common.
        DatasetNotFoundError: a file or folder is missing, or labels have no image.
        AnnotationError: an image does not decode, or labels are malformed; it is named.
        OutputError: ``results`` exists, is the file of labels, or cannot be written.
        Cancelled: ``cancelled`` said so.
    """
    if label_format not in get_args(EvaluatedFormat):
        raise ConfigError(f"label_format={label_format!r} is unknown; choose {', '.join(get_args(EvaluatedFormat))}")
    engine = load_model(model) if model is None or isinstance(model, str | os.PathLike) else model
    kind = engine.spec.object_kind
    if label_format != "dota" and (kind == "rotated") == (label_format == "coco"):
        wanted = "horizontal boxes or masks" if label_format == "coco" else "rotated boxes"
        raise ConfigError(f"model {engine.spec.name!r} finds {kind} objects; {label_format} labels want {wanted}")
    with ExitStack() as stack:
        if results is None:
            place = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "results.json"
        else:
            place = Path(results)
        if label_format == "coco":
            check_not_input(place, labels, "source")
            check_folder(place, overwrite)
            _search_coco(engine, Path(images), read_coco(Path(labels)), place, progress, cancelled)
            return evaluate_coco_results(place, os.fspath(labels), measure="masks" if kind == "mask" else "boxes")
        names = _labelled_images(Path(images), Path(labels), _SUFFIXES[label_format])
        if label_format == "dota":
            summary = run_dota(
                engine,
                images,
                place,
                rates=rates,
                batch_size=batch_size,
                names=frozenset(names),
                overwrite=overwrite,
                progress=progress,
                cancelled=cancelled,
            )
            return evaluate_dota(
                place, Path(labels), classes=engine.spec.classes, task=summary["task"], protocol=protocol
            )
        check_output(place, overwrite=overwrite)
        _search_ships(engine, names, place, overwrite, progress, cancelled)
        return evaluate_hrsc(place, Path(labels))


def _labelled_images(images: Path, labels: Path, suffix: str) -> dict[str, Path]:
    """Return the images that have labels, by name without ending.

    Raises:
        DatasetNotFoundError: a folder is missing, there are no labels, or labels have no image.
    """
    if not labels.is_dir():
        raise DatasetNotFoundError(f"folder of labels {str(labels)!r} is missing")
    files = find_images(images)
    stems = sorted(path.stem for path in labels.glob(f"*{suffix}"))
    if not stems:
        raise DatasetNotFoundError(f"no label files (*{suffix}) in {str(labels)!r}")
    missing = [stem for stem in stems if stem not in files]
    if missing:
        raise DatasetNotFoundError(
            f"labels {str(labels / (missing[0] + suffix))!r} have no image in {str(images)!r} "
            f"({len(missing)} of {len(stems)} without image)"
        )
    return {stem: files[stem] for stem in stems}


def _predictions(
    engine: Backend,
    files: Sequence[Path],
    progress: Callable[[int, int], None] | None,
    cancelled: Callable[[], bool] | None,
) -> Iterator[tuple[Prediction, tuple[int, int]]]:
    """Yield what is found in each image, and its height and width in px.

    Raises:
        Cancelled: ``cancelled`` said so.
    """
    score, iou, number = _TEST_SETTINGS[engine.spec.object_kind]
    for done, path in enumerate(files, 1):
        if cancelled is not None and cancelled():
            raise Cancelled(f"stopped after {done - 1} of {len(files)} images; nothing was scored")
        image = decode_large(path)
        found = predict(
            engine,
            image,
            resize="letterbox",
            score_threshold=score,
            iou_threshold=iou,
            max_detections=number,
            multi_label=True,
        )
        yield found, (image.shape[0], image.shape[1])
        if progress is not None:
            progress(done, len(files))


def _search_ships(
    engine: Backend,
    names: Mapping[str, Path],
    place: Path,
    overwrite: bool,
    progress: Callable[[int, int], None] | None,
    cancelled: Callable[[], bool] | None,
) -> None:
    """Write the ships that are found as Task 1."""
    (ship,) = HRSC
    if ship not in engine.spec.classes:
        raise UnknownClassError(
            f"model {engine.spec.name!r} knows no {ship}; it knows {', '.join(engine.spec.classes)}"
        )
    ids, scores, corners = [], [np.zeros(0)], [np.zeros((0, 8))]
    label = engine.spec.classes.index(ship)
    for name, (found, _) in zip(names, _predictions(engine, list(names.values()), progress, cancelled), strict=True):
        own = found.labels == label
        ids += [name] * int(own.sum())
        scores.append(found.scores[own].astype(np.float64))
        corners.append(boxes_to_polygons(found.boxes[own]).reshape(-1, 8))
    rows = ResultRows(tuple(ids), np.concatenate(scores), polygons=np.concatenate(corners))
    write_results(place, {ship: rows}, 1, HRSC, overwrite=overwrite)


def _search_coco(
    engine: Backend,
    images: Path,
    labels: CocoLabels,
    place: Path,
    progress: Callable[[int, int], None] | None,
    cancelled: Callable[[], bool] | None,
) -> None:
    """Write what is found as a COCO result file."""
    ids = {name: number for number, name in labels.categories.items()}
    if not set(ids) & set(engine.spec.classes):
        few, others = ", ".join(engine.spec.classes[:5]), ", ".join(list(ids)[:5])
        raise UnknownClassError(f"model {engine.spec.name!r} ({few}) and labels ({others}) have no class in common")
    if not images.is_dir():
        raise DatasetNotFoundError(f"folder of images {str(images)!r} is missing")
    files = {number: images / str(image.get("file_name")) for number, image in labels.images.items()}
    for number, path in files.items():
        if not path.is_file():
            raise DatasetNotFoundError(f"image {number} of the labels, {str(path)!r}, is missing")
    entries: list[dict[str, Any]] = []
    predictions = _predictions(engine, list(files.values()), progress, cancelled)
    for number, (found, (height, width)) in zip(files, predictions, strict=True):
        hboxes = boxes_to_hboxes(found.boxes)
        for index, name in enumerate(found.class_names):
            if name not in ids:
                continue
            x, y, right, bottom = hboxes[index].tolist()
            entry = {
                "image_id": number,
                "category_id": ids[name],
                "bbox": [x, y, right - x, bottom - y],
                "score": float(found.scores[index]),
            }
            if found.masks is not None:
                entry["segmentation"] = run_lengths(found.masks[index], height, width)
            entries.append(entry)
    with staged_output(place) as staged:
        staged.write_text(json.dumps(entries), encoding="utf-8")
