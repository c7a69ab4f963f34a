"""DOTA images and their labels cut into patches, by the rules of either split tool, on several processes."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any, Literal, get_args

import cv2
import numpy as np
from numpy.typing import NDArray

from rtmdet_geo.annotations.dota import read_dota_objects
from rtmdet_geo.cores import usable_cores
from rtmdet_geo.dota.files import decode_large, find_images, find_labels, stamp
from rtmdet_geo.dota.partial import (
    FINISHED_KEY,
    SETTINGS_FILE,
    PartialFolder,
    check_settings,
    open_partial,
    partial_path,
    read_json,
    write_whole,
)
from rtmdet_geo.dota.rules import SplitRules, Tool
from rtmdet_geo.dota.tiles import cut_pixels
from rtmdet_geo.errors import AnnotationError, Cancelled, ConfigError, OutputError
from rtmdet_geo.outputs import move_folder

ImageFormat = Literal["png", "jpg", "tif", "bmp"]

#: Folders of what a split makes: images, and labels as each tool calls them.
IMAGE_FOLDER = "images"
LABEL_FOLDERS: dict[Tool, str] = {"devkit": "labelTxt", "bboxtoolkit": "annfiles"}
_NUM_WORKERS_LIMIT = 61  # of ProcessPoolExecutor on Windows


@dataclass(frozen=True)
class _Job:
    """One image that a process cuts into a folder."""

    name: str
    image: Path
    labels: Path | None
    folder: Path
    rules: SplitRules
    image_format: ImageFormat


def split_dota(
    images: str | os.PathLike[str],
    labels: str | os.PathLike[str] | None,
    out: str | os.PathLike[str],
    *,
    tool: Tool = "devkit",
    size: int = 1024,
    gap: int = 200,
    rates: Sequence[float] = (1.0,),
    iof_threshold: float = 0.7,
    image_threshold: float = 0.6,
    pad: bool = True,
    image_format: ImageFormat = "png",
    workers: int | None = 1,
    resume: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> dict[str, Any]:
    """Cut images and labels into patches.

    ``OUT/images`` and ``OUT/labelTxt`` (with "bboxtoolkit" ``OUT/annfiles``) hold a file per patch,
    ``OUT/settings.json`` how they were made. Until all is done they grow in ``OUT.partial``. Labels are all read before
    the first image is.

    Args:
        images: folder.
        labels: folder of labelTxt files, one for each image; None: there are none (a test set).
        out: folder to make, with those above it: a data set has one for each part.
        tool: whose rules, see :mod:`rtmdet_geo.dota.rules`; so are the six that follow.
        size: side of patches in px.
        gap: px that neighbours share.
        rates: an image is cut once per rate.
        iof_threshold: share of an object that has to be inside.
        image_threshold: share of a window that has to be image ("bboxtoolkit").
        pad: fill up patches that reach beyond the image.
        image_format: of the patches; only jpg changes pixels.
        workers: processes; None: one per usable core. The result is the same for any number. A script that asks for
            several needs ``if __name__ == "__main__":``, because they are started anew. Each holds an image of its own.
        resume: go on from ``OUT.partial``: finished images whose files have not changed are not done again.
        overwrite: replace an earlier split, or ``OUT.partial``.
        progress: called with images done and all images.
        cancelled: asked between images.

    Returns:
        ``out``, ``tool``, ``images``, ``tiles``, ``objects`` (lines of labels in patches), ``difficult`` (of these
        marked 1 or 2), ``reused`` (images that an earlier run had finished).

    Raises:
        ConfigError: a value is outside its range, or ``OUT.partial`` was begun with others.
        DatasetNotFoundError: a folder is missing, or holds no images.
        AnnotationError: an image does not decode, labels are malformed, or one lacks the other; the message names it.
        OutputError: ``out`` exists or cannot be written.
        Cancelled: ``cancelled`` said so; ``OUT.partial`` stays.
    """
    rules = SplitRules(tool, size, gap, tuple(float(rate) for rate in rates), iof_threshold, image_threshold, pad)
    if image_format not in get_args(ImageFormat):
        raise ConfigError(f"image_format={image_format!r} is unknown; choose {', '.join(get_args(ImageFormat))}")
    if workers is not None and workers < 1:
        raise ConfigError(f"workers={workers} must be at least 1")
    out = Path(out)
    image_files = find_images(images)
    label_files = {} if labels is None else find_labels(labels, image_files, os.fspath(images))
    settings: dict[str, Any] = {**asdict(rules), "image_format": image_format, "has_labels": labels is not None}
    stamps = {name: [stamp(path), stamp(label_files.get(name))] for name, path in image_files.items()}
    finished = _finished(out, settings, stamps, resume=resume, overwrite=overwrite)
    if finished is not None:
        return _summary(out, rules, finished, len(finished))
    for path in label_files.values():
        read_dota_objects(path)
    partial = open_partial(out, settings, resume=resume, overwrite=overwrite)
    for name in (IMAGE_FOLDER, *([LABEL_FOLDERS[tool]] if labels is not None else [])):
        (partial.folder / name).mkdir(exist_ok=True)
    done = {name: record for name, record in partial.records().items() if record.get("stamps") == stamps.get(name)}
    jobs = [
        _Job(name, path, label_files.get(name), partial.folder, rules, image_format)
        for name, path in image_files.items()
        if name not in done
    ]
    num_reused = len(done)
    for name, record in _run(jobs, workers, cancelled):
        done[name] = {**record, "stamps": stamps[name]}
        partial.record(name, done[name])
        if progress is not None:
            progress(len(done), len(image_files))
    records = {name: done[name] for name in image_files}
    _publish(partial, out, settings, records, rules, overwrite=overwrite)
    return _summary(out, rules, records, num_reused)


def _finished(
    out: Path, settings: dict[str, Any], stamps: dict[str, Any], *, resume: bool, overwrite: bool
) -> dict[str, dict[str, Any]] | None:
    """Return the records of a split that is complete already, None where there is something to do.

    Raises:
        ConfigError: it was made with other settings.
        OutputError: it shall not be replaced, or is no split.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    made = read_json(out / SETTINGS_FILE)
    if made is None or FINISHED_KEY not in made:
        raise OutputError(f"output {str(out)!r} exists and is no earlier split; choose another name")
    if overwrite:
        return None
    if not resume:
        raise OutputError(f"output {str(out)!r} exists; add --overwrite to replace it")
    records: dict[str, dict[str, Any]] = made.pop(FINISHED_KEY)
    check_settings({**settings, "rates": list(settings["rates"])}, made, str(out))
    if {name: record.get("stamps") for name, record in records.items()} != stamps:
        raise OutputError(f"output {str(out)!r} was made of other images or labels; add --overwrite to replace it")
    return records


