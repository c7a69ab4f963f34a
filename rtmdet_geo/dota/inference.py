"""A model over DOTA images, whole or already cut into patches: from folder to the files that are submitted.

Patches go to the model as the published test settings have them (MMRotate's rotated_rtmdet configurations): resized to
its input with the sides' ratio kept, padded; several classes for one place are several detections, NMS per patch, the
best 2,000 of each. A whole image is cut in memory by the very windows of ``split_dota``, so both ways find the same as
long as patches were stored without loss.
"""

from __future__ import annotations

import math
import os
import warnings
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from rtmdet_geo.annotations.dota_results import ResultRows, Task
from rtmdet_geo.backends import Backend, choose_batch_size
from rtmdet_geo.boxes import boxes_to_hboxes, polygons_to_hboxes
from rtmdet_geo.dota.files import decode_large, find_images, large_image_size, stamp
from rtmdet_geo.dota.merge import PatchBoxes, merge_boxes, merge_rows, result_texts
from rtmdet_geo.dota.partial import SETTINGS_FILE, open_partial, read_json
from rtmdet_geo.dota.rules import PatchName, SplitRules, Tool, find_tool, parse_patch_name
from rtmdet_geo.dota.submission import check_output, write_texts
from rtmdet_geo.dota.tiles import cut_pixels
from rtmdet_geo.errors import AnnotationError, Cancelled, ConfigError, OutputError, SaturatedTileWarning
from rtmdet_geo.images import array_scene, load_model
from rtmdet_geo.nms import nms_of_kind
from rtmdet_geo.prefetch import Prefetch
from rtmdet_geo.preprocess import letterbox
from rtmdet_geo.structures import Detections
from rtmdet_geo.views import View, restore

_RGB = ("red", "green", "blue")
#: Pixels of a patch (H, W, 3) with its name.
_Patch = tuple[str, NDArray[np.uint8]]


@dataclass(frozen=True)
class _Settings:
    """What is kept of what the model finds; see :func:`run_dota`."""

    score_threshold: float
    iou_threshold: float
    merge_iou_threshold: float
    max_detections: int
    multi_label: bool
    batch_size: int | None

    def __post_init__(self) -> None:
        for name in ("score_threshold", "iou_threshold", "merge_iou_threshold"):
            value = getattr(self, name)
            if not (math.isfinite(value) and 0 <= value <= 1):
                raise ConfigError(f"{name}={value!r} must be in [0, 1]")
        for name in ("max_detections", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value} must be at least 1")


@dataclass(frozen=True)
class _Source:
    """One image: its own file, or those of its patches, in the order in which they are run."""

    name: str
    files: tuple[Path, ...]
    num_patches: int


def run_dota(
    model: Backend | str | os.PathLike[str] | None,
    images: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    task2: str | os.PathLike[str] | None = None,
    patches: bool = False,
    tool: Tool | None = None,
    size: int | None = None,
    gap: int | None = None,
    rates: Sequence[float] = (1.0,),
    score_threshold: float = 0.05,
    iou_threshold: float = 0.1,
    merge_iou_threshold: float = 0.1,
    max_detections: int = 2000,
    multi_label: bool = True,
    batch_size: int | None = None,
    names: Collection[str] | None = None,
    classes: Sequence[str] = (),
    resume: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> dict[str, Any]:
    """Find objects in DOTA images and write the result files.

    Finished images are kept in ``OUT.partial`` until the end. Scores are written with six decimals, px with two.

    Args:
        model: what :func:`rtmdet_geo.load_model` gave; a name or path is loaded.
        images: folder of images, or of patches.
        out: folder to make, or ``.zip`` file to submit: Task 1 of models of rotated boxes, Task 2 of others.
        task2: likewise, for Task 2 of a model of rotated boxes: the boxes that enclose those of Task 1.
        patches: the folder holds patches, named as ``tool`` does, and not whole images.
        tool: whose windows and rules of merging, see :mod:`rtmdet_geo.dota.rules` and :mod:`rtmdet_geo.dota.merge`;
            None: "devkit"; of patches, as their names say, or the ``settings.json`` beside their folder.
        size: side of patches in px; None: the model's. Of no matter, as the two that follow, where patches are given.
        gap: px that neighbours share; None: the model's overlap, half of ``size`` at most.
        rates: an image is cut once per rate.
        score_threshold: least score, in [0, 1].
        iou_threshold: of NMS within a patch, in [0, 1].
        merge_iou_threshold: of NMS between patches, in [0, 1].
        max_detections: the best so many of each patch are kept.
        multi_label: several classes for one place are several detections.
        batch_size: patches per call of the engine; None is the engine's own.
        names: images to take, without ending; None takes all of the folder.
        classes: names that there must be a file for, besides the model's; those that it does not know are empty.
        resume: go on from ``OUT.partial``: images whose files have not changed are not run again.
        overwrite: replace earlier results, or ``OUT.partial``.
        progress: called with patches done and all patches.
        cancelled: asked between patches.

    Returns:
        ``out``, ``task``, ``task2`` (its path or None), ``images``, ``patches``, ``detections``, ``empty_classes``
        (names), ``reused`` (images that an earlier run had finished).

    Raises:
        AnnotationError: an image does not decode, or is no patch; it is named.
        ConfigError: a value is outside its range, patches are not the tool's, or ``OUT.partial`` was begun with others.
        DatasetNotFoundError: the folder is missing, or holds no images.
        OutputError: an output exists or cannot be written.
        Cancelled: ``cancelled`` said so; ``OUT.partial`` stays.
    """
    settings = _Settings(score_threshold, iou_threshold, merge_iou_threshold, max_detections, multi_label, batch_size)
    for path in (out, *([task2] if task2 is not None else [])):
        check_output(path, overwrite=overwrite)
    if task2 is not None and os.path.abspath(task2) == os.path.abspath(out):
        raise OutputError(f"outputs of task 1 and task 2 are both {os.fspath(out)!r}; give two names")
    engine = load_model(model) if model is None or isinstance(model, str | os.PathLike) else model
    is_rotated = engine.spec.object_kind == "rotated"
    if task2 is not None and not is_rotated:
        raise ConfigError(
            f"model {engine.spec.name!r} finds horizontal boxes, so the output is task 2: leave task2 out"
        )
    if size is None:
        size = engine.fixed_tile_size or engine.spec.tile_size
    if gap is None:
        gap = min(engine.spec.overlap, size // 2)
    rules = SplitRules(
        _tool_of_patches(Path(images), tool) if patches else tool or "devkit",
        size,
        gap,
        tuple(float(rate) for rate in rates),
    )
    sources = _patch_sources(images) if patches else _image_sources(images, rules, names)
    if names is not None:
        sources = [source for source in sources if source.name in names]
    model_file = [str(engine.path), stamp(engine.path) if engine.path.is_file() else None]
    kept = asdict(settings) | asdict(rules) | {"patches": patches, "model": model_file, "batch_size": None}
    partial = open_partial(out, kept, resume=resume, overwrite=overwrite)
    stamps = {source.name: [stamp(path) for path in source.files] for source in sources}
    done = {name: record for name, record in partial.records().items() if record.get("stamps") == stamps.get(name)}
    num_reused = len(done)
    with _told_when_saturated(engine, score_threshold):
        todo = [source for source in sources if source.name not in done]
        for name, rows in _search(engine, todo, sources, rules, settings, patches, progress, cancelled):
            done[name] = {"stamps": stamps[name], "rows": rows}
            partial.record(name, done[name])
    task: Task = 1 if is_rotated else 2
    by_class = _join([(source.name, done[source.name]["rows"]) for source in sources], engine.spec.classes, task)
    by_class |= _join([], [name for name in classes if name not in by_class], task)
    write_texts(out, result_texts(by_class), task, overwrite=overwrite)
    if task2 is not None:
        write_texts(task2, result_texts({name: _enclosing(rows) for name, rows in by_class.items()}), 2, overwrite=True)
    partial.remove()
    return {
        "out": os.fspath(out),
        "task": task,
        "task2": None if task2 is None else os.fspath(task2),
        "images": len(sources),
        "patches": sum(source.num_patches for source in sources),
        "detections": sum(map(len, by_class.values())),
        "empty_classes": [name for name, rows in by_class.items() if not len(rows)],
        "reused": num_reused,
    }


@contextmanager
def _told_when_saturated(engine: Backend, score_threshold: float) -> Iterator[None]:
    """Warn at the end if patches held more candidates than the model returns."""
    before = engine.num_saturated
    yield
    if engine.num_saturated > before:
        warnings.warn(
            f"{engine.num_saturated - before} patches hold more candidates above score {score_threshold:g} than the "
            "model returns, so some objects may be missing; raise the threshold",
            SaturatedTileWarning,
            stacklevel=4,
        )


def _search(
    engine: Backend,
    todo: Sequence[_Source],
    sources: Sequence[_Source],
    rules: SplitRules,
    settings: _Settings,
    patches: bool,
    progress: Callable[[int, int], None] | None,
    cancelled: Callable[[], bool] | None,
) -> Iterator[tuple[str, dict[str, list[list[float]]]]]:
    """Yield the name of each image that is to do, of all, and what is left in it by class."""
    total = sum(source.num_patches for source in sources)
    count = total - sum(source.num_patches for source in todo)
    for source in todo:
        found = []
        folder = str(source.files[0].parent)
        for patch in _run(engine, _pixels(source, rules, patches), folder, settings, cancelled):
            found.append(patch)
            count += 1
            if progress is not None:
                progress(count, total)
        yield source.name, _merge(found, engine, rules.tool, settings)


def _image_sources(folder: str | os.PathLike[str], rules: SplitRules, names: Collection[str] | None) -> list[_Source]:
    """Return whole images; their headers are read, which finds files that are no images before the work begins.

    Raises:
        AnnotationError: they are patches.
    """
    sources = []
    for name, path in find_images(folder).items():
        if names is not None and name not in names:
            continue
        if _is_patch(name):
            raise AnnotationError(f"{str(path)!r} has the name of a patch; add --patches if the folder holds patches")
        sources.append(_Source(name, (path,), len(rules.windows(*large_image_size(path)))))
    return sources


def _is_patch(name: str) -> bool:
    try:
        parse_patch_name(name)
    except AnnotationError:
        return False
    return True


def _patch_sources(folder: str | os.PathLike[str]) -> list[_Source]:
    """Return the images whose patches a folder holds.

    Raises:
        AnnotationError: a file has the name of no patch.
    """
    found: dict[str, list[tuple[tuple[float, int, int], Path]]] = {}
    for name, path in find_images(folder).items():
        patch = parse_patch_name(name, str(path))
        found.setdefault(patch.image, []).append((_place(patch), path))
    return [_Source(name, tuple(path for _, path in sorted(found[name])), len(found[name])) for name in sorted(found)]


def _tool_of_patches(folder: Path, tool: Tool | None) -> Tool:
    """Return whose patches a folder holds.

    Raises:
        ConfigError: their names, or the settings of the split that made them, contradict ``tool``.
        DatasetNotFoundError: there are none.
    """
    settings = read_json(folder.resolve().parent / SETTINGS_FILE) or {}
    made_by = settings.get("tool") if settings.get("tool") in get_args(Tool) else None
    if made_by is not None and tool not in (None, made_by):
        raise ConfigError(f"patches of {str(folder)!r} were cut by {made_by}, as {SETTINGS_FILE} says, not by {tool}")
    return find_tool(find_images(folder), tool or made_by)


def _place(patch: PatchName) -> tuple[float, int, int]:
    """Return what patches of an image are sorted by, so that both ways give equal scores the same order."""
    return float(patch.scale), patch.x, patch.y


def _pixels(source: _Source, rules: SplitRules, patches: bool) -> Iterator[_Patch]:
    """Yield the patches of an image, cut now or read."""
    if patches:
        for path in source.files:
            pixels = decode_large(path)
            yield path.stem, np.repeat(pixels[..., None], 3, axis=2) if pixels.ndim == 2 else pixels
        return
    image = decode_large(source.files[0])
    windows = rules.windows(image.shape[1], image.shape[0])
    named = {f"{source.name}__{window.name}": window for window in windows}
    order = sorted(named, key=lambda name: _place(parse_patch_name(name)))
    cut = cut_pixels(image, [named[name] for name in order], rules)
    yield from ((name, pixels) for name, (_, pixels) in zip(order, cut, strict=True))


def _run(
    engine: Backend,
    patches: Iterable[_Patch],
    folder: str,
    settings: _Settings,
    cancelled: Callable[[], bool] | None,
) -> Iterator[tuple[str, Detections]]:
    """Yield what is found in each patch, in px of it, best score first; warnings name the folder, so each is said once.

    Raises:
        Cancelled: ``cancelled`` said so.
    """
    side = engine.fixed_tile_size or engine.spec.tile_size
    in_flight: deque[tuple[str, int, int, tuple[float, float]]] = deque()

    batch_size = choose_batch_size(engine, settings.batch_size)

    def batches() -> Iterator[NDArray[np.uint8]]:
        waiting: list[NDArray[np.uint8]] = []
        for name, pixels in patches:
            height, width = pixels.shape[:2]
            shown, _ = array_scene(pixels, _RGB, engine.spec, name=folder).read(0, 0, width, height)
            boxed = letterbox(shown.transpose(1, 2, 0), side)
            waiting.append(boxed.image.transpose(2, 0, 1))
            in_flight.append((name, height, width, boxed.scale_factor))
            if len(waiting) == batch_size:
                yield np.stack(waiting)
                waiting = []
        if waiting:
            yield np.stack(waiting)

    with Prefetch(batches(), size=2, name="patches") as ready:
        found = engine.run(ready, score_threshold=settings.score_threshold, multi_label=settings.multi_label)
        for detections in chain.from_iterable(found):
            if cancelled is not None and cancelled():
                raise Cancelled("stopped between two patches; --resume goes on with the image that was being searched")
            name, height, width, factors = in_flight.popleft()
            in_patch = restore(detections, View(*factors), height, width)
            kept = nms_of_kind(
                in_patch.boxes,
                in_patch.scores,
                in_patch.labels,
                kind=in_patch.kind,
                iou_threshold=settings.iou_threshold,
            )
            yield name, in_patch.select(kept[: settings.max_detections])


def _merge(
    found: Sequence[tuple[str, Detections]], engine: Backend, tool: Tool, settings: _Settings
) -> dict[str, list[list[float]]]:
    """Return score and corners of what is left in one image, by class."""
    classes, threshold = engine.spec.classes, settings.merge_iou_threshold
    if engine.spec.object_kind == "rotated":
        boxes = [PatchBoxes(name, part.boxes, part.scores, part.labels) for name, part in found]
        by_class = merge_boxes(boxes, classes, tool=tool, iou_threshold=threshold)
    else:
        by_class = {}
        for label, name in enumerate(classes):
            own = [(patch, part.select(part.labels == label)) for patch, part in found]
            rows = ResultRows(
                tuple(patch for patch, part in own for _ in range(len(part))),
                np.concatenate([np.zeros(0), *(part.scores for _, part in own)]),
                hboxes=np.concatenate([np.zeros((0, 4)), *(boxes_to_hboxes(part.boxes) for _, part in own)]),
            )
            by_class[name] = merge_rows(rows, tool=tool, iou_threshold=threshold)
    return {name: np.column_stack([rows.scores, _corners(rows)]).tolist() for name, rows in by_class.items()}


def _corners(rows: ResultRows) -> NDArray[np.float64]:
    corners = rows.hboxes if rows.polygons is None else rows.polygons
    assert corners is not None
    return corners


def _join(by_image: Sequence[tuple[str, dict[str, Any]]], classes: Sequence[str], task: Task) -> dict[str, ResultRows]:
    """Return the detections of all images by class."""
    joined = {}
    for name in classes:
        images = tuple(image for image, rows in by_image for _ in rows[name])
        values = [row for _, rows in by_image for row in rows[name]]
        table = np.array(values, np.float64).reshape(-1, 9 if task == 1 else 5)
        corners = np.ascontiguousarray(table[:, 1:])
        joined[name] = ResultRows(
            images, table[:, 0], polygons=corners if task == 1 else None, hboxes=corners if task == 2 else None
        )
    return joined


def _enclosing(rows: ResultRows) -> ResultRows:
    """Return Task 2 of Task 1."""
    return ResultRows(rows.image_ids, rows.scores, hboxes=polygons_to_hboxes(_corners(rows)))