def _run(
    jobs: Sequence[_Job], workers: int | None, cancelled: Callable[[], bool] | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name and record of each image as it is finished.

    Raises:
        Cancelled: ``cancelled`` said so.
    """
    number = min(workers or usable_cores(), len(jobs), _NUM_WORKERS_LIMIT)

    def check(left: int) -> None:
        if cancelled is not None and cancelled():
            raise Cancelled(f"stopped with {left} images to do; --resume goes on from there")

    if number <= 1:
        for index, job in enumerate(jobs):
            check(len(jobs) - index)
            yield job.name, _split_image(job)
        return
    with _pool(number) as executor:
        waiting: dict[Future[dict[str, Any]], str] = {executor.submit(_split_image, job): job.name for job in jobs}
        while waiting:
            for future in wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED).done:
                yield waiting.pop(future), future.result()
            check(len(waiting))


@contextmanager
def _pool(number: int) -> Iterator[ProcessPoolExecutor]:
    """Give processes that end with this one; after a failure those at work finish their image and no more."""
    executor = ProcessPoolExecutor(number, multiprocessing.get_context("spawn"), initializer=_start_worker)
    try:
        yield executor
    except BrokenProcessPool as error:
        raise OutputError(
            f"a process was killed, for lack of memory perhaps: --resume with less than {number} --workers"
        ) from error
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, keep OpenCV from threads of its own, and end when the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    cv2.setNumThreads(1)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _split_image(job: _Job) -> dict[str, Any]:
    """Write all patches of one image; return how many there are and what is in them."""
    objects = None if job.labels is None else read_dota_objects(job.labels)
    image = decode_large(job.image)
    height, width = image.shape[:2]
    windows = job.rules.windows(width, height)
    labels_of = {}
    if objects is not None:
        labels_of = dict(zip(windows, job.rules.cut(objects, width, height, windows), strict=True))
    marks: Counter[bool] = Counter()
    for window, pixels in cut_pixels(image, windows, job.rules):
        name = f"{job.name}__{window.name}"
        if objects is not None:
            lines = labels_of[window]
            marks.update(line.endswith(" 0") for line in lines)
            text = "".join(f"{line}\n" for line in lines)
            write_whole(job.folder / LABEL_FOLDERS[job.rules.tool] / f"{name}.txt", text.encode())
        write_whole(job.folder / IMAGE_FOLDER / f"{name}.{job.image_format}", _encode(pixels, job.image_format))
    return {
        "width": width,
        "height": height,
        "tiles": len(windows),
        "objects": marks.total(),
        "difficult": marks[False],
    }


def _encode(pixels: NDArray[np.uint8], image_format: ImageFormat) -> bytes:
    """Return (H, W, 3) red, green, blue as the bytes of an image file."""
    is_encoded, content = cv2.imencode(f".{image_format}", np.ascontiguousarray(pixels[..., ::-1]))
    if not is_encoded:
        raise AnnotationError(
            f"a patch of {pixels.shape[1]} x {pixels.shape[0]} px cannot be written as {image_format}"
        )
    return content.tobytes()


def _publish(
    partial: PartialFolder,
    out: Path,
    settings: dict[str, Any],
    records: dict[str, dict[str, Any]],
    rules: SplitRules,
    *,
    overwrite: bool,
) -> None:
    """Remove what does not belong to the split, write how it was made, and give the folder its name."""
    names = {
        f"{name}__{window.name}"
        for name, record in records.items()
        for window in rules.windows(record["width"], record["height"])
    }
    for folder in (IMAGE_FOLDER, LABEL_FOLDERS[rules.tool]):
        for path in (partial.folder / folder).glob("*") if (partial.folder / folder).is_dir() else ():
            if path.stem not in names:  # of an image that is no longer there, or a file that was being written
                path.unlink()
    write_whole(partial.folder / SETTINGS_FILE, _settings_text(settings, records))
    partial.forget_records()
    old = partial_path(out).with_name(f".{out.name}.old")
    if out.exists():
        shutil.rmtree(old, ignore_errors=True)
    try:
        move_folder(partial.folder, out, old)
    except OSError as error:
        raise OutputError(
            f"cannot rename {str(partial.folder)!r} to {str(out)!r}: {error.strerror or error}"
        ) from error
    shutil.rmtree(old, ignore_errors=True)


def _settings_text(settings: dict[str, Any], records: dict[str, dict[str, Any]]) -> bytes:
    return json.dumps({**settings, FINISHED_KEY: records}, indent=1).encode()


def _summary(out: Path, rules: SplitRules, records: dict[str, dict[str, Any]], num_reused: int) -> dict[str, Any]:
    sums = {key: sum(int(record[key]) for record in records.values()) for key in ("tiles", "objects", "difficult")}
    return {"out": str(out), "tool": rules.tool, "images": len(records), **sums, "reused": num_reused}
